"""Evaluations that are interrupted, and shared between processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher

from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.eval.generate import fill, generate
from stepdistill.eval.parts import Parts, Taken
from stepdistill.models.load import load_teacher

SPEC, META = SamplerSpec((1.0, 0.5)), {"model": "a"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


def filled(teacher, parts, count=7):
    """All pictures, through files of three."""
    fill(parts, teacher, SPEC, count, 0, batch_size=3, quiet=True)
    return torch.stack(list(parts.pictures(count, 3).read(range(count))))


def counted(teacher, monkeypatch):
    """How many pictures are really made."""
    made = []
    original = type(teacher).pictures
    monkeypatch.setattr(type(teacher), "pictures", lambda self, x0: made.append(len(x0)) or original(self, x0))
    return made


def test_parts_change_nothing(teacher, tmp_path):
    parts = Parts.open(tmp_path / "p", META)
    kept, plain = filled(teacher, parts), generate(teacher, SPEC, 7, 0, batch_size=3, quiet=True).images
    assert torch.equal(kept, plain)
    for rows in (range(0, 1), range(2, 5), range(5, 7), range(3, 3)):
        assert [row.tolist() for row in parts.pictures(7, 3).read(rows)] == plain[rows.start : rows.stop].tolist()
    assert sorted(p.name for p in parts.folder.iterdir()) == [f"{i:08d}.safetensors" for i in (0, 3, 6)] + ["meta.json"]
    parts.remove()
    assert not (tmp_path / "p").exists()


def test_an_interrupted_generation_makes_only_what_is_missing(teacher, tmp_path, monkeypatch):
    parts = Parts.open(tmp_path / "p", META)
    whole = filled(teacher, parts)
    (parts.folder / "00000003.safetensors").unlink()
    (parts.folder / "00000003.claim").write_text('{"host": "' + socket.gethostname() + '", "pid": 2147480000, "born": 1.0}')
    (parts.folder / "00000006.claim").write_text("")                                              # of a finished batch: never read
    made = counted(teacher, monkeypatch)
    again = filled(teacher, Parts.open(tmp_path / "p", META))
    assert made == [3]
    assert torch.equal(again, whole)


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
    filled(teacher, Parts.open(tmp_path / "p", META), 6)
    made = counted(teacher, monkeypatch)
    parts = Parts.open(tmp_path / "p", {"model": "b"})
    filled(teacher, parts, 6)
    assert made == [3, 3]
    assert json.loads((parts.folder / "meta.json").read_text()) == {"model": "b"}
    assert list((tmp_path / "p").iterdir()) == [parts.folder]


def test_who_comes_last_learns_that_it_is_done(teacher, tmp_path, monkeypatch):
    parts = Parts.open(tmp_path / "p", META)
    monkeypatch.setattr(Parts, "claim", lambda self, first: False)
    parts.remove()
    with pytest.raises(Taken):
        filled(teacher, parts, 6)


def test_processes_that_open_at_one_instant_agree(tmp_path, monkeypatch):
    """Between any two steps of the first the second opens, makes a batch, and loses nothing."""
    steps, inside = [], []
    replace, mkdir = os.replace, Path.mkdir

    def second(where):
        if inside:
            return
        inside.append(where)
        parts = Parts.open(tmp_path / "p", META)
        assert parts.claim(0)
        parts.put(0, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1.0)
        steps.append(parts.folder)

    def replacing(source, target):
        replace(source, target)
        second("meta")

    def making(self, *args, **options):
        mkdir(self, *args, **options)
        if self.parent == tmp_path / "p":
            second("folder")

    for patched in ((os, "replace", replacing), (Path, "mkdir", making)):
        with monkeypatch.context() as patch:
            patch.setattr(*patched)
            parts = Parts.open(tmp_path / "p", META)
        assert parts.folder == steps[-1]
        assert parts.has(0)
        parts.remove()
        inside.clear()
    assert len(steps) == 2


def test_a_batch_that_is_finished_while_it_is_claimed_is_not_made_again(tmp_path, monkeypatch):
    mine, other = (Parts.open(tmp_path / "p", META) for _ in range(2))
    assert other.claim(0)
    take = Parts._take

    def slowly(self, what):
        other.put(0, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1.0)                             # which gives the claim back
        return take(self, what)

    monkeypatch.setattr(Parts, "_take", slowly)
    assert not mine.claim(0)
    assert not list(mine.folder.glob("*.claim"))


def test_one_process_alone_takes_the_end(tmp_path):
    first, second = (Parts.open(tmp_path / "p", META) for _ in range(2))
    claim = first.folder / "end.claim"
    assert first.claim_end()
    assert not second.claim_end()
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": 2147480000}))
    assert second.claim_end()                                                                     # its holder is gone
    first.remove()
    with pytest.raises(Taken):
        second.put(0, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1.0)
