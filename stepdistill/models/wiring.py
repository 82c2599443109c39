"""How a network is called, as data: which of its arguments is the noisy state, which the clock, which comes from the condition.

A `Wiring` is what a recording of a pipeline learns (recording.py); with it a Denoiser calls any diffusers network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.diffusion.process import NoiseProcess
from stepdistill.models.denoiser import CLOCKS


class Unrecordable(ValueError):
    """A pipeline does something that a recording cannot explain; the message says what."""


@dataclass(frozen=True)
class Layout:
    """Where the elements of one row go: (B, *source) to (B, *target). Only "gather" is bound to the sizes it was learnt at.

    "cat" is the reverse of "slice": the row, and behind it what the condition brings (a mask, a first frame).
    """

    how: Literal["same", "singles", "squeezed", "slice", "cat", "gather"] = "same"
    axes: tuple[int, ...] = ()                                            # of length 1, in the longer of both; slice, cat: the one cut
    index: Tensor | None = None
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()

    @classmethod
    def of(cls, index: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> Layout:
        """The simplest layout in which element i of the target is element index[i] of the source, both flattened."""
        order = torch.arange(math.prod(source)).reshape(source)
        if torch.equal(index, order.flatten()):
            if source == target:
                return cls()
            longer, shorter = (target, source) if len(target) > len(source) else (source, target)
            axes = tuple(i for i, n in enumerate(longer) if n == 1)[: len(longer) - len(shorter)]
            if axes and tuple(n for i, n in enumerate(longer) if i not in axes) == shorter:
                return cls("singles" if longer is target else "squeezed", axes)
        if len(source) == len(target) and len(differing := [i for i, (m, n) in enumerate(zip(source, target, strict=True)) if m != n]) == 1:
            axis = differing[0]
            if source[axis] > target[axis] and torch.equal(index, order.narrow(axis, 0, target[axis]).flatten()):
                return cls("slice", (axis,))
            if source[axis] < target[axis]:
                expected = torch.full(target, -1)
                expected.narrow(axis, 0, source[axis]).copy_(order)
                if torch.equal(index, expected.flatten()):
                    return cls("cat", (axis,))
        if bool((index < 0).any()):
            raise Unrecordable(f"the sample {source} is a scattered part of the argument {target}")
        return cls("gather", (), index, source, target)

    def __call__(self, rows: Tensor, size: Sequence[int] = (), rest: Tensor | None = None) -> Tensor:
        """`size` is the shape of a state, for a slice of the output; `rest` is a whole target whose tail "cat" takes."""
        if self.how == "same":
            return rows
        if self.how == "cat":
            assert rest is not None
            axis = self.axes[0] + 1
            return torch.cat([rows, rest.narrow(axis, rows.shape[axis], rest.shape[axis] - rows.shape[axis]).to(rows)], axis)
        if self.how == "singles":
            for axis in self.axes:
                rows = rows.unsqueeze(axis + 1)
            return rows
        if self.how == "squeezed":
            return rows.squeeze(tuple(axis + 1 for axis in self.axes))
        if self.how == "slice":
            return rows.narrow(self.axes[0] + 1, 0, size[self.axes[0]])
        assert self.index is not None
        if tuple(rows.shape[1:]) != self.source:
            raise ValueError(f"recorded for {self.source} and called with {tuple(rows.shape[1:])}: record the pipeline at this size")
        return rows.flatten(1)[:, self.index.to(rows.device)].reshape(len(rows), *self.target)


@dataclass(frozen=True)
class Static:
    """Always the same: a switch, or nothing."""

    value: Any


@dataclass(frozen=True)
class FromCondition:
    """A leaf of the condition. With a batch axis it is stored with the batch first, `rows` of it per sample; `shared` leaves have none:
    position ids, rotary tables, the size of the picture."""

    name: str
    axis: int = 0
    rows: int = 1
    shared: bool = False


@dataclass(frozen=True)
class FromSample:
    """The noisy state, laid out; `listed` as one tensor a sample. Where it is only a part, `name` is the leaf with the rest."""

    layout: Layout
    listed: bool
    name: str = ""


@dataclass(frozen=True)
class FromClock:
    """a·f(t) + b, f one of CLOCKS, one per sample; None for `tail` is one Python number for the whole batch. Where more axes follow (a time
    for every token), their lengths are the condition's shared leaf `name`."""

    basis: str
    a: float
    b: float
    tail: tuple[int, ...] | None
    name: str = ""


@dataclass(frozen=True)
class FromScale:
    """a·w + b: guidance that the network embeds, one per sample or (tail None) one for the batch."""

    a: float
    b: float
    tail: tuple[int, ...] | None


@dataclass(frozen=True)
class Wiring:
    """How a network is called and answered: `arguments` is the nested argument list with the leaves above in the places of its values.

    The state is `layout` of the network's first output, times `sign`. `embeds` says that guidance is an input.
    """

    arguments: Mapping[str, Any]
    layout: Layout
    sign: float

    @property
    def embeds(self) -> bool:
        return any(isinstance(leaf, FromScale) for _, leaf in leaves_of(self.arguments))

    def call(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], process: NoiseProcess, w: float | Tensor,
             dtype: torch.dtype) -> dict[str, Any]:
        """The keywords for one call on x_t (B, ...) at times t (B,)."""

        def value(leaf: Any) -> Any:
            match leaf:
                case Static():
                    return _to(leaf.value, x_t.device)
                case FromCondition():
                    return _restored(leaf, cond.get(leaf.name))
                case FromSample():
                    rows = leaf.layout(x_t.to(dtype), (), cond.get(leaf.name))
                    return list(rows.unbind()) if leaf.listed else rows
                case FromClock():
                    clock = leaf.a * CLOCKS[leaf.basis](process, t) + leaf.b
                    tail = cond[leaf.name] if leaf.tail else leaf.tail
                    return _scalars(clock.to(torch.float64 if dtype == torch.float64 else torch.float32), tail)
                case FromScale():
                    scale = torch.as_tensor(w, dtype=torch.float32, device=x_t.device).expand(len(x_t))
                    return _scalars(leaf.a * scale + leaf.b, leaf.tail)
            raise TypeError(type(leaf))

        return mapped(value, self.arguments)

    def read(self, output: Any, x_t: Tensor) -> Tensor:
        """The network's answer as a state."""
        first = primary(output)
        rows = self.layout(torch.stack(list(first)) if isinstance(first, list | tuple) else first, x_t.shape[1:])
        return rows if self.sign == 1 else self.sign * rows

    def condition(self, arguments: Mapping[str, Any], block: int, blocks: int, batch: int) -> dict[str, Any]:
        """The leaves of a condition, batch first, read off the arguments of a call that holds `blocks` of them."""
        found: dict[str, Any] = {}
        for path, leaf in leaves_of(self.arguments):
            value = at(arguments, path)
            if isinstance(leaf, FromCondition):
                found[leaf.name] = value if leaf.shared or value is None else _block(value, leaf.axis, leaf.rows, block, blocks, batch)
            elif isinstance(leaf, FromSample) and leaf.name:
                found[leaf.name] = _block(value, 0, 1, block, blocks, batch)
            elif isinstance(leaf, FromClock) and leaf.tail:
                found[path] = tuple(value.shape[1:])
        return found

    @property
    def shared(self) -> frozenset[str]:
        """The leaves of a condition without a batch axis."""
        return frozenset(leaf.name for _, leaf in leaves_of(self.arguments)
                         if (isinstance(leaf, FromCondition) and leaf.shared) or (isinstance(leaf, FromClock) and leaf.tail))


def _scalars(values: Tensor, tail: tuple[int, ...] | None) -> Any:
    if tail is not None:
        return values.reshape(-1, *(1,) * len(tail)).expand(-1, *tail)
    if bool((values != values[0]).any()):
        raise ValueError("this network takes one time for the whole batch, and the batch has several")
    return float(values[0])


def _restored(leaf: FromCondition, value: Any) -> Any:
    if value is None or leaf.shared or isinstance(value, tuple):
        return list(value) if isinstance(value, tuple) and not leaf.shared else value
    value = value.flatten(0, 1) if leaf.rows > 1 else value
    return value.movedim(0, leaf.axis) if leaf.axis else value


# ---- nested arguments

def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with every leaf replaced."""
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(function, value) for value in tree)
    return function(tree)


def leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything in a nesting of mappings, tuples and lists."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            yield from leaves_of(value, f"{path}.{i}")
    else:
        yield path, tree


def _to(value: Any, device: torch.device) -> Any:
    return mapped(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)


def primary(output: Any) -> Any:
    """The first output: a tensor, or a list with one tensor a sample."""
    if isinstance(output, Tensor):
        return output
    first = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return first


def answered(template: Any, value: Any) -> Any:
    """An output of the template's structure whose primary part is `value`."""
    if isinstance(template, Tensor):
        return value
    if isinstance(template, Mapping):                                     # a diffusers output, read by attribute, key and index
        key = next(iter(template))
        return type(template)(**{**template, key: value})
    return type(template)((value, *template[1:]))


def at(tree: Any, path: str) -> Any:
    """The value at a path of `leaves_of`; None where there is none."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list | tuple) else tree.get(key)
        if tree is None:
            return None
    return tree


def _block(value: Any, axis: int, rows: int, block: int, blocks: int, batch: int) -> Any:
    """One of the blocks that a value holds along its batch axis."""
    if isinstance(value, list | tuple):
        size = len(value) // blocks
        return tuple(value[block * size : (block + 1) * size])
    value = value.movedim(axis, 0)
    size = len(value) // blocks
    value = value[block * size : (block + 1) * size]
    return value.unflatten(0, (batch, rows)) if rows > 1 else value


def same(a: Any, b: Any) -> bool:
    """Equal, in nestings of tensors and plain values; objects that do not compare are equal to themselves."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return type(a) is type(b) and bool(a == b)
    except (TypeError, ValueError, RuntimeError):                         # objects whose == has no truth value: the same one, or not
        return a is b
