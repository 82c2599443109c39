"""Distances between sets of features, and how sure we may be of them. Tensors in, numbers out; moments and kernels in float64.

    frechet     |m - m_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2                  Heusel et al., 2017, arXiv:1706.08500
    kid         sum k(x_i,x_j)/n(n-1) + sum k(y_i,y_j)/m(m-1) - 2 sum k(x_i,y_j)/nm         Binkowski et al., 2018, arXiv:1801.01401
    precision   share of generated points inside the k-NN ball of some real point           Kynkaanniemi et al., 2019, arXiv:1904.06991
    recall      the same with the two sets exchanged
    density     mean number of real balls a generated point lies in, over k                 Naeem et al., 2020, arXiv:2002.09797
    coverage    share of real balls that hold a generated point
    inception   exp (mean over x of KL (p(y|x) | p(y)))                                     Salimans et al., 2016, arXiv:1606.03498

Errors of frechet, kid and inception: delete-a-group jackknife over groups that each hold every class equally often. Of means: the
bootstrap over the units that are independent (points, prompts). They speak of the generated sample alone; the reference is taken as
given, being common to all models scored against it.

Fidelity to the teacher needs no measure of its own: `frechet_estimate(groups, Moments.of(teacher_features))` is its fd_teacher. The
floor is the same call with the groups of a second teacher set of other seeds and equal size; `paired_frechet(student's groups, second
set's groups, teacher's moments)` is the distance above it, free of the bias that a finite first set brings, though not of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Z95 = 1.959963984540054                                 # 97.5 % quantile of the normal distribution
DRAWS = 10_000                                          # resamples of a bootstrap
FEWEST = 5                                              # groups or prompts from which an interval is made

Kernel = Callable[[Tensor, Tensor], Tensor]             # (n, d) and (m, d) to (n, m)
LeftOut = tuple[float, list[float], int]                # value on all samples, values with each group left out in turn, number of samples

T = TypeVar("T")
_KNOWN = WeakIdKeyDictionary()


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


def remembered(x: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """`make()`, what follows from a set alone, kept while its tensor lives unchanged: one reference is asked for every score."""
    known = _KNOWN.setdefault(x, {})
    if (key := (what, None if x.is_inference() else x._version)) not in known:
        known[key] = make()
    return known[key]


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
    if dof < FEWEST - 1:
        raise ValueError(f"an interval needs at least {FEWEST} groups, got {dof + 1}")
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


def paired_jackknife(a: LeftOut, b: LeftOut) -> Estimate:
    """Difference a - b of two models whose groups hold the same noise and labels."""
    if a[2] != b[2] or len(a[1]) != len(b[1]):
        raise ValueError(f"a paired difference needs equal samples and groups, got {a[2]} in {len(a[1])} and {b[2]} in {len(b[1])}")
    return jackknife(a[0] - b[0], [x - y for x, y in zip(a[1], b[1], strict=True)], a[2])


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent values (n,), at least two, with its normal interval: the bootstrap of hundreds of values in closed form."""
    n = len(values)
    if n < 2:
        raise ValueError(f"the error of a mean needs at least 2 values, got {n}: raise the count")
    values = values.double()
    mean, se = float(values.mean()), float(values.std() / math.sqrt(n))
    return Estimate(mean, mean, se, (mean - Z95 * se, mean + Z95 * se), n, n)


def wilson(share: float, n: int) -> Estimate:
    """A share of n independent trials, with Wilson's interval; `se` is its half width in normal quantiles, so never zero.

    E. B. Wilson, Journal of the American Statistical Association 22, 1927. Trials that count half make it a little wide.
    """
    if n < 1:
        raise ValueError("a share needs at least 1 trial, got 0: raise the count")
    shrink = 1 + Z95**2 / n
    centre, half = (share + Z95**2 / (2 * n)) / shrink, Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return Estimate(share, share, half / Z95, (max(0.0, centre - half), min(1.0, centre + half)), n, n)


def proportion(hits: Tensor) -> Estimate:
    """Share of True in (n,), with Wilson's interval.

    For points scored independently against a fixed reference (accuracy, precision) this is the bootstrap over points in closed form.
    """
    return wilson(float(hits.double().mean()), len(hits))


def resampled(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Means of resamples of the rows of values (P, c), float64 (draws, c): rows are drawn with replacement, columns stay together.

    Raises ValueError below five rows. The same seed draws the same rows.
    """
    if len(values) < FEWEST:
        raise ValueError(f"a bootstrap needs at least {FEWEST} prompts, got {len(values)}: add prompts")
    values, generator = values.double().cpu(), torch.Generator().manual_seed(seed)
    block = max(1, 2**22 // len(values))
    return torch.cat([values[torch.randint(len(values), (min(block, draws - done), len(values)), generator=generator)].mean(1)
                      for done in range(0, draws, block)])


def percentile(value: float, drawn: Tensor, n: int) -> Estimate:
    """From the value on all n prompts and on resamples of them (draws,): the middle 95 % of what was drawn, without bias correction."""
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(value, value, float(drawn.std()), (low, high), n, n)


def bootstrap_mean(values: Tensor, draws: int = DRAWS) -> Estimate:
    """Mean of per-prompt values (P,), at least five, with the percentile interval of the bootstrap over prompts."""
    return percentile(float(values.double().mean()), resampled(values[:, None], draws)[:, 0], len(values))


def bootstrap_ratio(values: Tensor, teacher: Tensor, draws: int = DRAWS) -> Estimate:
    """Mean of values (P,) over the mean of the teacher's (P,) on the same prompts, which are drawn together.

    Raises ValueError for unequal prompts, fewer than five, or a teacher whose mean is not clearly above zero.
    """
    if values.shape != teacher.shape:
        raise ValueError(f"a paired ratio needs equal prompts, got {len(values)} and {len(teacher)}")
    both = torch.stack([values.double(), teacher.double()], 1)
    drawn = resampled(both, draws)
    if not bool((drawn[:, 1] > 0).all()):
        raise ValueError("the teacher's mean is not clearly above zero, so nothing can be told as a ratio to it: report the difference")
    mean = both.mean(0)
    return percentile(float(mean[0] / mean[1]), drawn[:, 0] / drawn[:, 1], len(values))


def left_out(groups: Sequence[Moments], reference: Moments) -> LeftOut:
    """The Frechet distance of the union of the groups, and with each of them left out."""
    total = sum(groups[1:], groups[0])
    return frechet(total, reference), [frechet(total - group, reference) for group in groups], total.n


def frechet_estimate(groups: Sequence[Moments], reference: Moments) -> Estimate:
    """Frechet distance of the union of the groups, with its jackknife."""
    return jackknife(*left_out(groups, reference))


def paired_frechet(groups_a: Sequence[Moments], groups_b: Sequence[Moments], reference: Moments) -> Estimate:
    """Difference a - b of two models sampled with the same noise and labels, group by group."""
    return paired_jackknife(left_out(groups_a, reference), left_out(groups_b, reference))


# ---------------------------------------------------------------------------------------------------------------------- kernel distance


def unit(features: Tensor) -> Tensor:
    """Features (..., d) at length one, in float64. Raises ValueError where one is zero or not finite."""
    features = features.double()
    length = features.norm(dim=-1, keepdim=True)
    if not bool((length.isfinite() & (length > 0)).all()):
        raise ValueError("an embedding is zero or not finite, so it has no direction: look at the picture or the prompt it came from")
    return features / length


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x^T y / d + 1)^3 of all pairs."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


@dataclass(frozen=True)
class KernelSums:
    """Sums of a kernel over pairs of groups, from which both statistics follow with or without any group."""

    sizes: Tensor                                       # (g,) samples in each group of x
    within: Tensor                                      # (g, g) over all pairs of x
    own: Tensor                                         # (g,) over the pairs i = j of x
    across: Tensor                                      # (g,) over all pairs of x and y
    reference: tuple[float, float]                      # over all pairs of y, and over its pairs i = j
    m: int                                              # samples in y

    def u_statistic(self, keep: Tensor | None = None) -> float:
        """Squared MMD from means over pairs i != j: unbiased, may be negative. `keep` (g,) is a mask of the groups that take part."""
        n, within, own, across = self._kept(keep)
        reference = (self.reference[0] - self.reference[1]) / (self.m * (self.m - 1))
        return (within - own) / (n * (n - 1)) + reference - 2 * across / (n * self.m)

    def v_statistic(self, keep: Tensor | None = None) -> float:
        """Squared MMD from means over all pairs, i = j among them: never negative, too large by order 1/n + 1/m."""
        n, within, _, across = self._kept(keep)
        return within / n**2 + self.reference[0] / self.m**2 - 2 * across / (n * self.m)

    def _kept(self, keep: Tensor | None) -> tuple[float, float, float, float]:
        weight = torch.ones_like(self.across) if keep is None else keep.double()
        n, within = weight @ self.sizes.double(), weight @ self.within @ weight
        return float(n), float(within), float(weight @ self.own), float(weight @ self.across)


def _kernel_sum(x: Tensor, y: Tensor, kernel: Kernel = polynomial, block: int = 2000) -> float:
    """Sum over all pairs."""
    return sum(float(kernel(rows, y).sum()) for rows in x.split(block))


def _own_sum(x: Tensor, kernel: Kernel, block: int = 64) -> float:
    """Sum over the pairs of a point with itself."""
    return sum(float(kernel(rows, rows).diagonal().sum()) for rows in x.split(block))


def _own_sums(x: Tensor, kernel: Kernel) -> tuple[float, float]:
    """Sums over all pairs of a set, and over those of a point with itself."""
    return remembered(x, kernel, lambda: (_kernel_sum(x.double(), x.double(), kernel), _own_sum(x.double(), kernel)))


def kernel_sums(x: Tensor, y: Tensor, member: Tensor, kernel: Kernel = polynomial) -> KernelSums:
    """Of generated features x (N, d) in groups `member` (N,), against a reference y (M, d)."""
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples on each side, got {len(x)} and {len(y)}")
    x, y, beside = x.double(), y.double(), _own_sums(y, kernel)
    parts = [x[member == j] for j in range(int(member.max()) + 1)]
    within = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[: i + 1]):
            within[i, j] = within[j, i] = _kernel_sum(a, b, kernel)
    own = torch.tensor([_own_sum(a, kernel) for a in parts], dtype=torch.float64)
    across = torch.tensor([_kernel_sum(a, y, kernel) for a in parts], dtype=torch.float64)
    return KernelSums(torch.tensor([len(a) for a in parts]), within, own, across, beside, len(y))


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x^T y / d + 1)^3; below zero for close sets."""
    return kernel_sums(x, y, torch.zeros(len(x), dtype=torch.long)).u_statistic()


def without_each(sums: KernelSums, statistic: Callable[[KernelSums, Tensor | None], float]) -> LeftOut:
    """A statistic on all groups, and with each of them left out."""
    keep = ~torch.eye(len(sums.sizes), dtype=torch.bool)
    return statistic(sums, None), [statistic(sums, row) for row in keep], int(sums.sizes.sum())


def kid_estimate(sums: KernelSums) -> Estimate:
    """Kernel distance with its jackknife."""
    return jackknife(*without_each(sums, KernelSums.u_statistic))


def paired_kid(a: KernelSums, b: KernelSums) -> Estimate:
    """Difference a - b of two models sampled with the same noise and labels, against one reference."""
    return paired_jackknife(without_each(a, KernelSums.u_statistic), without_each(b, KernelSums.u_statistic))


# ------------------------------------------------------------------------------------------------------------------------------ manifolds


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
    return remembered(x, k, lambda: torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in _distances(x, x)]))


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


def _over_sets(share: Callable[[Tensor], Tensor], generated: Tensor, member: Tensor) -> tuple[Estimate, Tensor]:
    """Share of the reference that `share` (M,) finds for the whole set, with an error from the disjoint sets `member` (N,): SD / sqrt K.
    And the shares that it finds for each of these (K,).

    Such a share grows with the size of the generated set, so the K smaller sets lie lower than `value`: they lend their spread, never
    their mean. That spread shrinks with 1/sqrt n, as the division assumes, only roughly. There is no bias correction: `corrected` is
    `value`.
    """
    value = float(share(generated).double().mean())
    parts = int(member.max()) + 1
    shares = torch.stack([share(generated[member == j]).double().mean() for j in range(parts)])
    se = float(shares.std() / math.sqrt(parts))
    half = student_t(parts - 1) * se
    return Estimate(value, value, se, (max(0.0, value - half), min(1.0, value + half)), len(generated), parts), shares


def recall_of_sets(generated: Tensor, reference: Tensor, k: int, member: Tensor) -> tuple[Estimate, Tensor]:
    """Recall of the whole set, with an error from the disjoint sets `member` (N,), five or more of at least k + 1 points each; and the
    recall of each of them (K,)."""
    return _over_sets(lambda points: inside(points, reference, k), generated, member)


def recall_estimate(generated: Tensor, reference: Tensor, k: int, member: Tensor) -> Estimate:
    """The first of `recall_of_sets`."""
    return recall_of_sets(generated, reference, k, member)[0]


def paired_sets(a: Tensor, b: Tensor) -> Estimate:
    """Mean difference a - b of shares (K,) of two models over the same disjoint sets of samples; SD / sqrt K, and Student's t."""
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a paired difference needs the same sets of both, two or more, got {tuple(a.shape)} and {tuple(b.shape)}")
    made = mean_estimate(a - b)
    half = student_t(made.groups - 1) * made.se
    return replace(made, ci95=(made.value - half, made.value + half))


def lies_in(generated: Tensor, reference: Tensor, k: int) -> Tensor:
    """In how many balls of the reference each generated point lies, over k, (N,)."""
    return _balls(reference, k, generated, lambda within: within.sum(1)).double() / k


def _covered(generated: Tensor, reference: Tensor, reach: Tensor) -> Tensor:
    """Which balls, of squared radii `reach` (M,) around the reference, hold a generated point, (M,)."""
    nearest = torch.cat([d.amin(1) for d in _distances(reference, generated)])
    return nearest <= reach + _slack(reference, generated)


def density_coverage(generated: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Density (about 1 for equal distributions, may exceed it) and coverage."""
    covered = _covered(generated, reference, radii(reference, k))
    return float(lies_in(generated, reference, k).mean()), float(covered.double().mean())


def density_estimate(generated: Tensor, reference: Tensor, k: int = 5) -> Estimate:
    """Density, with the error of a mean over generated points (N, d); the reference (M, d), at least k + 1 points, is taken as given."""
    return mean_estimate(lies_in(generated, reference, k))


def coverage_of_sets(generated: Tensor, reference: Tensor, k: int, member: Tensor) -> tuple[Estimate, Tensor]:
    """Coverage of the whole set, with an error from the disjoint sets `member` (N,), five or more; and that of each of them (K,)."""
    reach = radii(reference, k)
    return _over_sets(lambda points: _covered(points, reference, reach), generated, member)


def coverage_estimate(generated: Tensor, reference: Tensor, k: int, member: Tensor) -> Estimate:
    """The first of `coverage_of_sets`."""
    return coverage_of_sets(generated, reference, k, member)[0]


# --------------------------------------------------------------------------------------------------------------------------------- labels


def _inception(total: Tensor, negative_entropy: Tensor, n: Tensor) -> float:
    """From sums over n pictures of the probabilities (classes,) and of p log p."""
    return math.exp(float(negative_entropy / n + torch.special.entr(total / n).sum()))


def inception_estimate(logits: Tensor, member: Tensor) -> Estimate:
    """Inception score of all logits (N, classes) at once, with the jackknife over groups `member` (N,): no splits.

    Between 1 and the number of classes; too small by order 1/N, which `corrected` mends (a split of a tenth is ten times as much off).
    """
    log_p = logits.double().log_softmax(1)
    p, parts = log_p.exp(), int(member.max()) + 1
    each = torch.nn.functional.one_hot(member, parts).double().T                # (g, N)
    total, negative, sizes = each @ p, each @ (p * log_p).sum(1), each.sum(1)
    keep = 1 - torch.eye(parts, dtype=torch.float64)
    left = [_inception(row @ total, row @ negative, row @ sizes) for row in keep]
    return jackknife(_inception(total.sum(0), negative.sum(), sizes.sum()), left, len(logits))


def inception_splits(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over consecutive splits of logits (N, classes), as papers print it. The deviation is no error bar.

    A split of neighbours is what the authors' code takes: samples must not be sorted by class. Raises ValueError below two samples a split.
    """
    n = len(logits)
    if n < 2 * splits:
        raise ValueError(f"{splits} splits of an inception score need at least {2 * splits} samples, got {n}: raise the count")
    log_p = logits.double().log_softmax(1)
    parts = [log_p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    scores = torch.tensor([_inception(part.exp().sum(0), (part.exp() * part).sum(), torch.tensor(len(part))) for part in parts],
                          dtype=torch.float64)
    return float(scores.mean()), float(scores.std(correction=0))


def accuracy(logits: Tensor, labels: Tensor) -> Estimate:
    """Share of logits (N, classes) whose largest is at the label (N,). Binomial error: mildly wide where classes are balanced by design."""
    return proportion(logits.argmax(1) == labels)


def paired_accuracy(hits_a: Tensor, hits_b: Tensor) -> Estimate:
    """Difference a - b of two shares over the same samples (N,); normal interval of the mean of the differences."""
    if hits_a.shape != hits_b.shape:
        raise ValueError(f"a paired difference needs equal samples, got {len(hits_a)} and {len(hits_b)}")
    return mean_estimate(hits_a.double() - hits_b.double())
