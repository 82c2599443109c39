"""Deterministic generation: sample i depends on (seed, i) alone, whatever the batch size, the process count or the interruption."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.eval.parts import Parts
from stepdistill.models.load import Teacher
from stepdistill.models.precision import exact


@dataclass(frozen=True)
class Generated:
    """uint8 pictures (N, C, H, W), their labels (N,), and milliseconds per picture (median over the batches after the first)."""

    images: Tensor
    labels: Tensor
    ms_per_image: float


def balanced(classes: int) -> Callable[[int], int]:
    """Label of sample i: i mod classes."""
    return lambda i: i % max(1, classes)


def generate(model: Teacher, spec: SamplerSpec, count: int, seed: int, *, batch_size: int = 100,
             label: Callable[[int], int] | None = None, quiet: bool = False) -> Generated:
    """Samples 0 .. count-1, in memory. Labels are balanced (i mod classes) unless `label` says otherwise."""
    numbers, firsts = _checked(model, count, batch_size, label)
    made = []
    with _bar(count, quiet) as bar:
        for first in firsts:
            made.append(_batch(model, spec, seed, range(first, count), numbers[first : first + batch_size]))
            bar.update(len(made[-1][0]))
    images, milliseconds = zip(*made, strict=True)
    return Generated(torch.cat(images), numbers, statistics.median(milliseconds[1:] or milliseconds))


def fill(parts: Parts, model: Teacher, spec: SamplerSpec, count: int, seed: int, *, batch_size: int = 100,
         label: Callable[[int], int] | None = None, quiet: bool = False) -> float:
    """The same samples as files, in `parts`; returns milliseconds per picture.

    Batches that are there already are not made again, and those that other processes make are waited for. Raises parts.Taken where one of
    them finished the whole.
    """
    numbers, firsts = _checked(model, count, batch_size, label)
    done: set[int] = set()
    with _bar(count, quiet) as bar:
        while True:
            for first in parts.open_batches(firsts):
                parts.put(first, *_batch(model, spec, seed, range(first, count), numbers[first : first + batch_size]))
                bar.update(len(numbers[first : first + batch_size]))
                done.add(first)
            for first in set(firsts) - done:
                if parts.has(first):
                    bar.update(len(numbers[first : first + batch_size]))
                    done.add(first)
            if len(done) == len(firsts):
                return parts.milliseconds(firsts)
            parts.check()                                                 # the rest is in other hands
            time.sleep(1)


def _checked(model: Teacher, count: int, batch_size: int, label: Callable[[int], int] | None) -> tuple[Tensor, range]:
    """The labels of all samples, and the first sample of every batch."""
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch size must be at least 1, got {count} and {batch_size}")
    label = label or balanced(model.classes)
    return torch.tensor([label(i) for i in range(count)]), range(0, count, batch_size)


def _bar(count: int, quiet: bool) -> tqdm:
    return tqdm(total=count, disable=quiet, file=sys.stderr, unit="image", dynamic_ncols=True, desc="generate")


def of_prompts(model: Teacher, spec: SamplerSpec, seeds: int, seed: int, *, quiet: bool = False) -> Iterator[Tensor]:
    """uint8 pictures (seeds, C, H, W) of each prompt or class in turn: the samples that `generate` would make of it, all at once."""
    turns = max(1, model.classes)
    with _bar(turns * seeds, quiet) as bar:
        for number in range(turns):
            yield _batch(model, spec, seed, range(number, number + seeds * turns, turns), torch.full((seeds,), number))[0]
            bar.update(seeds)


def _batch(model: Teacher, spec: SamplerSpec, seed: int, rows: range, labels: Tensor) -> tuple[Tensor, float]:
    """uint8 pictures (B, C, H, W) of the first samples among `rows`, one for each label (B,), on the CPU, and the milliseconds of each."""
    began = time.perf_counter()
    draws = Draws(seed, rows[: len(labels)], device=model.device)
    with exact():
        pictures = model.pictures(sample(model.denoiser, spec, model.condition(labels), draws, model.shape)).cpu()
    return pictures, 1000 * (time.perf_counter() - began) / len(labels)
