"""A frozen base in fewer bits: diffusers' own quantisers, for the network that is distilled and for nothing else of its pipeline.

Adapters are trained over the packed weights in float32 (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PACKAGES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "torchao": "torchao"}
OPTIONS = {                                             # of BitsAndBytesConfig; its others are for weights that train or are offloaded
    "bitsandbytes_4bit": ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_skip_modules"),
    "bitsandbytes_8bit": ("llm_int8_threshold", "llm_int8_skip_modules"),
}
NETWORKS = ("transformer", "unet")                      # what pipelines call the network that is distilled


@dataclass(frozen=True)
class QuantizeRecipe:
    """How the frozen base is stored.

    `options` are OPTIONS of diffusers' BitsAndBytesConfig, or for torchao a `quant_type` (a class of torchao.quantization, by default
    Int8WeightOnlyConfig), keywords of that class, and `modules_to_not_convert`. torchao keeps every unpacked weight for the backward
    pass, so it saves memory with gradient_checkpointing alone; bitsandbytes unpacks a layer's weight again when its turn comes.
    """

    backend: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao"]
    options: Mapping[str, Any] = field(default_factory=dict)


def config_of(recipe: QuantizeRecipe, device: torch.device | str) -> Any:
    """diffusers' quantisation config. ValueError where the library or a GPU is missing, or an option is none."""
    backend, options = recipe.backend, dict(recipe.options)
    try:
        metadata.version(PACKAGES[backend])
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"teacher.quantize {backend} needs a library that is not here: pip install {PACKAGES[backend]}") from error
    try:
        if backend != "torchao":
            if torch.device(device).type == "cpu":
                raise ValueError("diffusers packs for it on a GPU only and this run is on a CPU: take torchao")
            _check(options, OPTIONS[backend])
            return BitsAndBytesConfig(**{f"load_in_{backend.removeprefix('bitsandbytes_')}": True}, **options)
        torchao = importlib.import_module("torchao.quantization")
        name, skipped = options.pop("quant_type", "Int8WeightOnlyConfig"), options.pop("modules_to_not_convert", None)
        known = [n for n in dir(torchao) if n.endswith("Config") and n not in ("AOBaseConfig", "FqnToConfig")]
        _check([name], known)
        _check(options, [*inspect.signature(getattr(torchao, name)).parameters, "quant_type", "modules_to_not_convert"])
        return TorchAoConfig(getattr(torchao, name)(**options), modules_to_not_convert=skipped)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"teacher.quantize {backend}: {' '.join(str(error).split())[:300]}") from error


def _check(names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(f"it knows no {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"))


def network_among(components: Collection[str]) -> str:
    """Which component of a pipeline is quantised; ValueError where none of them is one of NETWORKS."""
    found = next((name for name in NETWORKS if name in components), None)
    if found is None:
        raise ValueError(f"teacher.quantize: this pipeline has neither a {' nor a '.join(NETWORKS)}; leave it out")
    return found


def requantized(network: Any, config: Any, dtype: torch.dtype) -> Any:
    """A network that was changed after it was loaded, quantised: diffusers packs weights only while it reads them from a file.

    The file is a temporary one of the network's size. ValueError where diffusers cannot pack it.
    """
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder, safe_serialization=True)
        try:
            return type(network).from_pretrained(folder, quantization_config=config, torch_dtype=dtype, use_safetensors=True,
                                                 local_files_only=True)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"teacher.quantize: {' '.join(str(error).split())[:300]}") from error


def held(parameter: Tensor) -> tuple[int, int]:
    """(numbers, bytes) of a parameter: what it stands for, and what it holds with the scales that unpack it."""
    if is_traceable_wrapper_subclass(parameter):                         # torchao: a tensor made of tensors
        return parameter.numel(), sum(held(getattr(parameter, name))[1] for name in parameter.__tensor_flatten__()[0])
    if (state := getattr(parameter, "quant_state", None)) is not None:   # bitsandbytes: two numbers in a byte
        scales = (state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ()))
        return state.shape.numel(), parameter.nbytes + sum(part.nbytes for part in scales)
    return parameter.numel(), parameter.nbytes
