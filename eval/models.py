"""Opening what a user wants scored or sampled: an exported student, a shipped world's teacher, or any teacher in a diffusers folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stepdistill import worlds
from stepdistill.diffusion.sampler import SamplerSpec, Solver
from stepdistill.diffusion.times import trailing
from stepdistill.eval import weights
from stepdistill.export import digest, load_student
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.load import NOTES, Teacher, is_prompted, load_teacher, read_json
from stepdistill.models.prompted import PromptTeacher
from stepdistill.training.loop import RECIPE

IN_MEMORY = 256                                         # prompts whose conditions are held; of more, each is encoded when it is asked for


@dataclass(frozen=True)
class Opened:
    """A model and how it is sampled. `name` is what the user called it, `trained` the number of steps of its own sampler."""

    name: str
    teacher: Teacher
    spec: SamplerSpec
    is_teacher: bool
    trained: int

    @property
    def most_at_once(self) -> int:
        """How many pictures may share a batch."""
        return most_at_once(self.teacher)

    @property
    def guides(self) -> bool:
        """Whether it is told its guidance, or knows what no class or prompt is."""
        if "w" in self.spec.inputs:
            return True
        if isinstance(self.teacher, PromptTeacher):
            return self.teacher.condition(torch.tensor([0])).nulls is not None
        return self.teacher.null_class is not None

    def class_number(self, label: str) -> int:
        """A class by name or number; ValueError naming the classes."""
        names = self.teacher.labels
        lowered = [n.lower() for n in names]
        if label.lower() in lowered:
            return lowered.index(label.lower())
        if label.isdigit() and int(label) < len(names):
            return int(label)
        raise ValueError(f"no class {label!r}; there are {', '.join(names)} (or 0..{len(names) - 1})")


    def describe(self) -> dict[str, Any]:
        """The result file's model block: name, digest of the weights, and of a student its recipe's method, step, average and digest."""
        known = self.teacher.notes
        sha256 = known.get("unet_sha256") or known.get("weights_sha256")
        if sha256 is None:
            inner = self.teacher.folder / self.teacher.component
            sha256 = digest(inner if inner.is_dir() else self.teacher.folder)
        return {"name": self.name, "is_teacher": self.is_teacher, "sha256": sha256,
                **{key: known[key] for key in ("method", "step", "ema") if key in known},
                **({"recipe_sha256": weights.digest(recipe)} if (recipe := self.teacher.folder / RECIPE).is_file() else {})}


def most_at_once(teacher: Teacher) -> int:
    """How many pictures may share a batch: prompts that are padded together would change with their neighbours."""
    return 1 if isinstance(teacher, PromptTeacher) and teacher.bank is None else sys.maxsize


def open_model(name: str, steps: int | None = None, guidance: float | None = None, *, solver: str | None = None,
               renoise: float | None = None, shift: float | None = None, device: torch.device | str = "cpu",
               autocast: torch.dtype | None = None, prompts: Sequence[str] = (), call: Mapping[str, Any] | None = None) -> Opened:
    """`name` is an exported folder, "teacher:WORLD", or a diffusers folder that holds a teacher.

    Steps and guidance override the model's own sampler; so do solver, renoise and the shift of the times for a teacher, whose own sampler
    is the one its model card calls its best setting. Other steps than its own are equal ones unless `shift` says otherwise. A teacher that
    says nothing of a sampler is run as it is told, by DDIM unless a solver is named. `prompts` are for pipelines with prompts, and for no
    other model; `call` are keywords of such a teacher's pipeline (height, width).
    """
    shipped = worlds.teacher_folder(name)
    folder = shipped or Path(name).expanduser()
    prompted = is_prompted(folder)
    if prompted and not prompts:
        raise ValueError(f"{name} makes pictures of prompts: give --prompt or --prompts")
    if prompts and not prompted:
        raise ValueError(f"{name} is class-conditional and takes no prompts: leave them out (sample takes a class with --label)")
    first = _telling(prompts)
    if name.startswith("teacher:") or shipped or is_teacher(folder):
        teacher = load_teacher(name if shipped or name.startswith("teacher:") else folder, device=device, autocast=autocast, prompts=first,
                               call={**worlds.call_of(name), **(call or {})})
        notes = teacher.notes.get("sampler")
        if notes is None and (steps is None or guidance is None):
            raise ValueError(f"{name} says nothing of how it is sampled: give --steps and --guidance (1 is none)")
        own = SamplerSpec.from_dict(dict(notes)) if notes else SamplerSpec(trailing(steps or 1), renoise=0.0)
        if solver is not None:
            own = replace(own, solver=cast(Solver, solver), renoise=renoise or 0.0)
        elif renoise is not None:
            own = replace(own, renoise=renoise)
        if steps is not None or shift is not None:
            own = replace(own, times=trailing(steps or len(own.times), 1.0 if shift is None else shift))
        opened = Opened(name, teacher, own, True, len(own.times))
    else:
        if call:
            raise ValueError("keywords of a pipeline's call are for teachers; a student is called as it was trained")
        student, own = load_student(folder, prompts=first, device=device, autocast=autocast)
        if (renoise, shift) != (None, None) or (solver is not None and not own.free):
            raise ValueError("--solver, --renoise and --shift are for teachers; a student is sampled as it was trained")
        own = replace(own, solver=cast(Solver, solver)) if solver else own
        opened = Opened(name, student, own.at(steps) if steps else own, False, len(own.times))
    if guidance is not None:
        opened = replace(opened, spec=opened.spec.guided(guidance))
    if opened.spec.guidance != 1 and not opened.guides:
        raise ValueError(f"{name} has no null class, so it cannot be guided: leave --guidance at 1")
    return replace(opened, teacher=_asked(opened.teacher, prompts)) if len(first) < len(prompts) else opened


def is_teacher(folder: Path) -> bool:
    """Whether a folder holds a model that is no export of ours: a shipped teacher, a pipeline, or a network beside its scheduler."""
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    exported = (folder / RECIPE).is_file() or "method" in notes
    return not exported and any((folder / name).is_file() for name in ("model_index.json", "scheduler_config.json"))


def is_model(name: str) -> bool:
    """Whether this is to be opened as a model: it is no folder, or one that is not of pictures alone."""
    folder = worlds.teacher_folder(name) or Path(name).expanduser()
    return name.startswith("teacher:") or not folder.is_dir() or (folder / NOTES).is_file() or is_teacher(folder)


def _telling(prompts: Sequence[str]) -> Sequence[str]:
    """All prompts, or of many the shortest and the longest, which tell whether their conditions can share a batch."""
    return prompts if len(prompts) <= IN_MEMORY else (min(prompts, key=len), max(prompts, key=len))


def _asked(teacher: Teacher, prompts: Sequence[str]) -> Teacher:
    """The teacher of the few prompts it was opened with, for all of them."""
    assert isinstance(teacher, PromptTeacher)
    bank = teacher.bank and Encoded(teacher, tuple(prompts))
    return replace(teacher, prompts=tuple(prompts), classes=len(prompts), bank=bank)


@dataclass(frozen=True)
class Encoded:
    """Conditions of many prompts, each encoded alone when it is asked for: tens of thousands would fill the memory."""

    teacher: PromptTeacher
    prompts: tuple[str, ...]

    def slice(self, rows: Tensor) -> Conditioning:
        """Of these numbers of prompts (B,). ValueError where the conditions cannot share a batch after all."""
        teacher = self.teacher
        parts = [teacher.recording.encode(teacher.inputs([self.prompts[i]]), 1, teacher.denoiser.guidance) for i in rows.tolist()]
        if not all(parts[0].joins(part) for part in parts):
            raise ValueError(f"the conditions of prompts of {teacher.folder} differ in shape and cannot share a batch: use --batch-size 1")
        return Conditioning.stack(parts)
