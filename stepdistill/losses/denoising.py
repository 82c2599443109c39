"""Denoising regression in any prediction space."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, target


def denoising_loss(pred: Prediction, x0: Tensor, eps: Tensor, kind: str | None = None) -> Tensor:
    """Mean squared error (B,) against the known x0 and eps, in the space the network speaks or in `kind`."""
    kind = kind or pred.kind
    truth = target(kind, x0, eps, pred.alpha, pred.sigma)
    return (pred.to(kind) - truth).square().flatten(1).mean(1)
