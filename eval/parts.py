"""Pictures on their way to a score, kept batch by batch: an interrupted evaluation goes on, and a second process helps the first.

Every batch is a file of its own in a folder beside the result. Who begins one leaves a claim with its process number; the claim of a
process that is gone counts for nothing. Which process made a batch cannot be seen in it: sample i depends on (seed, i) alone. The folder of
an evaluation is named after all that its pictures depend on, so processes that begin at one instant agree on it without a lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.eval.pictures import Pictures

META, END = "meta.json", "end"                          # what the pictures depend on; the claim of who scores them


class Taken(Exception):
    """Another process finished the evaluation and cleared the parts away."""


@dataclass(frozen=True)
class Parts:
    """The folder of one evaluation's batches."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, meta: Mapping[str, Any]) -> Parts:
        """The place of `meta` below `folder`, new or as an evaluation left it. What lies there of other evaluations is cleared away."""
        wanted = json.dumps(meta, sort_keys=True)
        own = folder / hashlib.sha256(wanted.encode()).hexdigest()[:16]
        while True:
            own.mkdir(parents=True, exist_ok=True)
            try:
                _written(own / META, wanted)
                break
            except FileNotFoundError:                                     # another process has just finished the same evaluation
                continue
        for other in folder.iterdir():
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        return cls(own)

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"

    def _claim(self, first: int) -> Path:
        return self.folder / f"{first:08d}.claim"

    def has(self, first: int) -> bool:
        """Is the batch that begins with sample `first` finished?"""
        return self._file(first).is_file()

    def claim(self, first: int) -> bool:
        """Take a batch that is neither finished nor in a living process's hands."""
        if self.has(first) or not self._take(f"{first:08d}"):
            return False
        if finished := self.has(first):                                   # by who gave the claim back just now
            self._claim(first).unlink(missing_ok=True)
        return not finished

    def claim_end(self) -> bool:
        """Take what comes after the last batch, unless a living process has it."""
        return self._take(END)

    def _take(self, what: str) -> bool:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}
        path, mine = self.folder / f"{what}.claim", self.folder / f".{what}.{os.getpid()}.claim"
        with self._there():
            mine.write_text(json.dumps(me))
            try:
                os.link(mine, path)                                       # with all that it says, or not at all
            except FileExistsError:
                if self._alive(path):
                    return False
                os.replace(mine, path)
            finally:
                mine.unlink(missing_ok=True)
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
        """Finish a batch, in one move; raises Taken where the folder is gone."""
        partial = self.folder / f".{first:08d}.{os.getpid()}"
        with self._there():
            save_file({"images": images.contiguous()}, partial, metadata={"milliseconds": repr(milliseconds)})
            os.replace(partial, self._file(first))
        self._claim(first).unlink(missing_ok=True)

    def get(self, first: int) -> tuple[Tensor, float]:
        """Pictures of a finished batch, and the milliseconds that each took."""
        with safe_open(self._file(first), "pt") as file:
            return file.get_tensor("images"), float(file.metadata()["milliseconds"])

    def milliseconds(self, firsts: range) -> float:
        """What a picture took: the median over the batches after the first, where there are any. Raises Taken as `put` does."""
        each = []
        for first in firsts[1:] or firsts:
            with self._there(), safe_open(self._file(first), "pt") as file:
                each.append(float(file.metadata()["milliseconds"]))
        return statistics.median(each)

    def pictures(self, count: int, batch_size: int) -> Pictures:
        """All of them, once every batch of this size is finished; a file is read when a picture of its batch is asked for."""
        def read(rows: range) -> list[Tensor]:
            found: list[Tensor] = []
            for first in range(rows.start // batch_size * batch_size, rows.stop, batch_size):
                with safe_open(self._file(first), "pt") as file:
                    found += file.get_slice("images")[max(0, rows.start - first) : rows.stop - first]
            return found

        return Pictures(count, read)

    def open_batches(self, firsts: range) -> Iterator[int]:
        """Batches to make, claimed one at a time, until every one is finished or in other hands."""
        for first in firsts:
            if self.claim(first):
                yield first

    @contextmanager
    def _there(self) -> Iterator[None]:
        """What fails because the folder is gone raises Taken."""
        try:
            yield
        except (OSError, SafetensorError):
            self.check()
            raise

    def check(self) -> None:
        """Raises Taken where the folder is gone."""
        if not self.folder.is_dir():
            raise Taken

    def remove(self) -> None:
        """Nothing is left when the result is written."""
        gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        with suppress(OSError):
            self.folder.rename(gone)                                      # at once, for whoever looks for a file in it
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()                                    # unless another evaluation has begun there


def _written(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)
