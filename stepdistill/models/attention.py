"""Which kernels compute attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention kernels of a forward pass: torch's choice, but plain mathematics on a CPU.

    The CPU's fused kernel makes a training pass of a small U-Net a sixth slower (its backward is poor on short sequences) and knows no
    forward-mode derivative.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
