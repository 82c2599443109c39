"""Roles as LoRA adapters on one frozen base: named, chosen for each call, without touching what requires a gradient.

peft makes the layers. Choosing is ours, because peft's own switch also decides what trains, and a role that only judges must not.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.models.attention import attention
from stepdistill.models.experts import Experts, boundaries_of, parts_of
from stepdistill.models.inputs import telling, told_now

_LAYERS: WeakKeyDictionary[nn.Module, list[LoraLayer]] = WeakKeyDictionary()

ALL = ("all",)


@dataclass(frozen=True)
class LoraRecipe:
    """A role's adapter. `targets` are ends of module names, by default every linear and convolution layer inside the blocks; `[all]` has
    those outside, too."""

    rank: int = 64
    alpha: float | None = None                           # the update is scaled by alpha / rank; default: rank
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"an adapter needs rank >= 1 and alpha > 0, got {self.rank} and {self.alpha}")

    @property
    def scale(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


def inject(network: nn.Module, name: str, recipe: LoraRecipe, seed: int, within: nn.Module | None = None) -> None:
    """Put an adapter into a network, or into this one of its experts; it starts as no change. ValueError where `targets` name no layer."""
    part = network if within is None else within
    place = next(path for path, module in network.named_modules() if module is part)
    chosen = [f"{place}.{layer}".lstrip(".") for layer in target_names(part, recipe.targets)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")              # several adapters are what we want
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=recipe.rank, lora_alpha=recipe.scale, target_modules=chosen), network, adapter_name=name)
    network.requires_grad_(False)
    _LAYERS[network] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for parameter in adapter_parameters(network, name).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()                      # a small step is lost in half precision


def target_names(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers an adapter goes to, by full name."""
    layers = [name.replace(".base_layer", "") for name, module in network.named_modules() if ".lora_" not in name
              and isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1]     # groups would split the rank
    if not targets:
        place = 2 if isinstance(network, Experts) else 0                 # behind "experts.0."
        return [name for name in layers if "block" in name.split(".")[place] or name.split(".")[place] == "layers"] or layers
    if tuple(targets) == ALL:
        return layers
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".")[-1] for name in layers} | set(layers))
            near = difflib.get_close_matches(target, ends, 1)
            raise ValueError(f"lora target {target!r} names no linear or convolution layer of {type(network).__name__}"
                             + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(layers[:5])}, ..."))
    return [name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)]


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by the name of their layer and their place in it."""
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, LoraLayer):
            for part in ("lora_A", "lora_B"):
                if name in (parts := getattr(module, part)):
                    found[f"{path}.{part}"] = parts[name].weight
    return found


class Adapter(nn.Module):
    """One adapter of a network as a module of its own: what is trained, averaged, saved and counted."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        for path, parameter in adapter_parameters(network, name).items():
            self.register_parameter(path.replace(".", "/"), parameter)


class Adapted(nn.Module):
    """A network under one of its adapters, as an expert among others that share its weights. `base` is what the adapters were put into,
    where `network` is one of its experts."""

    def __init__(self, base: nn.Module, network: nn.Module, name: str):
        super().__init__()
        self.network, self.name, self._base = network, name, (base,)     # in a tuple, or its other experts would be this one's parameters

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with adapted(self.base, self.name):
            return self.network(*args, **kwargs)


def views_of(network: nn.Module) -> list[Adapted]:
    """The experts of a network that are adapters on another one; none of any other network."""
    return [part for part in parts_of(network) if isinstance(part, Adapted)]


def base_of(network: nn.Module) -> nn.Module:
    """What it runs on: itself, or what its experts are adapters of."""
    return views[0].base if (views := views_of(network)) else network


def trained_of(network: nn.Module, name: str | None) -> nn.Module | None:
    """What a role trains in the place of the network's weights: this adapter, or those of its experts; None where it has neither."""
    if name is not None:
        return Adapter(network, name)
    views = views_of(network)
    return Experts([Adapter(view.network, view.name) for view in views], boundaries_of(network)) if views else None


@contextmanager
def adapted(network: nn.Module, name: str | None) -> Iterator[None]:
    """Run the network with this adapter, or with none; what requires a gradient stays as it is."""
    layers = _LAYERS.get(network, ())
    before = active(network)
    _choose(layers, name)
    try:
        yield
    finally:
        _choose(layers, before)


def active(network: nn.Module) -> str | None:
    """The adapter that runs now."""
    layers = _LAYERS.get(network)
    return None if not layers or layers[0]._disable_adapters else str(layers[0].active_adapters[0])


def _choose(layers: Sequence[LoraLayer], name: str | None) -> None:
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


@contextmanager
def exchanged(mine: nn.Module, other: nn.Module) -> Iterator[None]:
    """The parameters of one module with the values of another of the same kind, meanwhile."""
    pairs = list(zip(mine.parameters(), other.parameters(), strict=True))
    before = [p.data for p, _ in pairs]
    for p, q in pairs:
        p.data = q.data.to(p.dtype)
    try:
        yield
    finally:
        for (p, _), data in zip(pairs, before, strict=True):
            p.data = data


def checkpoint_activations(network: Any) -> None:
    """Trade compute for memory in the backward pass. The recomputation runs under the adapter, the attention kernels and what was told in
    the forward pass, which are no longer chosen by then.

    ValueError where the network's class does not support it.
    """
    def run(function: Callable[..., Any], *args: Any) -> Any:
        name, device, told = active(network), next(network.parameters()).device, told_now(network)

        def again(*inner: Any) -> Any:
            with attention(device), adapted(network, name), telling(network, told):
                return function(*inner)

        return checkpoint(again, *args, use_reentrant=False)

    try:
        network.enable_gradient_checkpointing(run)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"gradient_checkpointing: {type(network).__name__} does not support it") from error


def diffusers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's saved weights under the names that `load_lora_weights` reads, without the component's."""
    return {f"{key.replace('/', '.')}.weight": value for key, value in weights.items()}


def is_adapter(weights: Mapping[str, Tensor]) -> bool:
    """Whether saved weights are those of an adapter."""
    return bool(weights) and all(key.endswith(("/lora_A", "/lora_B")) for key in weights)


def layers_of(weights: Mapping[str, Tensor]) -> set[str]:
    """The layers that an adapter's saved weights belong to."""
    return {key.rpartition("/")[0].replace("/", ".") for key in weights}


def merged(network: nn.Module, weights: Mapping[str, Tensor], recipe: LoraRecipe) -> nn.Module:
    """Add an adapter's saved weights to the layers they belong to, in float32; the network is changed in place."""
    layers = dict(network.named_modules())
    for name in {key.rpartition("/")[0] for key in weights}:
        layer: Any = layers[name.replace("/", ".")]
        a, b = (weights[f"{name}/{part}"].flatten(1).float() for part in ("lora_A", "lora_B"))
        delta = b @ a * (recipe.scale / recipe.rank)
        layer.weight.data = (layer.weight.data.float() + delta.reshape(layer.weight.shape)).to(layer.weight.dtype)
    return network
