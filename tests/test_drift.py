"""What is counted on pictures: each number on pictures where it is known."""

import math

import pytest
import torch

from stepdistill.drift import against, drift, grid_score, spread


def noise(count: int = 64, channels: int = 1, size: int = 28, level: float = 20.0, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures around grey, with white noise of this size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, generator=generator) * 40 + 128
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (smooth + level * torch.randn(count, channels, size, size, generator=generator)).clamp(1, 254).to(torch.uint8)


def none(pictures: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(pictures), dtype=torch.long)


def test_flat_grey_has_nothing_but_brightness():
    grey = torch.full((3, 3, 32, 32), 102, dtype=torch.uint8)
    found = drift(grey, none(grey))
    assert found["brightness"] == pytest.approx(0.4)
    assert found["grid"] == pytest.approx(0, abs=1e-6)
    assert {name: found[name] for name in ("contrast", "saturation", "clipped", "sharpness", "spread")} == pytest.approx(
        dict.fromkeys(("contrast", "saturation", "clipped", "sharpness", "spread"), 0.0), abs=1e-6)


def test_known_values():
    half = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    half[..., 8:] = 255
    found = drift(half, none(half))
    assert (found["brightness"], found["contrast"], found["clipped"]) == pytest.approx((0.5, 0.5, 1.0))
    red = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    red[:, 0], red[:, 1], red[:, 2] = 200, 100, 50
    assert drift(red, none(red))["saturation"] == pytest.approx(0.75)
    stripes = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    stripes[..., ::2] = 255                                                                  # Laplacian of +-2 everywhere
    assert drift(stripes, none(stripes))["sharpness"] == pytest.approx(2.0)


def test_channels_are_told_apart_and_a_teacher_of_before_has_none():
    red = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    red[:, 0, ::2], red[:, 1, 8:] = 204, 102
    found = drift(red, none(red))
    assert [found[name] for name in ("red", "green", "blue")] == pytest.approx([0.4, 0.2, 0.0])
    assert [found[f"{name}_contrast"] for name in ("red", "green", "blue")] == pytest.approx([0.4, 0.2, 0.0], abs=1e-6)
    before = {name: value for name, value in found.items() if name.split("_")[0] not in ("red", "green", "blue")}
    assert set(against(found, found)) - set(against(found, before)) == {"red", "green", "blue", "red_contrast", "green_contrast"}
    assert set(drift(red[:, :1], none(red))) == set(before)


def test_blur_and_wash_and_colour_move_their_own_number():
    clean = noise(channels=3)
    soft = torch.nn.functional.avg_pool2d(clean.float(), 3, 1, 1).to(torch.uint8)
    washed = ((clean.float() - 128) * 0.5 + 128).to(torch.uint8)
    grey = clean.float().mean(1, keepdim=True)
    vivid = (grey + 2 * (clean.float() - grey)).clamp(0, 255).to(torch.uint8)
    base = drift(clean, none(clean))
    assert against(drift(soft, none(soft)), base)["sharpness"] < 0.5
    assert against(drift(washed, none(washed)), base)["contrast"] == pytest.approx(0.5, abs=0.02)
    assert against(drift(vivid, none(vivid)), base)["saturation"] > 1.4


@pytest.mark.parametrize(("period", "size"), [(2, 28), (4, 28), (8, 64), (16, 96)])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_lattice_is_seen_in_either_direction(period, size, axis):
    clean = noise(size=size, level=4)
    clean_score = grid_score(clean)
    assert clean_score < 0.5
    line = torch.zeros(size)
    line[::period] = 20
    added = (clean.float() + line.reshape((-1, 1) if axis == 2 else (1, -1))).clamp(0, 255).to(torch.uint8)
    assert grid_score(added) > clean_score + 1.5


def test_pictures_too_small_for_any_period_have_no_grid():
    assert math.isnan(grid_score(noise(size=5)))


def test_spread_is_within_labels_and_without_bias():
    """Two labels with means far apart and unit deviations: only the deviations count, in pairs as in crowds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    x = (torch.randn(4000, 1, 8, 8, generator=generator) + 10 * labels[:, None, None, None])
    assert spread(x, labels) == pytest.approx(1.0, abs=0.01)
    assert spread(x, torch.arange(4000) // 4 * 2 + labels) == pytest.approx(1.0, abs=0.02)
    assert math.isnan(spread(x, torch.arange(4000)))


def test_one_picture_over_and_over_has_no_spread():
    same = noise(1).expand(16, -1, -1, -1)
    assert drift(same, none(same))["spread"] == pytest.approx(0, abs=1e-6)


def test_against_leaves_out_what_has_no_number():
    grey = noise(8)
    found = against(drift(grey, torch.arange(8)), drift(grey, torch.arange(8)))
    assert "saturation" not in found                                                        # a grey teacher has none
    assert "spread" not in found                                                            # one picture of each label
    assert {name: found[name] for name in ("contrast", "sharpness")} == {"contrast": 1.0, "sharpness": 1.0}
    assert found["brightness"] == 0


def test_wrong_pictures_are_refused():
    with pytest.raises(ValueError, match="uint8 pictures"):
        drift(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="3 labels"):
        drift(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3))
