"""Evaluations that are interrupted, and shared between processes."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from tiny import tiny_teacher

from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.eval.generate import generate
from stepdistill.eval.parts import Parts, Taken
from stepdistill.models.load import load_teacher

SPEC, META = SamplerSpec((1.0, 0.5)), {"model": "a"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


def counted(teacher, monkeypatch):
    """How many pictures are really made."""
    made = []
    original = type(teacher).pictures
    monkeypatch.setattr(type(teacher), "pictures", lambda self, x0: made.append(len(x0)) or original(self, x0))
    return made


def test_parts_change_nothing(teacher, tmp_path):
    parts = Parts.open(tmp_path / "p", META)
    kept, plain = (generate(teacher, SPEC, 7, 0, batch_size=3, quiet=True, parts=p) for p in (parts, None))
    assert torch.equal(kept.images, plain.images)
    assert torch.equal(kept.labels, plain.labels)
    assert sorted(p.name for p in parts.folder.iterdir()) == [f"{i:08d}.safetensors" for i in (0, 3, 6)] + ["meta.json"]
    parts.remove()
    assert not (tmp_path / "p").exists()


def test_an_interrupted_generation_makes_only_what_is_missing(teacher, tmp_path, monkeypatch):
    parts = Parts.open(tmp_path / "p", META)
    whole = generate(teacher, SPEC, 7, 0, batch_size=3, quiet=True, parts=parts)
    (parts.folder / "00000003.safetensors").unlink()
    (parts.folder / "00000003.claim").write_text('{"host": "' + socket.gethostname() + '", "pid": 2147480000, "born": 1.0}')
    (parts.folder / "00000006.claim").write_text("")                                              # of a finished batch: never read
    made = counted(teacher, monkeypatch)
    again = generate(teacher, SPEC, 7, 0, batch_size=3, quiet=True, parts=Parts.open(tmp_path / "p", META))
    assert made == [3]
    assert torch.equal(again.images, whole.images)


def test_a_living_process_keeps_its_claim(tmp_path):
    parts = Parts.open(tmp_path / "p", META)
    code = ("import sys, time; from pathlib import Path; from stepdistill.eval.parts import Parts\n"
            "print(Parts(Path(sys.argv[1])).claim(0), flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(parts.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "True"
        assert not parts.claim(0)
        assert parts.claim(3)
        assert list(parts.open_batches(range(0, 9, 3))) == [6]
    finally:
        other.kill()
        other.wait()
    assert parts.claim(0)                                                                         # nobody holds it any more


def test_another_evaluations_parts_are_cleared_away(teacher, tmp_path, monkeypatch):
    generate(teacher, SPEC, 6, 0, batch_size=3, quiet=True, parts=Parts.open(tmp_path / "p", META))
    made = counted(teacher, monkeypatch)
    generate(teacher, SPEC, 6, 0, batch_size=3, quiet=True, parts=Parts.open(tmp_path / "p", {"model": "b"}))
    assert made == [3, 3]
    assert json.loads((tmp_path / "p" / "meta.json").read_text()) == {"model": "b"}


def test_who_comes_last_learns_that_it_is_done(teacher, tmp_path, monkeypatch):
    parts = Parts.open(tmp_path / "p", META)
    monkeypatch.setattr(Parts, "claim", lambda self, first: False)
    parts.remove()
    with pytest.raises(Taken):
        generate(teacher, SPEC, 6, 0, batch_size=3, quiet=True, parts=parts)
