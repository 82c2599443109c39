"""Decoupled DMD: guidance and distribution matching at noise levels of their own. 2025. https://arxiv.org/abs/2511.22677

    every k-th step   student  <- c_s·(fake(x_s) - teacher(x_s))                      distribution matching, the regulariser, at any s
                                - c_r·(teacher^w(x_r) - teacher(x_r))                 what guidance adds, the engine, at r < t
    every step        fake     <- denoise stop(x0)
    where             x0 = call n, told the time t, of the student's own sampler from noise, n drawn once for all samples
                      x_s and x_r = x0 noised to s and r afresh,   c = 1/mean|x0 - teacher^w| at the respective level

With s = r and one noise this is DMD2 without its GAN: teacher^w = teacher + (what guidance adds). The second term has no fixed point of its
own: alone it inflates the student without bound, so watch `ca_to_dm` and `x0_std`. At guidance 1 it is absent. r is bounded below t before
its times are shifted, so that the shifted r obeys, too. Nothing but conditions is read.

Differs from the paper: both terms carry DMD's normaliser, each at its level (the published normaliser is not known to us); no GAN;
s and r are continuous. What guidance adds is taken as teacher^w - teacher, which is (w - 1)·(teacher - null) where guidance is linear and
remains right where a pipeline rescales or embeds it; that costs a third pass of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, Step, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.matching import dmd_scale, matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Loss, Method, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, critic_loss, handed_on
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class DecoupledDMDConfig:
    """Defaults are those of a port to Stable Diffusion 1.5, but for the times, which it draws from [0, 1]; the paper took DMD2's settings
    for SDXL."""

    fake_updates: int = 5                           # fake-score updates per student update
    times: Uniform = Uniform(0.02, 0.98)            # s of distribution matching
    ca_times: Uniform = Uniform(0.02, 0.98)         # r of what guidance adds; its part below t
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        check_critic(self.fake_updates)
        check_times(self.times, self.fake_times)


class DecoupledDMD(Method[DecoupledDMDConfig]):
    title, arxiv, family = "Decoupled DMD", "2511.22677", "distribution matching"
    Config = DecoupledDMDConfig

    @classmethod
    def needs(cls, cfg: DecoupledDMDConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def rollout(self, m: Roles, batch: Batch, draws: Draws, grad: bool) -> Step:
        return one_call(m.student, self.sampler(), batch["main"].cond, draws, self.setup.shape, grad=grad)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, call = batch["main"].cond, self.rollout(m, batch, draws, grad=True)
        x0 = call.x0
        batch.scratch["x0"] = x0.detach()
        s, r = self.cfg.times.sample(draws.each("s")), self.ca_times(self.sampler().times[call.index]).sample(draws.each("r"))
        x_s, x_r = (self.process.add_noise(x0.detach(), draws.each(tag).normal_like(x0), t) for tag, t in (("s/eps", s), ("r/eps", r)))
        with torch.no_grad():
            fake = m.fake(x_s, s, cond).x0
            if m.teacher.guidance == 1:
                real = guided = m.teacher(x_s, s, cond).x0
            else:
                both = torch.cat([x_s, x_r]), torch.cat([s, r]), cond.cat(cond)
                (real, real_r), (guided, guided_r) = (net(*both).x0.chunk(2) for net in (m.teacher.plain, m.teacher))
        dm = matching_loss(x0, toward=real, away_from=fake, scale=dmd_scale(x0.detach(), guided))
        log = {"pull": dm, **score_gap(fake, real, s), **level(x0)}
        if m.teacher.guidance == 1:
            return Loss(dm, log)
        ca = matching_loss(x0, toward=guided_r, away_from=real_r, scale=dmd_scale(x0.detach(), guided_r))
        return Loss(dm + ca, {**log, "ca": ca, "ca_to_dm": (ca / dm.clamp_min(1e-12)).sqrt().detach()})

    def ca_times(self, t: float) -> Uniform:
        """The times of what guidance adds for a call at t."""
        return self.cfg.ca_times.below(t)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0 = handed_on(batch, lambda: self.rollout(m, batch, draws, grad=False).x0)
        return critic_loss(m, self.process, x0, batch["main"].cond, self.cfg.fake_times, draws)
