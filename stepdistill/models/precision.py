"""float32 means float32: where a derivative is taken, where pictures are made and where they are judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact() -> Iterator[None]:
    """No autocast on any device, no TF32, which cuDNN would use by default; settings are restored. A network that brings an autocast of
    its own keeps it."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
