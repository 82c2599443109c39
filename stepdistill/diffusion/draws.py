"""Randomness that is keyed, never streamed.

A draw depends on (seed, step, update, tag) and, for `each`, on the global index of the sample. Batch size, accumulation, the number of
processes and resuming then change nothing, and a rollout can be repeated. Numbers are made on the CPU, so every device agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit seed from any key, the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Noise:
    """Draws for one tag: one generator per sample (`each`) or one for all (`shared`, which returns tensors without a batch axis)."""

    seeds: tuple[int, ...]
    batched: bool
    device: torch.device

    def _draw(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        rows = [make(torch.Generator().manual_seed(seed)) for seed in self.seeds]
        return (torch.stack(rows) if self.batched else rows[0]).to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal; `shape` is that of one sample."""
        return self._draw(lambda g: torch.randn(shape, generator=g, dtype=torch.float32)).to(dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of x's shape (its first axis is the batch) and dtype."""
        if self.batched and len(x) != len(self.seeds):
            raise ValueError(f"a batch of {len(x)} cannot be matched with {len(self.seeds)} sample keys")
        return self.normal(*(x.shape[1:] if self.batched else x.shape), dtype=x.dtype)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform on [low, high), float64, shape (B,) or scalar."""
        return low + (high - low) * self._draw(lambda g: torch.rand((), generator=g, dtype=torch.float64))

    def integers(self, high: int) -> Tensor:
        """Uniform on 0 .. high-1, int64, shape (B,) or scalar."""
        return self._draw(lambda g: torch.randint(high, (), generator=g))


@dataclass(frozen=True)
class Draws:
    """The randomness of one batch: `indices` are the global positions of its samples."""

    seed: int
    indices: Sequence[int] = (0,)
    step: int = 0
    update: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def each(self, tag: str) -> Noise:
        """One independent draw per sample."""
        return Noise(tuple(key(self.seed, self.step, self.update, tag, i) for i in self.indices), True, self.device)

    def shared(self, tag: str) -> Noise:
        """One draw for the whole batch, equal on every process."""
        return Noise((key(self.seed, self.step, self.update, tag, "shared"),), False, self.device)     # no sample of `each` ends so
