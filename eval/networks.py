"""The public networks that judge pictures: how their files are read, what their tensors are called here, and how they are built again.

    layout       public file                                          network
    inception    torch-fidelity's state dict                          torch-fidelity's Inception
    dinov2       the authors' state dict                              transformers' Dinov2Model
    openai       the authors' TorchScript archive, half precision     transformers' CLIPModel
    open_clip    open_clip's state dict                               transformers' CLIPModel
    alexnet      torchvision's state dict                             the convolutions of torchvision's AlexNet

Names are those of transformers' published checkpoints, which every version of transformers reads.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"

Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One kind of public file: `read` it (trusted by now), `translate` to our names with the config they need, `build` from a folder.

    What does not fit raises whatever it meets; `stepdistill.eval.weights` says what to do about it.
    """

    read: Callable[[Path], Tensors]
    translate: Callable[[Tensors], tuple[Tensors, Config | None]]
    build: Callable[[Path], Any]
    files: tuple[str, ...] = (WEIGHTS, CONFIG)
    reads_prompts: bool = False


def _state_dict(file: Path) -> Tensors:
    """By the unpickler that runs no code."""
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _archive(file: Path) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)                      # of TorchScript, in which these files were published
        return dict(torch.jit.load(file, map_location="cpu").state_dict())


def _as_is(state: Tensors) -> tuple[Tensors, None]:
    return state, None


def _renamed(state: Tensors, rules: Sequence[tuple[str, str]], joint: str, parts: Sequence[str]) -> Tensors:
    """Tensors under new names, by rules applied one after another; those with `joint` in their name are cut into query, key and value."""
    out: Tensors = {}
    for name, tensor in state.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        pieces = tensor.chunk(3) if joint in name else (tensor,)
        out |= {name.replace(joint, part): piece for part, piece in zip(parts if joint in name else (joint,), pieces, strict=True)}
    return out


def _depth(tensors: Mapping[str, Tensor], tower: str) -> int:
    return sum(name.startswith(tower) and name.endswith(".mlp.fc1.weight") for name in tensors)


DINOV2 = (
    (r"^cls_token$", "embeddings.cls_token"), (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"), (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm."),
)


def _dinov2(state: Tensors) -> tuple[Tensors, Config]:
    """Heads have 64 channels in every published size."""
    tensors = _renamed(state, DINOV2, ".qkv.", (".query.", ".key.", ".value."))
    patch, positions = tensors["embeddings.patch_embeddings.projection.weight"], tensors["embeddings.position_embeddings"]
    width, side = patch.shape[0], patch.shape[-1]
    return tensors, {
        "model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": width, "num_hidden_layers": _depth(tensors, "encoder."),
        "num_attention_heads": width // 64, "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "patch_size": side, "image_size": side * math.isqrt(positions.shape[1] - 1), "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    }


CLIP = (
    (r"^text_projection$", "text_projection.weight"), (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),                        # as it is spelt there
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."), (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."), (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."), (r"\.ln_([12])\.", r".layer_norm\1."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
)
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")                # numbers that OpenAI's archives keep among the tensors


def _clip(state: Tensors, head: int, activation: str) -> tuple[Tensors, Config]:
    """`head` is the channels of a head of the vision tower; the text tower's have 64 in every published size."""
    tensors = _renamed({name: tensor for name, tensor in state.items() if name not in NO_WEIGHTS}, CLIP,
                       ".in_proj_", (".q_proj.", ".k_proj.", ".v_proj."))
    for name in ("text_projection.weight", "visual_projection.weight"):          # theirs are multiplied from the right
        tensors[name] = tensors[name].T
    dim = tensors["text_projection.weight"].shape[0]

    def tower(name: str, width: int, channels: int) -> Config:
        return {"hidden_size": width, "num_hidden_layers": _depth(tensors, name), "num_attention_heads": width // channels,
                "intermediate_size": tensors[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape[0], "hidden_act": activation,
                "projection_dim": dim, "layer_norm_eps": 1e-5}

    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    grid = math.isqrt(tensors["vision_model.embeddings.position_embedding.weight"].shape[0] - 1)
    vision = tower("vision_model", patch.shape[0], head) | {"patch_size": patch.shape[-1], "image_size": patch.shape[-1] * grid}
    words, width = tensors["text_model.embeddings.token_embedding.weight"].shape                # the last two words begin and end a text
    text = tower("text_model", width, 64) | {
        "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1,
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0]}
    return tensors, {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": dim, "vision_config": vision,
                     "text_config": text}


def _inception(folder: Path) -> Any:
    """Their network takes weights from a file that it opens itself, and in no other way: it is handed ours in memory."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    memory = io.BytesIO()
    torch.save(load_file(folder / WEIGHTS), memory)
    memory.seek(0)
    with torch.random.fork_rng(devices=[]):                                      # its layers are drawn before they are filled
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=memory)


def _convolutions(state: Tensors) -> tuple[Tensors, None]:
    return {name.removeprefix("features."): tensor for name, tensor in state.items() if name.startswith("features.")}, None


def _alexnet(folder: Path) -> Any:
    from torchvision.models import alexnet

    with torch.device("meta"):                                                   # most of it is not wanted
        layers = alexnet(weights=None).features
    layers.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    return layers


def _transformer(folder: Path, kind: str) -> Any:
    import transformers

    net, report = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                                                              output_loading_info=True)
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"its tensors do not fit its config: {str(wrong)[:200]}")
    return net


_clip_model = partial(_transformer, kind="CLIPModel")
LAYOUTS = {
    "inception": Layout(_state_dict, _as_is, _inception, (WEIGHTS,)),
    "dinov2": Layout(_state_dict, _dinov2, partial(_transformer, kind="Dinov2Model")),
    "openai": Layout(_archive, partial(_clip, head=64, activation="quick_gelu"), _clip_model, reads_prompts=True),
    "open_clip": Layout(_state_dict, partial(_clip, head=88, activation="gelu"), _clip_model, reads_prompts=True),
    "alexnet": Layout(_state_dict, _convolutions, _alexnet, (WEIGHTS,)),
}
