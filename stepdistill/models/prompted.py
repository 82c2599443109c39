"""A whole diffusers pipeline as a teacher: recorded, its prompts in the place of classes, its own decoder for pictures."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.models.conditioning import Conditioning
from stepdistill.models.drive import GUIDER
from stepdistill.models.latents import LatentLaw, learn_latents
from stepdistill.models.load import Teacher, load_pipeline, without_dropout
from stepdistill.models.recording import Inputs, Recording, record, usual_inputs


@dataclass(frozen=True)
class PipelineCodec:
    """Pictures as the pipeline's own tail makes them of a state; of a video its frames, side by side."""

    recording: Recording
    inputs: Inputs

    @functools.cached_property
    def law(self) -> LatentLaw:
        """Learnt at first use: data-free methods never ask."""
        return learn_latents(self.recording, self.inputs([""]))

    def encode(self, images: Tensor) -> Tensor:
        """States of pictures; those of a pipeline without a VAE are the pictures."""
        if getattr(self.recording.driven.pipeline, "vae", None) is None:
            return images
        return self.law.encode(images, self.recording.shape)

    def decode(self, x0: Tensor) -> Tensor:
        pictures = self.recording.decode(x0, self.inputs([""] * len(x0)))                       # (B, H, W, C) or (B, F, H, W, C) in [0, 1]
        if pictures.ndim == 5:
            pictures = pictures.permute(0, 2, 1, 3, 4).flatten(2, 3)
        return pictures.movedim(-1, 1) * 2 - 1

    def to_dict(self) -> dict[str, Any]:
        return {"pipeline": type(self.recording.driven.pipeline).__name__}


@dataclass(frozen=True)
class PromptTeacher(Teacher):
    """A recorded pipeline. Sample rows are numbers of prompts; `bank` holds every prompt's condition where they can be joined."""

    recording: Recording = field(kw_only=True)
    inputs: Inputs = field(kw_only=True)
    prompts: tuple[str, ...] = field(kw_only=True)
    bank: Conditioning | None = field(kw_only=True)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.prompts

    @property
    def call(self) -> dict[str, Any]:
        """Guidance off, in the pipeline's own number; or on as the student was told, where the network embeds it."""
        recording = self.recording
        if recording.keyword is None or recording.keyword == GUIDER:
            return {}
        return {recording.keyword: self.denoiser.guidance if recording.offset is None else 1.0 - recording.offset}

    def condition(self, labels: Tensor) -> Conditioning:
        """Numbers of prompts (B,) int64 to a condition. Prompts of unequal length that the pipeline pads together are encoded together."""
        if self.bank is not None:
            return self.bank.slice(labels.cpu()).to(self.device)
        chosen = [self.prompts[i] for i in labels.tolist()]
        return self.recording.encode(self.inputs(chosen), len(chosen), self.denoiser.guidance).to(self.device)


def load_prompted(folder: Path, prompts: Sequence[str], call: Mapping[str, Any], *, device: torch.device | str,
                  autocast: torch.dtype | None, dtype: torch.dtype, guidance: float, taps: tuple[str, ...], notes: Mapping[str, Any],
                  trust_remote_code: bool = False) -> PromptTeacher:
    """Record the pipeline in a folder and encode the prompts. `call` are keywords of the pipeline: height, width, negative_prompt.

    Raises ValueError where there are no prompts, or guidance was asked for and the pipeline has none.
    """
    if not prompts:
        raise ValueError(f"{folder} is a pipeline that takes prompts: name a file of them, one per line, with data.prompts")
    pipeline = load_pipeline(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            without_dropout(component).eval().requires_grad_(False)
    inputs = usual_inputs(pipeline, **call)
    recording = record(pipeline, inputs)
    denoiser = recording.denoiser
    denoiser.guidance, denoiser.autocast, denoiser.taps = guidance, autocast, taps or denoiser.taps
    single = [recording.encode(inputs([prompt]), 1, guidance)
              for prompt in tqdm(prompts, desc="encode prompts", unit="prompt", disable=len(prompts) < 20, file=sys.stderr)]
    if guidance != 1 and single[0].nulls is None and not recording.wiring.embeds:
        raise ValueError(f"guidance {guidance} was asked for, and {type(pipeline).__name__} does not guide: set guidance to 1")
    bank = Conditioning.stack([cond.to("cpu") for cond in single]) if all(single[0].joins(cond) for cond in single) else None
    scheduler = {"_class_name": type(recording.driven.scheduler).__name__, **recording.driven.scheduler.config}
    return PromptTeacher(denoiser, recording.shape, len(prompts), None, PipelineCodec(recording, inputs), folder, scheduler, notes,
                         recording=recording, inputs=inputs, prompts=tuple(prompts), bank=bank)
