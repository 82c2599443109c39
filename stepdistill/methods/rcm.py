"""Score-regularised continuous-time consistency (rCM). Zheng et al., 2025. https://arxiv.org/abs/2510.08431

    every k-th step   student  <- |F - stop(F) - g|²                              sCM (2410.11081) on noised pictures x_t
                                + dmd_weight·(fake(x_s) - teacher(x_s)) / mean|x0 - teacher(x_s)|      on samples of its own
    every step        fake     <- denoise stop(x0)
    where             g        = cos·d/dtheta of the student's x0 along the guided teacher's ODE, warmed up and normalised
                      x0       = the last of n ~ 1..calls calls of the student, the first from noise, then from its x0 re-noised
                                 to random times, each below the one before

sCM keeps the variety and blurs, the score difference sharpens and drops modes. One call of the student carries the gradient, on [x_t; the
state of its last call].

Both terms are means over elements. The authors' code sums, weighs sCM by 100 and normalises g by its plain norm: its own balance is
`dmd_weight` sqrt(numel)/50 here, 29 for their videos at 480p and 6 for one frame of 16x60x104.

Differs from the authors' code: sCM's own warm-up, which is the same once over, with both terms from the first update on; n is drawn, not
counted; the fake score learns in the student's step, too, from that step's sample, and in the space the network speaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, call, start
from stepdistill.diffusion.times import LogNormal, Uniform
from stepdistill.losses.consistency import moved_by, normalised, trig_output
from stepdistill.losses.matching import matching_loss
from stepdistill.losses.reported import level, score_gap
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.methods.continuous import tangent
from stepdistill.methods.critic import alternating, critic_loss, handed_on
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles
from stepdistill.models.tangent import Derivative


@dataclass(frozen=True)
class RCMConfig:
    """Defaults are the authors' for Wan 2.1 1.3B, whose guidance 5 is our 6.

    Their shift of 5 is that of sigma itself; `dmd_times` are shifted before the process shifts them again, so a folder of Wan that is
    shifted by 3 takes 5/3.
    """

    times: LogNormal = LogNormal(0.7, 1.6)          # of k = sigma/alpha in the sCM term
    data_std: float = 1.0                           # sd
    warmup: int = 1000                              # student updates until the tangent counts in full; 0: at once
    c: float = 0.1                                  # of the normalisation
    derivative: Derivative = "jvp"                  # difference: for networks without a forward mode
    dmd_weight: float = 1.0                         # see above
    calls: int = 4                                  # most calls of a sample in training
    fake_updates: int = 5                           # fake-score updates per student update
    dmd_times: Uniform = Uniform(0.001, 0.999, 5.0)  # of the re-noised states, of s and of the fake score's update

    def __post_init__(self) -> None:
        if self.data_std <= 0 or self.c <= 0 or self.warmup < 0:
            raise ValueError("method.data_std and method.c must be positive, and method.warmup cannot be negative")
        if self.dmd_weight <= 0:
            raise ValueError(f"method.dmd_weight must be positive, got {self.dmd_weight}: without that term it is method scm")
        if self.calls < 1 or self.fake_updates < 1:
            raise ValueError("method.calls and method.fake_updates must be at least 1")


class RCM(Method[RCMConfig]):
    title, arxiv, family = "Score-regularised continuous-time consistency (rCM)", "2510.08431", "consistency"
    Config = RCMConfig

    @classmethod
    def needs(cls, cfg: RCMConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    @classmethod
    def data(cls, cfg: RCMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=1.0)

    @torch.no_grad()
    def last_state(self, m: Roles, cond: Conditioning, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x, t), t (B,): what the last call of a training sample sees."""
        spec, process = self.sampler(), self.process
        x = start(process, spec, draws.each("start").normal(*self.setup.shape))
        t = torch.full((len(x),), spec.times[0], dtype=torch.float64, device=x.device)
        for i in range(int(draws.shared("calls").integers(self.cfg.calls))):
            x0 = call(m.student, spec, x, t, cond).x0
            t = torch.minimum(t, self.cfg.dmd_times.sample(draws.each(f"t/{i}")))
            x = process.add_noise(x0, draws.each(f"renoise/{i}").normal_like(x0), t)
        return x, t

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        real, cfg, process = batch["real"], self.cfg, self.process
        count, cond = len(real.clean), real.cond
        share = min(1.0, draws.step // cfg.fake_updates / cfg.warmup) if cfg.warmup else 1.0
        x_t, t, g = tangent(m, process, real.clean, cond, cfg.times, cfg.data_std, share, draws, derivative=cfg.derivative)
        g, size = normalised(g, cfg.c)
        x, at = self.last_state(m, cond, draws)
        pred = m.student(torch.cat([x_t, x]), torch.cat([t, at]), cond.cat(cond))
        scm = moved_by(trig_output(pred.rows(slice(count)), cfg.data_std), g).mean()
        x0, bound = pred.rows(slice(count, None)).x0, self.sampler().clip_x0
        x0 = x0 if bound is None else x0.clamp(-bound, bound)
        batch.scratch["x0"] = x0.detach()
        s = cfg.dmd_times.sample(draws.each("s"))
        x_s = process.add_noise(x0.detach(), draws.each("dmd/eps").normal_like(x0), s)
        with torch.no_grad():
            told, fake = m.teacher(x_s, s, cond).x0, m.fake(x_s, s, cond).x0
        pull = matching_loss(x0, toward=told, away_from=fake)
        log = {"tangent": size.mean(), "pull": pull, **score_gap(fake, told, s), **level(x0)}
        return Loss(scm + cfg.dmd_weight * pull, log)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["real"].cond
        x0 = handed_on(batch, lambda: call(m.student, self.sampler(), *self.last_state(m, cond, draws), cond).x0)
        return critic_loss(m, self.process, x0, cond, self.cfg.dmd_times, draws)
