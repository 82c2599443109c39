"""Means over prompts: conventions, pairing, strata, several comparisons."""

import math

import pytest
import torch

from stepdistill.eval import alignment as A
from stepdistill.eval import metrics as M


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------------------- CLIP score


@pytest.mark.parametrize(("convention", "expected"), [("cos", [0.8, 0.0]), ("100cos", [80.0, 50.0]), ("2.5cos", [2.0, 1.25])])
def test_conventions(convention, expected):
    """Cosines of 1 and 0.6, and of 1 and -1: what is below zero is cut before the mean."""
    images = torch.tensor([[[2.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, -7.0]]])
    texts = torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    assert A.clip_scores(images, texts, convention).tolist() == pytest.approx(expected)


def test_clip_scores_refuse():
    with pytest.raises(ValueError, match="there are cos, 100cos"):
        A.clip_scores(normal(2, 3, 4), normal(2, 4), "cosine")
    with pytest.raises(ValueError, match=r"texts \(P, d\)"):
        A.clip_scores(normal(2, 3, 4), normal(3, 4))
    with pytest.raises(ValueError, match="no direction"):
        A.clip_scores(normal(2, 3, 4), torch.zeros(2, 4))


def test_cos_teacher():
    x = normal(50, 6)
    assert A.cos_teacher(3 * x, x).value == pytest.approx(1)
    turned = x[:, [1, 0, 3, 2, 5, 4]] * torch.tensor([1.0, -1.0] * 3)                    # at a right angle, row by row
    assert A.cos_teacher(turned, x).value == pytest.approx(0, abs=1e-12)
    made, cosine = A.cos_teacher(x + normal(50, 6, seed=1), x), torch.cosine_similarity(x + normal(50, 6, seed=1), x)
    assert made.value == pytest.approx(float(cosine.mean()))
    assert made.se == pytest.approx(float(cosine.std()) / math.sqrt(50))
    with pytest.raises(ValueError, match="same samples"):
        A.cos_teacher(x, x[:40])
    with pytest.raises(ValueError, match="at least 2 values"):
        A.cos_teacher(x[:1], x[:1])


# ------------------------------------------------------------------------------------------------------------------------------ bootstrap


def skewed(seed: int, n: int = 100) -> torch.Tensor:
    """Exponential, of mean 1."""
    return -torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


@pytest.mark.parametrize(("make", "truth"), [
    (lambda seed: M.bootstrap_mean(skewed(seed), 1000), 1.0),
    (lambda seed: M.mean_estimate(skewed(seed)), 1.0),
    (lambda seed: M.bootstrap_ratio(0.8 * skewed(seed) + 0.1 * normal(100, seed=seed + 1000), skewed(seed), 1000), 0.8),
    (lambda seed: A.paired_means(skewed(seed) + 0.3, skewed(seed + 1000), draws=1000).delta, 0.3),
    (lambda seed: A.stratified_mean(torch.cat([skewed(seed), 5 + skewed(seed + 1000, 40)]), ["a"] * 100 + ["b"] * 40, 1000), 3.5),
], ids=["bootstrap", "closed form", "ratio", "paired", "strata"])
def test_intervals_cover_the_truth(make, truth):
    made = [make(seed) for seed in range(200)]
    assert 0.90 <= sum(e.ci95[0] <= truth <= e.ci95[1] for e in made) / 200 <= 0.99
    spread = torch.tensor([e.value for e in made]).std().item()
    assert 0.85 < sum(e.se for e in made) / 200 / spread < 1.15


def test_the_bootstrap_repeats_itself_in_blocks():
    """The same seed draws the same, and 10,000 draws of many prompts are made in pieces."""
    values = normal(1000, 2)
    drawn = M.resampled(values, 5000)
    assert drawn.shape == (5000, 2)
    assert torch.equal(drawn, M.resampled(values, 5000))
    assert not torch.equal(drawn, M.resampled(values, 5000, seed=1))
    torch.testing.assert_close(drawn.std(0), values.std(0, correction=0) / math.sqrt(1000), rtol=0.05, atol=0)


# -------------------------------------------------------------------------------------------------------------------------------- pairing


@pytest.mark.parametrize(("wins", "ties", "n", "expected"), [
    (8, 0, 10, (0.4902, 0.9433)), (5, 0, 10, (0.2366, 0.7634)), (4, 2, 10, (0.2366, 0.7634)), (10, 0, 10, (0.7225, 1.0)),
    (0, 0, 20, (0.0, 0.1611)),
])
def test_win_rate_has_wilsons_interval(wins, ties, n, expected):
    """Ties count half: four wins and two ties of ten are five."""
    a = torch.tensor([1.0] * wins + [0.0] * ties + [-1.0] * (n - wins - ties))
    rate = A.paired_means(a, torch.zeros(n), draws=100).win_rate
    assert rate.value == pytest.approx((wins + ties / 2) / n)
    assert rate.ci95 == pytest.approx(expected, abs=1e-4)


def test_pairing_is_sharper_and_antisymmetric():
    base = normal(200)
    a, b = base + 0.2 + 0.1 * normal(200, seed=1), base + 0.1 * normal(200, seed=2)
    made, back = A.paired_means(a, b), A.paired_means(b, a)
    assert made.delta.value == pytest.approx(float((a - b).mean()))
    assert made.delta.se < M.bootstrap_mean(a).se / 3
    assert made.delta.ci95 == pytest.approx(tuple(-x for x in reversed(back.delta.ci95)))
    assert made.win_rate.value == pytest.approx(1 - back.win_rate.value)
    block = made.to_dict()
    assert (block["delta"], block["ci95"], block["win_rate"]) == (made.delta.value, list(made.delta.ci95), made.win_rate.value)


def test_strata_weigh_alike():
    """Of 100 prompts of skill a and 20 of skill b; what differs between skills is no noise."""
    values = torch.cat([0.1 * normal(100), 10 + 0.1 * normal(20, seed=1)])
    skills = ["a"] * 100 + ["b"] * 20
    made = A.stratified_mean(values, skills)
    assert made.value == pytest.approx(float(values[:100].mean() + values[100:].mean()) / 2)
    expected = math.hypot(float(values[:100].std(correction=0)) / 10, float(values[100:].std(correction=0)) / math.sqrt(20)) / 2
    assert made.se == pytest.approx(expected, rel=0.05)
    assert made.se < M.bootstrap_mean(values).se / 5
    paired = A.paired_means(values, values - torch.tensor([1.0] * 100 + [4.0] * 20), skills)
    assert paired.delta.value == pytest.approx(2.5)
    assert paired.win_rate.value == 1


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="at least 5 prompts, got 4"):
        A.paired_means(normal(4), normal(4))
    with pytest.raises(ValueError, match="at least 5 prompts, got 2"):
        A.stratified_mean(normal(10), ["a"] * 8 + ["b"] * 2)
    with pytest.raises(ValueError, match="10 prompts and 9 strata"):
        A.stratified_mean(normal(10), ["a"] * 9)
    with pytest.raises(ValueError, match="one value a prompt"):
        A.paired_means(normal(10), normal(9))
    with pytest.raises(ValueError, match="at least 1 trial"):
        M.wilson(0.0, 0)


# ------------------------------------------------------------------------------------------------------------------- many comparisons


@pytest.mark.parametrize(("t", "dof"), [(12.7062, 1), (4.30265, 2), (3.18245, 3), (2.77645, 4), (2.57058, 5), (2.26216, 9), (2.06390, 24),
                                        (1.98397, 100), (1.96234, 1000), (1.95996, 10**6)])
def test_p_value_is_five_per_cent_at_students_quantile(t, dof):
    made = M.Estimate(9.0, -2 * t, 2.0, (0.0, 0.0), dof + 1, dof + 1)
    assert A.p_value(made) == pytest.approx(0.05, abs=2e-6)


def test_p_value_at_the_ends():
    assert A.p_value(M.Estimate(0, 0, 1, (0, 0), 10, 10)) == 1
    assert A.p_value(M.Estimate(1, 1, 0, (1, 1), 10, 10)) == 0
    assert A.p_value(M.Estimate(0, 0, 0, (0, 0), 10, 10)) == 1
    assert 0 <= A.p_value(M.Estimate(50, 50, 1, (0, 0), 25, 25)) < 1e-12


def test_holm():
    """Four comparisons worked by hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 may not fall below the one before it."""
    assert A.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(A.holm({"b": 0.5, "a": 0.4})) == ["b", "a"]
    assert A.holm({"b": 0.9, "a": 0.8}) == {"b": 1.0, "a": 1.0}
    assert A.holm({}) == {}
