"""Simplified and stabilised continuous-time consistency (sCM). Lu & Song, 2024. https://arxiv.org/abs/2410.11081

    ln k ~ N(mean, std²),  k = sigma/alpha at t,  theta = atan(k/sd),  x_t = alpha_t·x0 + sigma_t·eps                  algorithm 1
    g = -cos²·(sd·F - dx/dtheta) - r·cos·sin·(x + sd·dF/dtheta),  r = min(1, update/warmup),  g <- g/(|g| + c)
    student <- exp(-v)·w·|F - stop(F) - g|² + v,   w = 1/(sd·tan(theta)),  v = a learned log-variance at k, or 0

F is the student's output in TrigFlow, dx/dtheta = sd·F of the guided teacher (`velocity: data`: cos·sd·eps - sin·x0, consistency training
without a teacher), dF/dtheta one forward-mode product along it. The value of the loss says nothing; `tangent`, |g| before it is normalised,
should fall.

The process stays the teacher's: a VP process differs from TrigFlow by time alone, flow matching and EDM by the scale of the state, too, so
x, F and the angle are read off predictions (losses/consistency.py), exactly. The student keeps the teacher's clock and starts as the
teacher. The paper trains its teachers with a slow time embedding, SANA-Sprint tunes one in first; neither is done here, and a clock
of 0..999 leaves dF/dtheta larger than it need be.

SANA-Sprint's adversarial term, and its share of samples at the largest time, are not here.

Differs from the paper: |g| is the root mean square; v sees ln(k)/4, as in EDM2, begins at 0, and is off by default. As g is normalised
its optimum is known, exp(v) = the mean of w·(|g|/(|g| + c))²: it takes w back, which is `weight: even`, and raises what c holds down where
the tangent is small. On the two modes of the tests 800 updates of 256 leave an error of .18 without it (two seeds), .48 with even weights,
and .23, .38 and .84 with it, by seed and by the rate of v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import LogNormal
from stepdistill.losses.consistency import moved_by, normalised, trig_output
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.methods.continuous import Velocity, tangent
from stepdistill.models.roles import Role, Roles
from stepdistill.models.tangent import Derivative


@dataclass(frozen=True)
class SCMConfig:
    """Defaults are the paper's for CIFAR-10 and ImageNet 64x64, whose pixels have a standard deviation of 0.5."""

    times: LogNormal = LogNormal(-1.0, 1.4)         # of k = sigma/alpha
    data_std: float = 0.5                           # sd; near 1 for latents
    warmup: int = 10_000                            # updates until the tangent counts in full; 0: at once
    c: float = 0.1                                  # of the normalisation
    weight: Literal["tan", "even"] = "tan"          # w: 1/(sd·tan(theta)), or 1
    adaptive_weight: bool = False                   # learn v, as the paper does; see above
    velocity: Velocity = "teacher"                  # whose dx/dtheta
    derivative: Derivative = "jvp"                  # difference: for networks without a forward mode

    def __post_init__(self) -> None:
        if self.data_std <= 0 or self.c <= 0 or self.warmup < 0:
            raise ValueError("method.data_std and method.c must be positive, and method.warmup cannot be negative")


class SCM(Method[SCMConfig]):
    title, arxiv, family = "Continuous-time consistency (sCM)", "2410.11081", "consistency"
    Config, on_trajectories = SCMConfig, True

    @classmethod
    def needs(cls, cfg: SCMConfig) -> Mapping[str, Role]:
        teacher = {"teacher": Role()} if cfg.velocity == "teacher" else {}
        variance = {"variance": Role(source="variance", trains=True)} if cfg.adaptive_weight else {}
        return {**teacher, "student": Role(trains=True), **variance}

    @classmethod
    def data(cls, cfg: SCMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        return (Update("student", ("student", "variance") if self.cfg.adaptive_weight else ("student",)),)

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=1.0)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        real, cfg = batch["real"], self.cfg
        share = min(1.0, draws.step / cfg.warmup) if cfg.warmup else 1.0
        x_t, t, g = tangent(m, self.process, real.clean, real.cond, cfg.times, cfg.data_std, share, draws, velocity=cfg.velocity,
                            derivative=cfg.derivative)
        g, size = normalised(g, cfg.c)
        pred = m.student(x_t, t, real.cond)
        loss = moved_by(trig_output(pred, cfg.data_std), g)
        if cfg.weight == "tan":
            loss = loss * (pred.alpha / pred.sigma).to(loss)                # 1/(sd·tan(theta)) = 1/k
        log = {"tangent": size.mean(), **level(pred.x0)}
        if not cfg.adaptive_weight:
            return Loss(loss.mean(), log)
        v = m.variance(pred.alpha, pred.sigma)
        return Loss(((-v).exp() * loss + v).mean(), {**log, "log_variance": v.mean()})
