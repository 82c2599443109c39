"""Distances between sets of features, and how sure we may be of them. Tensors in, numbers out; moments and kernels in float64.

    frechet     |m - m_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2                  Heusel et al., 2017, arXiv:1706.08500
    kid         sum k(x_i,x_j)/n(n-1) + sum k(y_i,y_j)/m(m-1) - 2 sum k(x_i,y_j)/nm         Binkowski et al., 2018, arXiv:1801.01401
    precision   share of generated points inside the k-NN ball of some real point           Kynkaanniemi et al., 2019, arXiv:1904.06991
    recall      the same with the two sets exchanged
    density     mean number of real balls a generated point lies in, over k                 Naeem et al., 2020, arXiv:2002.09797
    coverage    share of real balls that hold a generated point

Errors of frechet and kid: delete-a-group jackknife over groups that each hold every class equally often. They speak of the generated
sample alone; the reference is taken as given, being common to all models scored against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Z95 = 1.959963984540054                                 # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value as papers print it, the value without its bias of order 1/n, and an error from `groups` units of `n` samples in all."""

    value: float
    corrected: float
    se: float
    ci95: tuple[float, float]
    n: int
    groups: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95)}


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features, in float64: additive, so that sets can be joined and groups left out."""

    n: int
    total: Tensor                                       # (d,)
    outer: Tensor                                       # (d, d)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, d)."""
        f = features.double()
        return cls(len(f), f.sum(0), f.T @ f)

    @classmethod
    def from_statistics(cls, n: int, mean: Tensor, cov: Tensor) -> Moments:
        """From a stored mean (d,) and unbiased covariance (d, d)."""
        mean, cov = mean.double(), cov.double()
        return cls(n, n * mean, (n - 1) * cov + n * mean.outer(mean))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance; needs two samples."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}: raise the count")
        return (self.outer - self.total.outer(self.total) / self.n) / (self.n - 1)

    @cached_property
    def factor(self) -> Tensor:
        """L with cov = L·L^T, from an eigendecomposition, so that fewer samples than dimensions are no obstacle."""
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp(min=0).sqrt()


def frechet(m: Moments, reference: Moments) -> float:
    """Frechet distance of two Gaussians; `reference` is factored once and remembers it. No matrix root is taken.

    The trace term is the sum of the roots of the eigenvalues of L^T S L, S_r = L·L^T (real, symmetric, no iteration). Biased by about c/n.
    """
    cov = m.cov
    roots = torch.linalg.eigvalsh(reference.factor.T @ cov @ reference.factor).clamp(min=0).sqrt()
    return float((m.mean - reference.mean).square().sum() + cov.trace() + reference.cov.trace() - 2 * roots.sum())


# ---------------------------------------------------------------------------------------------------------------------------- error bars


def members(n: int, groups: int, classes: int = 1) -> Tensor:
    """Group of sample i, (n,): (i // classes) mod groups.

    Labels are dealt as i mod classes. Groups i mod 25 of ten classes would hold two classes each, and the jackknife would mistake the
    difference between classes for noise; whole rounds of labels keep every group balanced.
    """
    least = max(classes, 2)
    if groups < 2 or n < groups * least:
        raise ValueError(f"{n} samples cannot be split into {groups} groups of {least} or more: raise the count or lower the groups")
    return torch.arange(n) // classes % groups


def student_t(dof: int) -> float:
    """97.5 % quantile of Student's t, to 0.04 % for dof >= 4 (Abramowitz and Stegun 26.7.5)."""
    if dof < 4:
        raise ValueError(f"an interval needs at least 5 groups, got {dof + 1}")
    z = Z95
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / dof ** (i + 1) for i, term in enumerate(terms))


def jackknife(whole: float, left: Sequence[float], n: int) -> Estimate:
    """From the value on all samples and the values with each group left out in turn; the interval stands around the corrected value."""
    g = len(left)
    values = torch.tensor(left, dtype=torch.float64)
    se = float(((g - 1) / g * (values - values.mean()).square().sum()).sqrt())
    corrected = g * whole - (g - 1) * float(values.mean())
    half = student_t(g - 1) * se
    return Estimate(whole, corrected, se, (corrected - half, corrected + half), n, g)


def proportion(hits: Tensor) -> Estimate:
    """Share of True in (n,), with Wilson's interval; `se` is its half width in normal quantiles, so never zero.

    For points scored independently against a fixed reference (accuracy, precision) this is the bootstrap over points in closed form.
    """
    n, p = len(hits), float(hits.double().mean())
    shrink = 1 + Z95**2 / n
    centre, half = (p + Z95**2 / (2 * n)) / shrink, Z95 / shrink * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, p, half / Z95, (max(0.0, centre - half), min(1.0, centre + half)), n, n)


def _left_out(groups: Sequence[Moments], reference: Moments) -> tuple[float, list[float], int]:
    total = sum(groups[1:], groups[0])
    return frechet(total, reference), [frechet(total - group, reference) for group in groups], total.n


def frechet_estimate(groups: Sequence[Moments], reference: Moments) -> Estimate:
    """Frechet distance of the union of the groups, with its jackknife."""
    return jackknife(*_left_out(groups, reference))


def paired_frechet(groups_a: Sequence[Moments], groups_b: Sequence[Moments], reference: Moments) -> Estimate:
    """Difference a - b of two models sampled with the same noise and labels, group by group."""
    return _paired(_left_out(groups_a, reference), _left_out(groups_b, reference))


def _paired(a: tuple[float, list[float], int], b: tuple[float, list[float], int]) -> Estimate:
    if a[2] != b[2] or len(a[1]) != len(b[1]):
        raise ValueError(f"a paired difference needs equal samples and groups, got {a[2]} in {len(a[1])} and {b[2]} in {len(b[1])}")
    return jackknife(a[0] - b[0], [x - y for x, y in zip(a[1], b[1], strict=True)], a[2])


# ---------------------------------------------------------------------------------------------------------------------- kernel distance


@dataclass(frozen=True)
class KernelSums:
    """Sums of k over pairs of groups, from which the U-statistic follows with or without any group."""

    sizes: Tensor                                       # (g,) samples in each group of x
    within: Tensor                                      # (g, g) over pairs i != j of x
    across: Tensor                                      # (g,) over all of y
    reference: float                                    # mean over pairs i != j of y
    m: int

    def kid(self, keep: Tensor | None = None) -> float:
        """The U-statistic; `keep` (g,) is a mask of the groups that take part."""
        weight = torch.ones_like(self.across) if keep is None else keep.double()
        n = float(weight @ self.sizes.double())
        return float(weight @ self.within @ weight / (n * (n - 1)) + self.reference - 2 * (weight @ self.across) / (n * self.m))


def _kernel_sum(x: Tensor, y: Tensor, block: int = 2000) -> float:
    """Sum of (x^T y / d + 1)^3 over all pairs."""
    total = 0.0
    for rows in x.split(block):
        base = (rows @ y.T).div_(x.shape[1]).add_(1)
        total += float(base.square().mul_(base).sum())
    return total


def _pairs_sum(x: Tensor) -> float:
    """The same over the pairs i != j of one set."""
    return _kernel_sum(x, x) - float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())


def kernel_sums(x: Tensor, y: Tensor, member: Tensor) -> KernelSums:
    """Of generated features x (N, d) in groups `member` (N,), against a reference y (M, d)."""
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples on each side, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    parts = [x[member == j] for j in range(int(member.max()) + 1)]
    within = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i, a in enumerate(parts):
        within[i, i] = _pairs_sum(a)
        for j in range(i):
            within[i, j] = within[j, i] = _kernel_sum(a, parts[j])
    across = torch.tensor([_kernel_sum(a, y) for a in parts], dtype=torch.float64)
    return KernelSums(torch.tensor([len(a) for a in parts]), within, across, _pairs_sum(y) / (len(y) * (len(y) - 1)), len(y))


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x^T y / d + 1)^3; below zero for close sets."""
    return kernel_sums(x, y, torch.zeros(len(x), dtype=torch.long)).kid()


def _without(sums: KernelSums) -> tuple[float, list[float], int]:
    keep = ~torch.eye(len(sums.sizes), dtype=torch.bool)
    return sums.kid(), [sums.kid(row) for row in keep], int(sums.sizes.sum())


def kid_estimate(sums: KernelSums) -> Estimate:
    """Kernel distance with its jackknife."""
    return jackknife(*_without(sums))


def paired_kid(a: KernelSums, b: KernelSums) -> Estimate:
    """Difference a - b of two models sampled with the same noise and labels, against one reference."""
    return _paired(_without(a), _without(b))


# ---------------------------------------------------------------------------------------------------------------------- manifolds, labels


def _distances(x: Tensor, y: Tensor, block: int = 500) -> Iterator[Tensor]:
    """Squared distances of blocks of x to all of y, (block, M). Float64: ties are settled by `_slack`, not by rounding."""
    x, y = x.double(), y.double()
    norms = y.square().sum(1)
    for rows in x.split(block):
        yield torch.addmm(norms, rows, y.T, alpha=-2).add_(rows.square().sum(1)[:, None]).clamp_(min=0)


def _slack(*sets: Tensor) -> float:
    """What rounding may do to a squared distance; points at exactly the radius are inside."""
    return 1e-12 * max(float(s.double().square().sum(1).max()) for s in sets)


def radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each point (N, d) to its k-th neighbour, itself excluded, (N,)."""
    if not 1 <= k < len(x):
        raise ValueError(f"k = {k} neighbours need at least {k + 1} points, got {len(x)}")
    return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in _distances(x, x)])


def _balls(centres: Tensor, k: int, points: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` of which balls (M of them) each point lies in, a block (block, M) of points at a time."""
    reach = radii(centres, k) + _slack(centres, points)
    return torch.cat([reduce(d <= reach) for d in _distances(points, centres)])


def inside(centres: Tensor, points: Tensor, k: int = 3) -> Tensor:
    """Whether each point (N, d) lies in some k-NN ball of the centres (M, d), (N,)."""
    return _balls(centres, k, points, lambda within: within.any(1))


def precision_recall(generated: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated points in the reference's manifold, and of reference points in the generated one. Both move with the set sizes."""
    return float(inside(reference, generated, k).double().mean()), float(inside(generated, reference, k).double().mean())


def recall_estimate(generated: Tensor, reference: Tensor, k: int, member: Tensor) -> Estimate:
    """Recall of the whole set, with an error from the disjoint sets `member` (N,): SD / sqrt K.

    Recall grows with the size of the generated set, so the K smaller sets lie lower than `value`: they lend their spread, never their
    mean. That spread shrinks with 1/sqrt n, as the division assumes, only roughly. There is no bias correction: `corrected` is `value`.
    """
    value = float(inside(generated, reference, k).double().mean())
    parts = int(member.max()) + 1
    shares = torch.stack([inside(generated[member == j], reference, k).double().mean() for j in range(parts)])
    se = float(shares.std() / math.sqrt(parts))
    half = student_t(parts - 1) * se
    return Estimate(value, value, se, (max(0.0, value - half), min(1.0, value + half)), len(generated), parts)


def density_coverage(generated: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (about 1 for equal distributions, may exceed it) and coverage."""
    counts = _balls(reference, k, generated, lambda within: within.sum(1))
    reach = radii(reference, k) + _slack(reference, generated)
    nearest = torch.cat([d.amin(1) for d in _distances(reference, generated)])
    return float(counts.double().mean() / k), float((nearest <= reach).double().mean())


def accuracy(logits: Tensor, labels: Tensor) -> Estimate:
    """Share of logits (N, classes) whose largest is at the label (N,). Binomial error: mildly wide where classes are balanced by design."""
    return proportion(logits.argmax(1) == labels)


def paired_accuracy(hits_a: Tensor, hits_b: Tensor) -> Estimate:
    """Difference a - b of two shares over the same samples (N,); normal interval of the mean of the differences."""
    if hits_a.shape != hits_b.shape:
        raise ValueError(f"a paired difference needs equal samples, got {len(hits_a)} and {len(hits_b)}")
    delta = hits_a.double() - hits_b.double()
    mean, se = float(delta.mean()), float(delta.std() / math.sqrt(len(delta)))
    return Estimate(mean, mean, se, (mean - Z95 * se, mean + Z95 * se), len(delta), len(delta))
