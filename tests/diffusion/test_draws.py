"""Keyed randomness: the same numbers in every process, for every batch size, in every order."""

import pytest
import torch

from stepdistill.diffusion.draws import Draws, key

DRAWS = Draws(1, (0, 1, 5), step=2, update=3)


@pytest.mark.parametrize(("parts", "golden"), [
    ((0,), 4761921975702974394), ((1, 2, "eps", 5), 5313836060486541283), (("a", "b"), 501563303439714256),
])
def test_keys_are_golden(parts, golden):
    """The same in every process (hash seeds differ between them) and version; changing one changes every sample ever drawn."""
    assert key(*parts) == golden
    assert 0 <= key(*parts) < 2**63


def test_draws_are_golden():
    assert DRAWS.each("eps").seeds == (2088185813520860810, 9015169352902621942, 3412095935747293132)
    assert DRAWS.shared("eps").seeds == (70851327555332086,)
    assert DRAWS.each("n").integers(1000).tolist() == [442, 207, 799]
    golden = torch.tensor([[0.5638235, -1.5932124], [0.0207309, -0.2416822], [0.3816718, -0.8327484]])
    torch.testing.assert_close(DRAWS.each("eps").normal(2), golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw", [lambda n: n.normal(3, 2), lambda n: n.uniform(), lambda n: n.integers(1000)],
                         ids=["normal", "uniform", "integers"])
def test_a_sample_is_drawn_alone(draw):
    """Batch size, order and slicing change nothing."""
    whole = draw(Draws(4, range(8)).each("eps"))
    for indices in ((5,), (0, 1, 2), (7, 2, 5), tuple(range(8))):
        assert torch.equal(draw(Draws(4, indices).each("eps")), whole[list(indices)])
    assert len(whole.flatten(1).unique(dim=0) if whole.ndim > 1 else whole.unique()) == 8
    assert torch.equal(draw(Draws(4, range(8)).each("eps")), whole)        # asking again repeats it


@pytest.mark.parametrize("other", [Draws(2, (0, 1, 5), 2, 3), Draws(1, (0, 1, 5), 3, 3), Draws(1, (0, 1, 5), 2, 4)],
                         ids=["seed", "step", "update"])
def test_every_part_of_the_key_matters(other):
    for noise in (Draws.each, Draws.shared):
        assert not torch.equal(noise(DRAWS, "eps").normal(4), noise(other, "eps").normal(4))
        assert not torch.equal(noise(DRAWS, "eps").normal(4), noise(DRAWS, "t").normal(4))


def test_shared_is_one_draw_for_any_indices():
    for indices in ((0,), (3, 4), range(8)):
        shared = Draws(1, indices, 2, 3).shared("eps")
        assert torch.equal(shared.normal(2, 3), DRAWS.shared("eps").normal(2, 3))
        assert shared.uniform().shape == shared.integers(4).shape == ()


@pytest.mark.parametrize("tag", ["renoise", "renoise/1"])
def test_each_and_shared_never_meet(tag):
    """A tag may contain what looks like an index."""
    seeds = [DRAWS.shared(tag).seeds, DRAWS.shared(f"{tag}/1").seeds, DRAWS.each(tag).seeds, DRAWS.each(f"{tag}/1").seeds]
    flat = [s for group in seeds for s in group]
    assert len(set(flat)) == len(flat)


def test_shapes_and_dtypes():
    each, shared = DRAWS.each("x"), DRAWS.shared("x")
    assert each.normal(4, 2).shape == (3, 4, 2)
    assert each.normal().shape == each.uniform().shape == each.integers(5).shape == (3,)
    assert shared.normal(4, 2).shape == (4, 2)
    assert each.normal(2).dtype == torch.float32
    assert each.uniform().dtype == torch.float64
    assert each.integers(5).dtype == torch.int64
    assert torch.equal(each.normal(2, dtype=torch.float64).float(), each.normal(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_like(dtype):
    x = torch.zeros(3, 4, 2, dtype=dtype)
    each, shared = DRAWS.each("x").normal_like(x), DRAWS.shared("x").normal_like(x)
    assert each.dtype == shared.dtype == dtype
    assert each.shape == shared.shape == x.shape
    assert torch.equal(each, DRAWS.each("x").normal(4, 2).to(dtype))       # the same numbers in every precision
    assert torch.equal(shared, DRAWS.shared("x").normal(3, 4, 2).to(dtype))


def test_a_batch_must_have_as_many_keys():
    with pytest.raises(ValueError, match="batch of 2 cannot be matched with 3"):
        DRAWS.each("x").normal_like(torch.zeros(2, 4))


def test_distributions():
    """4000 samples: four standard errors, at one fixed seed."""
    each = Draws(0, range(4000))
    z, u, n = each.each("z").normal().double(), each.each("u").uniform(2.0, 5.0), each.each("n").integers(4)
    assert abs(float(z.mean())) < 4 / 4000**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / 4000) ** 0.5
    assert 2.0 <= float(u.min()) < float(u.max()) < 5.0
    assert abs(float(u.mean()) - 3.5) < 4 * 3 / (12 * 4000) ** 0.5
    assert all(abs(int(count) - 1000) < 4 * (4000 * 0.1875) ** 0.5 for count in torch.bincount(n, minlength=4))
    other = each.each("other").normal().double()
    assert abs(float((z * other).mean())) < 4 / 4000**0.5                  # tags are independent
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / 3999**0.5             # and so are neighbours
