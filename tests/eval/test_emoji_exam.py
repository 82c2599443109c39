"""The emoji world's exams, with a judge of random weights and a tiny BERT in MiniLM's place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo import desk

from stepdistill import cli
from stepdistill.eval import cards, emoji, score
from stepdistill.eval.measures import by_group
from stepdistill.worlds.emoji import data, judge, text


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    for module in data.PACKAGES:
        pytest.importorskip(module)
    with desk.lived_in(desk.build(tmp_path_factory.mktemp("worlds"))) as patch:
        patch.setattr(text, "WIDTH", desk.WIDTH)
        patch.setattr(judge, "FOLDER", folder := tmp_path_factory.mktemp("judge"))
        torch.manual_seed(0)
        save_file(judge.Judge(small := judge.Architecture((8, 16, 32), 16)).state_dict(), folder / judge.WEIGHTS)
        (folder / judge.CONFIG).write_text(json.dumps({"architecture": small.to_dict()}))
        yield patch
    emoji.reference.cache_clear()


@pytest.fixture(scope="module")
def exam() -> cards.Exam:
    return cards.ready("emoji-held-out")


def test_the_pictures_of_a_name_share_a_group(exam: cards.Exam) -> None:
    protocol = exam.protocol
    assert (protocol.prompts, protocol.count, protocol.variety) == (180, 360, (180, 2))
    assert protocol.prompts % protocol.groups == 0
    assert len(exam.prompts) == 180
    half = cards.ready("emoji-held-out", 180).protocol
    assert (half.prompts, half.variety) == (90, (90, 2))
    assert half.hash != protocol.hash == cards.ready("emoji-held-out").protocol.hash != cards.ready("emoji-held-out", seed=1).protocol.hash
    with pytest.raises(ValueError, match="at least 40 pictures"):
        emoji.protocol(True, 39, 0)


def test_names_are_apart_and_the_first_ones_are_of_all_kinds() -> None:
    trained, held_out = emoji.shown(False), emoji.shown(True)
    assert not {e.base for e in trained} & {e.base for e in held_out}
    assert not any(e.held_out for e in trained)
    assert {e.group for e in trained[:100]} == {*data.GROUPS, "objects"}


def test_real_pictures_pass_and_spoilt_ones_do_not(exam: cards.Exam) -> None:
    real = data.pictures(emoji.shown(True)[:180], quiet=True).repeat(2, 1, 1, 1)
    labels = torch.arange(360) % 180
    scored = score.score(real, labels, exam.protocol, exam.real, prompts=exam.prompts)
    marks, shuffled = scored.metrics, scored.shuffled
    assert list(marks) == list(emoji.MEASURES)
    assert marks["precision_emoji"].value == 1
    assert marks["recall_emoji"].value > 0.98
    assert marks["variety_emoji"].value == pytest.approx(0, abs=1e-6)
    pale = score.score(real // 2 + 127, labels, exam.protocol, exam.real, prompts=exam.prompts).metrics
    assert pale["frechet_emoji"].value > 10 * marks["frechet_emoji"].value
    assert pale["precision_emoji"].value < 0.8
    swapped = score.score(real.roll(1, 0), labels, exam.protocol, exam.real, prompts=exam.prompts).metrics
    assert swapped["frechet_emoji"].value == pytest.approx(marks["frechet_emoji"].value, abs=1e-4)
    assert swapped["clip_emoji_cos"].value == pytest.approx(shuffled["clip_emoji_cos"].value, abs=1e-6)
    assert swapped["clip_emoji_cos"].value != marks["clip_emoji_cos"].value


def test_groups_are_told_apart(exam: cards.Exam) -> None:
    protocol = replace(exam.protocol, prompts=5, count=10)
    found = by_group({f"values/{name}": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) for name in ("clip_emoji_cos", "variety_emoji")},
                     protocol, ("food", "flags", "food", "flags", "faces"))
    assert set(found) == {"clip_emoji_cos", "variety_emoji"}
    assert {group: estimate.value for group, estimate in found["clip_emoji_cos"].items()} == {"food": 2.0, "flags": 3.0}


def test_a_teacher_is_scored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "teacher:emoji", "--protocol", "emoji-held-out", "--count", "60", "--steps", "1", "--to", str(tmp_path / "r.json")]
    assert cli.run([*asked, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["protocol"]["prompts"] == 30
    assert set(result["metrics"]) == set(emoji.MEASURES)
    assert set(result["groups"]) == {"clip_emoji_cos", "variety_emoji"}
    assert sum(block["n"] for block in result["groups"]["variety_emoji"].values()) <= 30
    assert len(result["groups"]["variety_emoji"]) >= 3


def test_protocols_say_what_is_missing(world: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "FOLDER", tmp_path)
        assert cli.run(["eval", "teacher:emoji", "--protocol", "emoji", "--to", str(tmp_path / "r.json")]) == 2
        assert "there is no judge of the emoji world" in capfd.readouterr().err.splitlines()[-1]
        rows = {row["name"]: row for row in cards.listing()}
    assert rows["emoji"]["hash"] is None
    assert "scripts/emoji_judge.py" in rows["emoji"]["missing"][0]
    assert rows["fashion"]["missing"] == []
