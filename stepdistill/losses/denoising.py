"""Denoising regression in any prediction space."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, target
from stepdistill.diffusion.process import NoiseProcess, at_least_float32, like


def denoising_loss(pred: Prediction, x0: Tensor, eps: Tensor, kind: str | None = None) -> Tensor:
    """Mean squared error (B,) against the known x0 and eps, in the space the network speaks or in `kind`."""
    kind = kind or pred.kind
    truth = target(kind, x0, eps, pred.alpha, pred.sigma)
    return (pred.to(kind) - truth).square().flatten(1).mean(1)


def scaled_eps_loss(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """alpha² times the squared error of eps, (B,): bounded weight at every noise level (SwiftBrush, Nguyen & Tran 2023)."""
    return pred.alpha.square().to(pred.x_t) * denoising_loss(pred, x0, eps, "eps")


def subinterval_target(process: NoiseProcess, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, eps, q): what teaches a network the score of x_t where x_t was noised from states x_s that are not clean themselves.

    x_t = process.travel(x_s, eps, s, t), s < t both (B,). With the kernel x_t = A·x_s + B·eps its score is -eps/B, so eps is
    (sigma_t/B)·eps and x0 is x_s/alpha_s - q·eps, q = alpha_t·sigma_s²/(alpha_s²·B): right in expectation at every x_t, and they make up
    x_t. q (B,), float64, is the noise in x0; it grows without bound as t falls to s, and is 0 at a clean s (Phased DMD, 2510.27684).
    """
    x_s = at_least_float32(x_s)
    alpha_s, sigma_s, alpha_t, sigma_t = process.alpha(s), process.sigma(s), process.alpha(t), process.sigma(t)
    b = (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()).clamp_min(0).sqrt()
    q = alpha_t * sigma_s.square() / (alpha_s.square() * b)
    eps = eps.to(x_s.dtype)
    return x_s / like(alpha_s, x_s) - like(q, x_s) * eps, like(sigma_t / b, x_s) * eps, q
