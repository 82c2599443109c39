"""Prompts from files: plain text, JSON lines, CSV, parquet, and the folders of Hugging Face datasets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.data import tables

KEYS = ("prompt", "caption", "text")


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line (.txt), one object a line with a key of KEYS (.jsonl), or a table with such a column (.csv, .parquet, a dataset).

    A dataset is a folder that `tables.find` reads. Raises FileNotFoundError, or ValueError naming the file and the line or row: empty
    lines are errors, since nobody means them.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data.prompts {path} does not exist")
    if path.is_dir() or path.suffix == ".parquet":
        found = list(_cells(path))
    else:
        readers = {".txt": _lines, ".jsonl": _captions, ".csv": _table}
        if path.suffix not in readers:
            raise ValueError(f"data.prompts {path}: the name must end in {', '.join(readers)} or .parquet")
        text = decoded(path.read_bytes(), str(path))
        if not text.strip():
            raise ValueError(f"data.prompts {path} is empty")
        found = list(readers[path.suffix](text, path))
    if not found:
        raise ValueError(f"data.prompts {path} holds no prompts")
    return tuple(spoken(text, where, "prompt") for where, text in found)


def spoken(text: Any, where: str, kind: str) -> str:
    """A text without the blanks around it; ValueError naming its place where there is none."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the {kind} is {type(text).__name__}, not text")
    if not text.strip():
        raise ValueError(f"{where}: the {kind} is empty; delete it or write one")
    return text.strip()


def decoded(data: bytes, where: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises ValueError naming the line that is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}, line {line}: not UTF-8 text; save it as UTF-8") from error


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a .jsonl file."""
    for where, line in _lines(decoded(path.read_bytes(), str(path)), path):
        yield where, parsed(line, where)


def parsed(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ValueError naming its place."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def captioned(value: dict[str, Any], where: str) -> str:
    """The text under the first key of KEYS that holds one."""
    key = next((k for k in KEYS if isinstance(value.get(k), str)), None)
    if key is None:
        raise ValueError(f"{where}: no text under {', '.join(KEYS)}")
    return str(value[key])


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    return ((f"{path}, line {number}", line) for number, line in enumerate(text.rstrip("\r\n").split("\n"), 1))


def _captions(text: str, path: Path) -> Iterator[tuple[str, str]]:
    return ((where, captioned(parsed(line, where), where)) for where, line in _lines(text, path))


def _table(text: str, path: Path) -> Iterator[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        column = tables.chosen(KEYS, reader.fieldnames or (), f"{path}, line 1")
        for row in reader:
            yield f"{path}, line {reader.line_num}", row[column] or ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: not a table ({error})") from error


def _cells(path: Path) -> Iterator[tuple[str, Any]]:
    for table in tables.find(path):
        column = tables.chosen(KEYS, table.columns, str(table.path))
        yield from ((table.where(row), value) for row, value in enumerate(table.values(column)))
