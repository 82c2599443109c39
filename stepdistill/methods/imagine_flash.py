"""Imagine Flash: backward distillation. Kohler et al., 2024. https://arxiv.org/abs/2405.05224

    every step   student  <- mean|x0 - stop(y)|²
    where        x0, eps = call n, at time t, of the student's own trajectory from noise, n drawn once for all samples
                 x_g = alpha_g·x0 + sigma_g·z,  g below t,   y = x0 of the guided teacher from x_g

Published: the states are the student's own, so it learns what it will meet and no data leaks in (backward distillation); the teacher
answers at a noise level that follows t, much noise for structure and little for detail, from the student's own x0 noised to it (shifted
reconstruction loss); the first step takes its noise from the state, which is nothing else (noise correction: `noise_correction`, which
makes the sampler's `known_noise`). The student follows the ODE, so it is sampled with renoise 0 whatever the recipe says. Nothing but
conditions is read. The authors released no code.

Our choice: z is the student's own noise eps. With fresh z, as published, the pull is that of score distillation, and alone it draws every
sample to a mode (the tests show it collapse a mixture to a point); `noise: fresh` is there for use beside a diversity term, which
this method has none of. g is uniform between `times.low` and `times.high` of t, where the curve of g(t) is not known to us; the target is
one answer of the teacher unless `teacher_steps` asks for its ODE from g to 0. `shifted: false` leaves the shift out: the ODE starts at the
student's state x_t itself. Then with one step this is a regression on the teacher's ODE; with more the samples come out too wide, since
straight jumps to an endpoint leave the ODE. With noise correction x0 of the first call is still the network's own answer: of a network that
speaks eps, at a process with some signal left at t = 1 (Stable Diffusion's table), it is an error divided by a small alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.solver import follow
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.distance import l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Loss, Method
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class ImagineFlashConfig:
    """The published numbers are not known to us but for the number of steps, one to three."""

    noise: Literal["own", "fresh"] = "own"          # z: the student's eps, or new noise
    times: Uniform = Uniform(0.05, 0.95)            # g, as a share of t
    shifted: bool = True                            # the teacher starts at x_g; otherwise at the student's own state
    teacher_steps: int = 1                          # of the teacher's ODE to 0
    solver: Literal["ddim", "heun"] = "ddim"        # of that ODE; heun calls the teacher twice a step, once in the last
    noise_correction: bool = True

    def __post_init__(self) -> None:
        if self.teacher_steps < 1:
            raise ValueError(f"method.teacher_steps must be at least 1, got {self.teacher_steps}")


class ImagineFlash(Method[ImagineFlashConfig]):
    title, arxiv, family = "Imagine Flash", "2405.05224", "backward distillation"
    Config, on_trajectories = ImagineFlashConfig, True

    @classmethod
    def needs(cls, cfg: ImagineFlashConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True)}

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=0.0, known_noise=self.cfg.noise_correction)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, cond = self.cfg, batch["main"].cond
        call = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True)
        x0 = call.x0
        with torch.no_grad():
            x_g, g = call.pred.x_t, call.t
            if cfg.shifted:
                g = call.t * cfg.times.sample(draws.each("g"))
                z = call.pred.eps if cfg.noise == "own" else draws.each("z").normal_like(x0)
                x_g = self.process.add_noise(x0, z, g)
            y = follow(lambda x, t: m.teacher(x, t, cond), x_g, g, torch.zeros_like(g), cfg.teacher_steps, self.process, cfg.solver)
        distance = l2(x0, y).mean()
        return Loss(distance, {"distance": distance, **level(x0)})
