"""Score identity Distillation (SiD). Zhou et al., 2024. https://arxiv.org/abs/2404.04057

    every k-th step   student  <- <d, (teacher(x_s) - x0) - alpha·d> / mean|x0 - teacher(x_s)|,  d = teacher(x_s) - fake(x_s)     eq. 23
    every step        fake     <- denoise stop(x0)                                                                                eq. 22
    where             x0 = call n of the student's own sampler from noise, n drawn once for all samples   (few steps: 2505.12674, sec. 3)
                      x_s = alpha_s·x0 + sigma_s·eps

Nothing but the divisor is detached: the gradient runs through both score networks into x_s. Data-free unless `gan_weight` is set (SiDA,
2410.14919). The guidance of the two scores gives the published variants:

    plain        teacher guided by the recipe, fake_guidance 1
    long-short   fake_guidance = the recipe's guidance: the fake score is guided when trained and when asked        (2406.01561, sec. 3.2)
    Zero-CFG     the recipe's guidance 1, fake_guidance 0: the fake score never sees the condition                  (2505.12674, sec. 3.3)
    Anti-CFG     the recipe's guidance 1, fake_guidance -1; the fake score is trained plain                         (2505.12674, sec. 3.3)

A dropped condition is dropped for the whole update, the student's sample and the pictures in it.

Differs from the authors' code: means over elements where they sum and scale; s uniform, then shifted, where they follow Karras; the
discriminator is a head of its own on the fake score's features, not a pooling of them, its logits are not clamped, and generated samples
and pictures get noise of their own; the GAN term is not divided by the loss's weight, and there from the start; the student moves before
the fake score. SiD-DiT's menu of weights and its rollouts with one noise or none are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.matching import sid_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Conditions, Images, Loss, Method, Stream, Update
from stepdistill.methods.critic import check_critic, check_r1, check_times, critic_loss, dropped
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class SiDConfig:
    """Defaults are those of the text-to-image papers, `fake_guidance` aside, which names the variant; class-conditional pixel models
    took alpha 1.2."""

    alpha: float = 1.0                              # of |d|²: 0.5 learns slowly, above 1.2 diverges
    fake_updates: int = 1                           # fake-score updates per student update
    fake_guidance: float = 1.0                      # w of the fake score: see above
    dropout: float = 0.1                            # of conditions in the fake score's updates, by whole batches, where it is guided
    gan_weight: float = 0.0                         # of the student's GAN term; 0 builds no discriminator and reads no pictures
    disc_weight: float = 1e-2
    r1_weight: float = 0.0                          # of approximate R1 beside the discriminator's loss; 0 adds no pass
    r1_sigma: float = 0.05                          # how far it moves the pictures
    split: bool = False                             # differentiate through one score network at a time: less memory, one more teacher pass
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the critic's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates, dropout=self.dropout, gan_weight=self.gan_weight, disc_weight=self.disc_weight)
        check_times(self.times, self.fake_times)
        check_r1(self.r1_weight, self.r1_sigma)


class SiD(Method[SiDConfig]):
    title, arxiv, family = "Score identity Distillation", "2404.04057", "variational score distillation"
    Config = SiDConfig

    @classmethod
    def needs(cls, cfg: SiDConfig) -> Mapping[str, Role]:
        disc = {"disc": Role(source="head", of="fake", trains=True)} if cfg.gan_weight else {}
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True), **disc}

    @classmethod
    def data(cls, cfg: SiDConfig) -> Mapping[str, Stream]:
        return {"main": Conditions(), "real": Images()} if cfg.gan_weight else {"main": Conditions()}

    def plan(self, step: int) -> Sequence[Update]:
        critic = Update("critic", ("fake", "disc") if self.cfg.gan_weight else ("fake",))
        return (Update("student", ("student",)), critic) if step % self.cfg.fake_updates == 0 else (critic,)

    def without_null(self) -> str | None:
        return "set method.fake_guidance to 1" if self.cfg.fake_guidance != 1 else None

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def rollout(self, m: Roles, cond: Conditioning, draws: Draws, grad: bool) -> Tensor:
        return one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=grad).x0

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, cond = self.cfg, batch["main"].cond
        real = batch["real"] if cfg.gan_weight else None
        if cfg.fake_guidance not in (0, 1):
            cond = dropped(cond, cfg.dropout, draws)
            real = real and replace(real, cond=dropped(real.cond, cfg.dropout, draws))     # else the condition alone would tell them apart
        return critic_loss(m, self.process, self.rollout(m, cond, draws, grad=False), cond, cfg.fake_times, draws,
                           w=cfg.fake_guidance if cfg.fake_guidance >= 0 else 1.0, real=real, disc_weight=cfg.disc_weight,
                           r1_weight=cfg.r1_weight, r1_sigma=cfg.r1_sigma)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, cond = self.cfg, batch["main"].cond
        x0 = self.rollout(m, cond, draws, grad=True)
        s, eps = cfg.times.sample(draws.each("s")), draws.each("eps").normal_like(x0)
        leaf = x0.detach().requires_grad_() if cfg.split else x0
        x_s = self.process.add_noise(leaf, eps, s)
        fake = m.fake(x_s, s, cond, w=cfg.fake_guidance, tap=cfg.gan_weight > 0)
        fool = generator_loss(m.disc(fake.features)) if cfg.gan_weight else x0.new_zeros(())
        if not cfg.split:
            real = m.teacher(x_s, s, cond).x0
            sid = sid_loss(x0, real, fake.x0, cfg.alpha).mean()
            loss = sid + cfg.gan_weight * fool
        else:
            with torch.no_grad():
                real = m.teacher(x_s, s, cond).x0
            ends = [v.detach().requires_grad_() for v in (x0, fake.x0, real)]
            sid = sid_loss(ends[0], ends[2], ends[1], cfg.alpha).mean()
            at_x0, at_fake, at_real = torch.autograd.grad(sid, ends)
            (through_fake,) = torch.autograd.grad((fake.x0 * at_fake).sum() + cfg.gan_weight * fool, leaf)
            teacher = m.teacher(self.process.add_noise(leaf, eps, s), s, cond).x0
            (through_teacher,) = torch.autograd.grad((teacher * at_real).sum(), leaf)
            carried = (x0 * (at_x0 + through_fake + through_teacher)).sum()
            loss = (sid + cfg.gan_weight * fool).detach() + carried - carried.detach()
        log = {"sid": sid, **score_gap(fake.x0, real, s), **level(x0)}
        return Loss(loss, {**log, "fool": fool} if cfg.gan_weight else log)
