"""Fashion-MNIST (Xiao et al. 2017, MIT licence) at its native 28x28, read from the four IDX files and from nothing else."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NULL = len(CLASSES)                                     # the label of "no class", for classifier-free guidance
DEBIAN = Path("/usr/share/datasets/fashion-mnist")      # the package dataset-fashion-mnist
ENVIRONMENT = "STEPDISTILL_FASHION"
_FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Pictures:
    """uint8 pictures (N, 1, 28, 28) and int64 labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.float() / 127.5 - 1


def load(split: str = "train", folder: str | Path | None = None) -> Pictures:
    """Read one split. Tried in order: `folder` or $STEPDISTILL_FASHION, the Debian package's folder, torchvision's download.

    A folder that was named must work: it is never replaced in silence by another. Raises FileNotFoundError naming every failure.
    """
    if split not in _FILES:
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {split!r}")
    named = folder or os.environ.get(ENVIRONMENT)
    if named:
        return _read(Path(named), split)
    failures = []
    for attempt in (lambda: _read(DEBIAN, split), lambda: _download(split)):
        try:
            return attempt()
        except (OSError, RuntimeError, ImportError) as error:
            failures.append(str(error))
    raise FileNotFoundError(
        "no Fashion-MNIST found: " + "; ".join(failures) + f". Remedy: set {ENVIRONMENT} to a folder with the four IDX files, "
        "or install the Debian package dataset-fashion-mnist"
    )


def _download(split: str) -> Pictures:
    from torchvision.datasets import FashionMNIST

    root = downloads()
    try:
        FashionMNIST(str(root.parent.parent), download=True)
    except Exception as error:
        raise OSError(f"torchvision could not download it ({str(error).splitlines()[0]})") from error
    return _read(root, split)


def downloads() -> Path:
    """The folder into which torchvision downloads the four files."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stepdistill" / "FashionMNIST" / "raw"


def _read(folder: Path, split: str) -> Pictures:
    images = _idx(folder, f"{_FILES[split]}-images-idx3-ubyte", 3)
    labels = _idx(folder, f"{_FILES[split]}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise OSError(f"{folder} holds {tuple(images.shape)} pictures and {len(labels)} labels: not Fashion-MNIST")
    return Pictures(images.unsqueeze(1), labels.long())


def _idx(folder: Path, name: str, axes: int) -> Tensor:
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            try:
                with opener(path, "rb") as file:
                    raw = file.read()
            except (OSError, EOFError, zlib.error) as error:
                raise OSError(f"{path} cannot be read: {error}") from error
            if len(raw) < 4 + 4 * axes or raw[:4] != bytes((0, 0, 8, axes)):
                raise OSError(f"{path} is not an IDX file of {axes} axes")
            shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
            body = bytearray(raw[4 + 4 * axes :])
            if len(body) != torch.Size(shape).numel() or not body:
                raise OSError(f"{path} is cut short: {len(body)} bytes for shape {shape}")
            return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)
    raise FileNotFoundError(f"{folder} has no {name}[.gz]")
