"""Prompts from a file: plain text, JSON lines or CSV; and pictures with captions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

KEYS = ("prompt", "caption", "text")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line (.txt), one object a line with a key of KEYS (.jsonl), or a table with such a column (.csv).

    Raises FileNotFoundError, or ValueError naming the file and the line: empty lines are errors, since nobody means them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.prompts {path} does not exist")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.prompts {path} is not a text file") from error
    if not text.strip():
        raise ValueError(f"data.prompts {path} is empty")
    readers = {".txt": _lines, ".jsonl": _objects, ".csv": _table}
    if path.suffix not in readers:
        raise ValueError(f"data.prompts {path}: the name must end in {', '.join(readers)}")
    prompts = readers[path.suffix](text, path)
    for number, prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"{path}, line {number}: the prompt is empty; delete the line")
    return tuple(prompt.strip() for _, prompt in prompts)


def _lines(text: str, path: Path) -> list[tuple[int, str]]:
    return list(enumerate(text.rstrip("\n").split("\n"), 1))


def _objects(text: str, path: Path) -> list[tuple[int, str]]:
    found = []
    for number, line in _lines(text, path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error.msg})") from error
        key = next((k for k in KEYS if isinstance(value, dict) and isinstance(value.get(k), str)), None)
        if key is None:
            raise ValueError(f"{path}, line {number}: no text under {', '.join(KEYS)}")
        found.append((number, value[key]))
    return found


def _table(text: str, path: Path) -> list[tuple[int, str]]:
    reader = csv.DictReader(io.StringIO(text))
    column = next((k for k in KEYS if k in (reader.fieldnames or ())), None)
    if column is None:
        raise ValueError(f"{path}, line 1: no column {', '.join(KEYS)}; there are {', '.join(reader.fieldnames or ())}")
    return [(reader.line_num, row[column] or "") for row in reader]


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """Pictures with their captions: a metadata.jsonl whose lines hold file_name and a key of KEYS, or a .txt beside every picture.

    Raises FileNotFoundError or ValueError naming the file (and line) at fault.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder {folder} does not exist")
    table = folder / "metadata.jsonl"
    if table.is_file():
        found = [(folder / str(_file_name(line, number, table)), caption) for (number, caption), line in
                 zip(_objects(table.read_text(), table), table.read_text().rstrip("\n").split("\n"), strict=True)]
    else:
        pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if missing := [p for p in pictures if not p.with_suffix(".txt").is_file()]:
            raise ValueError(f"{missing[0]} has no caption: put it into {missing[0].with_suffix('.txt').name} beside it, or all into "
                             f"{folder / 'metadata.jsonl'}")
        found = [(p, p.with_suffix(".txt").read_text().strip()) for p in pictures]
    if not found:
        raise ValueError(f"data.folder {folder} holds no pictures ({', '.join(SUFFIXES)})")
    for path, caption in found:
        if not path.is_file() or folder.resolve() not in path.resolve().parents:
            raise ValueError(f"{table} names {path.name}, which is not in {folder}")
        if not caption.strip():
            raise ValueError(f"the caption of {path} is empty")
    return found


def _file_name(line: str, number: int, table: Path) -> str:
    name = json.loads(line).get("file_name")
    if not isinstance(name, str):
        raise ValueError(f"{table}, line {number}: no file_name")
    return name
