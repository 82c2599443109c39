"""Pictures for outside judges from a pipeline, by command, and their scores in a result and its report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from zoo import basics

from stepdistill.cli import run
from stepdistill.eval import benchmarks, report, score
from stepdistill.eval.generate import generate, of_prompts
from stepdistill.eval.models import open_model

PROMPTS = tuple(f"a picture of {thing}" for thing in ("a cat", "snow", "two houses", "fog", "rain"))
SAMPLED = ["--steps", "1", "--guidance", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and every judge's prompts."""
    base = tmp_path_factory.mktemp("world")
    basics.stable_diffusion().save_pretrained(base / "sd")
    (base / "plain.txt").write_text("\n".join(PROMPTS))
    (base / "geneval.jsonl").write_text("".join(json.dumps({"tag": "colors", "prompt": p, "include": []}) + "\n" for p in PROMPTS))
    for folder in ("dpg", "hpsv2"):
        (base / folder).mkdir()
    for i, prompt in enumerate(PROMPTS):
        (base / "dpg" / f"p{i}.txt").write_text(prompt + "\n")
    (base / "hpsv2" / "anime.json").write_text(json.dumps(PROMPTS[:2]))
    (base / "hpsv2" / "photo.json").write_text(json.dumps(PROMPTS[2:]))
    return base


def ask(*words: str | Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run([str(word) for word in words])


def test_a_prompts_pictures_are_the_samples_that_eval_makes(world: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_model(str(world / "sd"), 2, 1.0, renoise=1.0, prompts=PROMPTS)
    whole = generate(opened.teacher, opened.spec, 15, 3, quiet=True).images
    for i, seeds in enumerate(of_prompts(opened.teacher, opened.spec, 3, 3, quiet=True)):
        assert (seeds.int() - whole[i::5].int()).abs().max() <= 1


@pytest.mark.parametrize(("layout", "prompts", "more", "files", "size"), [
    ("plain", "plain.txt", ["--seeds", "2"], ["prompts.jsonl", *(f"{i:05d}_{j:04d}.png" for i in range(5) for j in range(2))], (16, 16)),
    ("geneval", "geneval.jsonl", ["--seeds", "1"], [f"{i:05d}/{n}" for i in range(5) for n in ("metadata.jsonl", "samples/0000.png")],
     (16, 16)),
    ("dpg", "dpg", [], [f"p{i}.png" for i in range(5)], (32, 32)),
    ("hpsv2", "hpsv2", [], [*(f"anime/{i:05d}.jpg" for i in range(2)), *(f"photo/{i:05d}.jpg" for i in range(3))], (16, 16)),
    ("vbench", "plain.txt", ["--seeds", "1", "--frames", "4"], [f"{p}-0/{t:05d}.png" for p in PROMPTS for t in range(4)], (4, 16)),
])
def test_layouts(world: Path, tmp_path: Path, layout: str, prompts: str, more: list[str], files: list[str], size: tuple[int, int]) -> None:
    to = tmp_path / "out"
    assert ask("judges", "write", layout, world / "sd", "--prompts", world / prompts, *SAMPLED, *more, "--to", to) == 0
    found = sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
    assert found == sorted(files)
    with Image.open(to / next(name for name in files if name.endswith(("png", "jpg")))) as image:
        assert image.size == size


def test_frames_stand_side_by_side() -> None:
    pictures = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).to(torch.uint8)
    (videos,) = benchmarks._videos(iter([pictures]), 3)
    assert videos.shape == (2, 3, 3, 4, 2)
    assert torch.equal(videos[1, 2], pictures[1, :, :, 4:6])


@pytest.mark.parametrize(("words", "said"), [
    (["beauty", "{sd}", "--prompts", "{w}/plain.txt"], "no layout 'beauty'"),
    (["geneval", "{sd}", "--prompts", "{w}/none.jsonl"], "evaluation_metadata.jsonl"),
    (["geneval", "{sd}", "--prompts", "{w}/plain.txt"], "not a JSON object"),
    (["dpg", "{sd}", "--prompts", "{w}/plain.txt"], "DPG-Bench's folder"),
    (["hpsv2", "{sd}", "--prompts", "{w}/dpg"], "HPSv2's lists"),
    (["dpg", "{sd}", "--prompts", "{w}/dpg", "--seeds", "2"], "leave --seeds out"),
    (["vbench", "{sd}", "--prompts", "{w}/plain.txt"], "vbench needs it"),
    (["plain", "{sd}", "--prompts", "{w}/plain.txt", "--frames", "2"], "no other layout takes it"),
    (["plain", "{w}/dpg", "--prompts", "{w}/plain.txt"], "class-conditional"),
])
def test_bad_input_is_one_line(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert ask("judges", "write", *(w.format(sd=world / "sd", w=world) for w in words), *SAMPLED, "--to", tmp_path / "out") == 2
    out, err = capfd.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_scores_come_back_into_results_and_their_report(made: Callable[..., Path], tmp_path: Path,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    """Two models judged on the same prompts are paired; one that was judged on others is refused."""
    results = [made(stem, stem, steps, 0.1 * steps, is_teacher=stem == "t") for stem, steps in (("t", 4), ("s", 1))]
    for k, result in enumerate(results):
        path = tmp_path / f"{result.stem}.jsonl"
        path.write_text("".join(json.dumps({"tag": "colors", "metadata": json.dumps({"prompt": p}), "correct": j >= k + i % 2}) + "\n"
                                for i, p in enumerate(PROMPTS) for j in range(4)))
        before = score.read_result(result)
        assert ask("judges", "read", "geneval", path, "--into", result) == 0
        after = score.read_result(result)
        assert {key: value for key, value in after.items() if key != "judges"} == before
        assert set(after["judges"]) == {"geneval", "geneval_colors"}
    assert after["judges"]["geneval"]["value"] == pytest.approx((3 * 0.75 + 2 * 0.5) / 5)
    rows = report.compare(results, tmp_path / "report")["rows"]
    assert rows[1]["judges"]["geneval"]["difference"]["delta"] == pytest.approx(-0.25)
    assert "Outside judges" in (tmp_path / "report" / "report.md").read_text()
    (tmp_path / "s.jsonl").write_text((tmp_path / "s.jsonl").read_text().replace("fog", "smoke"))
    assert ask("judges", "read", "geneval", tmp_path / "s.jsonl", "--into", results[1]) == 0
    capfd.readouterr()
    assert ask("compare", *results, "--to", tmp_path / "other") == 2
    assert "prompts are judged for one model alone" in capfd.readouterr().err
    assert ask("judges", "read", "plain", tmp_path / "s.jsonl", "--into", results[1]) == 2
    assert "needs the folder that was judged" in capfd.readouterr().err
