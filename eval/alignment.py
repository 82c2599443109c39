"""Scores that are means over prompts: CLIP score and its conventions, paired comparison, and how many comparisons were made.

Prompts are the independent units: seeds are averaged within a prompt first, then prompts are resampled. This holds for any score of one
picture and one prompt (CLIP, HPS, ImageReward, PickScore, the items of GenEval, LPIPS), once it is a tensor of per-prompt values (P,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval.metrics import DRAWS, Estimate, bootstrap_mean, mean_estimate, percentile, resampled, unit, wilson

# What papers print for a cosine. The network, its text prefix and its preprocessing change the number as much: all four make the name.
CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": lambda cosine: cosine,                                               # GigaGAN, DMD2, SiD-LSG: ViT-g-14, "A photo depicts "
    "100cos": lambda cosine: (100 * cosine).clamp(min=0),                       # torchmetrics: ViT-L/14, no prefix
    "2.5cos": lambda cosine: (2.5 * cosine).clamp(min=0),                       # CLIPScore (Hessel, 2021): ViT-B/32, "A photo depicts "
}


def clip_scores(images: Tensor, texts: Tensor, convention: str = "cos") -> Tensor:
    """CLIP score of each prompt, float64 (P,), averaged over its seeds, of image embeddings (P, M, d) and text embeddings (P, d).

    `convention` is a key of CONVENTIONS and applies to each picture, before the mean. Embeddings need not be normalised. Raises ValueError
    for other shapes, an unknown convention, or an embedding without a direction.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"no convention {convention!r} of the CLIP score: there are {', '.join(CONVENTIONS)}")
    if images.ndim != 3 or texts.shape != (images.shape[0], images.shape[2]) or not images.shape[1]:
        raise ValueError(f"clip_scores reads images (P, M, d) and texts (P, d), got {tuple(images.shape)} and {tuple(texts.shape)}")
    cosine = (unit(images) * unit(texts)[:, None]).sum(-1)
    return CONVENTIONS[convention](cosine).mean(1)


def cos_teacher(student: Tensor, teacher: Tensor) -> Estimate:
    """Mean cosine between features (N, d) of student and teacher pictures of the same noise and prompt, row by row, N >= 2.

    For methods that keep the teacher's map from noise to picture (progressive, consistency, rectified flow). Students that match a
    distribution are not obliged to, so for them it describes and never ranks.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"cos_teacher reads two sets of features (N, d) of the same samples, got {tuple(student.shape)} and "
                         f"{tuple(teacher.shape)}")
    return mean_estimate((unit(student) * unit(teacher)).sum(1))


# ------------------------------------------------------------------------------------------------------------------------------- pairing


@dataclass(frozen=True)
class Paired:
    """Difference a - b of two models over the same prompts, and the share of prompts that a wins, ties counted half."""

    delta: Estimate
    win_rate: Estimate

    def to_dict(self) -> dict[str, Any]:
        """The block of a result file."""
        d, w = self.delta, self.win_rate
        return {"delta": d.value, "corrected": d.corrected, "se": d.se, "ci95": list(d.ci95),
                "win_rate": w.value, "win_rate_ci95": list(w.ci95)}


def stratified_mean(values: Tensor, strata: Sequence[str], draws: int = DRAWS) -> Estimate:
    """Mean of the strata's means, of per-prompt values (P,) and the stratum of each; prompts are resampled within their stratum.

    GenEval's score is such a mean, over six skills of 80 to 100 prompts. Raises ValueError for a stratum of fewer than five prompts.
    """
    if not len(values) or len(values) != len(strata):
        raise ValueError(f"every prompt needs its stratum, got {len(values)} prompts and {len(strata)} strata")
    names = sorted(set(strata))
    parts = [values[torch.tensor([s == name for s in strata])].double() for name in names]
    drawn = [resampled(part[:, None], draws, seed)[:, 0] for seed, part in enumerate(parts)]
    value = sum(float(part.mean()) for part in parts) / len(parts)
    return percentile(value, torch.stack(drawn).mean(0), len(values))


def paired_means(a: Tensor, b: Tensor, strata: Sequence[str] | None = None, draws: int = DRAWS) -> Paired:
    """Of per-prompt values (P,) of two models, prompt by prompt, larger is better; P >= 5, and as many in each stratum.

    The difference has the bootstrap over prompts, the win rate Wilson's interval. With `strata` the difference is the mean of the strata's
    (`stratified_mean`); the win rate counts every prompt once.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a paired comparison needs one value a prompt from both models, got {tuple(a.shape)} and {tuple(b.shape)}")
    difference = a.double() - b.double()
    delta = bootstrap_mean(difference, draws) if strata is None else stratified_mean(difference, strata, draws)
    wins = (difference > 0).double() + (difference == 0).double() / 2
    return Paired(delta, wilson(float(wins.mean()), len(wins)))


# --------------------------------------------------------------------------------------------------------------------- many comparisons


def p_value(difference: Estimate) -> float:
    """Two-sided, that the true difference is zero: Student's t of the corrected value over its error, with groups - 1 degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4. An error of zero gives 0, or 1 where the difference is zero too.
    """
    if difference.se == 0:
        return float(difference.corrected == 0)
    t, dof = abs(difference.corrected) / difference.se, difference.groups - 1
    if dof > 1000:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan2(t, math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = inner = cosine if dof % 2 else 1.0
    for k in range(dof % 2 + 1, dof - 2, 2):                                    # the next power of the cosine and its ratio k / (k + 1)
        term *= cosine**2 * k / (k + 1)
        inner += term
    within = 2 / math.pi * (angle + (sine * inner if dof > 1 else 0.0)) if dof % 2 else sine * inner
    return min(1.0, max(0.0, 1 - within))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values of several comparisons, adjusted so that 0.05 is the chance of any false one among them; in the order given.

    S. Holm, Scandinavian Journal of Statistics 6, 1979: the j-th smallest of m is multiplied by m - j + 1 and never falls below the one
    before it. Needed where more than three students are compared.
    """
    adjusted, floor = {}, 0.0
    for j, name in enumerate(sorted(p, key=lambda name: p[name])):
        floor = max(floor, min(1.0, (len(p) - j) * p[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p}
