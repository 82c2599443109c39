"""The tangent of continuous-time consistency: how the student's x0 changes along the teacher's ODE. A part, not a method."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import combine
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.times import LogNormal
from stepdistill.losses.consistency import direction, scm_tangent, trig, trig_output
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Roles
from stepdistill.models.tangent import Derivative, along

Velocity = Literal["teacher", "data"]


@torch.no_grad()
def tangent(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, times: LogNormal, sd: float, share: float, draws: Draws, *,
            velocity: Velocity = "teacher", derivative: Derivative = "jvp") -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, g): clean x0 (B, ...) noised to k = sigma/alpha drawn from `times`, and g there, not yet normalised.

    sd is the data's standard deviation and `share` that of the tangent, see `scm_tangent`. The state moves as the guided teacher says, or
    as x0 and its own noise do (velocity "data").
    """
    eps = draws.each("eps").normal_like(x0)
    t = process.time_of(-2 * times.sample(draws.each("k")).log())
    x_t, (cos, sin) = process.add_noise(x0, eps, t), trig(process.alpha(t), process.sigma(t), sd)
    x0, eps = x0.to(x_t), eps.to(x_t)
    x = combine(cos, sd * sin, x0, eps)
    if velocity == "teacher":
        told = m.teacher(x_t, t, cond)
        x0, eps = told.x0, told.eps
    dx, dt = direction(process, t, x0, eps, sd)
    f, slope = along(m.student, x_t, t, cond, dx, dt, lambda pred: trig_output(pred, sd), derivative)
    return x_t, t, scm_tangent(x, f, slope, combine(-sin, sd * cos, x0, eps), cos, sin, sd, share)
