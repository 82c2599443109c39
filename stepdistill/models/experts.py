"""Several networks of one class in the place of one, each for its own stretch of time: a student with an expert for every phase of noise,
copies of the teacher or adapters on it (adapters.Adapted), or a teacher of two networks (Wan 2.2 14B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stepdistill.diffusion.times import check_boundaries

Call = tuple[int, Sequence[Any], Mapping[str, Any]]                       # (expert, arguments, keywords)


class Experts(nn.Module):
    """Expert i serves boundaries[i] < t <= boundaries[i - 1]: the first everything above boundaries[0], the last everything below.

    Which rows of a batch go to whom is asked with `shares`, and `forward` makes one call for each: only who calls knows which arguments
    have a batch axis. ValueError for boundaries that do not fall, or divide time among another number of networks, or networks of several
    classes.
    """

    def __init__(self, experts: Sequence[nn.Module], boundaries: Sequence[float]):
        super().__init__()
        check_boundaries(boundaries)
        if len(experts) != len(boundaries) + 1:
            raise ValueError(f"{len(experts)} experts need {len(experts) - 1} boundaries, got {tuple(boundaries)}")
        if len(classes := sorted({type(expert).__name__ for expert in experts})) > 1:
            raise ValueError(f"experts must be networks of one class, got {', '.join(classes)}")
        self.experts, self.boundaries = nn.ModuleList(experts), tuple(boundaries)

    def forward(self, calls: Sequence[Call]) -> list[Any]:
        """The output of every call. One forward pass for all of them, so that a distributed wrapper sees one."""
        return [self.experts[i](*args, **kwargs) for i, args, kwargs in calls]

    def shares(self, t: Tensor) -> list[tuple[int, Tensor | slice]]:
        """(expert, its rows) for times t (B,), those without rows left out; all rows are a slice, which copies nothing.

        A rehearsal of memory knows no times: there the first expert has all rows, and any one holds as much.
        """
        if isinstance(t, FakeTensor):
            return [(0, slice(None))]
        passed = t[:, None] <= torch.tensor(self.boundaries, dtype=torch.float64, device=t.device)
        chosen = passed.sum(1)
        present = sorted(set(chosen.tolist()))
        return [(i, slice(None) if len(present) == 1 else (chosen == i).nonzero()[:, 0]) for i in present]

    def enable_gradient_checkpointing(self, *args: Any) -> None:
        """That of every expert."""
        expert: Any
        for expert in self.experts:
            expert.enable_gradient_checkpointing(*args)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """That of every expert: their calls differ in number from batch to batch, and each of them does not."""
        for expert in self.experts:
            expert.compile(*args, **kwargs)


def parts_of(network: nn.Module) -> Sequence[nn.Module]:
    """The experts, or the one network."""
    return list(network.experts) if isinstance(network, Experts) else [network]


def boundaries_of(network: nn.Module) -> tuple[float, ...]:
    """Between its experts; none of one network."""
    return network.boundaries if isinstance(network, Experts) else ()


def serving(network: nn.Module, t: Tensor) -> nn.Module:
    """The network that answers for all times t (B,). ValueError where several experts do: they have features of their own."""
    if not isinstance(network, Experts):
        return network
    if len(shares := network.shares(t)) > 1:
        raise ValueError("features are read of one expert, and this batch has times of several: draw the times of a discriminator's states "
                         f"on one side of {', '.join(f'{b:g}' for b in network.boundaries)}, or train without it (method.gan_weight=0)")
    return network.experts[shares[0][0]]
