"""Rows of parquet files, and of the Arrow files that Hugging Face datasets saves. Local files only; needs the extra `data`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.models.load import read_json

DICT, STATE = "dataset_dict.json", "state.json"          # what `save_to_disk` leaves beside several splits, and in each of them


@dataclass(frozen=True)
class Table:
    """One file. `chunk(number, column)` reads one of its pieces, which have `sizes` rows; the last one read is kept."""

    path: Path
    columns: tuple[str, ...]
    sizes: tuple[int, ...]
    chunk: Callable[[int, str], Any]

    def where(self, row: int) -> str:
        """The place of a row, counted from 0 as pandas and datasets do."""
        return f"{self.path}, row {row}"

    def values(self, column: str) -> Iterator[Any]:
        """A column from top to bottom, as Python values."""
        for number in range(len(self.sizes)):
            yield from self.chunk(number, column).to_pylist()

    def value(self, column: str, row: int) -> Any:
        """One cell."""
        number = 0
        while row >= self.sizes[number]:
            row, number = row - self.sizes[number], number + 1
        return self.chunk(number, column)[row].as_py()


def find(path: Path) -> list[Table]:
    """The tables of a .parquet file, or of a folder: what `datasets` saved with `save_to_disk`, or parquet files as on the hub.

    Of several splits the one named train is read; a folder of the hub's kind has it in the files' or their folders' names. Files are
    in name order. Raises ValueError where a file is damaged, a folder is no dataset, or pyarrow is missing.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} holds tables, and reading them needs pyarrow: pip install stepdistill[data]")
    return [_parquet(file) if file.suffix == ".parquet" else _stream(file) for file in _files(path)]


def chosen(keys: Iterable[str], columns: Iterable[str], where: str) -> str:
    """The first of these columns that there is; ValueError naming those there are."""
    columns = tuple(columns)
    column = next((key for key in keys if key in columns), None)
    if column is None:
        raise ValueError(f"{where}: no column {', '.join(keys)}; there are {', '.join(columns)}")
    return column


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / DICT).is_file():
        splits = read_json(path / DICT).get("splits", [])
        if "train" not in splits:
            raise ValueError(f"{path} has no split named train: name one of its folders, {', '.join(map(str, splits))}")
        return _files(path / "train")
    if (path / STATE).is_file():
        return [path / Path(entry["filename"]).name for entry in read_json(path / STATE).get("_data_files", [])]
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{path} is no dataset: it has neither {DICT}, {STATE} nor parquet files")
    return [f for f in files if any(part.startswith("train") for part in f.relative_to(path).parts)] or files


@contextmanager
def _named(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error


def _parquet(path: Path) -> Table:
    from pyarrow import parquet

    with _named(path), parquet.ParquetFile(path) as file:
        columns, sizes = tuple(file.schema_arrow.names), tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))

    def chunk(number: int, column: str) -> Any:
        with _named(path), parquet.ParquetFile(path) as file:
            return file.read_row_group(number, columns=[column]).column(column)

    return Table(path, columns, sizes, functools.lru_cache(maxsize=1)(chunk))


def _stream(path: Path) -> Table:
    import pyarrow

    with _named(path), pyarrow.memory_map(str(path)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()                     # a view of the file, not a copy
    return Table(path, tuple(table.column_names), (table.num_rows,), lambda number, column: table.column(column))
