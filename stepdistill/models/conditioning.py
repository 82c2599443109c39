"""Conditioning: named tensors handed to the network, and the null condition that travels with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning(Mapping[str, Tensor]):
    """A frozen mapping from the network's keyword to a tensor whose first axis is the batch.

    Text, class label, pooled embeddings, size ids, a low-resolution picture: same object. `nulls` holds the leaves that differ in the
    null or negative condition; leaves it leaves out are shared by both. An unconditional model has no leaves.
    """

    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    nulls: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        lengths = {len(v) for v in (*self.leaves.values(), *(self.nulls or {}).values())}
        if len(lengths) > 1:
            raise ValueError(f"the leaves of a condition must share their batch size, got {sorted(lengths)}")
        if extra := set(self.nulls or {}) - set(self.leaves):
            raise ValueError(f"the null condition names leaves that the condition lacks: {sorted(extra)}")

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def null(self) -> Conditioning:
        """The null condition; raises ValueError where none travels with this one."""
        if self.nulls is None:
            raise ValueError("guidance needs a null condition and this condition carries none: use guidance 1, "
                             "or a teacher trained with condition dropout")
        return Conditioning({**self.leaves, **self.nulls}, self.nulls)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        nulls = None if self.nulls is None else {k: function(v) for k, v in self.nulls.items()}
        return Conditioning({k: function(v) for k, v in self.leaves.items()}, nulls)

    def to(self, device: torch.device | str) -> Conditioning:
        """Every leaf on another device; precision is the network's business."""
        return self._map(lambda v: v.to(device))

    def slice(self, rows: slice | Tensor) -> Conditioning:
        """The condition of some samples."""
        return self._map(lambda v: v[rows])

    def cat(self, other: Conditioning) -> Conditioning:
        """Both batches, one after the other; they must have the same leaves."""
        if set(self) != set(other) or (self.nulls is None) != (other.nulls is None):
            raise ValueError(f"conditions with leaves {sorted(self)} and {sorted(other)} cannot be joined")
        nulls = None if self.nulls is None or other.nulls is None else {
            k: torch.cat([{**self.leaves, **self.nulls}[k], {**other.leaves, **other.nulls}[k]])
            for k in {**self.nulls, **other.nulls}}
        return Conditioning({k: torch.cat([v, other[k]]) for k, v in self.leaves.items()}, nulls)
