"""One network at several sizes of picture: the same weights, noise and guidance, each size called as a recording at that size learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.process import NoiseProcess
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.kept import pack
from stepdistill.models.wiring import Wiring, same

SHIFT = 0.02                                             # relative; how far apart the noise of two sizes may be


@dataclass(frozen=True)
class SizedWiring:
    """A wiring for each shape of a state (without its batch axis). The calls differ in sizes only, so `any` says all that is not a size."""

    of: Mapping[tuple[int, ...], Wiring]

    @property
    def any(self) -> Wiring:
        return next(iter(self.of.values()))

    @property
    def embeds(self) -> bool:
        return self.any.embeds

    def call(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], process: NoiseProcess, w: float | Tensor,
             dtype: torch.dtype) -> dict[str, Any]:
        """As `Wiring.call`, of the size of x_t (B, ...)."""
        return self._at(x_t).call(x_t, t, cond, process, w, dtype)

    def read(self, output: Any, x_t: Tensor) -> Tensor:
        """As `Wiring.read`."""
        return self._at(x_t).read(output, x_t)

    def _at(self, x_t: Tensor) -> Wiring:
        shape = tuple(x_t.shape[1:])
        if shape not in self.of:
            raise ValueError(f"recorded for states of {', '.join(map(str, self.of))} and called with {shape}: name its size in "
                             "data.buckets")
        return self.of[shape]


def for_sizes(denoisers: Sequence[Denoiser], shapes: Sequence[tuple[int, ...]]) -> Denoiser:
    """The first of these recordings of one network, for the states of all of them.

    Raises ValueError where sizes have other noise (a shift that follows the size and is told to the network), other guidance, or states
    of the same shape that are called in different ways.
    """
    first, t = denoisers[0], torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    wirings: dict[tuple[int, ...], Wiring] = {}
    for denoiser, shape in zip(denoisers, shapes, strict=True):
        wiring = denoiser.wiring
        assert isinstance(wiring, Wiring)
        ours, theirs = (process.sigma(t) / process.alpha(t) for process in (first.process, denoiser.process))
        if not torch.allclose(ours, theirs, rtol=SHIFT):
            raise ValueError("data.buckets: this pipeline shifts its noise with the size of the picture, and one student has one set of "
                             "times: leave data.buckets out")
        facts = [(d.kind, d.clock, d.law) for d in (first, denoiser)]
        if facts[0] != facts[1] or not same(_packed(wirings.setdefault(shape, wiring)), _packed(wiring)):
            raise ValueError(f"data.buckets: this pipeline calls its network in another way at another size (states of {shape}): leave "
                             "data.buckets out")
    return replace(first, wiring=SizedWiring(wirings))


def _packed(wiring: Wiring) -> Any:
    tensors: dict[str, Tensor] = {}
    return pack(wiring, "wiring", tensors), tensors
