"""How far a student's x0, asked of a noised picture, is from where its teacher's ODE takes that very state; the teacher's own x0 beside.

Methods along trajectories learn these endpoints. Under `grain` is what a mean over 3x3 pixels does not hold.

    python scripts/endpoints.py teacher runs/league/lcm/student runs/league/pcm/student --to result.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stepdistill.data.streams import world_pictures
from stepdistill.diffusion.solver import follow
from stepdistill.eval.models import open_model
from stepdistill.training.checkpoint import write_atomically

TIMES = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@torch.no_grad()
def main(students: list[str], to: Annotated[Path, typer.Option()], guidance: float = 1.5, count: int = 64, steps: int = 40) -> None:
    """Root mean squares over pictures in [-1, 1]; the ODE takes so many Heun steps from t = 1, fewer from below it."""
    world, teacher = world_pictures("fashion"), open_model("teacher:fashion", guidance=guidance).teacher
    net, process = teacher.denoiser, teacher.denoiser.process
    x0 = teacher.codec.encode(world.images[:count].float() / 127.5 - 1)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.condition(world.labels[:count])
    models = {name: net if name == "teacher" else open_model(name).teacher.denoiser for name in students}
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for t in TIMES:
        at = torch.full((count,), t, dtype=torch.float64)
        x_t = process.add_noise(x0, eps, at)
        end = follow(lambda x, now: net(x, now, cond, w=guidance), x_t, at, torch.zeros_like(at), max(4, round(steps * t)), process, "heun")
        for name, model in models.items():
            w = guidance if name == "teacher" else None
            off = teacher.codec.decode(model(x_t, at, cond, w=w).x0.clamp(-1, 1) - end.clamp(-1, 1))
            table[name][str(t)] = {"error": _rms(off), "bias": _rms(off.mean(0)), "grain": _rms(off - avg_pool2d(off, 3, 1, 1))}
    for name, row in table.items():
        print(name, *(f"t = {t}: {found['error']:.3f}" for t, found in row.items()), sep="  ")
    named = {Path(name).parent.name or name: row for name, row in table.items()}
    write_atomically(to, json.dumps({"pictures": count, "guidance": guidance, "heun_steps": steps, "x0": named}, indent=1) + "\n")


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    typer.run(main)
