"""Latent Consistency Models. Luo et al., 2023. https://arxiv.org/abs/2310.04378

    n ~ {1..N},  t = n/N,  r = (n - k)/N or 0,  w ~ [low, high]                                              algorithm 1
    x_t = alpha_t·x0 + sigma_t·eps,   x_r = one DDIM step of the teacher, guided with w, from x_t to r       sec. 4.2, 4.3
    student <- d( f(x_t, t, w), stop f_target(x_r, r, w) ),   f = the jump to t = 0,   f(x, 0) = x

With `embed` the student is told w, which is then chosen when it samples (sec. 4.2). Without, the default, it learns the average over the
band, and the target is the student itself: the form of LCM-LoRA (2311.05556), and the only one for adapters. `points: 1000, skip: 20` is
the paper's schedule, and the default that of its distillation script.

Differs from the paper: the boundary is the process's own (the jump to t = 0) instead of c_skip and c_out; the lowest interval ends clean,
not at training index 0; the mean over elements of pseudo-Huber, as in the script; DDIM is the only solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

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
class LCMConfig:
    """Defaults are those of the public scripts."""

    points: int = 50                                # N, of the whole range
    skip: int = 1                                   # k: how many of them one step of the teacher spans
    guidance: Band | None = None                    # of the teacher; SD1.5 took 6 to 16, SDXL 4 to 16; none is the recipe's number
    embed: bool = False                             # tell the student w
    target: Literal["student", "ema"] = "student"   # whose f is the target: "ema" in full fine-tuning, at 0.95
    target_decay: float = 0.95
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2

    def __post_init__(self) -> None:
        if self.embed and self.guidance is None:
            raise ValueError("method.embed tells the student what is drawn from method.guidance: name its low and high")
        if not 1 <= self.skip < self.points:
            raise ValueError(f"method.skip must be at least 1 and below method.points, got {self.skip} of {self.points}")
        if not 0 <= self.target_decay < 1 or self.huber < 0:
            raise ValueError("method.target_decay must lie in [0, 1) and method.huber cannot be negative")


class LCM(Method[LCMConfig]):
    title, arxiv, family = "Latent Consistency Models", "2310.04378", "consistency"
    Config, on_trajectories = LCMConfig, True

    @classmethod
    def needs(cls, cfg: LCMConfig) -> Mapping[str, Role]:
        inputs = ("w",) if cfg.embed else ()
        target = {"target": Role(inputs=inputs)} if cfg.target == "ema" else {}
        return {"teacher": Role(), "student": Role(trains=True, inputs=inputs), **target}

    @classmethod
    def data(cls, cfg: LCMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def sampler(self) -> SamplerSpec:
        if self.cfg.guidance is None or not self.cfg.embed:
            return self.setup.sampler
        return replace(self.setup.sampler, inputs=("w",), guidance=self.cfg.guidance.holding(self.setup.guidance))

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, cfg = batch["real"].clean, batch["real"].cond, self.cfg
        t, r = neighbours(draws.each("n"), cfg.points, cfg.skip)
        clean = torch.zeros_like(t)
        pred, target = pair(m, self.process, x0, cond, t, r, clean, draws, target=m.target if cfg.target == "ema" else m.student,
                            guidance=cfg.guidance, tell=cfg.embed)
        f = jump(pred, self.process, clean)
        distance = huber_or_l2(f, target, cfg.huber).mean()
        return Loss(distance, {"distance": distance, **level(f)})

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        if self.cfg.target == "ema":
            m.follow("target", "student", self.cfg.target_decay)
