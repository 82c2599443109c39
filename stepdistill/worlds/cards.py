"""Figures of model cards: taken from stored results, or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARK = re.compile(r"(<!-- (\S+): ([^:]+): (\S+) -->).*?(<!-- -->)", re.DOTALL)
NONE = "not measured yet"


def filled(card: str, folder: Path) -> str:
    """The card with every marked figure read again from its file in `folder`.

    A mark is `<!-- FILE: KEY/KEY: FORMAT -->figure<!-- -->`: a JSON file, the way to a number in it, a format of Python (.3f). A figure
    whose file is not there reads NONE. ValueError where the file has no such number.
    """
    def figure(mark: re.Match[str]) -> str:
        begin, name, keys, form, end = mark.groups()
        path = folder / name
        if not path.is_file():
            return f"{begin}{NONE}{end}"
        value: Any = json.loads(path.read_text())
        for key in keys.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            raise ValueError(f"{path} holds no number at {keys}, which a mark in the model card names")
        return f"{begin}{value:{form}}{end}"

    return MARK.sub(figure, card)
