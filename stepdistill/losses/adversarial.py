"""Adversarial losses on logits (positive means real)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-d(fake)) (Goodfellow et al. 2014; DMD2, eq. 4)."""
    return softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic: mean softplus(-d(real)) + mean softplus(d(fake))."""
    return softplus(-real).mean() + softplus(fake).mean()
