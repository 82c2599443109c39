"""Target-Driven Distillation. Wang et al., 2024. https://arxiv.org/abs/2409.01347

    n ~ {1..N},  t = n/N,  r = (n - 1)/N
    s ~ the times that 4- to 8-step samplers visit, from the largest one not above r to `window` below it;   s <- (1 - eta·U)·s
    x_t = alpha_t·x0 + sigma_t·eps,   x_r = one DDIM step of the guided teacher from x_t to r
    student <- d( J(x_t, t -> s), stop J(x_r, r -> s) ),   J(x, r -> r) = x

Guidance is decoupled: a share of the updates has the null condition, where the guided teacher is the unguided one. The student then knows
both S(cond) = null + g·(cond - null) and S(null) = null, and sampling it with guidance h gives the teacher's at h·g.

Sampling falls to (1 - eta)·next and noises up to next, with the eta of training (renoise is eta whatever the recipe says). Its times are
those of the target set: equal steps move up to the grid (four are 999, 751, 499, 251 of a 1000-step table), and `student.times` names any
others, [1, 0.876, 0.752, 0.5, 0.252] say. One student can be sampled in every number of steps that the set is made for (--steps). x0 is
clipped by `student.clip_x0`, eps recomputed from it.

Differs from the paper: conditions are dropped by whole batches, not sample by sample, since null conditions may have another length; s is
not rounded to a training index; x0 clipping is a fixed bound at every step, where the authors take a quantile at the first ones; no
adversarial term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import neighbours, trailing
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stream
from stepdistill.methods.critic import dropped
from stepdistill.methods.pair import pair
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class TDDConfig:
    """Defaults are the paper's for SDXL, whose guidance was 4.5."""

    points: int = 250                               # N, of the whole range; in bfloat16 rounding outweighs so small a step: take 40
    fewest: int = 4                                 # the target set: equal steps of samplers with this many ...
    most: int = 8                                   # ... to this many calls
    window: float = 0.26                            # of targets below r, about one step of the fewest
    eta: float = 0.3                                # how far below a time of the set the target may fall; the sampler's, too
    dropout: float = 0.2                            # of conditions, by whole batches; 0 gives up guidance at inference
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most <= self.points:
            raise ValueError("method.fewest, method.most and method.points must rise from 1, "
                             f"got {self.fewest}, {self.most}, {self.points}")
        if not 0 <= self.eta <= 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"method.eta must lie in [0, 1] and method.dropout in [0, 1), got {self.eta} and {self.dropout}")
        if self.window < 0 or self.huber < 0:
            raise ValueError("method.window and method.huber cannot be negative")


def on_grid(times: Sequence[float], points: int) -> tuple[float, ...]:
    """Each time moved up to the next point n/points."""
    return tuple(math.ceil(t * points - 1e-6) / points for t in times)


class TDD(Method[TDDConfig]):
    title, arxiv, family = "Target-Driven Distillation", "2409.01347", "consistency"
    Config, on_trajectories = TDDConfig, True

    def __init__(self, cfg: TDDConfig, setup: Setup):
        super().__init__(cfg, setup)
        visited = {t for count in range(cfg.fewest, cfg.most + 1) for t in on_grid(trailing(count), cfg.points)}
        self.targets = torch.tensor(sorted({0.0, *visited} - {1.0}), dtype=torch.float64)

    @classmethod
    def needs(cls, cfg: TDDConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True)}

    @classmethod
    def data(cls, cfg: TDDConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def without_null(self) -> str | None:
        return "set method.dropout to 0" if self.cfg.dropout else None

    @property
    def built_in(self) -> float:
        return 1.0 if self.cfg.dropout else super().built_in

    def sampler(self) -> SamplerSpec:
        cfg, own = self.cfg, on_grid(self.setup.sampler.times, self.cfg.points)
        grids = tuple(on_grid(trailing(n), cfg.points) for n in range(cfg.fewest, cfg.most + 1) if n != len(own))
        return replace(self.setup.sampler, times=own, renoise=cfg.eta, grids=grids)

    def target_below(self, r: Tensor, draws: Draws) -> Tensor:
        """s (B,) <= r (B,): a member of the set, drawn evenly within the window, then moved down by a share of at most eta."""
        members = self.targets.to(r.device)
        last = torch.searchsorted(members, r, right=True) - 1
        first = torch.searchsorted(members, members[last] - self.cfg.window - 1e-9)
        chosen = first + (draws.each("s").uniform() * (last - first + 1)).long()
        return members[chosen] * (1 - self.cfg.eta * draws.each("eta").uniform())

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cfg = batch["real"].clean, self.cfg
        cond = dropped(batch["real"].cond, cfg.dropout, draws)
        t, r = neighbours(draws.each("n"), cfg.points)
        s = self.target_below(r, draws)
        pred, target = pair(m, self.process, x0, cond, t, r, s, draws, target=m.student)
        landing = jump(pred, self.process, s)
        distance = huber_or_l2(landing, target, cfg.huber).mean()
        return Loss(distance, {"distance": distance, **level(pred.x0)})
