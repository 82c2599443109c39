"""Networks that turn pictures into features: fp32, no autocast, TF32 off, evaluation mode, one fixed batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import key
from stepdistill.worlds.fashion import classifier


class Extractor(Protocol):
    """A judge with a name and the digest of its weights."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 pictures (B, C, H, W) to float32 features (B, d) and, from a classifier, logits (B, classes)."""
        ...


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fashion_file(name: str, remedy: str) -> Path:
    """A file that ships in the fashion world; FileNotFoundError naming it and the remedy."""
    path = Path(str(resources.files("stepdistill.worlds.fashion") / name))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall stepdistill, or make it with `python {remedy}`")
    return path


@contextmanager
def exact() -> Iterator[None]:
    """float32 means float32: no autocast on any device, no TF32; settings are restored."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), torch.inference_mode():
            yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


class Fashion:
    """The shipped classifier: 64 pooled features and ten logits."""

    name = "fashion"

    def __init__(self) -> None:
        weights = fashion_file(classifier.WEIGHTS, "scripts/train_classifier.py")
        fashion_file(classifier.CONFIG, "scripts/train_classifier.py")
        self.net = classifier.load(weights.parent)
        self.sha256, self.dim = digest(weights), self.net.dim

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(f"extractor 'fashion' reads pictures (N, 1, 28, 28), got {tuple(images.shape)}")
        return self.net(images)


class Tiny:
    """A fixed random convolution over pictures of any size and one or three channels: makes every measure testable without weights."""

    name, dim = "tiny", 16

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(key("tiny extractor"))
        self.kernel = torch.randn(self.dim, 1, 5, 5, generator=generator) / 5
        self.sha256 = hashlib.sha256(self.kernel.numpy().tobytes()).hexdigest()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        grey = images.float().mean(1, keepdim=True) / 127.5 - 1
        return nn.functional.conv2d(grey, self.kernel, stride=2).relu().mean((2, 3)), None


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"fashion": Fashion, "tiny": Tiny}


def extract(extractor: Extractor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Features (N, d) and logits (N, classes) of uint8 pictures (N, C, H, W), on the CPU."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"pictures must be a uint8 tensor (N, C, H, W), got {images.dtype} {tuple(images.shape)}: quantise them first")
    with exact():
        parts = [extractor.features(batch) for batch in images.cpu().split(batch_size)]
    logits = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(logits) if logits else None
