"""Consistency distillation. Song et al., 2023. https://arxiv.org/abs/2303.01469

    n ~ {1..N},  t = n/N,  r = (n-1)/N                                                                       algorithm 2
    x_t = alpha_t·x0 + sigma_t·eps,   x_r = one solver step of the guided teacher from x_t to r
    student <- d( f(x_t, t), stop f_target(x_r, r) ),   f = the jump to t = 0,   f(x, 0) = x
    target  <- decay·target + (1 - decay)·student                                                            (decay 0: the student itself)

1/N is the skip interval (LCM's k, in units of the whole range). The boundary needs no c_skip and c_out: f is the jump to t = 0, which from
there is x whatever the network says. A network that speaks x0 cannot know it and is not asked.

Differs from the paper: equal steps of t on the teacher's own process instead of EDM's Karras grid, pseudo-Huber instead of LPIPS, and
the teacher may be guided (LCM, Luo et al. 2023), the student learning that one guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import heun, jump, jump_or_stay
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class ConsistencyConfig:
    """Defaults follow the paper; `solver` (heun there), `huber` and `intervals` follow LCM."""

    intervals: int = 50                             # N: the skip interval is 1/N
    target: Literal["ema", "student"] = "ema"       # whose f is the target
    target_decay: float = 0.95
    solver: Literal["ddim", "heun"] = "ddim"        # heun calls the teacher twice
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2

    def __post_init__(self) -> None:
        if self.intervals < 2:
            raise ValueError(f"method.intervals must be at least 2, got {self.intervals}")
        if not 0 <= self.target_decay < 1 or self.huber < 0:
            raise ValueError("method.target_decay must lie in [0, 1) and method.huber cannot be negative")


class Consistency(Method[ConsistencyConfig]):
    title, arxiv, family = "Consistency distillation", "2303.01469", "consistency"
    Config, on_trajectories = ConsistencyConfig, True

    @classmethod
    def needs(cls, cfg: ConsistencyConfig) -> Mapping[str, Role]:
        target = {"target": Role()} if cfg.target == "ema" else {}
        return {"teacher": Role(), "student": Role(trains=True), **target}

    @classmethod
    def data(cls, cfg: ConsistencyConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, cfg = batch["real"].clean, batch["real"].cond, self.cfg
        n = 1 + draws.each("n").integers(cfg.intervals)
        t, r = n.double() / cfg.intervals, (n - 1).double() / cfg.intervals
        x_t = self.process.add_noise(x0, draws.each("eps").normal_like(x0), t)
        with torch.no_grad():
            pred = m.teacher(x_t, t, cond)
            x_r = jump(pred, self.process, r) if cfg.solver == "ddim" else heun(
                lambda x, at: m.teacher(x, at, cond), pred, self.process, r)
            clean = torch.zeros_like(r)
            target = jump_or_stay((m.target if cfg.target == "ema" else m.student)(x_r, r, cond), self.process, r, clean)
        f = jump(m.student(x_t, t, cond), self.process, clean)
        distance = huber_or_l2(f, target, cfg.huber).mean()
        return Loss(distance, {"distance": distance, **level(f)})

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        if self.cfg.target == "ema":
            m.follow("target", "student", self.cfg.target_decay)
