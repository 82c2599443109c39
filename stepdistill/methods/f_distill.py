"""One-step diffusion models by f-divergence minimisation (f-distill). Xu et al., 2025. https://arxiv.org/abs/2502.15681

    every k-th step   student  <- h(r)/mean h · (fake(x_s) - teacher(x_s)) / mean|x0 - teacher(x_s)|  +  fool disc     theorem 1, sec. 3.3
    every step        fake     <- denoise stop(x0);  disc <- real against stop(x0)
    where             x0 = call n of the student's own sampler from noise, n drawn once for all samples,
                      x_s = alpha_s·x0 + sigma_s·eps,
                      r = exp disc(x_s) within `ratio`: how much likelier a picture looks like this than a sample does,
                      h(r) = f''(r)·r² of the divergence E_samples f(r)

DMD2 with a weight on each sample. Reverse KL weighs all alike and is DMD2 without its weight, bit for bit; forward KL and Jensen-Shannon
pull hardest where pictures are that samples seldom reach, which keeps variety and costs variance (the log's `weight_square`: one over it
is the share of the batch that counts).

Differs from the authors' code: the mean of h is a running one over updates, from h(1) on, so that a batch is what its parts are; r is not
divided by its own running mean over bins of s; s is continuous and the student's x_s serves both terms, as in our DMD2. The ratio is of
pictures to samples, the pull is towards the guided teacher: under guidance the weight is a heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.matching import dmd_scale, matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Conditions, Images, Loss, Method, Setup, Stream, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, critic_loss, handed_on
from stepdistill.models.roles import Role, Roles

KEPT = 0.9                                              # of the running mean of h, at each update of the student
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {      # h(r), up to a factor that its mean takes away: table 1
    "reverse_kl": torch.ones_like,                      # seeks modes: DMD2
    "forward_kl": lambda r: r,                          # covers; the highest variance of those that are bounded from below
    "jensen_shannon": lambda r: r / (1 + r),            # covers and is bounded
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,                          # unstable
}


@dataclass(frozen=True)
class FDistillConfig:
    """Defaults are the paper's for Stable Diffusion 1.5."""

    divergence: Divergence = "jensen_shannon"
    ratio: tuple[float, float] = (0.1, 20.0)        # bounds of r
    fake_updates: int = 10                          # fake-score updates per student update
    gan_weight: float = 1e-3                        # of the student's GAN term; 0 keeps the discriminator, for r
    disc_weight: float = 1e-2                       # of the discriminator's loss beside the fake score's
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the critic's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates, gan_weight=self.gan_weight, disc_weight=self.disc_weight)
        check_times(self.times, self.fake_times)
        if not (len(self.ratio) == 2 and 0 < self.ratio[0] < self.ratio[1]):
            raise ValueError(f"method.ratio needs 0 < low < high, got {list(self.ratio)}")
        if self.disc_weight == 0:
            raise ValueError("method.disc_weight=0 trains no discriminator, whose logits are this method's weights")


class FDistill(Method[FDistillConfig]):
    title, arxiv, family = "f-divergence Distillation", "2502.15681", "distribution matching"
    Config = FDistillConfig

    def __init__(self, cfg: FDistillConfig, setup: Setup):
        super().__init__(cfg, setup)
        self.mean = float(self.h(torch.zeros(1)))

    @classmethod
    def needs(cls, cfg: FDistillConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True),
                "disc": Role(source="head", of="fake", trains=True)}

    @classmethod
    def data(cls, cfg: FDistillConfig) -> Mapping[str, Stream]:
        return {"main": Conditions(), "real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates, ("fake", "disc"))

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def rollout(self, m: Roles, batch: Batch, draws: Draws, grad: bool) -> Tensor:
        """x0 of the call that is trained now, reached through the student's own earlier calls."""
        return one_call(m.student, self.sampler(), batch["main"].cond, draws, self.setup.shape, grad=grad).x0

    def h(self, logits: Tensor) -> Tensor:
        """h(r) (B,) of the discriminator's logits (B,), float32, detached."""
        return WEIGHTS[self.cfg.divergence](logits.detach().float().exp().clamp(*self.cfg.ratio))

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["main"].cond
        x0 = self.rollout(m, batch, draws, grad=True)
        batch.scratch["x0"] = x0.detach()
        s = self.cfg.times.sample(draws.each("s"))
        x_s = self.process.add_noise(x0, draws.each("eps").normal_like(x0), s)
        with torch.no_grad():
            real = m.teacher(x_s, s, cond)
        fake = m.fake(x_s, s, cond, tap=True)
        logits = m.disc(fake.features)
        h = self.h(logits)
        weight = h / self.mean
        pull = matching_loss(x0, toward=real.x0, away_from=fake.x0.detach(), scale=weight * dmd_scale(x0.detach(), real.x0))
        fool = generator_loss(logits)
        log = {"pull": pull, "fool": fool, "weight_square": weight.square().mean(), **score_gap(fake.x0, real.x0, s), **level(x0)}
        return Loss(pull + self.cfg.gan_weight * fool, log, {"h": h.mean()})

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0 = handed_on(batch, lambda: self.rollout(m, batch, draws, grad=False))
        return critic_loss(m, self.process, x0, batch["main"].cond, self.cfg.fake_times, draws, real=batch["real"],
                           disc_weight=self.cfg.disc_weight)

    def learn(self, measured: Mapping[str, Tensor]) -> None:
        if "h" in measured and math.isfinite(found := float(measured["h"])):
            self.mean = KEPT * self.mean + (1 - KEPT) * found

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean = float(state["mean"])
