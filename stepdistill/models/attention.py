"""Which kernels compute attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention kernels of a forward pass: torch's choice, but plain mathematics on a CPU.

    The CPU's fused kernel makes a training pass of a small U-Net a sixth slower (its backward is poor on short sequences) and knows no
    forward-mode derivative.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """Attention in plain mathematics meanwhile, whatever `switch` chose: no other kernel has a forward-mode derivative."""
    processors: list[Any] = [getattr(m, "processor", None) for m in network.modules()]
    dispatched = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    swapped = [(m, m.processor) for m in network.modules() if isinstance(m, Attention) and isinstance(m.processor, XFormersAttnProcessor)]
    before = [processor._attention_backend for processor in dispatched]
    try:
        for processor in dispatched:
            processor._attention_backend = DISPATCHED["sdpa"]
        for module, _ in swapped:
            module.set_processor(AttnProcessor2_0())
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for processor, backend in zip(dispatched, before, strict=True):
            processor._attention_backend = backend
        for module, processor in swapped:
            module.set_processor(processor)


DISPATCHED = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}      # our names in diffusers' dispatcher


def switch(network: nn.Module, name: str, device: torch.device) -> int:
    """Compute attention with "sdpa", "xformers" or "flash" from now on; returns how many modules of the network switched.

    diffusers has two mechanisms. New transformers ask a dispatcher, whose own switch also changes the default of the whole process: here
    only this network's processors are told. Older modules swap their processor, and know xformers and torch's attention alone. Raises
    ValueError where the backend cannot train on this device, or reached no module.
    """
    if reason := unusable(name, device):
        raise ValueError(f"attention: {name} cannot be used here: {reason}. attention: sdpa, torch's own, runs everywhere")
    switched = seen = 0
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        seen += 1
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = DISPATCHED[name]
            switched += 1
        elif isinstance(module, Attention) and name != "flash":
            module.set_use_memory_efficient_attention_xformers(name == "xformers")
            switched += 1
    if not switched:
        raise ValueError(f"attention: {name} reaches none of the {seen} attention modules of {type(network).__name__}: leave it at auto")
    return switched


def unusable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot compute attention and its gradient on this device, tried on a small call; None where it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it has no kernels for {device.type}"
    q = torch.randn(1, 64, 2, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        if name == "xformers":
            from xformers.ops import memory_efficient_attention

            memory_efficient_attention(q, q, q).sum().backward()
        else:
            from flash_attn import flash_attn_func

            flash_attn_func(q, q, q).sum().backward()
    except ImportError as error:
        return f"it is not installed, or not for this torch ({' '.join(str(error).split())[:120]})"
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return None
