"""Adversarial losses on logits (positive means real)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
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


def linear_generator_loss(fake: Tensor) -> Tensor:
    """Hinge, the usual form: mean -d(fake), which goes on pulling once the discriminator is fooled (Lim & Ye 2017; ADD, LADD)."""
    return -fake.mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: mean relu(1 - d(real)) + mean relu(1 + d(fake)); 2 where the two cannot be told apart (Lim & Ye 2017)."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def approximate_r1(real: Tensor, near: Tensor) -> Tensor:
    """mean (d(x) - d(x + sigma·n))² of logits at real x and at x + sigma·n, n standard normal (APT, Lin et al. 2025).

    For small sigma this is sigma²·mean|grad d(x)|² without a second derivative. Both logits carry gradients: with one of them held it
    would be no penalty's gradient.
    """
    return (real - near).square().mean()


def feature_r1(real: Tensor, features: Sequence[Tensor]) -> Tensor:
    """mean |d logit/d features|² of logits (B,) of real pictures, with a graph for one more derivative (R1, Mescheder et al. 2018).

    `features` (N >= B rows) must be leaves that require gradients, whatever made them: only the heads are differentiated twice (StyleGAN-T,
    ADD). Other rows than those of `real` must not reach its logits.
    """
    slopes = torch.autograd.grad(real.sum(), list(features), create_graph=True)
    return torch.cat([slope.flatten(1) for slope in slopes], dim=1).square().sum() / len(real)


class Game(NamedTuple):
    """The two losses of one game: of the generator by fake logits, of the discriminator by real and fake ones."""

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


GAMES = {"logistic": Game(generator_loss, discriminator_loss), "hinge": Game(linear_generator_loss, hinge_discriminator_loss)}
