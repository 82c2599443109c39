"""A student as a LoRA: the adapter it was trained as, or the difference of a fully trained one factored by SVD; in two dialects.

    lora/pytorch_lora_weights.safetensors     diffusers' names; the metadata holds rank and alpha
    lora_kohya/NAME.safetensors               kohya's names, for the UNets of Stable Diffusion and SDXL and for the blocks of FLUX, with a
                                              tensor alpha for each layer; the networks are named there as their authors' code names them

Either way W_student = W_teacher + up·down: the scale alpha / rank is multiplied into `up`, so alpha equals the rank, and a reader that
ignores it is right all the same. SD3 and the other transformers leave in diffusers' names only: diffusers reads no other names for SD3
(`SD3LoraLoaderMixin.lora_state_dict`), so kohya's could be checked against no loader.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill.models.adapters import LoraRecipe, layers_of

Factors = Mapping[str, tuple[Tensor, Tensor]]                            # a layer's name to (down (r, in, ...), up (out, r, ...)), float32
EXACT = 1024                                                             # a matrix this narrow is factored by a full SVD
SDXL_NAMES = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
FLUX_NAMES: Mapping[str, tuple[str, Mapping[tuple[str, ...], str]]] = {  # kind of block: (theirs, {layers that are one there: its name})
    "transformer_blocks": ("double_blocks", {
        ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn_qkv", ("attn.to_out.0",): "img_attn_proj", ("norm1.linear",): "img_mod_lin",
        ("ff.net.0.proj",): "img_mlp_0", ("ff.net.2",): "img_mlp_2",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn_qkv", ("attn.to_add_out",): "txt_attn_proj",
        ("norm1_context.linear",): "txt_mod_lin", ("ff_context.net.0.proj",): "txt_mlp_0", ("ff_context.net.2",): "txt_mlp_2"}),
    "single_transformer_blocks": ("single_blocks", {
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1", ("proj_out",): "linear2", ("norm.linear",): "modulation_lin"}),
}


@dataclass(frozen=True)
class Fit:
    """How well an adapter of this rank holds what training changed.

    `error` is |difference - up·down| / |difference| in the Frobenius norm, over all layers that were factored; `worst` names the layer
    where it is largest, `worst_error`. `beyond` is the share of the squared change in what no adapter holds: biases, norms, embeddings.
    """

    rank: int
    layers: int
    error: float
    worst: str
    worst_error: float
    beyond: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def of_adapter(weights: Mapping[str, Tensor], recipe: LoraRecipe) -> Factors:
    """The factors in an adapter's saved weights."""
    part = lambda name, which: weights[f"{name.replace('.', '/')}/{which}"].float()                              # noqa: E731
    return {name: (part(name, "lora_A"), part(name, "lora_B") * (recipe.scale / recipe.rank)) for name in sorted(layers_of(weights))}


@torch.no_grad()
def of_difference(network: nn.Module, student: Mapping[str, Tensor], rank: int) -> tuple[Factors, Fit]:
    """Factor student - teacher; `network` holds the teacher's weights. Every layer gets this rank, zeros beyond its own.

    Truncated SVD is the best approximation of its rank (Eckart & Young 1936). Matrices wider than EXACT both ways are factored by the
    randomised SVD of Halko et al. (2011, algorithm 5.1) with a fixed seed; `Fit` measures what came out in any case. ValueError where
    rank < 1 or nothing that an adapter holds has changed.
    """
    if rank < 1:
        raise ValueError(f"an adapter needs a rank of at least 1, got {rank}")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    squares: dict[str, tuple[float, float]] = {}                         # (of what is left, of the difference)
    total = 0.0
    held_by = {f"{name}.weight": name for name, layer in network.named_modules()
               if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)}
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        difference = student[key].float() - value.float()
        size = _square(difference)
        total += size
        if size > 0 and key in held_by:
            down, up = _svd(difference.flatten(1), rank)
            squares[held_by[key]] = _square(difference.flatten(1) - up @ down), size
            tail = (1,) * (difference.ndim - 2)
            factors[held_by[key]] = down.reshape(rank, *difference.shape[1:]), up.reshape(len(up), rank, *tail)
    if not factors:
        raise ValueError("no linear or convolution layer of the student differs from its teacher: there is nothing to factor")
    held = sum(size for _, size in squares.values())
    worst = max(squares, key=lambda name: squares[name][0] / squares[name][1])
    return factors, Fit(rank, len(factors), (sum(left for left, _ in squares.values()) / held) ** 0.5, worst,
                        (squares[worst][0] / squares[worst][1]) ** 0.5, 1 - held / total)


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down (rank, in), up (out, rank)): the singular values are shared by their roots."""
    kept = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(*matrix.shape, rank + 16), niter=4)
            vh = v.T
    root = s[:kept].sqrt()
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(len(matrix), rank)
    down[:kept], up[:, :kept] = root[:, None] * vh[:kept], u[:, :kept] * root
    return down, up


def saves(pipeline: Any, component: str) -> bool:
    """Whether this pipeline's class loads and saves adapters of this component."""
    save = getattr(pipeline, "save_lora_weights", None)
    return save is not None and f"{component}_lora_layers" in inspect.signature(save).parameters


def save(pipeline: Any, component: str, factors: Factors, folder: Path, name: str) -> tuple[str, ...]:
    """Write the adapter below `folder` in each dialect that this pipeline has, for scale 1; the files' relative names."""
    rank = len(next(iter(factors.values()))[0])
    tensors = {f"{layer}.{part}.weight": value.contiguous() for layer, pair in factors.items()
               for part, value in zip(("lora_A", "lora_B"), pair, strict=True)}
    metadata = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(factors)).to_dict()
    pipeline.save_lora_weights(folder / "lora", safe_serialization=True,
                               **{f"{component}_lora_layers": tensors, f"{component}_lora_adapter_metadata": metadata})
    written = ["lora/pytorch_lora_weights.safetensors"]
    network, kohya = getattr(pipeline, component), None
    if isinstance(network, UNet2DConditionModel) and component == "unet":
        kohya = kohya_unet(tensors)
    elif isinstance(network, FluxTransformer2DModel):
        kohya = kohya_flux(factors)
    if kohya is not None:
        written.append(f"lora_kohya/{name}.safetensors")
        (folder / "lora_kohya").mkdir()
        save_file(kohya, folder / written[-1])
    return tuple(written)


def kohya_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of a UNet, its tensors named as peft names them, under kohya's names."""
    renamed = {}
    for key, value in convert_state_dict_to_kohya({f"unet.{k}": v for k, v in tensors.items()}).items():
        for ours, theirs in SDXL_NAMES.items():
            key = key.replace(f"lora_unet_{ours}.", f"lora_unet_{theirs}.")
        renamed[key] = value.float()
    return renamed


def kohya_flux(factors: Factors) -> dict[str, Tensor] | None:
    """An adapter of FLUX under kohya's names. Layers that are one there share it: `down` one below the other, `up` on the diagonal.

    None where a layer has no name there, or only some of those that share one have an adapter: a part of a student is none.
    """
    left = dict(factors)
    made: dict[str, Tensor] = {}
    for kind, number in sorted({tuple(name.split(".")[:2]) for name in factors if name.split(".")[0] in FLUX_NAMES}):
        theirs, layers = FLUX_NAMES[kind]
        for members, name in layers.items():
            found = [left.pop(key) for member in members if (key := f"{kind}.{number}.{member}") in left]
            if len(found) not in (0, len(members)):
                return None
            if found:
                down, up = torch.cat([pair[0] for pair in found]), torch.block_diag(*(pair[1] for pair in found))
                made |= {f"lora_unet_{theirs}_{number}_{name}.{part}": value for part, value in
                         (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(float(len(down)))))}
    return None if left else made
