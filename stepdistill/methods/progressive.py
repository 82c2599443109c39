"""Progressive Distillation. Salimans & Ho, 2022. https://arxiv.org/abs/2202.00512

    every stage     n steps where the one before had 2n; student and previous start equal                    algorithm 2
    i ~ {1..n},  t, s = ends of step i on the grid of n steps,  h = their middle
    y = two DDIM jumps t -> h -> s of the stage before: the guided teacher, then `previous`
    x* = the x0 whose jump from x_t to s lands on y
    student <- max(SNR_t, 1)·|x*  - f(x_t, t)|²,   f = the x0 of a prediction                                 sec. 4
    at the end of a stage   previous <- student

Stages run from `start` steps of the teacher down to the student's own, whose times they divide into equal parts. The student follows the
ODE, so it is sampled with renoise 0 whatever the recipe says. Guidance is distilled in the first stage: later ones ask a student that has
learnt it. With a band of `guidance` each sample's w is drawn, and told to student and previous: stage two of Meng et al. (2210.03142).

Differs from the paper: the teacher stays and a third network is what changes, so that the first one is never spoilt, adapters work on one
base, and checkpoints hold everything a later stage needs; guidance as above, where the paper has none; times are those of the process
instead of a cosine schedule; the next stage begins at the student as trained, not at its average; flow students are weighted as all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.weighting import truncated_snr
from stepdistill.losses.distance import l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stage, Stream
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class ProgressiveConfig:
    """The paper starts at 1024 or 8192 steps; 64 or 128 are usual for latents."""

    start: int = 64                                 # steps of the teacher: those of the student times a power of two
    guidance: Band | None = None                    # of the teacher, told to the student; none is the recipe's number, learnt for good

    def __post_init__(self) -> None:
        if self.start < 2:
            raise ValueError(f"method.start must be at least 2, got {self.start}")


class Progressive(Method[ProgressiveConfig]):
    title, arxiv, family = "Progressive Distillation", "2202.00512", "progressive"
    Config, on_trajectories = ProgressiveConfig, True

    def __init__(self, cfg: ProgressiveConfig, setup: Setup):
        super().__init__(cfg, setup)
        last, halvings = len(setup.sampler.times), (cfg.start // len(setup.sampler.times)).bit_length() - 1
        if halvings < 1 or cfg.start != last << halvings:
            raise ValueError(f"method.start must be student.steps {last} times 2, 4, 8, ..., got {cfg.start}")
        self.counts = tuple(cfg.start >> k for k in range(1, halvings + 1))
        self.steps = self.counts[0]                 # of the student, in the stage that runs

    @classmethod
    def needs(cls, cfg: ProgressiveConfig) -> Mapping[str, Role]:
        inputs = ("w",) if cfg.guidance else ()
        return {"teacher": Role(), "student": Role(trains=True, inputs=inputs), "previous": Role(inputs=inputs)}

    @classmethod
    def data(cls, cfg: ProgressiveConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def stages(self, steps: int) -> Sequence[Stage]:
        """One per halving, those of two steps and one twice as long (appendix)."""
        shares = [2 if count <= 2 else 1 for count in self.counts]
        ends = [round(steps * sum(shares[:k]) / sum(shares)) for k in range(len(shares) + 1)]
        return [Stage(f"{count} steps", b - a, ("student",)) for count, (a, b) in zip(self.counts, pairwise(ends), strict=True)]

    def enter(self, stage: Stage, m: Roles) -> None:
        self.steps = int(stage.name.split()[0])
        if self.steps != self.counts[0]:
            m.follow("previous", "student", 0)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])

    def sampler(self) -> SamplerSpec:
        spec, band = replace(self.setup.sampler, renoise=0.0), self.cfg.guidance
        return replace(spec, inputs=("w",), guidance=band.holding(self.setup.guidance)) if band else spec

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) times from the sampler's first down to 0: its own steps in equal parts, float64."""
        parts = steps // len(self.setup.sampler.times)
        own = (*self.setup.sampler.times, 0.0)
        return torch.tensor([*(a + (b - a) * k / parts for a, b in pairwise(own) for k in range(parts)), 0.0], dtype=torch.float64)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, process = batch["real"].clean, batch["real"].cond, self.process
        i = 2 * draws.each("i").integers(self.steps)
        grid = self.grid(2 * self.steps).to(i.device)
        t, h, s = grid[i], grid[i + 1], grid[i + 2]
        x_t = process.add_noise(x0, draws.each("eps").normal_like(x0), t)
        guide = m.teacher if self.steps == self.counts[0] else m.previous
        told = {"w": self.cfg.guidance.sample(draws.each("w"))} if self.cfg.guidance else {}
        with torch.no_grad():
            y = jump(guide(jump(guide(x_t, t, cond, **told), process, h), h, cond, **told), process, s)
            kept = process.sigma(s) / process.sigma(t)                                  # of x_t in a jump to s
            target = (y - like(kept, y) * x_t) / like(process.alpha(s) - kept * process.alpha(t), y)
        f = m.student(x_t, t, cond, **told).x0
        error = l2(f, target)
        weight = truncated_snr(process.log_snr(t)).to(error)
        return Loss((weight * error).mean(), {"error": error.mean(), **level(f)})
