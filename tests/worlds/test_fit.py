"""The plain loop that trains what worlds ship: an interrupted run is the one that was not, and the average is the average."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.worlds.fit import fit, rate


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def losses(network: nn.Module, stop: int | None = None):
    """A keyed regression, which Ctrl-C meets at update `stop`."""
    def loss(update: int) -> dict[str, Tensor]:
        if update == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(update))
        return {"l2": (network(x) - x[:, :2]).square().mean(), "weights": 0.01 * sum(p.square().sum() for p in network.parameters())}
    return loss


def test_an_interrupted_fit_is_the_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(first := net(), losses(first), tmp_path / "whole", 12, 0.05, every=4)
    with pytest.raises(KeyboardInterrupt):
        fit(second := net(), losses(second, stop=7), tmp_path / "halves", 12, 0.05, every=4)
    third = net()
    resumed = fit(third, losses(third), tmp_path / "halves", 12, 0.05, every=4)
    for mine, other in ((first, third), (whole, resumed)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert [json.loads(line)["update"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()] == [0]


def test_the_average_follows_and_is_no_part_of_a_graph(tmp_path: Path) -> None:
    network = net()
    seen = [[p.detach().clone() for p in network.parameters()]]
    plain = losses(network)

    def watched(update: int) -> dict[str, Tensor]:
        if update:
            seen.append([p.detach().clone() for p in network.parameters()])
        return plain(update)

    best = fit(network, watched, tmp_path, 6, 0.05)
    seen.append([p.detach().clone() for p in network.parameters()])
    expected = seen[0]
    for update, now in enumerate(seen[1:]):
        decay = min(0.999, (1 + update) / (10 + update))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, now, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(best.parameters(), expected, strict=True))
    assert not any(p.requires_grad or p.grad_fn for p in best.parameters())


def test_buffers_are_taken_as_they_are(tmp_path: Path) -> None:
    """An average of weights beside the statistics that a batch norm began with would be another network."""
    network = nn.Sequential(net(), nn.BatchNorm1d(2))
    best = fit(network, lambda update: {"l2": network(torch.randn(8, 3) + 5).square().mean()}, tmp_path, 6, 0.05)
    assert float(best[1].running_mean.abs().max()) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(best.buffers(), network.buffers(), strict=True))


def test_the_rate_rises_stays_and_falls() -> None:
    assert rate(0, 1000, 2.0) == pytest.approx(0.01)
    assert rate(500, 1000, 2.0) == 2.0
    assert rate(875, 1000, 2.0) == pytest.approx(1.0)
    assert 0 < rate(999, 1000, 2.0) < 0.01
