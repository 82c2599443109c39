"""Grids of times and distributions of t."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from oracles import f64

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.times import LogitNormal, LogNormal, Uniform, index_grid, lcm_grid, neighbours, shift, to_index, trailing


@pytest.mark.parametrize(("count", "m", "golden"), [
    (4, 1.0, (1.0, 0.75, 0.5, 0.25)), (4, 3.0, (1.0, 0.9, 0.75, 0.5)), (4, 5.0, (1.0, 0.9375, 5 / 6, 0.625)), (1, 3.0, (1.0,)),
])
def test_trailing_grids(count, m, golden):
    """distribution_matching S.4."""
    assert trailing(count, m) == pytest.approx(golden, abs=1e-15)


@pytest.mark.parametrize(("count", "indices"), [(4, [999, 749, 499, 249]), (2, [999, 499]), (1, [999])])
def test_trailing_is_the_index_grid(count, indices):
    assert [to_index(t, 1000) for t in trailing(count)] == indices
    assert index_grid(tuple(indices), 1000) == trailing(count)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 10, 20, 25])
def test_trailing_is_diffusers(count):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    assert [to_index(t, 1000) for t in trailing(count)] == scheduler.timesteps.int().tolist()
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(sigmas=[1 - i / count for i in range(count)])
    assert trailing(count, 3.0) == pytest.approx(flow.sigmas[:-1].tolist(), abs=1e-6)


@pytest.mark.parametrize(("count", "indices"), [(4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])])
def test_lcm_grids(count, indices):
    """Trajectory S7."""
    assert [to_index(t, 1000) for t in lcm_grid(count)] == indices


@pytest.mark.parametrize(("original", "table"), [(50, 1000), (40, 1000), (30, 1000), (100, 1000), (50, 500)])
def test_lcm_grids_are_lcms(original, table):
    scheduler = LCMScheduler(num_train_timesteps=table, original_inference_steps=original)
    for count in range(1, original + 1):
        scheduler.set_timesteps(count)
        assert [to_index(t, table) for t in lcm_grid(count, original, table)] == scheduler.timesteps.tolist(), count


@pytest.mark.parametrize("count", [0, -1])
def test_grids_have_steps(count):
    with pytest.raises(ValueError, match="at least one"):
        trailing(count)
    with pytest.raises(ValueError, match="1 to 50"):
        lcm_grid(count)


def test_lcm_grid_has_no_more_steps_than_training():
    with pytest.raises(ValueError, match="1 to 50"):
        lcm_grid(51)


@pytest.mark.parametrize("indices", [(1000, 499), (-1,)])
def test_indices_must_lie_in_the_table(indices):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        index_grid(indices, 1000)


@pytest.mark.parametrize("table", [1000, 40, 999])
def test_every_index_comes_back(table):
    assert [to_index(t, table) for t in index_grid(tuple(range(table)), table)] == list(range(table))


@pytest.mark.parametrize(("t", "nearest"), [
    (0.2503, "0.25"), (0.2507, "0.251"), (0.0, "0.001"), (0.0001, "0.001"), (1.5, "1.0"), (-0.5, "0.001"),
])
def test_other_times_have_no_index(t, nearest):
    with pytest.raises(ValueError, match=rf"not a step of a 1000-step table; the nearest is {nearest}$"):
        to_index(t, 1000)


def test_shift():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift(u, 1.0), u, rtol=0, atol=1e-16)
    torch.testing.assert_close(shift(shift(u, 3.0), 1 / 3), u, rtol=0, atol=1e-15)
    torch.testing.assert_close(shift(shift(u, 3.0), 2.0), shift(u, 6.0), rtol=0, atol=1e-15)
    assert shift(f64([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------------- distributions

DRAWS = Draws(0, range(4000))


def test_uniform():
    t = Uniform(0.02, 0.98).sample(DRAWS.each("t"))
    assert t.dtype == torch.float64
    assert t.shape == (4000,)
    assert 0.02 <= float(t.min()) < 0.022
    assert 0.978 < float(t.max()) < 0.98
    assert abs(float(t.mean()) - 0.5) < 4 * 0.96 / (12 * 4000) ** 0.5
    assert abs(float(t.std()) - 0.96 / 12**0.5) < 0.01


def test_uniform_bounds_are_unshifted():
    """T17: a bound on the unshifted variable holds after the shift."""
    plain, shifted = (Uniform(0.2, 0.6, m).sample(DRAWS.each("t")) for m in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert float(shifted.min()) > 3 * 0.2 / 1.4 - 1e-12
    assert float(shifted.max()) < 3 * 0.6 / 2.2 + 1e-12
    assert abs(float((shifted < 3 * 0.4 / 1.8).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5          # the median moves with the shift


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.1, 2.0)])
def test_logit_normal(mean, std):
    t = LogitNormal(mean, std).sample(DRAWS.each("t"))
    logit = torch.logit(t)
    assert t.dtype == torch.float64
    assert 0 < float(t.min()) < float(t.max()) < 1
    assert abs(float(logit.mean()) - mean) < 4 * std / 4000**0.5
    assert abs(float(logit.std()) - std) < 4 * std / 8000**0.5


@pytest.mark.parametrize("times", [Uniform(0.1, 0.9), LogitNormal()])
def test_shared_draws_are_scalars(times):
    assert times.sample(Draws(0, range(5)).shared("t")).shape == ()
    assert torch.equal(times.sample(Draws(0, (3,)).each("t")), times.sample(Draws(0, range(5)).each("t"))[3:4])


@pytest.mark.parametrize("wrong", [{"low": -0.1}, {"high": 1.1}, {"low": 0.6, "high": 0.5}, {"shift": 0.0}, {"shift": -1.0}])
def test_wrong_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match="low <= high"):
        Uniform(**wrong)


@pytest.mark.parametrize(("points", "skip"), [(50, 1), (1000, 20), (7, 3)])
def test_neighbours(points, skip):
    """Every point above 0 is drawn, equally often; the other is `skip` below it or 0."""
    t, r = neighbours(DRAWS.each("n"), points, skip)
    assert t.dtype == r.dtype == torch.float64
    n = (t * points).round().long()
    torch.testing.assert_close(r, (n - skip).clamp_min(0).double() / points, rtol=0, atol=0)
    assert int(n.min()) >= 1
    if points <= 50:
        counts = n.bincount(minlength=points + 1)[1:].double()
        assert float((counts - 4000 / points).abs().max()) < 5 * (4000 / points) ** 0.5


def test_neighbours_of_a_table_are_lcms():
    """Trajectory S3: 50 points are the indices 19, 39, ..., 999 of a 1000-step table."""
    t, _ = neighbours(DRAWS.each("n"), 50)
    assert sorted({to_index(float(u), 1000) for u in t}) == list(range(19, 1000, 20))


def test_log_normal():
    law = LogNormal(-1.1, 2.0)
    kappa = law.sample(DRAWS.each("k"))
    assert kappa.dtype == torch.float64
    assert abs(float(kappa.log().mean()) + 1.1) < 4 * 2 / 4000**0.5
    low, high = f64(0.1), f64(1.0)
    inside = float(((kappa > low) & (kappa <= high)).double().mean())
    assert inside == pytest.approx(float(law.share(high) - law.share(low)) / 2, abs=0.03)           # erf runs over (-1, 1)
    with pytest.raises(ValueError, match="std > 0"):
        LogNormal(0.0, 0.0)
