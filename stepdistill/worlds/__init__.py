"""Small real worlds shipped inside the package: a teacher, an extractor, reference statistics, model cards."""

from __future__ import annotations

from pathlib import Path

NAMES = ("fashion",)


def teacher_folder(name: str) -> Path | None:
    """The folder of a shipped world's teacher; None where no world has this name. "teacher:fashion" and "fashion" are the same."""
    name = name.removeprefix("teacher:")
    return Path(__file__).parent / name / "teacher" if name in NAMES else None


def stored_results(name: str) -> list[Path]:
    """Result files of a world's teacher, stored with the package (the model card names the commands that remake them)."""
    return sorted((Path(__file__).parent / name / "results").glob("*.json"))
