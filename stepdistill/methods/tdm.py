"""Trajectory Distribution Matching (TDM). Luo et al., 2025. https://arxiv.org/abs/2503.06674

    first        x_1, ..., x_N = the states that the student's calls are fed along its own ODE trajectory, once for both updates, kept apart
    of each sample   a call n, from time t to the next r (0 after the last):   x0, eps = student(x_n, t),   y = alpha_r·x0 + sigma_r·eps,
                 s between r and t,   y_s = y noised from r to s
    every step        fake     <- |fake(y_s) - target|²
    every k-th step   student  <- d( x0, stop(x0 + teacher(y_s) - fake(y_s)) ) / mean|x0 - teacher(y_s)|,   d = pseudo-Huber

Every point of the trajectory is matched in distribution, each within its own interval of noise: no two calls share a time, so one fake
score serves them all without being told n. The student follows the ODE, so it is sampled with renoise 0 whatever the recipe says. Nothing
but conditions is read. `fake_target` says what the fake score is told of y_s, which comes from a state y that is not clean:

    subinterval       what makes it the score of y_s: losses.denoising.subinterval_target (Phased DMD, 2510.27684), in the space the network
                      speaks and weighted by 1/(1 + q²), q the noise in that target; at r = 0 it is plain denoising
    tdm               x0, as published: in x0, weighted by min(SNR, 5) and by exp((|e|² - |e_s|²)/2), e the fresh noise, e_s that of y_s
                      seen as noise on x0, both mean squares. Biased where r > 0: matched points then spread too wide.

Differs from the paper: `subinterval` is the default; s lies in the inner 96 % of its interval, where they leave 10 steps of 1000 at its
ends; no interval reaches above its own call, so the fake score needs no number of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import like
from stepdistill.diffusion.sampler import SamplerSpec, call, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import Uniform
from stepdistill.diffusion.weighting import min_snr
from stepdistill.losses.denoising import denoising_loss, subinterval_target
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.matching import dmd_scale
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Loss, Method, Update
from stepdistill.methods.critic import check_critic
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class TDMConfig:
    """Defaults are the paper's for PixArt-alpha, but for `fake_target`."""

    fake_target: Literal["subinterval", "tdm"] = "subinterval"
    fake_updates: int = 1                           # fake-score updates per student update
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2
    times: Uniform = Uniform(0.02, 0.98)            # s, as a share of the interval from r to t

    def __post_init__(self) -> None:
        check_critic(self.fake_updates)
        if self.huber < 0:
            raise ValueError(f"method.huber cannot be negative, got {self.huber}")
        if self.times.low == 0 and self.fake_target == "subinterval":
            raise ValueError("method.times.low must be above 0: the target of a sub-interval is infinite where it begins")


@dataclass(frozen=True)
class Rung:
    """A point y (B, ...) of the trajectory at times r (B,), the student's x0 it was made of, and y noised afresh to times s (B,)."""

    x0: Tensor
    y: Tensor
    r: Tensor
    s: Tensor
    eps: Tensor
    y_s: Tensor


class TDM(Method[TDMConfig]):
    title, arxiv, family = "Trajectory Distribution Matching", "2503.06674", "distribution matching"
    Config = TDMConfig

    @classmethod
    def needs(cls, cfg: TDMConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    def plan(self, step: int) -> Sequence[Update]:
        critic = Update("critic", ("fake",))
        return (critic,) if step % self.cfg.fake_updates else (critic, Update("student", ("student",), reuse=True))

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=0.0)

    def states(self, m: Roles, batch: Batch, draws: Draws) -> Tensor:
        """(N, B, ...): what the calls of the sampler are fed. Made by the first update of a step, read again by the second."""
        if "states" not in batch.scratch:
            spec = self.sampler()
            x = start(self.process, spec, draws.each("start").normal(*self.setup.shape))
            walk = islice(steps(m.student, x, spec, batch["main"].cond, draws), len(spec.times) - 1)
            batch.scratch["states"] = torch.stack([x, *(step.x_next for step in walk if step.x_next is not None)])
        return batch.scratch["states"]

    def rung(self, m: Roles, batch: Batch, draws: Draws, grad: bool) -> Rung:
        """A call of each sample's own; x0 alone keeps the gradient."""
        spec, states = self.sampler(), self.states(m, batch, draws)
        n = draws.each("call").integers(len(spec.times))
        grid = torch.tensor((*spec.times, 0.0), dtype=torch.float64, device=n.device)
        t, r = grid[n], grid[n + 1]
        with torch.set_grad_enabled(grad):
            pred = call(m.student, spec, states[n, torch.arange(len(n), device=n.device)], t, batch["main"].cond)
            x0 = pred.x0
        with torch.no_grad():
            y, s = jump(pred, self.process, r), r + (t - r) * self.cfg.times.sample(draws.each("s"))
            eps = draws.each("eps").normal_like(y)
            return Rung(x0, y, r, s, eps, self.process.travel(y, eps, r, s))

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        at = self.rung(m, batch, draws, grad=False)
        pred = m.fake(at.y_s, at.s, batch["main"].cond, w=1.0)
        if self.cfg.fake_target == "subinterval":
            x0, eps, q = subinterval_target(self.process, at.y, at.eps, at.r, at.s)
            error = denoising_loss(pred, x0, eps) / (1 + q.square()).to(x0)
        else:
            eps = (at.y_s - like(pred.alpha, at.x0) * at.x0) / like(pred.sigma, at.x0)
            shift = ((at.eps.square() - eps.square()).flatten(1).mean(1) / 2).exp()
            error = denoising_loss(pred, at.x0, eps, "x0") * shift * min_snr(self.process.log_snr(at.s)).to(shift)
        denoise = error.mean()
        return Loss(denoise, {"denoise": denoise})

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, cfg = batch["main"].cond, self.cfg
        at = self.rung(m, batch, draws, grad=True)
        with torch.no_grad():
            real, fake = m.teacher(at.y_s, at.s, cond).x0, m.fake(at.y_s, at.s, cond, w=1.0).x0
            target = at.x0 + real - fake
        distance = huber_or_l2(at.x0, target, cfg.huber)
        pull = (distance * dmd_scale(at.x0.detach(), real)).mean()
        return Loss(pull, {"pull": pull, **score_gap(fake, real, at.s), **level(at.x0)})
