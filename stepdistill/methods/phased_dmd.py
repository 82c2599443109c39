"""Phased DMD: distribution matching at the end of each phase of noise. 2025. https://arxiv.org/abs/2510.27684

    phase i of P      expert i of the student makes calls lo..hi-1 of its ODE trajectory, ending at s = the time of call hi (0 after the
                      last); one phase after the other, expert and fake score of each beginning as the teacher, earlier experts frozen
    every step        fake     <- denoise the states x_s of a whole rollout, by the target of the sub-interval from s
    every k-th        expert i <- A·(fake(x_t) - teacher(x_t)) / mean|x0 - teacher(x_t)|
    where             x_s = the ODE step to s from call n of the phase, n drawn once for all samples, x0 that call's own
                      x_t = A·x_s + B·eps for t between s and 1: A = alpha_t/alpha_s, B² = sigma_t² - (A·sigma_s)²

A phase matches the law of its states and jumps no further, so early ones cannot collapse onto what one step could do. States are not clean
where s > 0: the fake score learns from losses.denoising.subinterval_target, weighted by 1/(1 + q²), q the noise in that target; at s = 0 it
is plain denoising. The student follows the ODE, so it is sampled with renoise 0 whatever the recipe says. Nothing but conditions is read.

`experts: false` trains one student for all phases, at the memory and the size of one: phases take turns, so that it forgets none, and each
keeps a fake score of its own, `fake_1` to `fake_P`.

Experts are full copies, or with `lora.student` adapters on the one frozen teacher, as in the paper (rank 64, alpha 8).

Differs from the paper: the student's t is uniform on the inner
96 % of its range, the fake score's on all but the lowest 2 %. The weight is ours, they clamp. The normaliser stands in the place of
alpha_t/sigma_t² of the KL gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, Step, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.denoising import denoising_loss, subinterval_target
from stepdistill.losses.matching import dmd_scale, matching_loss
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Loss, Method, Setup, Stage, Update
from stepdistill.methods.critic import check_times
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class PhasedDMDConfig:
    """Defaults are the paper's: four steps in two phases."""

    phases: int = 2                                 # P; the student needs at least as many steps
    experts: bool = True                            # a network for each phase; false: one for all of them
    fake_updates: int = 5                           # k: fake-score updates of a phase per student update of that phase
    times: Uniform = Uniform(0.02, 0.98)            # t of the student's update, as a share of the range from s to 1
    fake_times: Uniform = Uniform(0.02, 1.0)        # t of the fake score's update, likewise

    def __post_init__(self) -> None:
        if self.phases < 1 or self.fake_updates < 1:
            raise ValueError(f"method.phases and method.fake_updates must be at least 1, got {self.phases} and {self.fake_updates}")
        if self.fake_times.low == 0:
            raise ValueError("method.fake_times.low must be above 0: the target of a sub-interval is infinite where it begins")
        check_times(self.times, self.fake_times)


class PhasedDMD(Method[PhasedDMDConfig]):
    title, arxiv, family = "Phased DMD", "2510.27684", "distribution matching"
    Config = PhasedDMDConfig

    def __init__(self, cfg: PhasedDMDConfig, setup: Setup):
        super().__init__(cfg, setup)
        if len(setup.sampler.times) < cfg.phases:
            raise ValueError(f"{cfg.phases} phases need a student of as many steps: raise student.steps or lower method.phases")
        self.entered = 0                            # the phase that runs, where each has a stage of its own

    @classmethod
    def needs(cls, cfg: PhasedDMDConfig) -> Mapping[str, Role]:
        fakes = ["fake"] if cfg.experts else [f"fake_{i + 1}" for i in range(cfg.phases)]
        student = Role(trains=True, experts=cfg.phases if cfg.experts else 1)
        return {"teacher": Role(), "student": student, **{name: Role(trains=True) for name in fakes}}

    def stages(self, steps: int) -> Sequence[Stage]:
        if not self.cfg.experts:
            return super().stages(steps)
        ends = [steps * i // self.cfg.phases for i in range(self.cfg.phases + 1)]
        return [Stage(f"phase {i + 1}", b - a, ("student", "fake")) for i, (a, b) in enumerate(pairwise(ends))]

    def enter(self, stage: Stage, m: Roles) -> None:
        if self.cfg.experts:
            self.entered = int(stage.name.split()[1]) - 1
            if self.entered:
                m.restart("fake")

    def state(self) -> dict[str, Any]:
        return {"phase": self.entered}

    def restore(self, state: dict[str, Any]) -> None:
        self.entered = int(state["phase"])

    def phase(self, step: int) -> int:
        """The phase of a step, from 0."""
        return self.entered if self.cfg.experts else step % self.cfg.phases

    def fake(self, phase: int) -> str:
        """The role that is its fake score."""
        return "fake" if self.cfg.experts else f"fake_{phase + 1}"

    def calls(self, phase: int) -> tuple[int, int, float]:
        """(lo, hi, s): the phase's calls lo..hi-1 and the time of the states that it ends with."""
        count, times = len(self.setup.sampler.times), (*self.setup.sampler.times, 0.0)
        lo, hi = (count * i // self.cfg.phases for i in (phase, phase + 1))
        return lo, hi, times[hi]

    def plan(self, step: int) -> Sequence[Update]:
        phase, turn = self.phase(step), step if self.cfg.experts else step // self.cfg.phases
        critic = Update("critic", (self.fake(phase),))
        student = Update("student", ("student",), expert=phase if self.cfg.experts else None)
        return (critic,) if turn % self.cfg.fake_updates else (student, critic)

    def sampler(self) -> SamplerSpec:
        ends = [self.calls(phase)[2] for phase in range(self.cfg.phases - 1)] if self.cfg.experts else []
        return replace(self.setup.sampler, renoise=0.0, boundaries=tuple(ends))

    def call(self, m: Roles, cond: Conditioning, draws: Draws, index: int, grad: bool) -> Step:
        """Call `index` of the trajectory, which alone keeps its gradient, if any does."""
        z = start(self.process, self.sampler(), draws.each("start").normal(*self.setup.shape))
        walk = steps(m.student, z, self.sampler(), cond, draws, grad=lambda i: grad and i == index)
        return next(step for step in walk if step.index == index)

    def noised(self, x_s: Tensor, s: float, times: Uniform, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(s, t, eps, x_t) for states x_s (B, ...), no gradient."""
        share, eps = times.sample(draws.each("t")), draws.each("eps").normal_like(x_s)
        low = torch.full_like(share, s)
        t = low + (1 - low) * share
        return low, t, eps, self.process.travel(x_s.detach(), eps, low, t)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, phase = batch["main"].cond, self.phase(draws.step)
        lo, hi, end = self.calls(phase)
        step = self.call(m, cond, draws, lo + int(draws.shared("call").integers(hi - lo)), grad=True)
        x_s = jump(step.pred, self.process, torch.tensor(end, dtype=torch.float64, device=step.t.device)) if end else step.x0
        s, t, _, x_t = self.noised(x_s, end, self.cfg.times, draws)
        with torch.no_grad():
            real, fake = m.teacher(x_t, t, cond).x0, getattr(m, self.fake(phase))(x_t, t, cond).x0
            kept = self.process.alpha(t) / self.process.alpha(s)
            scale = kept * dmd_scale(step.x0, real)
        pull = matching_loss(x_s, toward=real, away_from=fake, scale=scale)
        gap = (fake - real).square().mean().sqrt()
        return Loss(pull, {f"pull_{phase + 1}": pull, f"score_gap_{phase + 1}": gap, **level(step.x0)})

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, phase = batch["main"].cond, self.phase(draws.step)
        _, hi, end = self.calls(phase)
        step = self.call(m, cond, draws, hi - 1, grad=False)
        x_s = step.x0 if step.x_next is None else step.x_next
        s, t, eps, x_t = self.noised(x_s, end, self.cfg.fake_times, draws)
        x0, eps, q = subinterval_target(self.process, x_s, eps, s, t)
        weight = (1 / (1 + q.square())).to(x0)
        denoise = (weight * denoising_loss(getattr(m, self.fake(phase))(x_t, t, cond), x0, eps)).mean()
        return Loss(denoise, {f"denoise_{phase + 1}": denoise})
