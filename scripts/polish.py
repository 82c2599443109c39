"""What keeps a student from its teacher: noise its pictures to a small time, let the teacher denoise them once, and score them again.

Where one call at a hardly visible noise level takes most of the distance away, shapes and shades are right and a grain of that size is
left.

    python scripts/polish.py STUDENT --to result.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.eval import protocol, score
from stepdistill.eval.generate import generate
from stepdistill.eval.models import open_model
from stepdistill.models.load import Teacher, load_teacher
from stepdistill.training.checkpoint import write_atomically


@torch.no_grad()
def polish(teacher: Teacher, images: Tensor, labels: Tensor, t: float, guidance: float, batch: int = 100) -> Tensor:
    """uint8 pictures (N, C, H, W), noised to t and denoised by one call of the teacher."""
    made = []
    for first in range(0, len(images), batch):
        rows = range(first, min(len(images), first + batch))
        draws, at = Draws(9, rows), torch.tensor(t, dtype=torch.float64)
        x0 = teacher.codec.encode(images[first : rows.stop].float() / 127.5 - 1)
        x_t = teacher.denoiser.process.add_noise(x0, draws.each("polish").normal(*teacher.shape), at)
        denoised = teacher.denoiser(x_t, at.expand(len(rows)), teacher.condition(labels[first : rows.stop]), w=guidance)
        made.append(teacher.pictures(denoised.x0))
    return torch.cat(made)


def main(student: Path, to: Annotated[Path, typer.Option()], count: int = 2000, teacher: str = "fashion", guidance: float = 1.5) -> None:
    """Score a student's pictures as they are, and after a polish at t = 0.02, 0.05 and 0.1."""
    exam, opened, net = protocol.get(teacher, count, 0), open_model(str(student)), load_teacher(teacher)
    made = generate(opened.teacher, opened.spec, count, 0)
    table: dict[str, Any] = {}
    for t in (0.0, 0.02, 0.05, 0.1):
        images = polish(net, made.images, made.labels, t, guidance) if t else made.images
        table[f"{t:g}"] = {name: {"value": m.value, "se": m.se} for name, m in score.score(images, made.labels, exam).metrics.items()}
        print(t, {name: round(m["value"], 4) for name, m in table[f"{t:g}"].items()})
    write_atomically(to, json.dumps({"student": opened.describe(), "protocol_hash": exam.hash, "polished_at": table}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
