"""What this environment can do, and where data and weights are looked for."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stepdistill import worlds
from stepdistill.worlds.emoji import data as emoji
from stepdistill.worlds.emoji import text
from stepdistill.worlds.fashion import data

PACKAGES = ("stepdistill", "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torch-fidelity")


def examine() -> dict[str, Any]:
    """Plain JSON values: versions, device, attention back ends, threads, data, weights."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": device,
        "bf16": "in hardware" if _has_bf16() else "emulated: precision fp32 may be faster here",
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "attention": ", ".join(attention()),
        "xformers": xformers(),
        "compiler": "triton" if torch.cuda.is_available() and importlib.util.find_spec("triton") else "inductor C++ (CPU)",
        "fashion data": fashion_data(),
        "emoji data": _place(emoji.svg_folder),
        "emoji text encoder": _place(text.folder),
        **{f"{name} teacher": teacher(name) for name in worlds.teachers()},
        "extractors": extractors(),
    }


def extractors() -> str:
    """The public networks whose weights `eval` finds, and the folder that it looks in."""
    from stepdistill.eval import weights

    found = [f"{row['name']} ({row['state']})" for row in weights.listing() if row["state"] != "missing"]
    return f"{', '.join(found) or 'no weights'} in {weights.root()}; `stepdistill weights` says how to get more"


def teacher(name: str) -> str:
    """The folder of a shipped teacher, if its weights are there."""
    folder = worlds.teacher_folder(name)
    return str(folder) if folder and any(folder.rglob("*.safetensors")) else "missing from this installation"


def _place(find: Callable[[], Path]) -> str:
    try:
        return str(find())
    except FileNotFoundError as error:
        return f"not on this machine yet: {error}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags


def attention() -> list[str]:
    """Scaled-dot-product kernels that answered a small call on this device, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    place, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    works = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        q = torch.randn(1, 2, 16, 32, device=place, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                torch.nn.functional.scaled_dot_product_attention(q, q, q).float().sum().backward()
            works.append(name.lower().removesuffix("_attention"))
        except RuntimeError:
            continue
    return works


def xformers() -> str:
    """Does the installed xformers run here?"""
    if importlib.util.find_spec("xformers") is None:
        return "not installed; attention falls back to SDPA"
    try:
        from xformers.ops import memory_efficient_attention

        place = "cuda" if torch.cuda.is_available() else "cpu"
        q = torch.randn(1, 16, 2, 32, device=place, dtype=torch.bfloat16 if place == "cuda" else torch.float32)
        memory_efficient_attention(q, q, q)
        return f"{_version('xformers')} works"
    except Exception as error:
        why = f"on this device with torch {torch.__version__} ({type(error).__name__})"
        return f"{_version('xformers')} is installed but cannot run {why}; SDPA is used"


def fashion_data() -> str:
    """The folder Fashion-MNIST would be read from."""
    named = os.environ.get(data.ENVIRONMENT)
    for folder in (named,) if named else (data.DEBIAN, data.downloads()):
        try:
            data.load("test", folder)
            return str(folder)
        except OSError as error:
            if named:                                   # a folder that was named is never replaced in silence by another
                return f"{data.ENVIRONMENT} names a folder that cannot be read: {error}"
    return f"not on this machine yet: {data.ENVIRONMENT} names a folder, or torchvision downloads it"
