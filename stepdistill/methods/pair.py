"""Two neighbours on one trajectory of the teacher, which every consistency loss compares. A part, not a method."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.solver import jump, jump_or_stay
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Roles


def pair(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, t: Tensor, r: Tensor, s: Tensor, draws: Draws, *,
         target: Denoiser, guidance: Band | None = None, tell: bool = False) -> tuple[Prediction, Tensor]:
    """(the student's prediction at x_t, where `target` takes x_r at s), the second (B, ...) and without a gradient.

    x0 (B, ...) is clean and t > r >= s are (B,). x_r is one DDIM step of the teacher from x_t, guided with a scale drawn from `guidance`
    for each sample, or as the recipe says; with `tell` the student and `target` are told it. Where s is r the target is x_r itself.
    """
    x_t = process.add_noise(x0, draws.each("eps").normal_like(x0), t)
    w = guidance.sample(draws.each("w")) if guidance else None
    told = w if tell else None
    with torch.no_grad():
        x_r = jump(m.teacher(x_t, t, cond, w=w), process, r)
        landing = jump_or_stay(target(x_r, r, cond, w=told), process, r, s)
    return m.student(x_t, t, cond, w=told), landing
