"""The judge of the fashion world: a small residual network whose 64 pooled features carry every distance and whose logits carry accuracy.

    stem 3x3  ->  stages of residual blocks, the first block of a later stage halving the resolution  ->  mean over pixels  ->  linear

He et al., 2016 (https://arxiv.org/abs/1512.03385), section 4.2, with a 1x1 projection where the shape changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.worlds.fashion.data import CLASSES, to_model

WEIGHTS = "classifier.safetensors"                      # beside this file, with the architecture in CONFIG
CONFIG = "classifier.json"
SECOND = Path(__file__).parent / "second"              # of another seed: what methods train against, which the judge must not be


@dataclass(frozen=True)
class Architecture:
    """Channels and residual blocks of each stage; the last width is the number of features."""

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (1, 2, 2)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Architecture:
        """From a json object. Raises ValueError for a key that this version does not know, or lacks."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(f"classifier architecture has the keys {sorted(values)}, expected {sorted(known)}: "
                             "the file belongs to another version of stepdistill; train it again with scripts/train_classifier.py")
        return cls(tuple(values["widths"]), tuple(values["blocks"]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Block(nn.Module):
    """relu(x + conv(conv(x)))."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.halves = stride == 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )
        same = inputs == width and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.skip(x) + self.body(x)).relu()


class Classifier(nn.Module):
    """uint8 pictures (B, 1, 28, 28) to features (B, d) and logits (B, 10)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.widths[0]
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for stage, (out, count) in enumerate(zip(architecture.widths, architecture.blocks, strict=True)):
            for block in range(count):
                layers.append(Block(width, out, stride=2 if stage and not block else 1))
                width = out
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(CLASSES))
        self.dim = width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(to_model(images)).mean((2, 3))
        return features, self.head(features)


def load(folder: Path = Path(__file__).parent) -> Classifier:
    """The classifier in a folder, frozen, in float32; by default the one that ships. ValueError where its files are damaged."""
    config = folder / CONFIG
    try:
        architecture = json.loads(config.read_text())["architecture"]
        tensors = load_file(folder / WEIGHTS)                            # fp16; copied into fp32 parameters below
    except (KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{config} or {WEIGHTS} beside it is damaged ({error}): reinstall stepdistill") from error
    net = Classifier(Architecture.read(architecture))
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit the architecture in {CONFIG}: reinstall stepdistill") from error
    return net.eval().requires_grad_(False)
