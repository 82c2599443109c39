"""Variational score distillation: its pull on a student, and the fake score that follows. A part, not a method."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.denoising import scaled_eps_loss
from stepdistill.losses.matching import matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Loss
from stepdistill.methods.critic import critic_loss, dropped
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Roles


def vsd_loss(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, times: Uniform, draws: Draws, w: float | Tensor) -> Loss:
    """student <- alpha_s·sigma_s·(fake^w(x_s) - teacher^w(x_s)) at its sample x0 (B, ...), x_s = alpha_s·x0 + sigma_s·eps.

    Both scores are asked with guidance w, one number or (B,), and give no gradient.
    """
    s = times.sample(draws.each("s"))
    x_s = process.add_noise(x0.detach(), draws.each("eps").normal_like(x0), s)
    with torch.no_grad():
        real, fake = m.teacher(x_s, s, cond, w=w).x0, m.fake(x_s, s, cond, w=w).x0
    pull = matching_loss(x0, toward=real, away_from=fake, scale=process.alpha(s) * process.sigma(s))
    return Loss(pull, {"pull": pull, **score_gap(fake, real, s), **level(x0)})


def fake_loss(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, times: Uniform, draws: Draws, dropout: float) -> Loss:
    """fake <- alpha_s²·|eps of fake(x_s) - eps|² at stop(x0), unguided; the null condition in a share `dropout` of the updates."""
    return critic_loss(m, process, x0, dropped(cond, dropout, draws), times, draws, distance=scaled_eps_loss)
