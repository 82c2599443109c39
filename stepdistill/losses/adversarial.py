"""Adversarial losses on logits (positive means real)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-d(fake)) (Goodfellow et al. 2014; DMD2, eq. 4)."""
    return softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic: mean softplus(-d(real)) + mean softplus(d(fake))."""
    return softplus(-real).mean() + softplus(fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Hinge: mean relu(1 - d(fake)), flat once the discriminator is fooled (PCM, Wang et al. 2024; its usual form is -d(fake))."""
    return relu(1 - fake).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: mean relu(1 - d(real)) + mean relu(1 + d(fake)); 2 where the two cannot be told apart (Lim & Ye 2017)."""
    return relu(1 - real).mean() + relu(1 + fake).mean()
