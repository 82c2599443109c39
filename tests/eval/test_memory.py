"""Copies are found, and held-out pictures are not taken for copies."""

import pytest
import torch

from stepdistill.eval import memory


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT = normal(800, 8), normal(400, 8, seed=1)


def test_planted_copies_are_found_and_held_out_pictures_are_not():
    planted = torch.arange(0, 200, 16)                                                    # 13 of 200
    samples = normal(200, 8, seed=2)
    samples[planted] = TRAIN[planted * 3] + 0.01 * normal(13, 8, seed=3)
    made = memory.memorisation(samples, TRAIN, HELD_OUT)
    assert set(made.suspects[:13].tolist()) == set(planted.tolist())
    assert made.neighbour[planted].tolist() == (planted * 3).tolist()
    assert made.share.value >= 13 / 200
    assert made.held_out.value <= 0.03
    assert made.excess.value == pytest.approx(made.share.value - made.held_out.value)
    assert made.excess.ci95[0] > 0
    assert made.closest5 < made.held_out_closest5 / 2
    assert (made.distance[made.suspects].diff() >= 0).all()
    assert bool((made.distance[made.suspects] <= made.threshold).all())


def test_fresh_samples_are_no_copies():
    made = memory.memorisation(normal(400, 8, seed=4), TRAIN, HELD_OUT)
    assert made.excess.ci95[0] < 0 < made.excess.ci95[1]
    assert made.share.value < 0.03
    assert made.closest5 == pytest.approx(made.held_out_closest5, rel=0.1)


def test_threshold_is_the_quantile_among_training_pictures():
    apart = torch.cdist(TRAIN.double(), TRAIN.double()).fill_diagonal_(torch.inf).amin(1)
    made = memory.memorisation(normal(50, 8, seed=4), TRAIN, HELD_OUT)
    assert made.threshold == pytest.approx(float(apart.quantile(0.01)), rel=1e-6)
    assert int((apart <= made.threshold).sum()) == 8


@pytest.mark.parametrize("cells", [1, 10_000])
def test_blocks_change_nothing(monkeypatch, cells):
    samples = normal(50, 8, seed=5)
    row, distance = memory.nearest(samples, TRAIN)
    exact = torch.cdist(samples.double(), TRAIN.double()).min(1)
    assert torch.equal(row, exact.indices)
    torch.testing.assert_close(distance, exact.values)
    whole = memory.nearest(TRAIN[:90], TRAIN[:90], leave_one_out=True)
    monkeypatch.setattr(memory, "CELLS", cells)
    for a, b in zip(memory.nearest(samples, TRAIN), (row, distance), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(memory.nearest(TRAIN[:90], TRAIN[:90], leave_one_out=True), whole, strict=True):
        assert torch.equal(a, b)
    assert bool((whole[0] != torch.arange(90)).all())


def test_a_copy_far_from_the_origin_is_at_zero():
    row, distance = memory.nearest(TRAIN[30:31] + 1000, TRAIN + 1000)
    assert (int(row), float(distance)) == (30, 0.0)


def test_difference_of_shares():
    """Newcombe's method 10 for 56 of 70 and 48 of 80, an example of his paper: 0.0524 to 0.3339."""
    hits = lambda k, n: memory.proportion(torch.arange(n) < k)  # noqa: E731
    made = memory._difference(hits(56, 70), hits(48, 80))
    assert made.value == pytest.approx(0.2)
    assert made.ci95 == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="at least 100 training features, got 99"):
        memory.memorisation(normal(50, 8), TRAIN[:99], HELD_OUT)
    with pytest.raises(ValueError, match="at least 20 generated features, got 19"):
        memory.memorisation(normal(19, 8), TRAIN, HELD_OUT)
    with pytest.raises(ValueError, match="at least 20 held-out features, got 0"):
        memory.memorisation(normal(50, 8), TRAIN, HELD_OUT[:0])
    with pytest.raises(ValueError, match=r"\(50, 7\) and \(800, 8\)"):
        memory.nearest(normal(50, 7), TRAIN)
    with pytest.raises(ValueError, match="at least 2 training features"):
        memory.nearest(TRAIN[:1], TRAIN[:1], leave_one_out=True)
    with pytest.raises(ValueError, match="with itself"):
        memory.nearest(TRAIN[:9], TRAIN, leave_one_out=True)
    with pytest.raises(ValueError, match="not finite"):
        memory.nearest(TRAIN / 0, TRAIN)
