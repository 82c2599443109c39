"""The judge of the emoji world: pictures and captions in one space, trained contrastively on OpenMoji with MiniLM frozen.

    pictures  a halving stem -> residual blocks, each halving again -> mean over 4x4 pixels -> 256 features -> 128 of length 1
    captions  MiniLM's sentence embedding (384) -> MLP -> 128 of length 1

The cosine of the two is the alignment score; the 256 features carry distances, precision and recall.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.worlds.emoji import text
from stepdistill.worlds.emoji.data import to_model

FOLDER = Path(__file__).parent
WEIGHTS, CONFIG = "judge.safetensors", "judge.json"


@dataclass(frozen=True)
class Architecture:
    """Channels of each stage; the last is the number of features."""

    widths: tuple[int, ...] = (32, 64, 128, 256)
    space: int = 128

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Block(nn.Module):
    """relu(skip(x) + conv(conv(x))), halving."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.skip(x) + self.body(x)).relu()


class Judge(nn.Module):
    """Pictures and captions to directions of one space."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        widths = architecture.widths
        stem = [nn.Conv2d(3, widths[0], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        self.trunk = nn.Sequential(*stem, *(Block(a, b) for a, b in pairwise(widths)))
        self.image = nn.Linear(widths[-1], architecture.space)
        self.words = nn.Sequential(nn.Linear(text.WIDTH, 512), nn.GELU(), nn.Dropout(0.2), nn.Linear(512, architecture.space))
        self.temperature = nn.Parameter(torch.tensor(2.6))                                     # ln of 1/0.07
        self.dim = widths[-1]

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 256) of pictures (B, 3, 64, 64) in [-1, 1]."""
        out: Tensor = self.trunk(pictures).mean((2, 3))
        return out

    def of_pictures(self, features: Tensor) -> Tensor:
        """Directions (B, 128) of features (B, 256)."""
        return nn.functional.normalize(self.image(features), dim=1)

    def of_captions(self, embedded: Tensor) -> Tensor:
        """Directions (B, 128) of MiniLM embeddings (B, 384)."""
        return nn.functional.normalize(self.words(embedded), dim=1)

    @torch.no_grad()
    def alignment(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine (B,) of each uint8 picture (B, 3, 64, 64) with its own caption."""
        return (self.of_pictures(self.features(to_model(pictures))) * self.of_captions(text.embedded(captions))).sum(1)


def load(folder: Path | None = None) -> Judge:
    """The judge in a folder, frozen, in float32; by default the one that ships.

    Raises FileNotFoundError where there is none, ValueError where its files are damaged.
    """
    folder = folder or FOLDER
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"there is no judge of the emoji world in {folder}: train one with `python scripts/emoji_judge.py --out "
                                f"runs/emoji_judge`, and copy {WEIGHTS} and {CONFIG} there")
    try:
        told = json.loads((folder / CONFIG).read_text())["architecture"]
        net = Judge(Architecture(tuple(told["widths"]), told["space"]))
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()})
    except (KeyError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG} or {WEIGHTS} beside it is damaged ({error}): reinstall stepdistill") from error
    return net.eval().requires_grad_(False)
