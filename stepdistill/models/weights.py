"""Weights from elsewhere: the user's own LoRA merged into a teacher, and a student that begins as a published few-step model or LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from stepdistill.models.denoiser import Denoiser
from stepdistill.models.experts import Experts
from stepdistill.models.inputs import untold_class

FAULTS = (ValueError, RuntimeError, KeyError, AttributeError, OSError, SafetensorError)   # of diffusers, for files that do not fit


def fuse(pipeline: Any, loras: Mapping[str, float]) -> None:
    """Merge LoRA files (path to scale) into a pipeline, into its text encoders too where a file has parts for them.

    Any format that the pipeline's own loader reads. FileNotFoundError or ValueError naming the file.
    """
    for name, scale in loras.items():
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"teacher.loras names {path}, which does not exist")
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(f"teacher.loras: diffusers loads no LoRA into a {type(pipeline).__name__}")
        with _named(f"teacher.loras {path} cannot be loaded into a {type(pipeline).__name__}"):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True, use_safetensors=True)
        if not pipeline.get_list_adapters():
            raise ValueError(f"teacher.loras {path} names no layer of this {type(pipeline).__name__}")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()


def begin_as(student: Denoiser, source: Path, component: str) -> None:
    """Fill a student with a published one: a diffusers folder (of a pipeline or a network), or a LoRA file in diffusers' format.

    A LoRA file is merged into a full student, and becomes the adapter of one that is an adapter of its rank on its layers. `component` is
    the network's name in the pipeline. FileNotFoundError or ValueError where it does not fit.
    """
    network: Any = student.network
    if isinstance(network, Experts):
        raise ValueError(f"student.weights is for a student of one network, and this is {len(network.experts)} experts, which begin as the "
                         "teacher: leave it out, or begin with the networks of another run (start)")
    if source.is_dir() and student.adapter is not None:
        raise ValueError(f"student.weights {source} is a whole network and the student is an adapter: leave lora.student out, or give a "
                         "LoRA file")
    if not source.exists():
        raise FileNotFoundError(f"student.weights {source} does not exist: give a diffusers folder or a LoRA file")
    with _named(f"student.weights {source} does not fit this {type(network).__name__}"):
        if source.is_dir():
            inner = source / component if (source / component).is_dir() else source
            published: Any = untold_class(network)
            network.load_state_dict(published.from_pretrained(inner, local_files_only=True, use_safetensors=True).state_dict())
        elif student.adapter is not None:
            _adapter_from(network, student.adapter, source, component)
        else:
            before = [p.requires_grad for p in network.parameters()]
            network.load_lora_adapter(str(source.parent), prefix=component, weight_name=source.name, local_files_only=True,
                                      use_safetensors=True)
            if not getattr(network, "peft_config", None):
                raise ValueError(f"it names no layer {component}.*")
            network.fuse_lora()
            network.unload_lora()
            for parameter, trains in zip(network.parameters(), before, strict=True):
                parameter.requires_grad_(trains)


@torch.no_grad()
def _adapter_from(network: Any, adapter: str, path: Path, component: str) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}                                            # noqa: SIM118
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    rank, alpha = (config.get(f"{component}.{key}") for key in ("r", "lora_alpha"))
    layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer) and adapter in module.lora_A}
    left = {key for key in tensors if key.startswith(f"{component}.")}
    if not left:
        raise ValueError(f"it names no layer {component}.*")
    for name, layer in layers.items():
        names = [f"{component}.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        if names[0] not in tensors:
            continue                                                     # stays no change
        down, up = (tensors[key] for key in names)
        if down.shape != layer.lora_A[adapter].weight.shape:
            raise ValueError(f"{name} has rank {len(down)} there, and lora.student.rank is {layer.r[adapter]}")
        scale = (alpha / rank if rank and alpha else 1.0) / layer.scaling[adapter]
        layer.lora_A[adapter].weight.copy_(down)
        layer.lora_B[adapter].weight.copy_(up * scale)
        left -= {*names}
    if left:
        raise ValueError(f"the student's adapter has no layer {sorted(left)[0]}: put it among lora.student.targets")


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:250]}") from error
