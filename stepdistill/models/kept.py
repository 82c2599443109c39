"""What a recording learnt, as plain values and tensors: a pipeline is then trained without running it, and without its encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from stepdistill.diffusion.process import Flow
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.drive import Driven
from stepdistill.models.experts import boundaries_of
from stepdistill.models.latents import LatentLaw
from stepdistill.models.recorded import Branch, Recording, network_of
from stepdistill.models.wiring import FromClock, FromCondition, FromSample, FromScale, Layout, Static, Unrecordable, Wiring

CLASSES = {cls.__name__: cls for cls in (Wiring, Layout, Static, FromCondition, FromSample, FromClock, FromScale, Branch)}


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values for a nesting of plain values, tensors and CLASSES; its tensors go into `tensors` under names that begin with `name`.

    Raises Unrecordable for anything else.
    """
    within = lambda key, inner: pack(inner, f"{name}.{key}", tensors)                                             # noqa: E731
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [within(i, inner) for i, inner in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: within(key, inner) for key, inner in value.items()}}
    if type(value).__name__ in CLASSES:
        return {type(value).__name__: {f.name: within(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)}}
    raise Unrecordable(f"{name} is a {type(value).__name__}, which cannot be kept in a file")


def unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of `pack`; `tensor` finds one by its name."""
    if not isinstance(value, dict):
        return value
    (kind, inner), = value.items()
    if kind == "tensor":
        return tensor(inner)
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(unpack(v, tensor) for v in inner)
    fields = {key: unpack(v, tensor) for key, v in inner.items()}
    return fields if kind == "dict" else CLASSES[kind](**fields)


@dataclass(frozen=True)
class Learnt:
    """A recording and the law of its latents (None: states are pictures), without the modules of the pipeline."""

    plain: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, recording: Recording, law: LatentLaw | None) -> Learnt:
        """Raises Unrecordable where the network is called with something that no file can hold."""
        driven, denoiser = recording.driven, recording.denoiser
        tensors: dict[str, Tensor] = {}
        facts = {"components": recording.components, "boundaries": boundaries_of(denoiser.network),
                 "shape": recording.shape, "keyword": recording.keyword, "offset": recording.offset,
                 "notes": recording.notes, "branches": recording.branches, "row": recording.row, "asked": driven.keyword,
                 "shift": driven.process.shift if isinstance(driven.process, Flow) else None, "clock": driven.clock,
                 "frame": driven.frame, "frames": driven.frames, "kind": driven.kind,
                 "taps": denoiser.taps, "law": denoiser.law, "wiring": recording.wiring,
                 "latents": law and {"index": law.index, "scale": law.scale, "shift": law.shift, "row": law.row}}
        return cls(pack(facts, "learnt", tensors), tensors)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything by name."""
        found: dict[str, Any] = unpack(self.plain, self.tensors.__getitem__)
        return found

    def restored(self, pipeline: Any) -> Recording:
        """The recording over a pipeline whose encoders may be missing; its own `encode` and `decode` need them."""
        facts = self.facts
        driven = Driven(pipeline)
        driven.keyword, driven.clock = facts["asked"], facts["clock"]
        if facts["shift"] is not None:
            driven.process = Flow(facts["shift"])
        driven.frames = facts["frames"]
        if driven.door is not None:
            driven.enter(facts["frame"], facts["kind"])
        network = network_of(pipeline, facts["components"], facts["boundaries"])
        denoiser = Denoiser(network, driven.process, driven.kind, driven.clock, taps=facts["taps"],
                            wiring=facts["wiring"], law=facts["law"])
        component, *others = facts["components"]
        return Recording(driven, denoiser, component, facts["shape"], facts["keyword"], facts["offset"], facts["notes"],
                         facts["branches"], None, facts["row"], tuple(others))

    def law(self, pipeline: Any) -> LatentLaw | None:
        """The law of the latents over this pipeline's VAE."""
        latents = self.facts["latents"]
        return latents and LatentLaw(pipeline.vae, **latents)


class Bank(Protocol):
    """The conditions of all prompts, by their numbers."""

    def slice(self, rows: Tensor) -> Conditioning: ...


@dataclass(frozen=True)
class Kept:
    """What a cache holds of a pipeline. Without `learnt` it must be loaded whole and recorded, though its prompts are encoded."""

    bank: Bank
    learnt: Learnt | None
