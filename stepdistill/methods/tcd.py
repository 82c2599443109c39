"""Trajectory Consistency Distillation. Zheng et al., 2024. https://arxiv.org/abs/2402.19159

    n ~ {1..N},  t = n/N,  r = (n - k)/N or 0,  s ~ {0, 1/N, .., r},  w ~ [low, high]
    x_t = alpha_t·x0 + sigma_t·eps,   x_r = one DDIM step of the teacher, guided with w, from x_t to r
    student <- d( J(x_t, t -> s), stop J_target(x_r, r -> s) ),   J(x, r -> r) = x
    where      J is the network's own jump: alpha_s·x0 + sigma_s·eps of its prediction

s = 0 alone is LCM. The network is not told s, so one prediction must serve every target: the optimum is a compromise, and many
deterministic steps come out too wide. Sampling takes that back with fresh noise (renoise is gamma whatever the recipe says): fall to
(1 - gamma)·next, noise up to next.

Differs from the paper, which published no training code: the target is the student itself by default; first-order jumps; the lowest
interval ends clean, not at training index 0; pseudo-Huber as in LCM's script.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import neighbours
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.methods.pair import pair
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class TCDConfig:
    """Defaults of the grid and the distance are LCM's, which the paper distils with."""

    points: int = 50                                # N, of the whole range
    skip: int = 1                                   # k: how many of them one step of the teacher spans
    guidance: Band | None = None                    # of the teacher; none is the recipe's number
    gamma: float = 0.3                              # of the sampler: 0 follows the ODE, 1 re-noises x0; more for more steps
    target: Literal["student", "ema"] = "student"   # whose jump is the target
    target_decay: float = 0.95
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2

    def __post_init__(self) -> None:
        if not 1 <= self.skip < self.points:
            raise ValueError(f"method.skip must be at least 1 and below method.points, got {self.skip} of {self.points}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"method.gamma must lie in [0, 1], got {self.gamma}")
        if not 0 <= self.target_decay < 1 or self.huber < 0:
            raise ValueError("method.target_decay must lie in [0, 1) and method.huber cannot be negative")


class TCD(Method[TCDConfig]):
    title, arxiv, family = "Trajectory Consistency Distillation", "2402.19159", "consistency"
    Config, on_trajectories = TCDConfig, True

    @classmethod
    def needs(cls, cfg: TCDConfig) -> Mapping[str, Role]:
        target = {"target": Role()} if cfg.target == "ema" else {}
        return {"teacher": Role(), "student": Role(trains=True), **target}

    @classmethod
    def data(cls, cfg: TCDConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=self.cfg.gamma)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, cfg = batch["real"].clean, batch["real"].cond, self.cfg
        t, r = neighbours(draws.each("n"), cfg.points, cfg.skip)
        s = (draws.each("s").uniform() * (r * cfg.points + 1)).floor() / cfg.points
        pred, target = pair(m, self.process, x0, cond, t, r, s, draws, target=m.target if cfg.target == "ema" else m.student,
                            guidance=cfg.guidance)
        landing = jump(pred, self.process, s)
        distance = huber_or_l2(landing, target, cfg.huber).mean()
        return Loss(distance, {"distance": distance, **level(pred.x0)})

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        if self.cfg.target == "ema":
            m.follow("target", "student", self.cfg.target_decay)
