"""What the pipelines of both emoji teachers share, and the folder of neither holds.

    sd/   model_index.json  stepdistill.json  unet/         scheduler/     a StableDiffusionPipeline, eps on a DDPM table
    dit/  model_index.json  stepdistill.json  transformer/  scheduler/     an AuraFlowPipeline, flow matching
    vae/                                                                   the autoencoder of both
    all-MiniLM-L6-v2                                                       their text encoder, from its own package

`load_pipeline` hands these components over, so nothing is shipped twice; an export is a whole folder, with all of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from stepdistill import worlds
from stepdistill.models.load import read_weights
from stepdistill.worlds import Shared
from stepdistill.worlds.emoji import text


def vae_folder() -> Path:
    """Where the autoencoder lies; FileNotFoundError where this installation has none."""
    found = worlds.FOLDER / "emoji" / "vae"
    if not (found / "config.json").is_file():
        raise FileNotFoundError("this installation has no autoencoder of the emoji world: train one with `python scripts/emoji_vae.py "
                                f"--out runs/emoji_vae`, and copy its vae/ to {found}")
    return found


def vae(dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder: 64x64 pictures in [-1, 1] to 16x16x4 latents."""
    return read_weights(AutoencoderKL, vae_folder()).to(dtype)


SHARED = {
    "vae": Shared(vae_folder, vae),
    "text_encoder": Shared(text.folder, text.encoder),
    "tokenizer": Shared(text.folder, lambda dtype: text.tokenizer()),
}
