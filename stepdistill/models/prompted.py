"""A whole diffusers pipeline as a teacher: recorded, its prompts in the place of classes, its own decoder for pictures."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import keep_ends_float32
from stepdistill.models.drive import GUIDER
from stepdistill.models.kept import Bank, Kept
from stepdistill.models.latents import LatentLaw, learn_latents
from stepdistill.models.load import Codec, Teacher, load_pipeline, without_dropout
from stepdistill.models.quantize import QuantizeRecipe
from stepdistill.models.recorded import Inputs, Recording
from stepdistill.models.recording import record, usual_inputs
from stepdistill.models.sizes import for_sizes
from stepdistill.models.wiring import Unrecordable

TAIL, HALF_TAIL = 1e-3, 5e-2                             # of pictures in [-1, 1], between the pipeline's tail and its VAE alone


@dataclass(frozen=True)
class PipelineCodec:
    """Pictures as the pipeline's own tail makes them of a state; of a video its frames, side by side."""

    recording: Recording
    inputs: Inputs

    @functools.cached_property
    def law(self) -> LatentLaw:
        """Learnt at first use: data-free methods never ask."""
        return learn_latents(self.recording, self.inputs([""]))

    @property
    def latent(self) -> bool:
        return getattr(self.recording.driven.pipeline, "vae", None) is not None

    def encode(self, images: Tensor) -> Tensor:
        """States of pictures; those of a pipeline without a VAE are the pictures."""
        if not self.latent:
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
class LawCodec:
    """The same by the law of the latents and the VAE alone, without the pipeline; `law` None: states are pictures."""

    law: LatentLaw | None
    shape: tuple[int, ...]                              # of one state
    pipeline: str

    @classmethod
    def of(cls, codec: PipelineCodec) -> LawCodec:
        """Raises Unrecordable where that does not make the pictures that the pipeline makes of a state."""
        recording = codec.recording
        pipeline = recording.driven.pipeline
        found = cls(codec.law if codec.latent else None, recording.shape, type(pipeline).__name__)
        x0 = torch.randn(1, *recording.shape, generator=torch.Generator().manual_seed(0))
        x0 = x0.to(next(recording.denoiser.network.parameters()).device)
        expected = codec.decode(x0)
        try:
            ours = found.decode(x0)
        except (TypeError, AttributeError) as error:
            raise Unrecordable(f"its VAE is not decoded from latents alone ({error})") from error
        bound = TAIL if recording.denoiser.dtype in (torch.float32, torch.float64) else HALF_TAIL
        if ours.shape != expected.shape or float((ours.cpu() - expected.cpu()).abs().max()) > bound:
            raise Unrecordable("a VAE alone does not make the pictures that the pipeline makes")
        return found

    @property
    def latent(self) -> bool:
        return self.law is not None

    def encode(self, images: Tensor) -> Tensor:
        return images if self.law is None else self.law.encode(images, self.shape)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        if self.law is None:
            return x0.clamp(-1, 1)
        law, rows = self.law, x0.float().flatten(1)
        z = rows[:, law.index.to(rows.device)] * law.scale.to(rows) + law.shift.to(rows)
        pictures = law.vae.decode(z.reshape(-1, *law.row).to(next(law.vae.parameters()).dtype)).sample.float().clamp(-1, 1)
        return pictures if pictures.ndim == 4 else pictures.permute(0, 1, 3, 2, 4).flatten(3)

    def to_dict(self) -> dict[str, Any]:
        return {"pipeline": self.pipeline}


@dataclass(frozen=True)
class PromptTeacher(Teacher):
    """A recorded pipeline. Sample rows are numbers of prompts; `bank` holds every prompt's condition where they can be joined."""

    recording: Recording = field(kw_only=True)
    inputs: Inputs = field(kw_only=True)
    prompts: tuple[str, ...] = field(kw_only=True)
    bank: Bank | None = field(kw_only=True)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.prompts

    @property
    def component(self) -> str:
        return self.recording.component

    @property
    def call(self) -> dict[str, Any]:
        """Guidance off, in the pipeline's own number; or on as the student was told, where the network embeds it."""
        recording = self.recording
        if recording.keyword is None or recording.keyword == GUIDER:
            return {}
        return {recording.keyword: self.denoiser.guidance if recording.offset is None else 1.0 - recording.offset}

    def check_room(self, count: int) -> None:
        check_room(self.recording.driven.pipeline, self.component, count)

    def latents(self, pictures: Tensor) -> Tensor | None:
        """As of any model; None where the pipeline's tail is no law of its latents, too."""
        try:
            return super().latents(pictures)
        except Unrecordable:
            return None

    def condition(self, labels: Tensor) -> Conditioning:
        """Numbers of prompts (B,) int64 to a condition. Prompts of unequal length that the pipeline pads together are encoded together."""
        if self.bank is not None:
            return self.bank.slice(labels.cpu()).to(self.device)
        chosen = [self.prompts[i] for i in labels.tolist()]
        return self.recording.encode(self.inputs(chosen), len(chosen), self.denoiser.guidance).to(self.device)

    def at(self, call: Mapping[str, Any], prompts: Sequence[str], kept: Kept | None = None) -> PromptTeacher:
        """The same pipeline under other keywords (another height and width), with prompts of its own; its modules are shared."""
        own = self.denoiser
        return _taught(self.recording.driven.pipeline, self.folder, prompts, call, kept, own.guidance, own.autocast, own.taps, self.notes)

    def of_sizes(self, others: Sequence[PromptTeacher]) -> PromptTeacher:
        """The same teacher, its denoiser for the states of the others, too. Raises ValueError as `for_sizes` does."""
        every = (self, *others)
        return replace(self, denoiser=for_sizes([t.denoiser for t in every], [t.shape for t in every]))


def check_room(pipeline: Any, component: str, count: int) -> None:
    """ValueError where a pipeline of this class has no place for so many networks of one kind: one, or two and the time between them."""
    two = {f"{component}_2", "boundary_ratio"} <= inspect.signature(type(pipeline).__init__).parameters.keys()
    if count > 1 + two:
        raise ValueError(f"a student of {count} networks cannot be exported as a {type(pipeline).__name__}: pipelines with a place for "
                         "several have two and a boundary_ratio (Wan). Train two phases of such a pipeline, or one student with "
                         "method.experts=false")


def open_pipeline(folder: Path, call: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype,
                  trust_remote_code: bool = False, loras: Mapping[str, float] | None = None,
                  quantize: QuantizeRecipe | None = None) -> tuple[Recording, Inputs]:
    """Load a whole pipeline and record it. `call` are keywords of the pipeline: height, width, negative_prompt."""
    pipeline = _still(load_pipeline(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, loras=loras,
                                    quantize=quantize))
    inputs = usual_inputs(pipeline, **call)
    return record(pipeline, inputs), inputs


def _still(pipeline: Any) -> Any:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            without_dropout(component).eval().requires_grad_(False)
    return pipeline


def load_prompted(folder: Path, prompts: Sequence[str], call: Mapping[str, Any], *, device: torch.device | str,
                  autocast: torch.dtype | None, dtype: torch.dtype, guidance: float, taps: tuple[str, ...], notes: Mapping[str, Any],
                  trust_remote_code: bool = False, kept: Kept | None = None,
                  loras: Mapping[str, float] | None = None, quantize: QuantizeRecipe | None = None) -> PromptTeacher:
    """Record the pipeline in a folder and encode the prompts, or take what a cache has kept of that and load no encoders.

    `call` are keywords of the pipeline: height, width, negative_prompt. Raises ValueError where there are no prompts, or guidance was
    asked for and the pipeline has none.
    """
    if not prompts:
        raise ValueError(f"{folder} is a pipeline that takes prompts: name a file of them, one per line, with data.prompts")
    only = (*kept.learnt.facts["components"], "scheduler", "vae") if kept and kept.learnt else None
    pipeline = _still(load_pipeline(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, only=only, loras=loras,
                                    quantize=quantize))
    return _taught(pipeline, folder, prompts, call, kept, guidance, autocast, taps, notes)


def _taught(pipeline: Any, folder: Path, prompts: Sequence[str], call: Mapping[str, Any], kept: Kept | None, guidance: float,
            autocast: torch.dtype | None, taps: tuple[str, ...], notes: Mapping[str, Any]) -> PromptTeacher:
    """A loaded pipeline as a teacher under these keywords."""
    inputs = usual_inputs(pipeline, **call)
    codec: Codec
    if kept is not None and kept.learnt is not None:
        recording = kept.learnt.restored(pipeline)
        codec = LawCodec(kept.learnt.law(pipeline), recording.shape, type(pipeline).__name__)
    else:
        recording = record(pipeline, inputs)
        codec = PipelineCodec(recording, inputs)
    denoiser = recording.denoiser
    keep_ends_float32(denoiser.network)
    denoiser.guidance, denoiser.autocast, denoiser.taps = guidance, autocast, taps or denoiser.taps
    bank: Bank | None
    if kept is not None:
        bank, first = kept.bank, kept.bank.slice(torch.tensor([0]))
    else:
        single = [recording.encode(inputs([prompt]), 1, guidance)
                  for prompt in tqdm(prompts, desc="encode prompts", unit="prompt", disable=len(prompts) < 20, file=sys.stderr)]
        first = single[0]
        bank = Conditioning.stack([cond.to("cpu") for cond in single]) if all(first.joins(cond) for cond in single) else None
    if guidance != 1 and first.nulls is None and not recording.wiring.embeds:
        name = type(recording.driven.pipeline).__name__
        raise ValueError(f"guidance {guidance} was asked for, and {name} does not guide: set guidance to 1")
    scheduler = {"_class_name": type(recording.driven.scheduler).__name__, **recording.driven.scheduler.config}
    return PromptTeacher(denoiser, recording.shape, len(prompts), None, codec, folder, scheduler, notes,
                         recording=recording, inputs=inputs, prompts=tuple(prompts), bank=bank)
