"""Checkpoint folders: atomic, pruned, and read back exactly or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepdistill.training import checkpoint

TENSORS = {"weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "step": torch.tensor(3.0),
           "flags": torch.tensor([1, 255], dtype=torch.uint8)}


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    state = {"method": {"ratio": 0.1}, "counts": {"student": 2}}
    path = checkpoint.save(tmp_path, 7, {**TENSORS, "turned": TENSORS["weight"].T}, state, keep=1)
    tensors, state = checkpoint.read(path)
    assert path.name == "step-00000007"
    assert all(torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items())
    assert torch.equal(tensors["turned"], TENSORS["weight"].T)
    assert (state["method"], state["counts"], state["step"]) == ({"ratio": 0.1}, {"student": 2}, 7)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, TENSORS, {}, keep)
    assert names(tmp_path) == ["step-00000009", "step-00000010", "step-00000100"][-keep:]


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f".step-{step:08d}.partial").mkdir()
        (tmp_path / f".step-{step:08d}.partial" / checkpoint.TENSORS).write_bytes(b"half")
    checkpoint.save(tmp_path, 2, TENSORS, {}, keep=5)
    assert names(tmp_path) == ["step-00000002"]
    checkpoint.read(tmp_path / "step-00000002")


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.partial").mkdir()
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_damaged_later_checkpoint_does_not_crowd_out_a_good_one(tmp_path: Path) -> None:
    """Going on from step 4 past a damaged step 8 and stopping at 6: the good step 6 must be the one that is kept."""
    for step in (4, 8):
        checkpoint.save(tmp_path, step, TENSORS, {}, keep=2)
    (tmp_path / "step-00000008" / checkpoint.STATE).write_text("{")
    checkpoint.save(tmp_path, 6, TENSORS, {}, keep=1)
    assert names(tmp_path) == ["step-00000006"]


def test_the_newest_readable_one_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, TENSORS, {}, keep=3)
    (tmp_path / "step-00000003" / checkpoint.TENSORS).write_bytes(b"")
    (tmp_path / "step-00000002" / checkpoint.STATE).write_text("")
    heard: list[str] = []
    found = checkpoint.newest(tmp_path, heard.append)
    assert found is not None
    assert found[1]["step"] == 1
    assert [line.split(" is damaged")[0][-8:] for line in heard] == ["00000003", "00000002"]


def test_a_checkpoint_pruned_while_it_is_read_gives_way_to_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export sees beside a live run that keeps one checkpoint."""
    checkpoint.save(tmp_path, 1, TENSORS, {}, keep=1)
    load, warned = checkpoint.load_file, list[str]()

    def meanwhile(path: Path) -> object:
        monkeypatch.setattr(checkpoint, "load_file", load)
        checkpoint.save(tmp_path, 2, TENSORS, {}, keep=1)
        raise FileNotFoundError(path)

    monkeypatch.setattr(checkpoint, "load_file", meanwhile)
    found = checkpoint.newest(tmp_path, warned.append)
    assert found is not None
    assert found[1]["step"] == 2
    assert warned == []
