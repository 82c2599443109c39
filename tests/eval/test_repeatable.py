"""A score does not know how many pictures were made at a time, nor by how many processes; its features lie where they were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_teacher, unequal
from torch import Tensor

from stepdistill.cli import run as command
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.eval import protocol, score
from stepdistill.eval.extractors import Tiny, extract
from stepdistill.eval.generate import generate
from stepdistill.eval.metrics import Moments
from stepdistill.models.load import Teacher, load_teacher

sys.path.insert(0, str(Path(__file__).parent))

from shares import COUNT, evaluated, made

Seen = tuple[Tensor, Tensor]                                             # (noises and x0 of every sample, pictures)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def teacher(base: Path) -> Teacher:
    return load_teacher(base / "teacher")


def alone(teacher: Teacher, batch_size: int) -> Seen:
    seen, images = made(teacher, batch_size)
    return torch.stack([seen[i] for i in range(COUNT)]), images


@pytest.fixture(scope="module")
def plain(teacher: Teacher) -> Seen:
    """64 at a time and the rest, in one process."""
    return alone(teacher, 64)


@pytest.fixture(scope="module")
def together(base: Path) -> Seen:
    """7 at a time, by two processes."""
    command_line = [sys.executable, str(Path(__file__).parent / "shares.py"), str(base)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(base / "together.safetensors")
    assert found["owners"].sum(1).tolist() == [1.0] * COUNT              # every sample was made once,
    assert found["owners"].sum(0).min() > 0                              # and both had a share
    return found["seen"], found["images"]


def test_two_ranks_evaluate_as_one_process_does(base: Path, together: Seen) -> None:
    """The same pictures, features and reference bit for bit; one result, and no batch left behind."""
    ranks, single = base / "ranks" / "r.json", base / "single" / "r.json"
    evaluated(single)
    names = sorted(path.name for path in single.parent.iterdir())
    assert sorted(path.name for path in ranks.parent.iterdir()) == names
    for name in names:
        if name != "r.json":
            assert unequal(load_file(ranks.with_name(name)), load_file(single.with_name(name))) == []
    assert score.read_result(ranks)["protocol"] == score.read_result(single)["protocol"]                # the digest of the reference, too
    assert score.read_result(ranks)["metrics"] == score.read_result(single)["metrics"]


def scores(teacher: Teacher, images: Tensor) -> dict[str, float]:
    """By the fashion protocol's formulas on the tiny extractor, against pictures of one unguided call."""
    other = generate(teacher, SamplerSpec((0.8,)), COUNT, 9, quiet=True).images
    features, _ = extract(Tiny(), other, 250)
    labels = torch.arange(COUNT) % 3
    reference = protocol.Reference(Moments.of(features), Moments.of(features), features, labels, features, labels)
    names = tuple(f"{kind}_tiny" for kind in ("frechet", "kid", "precision", "recall"))
    exam = replace(protocol.get("fashion", COUNT), extractor="tiny", extractor_sha256=Tiny().sha256, classes=3, metrics=names, groups=5)
    return {name: estimate.value for name, estimate in score.score(images, labels, exam, reference).metrics.items()}


@pytest.mark.parametrize("how", ["1 at a time", "7 at a time", "two processes"])
def test_a_score_does_not_know_how_its_pictures_were_made(how: str, teacher: Teacher, plain: Seen, request: pytest.FixtureRequest) -> None:
    """Noise bit for bit, x0 within 1e-4, 99.99 % of the uint8 values, scores within 1e-3."""
    (seen, images), (wanted, pictures) = (request.getfixturevalue("together") if how == "two processes"
                                          else alone(teacher, int(how.split()[0]))), plain
    assert torch.equal(seen[:, :2], wanted[:, :2])
    assert seen[:, 2].dtype == torch.float32
    assert float((seen[:, 2] - wanted[:, 2]).abs().max()) < 1e-4
    assert float((images == pictures).double().mean()) >= 0.9999
    assert int((images.int() - pictures.int()).abs().max()) <= 1
    ours, theirs = scores(teacher, images), scores(teacher, pictures)
    assert min(theirs["frechet_tiny"], theirs["kid_tiny"]) > 1e-3        # a score of nothing would agree with anything
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_pictures_differ(plain: Seen) -> None:
    """Every sample has noise of its own, and the second noise is not the first."""
    seen, _ = plain
    flat = seen[:, :2].reshape(2 * COUNT, -1)
    assert len(flat.unique(dim=0)) == 2 * COUNT


# ---- where features lie

def test_features_lie_where_they_were_asked_for(tmp_path: Path) -> None:
    place = tmp_path / "kept" / "mine.safetensors"
    assert command(["eval", "teacher:fashion", "--count", "50", "--steps", "1", "--solver", "ddim", "--to", str(tmp_path / "a.json"),
                    "--features-to", str(place)]) == 0
    result = score.read_result(tmp_path / "a.json")
    found = score.read_tensors(place, result, {"features": 50})
    usual = score.features_path(tmp_path / "a.json", "fashion")
    assert found is not None
    assert found["features"].shape == (50, 64)
    assert place.read_bytes() == usual.read_bytes()
    assert [path.name for path in place.parent.iterdir()] == ["mine.safetensors"]


@pytest.mark.parametrize("name", ["features.npz", "folder.safetensors", "features"])
def test_features_go_to_a_safetensors_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    asked = ["--to", str(tmp_path / "a.json"), "--features-to", str(tmp_path / name)]
    assert command(["eval", "teacher:fashion", "--count", "50", *asked]) == 2
    out, err = capfd.readouterr()
    assert f"{name} must name a .safetensors file" in err
    assert err.count("\n") == 1
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]
