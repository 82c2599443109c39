"""Polish: a finished few-step student learns to do by itself what one small step of its teacher would still improve.

The principle is progressive distillation's, two sampler steps become one (Salimans & Ho, 2022, https://arxiv.org/abs/2202.00512, algorithm 2); the pair is ours:

    before    the student as this run finds it, frozen
    x_t       the state before call n of before's own sampler, n drawn once for all samples
    y         before(x_t);  at the last call  y <- teacher(alpha_s·y + sigma_s·eps)
    student   <- |student(x_t) - y|²

Everything is x0, guided as the recipe says where it is the teacher's. Students trained by score differences carry a fine grain that a
teacher's call at a small s removes: there it answers with the mean of what the noise hides. The target is a fixed function of the
starting noise but for eps, so plain least squares finds it, and its gradient fades on arrival where a normalised one does not. Needs
`start: RUN` or `student.weights`: polishing the untrained copy of a teacher teaches it its own one-step mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call, steps
from stepdistill.losses.distance import l2
from stepdistill.methods.base import Batch, Loss, Method, Stage
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class PolishConfig:
    """The default time is the best of three on the fashion teacher (docs/findings.md)."""

    time: float = 0.02                              # s: where the teacher is called, in (0, 1)

    def __post_init__(self) -> None:
        if not 0 < self.time < 1:
            raise ValueError(f"method.time must lie in (0, 1), got {self.time}")


class Polish(Method[PolishConfig]):
    title, arxiv, family = "Polish of a finished student", "2202.00512", "trajectory"
    Config = PolishConfig

    @classmethod
    def needs(cls, cfg: PolishConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "before": Role()}

    def enter(self, stage: Stage, m: Roles) -> None:
        m.follow("before", "student", 0)

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        spec, cond = self.sampler(), batch["main"].cond
        call = one_call(m.before, spec, cond, draws, self.setup.shape, grad=False)
        y, x_t = call.x0, call.pred.x_t
        if call.index == len(spec.times) - 1:
            s = torch.tensor(self.cfg.time, dtype=torch.float64, device=y.device).expand(len(y))
            with torch.no_grad():
                y = m.teacher(self.process.add_noise(y, draws.each("eps").normal_like(y), s), s, cond).x0
        alone = replace(spec, times=(spec.times[call.index],))
        x0 = next(steps(m.student, x_t, alone, cond, draws, grad=lambda i: True)).x0
        distance = l2(x0, y if spec.clip_x0 is None else y.clamp(-spec.clip_x0, spec.clip_x0)).mean()
        return Loss(distance, {"distance": distance, "moved": l2(x0.detach(), call.x0).mean()})
