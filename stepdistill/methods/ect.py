"""Consistency Models Made Easy: Easy Consistency Tuning (ECT). Geng et al., 2024. https://arxiv.org/abs/2406.14548

    ln k_t ~ N(mean, std²),   k_r = max(0, k_t·(1 - q^-(m+1)·(1 + 8·sigmoid(-k_t)))),   m = update // double_every
    x_t, x_r = the same x0 and eps at the times of k_t and k_r,   k = sigma/alpha
    student <- d( f(x_t, t), stop f(x_r, r) ) / (k_t - k_r),   f = the x0 of a prediction;   x0 itself where k_r = 0

The student starts as the teacher, and no teacher is asked: it is tuned from pictures alone, without guidance. At first r is half of t or 0,
which is denoising; every `double_every` updates the gap shrinks by q. `q: 256` with one stage is the authors' one-hour recipe.

`curriculum: ict` is improved consistency training (Song & Dhariwal 2023, 2310.14189) on the same loss: a Karras grid of 10·2^m intervals,
at most 1280, (k_r, k_t) neighbours on it that follow the log-normal law, and `huber: null` for its c = 0.00054·sqrt(dim).

Differs from the papers: the process is the teacher's, whatever it is, and a k beyond its ends (or iCT's 80) is that end; the boundary is
the process's own, so f needs no c_skip and c_out; the lowest interval of iCT's grid ends clean, not at k = 0.002; k_r stays below
0.999·k_t, beyond which float32 rounds the gap away. There is no dropout, which the papers use: every network here is loaded without it, so
that student and target see one function. RAdam and its rate are the recipe's business. ECT's form with a teacher's step from x_t to x_r is
`consistency`; the original consistency training, with its own N(k) and a moving average, is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Karras, like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import LogNormal
from stepdistill.losses.distance import pseudo_huber_norm
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stream
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class ECTConfig:
    """Defaults are the paper's for CIFAR-10, whose pixels have a standard deviation of 0.5."""

    times: LogNormal = LogNormal(-1.1, 2.0)         # of k_t
    curriculum: Literal["ect", "ict"] = "ect"       # how k_r follows from k_t
    q: float = 2.0                                  # ect: the gap's share of k_t begins near 1/q and falls by q
    double_every: int = 25_000                      # updates after which the gap shrinks
    huber: float | None = 0.0                       # c of pseudo-Huber; 0 is the plain norm, null 0.00054·sqrt(dim)

    def __post_init__(self) -> None:
        if self.q <= 1 or self.double_every < 1:
            raise ValueError(f"method.q must be above 1 and method.double_every at least 1, got {self.q} and {self.double_every}")
        if self.huber is not None and self.huber < 0:
            raise ValueError("method.huber cannot be negative")


def ect_below(k: Tensor, stage: int, q: float) -> Tensor:
    """k_r (B,) below k (B,), 0 where it would fall further and never within a thousandth of k."""
    return (k * (1 - (q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-k))).clamp_min(1e-3))).clamp_min(0)


def ict_pair(u: Tensor, stage: int, times: LogNormal, end: float = 80.0) -> tuple[Tensor, Tensor]:
    """(k_t, k_r), each (B,): the interval of the stage's Karras grid up to `end` on which the law's quantile u (B,) in [0, 1) lies."""
    intervals = min(10 * 2**stage, 1280)
    grid = Karras(sigma_max=end).sigma(torch.linspace(0, 1, intervals + 1, dtype=torch.float64, device=u.device))
    share = times.share(grid)
    upper = torch.searchsorted(share, share[0] + u * (share[-1] - share[0]), right=True).clamp(1, intervals)
    return grid[upper], torch.where(upper == 1, 0.0, grid[upper - 1])


class ECT(Method[ECTConfig]):
    title, arxiv, family = "Consistency Models Made Easy", "2406.14548", "consistency"
    Config, on_trajectories = ECTConfig, True

    def __init__(self, cfg: ECTConfig, setup: Setup):
        super().__init__(cfg, setup)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self.ends = (setup.process.sigma(t) / setup.process.alpha(t)).tolist()

    @classmethod
    def needs(cls, cfg: ECTConfig) -> Mapping[str, Role]:
        return {"student": Role(trains=True)}

    @classmethod
    def data(cls, cfg: ECTConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def levels(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """(k_t, k_r), each (B,), at this update's stage."""
        cfg, stage, (low, high) = self.cfg, draws.step // self.cfg.double_every, self.ends
        if cfg.curriculum == "ict":
            return ict_pair(draws.each("k").uniform(), stage, cfg.times, min(80.0, high))
        k = cfg.times.sample(draws.each("k")).clamp(low, high)
        return k, ect_below(k, stage, cfg.q)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond = batch["real"].clean, batch["real"].cond
        eps, (k_t, k_r) = draws.each("eps").normal_like(x0), self.levels(draws)
        t, r = (self.process.time_of(-2 * k.log()) for k in (k_t, k_r))
        with torch.no_grad():
            target = m.student(self.process.add_noise(x0, eps, r), r, cond).x0
            target = torch.where(like(k_r == 0, target).bool(), x0.to(target), target)
        f = m.student(self.process.add_noise(x0, eps, t), t, cond).x0
        norm = pseudo_huber_norm(f, target, self.cfg.huber)
        return Loss((norm / (k_t - k_r).to(norm)).mean(), {"distance": norm.mean(), **level(f)})
