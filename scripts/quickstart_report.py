"""After a training in a shipped world: export, evaluate and compare with the teacher's stored scores, in one process.

    python scripts/quickstart_report.py RUN [--count 2000]
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from stepdistill import recipe, worlds
from stepdistill.eval.evaluate import evaluate
from stepdistill.eval.report import compare
from stepdistill.export import add_results, export
from stepdistill.training.loop import RECIPE


def main(run: Path, count: Annotated[int | None, typer.Option(help="pictures; default: the fewest that a score of the teacher is stored "
                                                                   "for")] = None) -> None:
    """Export RUN to RUN/student, score it in as many calls as it was trained for and in 2 and 1, and write RUN/report: beside the teacher's
    stored scores, with the run's curves."""
    chosen, student, report = recipe.load(run / RECIPE), run / "student", run / "report"
    name, world = chosen.teacher.path.partition("/")[0], worlds.world_of(chosen.teacher.path)
    if world is None or world.protocol is None:
        raise typer.BadParameter(f"the teacher of {run} has no stored scores: use `stepdistill export` and `stepdistill eval`")
    stored = {path: json.loads(path.read_text()) for path in worlds.stored_results(name)}
    count = count or min(result["protocol"]["count"] for result in stored.values())
    teachers = sorted((path for path, result in stored.items() if result["protocol"]["count"] == count),
                      key=lambda path: -int(stored[path]["sampler"]["nfe"]))
    if not teachers:
        raise typer.BadParameter(f"no score of the teacher is stored for {count} pictures")
    if not student.exists():
        export(run, student)
    steps, results = chosen.student.steps, []
    for n in (steps, *(fewer for fewer in (2, 1) if fewer < steps)):
        results.append(run / "results" / f"student_{n}.json")
        evaluate(str(student), world.protocol, count, results[-1], steps=None if n == steps else n, against=os.path.relpath(teachers[0]))
    shown = [*teachers, *results]
    compare(shown, report, [run])
    add_results(student, shown)
    print(f"\npictures and scores: {report / 'report.html'}, {report / 'report.md'}, {report / 'samples.png'}\n"
          f"the student: {student} (its README.md shows how to load it)")


if __name__ == "__main__":
    typer.run(main)
