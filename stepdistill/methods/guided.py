"""Guidance distillation. Meng et al., 2022. https://arxiv.org/abs/2210.03142

    w ~ [low, high],  t ~ times,  x_t = alpha_t·x0 + sigma_t·eps                                             sec. 3.1
    x* = the teacher's x0 at x_t, guided with w
    student <- max(SNR_t, 1)·|x* - f(x_t, t, w)|²,   f = the x0 of a prediction that is told w

The student takes the teacher's place at half the price, in any number of steps (--steps) and with any solver (--solver), and w is still
chosen when it samples (--guidance). Steps are as many as before: it follows the ODE, so its sampler has renoise 0 whatever the recipe says,
and student.steps should be a teacher's. Fewer are the paper's stage two: `progressive` with the same `guidance`, begun with this run's
networks (start: RUN).

Differs from the paper: w in null + w·(cond - null), one more than theirs; the student reads the sinusoids of w as Stable Diffusion's
pipelines make them, by weights that begin at zero, where the paper's are Fourier features; times are even in those of the process. No
adapters: what tells w is a layer of the network itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import Uniform
from stepdistill.diffusion.weighting import truncated_snr
from stepdistill.losses.distance import l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class GuidedConfig:
    """Defaults are the paper's for pictures of classes; it takes 3 to 15 for latents of text."""

    guidance: Band = field(default_factory=lambda: Band(1.0, 5.0))   # of the teacher, told to the student
    times: Uniform = Uniform(0.001, 1.0)


class Guided(Method[GuidedConfig]):
    title, arxiv, family = "Guidance distillation", "2210.03142", "progressive"
    Config, on_trajectories = GuidedConfig, True

    @classmethod
    def needs(cls, cfg: GuidedConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True, inputs=("w",))}

    @classmethod
    def data(cls, cfg: GuidedConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def sampler(self) -> SamplerSpec:
        w = self.cfg.guidance.holding(self.setup.guidance)
        return replace(self.setup.sampler, renoise=0.0, inputs=("w",), guidance=w, free=True)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, cfg = batch["real"].clean, batch["real"].cond, self.cfg
        t, w = cfg.times.sample(draws.each("t")), cfg.guidance.sample(draws.each("w"))
        x_t = self.process.add_noise(x0, draws.each("eps").normal_like(x0), t)
        with torch.no_grad():
            target = m.teacher(x_t, t, cond, w=w).x0
        f = m.student(x_t, t, cond, w=w).x0
        error = l2(f, target)
        weight = truncated_snr(self.process.log_snr(t)).to(error)
        return Loss((weight * error).mean(), {"error": error.mean(), **level(f)})
