"""Denoiser: (x_t, t, cond) -> Prediction over any diffusers network. The one seam between networks and methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess, TableVP, at_least_float32
from stepdistill.models.adapters import Adapted, adapted
from stepdistill.models.attention import attention
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.experts import Experts, serving
from stepdistill.models.guidance import guide


def _index(process: NoiseProcess, t: Tensor) -> Tensor:
    if not isinstance(process, TableVP):
        raise ValueError(f"the clock 'index' counts the steps of a DDPM table, and {type(process).__name__} has none")
    return (t * process.steps - 1).clamp_min(0)


CLOCKS: dict[str, Callable[[NoiseProcess, Tensor], Tensor]] = {          # our t (B,) to the number the network embeds
    "index": _index,
    "t": lambda process, t: t,
    "sigma": lambda process, t: process.sigma(t),
    "1000t": lambda process, t: 1000 * t,
    "1000sigma": lambda process, t: 1000 * process.sigma(t),
    "1000alpha": lambda process, t: 1000 * process.alpha(t),
    "1000sigma/alpha": lambda process, t: 1000 * process.sigma(t) / process.alpha(t),
    "sigma/(1+sigma)": lambda process, t: process.sigma(t) / (process.alpha(t) + process.sigma(t)),
    "log_sigma/4": lambda process, t: (process.sigma(t) / process.alpha(t)).log() / 4,
    "angle": lambda process, t: torch.atan2(process.sigma(t), process.alpha(t)),
}


class Wiring(Protocol):
    """How a network is called and answered, where that is more than (x_t, clock, **cond) and one output."""

    @property
    def embeds(self) -> bool:
        """Guidance is an input of the network, not a second pass."""
        ...

    def call(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], process: NoiseProcess, w: float | Tensor,
             dtype: torch.dtype) -> dict[str, Any]: ...

    def read(self, output: Any, x_t: Tensor) -> Tensor: ...


@dataclass
class Denoiser:
    """A network with the process it was trained for.

    Called with x_t (B, ...), t (B,) or scalar in [0, 1] and a Conditioning, it returns a Prediction in float32 (float64 for a float64
    network). `guidance` is the default w; `plain` is the same network unguided; `law` is a row of guidance.LAWS. `autocast` is the
    precision of the forward pass only. `taps` name the submodules whose outputs `tap=True` returns as features. `channels` keeps the
    first channels of an output with a learned variance; a `wiring` does that, and the clock, for networks called in other ways.
    `adapter` is the LoRA adapter of the network that this role is, None the network without any. Where guidance is an input of the
    network, `embedded` fixes it: a student is told the number it was made with, whatever w is asked for. `inputs` name what the network
    was given to be told besides (models.inputs): with "s" each call needs the time that its step goes to, with "w" guidance is told in one
    pass. `wrapped` is the distributed wrapper, used only for the call that carries the trained role's gradient. Where `network` is Experts,
    each sample is answered by that of its time, a network of its own or an adapter on one that they share.
    """

    network: nn.Module
    process: NoiseProcess
    kind: str
    clock: str = "index"
    guidance: float = 1.0
    autocast: torch.dtype | None = None
    taps: tuple[str, ...] = ()
    channels: int | None = None
    wiring: Wiring | None = None
    law: str = "linear"
    adapter: str | None = None
    embedded: float | None = None
    inputs: tuple[str, ...] = ()
    wrapped: nn.Module | None = None

    @property
    def plain(self) -> Denoiser:
        """The same network with guidance 1."""
        return replace(self, guidance=1.0)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in, without those of adapters and those that a quantiser has packed into whole numbers."""
        return next(p.dtype for name, p in self.network.named_parameters() if p.is_floating_point() and ".lora_" not in name)

    def copy(self) -> Denoiser:
        """Another role with a deep copy of the weights, unguided and without the distributed wrapper."""
        return replace(self.shared(None), network=copy.deepcopy(self.network))

    def divided(self, boundaries: Sequence[float]) -> Denoiser:
        """The same with a copy for every stretch of time between these: that of the network which answers at its upper end."""
        return replace(self.shared(None), network=Experts(list(map(copy.deepcopy, self._serving(boundaries))), boundaries))

    def shared_by(self, adapters: Sequence[str], boundaries: Sequence[float]) -> Denoiser:
        """Another role on the same network, with an adapter of its own for every stretch of time between these."""
        views = [Adapted(self.network, part, name) for name, part in zip(adapters, self._serving(boundaries), strict=True)]
        return replace(self.shared(None), network=Experts(views, boundaries).eval())

    def _serving(self, boundaries: Sequence[float]) -> list[nn.Module]:
        tops = torch.tensor((1.0, *boundaries), dtype=torch.float64)
        return [serving(self.network, top[None]) for top in tops]

    def shared(self, adapter: str | None) -> Denoiser:
        """Another role on the same network, with an adapter of its own."""
        embeds = self.wiring is not None and self.wiring.embeds
        return replace(self, adapter=adapter, guidance=1.0, embedded=self.guidance if embeds else None, wrapped=None)

    def raw(self, x_t: Tensor, t: Tensor, cond: Conditioning, w: float | Tensor = 1.0, s: Tensor | None = None) -> Tensor:
        """The network's own output, differentiable in x_t and t; `w` only where the network embeds its guidance, s (B,) is t by default."""
        module = self.network if self.wrapped is None or not torch.is_grad_enabled() else self.wrapped
        if not isinstance(self.network, Experts):
            args, kwargs = self._arguments(x_t, t, cond, w, s)
            with self._forward(x_t.device):
                return self._answer(module(*args, **kwargs), x_t)
        shares = self.network.shares(t)
        some = lambda rows: (x_t[rows], t[rows], cond if isinstance(rows, slice) else cond.slice(rows),          # noqa: E731
                             w[rows] if isinstance(w, Tensor) and w.ndim else w)
        calls = [(i, *self._arguments(*some(rows))) for i, rows in shares]
        with self._forward(x_t.device):
            outs = [self._answer(out, x_t[rows]) for out, (_, rows) in zip(module(calls), shares, strict=True)]
        if len(outs) == 1:
            return outs[0]
        order = torch.cat([rows for _, rows in shares if isinstance(rows, Tensor)])
        return torch.cat(outs)[order.argsort()]

    def _arguments(self, x_t: Tensor, t: Tensor, cond: Conditioning, w: float | Tensor,
                   s: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        number, told = torch.float64 if self.dtype == torch.float64 else torch.float32, {}
        if self.inputs:
            scale = torch.as_tensor(w, dtype=torch.float64, device=t.device)
            numbers = {"s": t - (t if s is None else s), "w": (scale - 1).expand(len(t))}
            told["told"] = torch.stack([numbers[name] for name in self.inputs], 1).to(number)
        if self.wiring:
            return (), {**self.wiring.call(x_t, t, cond, self.process, w, self.dtype), **told}
        return (x_t.to(self.dtype), CLOCKS[self.clock](self.process, t).to(number)), {"return_dict": False, **cond, **told}

    def _answer(self, output: Any, x_t: Tensor) -> Tensor:
        if self.wiring:
            return at_least_float32(self.wiring.read(output, x_t))
        return at_least_float32(output[0] if self.channels is None else output[0][:, : self.channels])

    @contextmanager
    def _forward(self, device: torch.device) -> Iterator[None]:
        precision = torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)
        with attention(device), precision, adapted(self.network, self.adapter):
            yield

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning, *, s: float | Tensor | None = None, w: float | Tensor | None = None,
                 tap: bool = False) -> Prediction:
        """Predict; `w` (B,) or a number overrides the default guidance, `tap` collects features (of the conditional half when guided).

        `s` (B,) or a number is for a network that is told it, which cannot do without: ValueError otherwise.
        """
        if (s is None) == ("s" in self.inputs):
            raise ValueError("this network is told the time that its step goes to: name it with s" if s is None else
                             "this network is not told the time that its step goes to: leave s out")
        x_t = at_least_float32(x_t)
        t = t.to(x_t.device).expand(len(x_t)) if t.ndim == 0 else t
        s = t if s is None else torch.as_tensor(s, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        w = self.guidance if w is None else w
        read = serving(self.network, t) if tap else self.network
        embeds = "w" in self.inputs or (self.wiring is not None and self.wiring.embeds)
        drops = not embeds and isinstance(w, float | int) and w == 0 and self.law == "linear"
        if embeds or drops or (isinstance(w, float | int) and w == 1):
            with tapped(read, self.taps if tap else ()) as features:
                out = self.raw(x_t, t, cond.null if drops else cond, w if self.embedded is None else self.embedded, s)
            return Prediction(out, self.kind, x_t, alpha, sigma, tuple(features))
        n, null = len(x_t), cond.null
        with tapped(read, self.taps if tap else ()) as features:
            if cond.joins(null):
                out = self.raw(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(null), s=torch.cat([s, s]))
            else:                                                        # another length of text, or a mask that only one of them has
                out = torch.cat([self.raw(x_t, t, cond, s=s), self.raw(x_t, t, null, s=s)])
        seen = tuple(f[:n] for f in features[: len(self.taps)])
        halves = [Prediction(o, self.kind, x_t, alpha, sigma, seen) for o in (out[:n], out[n:])]
        return guide(halves[0], halves[1], w, self.law)


@contextmanager
def tapped(network: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the named submodules, in the order they ran."""
    features: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        features.append(out[0] if isinstance(out, tuple) else out)

    hooks = [network.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def default_taps(network: nn.Module) -> tuple[str, ...]:
    """Where features are read, by structure: a U-Net's middle block, or the middle of a transformer's stack of blocks."""
    children = dict(network.named_children())
    if "mid_block" in children:
        return ("mid_block",)
    stacks = {name: child for name, child in children.items() if isinstance(child, nn.ModuleList) and name.endswith(("blocks", "layers"))}
    if stacks:
        name = max(stacks, key=lambda n: len(stacks[n]))
        return (f"{name}.{math.ceil(len(stacks[name]) / 2) - 1}",)
    raise ValueError(f"{type(network).__name__} has neither a mid_block nor a stack of blocks: name the tapped modules in the recipe")


FIRST = ("conv_in", "x_embedder", "img_in", "patch_embedding", "pos_embed.proj", "patch_embed.proj", "x_embedder.proj", "proj_in")
LAST = ("conv_out", "proj_out_2", "proj_out")                           # what diffusers calls these layers, the outermost of them first
PLAIN = (nn.Conv2d, nn.Conv3d, nn.Linear)


def last_layer(network: nn.Module) -> nn.Parameter:
    """The weight of the last layer. ValueError where none is recognised, or where the network is compiled, which hides its layers."""
    for name in LAST:
        if isinstance(weight := getattr(getattr(network, name, None), "weight", None), nn.Parameter):
            if network._compiled_call_impl is not None:
                raise ValueError("the gradient of the last layer alone cannot be read of a compiled network: set compile: false")
            return weight
    raise ValueError(f"{type(network).__name__} has no last layer by the name of {', '.join(LAST)}, at whose weight to measure gradients")


def keep_ends_float32(network: nn.Module) -> nn.Module:
    """Run the first and the last layer outside autocast. Does nothing where none is recognised or its weights are stored in half precision.

    The first reads the state: what 1/250 of the time changes in it is no more than bfloat16 rounds away, and the methods that compare
    neighbours on a trajectory would learn from rounding. Its result is rounded. The last gives the output: at alpha = 0.07 an eps output is
    multiplied by 15, and so is its rounding.
    """
    for part in network.experts if isinstance(network, Experts) else (network,):
        for names, careful in ((FIRST, (_FirstConv2d, _FirstConv3d, _FirstLinear)), (LAST, (_Conv2d, _Conv3d, _Linear))):
            layer = next(filter(lambda found: type(found) in PLAIN, (_submodule(part, name) for name in names)), None)
            if layer is not None:
                layer.__class__ = careful[PLAIN.index(type(layer))]      # not a hook: torch.compile cannot trace one that leaves autocast
    return network


def _submodule(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


class _Outside(nn.Module):
    """Beside a layer: run outside autocast, in the precision of its weights."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _Rounded(_Outside):
    """The same, its result in the precision that autocast would have given it."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else out


class _Conv2d(_Outside, nn.Conv2d):
    pass


class _Conv3d(_Outside, nn.Conv3d):
    pass


class _Linear(_Outside, nn.Linear):
    pass


class _FirstConv2d(_Rounded, nn.Conv2d):
    pass


class _FirstConv3d(_Rounded, nn.Conv3d):
    pass


class _FirstLinear(_Rounded, nn.Linear):
    pass
