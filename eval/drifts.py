"""Drift against a teacher's pictures with errors: which of the numbers of `stepdistill.drift` have really moved.

Student and teacher are sampled with the same noise and labels, row by row, so what both share cancels. Errors are the jackknife over
groups of rows that are left out of both; a teacher of other seeds may be given as well, and the errors are then honestly wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.drift import against, drift
from stepdistill.eval.metrics import FEWEST, Estimate, jackknife


def drift_estimates(student: Tensor, teacher: Tensor, labels: Tensor, member: Tensor) -> dict[str, Estimate]:
    """Of uint8 pictures (N, C, H, W) of both, by the names of `drift.drift`.

    Ratios to the teacher for contrasts, saturation, sharpness and spread, differences for the others; what has no number in either is left
    out. `labels` (N,) are the classes or prompts, `member` (N,) the group of each row, five groups or more (`metrics.members`); where a
    prompt has fewer seeds than there are groups, give all its rows one group. Every group costs one more look at all pictures. Raises
    ValueError for pictures that do not fit each other, or fewer groups.
    """
    groups = _groups(student, teacher, member)

    def of(keep: Tensor) -> dict[str, float]:
        return against(drift(student[keep], labels[keep]), drift(teacher[keep], labels[keep]))

    whole = of(torch.ones(len(member), dtype=torch.bool))
    left = [of(member != j) for j in range(groups)]
    return {name: jackknife(value, [each[name] for each in left], len(member))
            for name, value in whole.items() if all(name in each for each in left)}


def latent_drift(student: Tensor, teacher: Tensor, member: Tensor) -> dict[str, Estimate]:
    """Of latents (N, C, ...) of both: `latent_mean_0` the difference of the first channel's means, `latent_std_0` the ratio of its
    standard deviations, and so on.

    `member` (N,) is the group of each row, five groups or more. Raises ValueError for latents that do not fit each other, fewer groups, or
    a channel in which the teacher's do not vary.
    """
    groups = _groups(student, teacher, member)
    keep = torch.cat([torch.ones(1, groups), 1 - torch.eye(groups)]).double()                   # all groups, then without each
    (mean, std), (teacher_mean, teacher_std) = (_mean_std(keep, _powers(latents, member, groups)) for latents in (student, teacher))
    if not bool((teacher_std > 1e-6 * teacher_mean.abs()).all()):
        raise ValueError("a channel of the teacher's latents does not vary: these are no latents of different pictures")
    named = {f"latent_mean_{c}": column for c, column in enumerate((mean - teacher_mean).T.tolist())}
    named |= {f"latent_std_{c}": column for c, column in enumerate((std / teacher_std).T.tolist())}
    return {name: jackknife(column[0], column[1:], len(member)) for name, column in named.items()}


def _groups(student: Tensor, teacher: Tensor, member: Tensor) -> int:
    """How many there are."""
    if student.shape != teacher.shape or student.ndim < 2 or len(member) != len(student):
        raise ValueError(f"drift is told from equal samples of both and a group for each, got {tuple(student.shape)}, "
                         f"{tuple(teacher.shape)} and {len(member)} groups")
    groups = int(member.max()) + 1
    if groups < FEWEST:
        raise ValueError(f"the error of a drift needs at least {FEWEST} groups, got {groups}: raise the count")
    return groups


def _powers(latents: Tensor, member: Tensor, groups: int) -> Tensor:
    """Number, sum and sum of squares of the values of each channel in each group, float64 (3, g, C)."""
    x, rows = latents.flatten(2) if latents.ndim > 2 else latents[..., None], []
    for j in range(groups):
        part = x[member == j].double().cpu()
        total = part.sum((0, 2))
        rows.append(torch.stack([torch.full_like(total, part.shape[0] * part.shape[2]), total, part.square().sum((0, 2))]))
    return torch.stack(rows, 1)


def _mean_std(keep: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the groups that each row of `keep` (k, g) holds, (k, C)."""
    count, total, squares = keep @ powers
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()
