"""Polish: a finished few-step student learns to end as its teacher would, with a call at a small time s.

The principle is progressive distillation's, one network learns what two do in turn (Salimans & Ho, 2022,
https://arxiv.org/abs/2202.00512); the pair, a student and its teacher, is ours:

    student   <- max(SNR_t, 1)·|x0 - y|²
    where     x0 = call n of the student's own sampler, at state x_t and time t, n drawn once for all samples
              y  = teacher(x_t, t) where t <= s, else before(x_t, t): the student as this run found it, frozen
              where no call has t <= s, the teacher's comes after the last:  y <- teacher(alpha_s·y + sigma_s·eps, s)

So further calls can be added to a student (times [0.4] become [0.4, 0.02, 0.01]), or the teacher's last touch folded into the calls it has.
The weight is theirs (eq. 6): without it the errors of the small times, which are what an added call is for, drown in those of the first.
Students trained by score differences carry a fine grain that a teacher's call at small s removes: there it answers with the mean of what
the noise hides. The target is a fixed function of the starting noise but for eps, so plain least squares finds it, and its gradient fades
on arrival where a normalised one does not. Nothing but conditions is read. Begins at `start: RUN` or `student.weights`: the untrained copy
of a teacher would be taught its own one-step mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, Step, one_call
from stepdistill.diffusion.weighting import truncated_snr
from stepdistill.losses.distance import l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Loss, Method, Stage
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class PolishConfig:
    """The default time is the best of three on the fashion teacher (docs/findings.md)."""

    time: float = 0.02                              # s: at and below it the teacher is the target, in (0, 1)

    def __post_init__(self) -> None:
        if not 0 < self.time < 1:
            raise ValueError(f"method.time must lie in (0, 1), got {self.time}")


class Polish(Method[PolishConfig]):
    title, arxiv, family = "Polish of a finished student", "2202.00512", "finishing"
    Config, finishes = PolishConfig, True

    @classmethod
    def needs(cls, cfg: PolishConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "before": Role()}

    def enter(self, stage: Stage, m: Roles) -> None:
        m.follow("before", "student", 0)

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    @torch.no_grad()
    def target(self, m: Roles, call: Step, cond: Conditioning, draws: Draws) -> Tensor:
        """y (B, ...) of this call, bounded as the sampler bounds x0."""
        x_t, t, times = call.pred.x_t, call.t, self.sampler().times
        if times[call.index] <= self.cfg.time:
            return self.bounded(m.teacher(x_t, t, cond).x0)
        y = self.bounded(m.before(x_t, t, cond).x0)
        if call.index < len(times) - 1:
            return y
        s = torch.full_like(t, self.cfg.time)
        return self.bounded(m.teacher(self.process.add_noise(y, draws.each("eps").normal_like(y), s), s, cond).x0)

    def bounded(self, x0: Tensor) -> Tensor:
        bound = self.sampler().clip_x0
        return x0 if bound is None else x0.clamp(-bound, bound)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["main"].cond
        call = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True)
        distance = l2(call.x0, self.target(m, call, cond, draws))
        weight = truncated_snr(self.process.log_snr(call.t)).to(distance)
        return Loss((weight * distance).mean(), {"distance": distance.mean(), **level(call.x0)})
