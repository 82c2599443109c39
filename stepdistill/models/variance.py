"""A learned log-variance of a loss at each time: losses weighed by how large they are there (EDM2, Karras et al. 2024, 2312.02696)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.diffusion.process import at_least_float32

FEATURES = 128
FURTHEST = 20.0                                         # of ln(sigma/alpha), which is infinite where one of them is 0


class LogVariance(nn.Module):
    """v, linear in random Fourier features of ln(sigma/alpha)/4, and 0 everywhere at first.

    What descends exp(-v)·l + v ends at exp(v) = the mean of l there, so that every time counts alike.
    """

    rates: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 2 * math.pi * torch.randn(FEATURES))
        self.register_buffer("phases", 2 * math.pi * torch.rand(FEATURES))
        self.linear = nn.Linear(FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """v (B,) at alpha and sigma (B,), at least float32."""
        place = (sigma.log() - alpha.log()).clamp(-FURTHEST, FURTHEST) / 4
        angles = place[:, None] * self.rates.to(place) + self.phases.to(place)
        features = (2 / FEATURES) ** 0.5 * angles.cos()
        return at_least_float32(self.linear(features.to(self.linear.weight.dtype)))[:, 0]
