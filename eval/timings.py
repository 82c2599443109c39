"""What `stepdistill bench speed --to FILE` wrote, for a report: medians of one picture, by the weights and the calls of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPANS = ("denoiser", "with_text", "with_decoder")       # each with those before it: see eval.speed


@dataclass(frozen=True)
class Timings:
    """A file of timings at its smallest batch: milliseconds for one picture of each model, by digest of its weights and NFE, then by span
    (None: the model has no such part)."""

    path: Path
    batch: int
    env: Mapping[str, Any]
    models: Mapping[tuple[str, int], Mapping[str, float | None]]
    names: Sequence[str]

    def of(self, result: Mapping[str, Any]) -> Mapping[str, float | None] | None:
        """Of a result's model; None where these weights were not timed with so many calls, as those of a folder of pictures never are."""
        return self.models.get((result["model"].get("sha256"), int(result["sampler"]["nfe"])))

    def told(self, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float | None] | None]:
        """Of each result; ValueError where none of them was timed."""
        found = [self.of(result) for result in results]
        if not any(found):
            raise ValueError(f"{self.path} times none of these models with as many calls, but {'; '.join(self.names)}: run `stepdistill "
                             f"bench speed MODEL --to {self.path}` on the weights that were scored, with --steps where they have others")
        return found

    def describe(self, found: Sequence[Mapping[str, float | None] | None]) -> dict[str, Any]:
        """report.json's block `speed`. `span` is the widest one that all models have that were timed."""
        common = [span for span in SPANS if all(ms[span] is not None for ms in found if ms)]
        return {"file": str(self.path), "batch": self.batch, "span": common[-1], "env": dict(self.env)}


def read(path: Path) -> Timings:
    """A file of timings. Raises FileNotFoundError, or ValueError for a file that is none."""
    remedy = f"make one with `stepdistill bench speed MODEL --to {path}`"
    if not path.is_file():
        raise FileNotFoundError(f"no timings {path}: {remedy}")
    models: dict[tuple[str, int], Mapping[str, float | None]] = {}
    names = []
    try:
        report = json.loads(path.read_text())
        batch = min(int(timing["batch"]) for timing in report["rows"][0]["batches"])
        for row in report["rows"]:
            timing = next(one for one in row["batches"] if one["batch"] == batch)
            ms = {span: None if (found := timing["ms"][span]) is None else float(found["median"]) / batch for span in SPANS}
            digest, nfe = str(row["model"]["sha256"]), int(row["sampler"]["nfe"])
            models.setdefault((digest, nfe), ms)
            names.append(f"{row['model']['name']} ({digest[:12]}, NFE {nfe})")
        return Timings(path, batch, dict(report["env"]), models, names)
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} is no file of timings ({type(error).__name__}: {error}): {remedy}") from error
