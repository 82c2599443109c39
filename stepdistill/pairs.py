"""The pairs of a recipe: from its teacher, prompts and guidance to a folder that methods with regression pairs read."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill.data.pairs import Made, fill
from stepdistill.diffusion.sampler import SamplerSpec, Solver
from stepdistill.diffusion.times import trailing
from stepdistill.recipe import Recipe
from stepdistill.training.assemble import origin_of, teacher_of


def ode(recipe: Recipe, steps: int, solver: Solver = "dpmpp_2m") -> SamplerSpec:
    """The teacher's probability-flow ODE from t = 1 in equal steps, guided as in training and bounded as the student is."""
    return SamplerSpec(trailing(steps), renoise=0.0, solver=solver, clip_x0=recipe.student.clip_x0, guidance=recipe.guidance)


def make(recipe: Recipe, to: Path, *, count: int, steps: int = 50, solver: Solver = "dpmpp_2m", seed: int = 0, batch_size: int = 64,
         device: torch.device | str = "cpu") -> Made:
    """Fill the folder `to` with `count` pairs of the recipe's teacher; what is there is not made again.

    Raises ValueError where the folder holds something else, pairs of other settings among it.
    """
    if recipe.data.buckets:
        raise ValueError("data.pairs are of one size, that of teacher.call: leave data.buckets out")
    spec = ode(recipe, steps, solver)
    teacher, _, _ = teacher_of(recipe, torch.device(device))
    wanted = {**origin_of(recipe, teacher), "precision": recipe.precision}
    return fill(to, teacher, spec, wanted, count=count, seed=seed, batch_size=batch_size)
