"""Tiny pipelines of real diffusers classes with random weights: what the recorder is proved on, since no model hub is needed for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


@dataclass(frozen=True)
class Exhibit:
    """One pipeline class at its smallest.

    `build` makes it: float32, CPU, seeded random weights, no progress bar. `inputs` turns prompts into the keywords of its `__call__` that
    carry them and the size of the picture (prompts, labels or embeddings; height, width, frames), and nothing about steps, guidance, noise
    or output. A prompt always means the same condition. `other_shape` overrides some of them for another size of state.
    """

    build: Callable[[], DiffusionPipeline]
    inputs: Callable[[Sequence[str]], dict[str, Any]]
    other_shape: Mapping[str, Any] = field(default_factory=dict)


def shaken(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Random weights everywhere: many networks start with zeros where it matters, and a proof on zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = std if parameter.ndim < 2 else 1.0 / max(1.0, parameter[0].numel()) ** 0.5
        offset = 1.0 if parameter.ndim < 2 and bool((parameter == 1).all()) else 0.0
        parameter.data.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def meaning(prompt: str, *shape: int) -> Tensor:
    """A standard normal tensor that depends on the prompt alone: its embedding, where no text encoder is worth building."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def meanings(prompts: Sequence[str], *shape: int) -> Tensor:
    """`meaning` of several prompts, one row each."""
    return torch.stack([meaning(prompt, *shape) for prompt in prompts])


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Without its progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
