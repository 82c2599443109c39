"""SwiftBrush v2: beside the two scores a judge that is soon satisfied. Dao et al., 2024. https://arxiv.org/abs/2408.14176

    every k-th step   student  <- alpha_s·sigma_s·(fake^w(x_s) - teacher^w(x_s))  +  lam·relu(align_above - cos(pictures of x0, labels))
    every step        fake     <- alpha_s²·|eps of fake(x_s) - eps|² at stop(x0); the null condition in a share `dropout` of the steps
    where             x0 = student(noise),   x_s = alpha_s·x0 + sigma_s·eps,   w = the recipe's guidance of the teacher,
                      cos = the judge's cosine between a picture and its label,
                      lam falls from `align_weight` to 0 over the run, linearly in its steps

A picture that fits its label better than `align_above` is pulled by the scores alone: a judge that is never satisfied blurs, saturates and
writes labels into pictures. The judge is a folder with a CLIP model, or "fashion", the second classifier of that world: not the one whose
features and answers its evaluation reads, which a student must not be trained under.

The paper trains two students, a full copy by the first term alone (`align_weight: 0`, which is SwiftBrush itself) and an adapter by both,
and averages them: `stepdistill export FULL --merge ADAPTED --share 0.5`. Both begin at a published student of one step
(`student.weights`): only what began alike can be averaged.

Differs from the paper: s is continuous; several steps are allowed (call n of the student's own sampler, n drawn once for all samples); the
judge sees pictures resized bilinearly, as the decoder makes them; no regression on real pictures. No gradient passes through the decoder
of recorded pipelines with prompts: with a judge those are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.methods.base import Batch, Loss, Method, Setup, Stage, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, handed_on
from stepdistill.methods.vsd import fake_loss, vsd_loss
from stepdistill.models.judges import CLASSIFIERS
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class SwiftBrushV2Config:
    """Defaults are the paper's, whose judge is CLIP ViT-B/32: another judge's cosines want another `align_above`."""

    fake_updates: int = 1                           # fake-score updates per student update
    dropout: float = 0.1                            # of conditions in the fake score's updates, by whole batches where w is not 1
    judge: str = "fashion"                          # a world, or a folder with a CLIP model of transformers
    align_weight: float = 0.1                       # of the judge's term at the first step; 0 asks no judge
    align_above: float = 0.35                       # the cosine from which on the judge is satisfied
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates, dropout=self.dropout)
        check_times(self.times, self.fake_times)
        if self.align_weight < 0 or not -1 < self.align_above <= 1:
            raise ValueError("method.align_weight cannot be negative, and method.align_above is a cosine in (-1, 1], got "
                             f"{self.align_weight} and {self.align_above}")
        if self.judge not in CLASSIFIERS:                 # absolute, so that a run folder can be used from anywhere
            object.__setattr__(self, "judge", str(Path(self.judge).expanduser().absolute()))


class SwiftBrushV2(Method[SwiftBrushV2Config]):
    title, arxiv, family = "SwiftBrush v2", "2408.14176", "variational score distillation"
    Config = SwiftBrushV2Config

    def __init__(self, cfg: SwiftBrushV2Config, setup: Setup):
        super().__init__(cfg, setup)
        if cfg.align_weight and setup.decode is None:
            raise ValueError("swiftbrush_v2 judges pictures, and no gradient passes through the decoder of a pipeline with prompts: set "
                             "method.align_weight=0")
        self.decode = setup.decode if cfg.align_weight else None
        self.steps = math.inf                       # of the run, once it has asked for its stages

    @classmethod
    def needs(cls, cfg: SwiftBrushV2Config) -> Mapping[str, Role]:
        judge = {"judge": Role(source="judge", of=cfg.judge)} if cfg.align_weight else {}
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True), **judge}

    def stages(self, steps: int) -> Sequence[Stage]:
        self.steps = steps
        return super().stages(steps)

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def without_null(self) -> str | None:
        return "set method.dropout to 0" if self.cfg.dropout and self.setup.guidance != 1 else None

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def weight(self, step: int) -> float:
        """lam: all of it at step 0, nothing when the run is over."""
        return self.cfg.align_weight * (1 - step / self.steps)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, cond = self.cfg, batch["main"].cond
        x0 = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True).x0
        batch.scratch["x0"] = x0.detach()
        vsd = vsd_loss(m, self.process, x0, cond, cfg.times, draws, m.teacher.guidance)
        if self.decode is None:
            return vsd
        cosine = m.judge(self.decode(x0), batch["main"].rows)
        align, weight = (cfg.align_above - cosine).relu().mean(), self.weight(draws.step)
        return Loss(vsd.value + weight * align, {**vsd.log, "align": align, "align_weight": weight, "cosine": cosine.mean()})

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, guided = batch["main"].cond, m.teacher.guidance != 1
        x0 = handed_on(batch, lambda: one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=False).x0)
        return fake_loss(m, self.process, x0, cond, self.cfg.fake_times, draws, self.cfg.dropout if guided else 0.0)
