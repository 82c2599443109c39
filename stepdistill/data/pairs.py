"""Noises and what a teacher's ODE makes of them, made once: safetensors shards in a folder, taken up again after a kill.

    pairs.json                          what they were made of
    pairs-FIRST-STOP.safetensors ...    z, y (n, *shape) float32, label (n,) of a class or prompt, index (n,); whole or not at all

z is standard normal, as it is before `sampler.start`: the teacher's ODE began at start(z) of its first time, and a student is called with
start(z) of its own, 80 z on EDM and z on a VP process where both are told t = 1. Pair i depends on (seed, i) alone, its noise is no
evaluation's, and classes or prompts take turns. Several processes of one launch share the shards out, with the files that one would leave.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from stepdistill.data.cache import LOCK, digest, file_digest, files_digest, locked, opened, write, write_text
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.models.load import Teacher, read_json
from stepdistill.models.prompted import PromptTeacher

MANIFEST = "pairs.json"
SHARD = 128                                              # pairs in each


def origin(teacher: Teacher, guidance: float, call: Mapping[str, Any], loras: Mapping[str, float]) -> dict[str, Any]:
    """What pairs and the run that reads them must have in common, as plain JSON values: digests of teacher and conditions, shape, guidance.

    A teacher is its network's files, its scheduler, the keywords of its pipeline and the LoRA files merged into it.
    """
    folder = teacher.folder
    network = folder / teacher.component if (folder / teacher.component).is_dir() else folder
    files = [files_digest(network, "*.safetensors"), files_digest(network, "*config.json"), files_digest(folder / "scheduler", "*.json")]
    merged = [(scale, file_digest(Path(path))) for path, scale in loras.items()]
    return {"teacher": digest([files, merged, dict(call)]), "conditions": digest([list(teacher.labels), teacher.null_class]),
            "shape": list(teacher.shape), "guidance": guidance}


@dataclass(frozen=True)
class Made:
    """What a folder of pairs holds, and how many were made just now, in how many network evaluations each."""

    folder: str
    pairs: int
    made: int
    shards: int
    bytes: int
    nfe: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairSet:
    """A folder of `count` pairs, read a row at a time."""

    folder: Path
    count: int

    @classmethod
    def open(cls, folder: Path, wanted: Mapping[str, Any]) -> PairSet:
        """The pairs of this `origin`. FileNotFoundError where there are none, ValueError where they are another's or unfinished."""
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"data.pairs {folder} holds no pairs: make them first with `stepdistill pairs --config RECIPE "
                                    f"--to {folder}`")
        found = read_json(folder / MANIFEST)
        if differing := [name for name, value in wanted.items() if found.get(name) != value]:
            raise ValueError(f"data.pairs {folder} was made with another {', '.join(differing)}: make new ones with `stepdistill pairs "
                             "--config RECIPE --to FOLDER`")
        pairs = cls(folder, int(found["count"]))
        if missing := sum(stop - first for first, stop in pairs.missing()):
            raise ValueError(f"data.pairs {folder} lacks {missing} of {pairs.count} pairs: the same `stepdistill pairs` again goes on")
        return pairs

    def shard(self, row: int) -> tuple[int, int]:
        """(first row, one past the last) of the shard that a row is in."""
        first = row - row % SHARD
        return first, min(self.count, first + SHARD)

    def path(self, first: int, stop: int) -> Path:
        """The file of a shard."""
        return self.folder / f"pairs-{first:08d}-{stop:08d}.safetensors"

    def missing(self) -> list[tuple[int, int]]:
        """Shards that are not there."""
        return [span for span in map(self.shard, range(0, self.count, SHARD)) if not self.path(*span).is_file()]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z, y, label) of some pairs, (B, *shape) twice and (B,), on the CPU."""
        found = []
        for row in rows.tolist():
            first, stop = self.shard(row)
            with opened(self.path(first, stop), "pairs") as file:
                found.append([file.get_slice(name)[row - first : row - first + 1] for name in ("z", "y", "label")])
        z, y, label = (torch.cat(parts) for parts in zip(*found, strict=True))
        return z, y, label


def fill(folder: Path, teacher: Teacher, spec: SamplerSpec, wanted: Mapping[str, Any], *, count: int, seed: int, batch_size: int) -> Made:
    """Make what is missing of `count` pairs with the ODE that `spec` walks, `batch_size` at a time; `wanted` is their `origin`, and more.

    Every process of a launch must call it. ValueError where the folder holds something else, pairs of other settings among it.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch size must be at least 1, got {count} and {batch_size}")
    team, pairs = PartialState(), PairSet(folder, count)
    terms = json.loads(json.dumps({**wanted, "sampler": spec.to_dict(), "seed": seed, "count": count}))
    _check(folder, terms)
    team.wait_for_everyone()                                                   # every process has looked before one writes
    with locked(folder) if team.is_main_process else nullcontext():
        if team.is_main_process:
            for partial in folder.glob(".*.partial"):
                partial.unlink()
            _check(folder, terms)
            write_text(folder / MANIFEST, json.dumps(terms, indent=1) + "\n")
        missing = pairs.missing()
        team.wait_for_everyone()
        mine = missing[team.process_index :: team.num_processes]
        together = 1 if isinstance(teacher, PromptTeacher) and teacher.bank is None else batch_size
        with tqdm(total=sum(b - a for a, b in mine), desc="pairs", unit="pair", file=sys.stderr, dynamic_ncols=True,
                  disable=not (mine and team.is_main_process)) as bar:
            for first, stop in mine:
                parts = []
                for begin in range(first, stop, together):
                    parts.append(_pairs(teacher, spec, seed, range(begin, min(stop, begin + together))))
                    bar.update(len(parts[-1]["index"]))
                write(pairs.path(first, stop), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, lambda found: None)
        team.wait_for_everyone()
    shards = list(folder.glob("pairs-*.safetensors"))
    return Made(str(folder), count, sum(b - a for a, b in missing), len(shards), sum(path.stat().st_size for path in shards), spec.nfe)


def _check(folder: Path, terms: Mapping[str, Any]) -> None:
    if (folder / MANIFEST).is_file():
        found = read_json(folder / MANIFEST)
        if differing := sorted(name for name in {*found, *terms} if found.get(name) != terms.get(name)):
            raise ValueError(f"{folder} holds pairs of another {', '.join(differing)}: choose another --to")
    elif folder.exists() and (not folder.is_dir() or any(p.name[0] != "." and p.name != LOCK for p in folder.iterdir())):
        raise ValueError(f"{folder} holds something else: choose another --to")


def _pairs(teacher: Teacher, spec: SamplerSpec, seed: int, rows: range) -> dict[str, Tensor]:
    """Pairs of these numbers, by the names they have in a shard."""
    index = torch.tensor(rows)
    label, draws = index % max(1, teacher.classes), Draws(seed, rows, device=teacher.device)
    z = draws.each("pairs").normal(*teacher.shape)
    *_, last = steps(teacher.denoiser, start(teacher.denoiser.process, spec, z), spec, teacher.condition(label), draws)
    return {"z": z.cpu(), "y": last.x0.float().cpu(), "label": label, "index": index}
