"""DP-DMD: the first step keeps the teacher's variety, the later ones match its distribution. 2026. https://arxiv.org/abs/2602.03139

    every k-th step   student  <- (fake(x_s) - teacher(x_s)) / mean|x_s - teacher(x_s)|   through calls 2..N, not into call 1
                                + weight·|v(z, t_1) - target|²,  v = eps - x0             on call 1 alone
    every step        fake     <- denoise stop(x0)
    where             x0 = the last call of the student's own trajectory from z, each state the ODE step of the one before
                      x_s = alpha_s·x0 + sigma_s·eps
                      z_a = where the teacher's ODE takes the same z in `anchor_steps` of `teacher_steps` equal steps
                      target = the v whose one ODE step takes z to z_a: the teacher's mean velocity

The student follows the ODE, so it is sampled with renoise 0 whatever the recipe says. It is called N times with gradients in one update, so
N sets of activations are kept; `gradient_checkpointing` pays for them with time. Nothing but conditions is read. With one step nothing is
left to separate: both terms act on the same call.

Differs from the paper: s is continuous and of each sample, not one for a batch; the fake score learns in the student's step, too, from that
step's own sample, which makes the same k updates for one; the target is written for any process. It is compared as a velocity whatever the
network speaks: an eps network's own error counts alpha²/sigma² of that of x0, .005 at Stable Diffusion's t = 1, and would regress to
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import solve
from stepdistill.diffusion.sampler import SamplerSpec, Step, start, steps
from stepdistill.diffusion.solver import follow
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.matching import dmd_scale, matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Loss, Method, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, critic_loss, handed_on
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class DPDMDConfig:
    """Defaults are the paper's for Stable Diffusion 3.5 medium and SDXL."""

    fake_updates: int = 5                           # fake-score updates per student update
    weight: float = 0.05                            # of the first call's regression
    teacher_steps: int = 30                         # equal steps of the teacher from the first time to 0
    anchor_steps: int = 5                           # how many of them are walked: 3 to 5 did best
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates)
        check_times(self.times, self.fake_times)
        if self.weight < 0:
            raise ValueError(f"method.weight cannot be negative, got {self.weight}")
        if not 0 < self.anchor_steps <= self.teacher_steps:
            raise ValueError(f"method.anchor_steps must lie in 1..method.teacher_steps, got {self.anchor_steps} of {self.teacher_steps}")


class DPDMD(Method[DPDMDConfig]):
    title, arxiv, family = "DP-DMD", "2602.03139", "distribution matching"
    Config, on_trajectories = DPDMDConfig, True

    @classmethod
    def needs(cls, cfg: DPDMDConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=0.0)

    def rollout(self, m: Roles, cond: Conditioning, draws: Draws, grad: bool) -> tuple[Step, Tensor]:
        """The first call, and x0 of the last: each keeps its gradient, but none passes from the others into the first."""
        spec = self.sampler()
        z = start(self.process, spec, draws.each("start").normal(*self.setup.shape))
        first = next(steps(m.student, z, spec, cond, draws, grad=lambda i: grad))
        if first.x_next is None:
            return first, first.x0
        rest = replace(spec, times=spec.times[1:])
        *_, last = steps(m.student, first.x_next.detach(), rest, cond, draws, grad=lambda i: grad)
        return first, last.x0

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, cond = self.cfg, batch["main"].cond
        first, x0 = self.rollout(m, cond, draws, grad=True)
        batch.scratch["x0"] = x0.detach()
        s = cfg.times.sample(draws.each("s"))
        x_s = self.process.add_noise(x0.detach(), draws.each("eps").normal_like(x0), s)
        t_a = first.t * (1 - cfg.anchor_steps / cfg.teacher_steps)
        with torch.no_grad():
            real, fake = m.teacher(x_s, s, cond).x0, m.fake(x_s, s, cond).x0
            z_a = follow(lambda x, t: m.teacher(x, t, cond), first.pred.x_t, first.t, t_a, cfg.anchor_steps, self.process)
            target = solve(self.process.alpha(t_a), self.process.sigma(t_a), first.pred.alpha, first.pred.sigma, first.pred.x_t, z_a)
        pull = matching_loss(x0, toward=real, away_from=fake, scale=dmd_scale(x_s, real))
        variety = denoising_loss(first.pred, *target, "flow").mean()
        log = {"pull": pull, "variety": variety, **score_gap(fake, real, s), **level(x0)}
        return Loss(pull + cfg.weight * variety, log)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["main"].cond
        x0 = handed_on(batch, lambda: self.rollout(m, cond, draws, grad=False)[1])
        return critic_loss(m, self.process, x0, cond, self.cfg.fake_times, draws)
