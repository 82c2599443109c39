"""Distribution Matching Distillation (DMD). Yin et al., 2023. https://arxiv.org/abs/2311.18828

    every step   student  <- (fake(x_s) - teacher(x_s)) / mean|x0 - teacher(x_s)|  +  reg_weight·d( student(z_ref), y_ref )     eq. 7-9
                 fake     <- denoise stop(x0)                                                                                   eq. 6
    where        x0  = student(z), of free noise z and, with match_pairs, of the pairs' z_ref too
                 x_s = alpha_s·x0 + sigma_s·eps
                 (z_ref, y_ref) = a noise and what the teacher's ODE makes of it, stored by `stepdistill pairs`                 sec. 3.3

The regression keeps modes that the difference of two scores would lose; both terms want the teacher at one guidance, which is checked. A
batch holds as many pairs as free noises, and all go through the student in one call. The student has one step: the pairs are answers to the
first call's noise, and to no later one's.

`match_pairs` is the paper's way with text-to-image models (algorithm 1); on ImageNet and CIFAR-10 only x0 of free noise is matched and
denoised, which costs half as many passes of teacher and fake score.

Differs from the paper: d is l2 or pseudo-Huber on states, where the paper has LPIPS on decoded pictures, whose network's weights would have
to be downloaded; s is continuous; the normaliser lacks alpha_s, as in the authors' code; the denoising weight is the network's own space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.matching import matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Conditions, Loss, Method, Pairs, Stream, Update
from stepdistill.methods.critic import alternating, check_times, critic_loss
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class DMDConfig:
    """Defaults are the paper's, for text-to-image models where it has two."""

    reg_weight: float = 0.25                        # of the regression on pairs; 0 reads none
    huber: float = 0.0                              # c of its pseudo-Huber distance; 0 is plain l2
    match_pairs: bool = True                        # the pairs' x0 is matched and denoised as well
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        if self.reg_weight < 0 or self.huber < 0:
            raise ValueError("method.reg_weight and method.huber cannot be negative")
        check_times(self.times, self.fake_times)

    @property
    def matches(self) -> bool:
        """Whether there are pairs, and they are matched."""
        return self.match_pairs and self.reg_weight > 0


class DMD(Method[DMDConfig]):
    title, arxiv, family = "Distribution Matching Distillation", "2311.18828", "distribution matching"
    Config, one_step = DMDConfig, True

    @classmethod
    def needs(cls, cfg: DMDConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    @classmethod
    def data(cls, cfg: DMDConfig) -> Mapping[str, Stream]:
        return {"main": Conditions(), "pairs": Pairs()} if cfg.reg_weight else {"main": Conditions()}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, 1)

    def sampler(self) -> SamplerSpec:
        if (calls := len(self.setup.sampler.times)) > 1:
            raise ValueError(f"method dmd trains one step, and student.steps is {calls}: its pairs answer the first call's noise alone; "
                             "set student.steps to 1, or take dmd2")
        return self.setup.sampler

    def rows(self, batch: Batch, draws: Draws, paired: bool) -> tuple[Conditioning, Draws]:
        """Conditions and keys of the free noises and, if `paired`, of the pairs behind them."""
        cond = batch["main"].cond
        if not paired:
            return cond, draws
        return cond.cat(batch["pairs"].cond), replace(draws, indices=(*draws.indices, *(~i for i in draws.indices)))

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, free, spec = self.cfg, len(draws.indices), self.sampler()
        z = draws.each("start").normal(*self.setup.shape)
        if cfg.reg_weight:
            z = torch.cat([z, batch["pairs"].noise.to(z)])
        cond, _ = self.rows(batch, draws, cfg.reg_weight > 0)
        outputs = next(steps(m.student, start(self.process, spec, z), spec, cond, draws, grad=lambda i: True)).x0
        cond, keys = self.rows(batch, draws, cfg.matches)
        x0 = outputs[: len(keys.indices)]
        batch.scratch["x0"] = x0.detach()
        s = cfg.times.sample(keys.each("s"))
        x_s = self.process.add_noise(x0.detach(), keys.each("eps").normal_like(x0), s)
        with torch.no_grad():
            real, fake = m.teacher(x_s, s, cond).x0, m.fake(x_s, s, cond).x0
        pull = matching_loss(x0, toward=real, away_from=fake)
        log = {"pull": pull, **score_gap(fake, real, s), **level(x0)}
        if not cfg.reg_weight:
            return Loss(pull, log)
        y = batch["pairs"].clean
        regression = huber_or_l2(outputs[free:], y, cfg.huber).mean()
        return Loss(pull + cfg.reg_weight * regression, {**log, "regression": regression})

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, keys = self.rows(batch, draws, self.cfg.matches)
        return critic_loss(m, self.process, batch.scratch["x0"], cond, self.cfg.fake_times, keys)
