"""What losses report: bands of noise, and means that a batch without samples does not move."""

import pytest
import torch

from stepdistill.losses.reported import LEVELS, Mean, accuracy, level, score_gap


def test_the_gap_is_told_by_bands_of_noise():
    """Each sample differs by a number of its own everywhere; the two of one band are averaged."""
    s = torch.tensor([0.0, 0.1, 0.25, 0.6, 1.0], dtype=torch.float64)
    gaps = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0])
    fake = torch.zeros(5, 2, 3, 3, requires_grad=True)
    found = score_gap(fake, fake.detach() + gaps[:, None, None, None], s)
    bands = {name: part for name, part in found.items() if isinstance(part, Mean)}
    assert list(bands) == ["score_gap_s00", "score_gap_s25", "score_gap_s50", "score_gap_s75"]
    assert [float(part.value) for part in bands.values()] == [2.0, 5.0, 7.0, 11.0]
    assert float(found["score_gap"]) == pytest.approx(float(gaps.square().mean().sqrt()))
    assert not any(value.requires_grad for part in bands.values() for value in (part.total, part.count))
    assert len(bands) == len(LEVELS)


def test_an_empty_band_counts_for_nothing():
    x = torch.ones(2, 4)
    first = score_gap(x, x + 2, torch.tensor([0.1, 0.1], dtype=torch.float64))["score_gap_s75"]
    second = score_gap(x, x + 3, torch.tensor([0.9, 0.1], dtype=torch.float64))["score_gap_s75"]
    assert isinstance(first, Mean)
    assert isinstance(second, Mean)
    assert (float(first.count), float((first + second).value)) == (0, 3)


def test_a_discriminator_is_right_about_the_real_and_the_generated_apart():
    """Of four real samples three are called real, of two generated ones one generated."""
    found = accuracy(torch.tensor([1.0, 2.0, 0.1, -1.0]), torch.tensor([-3.0, 3.0]))
    assert {name: float(value) for name, value in found.items()} == {
        "disc_accuracy": 0.625, "disc_accuracy_real": 0.75, "disc_accuracy_generated": 0.5}


def test_the_level_of_samples():
    found = level(torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True))
    assert {name: float(value) for name, value in found.items()} == {"x0_mean": 4.0, "x0_std": pytest.approx((20 / 3) ** 0.5)}
    assert not any(value.requires_grad for value in found.values())
