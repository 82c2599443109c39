"""Prompts from tables and datasets, and every way in which a file of prompts can be wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from stepdistill.data.prompts import read_prompts

parquet = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

TEXTS = ["a red apple", "snow", "two blue houses"]


def table(path: Path, columns: dict[str, list], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return path


def test_a_parquet_file_in_several_row_groups(tmp_path):
    assert read_prompts(table(tmp_path / "p.parquet", {"n": [1, 2, 3], "caption": TEXTS}, row_group_size=2)) == tuple(TEXTS)


def test_the_first_column_of_those_known_is_read(tmp_path):
    assert read_prompts(table(tmp_path / "p.parquet", {"text": ["x"], "prompt": ["y"]})) == ("y",)


def test_a_folder_as_on_the_hub_gives_its_training_split_in_name_order(tmp_path):
    for name, texts in {"train-00001-of-00002": TEXTS[2:], "train-00000-of-00002": TEXTS[:2], "test-00000-of-00001": ["never"]}.items():
        table(tmp_path / "data" / f"{name}.parquet", {"text": texts})
    assert read_prompts(tmp_path) == tuple(TEXTS)


def test_a_folder_without_splits_is_read_whole(tmp_path):
    for name, text in {"b": "second", "a": "first"}.items():
        table(tmp_path / f"{name}.parquet", {"text": [text]})
    assert read_prompts(tmp_path) == ("first", "second")


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "three")
    assert read_prompts(tmp_path / "one") == read_prompts(tmp_path / "two") == tuple(TEXTS)
    assert read_prompts(tmp_path / "two" / "test") == tuple(TEXTS[:1])
    with pytest.raises(ValueError, match=r"three has no split named train: name one of its folders, test"):
        read_prompts(tmp_path / "three")


@pytest.mark.parametrize(("columns", "message"), [
    ({"words": ["a"]}, r"p\.parquet: no column prompt, caption, text; there are words"),
    ({"text": ["a", " "]}, r"p\.parquet, row 1: the prompt is empty"),
    ({"text": ["a", None]}, r"p\.parquet, row 1: the prompt is NoneType, not text"),
    ({"text": [["a", "b"]]}, r"p\.parquet, row 0: the prompt is list, not text"),
    ({"text": []}, r"p\.parquet holds no prompts")])
def test_a_bad_table_names_the_row(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(table(tmp_path / "p.parquet", columns))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read as a table"):
        read_prompts(tmp_path / "p.parquet")


def test_a_table_whose_pages_are_damaged_is_named(tmp_path):
    path = table(tmp_path / "p.parquet", {"text": [str(i) * 50 for i in range(200)]}, compression="zstd")
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(600) + data[604:])                     # the footer is whole
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read as a table"):
        read_prompts(path)


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="is no dataset"):
        read_prompts(tmp_path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = table(tmp_path / "p.parquet", {"text": TEXTS})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install stepdistill\[data\]"):
        read_prompts(path)


@pytest.mark.parametrize(("content", "name", "message"), [
    (b"good\nb\xe9ton\n", "p.txt", r"p\.txt, line 2: not UTF-8 text; save it as UTF-8"),
    ("a\nb\n".encode("utf-16"), "p.txt", r"p\.txt, line 1: not UTF-8"),
    (b"a\r\n\r\nb\r\n", "p.txt", r"line 2: the prompt is empty"),
    (b'{"text": "a"}\n["b"]\n', "p.jsonl", r"line 2: not a JSON object"),
    (b'{"text": "a"}\n{"text": " "}\n', "p.jsonl", r"line 2: the prompt is empty"),
    (b"prompt\n" + b"x" * 200_000, "p.csv", r"p\.csv, line 2: not a table \(field larger")])
def test_bad_text_names_the_line(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_byte_order_mark_and_accents(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffune pomme rouge\nneige d'été\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("une pomme rouge", "neige d'été")
