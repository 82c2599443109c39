"""Training curves of a run for the report: which of them, what healthy ones look like, and what `stepdistill diagnose` finds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill import diagnose
from stepdistill.diagnose import Diagnosis
from stepdistill.eval.tables import plural


@dataclass(frozen=True)
class Curve:
    """One chart: a title, the log's names in it (a regular expression), and the README's words for a healthy one."""

    title: str
    names: str
    healthy: str
    logarithmic: bool = False


CURVES = (
    Curve("Gap of the scores", r"student/score_gap(_\d+)?", "falls, then a plateau above 0"),
    Curve("Gap of the scores by noise level", r"student/score_gap_s\d+", "falls, then a plateau above 0"),
    Curve("Loss of the fake score", r"critic/denoise(_\d+)?", "drops fast, then flat"),
    Curve("Accuracy of the discriminator", r"(critic|disc)/disc_accuracy(_real|_generated)?", "0.6 to 0.8, moving"),
    Curve("Distance to the target", r"student/distance", "falls, then flat"),
    Curve("Gradient norms", r"grad/\w+", "falls with the rate", logarithmic=True),
    Curve("Mean and standard deviation of x0", r"student/x0_(mean|std)", "near the teacher's"),
    Curve("Stored weights moved by an update", r"moved/\w+", "near 1"),
    Curve("Size of an update, over that of the weights", r"update/\w+", "falls with the rate", logarithmic=True),
    Curve("Distance of the weights from their average", r"ema/distance", "falls with the rate", logarithmic=True),
    Curve("Looks, over the teacher's", r"look/(contrast|saturation|sharpness|spread)", "near 1"),
    Curve("Looks, less the teacher's", r"look/(brightness|clipped|grid)", "near 0"),
    Curve("Colours, less the teacher's", r"look/(red|green|blue)", "near 0"),
    Curve("Exams by kernel distance", r"exam(_raw)?/kid_\w+(?<!_se)", "fall, then flat"),
    Curve("Exams by Fréchet distance", r"exam(_raw)?/frechet_\w+(?<!_se)", "fall, then flat"),
)


@dataclass(frozen=True)
class Training:
    """A run's diagnosis, the number of lines in its log, and of those the curves that are there, by chart and name: (step, value)."""

    diagnosis: Diagnosis
    logged: int
    curves: tuple[tuple[Curve, dict[str, list[tuple[int, float]]]], ...]

    @property
    def word(self) -> str:
        """The state of its health: ill, healthy, or unknown where the log is too short to say."""
        if self.diagnosis.findings:
            return "ill"
        return "healthy" if self.logged >= diagnose.LEAST else "unknown"

    @property
    def summary(self) -> str:
        """How far the run is, and what its word means."""
        found = self.diagnosis
        said = {"ill": f"{plural(len(found.findings), 'known illness', 'known illnesses')} seen",
                "healthy": "none of the known illnesses seen",
                "unknown": f"{plural(self.logged, 'line')} in the log; shapes of curves are judged from {diagnose.LEAST} on"}[self.word]
        return f"{found.method}, {found.step:,} of {found.steps:,} steps: {said}."

    def to_dict(self) -> dict[str, Any]:
        """report.json's block: the diagnosis and what it comes to, without the curves."""
        return {"word": self.word, "summary": self.summary, **self.diagnosis.to_dict()}


def read(run: Path) -> Training:
    """Of a run folder; FileNotFoundError or ValueError, as `diagnose` has them, for one that is none or whose log is damaged."""
    found, rows = diagnose.examine(run), diagnose.read_log(run / "log.jsonl")
    charts = ((curve, lines(rows, curve.names)) for curve in CURVES)
    return Training(found, len(rows), tuple((curve, drawn) for curve, drawn in charts if drawn))


def lines(rows: Sequence[Mapping[str, Any]], names: str) -> dict[str, list[tuple[int, float]]]:
    """The finite values of the names that the whole expression matches, with their steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if re.fullmatch(names, name) and math.isfinite(value):
                found.setdefault(name, []).append((row["step"], float(value)))
    return found
