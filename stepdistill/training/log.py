"""A plain JSONL log, and means since its last line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepdistill.losses.reported import Mean
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
        self.sums: dict[str, Mean] = {}

    def add(self, values: Mapping[str, Mean]) -> None:
        """Add one update's values."""
        for name, part in values.items():
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def take(self, run: Run) -> dict[str, float]:
        """The means over updates and processes, but for those of no sample, and start again."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.stack([torch.stack((self.sums[n].total.float(), self.sums[n].count.float())) for n in names])
        self.sums = {}
        totals, counts = run.accelerator.reduce(sums, "sum").T.tolist()
        return {n: total / count for n, total, count in zip(names, totals, counts, strict=True) if count}
