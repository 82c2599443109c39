"""Improved Distribution Matching Distillation (DMD2). Yin et al., 2024. https://arxiv.org/abs/2405.14867

    every k steps   student  <- (fake(x_s) - teacher(x_s)) / mean|x0 - teacher(x_s)|  +  fool disc          eq. 2, 3, sec. 4.2-4.3
    every step      fake     <- denoise stop(x0);  disc <- real against stop(x0)
    where           x0 = call n of the student's own sampler from noise, n drawn once for all samples,       sec. 4.4-4.5
                    x_s = alpha_s·x0 + sigma_s·eps

One step is n = 1 of 1. Without the GAN term nothing but conditions is read.

Differs from the authors' code: s is continuous; the student's GAN term is read at the x_s of its matching term, so one pass of the
fake score serves both; the critic sees [x_s of the student; real x_r] in one pass that denoises the first half and judges both;
conversions are float32 rather than float64. `sds_share` is an addition of ours, off by default; approximate R1 (APT, 2501.08316), off too,
moves clean pictures and then noises both alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import like
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.matching import matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Conditions, Images, Loss, Method, Stream, Update
from stepdistill.methods.critic import Judge, alternating, check_critic, check_r1, check_times, critic_loss, handed_on
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class DMD2Config:
    """Defaults are the paper's for Stable Diffusion 1.5."""

    fake_updates: int = 10                          # fake-score updates per student update
    gan_weight: float = 1e-3                        # of the student's GAN term; 0 builds no discriminator and reads no pictures
    disc_weight: float = 1e-2                       # of the discriminator's loss beside the fake score's
    features: Judge = "fake"                        # whose features the discriminator reads; "fake" also trains its encoder
    r1_weight: float = 0.0                          # of approximate R1 beside the discriminator's loss; 0 adds no pass
    r1_sigma: float = 0.05                          # how far it moves the pictures
    sds_share: float = 0.0                          # ours: of x0 itself in the fake score's place, where s < sds_below; see `away_from`
    sds_below: float = 0.1
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the critic's update: must hold the range above

    def __post_init__(self) -> None:
        check_critic(self.fake_updates, gan_weight=self.gan_weight, disc_weight=self.disc_weight)
        check_r1(self.r1_weight, self.r1_sigma)
        if not (0 <= self.sds_share <= 1 and 0 <= self.sds_below <= 1):
            raise ValueError("method.sds_share and method.sds_below must lie in [0, 1]")
        check_times(self.times, self.fake_times)


class DMD2(Method[DMD2Config]):
    title, arxiv, family = "Improved Distribution Matching Distillation", "2405.14867", "distribution matching"
    Config = DMD2Config

    @classmethod
    def needs(cls, cfg: DMD2Config) -> Mapping[str, Role]:
        disc = {"disc": Role(source="head", of=cfg.features, trains=True)} if cfg.gan_weight else {}
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True), **disc}

    @classmethod
    def data(cls, cfg: DMD2Config) -> Mapping[str, Stream]:
        return {"main": Conditions(), "real": Images()} if cfg.gan_weight else {"main": Conditions()}

    def plan(self, step: int) -> Sequence[Update]:
        trains = ("fake", "disc") if self.cfg.gan_weight else ("fake",)
        return alternating(step, self.cfg.fake_updates, trains)

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def rollout(self, m: Roles, batch: Batch, draws: Draws, grad: bool) -> Tensor:
        """x0 of the call that is trained now, reached through the student's own earlier calls."""
        return one_call(m.student, self.sampler(), batch["main"].cond, draws, self.setup.shape, grad=grad).x0

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, cfg = batch["main"].cond, self.cfg
        x0 = self.rollout(m, batch, draws, grad=True)
        batch.scratch["x0"] = x0.detach()
        s = cfg.times.sample(draws.each("s"))
        x_s = self.process.add_noise(x0, draws.each("eps").normal_like(x0), s)
        judge = cfg.features if cfg.gan_weight else None
        with torch.set_grad_enabled(judge == "teacher"):
            real = m.teacher(x_s, s, cond, tap=judge == "teacher")
        with torch.set_grad_enabled(judge == "fake"):
            fake = m.fake(x_s, s, cond, tap=judge == "fake")
        pull = matching_loss(x0, toward=real.x0.detach(), away_from=self.away_from(fake.x0.detach(), x0.detach(), s))
        log = {"pull": pull, **score_gap(fake.x0, real.x0, s), **level(x0)}
        if judge is None:
            return Loss(pull, log)
        fool = generator_loss(m.disc((real if judge == "teacher" else fake).features))
        return Loss(pull + cfg.gan_weight * fool, {**log, "fool": fool})

    def away_from(self, fake: Tensor, x0: Tensor, s: Tensor) -> Tensor:
        """The fake score's x0, at small s with a share of the student's own: 1 is score distillation sampling (DreamFusion, eq. 3).

        Not of the paper. SDS pulls x0 towards what the teacher expects, so what noise of size sigma(s) hides becomes as smooth as the
        teacher can foresee. That takes the grain from pixel-space students of one step, and some of the true texture with it.
        """
        share = self.cfg.sds_share * (s < self.cfg.sds_below).to(fake)
        return fake + like(share, fake) * (x0.to(fake) - fake)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg = self.cfg
        x0 = handed_on(batch, lambda: self.rollout(m, batch, draws, grad=False))
        return critic_loss(m, self.process, x0, batch["main"].cond, cfg.fake_times, draws, real=batch["real"] if cfg.gan_weight else None,
                           features=cfg.features, disc_weight=cfg.disc_weight, r1_weight=cfg.r1_weight, r1_sigma=cfg.r1_sigma)
