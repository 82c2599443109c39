"""Checkpoints that survive SIGKILL at any moment: a temporary folder, fsync, rename. safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE, PREFIX = "tensors.safetensors", "state.json", "step-"


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one move."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, path)


def digest(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def digest_json(value: Mapping[str, Any]) -> str:
    """BLAKE2b of plain JSON values, whatever their layout in a file."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write `folder/step-NNNNNNNN` and prune all but the newest `keep`. Nothing readable is ever half-written.

    Checkpoints of later steps are deleted too: they were damaged and passed over, and would crowd out this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
    noted = {**state, "step": step, "tensors": digest(temporary / TENSORS)}
    (temporary / STATE).write_text(json.dumps({**noted, "digest": digest_json(noted)}, indent=1))
    for path in (temporary / TENSORS, temporary / STATE, temporary):
        fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync(folder)
    for later in listed(folder):
        if later.name > final.name:
            shutil.rmtree(later)
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left."""
    for old in listed(folder)[:-keep]:
        shutil.rmtree(old)
    for partial in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial)


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of one checkpoint; ValueError where anything in it is missing or altered."""
    try:
        state = json.loads((path / STATE).read_text())
        if state.pop("digest", None) not in (None, digest_json(state)):
            raise ValueError(f"checkpoint {path} is damaged: {STATE} does not match its digest")
        if digest(path / TENSORS) != state["tensors"]:
            raise ValueError(f"checkpoint {path} is damaged: {TENSORS} does not match its digest")
        return load_file(path / TENSORS), state
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error


def newest(folder: Path, warn: Any = print) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint, None where there is none at all; `warn` hears of every damaged one passed over.

    ValueError where checkpoints exist and none can be read.
    """
    found = listed(folder)
    for path in reversed(found):
        try:
            return read(path)
        except ValueError as error:
            if not path.exists():                                               # pruned by a live run while we read: a newer one is there
                return newest(folder, warn)
            warn(f"{error}; falling back to the one before it")
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} can be read: start again with a new --out")
    return None
