"""Pipelines of four families, large enough that weights and activations both weigh something: a few million numbers each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from zoo.base import quiet, shaken
from zoo.basics import clip_text, clip_tokenizer, vae
from zoo.images import BETAS, FLOW, WIDTH, clip_pooled, t5_text, t5_tokenizer

from stepdistill import recipe as recipes
from stepdistill.models.networks import NetworkSpec, of_folder
from stepdistill.recipe import Recipe

UNET = {"sample_size": 16, "block_out_channels": (32, 96), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}


@dataclass(frozen=True)
class Sized:
    """A pipeline, the keywords of its call, and what its folder cannot say of the lengths in it."""

    build: Callable[[], DiffusionPipeline]
    call: Mapping[str, int]
    sizes: Mapping[str, int]
    guidance: float = field(default=3.0)

    def save(self, folder: Path) -> NetworkSpec:
        """Write teacher and prompts; the network that the folder describes."""
        self.build().save_pretrained(folder / "teacher")
        (folder / "prompts.txt").write_text("a red apple\na cat on the mat\nsnow\ntwo blue houses\n")
        spec = of_folder(folder / "teacher")
        return replace(spec, sizes={**spec.sizes, **self.sizes})

    def recipe(self, folder: Path, **changes: Any) -> Recipe:
        """Data-free DMD2 of it, four samples at a time."""
        return recipes.parse({
            "teacher": {"path": str(folder / "teacher"), "call": dict(self.call)}, "data": {"prompts": str(folder / "prompts.txt")},
            "method": {"name": "dmd2", "fake_updates": 2, "gan_weight": 0}, "optim": {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}},
            "guidance": self.guidance, "batch_size": 4, "precision": "fp32", "ema_decay": 0.9, "trackers": [], **changes})


def sd15() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(**UNET, cross_attention_dim=32, attention_head_dim=4)
    return quiet(StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(tokenizer), tokenizer=tokenizer, unet=shaken(network), safety_checker=None,
        feature_extractor=None, scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1), requires_safety_checker=False))


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(**UNET, cross_attention_dim=64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
                                   use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                                   projection_class_embeddings_input_dim=6 * 8 + 32)
    return quiet(StableDiffusionXLPipeline(
        vae(), clip_text(tokenizer), clip_pooled(tokenizer), tokenizer, clip_tokenizer(), shaken(network),
        EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"), add_watermarker=False))


def sd3() -> StableDiffusion3Pipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    network = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_layers=3, **HEADS, joint_attention_dim=WIDTH,
                                    caption_projection_dim=128, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=24,
                                    dual_attention_layers=(0,), qk_norm="rms_norm")
    return quiet(StableDiffusion3Pipeline(
        shaken(network), FLOW(shift=3.0), vae(shift_factor=0.06), clip_pooled(clip, 16), clip, clip_pooled(clip, 16), clip,
        t5_text(t5), t5))


def flux() -> FluxPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    network = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=3, **HEADS, joint_attention_dim=WIDTH,
                                     pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
    return quiet(FluxPipeline(FLOW(shift=3.0), vae(shift_factor=0.1), clip_text(clip), clip, t5_text(t5), t5, shaken(network)))


PICTURE = {"height": 32, "width": 32}
SIZED = {
    "sd15": Sized(sd15, PICTURE, {"cell": 2, "tokens": 24}),
    "sdxl": Sized(sdxl, PICTURE, {"cell": 2, "tokens": 24, "pooled": 32}),
    "sd35-medium": Sized(sd3, {**PICTURE, "max_sequence_length": 24}, {"cell": 2, "tokens": 48}),
    "flux-dev": Sized(flux, {"height": 64, "width": 64, "max_sequence_length": 24}, {"cell": 4, "tokens": 24}),
}
