"""Looks at a run: pictures at fixed noise and conditions, the teacher's beside them, and what can be counted on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.times import trailing
from stepdistill.drift import against, drift
from stepdistill.images import grid, save_png
from stepdistill.training.assemble import Run
from stepdistill.training.checkpoint import write_atomically

EACH, TEACHER_STEPS = 4, 25                             # pictures of one class or prompt; of a teacher without a sampler of its own


def labels_of(run: Run) -> Tensor:
    """Class or prompt of every picture (N,): as many different ones as leave four pictures for each, from all over their list, whose first
    ones may be much alike."""
    count, all_ = run.recipe.preview_count, max(1, run.teacher.classes)
    shown = min(all_, count // EACH or count)
    return torch.arange(count) % shown * (all_ // shown)


def drawn(run: Run, net: Any, spec: SamplerSpec) -> Tensor:
    """uint8 pictures (N, C, H, W) at fixed noise, a micro-batch at a time."""
    labels, made = labels_of(run), []
    for first in range(0, len(labels), run.rows):
        rows = range(first, min(len(labels), first + run.rows))
        draws = Draws(run.recipe.seed, rows, step=-1, device=run.accelerator.device)
        x0 = sample(net, spec, run.teacher.condition(labels[rows.start : rows.stop]), draws, run.teacher.shape)
        made.append(run.teacher.pictures(x0).cpu())
    return torch.cat(made)


def preview(run: Run, path: Path) -> Tensor:
    """A PNG grid of the student (its average where one is kept) at fixed noise and conditions; returns its pictures."""
    with run.roles.averaged(run.ema.network if run.ema else None) as student:
        pictures = drawn(run, student, run.method.sampler())
    _save(pictures, path)
    return pictures


def look(run: Run, folder: Path, done: int) -> dict[str, float]:
    """A preview after `done` steps, and the student's drift from the teacher: `look/...`; `look_raw/...` without the average."""
    pictures, labels, teacher = preview(run, folder / f"{done:08d}.png"), labels_of(run), _teacher(run, folder)
    values = {f"look/{name}": value for name, value in against(drift(pictures, labels), teacher).items()}
    if run.ema:
        with run.roles.averaged(None) as student:
            raw = drawn(run, student, run.method.sampler())
        values |= {f"look_raw/{name}": value for name, value in against(drift(raw, labels), teacher).items()}
    return values


def teacher_sampler(run: Run) -> SamplerSpec:
    """How the teacher makes pictures: as its own notes say, or by 25 steps of DDIM at the recipe's guidance."""
    own = run.teacher.notes.get("sampler")
    return SamplerSpec.from_dict(dict(own)) if own else SamplerSpec(trailing(TEACHER_STEPS), renoise=0.0, guidance=run.recipe.guidance)


def _teacher(run: Run, folder: Path) -> dict[str, float]:
    """The drift of the teacher's own pictures at the same noise, made once a run: teacher.png and teacher.json."""
    path = folder / "teacher.json"
    if not path.is_file():
        pictures = drawn(run, run.teacher.denoiser, teacher_sampler(run))
        _save(pictures, folder / "teacher.png")
        write_atomically(path, json.dumps(drift(pictures, labels_of(run))))
    values: dict[str, float] = json.loads(path.read_text())
    return values


def _save(pictures: Tensor, path: Path) -> None:
    save_png(grid(pictures, columns=min(10, len(pictures))), path)
