"""Measures against closed forms, against torch-fidelity, and their errors against repeated sampling."""

import math

import pytest
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from stepdistill.eval import metrics as M


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean, cov) -> M.Moments:
    return M.Moments.from_statistics(1000, torch.as_tensor(mean), torch.as_tensor(cov))


# ------------------------------------------------------------------------------------------------------------------------------- frechet


def test_frechet_of_commuting_gaussians():
    a, b = torch.tensor([0.3, 1.0, 2.5]), torch.tensor([1.2, 0.1, 2.0])
    mean = torch.tensor([0.5, -1.0, 2.0])
    turn, _ = torch.linalg.qr(normal(3, 3))
    ours = M.frechet(gaussian(mean, turn @ a.double().diag() @ turn.T), gaussian(torch.zeros(3), turn @ b.double().diag() @ turn.T))
    assert ours == pytest.approx(float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-6)


def test_frechet_of_gaussians_that_do_not_commute():
    """For 2x2 matrices tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2."""
    a, b = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([[0.5, -0.3], [-0.3, 1.5]]).double()
    trace = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    expected = float(a.trace() + b.trace()) - 2 * trace + 5.0
    assert M.frechet(gaussian([1.0, 2.0], a), gaussian([0.0, 0.0], b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [300, 5000])
def test_frechet_agrees_with_torch_fidelity(n):
    x, y = normal(n, 48) @ normal(48, 48, seed=1) * 0.1 + 0.3, normal(4000, 48, seed=2) @ normal(48, 48, seed=3) * 0.1
    stats = [metric_fid.fid_features_to_statistics(f) for f in (x, y)]
    theirs = metric_fid.fid_statistics_to_metric(*stats, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert M.frechet(M.Moments.of(x), M.Moments.of(y)) == pytest.approx(theirs, rel=1e-4)


def test_distance_to_itself_is_zero():
    m = M.Moments.of(normal(2000, 64).float())
    assert abs(M.frechet(m, m)) < 1e-4


def test_fewer_samples_than_dimensions():
    """20 points span 19 of 64 dimensions: with S = I the trace term is the sum of the roots of S's own eigenvalues."""
    m, unit = M.Moments.of(normal(20, 64)), gaussian(torch.zeros(64), torch.eye(64))
    expected = m.mean.square().sum() + m.cov.trace() + 64 - 2 * torch.linalg.eigvalsh(m.cov).clamp(min=0).sqrt().sum()
    assert M.frechet(m, unit) == pytest.approx(float(expected), rel=1e-6)
    assert M.frechet(unit, m) == pytest.approx(float(expected), rel=1e-6)
    assert abs(M.frechet(m, m)) < 1e-4


def test_moments_add_and_subtract():
    x = normal(101, 6)
    a, b, whole = M.Moments.of(x[:40]), M.Moments.of(x[40:]), M.Moments.of(x)
    for joined in (a + b, whole - b + b):
        assert joined.n == 101
        torch.testing.assert_close(joined.mean, x.mean(0))
        torch.testing.assert_close(joined.cov, torch.cov(x.T))
    torch.testing.assert_close((whole - b).cov, torch.cov(x[:40].T))
    again = M.Moments.from_statistics(101, whole.mean, whole.cov)
    torch.testing.assert_close(again.outer, whole.outer)
    with pytest.raises(ValueError, match="at least 2"):
        _ = M.Moments.of(x[:1]).cov


# ----------------------------------------------------------------------------------------------------------------------------- jackknife


TRUTH = 8 * (math.sqrt(1.5) - 1) ** 2 + 8 * 0.1**2


def draw(seed: int, n: int = 400) -> torch.Tensor:
    """Features of a model at distance TRUTH from the standard normal, d = 8."""
    return normal(n, 8, seed=seed) * math.sqrt(1.5) + 0.1


def estimate(x: torch.Tensor, groups: int = 25) -> M.Estimate:
    member = M.members(len(x), groups)
    return M.frechet_estimate([M.Moments.of(x[member == j]) for j in range(groups)], gaussian(torch.zeros(8), torch.eye(8)))


def test_frechet_jackknife_removes_the_bias_and_covers_the_truth():
    made = [estimate(draw(seed)) for seed in range(200)]
    mean = lambda name: sum(getattr(e, name) for e in made) / len(made)  # noqa: E731
    spread = torch.tensor([e.corrected for e in made]).std().item()
    noise = spread / math.sqrt(len(made))
    assert abs(mean("corrected") - TRUTH) < 3 * noise < mean("value") - TRUTH             # the plug-in value is visibly too large
    assert sum(abs(e.corrected - TRUTH) < 3 * e.se for e in made) >= 190
    assert 0.90 <= sum(e.ci95[0] <= TRUTH <= e.ci95[1] for e in made) / len(made) <= 0.99
    assert 0.85 < mean("se") / spread < 1.25
    assert (made[0].n, made[0].groups) == (400, 25)


def test_paired_difference_is_sharper_than_two_single_ones():
    noise = normal(1000, 8, seed=5)
    reference, member = gaussian(torch.zeros(8), torch.eye(8)), M.members(1000, 25)
    a, b = ([M.Moments.of(f[member == j]) for j in range(25)] for f in (noise * 1.30, noise * 1.25))
    delta, one = M.paired_frechet(a, b, reference), M.frechet_estimate(a, reference)
    assert delta.value == pytest.approx(one.value - M.frechet_estimate(b, reference).value)
    assert delta.se < one.se / 2
    assert delta.ci95[0] < 8 * (0.30**2 - 0.25**2) < delta.ci95[1]
    with pytest.raises(ValueError, match="equal samples"):
        M.paired_frechet(a, b[:20], reference)


def test_groups_hold_every_class_alike():
    """Labels i mod 10 and groups i mod 25 share a factor: each group holds two classes, and the error comes out several times too large."""
    member = M.members(10000, 25, classes=10)
    counts = torch.zeros(25, 10, dtype=torch.long).index_put_((member, torch.arange(10000) % 10), torch.tensor(1), accumulate=True)
    assert (counts == 40).all()
    centres, reference = 3 * normal(10, 8, seed=7), gaussian(torch.zeros(8), torch.eye(8))
    values, errors = [], {1: [], 10: []}
    for seed in range(40):
        x = centres[torch.arange(1000) % 10] + normal(1000, 8, seed=seed)
        for classes in errors:
            member = M.members(1000, 25, classes)
            errors[classes].append(M.frechet_estimate([M.Moments.of(x[member == j]) for j in range(25)], reference))
        values.append(errors[10][-1].value)
    spread = torch.tensor(values).std().item()
    naive, balanced = (sum(e.se for e in errors[c]) / 40 / spread for c in (1, 10))
    assert 0.75 < balanced < 1.4
    assert naive > 3
    with pytest.raises(ValueError, match="raise the count"):
        M.members(100, 25, classes=10)


@pytest.mark.parametrize(("dof", "exact"), [(4, 2.77645), (9, 2.26216), (24, 2.06390), (10000, 1.96020)])
def test_students_quantile(dof, exact):
    assert M.student_t(dof) == pytest.approx(exact, rel=4e-4)


# -------------------------------------------------------------------------------------------------------------------------------- kernel


def naive_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    off = lambda m: (m.sum() - m.diagonal().sum()) / (len(m) * (len(m) - 1))  # noqa: E731
    return float(off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean())


def test_kid_is_the_formula_for_unequal_sizes():
    x, y = normal(70, 5) + 0.2, normal(50, 5, seed=1)
    assert M.kid(x, y) == pytest.approx(naive_kid(x, y), rel=1e-10)


def test_kid_in_blocks():
    x, y = normal(50, 3), normal(40, 3, seed=1)
    assert M._kernel_sum(x, y, block=7) == pytest.approx(float((x @ y.T / 3 + 1).pow(3).sum()), rel=1e-10)


def test_kid_agrees_with_torch_fidelity():
    """Its subsets are the whole set here, so their mean is the one value."""
    x, y = normal(500, 16).float() * 1.1, normal(500, 16, seed=1).float()
    theirs = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=500, kid_kernel="poly", verbose=False)
    assert M.kid(x, y) == pytest.approx(float(theirs[metric_kid.KEY_METRIC_KID_MEAN]), rel=1e-4)


def test_kid_is_unbiased_at_fifty():
    """Mean zero for equal distributions, where the diagonals would add 0.3."""
    values = torch.tensor([M.kid(normal(50, 4, seed=2 * i), normal(50, 4, seed=2 * i + 1)) for i in range(400)])
    assert values.mean().abs() < 3 * values.std() / 20
    assert 3 * values.std() / 20 < 0.05
    assert (values < 0).any()


def test_kid_jackknife():
    """Leaving a group out of the sums is leaving it out of the data; the error matches repeated sampling."""
    reference = normal(300, 4, seed=999)
    x, member = normal(250, 4) * 1.2 + 0.4, M.members(250, 25)
    sums = M.kernel_sums(x, reference, member)
    keep = torch.ones(25, dtype=torch.bool)
    keep[3] = False
    assert sums.u_statistic(keep) == pytest.approx(M.kid(x[member != 3], reference), rel=1e-9)
    made = [M.kid_estimate(M.kernel_sums(normal(250, 4, seed=i) * 1.2 + 0.4, reference, member)) for i in range(40)]
    spread = torch.tensor([e.value for e in made]).std().item()
    assert 0.75 < sum(e.se for e in made) / 40 / spread < 1.3
    assert made[0].corrected == pytest.approx(made[0].value, abs=made[0].se / 2)          # nothing to correct
    other = M.kernel_sums(x * 1.01, reference, member)
    delta = M.paired_kid(other, sums)
    assert delta.value == pytest.approx(other.u_statistic() - sums.u_statistic())
    assert delta.se < M.kid_estimate(sums).se / 2


# ------------------------------------------------------------------------------------------------------------------------------ manifolds


def test_identical_sets():
    x = normal(300, 6).float()
    assert M.precision_recall(x, x.clone()) == (1.0, 1.0)
    assert M.density_coverage(x, x.clone())[1] == 1.0


def test_separate_sets():
    x = normal(100, 6)
    assert M.precision_recall(x, x + 100) == (0.0, 0.0)
    assert M.density_coverage(x, x + 100) == (0.0, 0.0)


def test_density_of_independent_draws_is_one():
    density, coverage = M.density_coverage(normal(2000, 6), normal(2000, 6, seed=1))
    assert density == pytest.approx(1, abs=0.06)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.03)                                # Naeem et al., equation 10


def test_a_collapsed_model_is_precise_and_recalls_little():
    real, fake = normal(600, 4), normal(600, 4, seed=1) * 0.1
    precision, recall = M.precision_recall(fake, real)
    assert precision > 0.95
    assert recall < 0.2
    assert M.density_coverage(fake, real)[1] < 0.4


def test_what_a_reference_says_is_computed_once_and_again_when_it_changes() -> None:
    reference, asked = normal(50, 3, seed=1), []
    ask = lambda: M.remembered(reference, "sum", lambda: asked.append(1) or float(reference.sum()))  # noqa: E731
    assert ask() == ask() == float(reference.sum())
    assert len(asked) == 1
    reference[0] += 1
    assert ask() == pytest.approx(float(reference.sum()))
    assert len(asked) == 2
    first = M.radii(reference, 3)
    reference *= 2
    torch.testing.assert_close(M.radii(reference, 3), 4 * first)
    with torch.inference_mode():
        assert M.radii(normal(5, 2, seed=2), 1).shape == (5,)


def test_radius_leaves_out_the_point_itself():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert M.radii(line, 1).tolist() == [1, 1, 4, 16]
    assert M.radii(line, 2).tolist() == [9, 4, 9, 36]
    with pytest.raises(ValueError, match="at least 5 points"):
        M.radii(line, 4)


def test_ties_are_inside():
    """A point at exactly the radius counts, far from the origin too, where rounding is coarse."""
    for offset in (0.0, 1e3):
        real = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.0]], dtype=torch.float64) + offset
        assert M.inside(real, torch.tensor([[0.3, 0.0], [0.31, 0.0]], dtype=torch.float64) + offset, k=1).tolist() == [True, False]
    same = torch.full((5, 3), 0.7)                                                        # all radii are zero
    assert M.precision_recall(same, same) == (1.0, 1.0)


def test_precision_and_recall_agree_with_torch_fidelity():
    """More points than one block."""
    fake, real = normal(700, 8).float() * 0.8, normal(900, 8, seed=1).float()
    theirs = metric_prc.calculate_precision_recall_full(fake, real, 3, 10000)
    assert M.precision_recall(fake, real) == pytest.approx([float(v) for v in theirs][:2], abs=2e-3)


def test_sets_are_paired_one_by_one():
    """Both models' sets move together, which cancels; five differences have Student's t of four degrees of freedom."""
    common, gain = torch.tensor([0.1, 0.5, 0.3, 0.7, 0.2]).double(), torch.tensor([0.02, 0.03, 0.02, 0.04, 0.03]).double()
    made = M.paired_sets(common + gain, common)
    se = float(gain.std()) / 5**0.5
    assert (made.value, made.se, made.groups) == (pytest.approx(0.028), pytest.approx(se), 5)
    assert made.ci95 == pytest.approx((0.028 - 2.776 * se, 0.028 + 2.776 * se), rel=1e-3)
    with pytest.raises(ValueError, match="same sets of both"):
        M.paired_sets(common, common[:4])


def test_recall_keeps_the_value_of_the_whole_set():
    fake, real, member = normal(500, 4) * 0.6, normal(400, 4, seed=1), M.members(500, 5, 10)
    made = M.recall_estimate(fake, real, 3, member)
    shares = torch.tensor([M.precision_recall(fake[member == j], real)[1] for j in range(5)])
    assert made.value == M.precision_recall(fake, real)[1] == made.corrected
    assert made.se == pytest.approx(float(shares.std() / math.sqrt(5)), rel=1e-6)
    assert (made.n, made.groups) == (500, 5)


# ------------------------------------------------------------------------------------------------------------- density, coverage, fidelity


def test_density_has_the_error_of_a_mean_over_generated_points():
    real, member = normal(300, 4, seed=1), M.members(400, 5)
    made = [M.density_estimate(normal(400, 4, seed=seed), real) for seed in range(10, 60)]
    spread = torch.tensor([e.value for e in made]).std().item()
    assert 0.75 < sum(e.se for e in made) / 50 / spread < 1.3
    fake = normal(400, 4)
    density, coverage = M.density_coverage(fake, real)
    assert M.density_estimate(fake, real).value == pytest.approx(density)
    assert M.coverage_estimate(fake, real, 5, member).value == coverage


def test_coverage_has_the_spread_of_disjoint_sets():
    fake, real, member = normal(500, 4) * 0.6, normal(300, 4, seed=1), M.members(500, 5)
    made = M.coverage_estimate(fake, real, 5, member)
    shares = torch.tensor([M.density_coverage(fake[member == j], real)[1] for j in range(5)])
    assert made.se == pytest.approx(float(shares.std() / math.sqrt(5)), rel=1e-5)
    assert made.value == made.corrected > float(shares.mean())
    assert (made.n, made.groups) == (500, 5)


def test_floor_of_teacher_fidelity():
    """A second set of the teacher is at the floor; a student is above it, and the paired difference says by how much."""
    def groups(x):
        return [M.Moments.of(x[M.members(2000, 25) == j]) for j in range(25)]

    teacher, noise = M.Moments.of(normal(2000, 8, seed=1)), normal(2000, 8, seed=2)
    floor, other, student = groups(noise), groups(normal(2000, 8, seed=3)), groups(1.2 * noise)
    low, high = M.paired_frechet(other, floor, teacher).ci95
    assert low < 0 < high
    above = M.paired_frechet(student, floor, teacher)
    assert above.ci95[0] > 0
    assert above.ci95[0] < 8 * 0.2**2 + 0.02
    assert M.frechet_estimate(floor, teacher).value > 0                                  # both sets are finite


def test_too_few_samples_are_refused():
    x = normal(6, 3)
    for measure in (lambda: M.density_estimate(x, x[:5]), lambda: M.coverage_estimate(x, x[:5], 5, torch.zeros(6, dtype=torch.long))):
        with pytest.raises(ValueError, match="at least 6 points, got 5"):
            measure()
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        M.density_estimate(x[:1], normal(10, 3))
    with pytest.raises(ValueError, match="at least 5 groups, got 4"):
        M.coverage_estimate(normal(40, 3), normal(10, 3), 5, M.members(40, 4))
    with pytest.raises(ValueError, match="at least 20 samples, got 19"):
        M.inception_splits(normal(19, 3))
    with pytest.raises(ValueError, match="at least 5 groups, got 2"):
        M.inception_estimate(normal(20, 3), M.members(20, 2))


# ------------------------------------------------------------------------------------------------------------------------ inception score


def test_inception_score_at_its_ends():
    """Sure and balanced over ten classes it is 10, saying the same of every picture it is 1."""
    sure, same = 100 * torch.eye(10)[torch.arange(200) % 10], normal(1, 10).expand(200, -1)
    for logits, score in ((sure, 10.0), (same, 1.0)):
        assert M.inception_estimate(logits, M.members(200, 5, 10)).value == pytest.approx(score)
        assert M.inception_splits(logits) == pytest.approx((score, 0), abs=1e-9)


def test_inception_splits_agree_with_torch_fidelity():
    logits = 2 * normal(1003, 12)
    theirs = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    expected = (theirs[metric_isc.KEY_METRIC_ISC_MEAN], theirs[metric_isc.KEY_METRIC_ISC_STD])
    assert M.inception_splits(logits) == pytest.approx(expected, rel=1e-9)


def test_inception_jackknife():
    """Leaving out a group is scoring the others; the bias, which splits make worse, is gone; the error is that of repeated sampling."""
    member = M.members(100, 10)
    logits = 2 * normal(100, 12)
    whole = lambda x: M.inception_estimate(x, M.members(len(x), 5)).value  # noqa: E731
    made = M.inception_estimate(logits, member)
    left = [whole(logits[member != j]) for j in range(10)]
    assert made.corrected == pytest.approx(10 * whole(logits) - 9 * sum(left) / 10)
    truth = whole(2 * normal(200_000, 12, seed=1))
    repeats = [M.inception_estimate(2 * normal(100, 12, seed=seed), member) for seed in range(2, 202)]
    values, corrected = (torch.tensor([getattr(e, name) for e in repeats]) for name in ("value", "corrected"))
    assert abs(float(corrected.mean()) - truth) < 3 * float(corrected.std()) / math.sqrt(200) < truth - float(values.mean())
    assert sum(M.inception_splits(2 * normal(100, 12, seed=seed))[0] for seed in range(2, 22)) / 20 < float(values.mean()) - 0.05
    assert 0.75 < sum(e.se for e in repeats) / 200 / float(corrected.std()) < 1.3


# --------------------------------------------------------------------------------------------------------------------------------- shares


def test_accuracy():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    assert M.accuracy(logits, torch.tensor([0, 1, 2, 0, 0])).value == pytest.approx(0.8)


def test_wilson_interval_covers():
    """It may not collapse at 1, and holds the truth in about 95 of 100 draws."""
    full = M.proportion(torch.ones(100, dtype=torch.bool))
    assert full.value == full.ci95[1] == 1.0
    assert full.ci95[0] == pytest.approx(0.9630, abs=1e-4)
    assert full.se > 0
    draws = torch.rand(2000, 200, generator=torch.Generator().manual_seed(0)) < 0.9
    covered = [e.ci95[0] <= 0.9 <= e.ci95[1] for e in map(M.proportion, draws)]
    assert 0.92 < sum(covered) / 2000 < 0.98


def test_paired_accuracy():
    a, b = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1]).bool(), torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]).bool()
    delta = M.paired_accuracy(a, b)
    assert delta.value == pytest.approx(1 / 8)
    assert delta.se == pytest.approx(float((a.double() - b.double()).std()) / math.sqrt(8))
    with pytest.raises(ValueError, match="equal samples"):
        M.paired_accuracy(a, b[:4])
