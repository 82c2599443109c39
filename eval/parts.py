"""Pictures on their way to a score, kept batch by batch: an interrupted evaluation goes on, and a second process helps the first.

Every batch is a file of its own in a folder beside the result. Who begins one leaves a claim with its process number; the claim of a
process that is gone counts for nothing. Which process made a batch cannot be seen in it: sample i depends on (seed, i) alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file, save_file
from torch import Tensor

META = "meta.json"


class Taken(Exception):
    """Another process finished the evaluation and cleared the parts away."""


@dataclass(frozen=True)
class Parts:
    """The folder of one evaluation's batches."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, meta: Mapping[str, Any]) -> Parts:
        """New, or the one that an evaluation of the same `meta` left behind; another's is cleared away."""
        wanted = json.dumps(meta, sort_keys=True)
        if folder.is_dir() and (not (folder / META).is_file() or (folder / META).read_text() != wanted):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / META).is_file():
            partial = folder / f".{META}.{os.getpid()}"
            partial.write_text(wanted)
            os.replace(partial, folder / META)
        return cls(folder)

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"

    def has(self, first: int) -> bool:
        """Is the batch that begins with sample `first` finished?"""
        return self._file(first).is_file()

    def claim(self, first: int) -> bool:
        """Take a batch that is neither finished nor in a living process's hands."""
        if self.has(first):
            return False
        me = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}
        path, mine = self.folder / f"{first:08d}.claim", json.dumps(me)
        try:
            with path.open("x") as file:
                file.write(mine)
            return True
        except FileExistsError:
            if self._alive(path):
                return False
            path.write_text(mine)
            return True

    def _alive(self, path: Path) -> bool:
        try:
            owner = json.loads(path.read_text())
        except (OSError, ValueError):
            return False                                                  # begun and killed before it was written
        if owner["host"] != socket.gethostname():
            return True
        try:
            return bool(psutil.Process(owner["pid"]).create_time() == owner["born"])
        except psutil.NoSuchProcess:
            return False

    def put(self, first: int, images: Tensor, milliseconds: float) -> None:
        """Finish a batch, in one move."""
        partial = self.folder / f".{first:08d}.{os.getpid()}"
        save_file({"images": images.contiguous()}, partial, metadata={"milliseconds": repr(milliseconds)})
        os.replace(partial, self._file(first))
        (self.folder / f"{first:08d}.claim").unlink(missing_ok=True)

    def get(self, first: int) -> tuple[Tensor, float]:
        """Pictures of a finished batch, and the milliseconds that each took."""
        from safetensors import safe_open

        path = self._file(first)
        with safe_open(path, "pt") as file:
            milliseconds = float(file.metadata()["milliseconds"])
        return load_file(path)["images"], milliseconds

    def open_batches(self, firsts: range) -> Iterator[int]:
        """Batches to make, claimed one at a time, until every one is finished or in other hands."""
        for first in firsts:
            if self.claim(first):
                yield first

    def check(self) -> None:
        """Raises Taken where the folder is gone."""
        if not self.folder.is_dir():
            raise Taken

    def remove(self) -> None:
        """Nothing is left when the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
