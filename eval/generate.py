"""Deterministic generation: sample i depends on (seed, i) alone, whatever the batch size, the process count or the interruption."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.eval.parts import Parts
from stepdistill.models.load import Teacher


@dataclass(frozen=True)
class Generated:
    """uint8 pictures (N, C, H, W), their labels (N,), and milliseconds per picture (median over full batches after the first)."""

    images: Tensor
    labels: Tensor
    ms_per_image: float


def balanced(classes: int) -> Callable[[int], int]:
    """Label of sample i: i mod classes."""
    return lambda i: i % max(1, classes)


def generate(model: Teacher, spec: SamplerSpec, count: int, seed: int, *, batch_size: int = 100,
             label: Callable[[int], int] | None = None, quiet: bool = False, parts: Parts | None = None) -> Generated:
    """Samples 0 .. count-1. Labels are balanced (i mod classes) unless `label` says otherwise.

    With `parts` finished batches are kept there, and those of other processes are waited for and taken over; raises parts.Taken where one
    of them finished the whole.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch size must be at least 1, got {count} and {batch_size}")
    label = label or balanced(model.classes)
    firsts = range(0, count, batch_size)
    numbers = torch.tensor([label(i) for i in range(count)])
    made: dict[int, tuple[Tensor, float]] = {}
    with tqdm(total=count, disable=quiet, file=sys.stderr, unit="image", dynamic_ncols=True, desc="generate") as bar:
        while len(made) < len(firsts):
            for first in parts.open_batches(firsts) if parts else firsts:
                rows = range(first, min(count, first + batch_size))
                began = time.perf_counter()
                x0 = sample(model.denoiser, spec, model.condition(numbers[first : rows.stop]), Draws(seed, rows, device=model.device),
                            model.shape)
                pictures = model.pictures(x0).cpu()
                made[first] = pictures, 1000 * (time.perf_counter() - began) / len(rows)
                if parts:
                    parts.put(first, *made[first])
                bar.update(len(rows))
            for first in firsts if parts else ():
                if first not in made and parts and parts.has(first):
                    made[first] = parts.get(first)
                    bar.update(len(made[first][0]))
            if parts and len(made) < len(firsts):                         # the rest is in other hands
                parts.check()
                time.sleep(1)
    images, milliseconds = zip(*(made[first] for first in firsts), strict=True)
    timed = milliseconds[1:] if len(milliseconds) > 1 else milliseconds
    return Generated(torch.cat(images), numbers, statistics.median(timed))
