"""Drift with errors, on students whose drift is known."""

import math

import pytest
import torch

from stepdistill.drift import against, drift
from stepdistill.eval.drifts import drift_estimates, latent_drift
from stepdistill.eval.metrics import members


def pictures(count: int = 200, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth, each with a brightness of its own, far from 0 and 255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, generator=generator) * 15 + torch.randn(count, 1, 1, 1, generator=generator) * 10 + 120
    return torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(30, 200).round().to(torch.uint8)


def labels(count: int = 200) -> torch.Tensor:
    return torch.arange(count) % 4


def grouped() -> torch.Tensor:
    return members(200, 10, 4)


def test_no_drift_has_no_error():
    made = drift_estimates(pictures(), pictures(), labels(), grouped())
    assert set(made) == {"brightness", "contrast", "red", "green", "blue", "red_contrast", "green_contrast", "blue_contrast",
                         "saturation", "clipped", "sharpness", "grid", "spread"}
    for name, estimate in made.items():
        assert estimate.value == pytest.approx(float("contrast" in name or name in ("saturation", "sharpness", "spread"))), name
        assert estimate.se == pytest.approx(0, abs=1e-9)
        assert (estimate.n, estimate.groups) == (200, 10)


def test_a_brighter_student_is_found_and_pairing_helps():
    """Ten levels for all, the two models' own noise aside."""
    teacher = pictures()
    student = (teacher.int() + 10 + torch.randint(-2, 3, teacher.shape, generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    paired = drift_estimates(student, teacher, labels(), grouped())["brightness"]
    alone = drift_estimates(student, pictures(seed=2), labels(), grouped())["brightness"]
    assert paired.ci95[0] < 10 / 255 < paired.ci95[1]
    assert paired.se < 1e-4 < alone.se / 10
    assert alone.ci95[0] < 10 / 255 < alone.ci95[1]


def test_a_colour_cast_is_told_channel_by_channel():
    """Red up and green down by ten levels, blue flattened to half: brightness knows nothing of the first two."""
    teacher = pictures()
    student = (teacher + torch.tensor([10, -10, 0])[:, None, None]).to(torch.uint8)
    made = drift_estimates(student, teacher, labels(), grouped())
    assert [made[name].value for name in ("brightness", "red", "green", "blue")] == pytest.approx([0, 10 / 255, -10 / 255, 0], abs=1e-6)
    assert made["red_contrast"].value == pytest.approx(1, abs=1e-5)
    flat = teacher.clone()
    flat[:, 2] = (flat[:, 2].float() / 2 + 60).round().to(torch.uint8)
    made = drift_estimates(flat, teacher, labels(), grouped())
    assert made["blue_contrast"].value == pytest.approx(0.5, abs=0.01)
    assert (made["red_contrast"].value, made["green_contrast"].value) == (1, 1)


def test_the_jackknife_leaves_a_group_out_of_both():
    """Brightness is a mean, so its error is that of the mean of the groups' differences; contrast is checked group by group."""
    student, teacher, member = pictures(seed=1), pictures(), grouped()
    made = drift_estimates(student, teacher, labels(), member)
    each = torch.stack([(student[member == j].double() - teacher[member == j].double()).mean() / 255 for j in range(10)])
    assert made["brightness"].se == pytest.approx(float(each.std()) / math.sqrt(10), rel=5e-3)
    of = lambda keep: against(drift(student[keep], labels()[keep]), drift(teacher[keep], labels()[keep]))["contrast"]  # noqa: E731
    left = torch.tensor([of(member != j) for j in range(10)], dtype=torch.float64)
    assert made["contrast"].se == pytest.approx(float((0.9 * (left - left.mean()).square().sum()).sqrt()), rel=1e-6)


def test_what_has_no_number_is_left_out():
    grey = pictures(channels=1)
    made = drift_estimates(grey, grey, torch.arange(200), grouped())
    assert "saturation" not in made                                                      # grey
    assert "spread" not in made                                                          # one picture of each label
    assert "brightness" in made
    assert "red" not in made


def latents(count: int = 300, seed: int = 0) -> torch.Tensor:
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None, None]
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) * scale + 0.3


def test_latents_scaled_and_shifted():
    """Channel by channel, against plain means and deviations."""
    teacher = latents()
    student = teacher * torch.tensor([1.0, 1.5, 1.0, 0.8])[:, None, None] + torch.tensor([0.0, 0.0, 0.2, 0.0])[:, None, None]
    made = latent_drift(student, teacher, members(300, 10))
    assert [made[f"latent_std_{c}"].value for c in range(4)] == pytest.approx([1, 1.5, 1, 0.8], rel=1e-5)
    assert made["latent_std_1"].se < 1e-6
    expected = (student.double().mean((0, 2, 3)) - teacher.double().mean((0, 2, 3))).tolist()
    assert [made[f"latent_mean_{c}"].value for c in range(4)] == pytest.approx(expected, abs=1e-9)
    assert made["latent_mean_2"].ci95[0] - 1e-6 < 0.2 < made["latent_mean_2"].ci95[1] + 1e-6


def test_latents_of_other_seeds_have_the_error_of_both():
    """The mean of 300 pictures of 36 values each, twice."""
    made = latent_drift(latents(seed=1), latents(), members(300, 25))
    assert made["latent_mean_1"].se == pytest.approx(2 * math.sqrt(2 / (300 * 36)), rel=0.4)
    assert made["latent_std_0"].ci95[0] < 1 < made["latent_std_0"].ci95[1]
    keep = members(300, 25) != 3
    a, b = latents(seed=1)[keep].double(), latents()[keep].double()
    flat = latent_drift(latents(seed=1).flatten(2)[..., 0], latents().flatten(2)[..., 0], members(300, 25))
    assert flat["latent_mean_0"].value == pytest.approx(float((latents(seed=1) - latents())[:, 0, 0, 0].double().mean()), abs=1e-7)
    alone = latent_drift(a, b, members(300, 25)[keep] - (members(300, 25)[keep] > 3).long())
    assert alone["latent_std_2"].value == pytest.approx(float(a[:, 2].std() / b[:, 2].std()), rel=1e-9)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="equal samples"):
        drift_estimates(pictures(100), pictures(), labels(), grouped())
    with pytest.raises(ValueError, match="at least 5 groups, got 4"):
        drift_estimates(pictures(), pictures(), labels(), members(200, 4, 4))
    with pytest.raises(ValueError, match="at least 5 groups, got 2"):
        latent_drift(latents(), latents(), members(300, 2))
    with pytest.raises(ValueError, match="does not vary"):
        latent_drift(latents(), torch.full((300, 4, 6, 6), 0.3), members(300, 10))
