"""Fashion-MNIST from IDX files: parsed exactly, each failure named, places tried in order. The files here are made up and tiny."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill import doctor
from stepdistill.data.streams import world_pictures
from stepdistill.worlds.fashion import data


def idx(values: Tensor) -> bytes:
    """The IDX format: 0, 0, 8 for unsigned bytes, the number of axes, each size big-endian, the values."""
    header = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + bytes(values.flatten().tolist())


def write(folder: Path, split: str = "train", count: int = 3, seed: int = 0, zipped: bool = True, size: int = 28) -> tuple[Tensor, Tensor]:
    """(images, labels) written as one split."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    return images, labels


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data on this computer and no way to fetch any."""
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")

    def offline(split: str) -> data.Pictures:
        raise OSError("torchvision could not download it (offline)")

    monkeypatch.setattr(data, "_download", offline)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_written_is_read(tmp_path: Path, split: str, zipped: bool) -> None:
    images, labels = write(tmp_path, split, zipped=zipped)
    found = data.load(split, tmp_path)
    assert torch.equal(found.images, images.unsqueeze(1))
    assert torch.equal(found.labels, labels.long())
    assert (found.images.dtype, found.labels.dtype, len(found)) == (torch.uint8, torch.int64, 3)


def test_pixels_reach_minus_one_and_one() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.to_model(pixels), torch.tensor([-1.0, -0.6, 1.0]))


def test_there_are_two_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'train' and 'test', not 'validation'"):
        data.load("validation", tmp_path)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda raw: b"\x00\x00\x09\x03" + raw[4:], "is not an IDX file of 3 axes"),
    (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "is not an IDX file of 3 axes"),
    (lambda raw: raw[:9], "is not an IDX file of 3 axes"),
    (lambda raw: b"", "is not an IDX file of 3 axes"),
    (lambda raw: raw[:-10], r"is cut short: 2342 bytes for shape \[3, 28, 28\]"),
])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_named(tmp_path: Path, damage, message: str, zipped: bool) -> None:
    images, _ = write(tmp_path, zipped=zipped)
    path, raw = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped), damage(idx(images))
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    with pytest.raises(OSError, match=message) as caught:
        data.load("train", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda raw: b"no gzip at all", lambda raw: raw[:-100], lambda raw: raw[:400] + bytes(64) + raw[464:]])
def test_a_damaged_archive_is_named(tmp_path: Path, damage) -> None:
    """gzip raises BadGzipFile, EOFError or zlib.error, of which only the first is an OSError."""
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"images-idx3-ubyte\.gz"):
        data.load("train", tmp_path)


def test_a_file_of_a_header_alone_is_cut_short(tmp_path: Path) -> None:
    images, _ = write(tmp_path, zipped=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images)[:16])
    with pytest.raises(OSError, match="is cut short: 0 bytes"):
        data.load("train", tmp_path)


def test_other_data_in_the_same_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "small", size=20)
    with pytest.raises(OSError, match=r"\(3, 20, 20\) pictures and 3 labels: not Fashion-MNIST"):
        data.load("train", tmp_path / "small")
    write(tmp_path / "uneven")
    (tmp_path / "uneven" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(2, dtype=torch.uint8))))
    with pytest.raises(OSError, match=r"\(3, 28, 28\) pictures and 2 labels"):
        data.load("train", tmp_path / "uneven")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train-labels-idx1-ubyte\[.gz\]"):
        data.load("train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no t10k-images-idx3-ubyte\[.gz\]"):
        data.load("test", tmp_path)


# ---- places, in order

def test_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, environment, Debian, download: each is taken away in turn."""
    counts = {"argument": 2, "environment": 3, "debian": 4}
    for name, count in counts.items():
        write(tmp_path / name, count=count)
    monkeypatch.setattr(data, "_download", lambda split: data.Pictures(torch.zeros(5, 1, 28, 28), torch.zeros(5)))
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "environment"))
    assert len(data.load("train", tmp_path / "argument")) == 2
    assert len(data.load("train")) == 3
    monkeypatch.delenv(data.ENVIRONMENT)
    assert len(data.load("train")) == 4
    assert len(world_pictures("fashion").images) == 4
    (tmp_path / "debian" / "train-images-idx3-ubyte.gz").unlink()
    assert len(data.load("train")) == 5


def test_a_folder_that_was_named_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match="elsewhere has no train-images"):
        data.load("train", tmp_path / "elsewhere")
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere has no train-images"):
        data.load("train")


def test_every_failure_and_the_remedy_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        data.load("train")
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{tmp_path / 'debian'} has no train-images-idx3-ubyte[.gz]", "torchvision could not download it (offline)",
                 f"set {data.ENVIRONMENT} to a folder", "dataset-fashion-mnist"):
        assert part in message


def test_a_world_that_is_none() -> None:
    with pytest.raises(ValueError, match="unknown world 'mnist'"):
        world_pictures("mnist")


def test_doctor_looks_where_training_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert doctor.fashion_data().startswith("not on this machine yet")
    write(data.downloads(), "test")
    assert doctor.fashion_data() == str(tmp_path / "cache" / "stepdistill" / "FashionMNIST" / "raw")
    write(tmp_path / "debian", "test")
    assert doctor.fashion_data() == str(tmp_path / "debian")
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "mine"))
    assert doctor.fashion_data().startswith(f"{data.ENVIRONMENT} names a folder that cannot be read: ")
    write(tmp_path / "mine", "test")
    assert doctor.fashion_data() == str(tmp_path / "mine")
