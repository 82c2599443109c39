"""What `diagnose` says of every toy of this suite, the healthy ones and those that are made ill on purpose, as a table:

    bash scripts/test.sh --confusion docs/diagnose.md               # the toys of the default suite; with --slow in front, the longer ones
"""

import json
from collections import Counter
from pathlib import Path

SEEN: list[tuple[str, str, list[str]]] = []             # (the illness that was made or "", the method or test, what was found)


def record(made: str, where: str, found: list[str]) -> list[str]:
    """Keep it for the table, and hand `found` back."""
    SEEN.append((made, where, found))
    return found


def write(path: Path) -> None:
    """The table as Markdown, and the same as JSON beside it."""
    healthy = Counter(where for made, where, _ in SEEN if not made)
    alarmed = Counter(where for made, where, found in SEEN if not made and found)
    rows = [f"| {made} | {where} | {', '.join(found) or 'nothing'} |" for made, where, found in sorted(SEEN) if made]
    lines = ["# What `stepdistill diagnose` finds", "", "Made by the command in `tests/confusion.py`.", "",
             "## Illnesses made on purpose", "", "| made | how | found |", "|:--|:--|:--|", *rows, "", "## Healthy toys", "",
             "Distillations of exact teachers, which are Gaussian mixtures.", "", "| method | runs | with an alarm |", "|:--|--:|--:|",
             *(f"| {name} | {n} | {alarmed[name]} |" for name, n in sorted(healthy.items())),
             f"| all | {healthy.total()} | {alarmed.total()} |"]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps([{"made": m, "where": w, "found": f} for m, w, f in SEEN], indent=1) + "\n")
