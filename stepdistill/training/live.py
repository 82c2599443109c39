"""Bytes of the tensor storages that are alive: counted as they come and go, on a real device or on tensors without numbers."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Live(TorchDispatchMode):
    """Follows every storage made inside it until it is freed. `peak` is the most bytes alive at one time; `most` the same per label.

    A storage belongs to the `label` of the moment it was made. Those of `held` were there before, and are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.label, self.bytes, self.peak = "", 0, 0
        self.now, self.most = Counter[str](), Counter[str]()
        self._held = [tensor.untyped_storage() for tensor in held]               # kept, so that no other storage gets their place
        self._owner: dict[int, tuple[str, int]] = {id(storage): ("", 0) for storage in self._held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)                                                        # its Python object lives as long as the storage
        if key not in self._owner:
            self._owner[key] = self.label, storage.nbytes()
            self._add(self.label, storage.nbytes())
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        label, size = self._owner.pop(key)
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        self.bytes += size
        self.now[label] += size
        self.peak, self.most[label] = max(self.peak, self.bytes), max(self.most[label], self.now[label])

    def relabel(self, tensor: Tensor, label: str) -> None:
        """From now on its storage counts under another label."""
        self._note(storage := tensor.untyped_storage())
        before, size = self._owner[key := id(storage)]
        self.now[before] -= size
        self._owner[key] = label, size
        self.now[label] += size
        self.most[label] = max(self.most[label], self.now[label])


def alive() -> list[Tensor]:
    """A tensor for every storage that Python can reach now. What forward-mode products leave behind are tensors without any."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects()
               if issubclass(type(thing), Tensor) and thing.device.type != "meta" and torch._C._has_storage(thing)]
    return list({id(tensor.untyped_storage()): tensor for tensor in tensors}.values())


# ---- tensors without numbers

@contextmanager
def rehearsal(*, card: bool) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Tensors made inside have shapes, storages of the right size and no numbers; what it yields makes such tensors of a module on the
    meta device.

    What is meant to run on a CPU is rehearsed as it is; with `card`, operations keep the bytes that they keep on a CUDA card. Where code
    asks whether numbers are so, they are not: a Heun step then makes both of its calls.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(Tensor, "__bool__", _no_if_unknown(Tensor.__bool__)))
        if card:
            stack.enter_context(_as_on_a_card())
        yield lambda module: module.to_empty(device="cpu")


def _no_if_unknown(truth: Callable[[Tensor], bool]) -> Callable[[Tensor], bool]:
    def answer(self: Tensor) -> bool:
        try:
            return truth(self)
        except DataDependentOutputException:
            return False

    return answer


@contextmanager
def _as_on_a_card() -> Iterator[None]:
    """Attention and autocast of a CUDA card, for tensors that say they are on a CPU: no machine without a card can do better.

    A card's fused attention saves its inputs, its output and one number per query and head, never the S x S matrix of weights (Dao et al.
    2022, https://arxiv.org/abs/2205.14135, algorithms 1 and 4). Its autocast runs norms, softmax and resampling in float32 (the operator
    lists in torch.amp's documentation), where that of a CPU leaves them in half precision. The functions themselves are exchanged: a
    torch function mode would be off in the backward pass, where checkpointed blocks run again.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _fused))
        for place, name in FLOAT32:
            stack.enter_context(mock.patch.object(place, name, _in_float32(getattr(place, name))))
        yield


FLOAT32 = (*((functional, name) for name in ("layer_norm", "group_norm", "rms_norm", "interpolate", "softmax")), (torch, "softmax"),
           (Tensor, "softmax"))


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, (args, kwargs))
        return function(*args, **kwargs)

    return wide


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` in bytes: the numbers do not matter, and a mask trains nothing."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    out: Tensor = _Fused.apply(query, key, value)
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)                                            # head by head or token by token, as the query lies
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
