"""A plain JSONL log, the trackers of accelerate, and preview grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import sample
from stepdistill.images import grid, save_png
from stepdistill.training.assemble import Run
from stepdistill.training.checkpoint import write_atomically


class Log:
    """`log.jsonl` in the run folder, one object a line with its `step`. On resuming, lines from later steps are cut off."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "log.jsonl"
        if self.path.exists():
            write_atomically(self.path, "".join(line + "\n" for line in self.path.read_text().splitlines() if _step(line) < start))
        self.file = self.path.open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def _step(line: str) -> float:
    """The step of a line; a line cut short by a kill counts as never written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


class Means:
    """Running sums of logged scalars since the last line, kept on the device so that nothing waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one update's values."""
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = total + value, count + 1

    def take(self, run: Run) -> dict[str, float]:
        """The means over updates and processes, and start again."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([(self.sums[n][0] / self.sums[n][1]).float() for n in names])
        self.sums = {}
        return dict(zip(names, run.accelerator.reduce(means, "mean").tolist(), strict=True))


def preview(run: Run, path: Path) -> None:
    """A PNG grid of the student (its EMA where one is kept) at fixed noise and labels."""
    draws = Draws(run.recipe.seed, range(run.recipe.preview_count), step=-1, device=run.accelerator.device)
    labels = torch.arange(run.recipe.preview_count) % max(1, run.teacher.classes)
    with run.roles.averaged(run.ema.network if run.ema else None) as student:
        x0 = sample(student, run.method.sampler(), run.teacher.condition(labels), draws, run.teacher.shape)
    save_png(grid(run.teacher.pictures(x0), columns=min(10, run.recipe.preview_count)), path)
