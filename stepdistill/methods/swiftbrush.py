"""SwiftBrush: variational score distillation of a text-to-image model. Nguyen & Tran, 2023. https://arxiv.org/abs/2312.05239

    every k-th step   student  <- alpha_s·sigma_s·(fake^w(x_s) - teacher^w(x_s)) in x0, which is sigma_s²·(teacher^w - fake^w) in eps
    every step        fake     <- alpha_s²·|eps of fake(x_s) - eps|² at stop(x0); the null condition in a share `dropout` of the steps
    where             x0 = student(noise),   x_s = alpha_s·x0 + sigma_s·eps,   w = the recipe's guidance of the teacher

The fake score is asked with the teacher's guidance and trained without, so it must know the null condition as well; a student with the
teacher's own unguided law is a fixed point at any w. In the paper the fake score is an adapter on the teacher (rank 64, its rate 1000 times
the student's: it must be fast); that is `lora.fake` of a recipe. Nothing but conditions is read. A network that is told its guidance has no
null condition: `dropout` must be 0 there.

Differs from the paper: s is continuous; several steps are allowed (call n of the student's own sampler, n drawn once for all samples).
The step's one sample serves both updates, as there. The student's rate must fall: at a constant one the toy of the tests oscillates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.methods.base import Batch, Loss, Method, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, handed_on
from stepdistill.methods.vsd import fake_loss, vsd_loss
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class SwiftBrushConfig:
    """Defaults are the paper's."""

    fake_updates: int = 1                           # fake-score updates per student update
    dropout: float = 0.1                            # of conditions in the fake score's updates, by whole batches where w is not 1
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates, dropout=self.dropout)
        check_times(self.times, self.fake_times)


class SwiftBrush(Method[SwiftBrushConfig]):
    title, arxiv, family = "SwiftBrush", "2312.05239", "variational score distillation"
    Config = SwiftBrushConfig

    @classmethod
    def needs(cls, cfg: SwiftBrushConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def without_null(self) -> str | None:
        return "set method.dropout to 0" if self.cfg.dropout and self.setup.guidance != 1 else None

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["main"].cond
        x0 = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True).x0
        batch.scratch["x0"] = x0.detach()
        return vsd_loss(m, self.process, x0, cond, self.cfg.times, draws, m.teacher.guidance)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, guided = batch["main"].cond, m.teacher.guidance != 1
        x0 = handed_on(batch, lambda: one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=False).x0)
        return fake_loss(m, self.process, x0, cond, self.cfg.fake_times, draws, self.cfg.dropout if guided else 0.0)
