"""Discriminator heads over features read from a denoiser (DMD2, sec. 4.3; distribution_matching card 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.diffusion.process import at_least_float32


def _norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 16 channels: after the contraction a group of one channel would be one number, normalised to 0."""
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= 16 * g or g == 1)), channels)


class MapHead(nn.Sequential):
    """One logit from a feature map (B, C, H, W): halve until 4x4 or less, contract what is left, read out."""

    def __init__(self, channels: int, size: tuple[int, int]):
        layers: list[nn.Module] = []
        h, w = size
        while min(h, w) > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
            h, w = h // 2, w // 2
        layers += [nn.Conv2d(channels, channels, (h, w)), _norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1), nn.Flatten()]
        super().__init__(*layers)


class TokenHead(nn.Module):
    """One logit from tokens (B, N, D): an MLP per token, averaged."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, 1)."""
        return self.layers(tokens).mean(dim=1)


class Discriminator(nn.Module):
    """One head per feature; the logit is their mean. Built from examples of the features it will read."""

    def __init__(self, features: Sequence[Tensor]):
        super().__init__()
        if not features:
            raise ValueError("a discriminator needs features to read: name the tapped modules in student.taps")
        self.heads = nn.ModuleList()
        for f in features:
            if f.ndim not in (3, 4):
                raise ValueError(f"a discriminator head reads maps (B, C, H, W) or tokens (B, N, D), got {tuple(f.shape)}")
            self.heads.append(MapHead(f.shape[1], (f.shape[2], f.shape[3])) if f.ndim == 4 else TokenHead(f.shape[2]))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B,), float32 whatever the features' precision: positive means real."""
        dtype = next(self.parameters()).dtype
        return at_least_float32(torch.cat([head(f.to(dtype)) for head, f in zip(self.heads, features, strict=True)], dim=1)).mean(dim=1)
