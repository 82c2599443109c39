"""How much of a distance is texture, and how much is brightness: real test pictures, changed and scored like a student.

Smooth is what one call of the teacher makes of a picture noised to t (scripts/polish.py); the residual is what that takes away.

    python scripts/texture.py --to result.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from polish import polish
from torch import Tensor

from stepdistill.eval import protocol, score
from stepdistill.models.load import load_teacher
from stepdistill.training.checkpoint import write_atomically
from stepdistill.worlds.fashion import data


def main(to: Annotated[Path, typer.Option()], each: int = 100, t: float = 0.02, guidance: float = 1.5) -> None:
    """Score `each` test pictures of every class, changed inside their garments."""
    exam, test = protocol.get("fashion", 10 * each, 0), data.load("test")
    rows = torch.stack([(test.labels == label).nonzero()[:each, 0] for label in range(10)]).T.reshape(-1)
    real, labels = test.images[rows].reshape(-1, 1, 28, 28), test.labels[rows].long()
    smooth = polish(load_teacher("fashion"), real, labels, t, guidance)
    garment = F.avg_pool2d(smooth.float(), 3, 1, 1) > 25
    residual = real.float() - smooth.float()
    generator = torch.Generator().manual_seed(0)
    anothers = residual[torch.randperm(len(rows), generator=generator)] * garment
    white = torch.randn(real.shape, generator=generator) * garment
    changed = {"real": real, "smooth": smooth, "smooth, another's residual": _add(smooth, anothers),
               **{f"smooth, white noise of {size}": _add(smooth, size * white) for size in (5, 10, 15)},
               "at 0.7 of the brightness": _add(0.7 * real.float(), torch.zeros(())), "each class of one brightness": _level(real, labels)}
    table: dict[str, Any] = {}
    for name, images in changed.items():
        table[name] = {key: {"value": m.value, "se": m.se} for key, m in score.score(images, labels, exam).metrics.items()}
        print(name, {key: round(m["value"], 3) for key, m in table[name].items()})
    rms = float(residual[garment].square().mean().sqrt())
    write_atomically(to, json.dumps({"protocol_hash": exam.hash, "t": t, "residual_rms": rms, "scores": table}, indent=1) + "\n")


def _level(images: Tensor, labels: Tensor) -> Tensor:
    """Every picture made as bright as its class is in the mean, as far as white allows."""
    mean = images.float().mean((1, 2, 3))
    wanted = torch.stack([mean[labels == label].mean() for label in range(10)])[labels]
    return _add(images.float() * (wanted / mean)[:, None, None, None], torch.zeros(()))


def _add(images: Tensor, change: Tensor) -> Tensor:
    return (images.float() + change).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    typer.run(main)
