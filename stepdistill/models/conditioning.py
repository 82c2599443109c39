"""Conditioning: named tensors handed to the network, and the null condition that travels with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Leaf = Any                                               # a tensor, batch first; a tuple, one entry a sample; shared by all; absent (None)


@dataclass(frozen=True)
class Conditioning(Mapping[str, Leaf]):
    """A frozen mapping from the network's keyword to a leaf: a tensor whose first axis is the batch, or a tuple with one entry a sample.

    Text, class label, pooled embeddings, size ids, a low-resolution picture: same object. `nulls` holds the leaves that differ in the
    null or negative condition; leaves it leaves out are common to both. `shared` names the leaves without a batch axis (position ids of
    the text). An unconditional model has no leaves.
    """

    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    nulls: Mapping[str, Leaf] | None = None
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        lengths = {len(v) for k, v in (*self.leaves.items(), *(self.nulls or {}).items()) if k not in self.shared and v is not None}
        if len(lengths) > 1:
            raise ValueError(f"the leaves of a condition must share their batch size, got {sorted(lengths)}")
        if extra := set(self.nulls or {}) - set(self.leaves):
            raise ValueError(f"the null condition names leaves that the condition lacks: {sorted(extra)}")

    def __getitem__(self, name: str) -> Leaf:
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
        return replace(self, leaves={**self.leaves, **self.nulls})

    def _map(self, function: Callable[[str, Leaf], Leaf]) -> Conditioning:
        each = lambda leaves: {k: function(k, v) for k, v in leaves.items()}                                     # noqa: E731
        return replace(self, leaves=each(self.leaves), nulls=None if self.nulls is None else each(self.nulls))

    def to(self, device: torch.device | str) -> Conditioning:
        """Every leaf on another device; precision is the network's business."""
        move = lambda v: v.to(device) if isinstance(v, Tensor) else v                                            # noqa: E731
        return self._map(lambda _, v: tuple(move(item) for item in v) if isinstance(v, tuple) else move(v))

    def slice(self, rows: slice | Tensor) -> Conditioning:
        """The condition of some samples."""
        def some(name: str, leaf: Leaf) -> Leaf:
            if name in self.shared or leaf is None:
                return leaf
            if not isinstance(leaf, tuple):
                return leaf[rows]
            return tuple(leaf[i] for i in torch.arange(len(leaf))[rows if isinstance(rows, slice) else rows.cpu()].tolist())

        return self._map(some)

    def joins(self, other: Conditioning) -> bool:
        """Whether `cat` can put both into one batch: the same leaves of the same shapes, shared ones equal."""
        if set(self) != set(other) or self.shared != other.shared:
            return False
        return all(_alike(v, other[k], k in self.shared) for k, v in self.items())

    @classmethod
    def stack(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Many conditions that join, as one batch."""
        first, nulls = parts[0], parts[0].nulls
        join = lambda name, leaves: (leaves[0] if name in first.shared or leaves[0] is None                     # noqa: E731
                                     else sum(leaves, ()) if isinstance(leaves[0], tuple) else torch.cat(leaves))
        differing = None if nulls is None else list(dict.fromkeys(k for part in parts for k in part.nulls or {}))
        return replace(first, leaves={k: join(k, [part[k] for part in parts]) for k in first},
                       nulls=None if differing is None else {k: join(k, [part.null[k] for part in parts]) for k in differing})

    def cat(self, other: Conditioning) -> Conditioning:
        """Both batches, one after the other; they must have the same leaves."""
        if set(self) != set(other) or (self.nulls is None) != (other.nulls is None):
            raise ValueError(f"conditions with leaves {sorted(self)} and {sorted(other)} cannot be joined")
        return self.stack([self, other])


def _alike(a: Leaf, b: Leaf, shared: bool) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) if shared else a.shape[1:] == b.shape[1:]
    return type(a) is type(b) and (a == b if shared else True)
