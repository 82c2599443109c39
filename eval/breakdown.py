"""A score taken apart: class by class, prompt by prompt, and sample by sample against another model. Tensors in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.eval import metrics
from stepdistill.eval.metrics import Estimate

EACH = 10                                               # of the best and of the worst, where all are too many


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of every class, (classes, d) in float64, from features (N, d) and labels (N,). ValueError for a class without any."""
    sizes = torch.bincount(labels, minlength=classes)
    if not sizes.all():
        raise ValueError(f"no sample has the class {int((sizes == 0).nonzero()[0])}: every class needs one")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    return sums / sizes[:, None]


def class_distances(features: Tensor, labels: Tensor, real: Tensor, member: Tensor) -> list[Estimate]:
    """Squared distance of each class's mean feature to that of real pictures (classes, d), from features (N, d) and labels (N,), with its
    jackknife over the groups `member` (N,), five or more. Biased upwards by the variance within the class over its number of samples.
    """
    found = []
    for label, centre in enumerate(real):
        own, group = features[labels == label].double(), member[labels == label]
        groups = int(group.max()) + 1
        sums = torch.zeros(groups, own.shape[1], dtype=torch.float64).index_add_(0, group, own)
        left = (sums.sum(0) - sums) / (len(own) - torch.bincount(group, minlength=groups))[:, None]
        found.append(metrics.jackknife(float((own.mean(0) - centre).square().sum()), (left - centre).square().sum(1).tolist(), len(own)))
    return found


def by_class(values: Tensor, labels: Tensor, classes: int) -> list[Estimate]:
    """Mean of each class's values (N,), at least two; of hits and misses their share, with Wilson's interval."""
    each = [values[labels == label] for label in range(classes)]
    return [metrics.proportion(mine) if mine.dtype == torch.bool else metrics.mean_estimate(mine) for mine in each]


def extremes(values: Tensor, upwards: bool, each: int = EACH) -> list[int]:
    """Which columns of values (models, P) have the best and the worst means over the models, from best to worst: so many of each, or all P.
    The best are the largest ones where better values lie `upwards`."""
    order = values.double().mean(0).argsort(descending=upwards, stable=True).tolist()
    return order if len(order) <= 2 * each else order[:each] + order[-each:]


@dataclass(frozen=True)
class Wins:
    """Shares of all samples on which one model alone is right, and of the `decided` ones among them, on which the two differ, the share
    that it wins (None where there are none)."""

    ahead: float
    behind: float
    decided: int
    share: Estimate | None


def wins(here: Tensor, there: Tensor) -> Wins:
    """Of hits and misses (N,) of a model and of another one on the same samples.

    The share of the decided samples is the sign test's (McNemar's) statistic: above a half in its interval, `here` is ahead.
    """
    if here.shape != there.shape or not len(here):
        raise ValueError(f"wins are counted on the same samples, one or more: got {len(here)} and {len(there)}")
    ahead, behind = int((here & ~there).sum()), int((there & ~here).sum())
    decided = ahead + behind
    share = metrics.proportion(torch.arange(decided) < ahead) if decided else None
    return Wins(ahead / len(here), behind / len(here), decided, share)
