"""Score-difference gradients. Every VSD-like method moves x0 by g = c·(fake - real) and differs in c alone (distribution_matching S.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.process import at_least_float32, like


def dmd_scale(x0: Tensor, real: Tensor, floor: float = 1e-5) -> Tensor:
    """1/mean|x0 - real| per sample (B,): DMD's normaliser (Yin et al. 2024, eq. 8, without its alpha_t, as their code has it).

    `real` is the guided teacher's x0. The mean is floored at `floor`.
    """
    return 1 / (at_least_float32(x0) - real).abs().flatten(1).mean(1).clamp_min(floor)


def matching_loss(x0: Tensor, toward: Tensor, away_from: Tensor, scale: Tensor | None = None) -> Tensor:
    """Surrogate whose gradient at x0 is c·(away_from - toward)/numel, c = `scale` (B,) or DMD's normaliser.

    x0 (B, ...) carries the gradient; `toward` (teacher) and `away_from` (fake score) are x0 predictions and are detached. With
    c = alpha²/sigma² the gradient is that of the reverse KL at this noise level. Raises ValueError on a half-precision difference.
    """
    x0 = at_least_float32(x0)
    if toward.dtype != away_from.dtype or toward.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"the score difference must be formed in float32, got {toward.dtype} and {away_from.dtype}")
    with torch.no_grad():
        c = dmd_scale(x0, toward) if scale is None else scale
        moved = x0 - like(c, x0) * (away_from - toward)
    return 0.5 * (x0 - moved).square().mean()


def sid_loss(x0: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """Bilinear estimate of the Fisher divergence, (B,): mean of d·((real - x0) - alpha·d) over mean|x0 - real|, d = real - fake.

    x0, real (teacher) and fake are clean samples (B, ...) and all three carry gradients; the divisor is detached (SiD, Zhou et al. 2024,
    eq. 23). May be negative: at the optimal fake score its mean is (1 - alpha)·|d|². Source sums over elements; this is their mean.
    """
    x0 = at_least_float32(x0)
    d = real - fake
    return dmd_scale(x0.detach(), real.detach()) * (d * (real - x0 - alpha * d)).flatten(1).mean(1)
