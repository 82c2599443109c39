"""Folders as the judges walk them, and their result files as they write them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.eval import outside as O


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def seen(path) -> torch.Tensor:
    """A file's picture, (C, H, W)."""
    array = np.asarray(Image.open(path))
    return torch.tensor(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


PROMPTS = ["a cat", "a «dog»,\nbarking", "a cat", "four birds", "a red car", "a bowl"]


# ---------------------------------------------------------------------------------------------------------------------------- going out


def test_plain_layout(tmp_path):
    x = pictures(6, 2, 3, 8, 10)
    O.write_plain(tmp_path / "out", PROMPTS, x)
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    for line, seeds in zip(lines, x, strict=True):
        for name, picture in zip(line["files"], seeds, strict=True):
            assert torch.equal(seen(tmp_path / "out" / name), picture)
    assert len(list((tmp_path / "out").iterdir())) == 13
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_geneval_layout(tmp_path):
    """As evaluate_images.py walks it: numbered folders, one JSON value in metadata.jsonl, samples of digits and .png."""
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
                {"tag": "counting", "prompt": "two dogs"}]
    x = pictures(2, 4, 3, 8, 8)
    O.write_geneval(tmp_path / "out", metadata, iter(x))
    folders = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in folders] == ["00000", "00001"]
    for folder, line, seeds in zip(folders, metadata, x, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        samples = sorted((folder / "samples").iterdir())
        assert all(re.match(r"\d+\.png", p.name) for p in samples)
        assert all(torch.equal(seen(p), picture) for p, picture in zip(samples, seeds, strict=True))
    with pytest.raises(ValueError, match="line 2 of the metadata lacks a tag"):
        O.write_geneval(tmp_path / "other", [metadata[0], {"prompt": "x"}], x)


def test_dpg_layout(tmp_path):
    """As compute_dpg_bench.py crops it: left above, right above, left below, right below."""
    x = pictures(2, 4, 3, 8, 8)
    O.write_dpg(tmp_path / "out", ["1", "COCOval2014_7"], x)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.png", "COCOval2014_7.png"]
    grid = Image.open(tmp_path / "out" / "COCOval2014_7.png")
    crops = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert all(torch.equal(torch.tensor(np.asarray(grid.crop(c))).permute(2, 0, 1), p) for c, p in zip(crops, x[1], strict=True))
    with pytest.raises(ValueError, match="four square pictures"):
        O.write_dpg(tmp_path / "three", ["1", "2"], x[:, :3])
    with pytest.raises(ValueError, match="has a dot"):
        O.write_dpg(tmp_path / "dot", ["1.txt", "2"], x)


def test_hpsv2_layout(tmp_path):
    """Named .jpg as the judge asks, yet without loss."""
    x = pictures(3, 3, 8, 8)
    O.write_hpsv2(tmp_path / "out", {"photo": x, "concept-art": x[:1]})
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")) == [
        "concept-art/00000.jpg", "photo/00000.jpg", "photo/00001.jpg", "photo/00002.jpg"]
    assert torch.equal(seen(tmp_path / "out" / "photo" / "00002.jpg"), x[2])
    with pytest.raises(ValueError, match="no style 'cartoon'"):
        O.write_hpsv2(tmp_path / "other", {"cartoon": x})


def test_vbench_layout(tmp_path):
    x = pictures(2, 2, 5, 3, 8, 8)
    O.write_vbench(tmp_path / "out", ["a dog. It runs", "two cats"], x)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a dog. It runs-0", "a dog. It runs-1", "two cats-0", "two cats-1"]
    frames = sorted((tmp_path / "out" / "two cats-1").iterdir())
    assert [f.name for f in frames] == [f"{t:05d}.png" for t in range(5)]
    assert all(torch.equal(seen(f), frame) for f, frame in zip(frames, x[1, 1], strict=True))


@pytest.mark.parametrize(("prompts", "shape", "words"), [
    (2, (1, 2, 3, 8, 8), "2 prompts but pictures of 1"), (2, (3, 2, 3, 8, 8), "more than the 2 prompts"), (1, (1, 3, 8, 8), "4 dimensions"),
    (1, (1, 0, 3, 8, 8), "seeds in the first"), (1, (1, 2, 4, 8, 8), "1 or 3 channels"),
])
def test_pictures_that_do_not_fit_leave_nothing(tmp_path, prompts, shape, words):
    with pytest.raises(ValueError, match=words):
        O.write_plain(tmp_path / "out", ["x"] * prompts, pictures(*shape))
    assert list(tmp_path.iterdir()) == []


def test_names_and_folders_that_cannot_be(tmp_path):
    for name in ("", "a/b", "..", "x" * 201):
        with pytest.raises(ValueError, match="cannot name a file"):
            O.write_vbench(tmp_path / "out", ["fine", name], pictures(2, 1, 1, 3, 8, 8))
    with pytest.raises(ValueError, match="named twice"):
        O.write_vbench(tmp_path / "out", ["a", "a"], pictures(2, 1, 1, 3, 8, 8))
    with pytest.raises(ValueError, match="quantise it first"):
        O.write_plain(tmp_path / "out", ["a"], torch.zeros(1, 1, 3, 8, 8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        O.write_plain(tmp_path / "full", ["a"], pictures(1, 1, 3, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


# --------------------------------------------------------------------------------------------------------------------------- coming back


def test_plain_scores(tmp_path):
    """Two pictures a prompt, averaged; prompts of the same words stay apart."""
    O.write_plain(tmp_path / "out", PROMPTS, pictures(6, 2, 3, 8, 8))
    path = tmp_path / "scores.jsonl"
    lines = [{"file": f"{i:05d}_{j:04d}.png", "score": i + j} for j in range(2) for i in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = O.read_plain(tmp_path / "out", path)
    assert made.scores.tolist() == [i + 0.5 for i in range(6)]
    assert made.prompts[1] == "00001 " + PROMPTS[1]
    assert len(set(made.prompts)) == 6
    assert made.estimate.value == pytest.approx(3)
    for changed, words in ((lines[1:], "no score of 00000_0000.png"), ([*lines, lines[0]], "scored twice"),
                           ([*lines, {"file": "x.png", "score": 1}], "which is not in"), ([*lines, {"file": "y.png"}], "no number 'score'"),
                           ([{"file": 3, "score": 1}], "no 'file' of the right kind")):
        path.write_text("\n".join(map(json.dumps, changed)))
        with pytest.raises(ValueError, match=words):
            O.read_plain(tmp_path / "out", path)


def geneval(path, right, order=None):
    """Results of 2 skills, 5 and 10 prompts of 4 pictures; `right(skill, prompt, seed)`. In the columns of evaluate_images.py."""
    prompts = [("single_object", i) for i in range(5)] + [("counting", i) for i in range(10)]
    lines = [{"filename": f"images/{n:05d}/samples/{j:04d}.png", "tag": tag, "prompt": f"{tag} {i}", "correct": right(tag, i, j),
              "reason": "expected\nmore", "metadata": json.dumps({"tag": tag, "prompt": f"{tag} {i}"}), "details": "{}"}
             for n, (tag, i) in enumerate(prompts[::order]) for j in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_geneval_is_the_mean_of_its_skills(tmp_path):
    a = O.read_geneval(geneval(tmp_path / "a.jsonl", lambda tag, i, j: tag == "single_object" or i < 5))
    assert a.estimate.value == pytest.approx((1 + 0.5) / 2)
    assert {skill: e.value for skill, e in a.by_skill.items()} == {"single_object": 1.0, "counting": 0.5}
    assert a.by_skill["counting"].n == 10
    b = O.read_geneval(geneval(tmp_path / "b.jsonl", lambda tag, i, j: (tag == "single_object" or i < 5) and j < 3, order=-1))
    made = O.paired(a, b)
    assert made.delta.value == pytest.approx((0.25 + 0.125) / 2)
    assert made.win_rate.value == pytest.approx((10 + 2.5) / 15)
    assert made.delta.se < a.estimate.se


def test_models_judged_on_other_prompts_are_not_compared(tmp_path):
    a, lines = O.read_geneval(geneval(tmp_path / "a.jsonl", lambda *_: True)), (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:-4]))
    with pytest.raises(ValueError, match="1 prompts are judged for one model alone"):
        O.paired(a, O.read_geneval(tmp_path / "b.jsonl"))


def test_dpg_results(tmp_path):
    """As the judge writes them: a line a prompt, then its summary. Paths may hold commas."""
    scores = {"1": [0.5, 0.75, 1.0, 0.75], "COCO_7": [1.0, 1.0, 1.0, 0.0], **{f"p{i}": [0.5] * 4 for i in range(3)}}
    lines = [f"out, of run 2.5/{name}.png, {', '.join(map(str, each))}, {sum(each) / 4}" for name, each in scores.items()]
    summary = "Model: out\nL1 category scores:\n\tglobal: 80.0\nDPG-Bench score: 60.0"
    (tmp_path / "a.txt").write_text("\n".join([*lines, summary]) + "\n")
    made = O.read_dpg(tmp_path / "a.txt")
    assert made.prompts == tuple(scores)
    assert made.scores.tolist() == pytest.approx([75, 75, 50, 50, 50])
    assert made.estimate.value == pytest.approx(60)
    for damaged, words in ((lines[0][:-4] + "0.9", "do not have the mean"), (lines[1] + "\n" + lines[1], "there twice"),
                           ("1.png: 0.5", "no line of DPG"), (lines[0] + "\nq.png, 0.5, 0.5", "1 pictures of 'q' and 4 of others"),
                           (summary, "holds no scores")):
        (tmp_path / "b.txt").write_text(damaged)
        with pytest.raises(ValueError, match=words):
            O.read_dpg(tmp_path / "b.txt")


def test_hpsv2_table(tmp_path):
    """As it prints, between other lines. The mean of 800 values is that of ten groups of 80, and its error a third of their deviation."""
    groups = {style: 28 + torch.randn(10, generator=torch.Generator().manual_seed(i)).double() / 5 for i, style in enumerate(O.STYLES)}
    rows = [" ".join(["my model", f"{style:<15}", f"{g.mean():.2f}", "\t", f"{g.std(correction=0):.4f}"]) for style, g in groups.items()]
    text = "\n".join(["Loading model ...", "-----------benchmark score ---------------- ", *rows, "my model Average         28.01 \t"])
    (tmp_path / "a.txt").write_text(text)
    made = O.read_hpsv2(tmp_path / "a.txt")
    assert list(made) == [*O.STYLES, "average"]
    for style, g in groups.items():
        assert made[style].value == pytest.approx(float(g.mean()), abs=0.006)
        assert made[style].se == pytest.approx(float(g.std()) / 10**0.5, abs=1e-4)
    assert made["average"].value == pytest.approx(float(torch.stack(list(groups.values())).mean()), abs=0.006)
    assert made["average"].se < made["photo"].se
    (tmp_path / "b.txt").write_text("\n".join(rows[:2]))
    assert list(O.read_hpsv2(tmp_path / "b.txt")) == ["anime", "concept-art"]
    unscaled = "m photo           0.28 \t 0.0010"
    for damaged, words in (("\n".join(rows + rows), "there twice"), (unscaled, "scale of 100"), ("nothing", "no table")):
        (tmp_path / "b.txt").write_text(damaged)
        with pytest.raises(ValueError, match=words):
            O.read_hpsv2(tmp_path / "b.txt")


def vbench(values) -> dict:
    videos = lambda each: [{"video_path": f"videos/a dog. No {p}-{v}.mp4", "video_results": value}  # noqa: E731
                           for p, seeds in enumerate(each) for v, value in enumerate(seeds)]
    return {dimension: [0.5, videos(each)] for dimension, each in values.items()}


def test_vbench_results(tmp_path):
    path = tmp_path / "x_eval_results.json"
    values = {"imaging_quality": [[60, 70]] * 6, "dynamic_degree": [[True, False], *[[True]] * 5], "color": [[0.5]] * 5}
    path.write_text(json.dumps(vbench(values)))
    made = O.read_vbench(path)
    assert made["imaging_quality"].estimate.value == pytest.approx(0.65)
    assert made["dynamic_degree"].scores.tolist() == [0.5, 1, 1, 1, 1, 1]
    assert made["color"].prompts[4] == "a dog. No 4"
    assert O.paired(made["dynamic_degree"], made["imaging_quality"]).win_rate.value == pytest.approx(5 / 6)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"color": 0.5}', '{"color": [0.5, [3]]}', '{"color": [0.5, []]}',
                                    '{"color": [0.5, [{"video_path": "a.mp4", "video_results": 1}]]}',
                                    '{"color": [0.5, [{"video_path": "a-0.mp4", "video_results": "1"}]]}',
                                    '{"color": [0.5, [{"video_path": "a-0.mp4", "video_results": NaN}]]}'])
def test_damaged_vbench_results(tmp_path, damage):
    (tmp_path / "a.json").write_text(damage)
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        O.read_vbench(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"not json", b"[1]", b'{"metadata": "x", "correct": 1, "tag": "t"}', b"",
                                    b'{"tag": "t"}'])
def test_damaged_geneval_results(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"a\.jsonl") as caught:
        O.read_geneval(path)
    assert "\n" not in str(caught.value)


def test_a_judge_that_was_stopped_or_never_ran(tmp_path):
    path = geneval(tmp_path / "a.jsonl", lambda *_: True)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"has 3 pictures of .* and 4 of others"):
        O.read_geneval(path)
    for read in (O.read_geneval, O.read_dpg, O.read_hpsv2, O.read_vbench):
        with pytest.raises(FileNotFoundError, match="run the judge"):
            read(tmp_path / "none")
