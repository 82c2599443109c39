"""The families whose networks distil without a text encoder, and Stable Diffusion with a random one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from zoo.base import Exhibit, quiet, shaken

SD_TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that knows single letters: every prompt can be written in it."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=24)


def clip_text(tokenizer: CLIPTokenizer, width: int = 32, **options: Any) -> CLIPTextModel:
    """A random CLIP text encoder."""
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=24, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
                            pad_token_id=len(tokenizer) - 1, **options)
    return shaken(CLIPTextModel(config), 1)


def vae(channels: int = 4, seed: int = 2, **options: Any) -> AutoencoderKL:
    """A random VAE that halves each side once."""
    return shaken(AutoencoderKL(**{
        "block_out_channels": (16, 16), "latent_channels": channels, "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 16, **options}), seed)


def ddpm() -> DDPMPipeline:
    network = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                          down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return quiet(DDPMPipeline(shaken(network), DDPMScheduler()))


def ddim() -> DDIMPipeline:
    return quiet(DDIMPipeline(ddpm().unet, DDIMScheduler()))


def dit() -> DiTPipeline:
    network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
                                    patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_num_groups=4)
    return quiet(DiTPipeline(shaken(network), vae(), DDIMScheduler()))


def stable_diffusion(prediction_type: str = "epsilon", **table: Any) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
                                   attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                   up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    table.pop("clip_sample", None)
    scheduler = PNDMScheduler(**{k: v for k, v in SD_TABLE.items() if k != "clip_sample"}, prediction_type=prediction_type,
                              skip_prk_steps=True, steps_offset=1, **table)
    return quiet(StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(tokenizer), tokenizer=tokenizer, unet=shaken(network), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False))


def _prompts(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts), "height": 16, "width": 16}


EXHIBITS = {
    "ddpm": Exhibit(ddpm, lambda prompts: {"batch_size": len(prompts)}),
    "ddim": Exhibit(ddim, lambda prompts: {"batch_size": len(prompts)}),
    "dit": Exhibit(dit, lambda prompts: {"class_labels": [len(prompt) % 10 for prompt in prompts]}),
    "sd15": Exhibit(stable_diffusion, _prompts, {"width": 24}),
    "sd21-v": Exhibit(lambda: stable_diffusion("v_prediction"), _prompts, {"width": 24}),
}
