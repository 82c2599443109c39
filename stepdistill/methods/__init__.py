"""One paper, one file; one line here."""

from __future__ import annotations

import difflib
from typing import Any

from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.sid import SiD

METHODS: dict[str, type[Method[Any]]] = {
    "consistency": Consistency,
    "dmd2": DMD2,
    "sid": SiD,
}


def find(name: str) -> type[Method[Any]]:
    """The method of this name; ValueError with the nearest name otherwise."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise ValueError(f"unknown method {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(METHODS)}"))
    return METHODS[name]
