"""The emoji world in the folders in which it ships, at its smallest: tiny random networks, a tiny BERT in MiniLM's place, six pictures."""

from __future__ import annotations

import functools
import io
import shutil
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizerFast
from zoo.base import shaken
from zoo.basics import SD_TABLE, vae

from stepdistill import worlds
from stepdistill.data.pictures import Picture
from stepdistill.images import to_image
from stepdistill.worlds.emoji import text

CAPTIONS = ("red apple", "flag: japan", "snowman", "cat face", "thumbs up, dark skin tone", "a")
WIDTH = 32
SHIPPED = worlds.FOLDER


def minilm(folder: Path) -> Path:
    """A random BERT that reads single letters, saved as transformers does."""
    letters = string.ascii_lowercase + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    shaken(BertModel(BertConfig(vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
                                max_position_embeddings=32)), 1).save_pretrained(folder)
    return folder


def unet() -> UNet2DConditionModel:
    return shaken(UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")))


def transformer() -> AuraFlowTransformer2DModel:
    return shaken(AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pos_embed_max_size=64))


def build(root: Path) -> Path:
    """root/emoji with what ships as it is and what is trained made small, in half precision."""
    emoji = root / "emoji"
    for kind in ("sd", "dit"):
        (emoji / kind).mkdir(parents=True)
        for name in ("model_index.json", "stepdistill.json"):
            shutil.copy(SHIPPED / "emoji" / kind / name, emoji / kind)
    unet().half().save_pretrained(emoji / "sd" / "unet")
    DDIMScheduler(**SD_TABLE, set_alpha_to_one=False, steps_offset=1).save_pretrained(emoji / "sd" / "scheduler")
    transformer().half().save_pretrained(emoji / "dit" / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(emoji / "dit" / "scheduler")
    levels = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae(**levels, sample_size=64, mid_block_add_attention=False, scaling_factor=0.6).half().save_pretrained(emoji / "vae")
    minilm(root / "minilm")
    return root


def pictures() -> tuple[Picture, ...]:
    """Six of 64x64 pixels, under CAPTIONS."""
    return tuple(Picture(f"emoji {i}", caption, functools.partial(_png, i)) for i, caption in enumerate(CAPTIONS))


def _png(seed: int) -> bytes:
    pixels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    to_image(pixels).save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


@contextmanager
def lived_in(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """The package with this world in the place of the one that ships."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "FOLDER", root)
        patch.setenv(text.ENVIRONMENT, str(root / "minilm"))
        small = replace(worlds.WORLDS["emoji"], captioned=pictures, drawn_from=lambda: root / "minilm")
        patch.setitem(worlds.WORLDS, "emoji", small)
        yield patch
