"""Distances between predictions, per sample: tensors (B, ...) in, (B,) out, computed in at least float32."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.process import at_least_float32


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (at_least_float32(a) - at_least_float32(b)).flatten(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return _difference(a, b).square().mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """Mean of sqrt(d² + c²) - c over elements (LCM, PCM). For large c it tends to l2/(2c)."""
    return ((_difference(a, b).square() + c * c).sqrt() - c).mean(1)


def huber_or_l2(a: Tensor, b: Tensor, huber: float) -> Tensor:
    """What recipes mean by `huber`: pseudo-Huber with that c, and l2 where it is 0."""
    return pseudo_huber(a, b, huber) if huber else l2(a, b)


def pseudo_huber_norm(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|d|² + c²) - c of the whole sample (iCT, Song & Dhariwal 2023, eq. 8); c defaults to 0.00054·sqrt(dim), 0 is the plain norm."""
    d = _difference(a, b)
    c = 0.00054 * d.shape[1] ** 0.5 if c is None else c
    return (d.square().sum(1) + c * c).sqrt() - c if c else d.norm(dim=1)                # whose gradient at d = 0 is 0, not nan
