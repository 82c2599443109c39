"""Discriminator heads: every feature a network may offer, one logit per sample, and information that survives the norms."""

import pytest
import torch

from stepdistill.models.discriminator import Discriminator, MapHead


def features(*shape: int, count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def build(*shapes: tuple[int, ...]) -> Discriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminator([features(*shape, count=1) for shape in shapes])


SHAPES = [(128, 7, 7), (64, 8, 8), (32, 14, 14), (32, 4, 4), (16, 5, 9), (24, 2, 2), (8, 1, 1), (3, 8, 8), (320, 2, 2), (16, 64), (1, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_logit_per_sample(shape):
    head, read = build(shape), features(*shape)
    logits = head([read])
    assert logits.shape == (5,)
    for i in range(5):                                                                              # one alone too: no batch statistics
        torch.testing.assert_close(head([read[i : i + 1]]), logits[i : i + 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_and_feature_counts(shape):
    """No norm may erase what it reads: a group of one number is normalised to its bias, and its gradient to nothing."""
    head, read = build(shape), features(*shape).requires_grad_()
    (head([read]) * torch.arange(1.0, 6.0)).sum().backward()
    assert bool((read.grad.flatten(1).norm(dim=1) > 1e-4).all())
    dead = [name for name, p in head.named_parameters() if p.ndim > 1 and float(p.grad.norm()) < 1e-4]
    assert not dead
    assert float(head([read.detach()]).detach().std()) > 1e-3


def test_map_head_sizes():
    """7 to 3, 8 to 4, 14 to 7 to 3, 4 stays: the last convolution contracts exactly what is left."""
    for size, left, halvings in ((7, 3, 1), (8, 4, 1), (14, 3, 2), (4, 4, 0), (32, 4, 3)):
        convs = [m for m in MapHead(16, (size, size)) if isinstance(m, torch.nn.Conv2d)]
        assert len(convs) == halvings + 2
        assert convs[halvings].kernel_size == (left, left)


def test_several_features_are_averaged():
    maps, tokens = features(16, 8, 8), features(9, 24, seed=1)
    both = build((16, 8, 8), (9, 24))
    apart = [head(f)[:, 0] for head, f in zip(both.heads, (maps, tokens), strict=True)]
    torch.testing.assert_close(both((maps, tokens)), (apart[0] + apart[1]) / 2)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        both((maps,))


@pytest.mark.parametrize(("weights", "read", "out"), [
    (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float64, torch.float32, torch.float64)])
def test_logits_are_at_least_float32(weights, read, out):
    assert build((16, 4, 4)).to(weights)([features(16, 4, 4).to(read)]).dtype == out


def test_can_tell_two_laws_apart():
    """Fifty Adam steps on maps that differ in one channel's mean."""
    head = build((16, 7, 7))
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    shift = torch.zeros(16, 1, 1)
    shift[3] = 1.0
    for step in range(50):
        a, b = features(16, 7, 7, count=32, seed=2 * step), features(16, 7, 7, count=32, seed=2 * step + 1) + shift
        loss = torch.nn.functional.softplus(-head([b])).mean() + torch.nn.functional.softplus(head([a])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a, b = features(16, 7, 7, count=200, seed=1000), features(16, 7, 7, count=200, seed=1001) + shift
    assert float(((head([b]) > 0).float().mean() + (head([a]) < 0).float().mean()) / 2) > 0.9


def test_errors():
    with pytest.raises(ValueError, match=r"got \(5, 16\)"):
        Discriminator([features(16)])
    with pytest.raises(ValueError, match=r"student\.taps"):
        Discriminator([])
