"""`stepdistill eval RESULT.json`: further measures from what a result kept, the same as if they had been asked for at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from judges import TinyClip
from results import make_result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import snapshot, tiny_teacher

from stepdistill.cli import run
from stepdistill.eval import cards, extractors, generate, metrics, score, weights
from stepdistill.eval.protocol import Protocol, fashion_reference
from stepdistill.images import save_png, to_image

TAUGHT = ["--protocol", "teacher-only", "--extractor", "tiny", "--count", "60", "--steps", "2", "--guidance", "1.5"]
MORE = ["--also", "precision:tiny", "--also", "density:tiny"]


def ask(*words: str | Path) -> int:
    return run([str(word) for word in words])


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a teacher of 3 classes, 60 pictures; the teacher lies beside it."""
    base = tmp_path_factory.mktemp("taught")
    tiny_teacher(base / "teacher")
    assert ask("eval", base / "teacher", *TAUGHT, "--to", base / "t.json") == 0
    return base / "t.json"


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody makes a picture or looks at one."""
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a picture was made or looked at")

    monkeypatch.setattr(generate, "_batch", refuse)
    monkeypatch.setattr(score, "look", refuse)


def same(one: Path, other: Path, extractor: str) -> None:
    """Results and what lies beside them, but for how they came about."""
    a, b = score.read_result(one), score.read_result(other)
    for name in ("protocol_hash", "protocol", "metrics", "model", "sampler", "teacher", "paired"):
        assert a[name] == b[name]
    for place in (lambda path: score.features_path(path, extractor), score.samples_path):
        mine, its = load_file(place(one)), load_file(place(other))
        assert set(mine) == set(its)
        assert all(torch.equal(mine[name], its[name]) for name in its)
    assert score.read_features(one, a) is not None


def test_more_measures_are_what_they_would_have_been(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = taught.with_name("t.reference.safetensors")
    assert ask("eval", taught.with_name("teacher"), *TAUGHT, *MORE, "--reference", reference, "--to", tmp_path / "once.json") == 0
    blind(monkeypatch)
    before = snapshot(taught.parent)
    assert ask("eval", taught, *MORE, "--to", tmp_path / "more.json") == 0
    assert snapshot(taught.parent) == before
    same(tmp_path / "more.json", tmp_path / "once.json", "tiny")
    result, first = score.read_result(tmp_path / "more.json"), score.read_result(taught)
    assert set(result["metrics"]) - set(first["metrics"]) == {"precision_tiny_teacher_60", "density_tiny_teacher_60"}
    assert (result["again"]["result"], result["again"]["measures"]) == ("t.json", ["precision_tiny_teacher_60", "density_tiny_teacher_60"])
    assert result["asked"]["also"] == MORE[1::2]
    assert (result["env"], result["started"]) == (first["env"], first["started"])


def test_prompts_are_read_again_and_their_pictures_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    """A CLIP score and the variety of prompts, of a folder of pictures that a CLIP saw."""
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path / "weights"))
    monkeypatch.setitem(extractors.EXTRACTORS, "clip-l14", TinyClip)
    monkeypatch.setattr(weights, "tokenizer", lambda name: None)
    for i, picture in enumerate(torch.randint(0, 256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(1))):
        save_png(to_image(picture.to(torch.uint8)), tmp_path / "made" / f"{i:02d}.png")
    (tmp_path / "p.txt").write_text("".join(f"thing {i}\n" for i in range(8)))
    asked = ["--protocol", "custom", "--extractor", "clip-l14"]
    asked += ["--also", "frechet:tiny"]
    more = ["--also", "density:tiny", "--also", "clip:clip-l14:100cos", "--also", "vendi:clip-l14", "--also", "cmmd:clip-l14"]
    assert ask("reference", tmp_path / "made", *asked, "--keep", "40", "--to", tmp_path / "r.safetensors") == 0
    asked += ["--count", "64", "--prompts", str(tmp_path / "p.txt"), "--reference", str(tmp_path / "r.safetensors")]
    assert ask("eval", tmp_path / "made", *asked, "--to", tmp_path / "first.json") == 0
    assert ask("eval", tmp_path / "made", *asked, *more, "--to", tmp_path / "once.json") == 0
    blind(monkeypatch)
    assert ask("eval", tmp_path / "first.json", *more, "--to", tmp_path / "more.json") == 0
    same(tmp_path / "more.json", tmp_path / "once.json", "clip-l14")
    assert score.read_result(tmp_path / "more.json")["protocol"]["set_reference"] == "40 evenly spaced ones"
    score.features_path(tmp_path / "first.json", "tiny").rename(tmp_path / "away")
    capfd.readouterr()
    assert ask("eval", tmp_path / "first.json", "--also", "density:tiny", "--to", tmp_path / "x.json") == 2
    assert "first.features_tiny.safetensors is missing" in capfd.readouterr().err
    assert ask("eval", tmp_path / "first.json", "--also", "vendi:clip-l14", "--to", tmp_path / "without.json") == 0
    (tmp_path / "p.txt").write_text("another\n" * 8)
    capfd.readouterr()
    assert ask("eval", tmp_path / "first.json", *more, "--to", tmp_path / "x.json") == 2
    assert "was scored with other prompts than those of" in capfd.readouterr().err


def test_variety_is_told_again_where_it_has_pictures_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               capfd: pytest.CaptureFixture[str]) -> None:
    """From the features that were kept of these; a result without them has nothing to tell it from."""
    monkeypatch.setattr(cards, "VARIETY", (6, 2))
    for i, picture in enumerate(torch.randint(0, 256, (62, 3, 8, 8), generator=torch.Generator().manual_seed(2))):
        save_png(to_image(picture.to(torch.uint8)), tmp_path / "made" / f"{i:02d}.png")
    (tmp_path / "p.txt").write_text("".join(f"thing {i}\n" for i in range(50)))
    asked = ["--protocol", "custom", "--extractor", "tiny", "--to"]
    assert ask("reference", tmp_path / "made", *asked, tmp_path / "r.safetensors") == 0
    asked = ["--count", "50", "--prompts", tmp_path / "p.txt", "--reference", tmp_path / "r.safetensors", *asked]
    apart = ["--also", "variety:tiny"]
    for name, also in (("plain", []), ("first", apart), ("once", [*apart, "--also", "vendi:tiny"])):
        assert ask("eval", tmp_path / "made", *also, *asked, tmp_path / f"{name}.json") == 0
    blind(monkeypatch)
    assert ask("eval", tmp_path / "first.json", "--also", "vendi:tiny", "--to", tmp_path / "more.json") == 0
    same(tmp_path / "more.json", tmp_path / "once.json", "tiny")
    mine, its = (load_file(tmp_path / f"{name}.features_tiny.variety.safetensors")["features"] for name in ("more", "once"))
    assert mine.shape == (12, 16)
    assert torch.equal(mine, its)
    capfd.readouterr()
    assert ask("eval", tmp_path / "plain.json", "--also", "vendi:tiny", "--to", tmp_path / "x.json") == 2
    assert "has one picture of each prompt, and variety needs more of them" in capfd.readouterr().err
    kept = tmp_path / "first.features_tiny.variety.safetensors"
    save_file({"features": its[:10]}, kept, metadata={"protocol_hash": score.read_result(tmp_path / "first.json")["protocol_hash"]})
    assert ask("eval", tmp_path / "first.json", "--also", "vendi:tiny", "--to", tmp_path / "x.json") == 2
    assert "10 rows of features in the place of 12" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("words", "told"), [
    (["--also", "lpips:alexnet"], "lpips looks at pictures"),
    (["--also", "is:tiny"], "is reads the answers of tiny"),
    (["--also", "vendi:dinov2-s14"], "vendi needs dinov2-s14, which never ran for"),
    (["--also", "clip:clip-l14"], "clip needs clip-l14, which never ran for"),
    (["--also", "patchfid:tiny"], "patchfid needs tiny on the middle of pictures, which never ran"),
    (["--also", "vendi:tiny"], "needs five prompts"),
    (["--also", "kid:tiny"], "there is nothing to add"),
    ([], "there is nothing to add"),
    ([*MORE, "--steps", "2"], "leave --steps out"),
    ([*MORE, "--seed", "0"], "leave --seed out"),
    ([*MORE, "--protocol", "teacher-only"], "leave --protocol out"),
    ([*MORE, "--batch-size", "10"], "leave --batch-size out"),
    ([*MORE, "--reference", "{base}/none.safetensors"], "none.safetensors: name it with --reference"),
])
def test_what_needs_pictures_is_refused(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                        words: list[str], told: str) -> None:
    blind(monkeypatch)
    before = snapshot(taught.parent)
    assert ask("eval", taught, *(word.format(base=taught.parent) for word in words), "--to", tmp_path / "x.json") == 2
    out, err = capfd.readouterr()
    assert told in err
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())
    assert snapshot(taught.parent) == before


def test_what_lies_beside_must_be_whole_and_its_own(taught: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(taught.parent, base)
    path, reference, features = base / "t.json", base / "t.reference.safetensors", base / "t.features_tiny.safetensors"

    def said(to: Path = tmp_path / "x.json") -> str:
        capfd.readouterr()
        assert ask("eval", path, *MORE, "--to", to) == 2
        return capfd.readouterr().err

    assert "must name a .json file, another than" in said(path)
    whole = reference.read_bytes()
    with safe_open(reference, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(reference), reference, metadata={**metadata, "sha256": "0" * 64})
    assert f"{reference} is another reference than the one of {path}" in said()
    reference.write_bytes(whole)
    kept = load_file(features)
    save_file({**kept, "features": kept["features"][1:]}, features,
              metadata={"protocol_hash": json.loads(path.read_text())["protocol_hash"]})
    assert f"{features} is damaged (59 rows of features" in said()
    features.unlink()
    assert f"{features} is missing" in said()
    shutil.copy(taught.with_name(features.name), features)
    score.samples_path(path).unlink()
    assert f"{score.samples_path(path)} is missing" in said()
    assert not (tmp_path / "x.json").exists()


def test_a_result_of_a_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Whose real data nobody needs to name."""
    path = make_result(tmp_path, "a", "a", 1, 0.1)
    blind(monkeypatch)
    assert ask("eval", path, "--also", "density:fashion", "--to", tmp_path / "b.json") == 0
    result, before = score.read_result(tmp_path / "b.json"), score.read_result(path)
    features = load_file(score.features_path(path, "fashion"))["features"]
    expected = metrics.density_estimate(features, fashion_reference().test_features)
    assert result["metrics"] == {**before["metrics"], "density_fashion": expected.to_dict()}
    assert result["protocol_hash"] == cards.extended(Protocol.from_dict(before["protocol"]), ["density:fashion"]).hash
    assert ask("eval", path, "--also", "density:fashion", "--prompts", "p.txt", "--to", tmp_path / "c.json") == 2
    assert "brings all that it needs" in capfd.readouterr().err
