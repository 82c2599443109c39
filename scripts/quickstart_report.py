"""After a training: export, evaluate and compare with the teacher's stored scores, in one process.

    python scripts/quickstart_report.py RUN [--count 2000]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.eval.evaluate import evaluate
from stepdistill.eval.report import compare
from stepdistill.export import add_results, export
from stepdistill.worlds import stored_results


def main(run: Path, count: Annotated[int, typer.Option(help="pictures; the teacher's scores are stored for 2000")] = 2000) -> None:
    """Export RUN to RUN/student, score it, and write RUN/report: beside the teacher's stored scores, with the run's curves."""
    student, result, report = run / "student", run / "results" / "student.json", run / "report"
    if not student.exists():
        export(run, student)
    evaluate(str(student), "fashion", count, result)
    teachers = [path for path in stored_results("fashion") if json.loads(path.read_text())["protocol"]["count"] == count]
    compare([*teachers, result], report, [run])
    add_results(student, [*teachers, result])
    print(f"\npictures and scores: {report / 'report.html'}, {report / 'report.md'}, {report / 'samples.png'}\n"
          f"the student: {student} (its README.md shows how to load it)")


if __name__ == "__main__":
    typer.run(main)
