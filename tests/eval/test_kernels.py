"""Kernel distances pair by pair, and their intervals over many draws."""

import math

import pytest
import torch

from stepdistill.eval import kernels as K
from stepdistill.eval import metrics as M


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def circle(n: int, seed: int) -> torch.Tensor:
    """Uniform on the unit circle."""
    angle = 2 * math.pi * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1)


def looped(x: list[list[float]], y: list[list[float]], k) -> float:
    return sum(k(a, b) for a in x for b in y)


def dot(a: list[float], b: list[float]) -> float:
    return sum(s * t for s, t in zip(a, b, strict=True))


def test_kid_is_a_double_loop():
    k = lambda a, b: (dot(a, b) / 5 + 1) ** 3  # noqa: E731
    x, y = (normal(40, 5) * 1.3).tolist(), normal(40, 5, seed=1).tolist()
    off = lambda f: (looped(f, f, k) - sum(k(a, a) for a in f)) / (40 * 39)  # noqa: E731
    ours = M.kid(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert ours == pytest.approx(off(x) + off(y) - 2 * looped(x, y, k) / 1600, rel=1e-9)


def test_cmmd_is_a_double_loop():
    """Vectors are made unit vectors, the diagonals count, and 1000 stands before it."""
    def k(a, b):
        a, b = ([s / math.hypot(*f) for s in f] for f in (a, b))
        return math.exp(-sum((s - t) ** 2 for s, t in zip(a, b, strict=True)) / 200)

    x, y = (normal(40, 5) + 0.5).tolist(), normal(30, 5, seed=1).tolist()
    expected = looped(x, x, k) / 1600 + looped(y, y, k) / 900 - 2 * looped(x, y, k) / 1200
    ours = K.cmmd(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert ours == pytest.approx(1000 * expected, rel=1e-8)


def test_cmmd_of_two_directions():
    east, north = torch.tensor([[2.0, 0.0]]).repeat(3, 1), torch.tensor([[0.0, 5.0]]).repeat(4, 1)
    assert K.cmmd(east, north) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-9)
    assert K.cmmd(east, 7 * east) == pytest.approx(0, abs=1e-9)


def test_the_digits_survive_in_cmmd():
    """Two clouds a hair apart: the kernel moves by 1e-12, far below what a sum of ones would keep."""
    x = torch.tensor([[1.0, 0.0]]).double().repeat(1000, 1)
    y = torch.tensor([[1.0, 1e-5]]).double().repeat(1000, 1)
    angle = math.atan(1e-5)
    assert K.cmmd(x, y) == pytest.approx(2000 * -math.expm1((math.cos(angle) - 1) / 100), rel=1e-4)


def test_leaving_a_group_out_of_the_sums_is_leaving_it_out_of_the_data():
    x, y, member = normal(60, 4) + 0.3, normal(50, 4, seed=1), M.members(60, 6)
    sums = K.cmmd_sums(x, y, member)
    keep = torch.ones(6, dtype=torch.bool)
    keep[2] = False
    assert 1000 * sums.v_statistic(keep) == pytest.approx(K.cmmd(x[member != 2], y), rel=1e-9)
    made = K.cmmd_estimate(sums)
    assert made.value == pytest.approx(K.cmmd(x, y), rel=1e-9)
    assert (made.n, made.groups) == (60, 6)


def share_covering(truth: float, make) -> float:
    made = [make(seed) for seed in range(200)]
    return sum(e.ci95[0] <= truth <= e.ci95[1] for e in made) / len(made)


def test_kid_interval_covers_the_truth():
    """Of x ~ N(0, s^2): the mean of k(x, x') is 1 + 3 s^4 / d, that of k(x, y) is 1 + 3 s^2 |y|^2 / d^2."""
    d, s, y, member = 4, 1.4, normal(60, 4, seed=999), M.members(200, 10)
    k = (y @ y.T / d + 1).pow(3)
    truth = 1 + 3 * s**4 / d + float(k.sum() - k.diagonal().sum()) / (60 * 59) - 2 * float((1 + 3 * s**2 * y.square().sum(1) / d**2).mean())
    assert 0.90 <= share_covering(truth, lambda seed: M.kid_estimate(M.kernel_sums(s * normal(200, d, seed=seed), y, member))) <= 0.99


def test_cmmd_interval_covers_the_truth_without_the_bias():
    """Of x uniform on the circle the mean of k to any unit vector is exp(-1/100) I0(1/100)."""
    angle = 0.6 * normal(60, seed=999)
    y, member = torch.stack([angle.cos(), angle.sin()], 1), M.members(200, 10)
    mean = float(torch.special.i0e(torch.tensor(0.01, dtype=torch.float64)))
    truth = 1000 * float(((y @ y.T - 1) / 100).exp().mean() - mean)
    made = [K.cmmd_estimate(K.cmmd_sums(circle(200, seed), y, member)) for seed in range(200)]
    assert 0.90 <= sum(e.ci95[0] <= truth <= e.ci95[1] for e in made) / 200 <= 0.99
    off = torch.tensor([[e.value - truth, e.corrected - truth] for e in made])
    noise = float(off[:, 1].std()) / math.sqrt(200)
    assert abs(float(off[:, 1].mean())) < 3 * noise
    bias = 1000 * (1 - mean) / 200                                                       # of the diagonal
    assert float((off[:, 0] - off[:, 1]).mean()) == pytest.approx(bias, rel=0.1)


def test_paired_difference_is_sharper():
    y, member, x = normal(80, 6, seed=9) + 0.5, M.members(200, 10), normal(200, 6)
    a, b = K.cmmd_sums(x + 0.8, y, member), K.cmmd_sums(x + 0.75, y, member)
    delta = K.paired_cmmd(a, b)
    assert delta.value == pytest.approx(K.cmmd(x + 0.8, y) - K.cmmd(x + 0.75, y))
    assert delta.se < K.cmmd_estimate(a).se / 2
    with pytest.raises(ValueError, match="equal samples and groups"):
        K.paired_cmmd(a, K.cmmd_sums(x[:100], y, M.members(100, 10)))


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        K.cmmd(normal(1, 4), normal(5, 4))
    with pytest.raises(ValueError, match="no direction"):
        K.cmmd(torch.zeros(5, 4), normal(5, 4))
    with pytest.raises(ValueError, match="at least 5 groups, got 4"):
        K.cmmd_estimate(K.cmmd_sums(normal(40, 4), normal(20, 4), M.members(40, 4)))
