"""What a network output means: y = a·x0 + b·eps. With x_t = alpha·x0 + sigma·eps that is a 2x2 system, solved in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepdistill.diffusion.process import at_least_float32, like

Pair = tuple[Tensor, Tensor]


def _edm(sigma_data: float) -> Callable[[Tensor, Tensor], Pair]:
    """EDM's raw output F = (x0 - c_skip·y)/c_out at y = x_t/alpha (Karras et al. 2022, table 1), finite also where alpha is 0."""

    def pair(alpha: Tensor, sigma: Tensor) -> Pair:
        root = (sigma.square() + (sigma_data * alpha).square()).sqrt()
        return sigma / (sigma_data * root), -sigma_data * alpha / root

    return pair


COEFFICIENTS: dict[str, Callable[[Tensor, Tensor], Pair]] = {            # (a, b) at signal alpha and noise sigma
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
    "edm": _edm(0.5),
}


def solve(a: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor, x_t: Tensor, y: Tensor) -> Pair:
    """Recover (x0, eps) from one output y = a·x0 + b·eps. Coefficients are float64 and shaped to broadcast over x_t."""
    det = alpha * b - sigma * a
    c = lambda value: like(value / det, x_t)                             # noqa: E731  the one cast to the state's dtype
    return c(b) * x_t - c(sigma) * y, c(alpha) * y - c(a) * x_t


@dataclass(frozen=True)
class Prediction:
    """A network output at x_t, readable in every space.

    `raw` and `x_t` are (B, ...), float32 or float64; `alpha` and `sigma` are float64, scalar or (B,). Conversions happen on demand and
    the raw output is returned untouched in the space the network speaks, so an x0 network at sigma = 0 does not divide.
    `features` are what the taps read while the network ran (empty unless asked for).
    """

    raw: Tensor
    kind: str
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    features: tuple[Tensor, ...] = ()

    @cached_property
    def _pair(self) -> Pair:
        a, b = COEFFICIENTS[self.kind](self.alpha, self.sigma)
        return solve(a, b, self.alpha, self.sigma, self.x_t, self.raw)

    @property
    def x0(self) -> Tensor:
        """The clean sample, E[x0 | x_t] for a denoiser."""
        return self.raw if self.kind == "x0" else self._pair[0]

    @property
    def eps(self) -> Tensor:
        """The noise."""
        return self.raw if self.kind == "eps" else self._pair[1]

    @property
    def v(self) -> Tensor:
        """alpha·eps - sigma·x0 (Salimans & Ho 2022)."""
        return self.to("v")

    @property
    def velocity(self) -> Tensor:
        """eps - x0, the velocity of the flow process."""
        return self.to("flow")

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps/sigma."""
        return -self.eps / like(self.sigma, self.x_t)

    def rows(self, rows: slice) -> Prediction:
        """The prediction (and features) of some samples of the batch."""
        alpha, sigma = (c[rows] if c.ndim else c for c in (self.alpha, self.sigma))
        return Prediction(self.raw[rows], self.kind, self.x_t[rows], alpha, sigma, tuple(f[rows] for f in self.features))

    def to(self, kind: str) -> Tensor:
        """The same prediction in another space of COEFFICIENTS."""
        if kind == self.kind:
            return self.raw
        a, b = COEFFICIENTS[kind](self.alpha, self.sigma)
        return combine(a, b, self.x0, self.eps)


def combine(a: Tensor, b: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """a·x0 + b·eps with float64 coefficients (B,) cast to the state's dtype."""
    return like(a, x0) * x0 + like(b, x0) * eps


def target(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this kind should have said for known x0 and eps."""
    a, b = COEFFICIENTS[kind](alpha, sigma)
    return combine(a, b, at_least_float32(x0), at_least_float32(eps))


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """A prediction that says x0: after editing x0 (clipping, guidance rescale) eps is recomputed from it, never kept."""
    return Prediction(x0, "x0", at_least_float32(x_t), alpha, sigma)
