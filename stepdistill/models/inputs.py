"""What a student's network is told besides its time: the time `s` that its step goes to, its guidance `w`. The file needs torch and
diffusers only, and leaves home with the weights of students that need it.

Every `TimestepEmbedding` of diffusers can add a linear image, `cond_proj`, of a condition to the sinusoids of the time. Here the condition
is the sinusoids of 1000·(t - s) and 1000·(w - 1), 256 of each, and `cond_proj` begins at zero: the network is the teacher's at first. For w
alone that is the `time_cond_proj_dim=256` of UNet2DConditionModel and what diffusers' pipelines put into it (Meng et al. 2022; LCM, Luo et
al. 2023). The step t - s is told and not s, so that every denoiser, s = t, is told the same (MeanFlow, Geng et al. 2025, compares both).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

WIDTH = 256                                              # sinusoids of each number


def sinusoids(numbers: Tensor) -> Tensor:
    """(B, k) -> (B, 256·k): sin and cos of 1000·number, each as `get_guidance_scale_embedding` of diffusers' pipelines makes them.

    Theirs are made in the pipeline's precision, so in half precision the fast ones come out wrong.
    """
    slower = torch.log(torch.tensor(10000.0)) / (WIDTH // 2 - 1)
    rates = torch.exp(torch.arange(WIDTH // 2, dtype=numbers.dtype) * -slower).to(numbers.device)
    angles = (1000.0 * numbers)[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class ToldEmbedding(TimestepEmbedding):
    """A time embedder whose condition (B, 256·k) is `told`, wherever in the network it is called. Its rows may be times of many tokens."""

    told: Tensor | None = None

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.told is None:
            return super().forward(sample, condition)
        count, left = divmod(len(sample), len(self.told))
        if left or not count:
            raise ValueError(f"this network embeds one time for the whole batch ({len(sample)} for {len(self.told)} samples) and can be "
                             "told nothing besides")
        rows = self.told.to(self.cond_proj.weight.dtype).repeat_interleave(count, 0)
        return super().forward(sample, rows.reshape(len(sample), *(1,) * (sample.ndim - 2), -1))


class Told(nn.Module):
    """Mixed into a network of diffusers: its forward pass takes `told` (B, k), a number for each input, besides everything else."""

    embedders: list[ToldEmbedding]

    def forward(self, *args: Any, told: Tensor | None = None, **kwargs: Any) -> Any:
        with telling(self, None if told is None else sinusoids(told)):
            return super().forward(*args, **kwargs)


@contextmanager
def telling(network: nn.Module, condition: Tensor | None) -> Iterator[None]:
    """Run a network's time embedders with this condition; nothing happens in a network that takes none."""
    embedders, before = network.embedders if isinstance(network, Told) else [], told_now(network)
    for embedder in embedders:
        embedder.told = condition
    try:
        yield
    finally:
        for embedder in embedders:
            embedder.told = before


def told_now(network: nn.Module) -> Tensor | None:
    """The condition that runs now: a block that is recomputed in the backward pass needs it again."""
    return network.embedders[0].told if isinstance(network, Told) else None


def add_inputs(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """Let a network of diffusers be told these inputs; it is changed in place and, untold or not trained yet, answers as before.

    ValueError where it has no time embedder that can be told, or is told something already.
    """
    found = [module for name, module in network.named_modules() if type(module) is TimestepEmbedding and _is_of_time(name)]
    if isinstance(network, Told) or any(module.cond_proj is not None for module in found):
        raise ValueError(f"this {type(network).__name__} is told something besides its time already, and can be told no more")
    if not found:
        raise ValueError(f"{type(network).__name__} embeds its time in no TimestepEmbedding of diffusers: it can be told nothing besides")
    for module in found:
        weight = module.linear_1.weight
        module.cond_proj = nn.Linear(WIDTH * len(names), weight.shape[1], bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(module.cond_proj.weight)
        module.__class__ = ToldEmbedding
    told: Any = network
    plain: Any = type(network)
    told.__class__, told.embedders = told_class(plain), found
    told.register_to_config(inputs=list(names))
    return network


def _is_of_time(name: str) -> bool:
    """By name: the sizes, texts and labels of some networks are embedded in the same class."""
    last = name.rpartition(".")[2]
    return last == "t_embedder" or last.startswith("time")


@functools.cache
def told_class(base: Any) -> Any:
    """The class of a network of this class that is told its config's `inputs`; made, loaded and saved as diffusers does its own."""

    def init(self: Any, *args: Any, inputs: Sequence[str] = ("w",), **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.__class__ = base
        add_inputs(self, inputs)

    known = inspect.signature(base.__init__)
    inputs = inspect.Parameter("inputs", inspect.Parameter.KEYWORD_ONLY, default=("w",))
    init.__signature__ = known.replace(parameters=[*known.parameters.values(), inputs])                 # type: ignore[attr-defined]
    return type(f"Told{base.__name__}", (Told, base), {"__init__": init, "__module__": __name__})


def untold_class(network: nn.Module) -> type[nn.Module]:
    """The class of diffusers that a network is of."""
    cls = type(network)
    return cls.__bases__[1] if issubclass(cls, Told) else cls


ToldUNet2DModel = told_class(UNet2DModel)
ToldDiTTransformer2DModel = told_class(DiTTransformer2DModel)
