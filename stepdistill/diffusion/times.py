"""Distributions of t and grids of times. t is in [0, 1], 1 noisiest; training index n of an N-step table sits at t = (n+1)/N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Noise


def shift(u: Tensor, m: float) -> Tensor:
    """m·u/(1 + (m-1)·u): more noise for m > 1 (SD3, sec. 5.3.2)."""
    return m * u / (1 + (m - 1) * u)


@dataclass(frozen=True)
class Uniform:
    """t uniform on [low, high], then shifted. The bounds are in the unshifted variable."""

    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or self.shift <= 0:
            raise ValueError(f"times need 0 <= low <= high <= 1 and shift > 0, got {self.low}, {self.high}, {self.shift}")

    def sample(self, noise: Noise) -> Tensor:
        """(B,) float64, or a scalar for shared draws."""
        return shift(noise.uniform(self.low, self.high), self.shift)

    def holds(self, other: Uniform) -> bool:
        """Whether this may draw every time that the other may."""
        (low, high), (theirs, top) = (shift(torch.tensor((u.low, u.high), dtype=torch.float64), u.shift).tolist() for u in (self, other))
        return low <= theirs and top <= high

    def below(self, t: float) -> Uniform:
        """The same, cut off at time t in (0, 1]: the bounds move in the unshifted variable, and what is drawn stays below t."""
        u = float(shift(torch.tensor(t, dtype=torch.float64), 1 / self.shift))
        return replace(self, low=min(self.low, u), high=min(self.high, u))


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std·z) (SD3, sec. 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, noise: Noise) -> Tensor:
        """(B,) float64, or a scalar for shared draws."""
        return torch.sigmoid(self.mean + self.std * noise.normal(dtype=torch.float64))


@dataclass(frozen=True)
class LogNormal:
    """kappa = sigma/alpha with ln kappa = mean + std·z (EDM, Karras et al. 2022, table 1)."""

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"a log-normal law needs std > 0, got {self.std}")

    def sample(self, noise: Noise) -> Tensor:
        """(B,) float64 in (0, inf), or a scalar for shared draws."""
        return (self.mean + self.std * noise.normal(dtype=torch.float64)).exp()

    def share(self, kappa: Tensor) -> Tensor:
        """P(at most kappa) up to a constant factor and summand, as iCT weighs its intervals: erf((ln kappa - mean)/(sqrt(2)·std))."""
        return torch.erf((kappa.log() - self.mean) / (math.sqrt(2) * self.std))


def neighbours(noise: Noise, points: int, skip: int = 1) -> tuple[Tensor, Tensor]:
    """(t, r): a point of the grid n/points, drawn evenly above 0, and the one `skip` below it, or 0 (LCM, Luo et al. 2023).

    float64, (B,) or scalars. Fifty points of a 1000-step table are the indices 19, 39, ..., 999.
    """
    n = 1 + noise.integers(points)
    return n.double() / points, (n - skip).clamp_min(0).double() / points


def check_boundaries(boundaries: Sequence[float]) -> None:
    """ValueError unless these times between experts fall strictly within (0, 1)."""
    if not all(0 < later < earlier for earlier, later in pairwise((1.0, *boundaries))):
        raise ValueError(f"boundaries between experts must fall strictly within (0, 1), got {tuple(boundaries)}")


def trailing(count: int, shift_by: float = 1.0) -> tuple[float, ...]:
    """1, 1 - 1/n, ..., 1/n, shifted: diffusers' "trailing" grid. Four steps of a 1000-step table are indices 999, 749, 499, 249."""
    if count < 1:
        raise ValueError(f"a grid needs at least one step, got {count}")
    return tuple(float(shift(torch.tensor(1 - i / count, dtype=torch.float64), shift_by)) for i in range(count))


def index_grid(indices: tuple[int, ...], table: int) -> tuple[float, ...]:
    """Table indices (999, 749, ...) as times."""
    if any(not 0 <= n < table for n in indices):
        raise ValueError(f"table indices must lie in 0..{table - 1}, got {indices}")
    return tuple((n + 1) / table for n in indices)


def to_index(t: float, table: int) -> int:
    """The table index at time t; raises where t is not a training step (a stock discrete scheduler cannot be told such a time)."""
    n = t * table - 1
    if abs(n - round(n)) > 1e-6 or not 0 <= round(n) < table:
        raise ValueError(f"time {t} is not a step of a {table}-step table; the nearest is {min(max(1, round(t * table)), table) / table}")
    return round(n)


def lcm_grid(count: int, original: int = 50, table: int = 1000) -> tuple[float, ...]:
    """LCMScheduler's times: every (original/count)-th of the training points j·table/original - 1, from the top (LCM, Luo et al. 2023)."""
    if not 1 <= count <= original:
        raise ValueError(f"the LCM grid has 1 to {original} steps, got {count}")
    points = [j * (table // original) - 1 for j in range(1, original + 1)][::-1]
    stride = original / count                                            # divided first, as the scheduler does: its rounding is then ours
    return index_grid(tuple(points[math.floor(i * stride)] for i in range(count)), table)
