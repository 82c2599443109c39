"""Diversity where it is known, and its mean and ratio over prompts."""

import dataclasses
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torchvision

from stepdistill.eval import diversity as D
from stepdistill.eval import weights
from stepdistill.eval.metrics import bootstrap_mean, bootstrap_ratio


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_orthogonal_and_paired_pictures():
    """n equal vectors count as one, n orthogonal ones as n, two twins of each of two as two; lengths do not matter."""
    equal = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None] * normal(7)
    orthogonal = torch.eye(4, 7).double() * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None]
    twins = orthogonal[[0, 0, 1, 1]]
    features = torch.stack([equal, orthogonal, twins])
    torch.testing.assert_close(D.vendi(features), torch.tensor([1.0, 4.0, 2.0]).double())
    torch.testing.assert_close(D.mean_distance(features), torch.tensor([0, 1, 4 / 6], dtype=torch.float64), atol=1e-12, rtol=1e-9)


def test_opposite_pictures_are_as_far_as_can_be():
    x = normal(1, 1, 5)
    torch.testing.assert_close(D.mean_distance(torch.cat([x, -x], 1)), torch.tensor([2.0]).double())


def test_mean_distance_is_a_loop_over_pairs():
    features = normal(3, 6, 9)
    looped = [sum(1 - float(torch.cosine_similarity(a, b, 0)) for a, b in combinations(seeds, 2)) / 15 for seeds in features]
    assert D.mean_distance(features).tolist() == pytest.approx(looped)


def test_vendi_is_the_entropy_of_the_kernel():
    features = normal(2, 5, 3) + 0.5                                                     # fewer dimensions than pictures
    for seeds, ours in zip(features, D.vendi(features).tolist(), strict=True):
        u = seeds / seeds.norm(dim=1, keepdim=True)
        values = torch.linalg.eigvalsh(u @ u.T / 5).clamp(min=1e-300)
        assert ours == pytest.approx(float((-(values * values.log()).sum()).exp()))
        assert 1 < ours < 3


def squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In the form of LPIPS: one value a pair, four dimensions."""
    return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_lpips_distance_takes_every_pair_in_the_range_it_is_told():
    pictures = torch.randint(0, 256, (2, 4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    looped = [sum(float(squares(a[None], b[None])) for a, b in combinations(seeds.float() / 127.5 - 1, 2)) / 6 for seeds in pictures]
    found = D.lpips_distance(pictures, squares)
    assert found.tolist() == pytest.approx(looped, rel=1e-5)
    torch.testing.assert_close(D.lpips_distance(pictures, squares, range=(0.0, 1.0)), found / 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(D.lpips_distance(pictures, squares, batch=4), found, rtol=1e-6, atol=0)
    assert float(D.lpips_distance(pictures[:, :1].repeat(1, 3, 1, 1, 1), squares).sum()) == 0


def test_wrong_input_is_refused():
    for measure in (D.mean_distance, D.vendi):
        with pytest.raises(ValueError, match="at least 2 pictures"):
            measure(normal(3, 1, 5))
        with pytest.raises(ValueError, match=r"\(P, M, d\)"):
            measure(normal(3, 5))
        with pytest.raises(ValueError, match="no direction"):
            measure(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="M of 2 or more"):
        D.lpips_distance(torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8), squares)
    with pytest.raises(ValueError, match="uint8"):
        D.lpips_distance(torch.zeros(2, 2, 3, 8, 8), squares)
    with pytest.raises(ValueError, match="at least 5 prompts, got 4"):
        bootstrap_mean(D.vendi(normal(4, 3, 5)))


def test_ratio_to_the_teacher():
    """A student half as diverse on every prompt has the ratio one half, with no error; prompts stay together."""
    teacher = D.vendi(normal(12, 4, 6))
    ratio = bootstrap_ratio(teacher / 2, teacher, draws=500)
    assert ratio.value == pytest.approx(0.5)
    assert ratio.se < 1e-12
    assert bootstrap_ratio(teacher.flip(0) / 2, teacher, draws=500).se > 1e-3
    with pytest.raises(ValueError, match="equal prompts"):
        bootstrap_ratio(teacher[:8], teacher)
    with pytest.raises(ValueError, match="not clearly above zero"):
        bootstrap_ratio(teacher, torch.zeros(12))


# --------------------------------------------------------------------------------------------------------------------------------- lpips


def test_lpips_is_told_without_tf32():
    """Which cuDNN uses unless told otherwise."""
    seen = []

    def distance(a, b):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return (a - b).square().mean((1, 2, 3))

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        D.lpips_distance(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), distance)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False)]


class Judge(torch.nn.Module):
    """One number a pair."""

    def forward(self, a, b):
        return (self.net.slice1(a) - self.net.slice1(b)).square().mean((1, 2, 3))
def test_pairs_of_two_sets():
    """Row by row in [-1, 1], grey as three channels, larger ones shrunk, whatever the batch."""
    a, b = (torch.randint(0, 256, (5, 1, 12, 18), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8) for seed in (0, 1))
    fed = []

    def squares(x, y):
        fed.append(x.shape)
        return (x - y).square().mean((1, 2, 3))

    found = D.paired_lpips(a, b, squares, batch=2)
    torch.testing.assert_close(found, ((a.double() - b.double()) / 127.5).square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    assert fed == [(2, 3, 12, 18), (2, 3, 12, 18), (1, 3, 12, 18)]
    assert float(D.paired_lpips(a, a, squares, side=6).sum()) == 0
    assert fed[-1] == (5, 3, 6, 9)
    with pytest.raises(ValueError, match="two sets of uint8"):
        D.paired_lpips(a, b[:4], squares)


def test_lpips_is_spared_where_weights_or_package_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "load_lpips", lambda device: "loaded")
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path))
    assert D.spare_lpips() is None
    monkeypatch.setattr(weights, "find", lambda name: tmp_path)
    monkeypatch.setattr(D, "find_spec", lambda name: object())
    assert D.spare_lpips() == "loaded"
    monkeypatch.setattr(D, "find_spec", lambda name: None)
    assert D.spare_lpips() is None


def judge(net: str, pnet_rand: bool, verbose: bool) -> torch.nn.Module:
    """A module that keeps AlexNet's layers under the names of the package."""
    whole = Judge()
    whole.net = torch.nn.Module()
    whole.net.slice1 = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 11))
    return whole


def test_lpips_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install stepdistill\[eval\]"):
        D.load_lpips()


def test_lpips_takes_alexnet_from_converted_weights(tmp_path, monkeypatch):
    """From torchvision's file, of whose digest only the beginning is published; another file is not opened."""
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=judge))
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path / "weights"))
    with pytest.raises(FileNotFoundError, match="alexnet-owt"):
        D.load_lpips()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in torchvision.models.alexnet(weights=None).named_parameters() if p.numel() < 2**20}
    state, path = {name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "public.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match="is another file"):
        weights.convert(D.JUDGE, path)
    monkeypatch.setitem(weights.KNOWN, D.JUDGE, dataclasses.replace(weights.KNOWN[D.JUDGE], begins=weights.digest(path)[:8]))
    weights.convert(D.JUDGE, path)
    made = D.load_lpips()
    assert torch.equal(made.net.slice1[0].weight, state["features.0.weight"])
    assert not any(p.requires_grad for p in made.parameters())
    assert D.load_lpips("meta")(*torch.rand(2, 1, 3, 16, 16)).device.type == "meta"                 # pictures come to where it is
    assert next(row for row in weights.listing() if row["name"] == D.JUDGE)["state"] == "checked"
