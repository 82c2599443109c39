"""Latent Adversarial Diffusion Distillation (LADD). Sauer et al., 2024. https://arxiv.org/abs/2403.12015

    every k-th step   student  <- fool disc
    every step        disc     <- real against stop(x0)
    where             x0 = the student's call at a time of its sampler, from noised data there (pure noise at the first),
                      disc reads the frozen teacher's features at x_t = alpha_t·x0 + sigma_t·eps; real and x0 have the same t and eps
                      sigma_t/(alpha_t + sigma_t) = sigmoid(mean + std·z), whatever the teacher's process

No distillation term. The student learns the law of the pictures, under the condition and without guidance; for what a guided teacher makes,
as in the paper, let `data.folder` hold its samples. Gradients pass through the teacher to x0. Each head is a function of features alone:
it knows t and the condition through what the teacher makes of them (the paper's heads are told both). `student.taps` names the modules that
are read, one head each; the paper reads all attention blocks, the default is the middle one.

Differs from the paper: the whole teacher runs, though nothing after the last module read matters; the odds of the student's times and their
warm-up are as remembered, and without a warm-up on fewer than two times; the discriminator moves after the student on the same x0.
Approximate R1 (APT, 2501.08316), off by default, moves clean pictures and then noises both alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, data_call
from stepdistill.diffusion.times import LogitNormal
from stepdistill.losses.adversarial import GAMES, approximate_r1
from stepdistill.losses.reported import accuracy, level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.methods.critic import alternating, check_r1, handed_on, nearby
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class LADDConfig:
    """Defaults are the paper's where it names a number; a public recipe for flow teachers has disc_updates 2 and r1 of .1 and .1."""

    disc_updates: int = 1                           # of the discriminator per student update
    game: Literal["logistic", "hinge"] = "logistic"
    first: float = 0.7                              # odds of the sampler's first time; the others share the rest evenly
    warmup: int = 500                               # steps that train only the later half of several times, evenly
    times: LogitNormal = LogitNormal(1.0, 1.0)      # of the share of noise at which the teacher looks: high sees layout, low texture
    r1_weight: float = 0.0                          # of approximate R1 beside the discriminator's loss; 0 adds no pass
    r1_sigma: float = 0.1                           # how far it moves the pictures

    def __post_init__(self) -> None:
        if self.disc_updates < 1 or self.warmup < 0:
            raise ValueError(f"method.disc_updates must be at least 1 and method.warmup at least 0, got {self.disc_updates}, {self.warmup}")
        if not 0 < self.first <= 1:
            raise ValueError(f"method.first must lie in (0, 1], got {self.first}")
        check_r1(self.r1_weight, self.r1_sigma)


class LADD(Method[LADDConfig]):
    title, arxiv, family = "Latent Adversarial Diffusion Distillation", "2403.12015", "adversarial"
    Config = LADDConfig

    @classmethod
    def needs(cls, cfg: LADDConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "disc": Role(source="head", of="teacher", trains=True)}

    @classmethod
    def data(cls, cfg: LADDConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.disc_updates, ("disc",))

    @property
    def built_in(self) -> float:
        return 1.0

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def odds(self, step: int) -> Sequence[float]:
        """Of the sampler's times at this step."""
        count = len(self.sampler().times)
        if count == 1:
            return (1.0,)
        if step < self.cfg.warmup:
            return (0.0,) * (count // 2) + (1.0,) * (count - count // 2)
        return (self.cfg.first, *((1 - self.cfg.first) / (count - 1) for _ in range(count - 1)))

    def made(self, m: Roles, batch: Batch, draws: Draws) -> Tensor:
        """x0 of the student's call."""
        real = batch["real"]
        return data_call(m.student, self.sampler(), real.clean, real.cond, draws, self.odds(draws.step)).x0

    def judged(self, m: Roles, states: Sequence[Tensor], cond: Conditioning, draws: Draws) -> Sequence[Tensor]:
        """Logits (B,) of each of these clean states (B, ...), all noised alike, in one pass of the teacher."""
        u, eps = self.cfg.times.sample(draws.each("t")), draws.each("eps").normal_like(states[0])
        t = self.process.time_of(2 * ((1 - u).log() - u.log()))
        x_t = torch.cat([self.process.add_noise(x, eps, t) for x in states])
        conds = reduce(Conditioning.cat, (cond for _ in states[1:]), cond)
        features = m.teacher.plain(x_t, torch.cat([t for _ in states]), conds, tap=True).features
        return m.disc(features).chunk(len(states))

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0 = self.made(m, batch, draws)
        batch.scratch["x0"] = x0.detach()
        (logits,) = self.judged(m, [x0], batch["real"].cond, draws)
        fool = GAMES[self.cfg.game].generator(logits)
        return Loss(fool, {"fool": fool, **level(x0)})

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, real = self.cfg, batch["real"]
        x0 = handed_on(batch, lambda: self.made(m, batch, draws))
        near = [nearby(real.clean, cfg.r1_sigma, draws)] if cfg.r1_weight else []
        on_fake, on_real, *on_near = self.judged(m, [x0, real.clean, *near], real.cond, draws)
        judge = GAMES[cfg.game].discriminator(on_real, on_fake)
        log = {"judge": judge, **accuracy(on_real, on_fake)}
        if not on_near:
            return Loss(judge, log)
        r1 = approximate_r1(on_real, on_near[0])
        return Loss(judge + cfg.r1_weight * r1, {**log, "r1": r1})
