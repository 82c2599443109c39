"""Classifier-free guidance: null + w·(cond - null), w = 1 means none (Ho & Salimans 2022, in the convention of diffusers)."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import like


def guide(cond: Prediction, null: Prediction, w: float | Tensor) -> Prediction:
    """Guided prediction at one x_t. Linear, so it may be done in the network's own space; w is a number or one per sample (B,).

    Features stay those of the conditional half.
    """
    scale = like(w, cond.raw) if isinstance(w, Tensor) else w
    return Prediction(null.raw + scale * (cond.raw - null.raw), cond.kind, cond.x_t, cond.alpha, cond.sigma, cond.features)
