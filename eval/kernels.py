"""Kernel distance in the space of CLIP embeddings. Beside `metrics.kid`, whose sums and jackknife it shares.

    cmmd = 1000 · (mean k(x_i,x_j) + mean k(y_i,y_j) - 2 mean k(x_i,y_j)),   k = exp(-|x - y|^2 / 2 sigma^2),   sigma = 10

Jayasumana et al., 2024, arXiv:2401.09603. Embeddings have length one, and the means run over all pairs, i = j among them: the biased
V-statistic, as in the authors' code. The papers' protocol is CLIP ViT-L/14 at 336 pixels and 30,000 pictures of COCO; features of any
other network give a number of another scale, which wants another name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.eval.metrics import Estimate, KernelSums, LeftOut, jackknife, kernel_sums, paired_jackknife, unit, without_each

SIGMA = 10.0
SCALE = 1000.0


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """k - 1 of all pairs of unit vectors (n, d) and (m, d), for which |x - y|^2 = 2 - 2 x^T y.

    The weights of the statistic add up to zero, so the 1 cancels; kept, it would cost digits, as k is nowhere below 0.98.
    """
    return (x @ y.T).sub_(1).div_(SIGMA**2).expm1_()


def cmmd_sums(x: Tensor, y: Tensor, member: Tensor) -> KernelSums:
    """Of generated embeddings x (N, d) in groups `member` (N,), against a reference y (M, d); neither need be normalised.

    Raises ValueError below two samples on a side, or for an embedding that is zero or not finite.
    """
    return kernel_sums(unit(x), unit(y), member, gaussian)


def _cmmd(sums: KernelSums, keep: Tensor | None = None) -> float:
    return SCALE * sums.v_statistic(keep)


def left_out(sums: KernelSums) -> LeftOut:
    """The distance on all groups, and with each of them left out."""
    return without_each(sums, _cmmd)


def cmmd(x: Tensor, y: Tensor) -> float:
    """Of embeddings (N, d) and (M, d); 0 for a set and itself, too large by order 1/N + 1/M for two draws of one distribution."""
    return _cmmd(cmmd_sums(x, y, torch.zeros(len(x), dtype=torch.long)))


def cmmd_estimate(sums: KernelSums) -> Estimate:
    """With its jackknife, which takes off the bias of the generated sample; that of the reference stays, equal for all models."""
    return jackknife(*left_out(sums))


def paired_cmmd(a: KernelSums, b: KernelSums) -> Estimate:
    """Difference a - b of two models sampled with the same noise and prompts, against one reference."""
    return paired_jackknife(left_out(a), left_out(b))
