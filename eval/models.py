"""Opening what a user wants scored or sampled: an exported student, or the teacher of a shipped world."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from stepdistill import worlds
from stepdistill.diffusion.sampler import SamplerSpec, Solver
from stepdistill.diffusion.times import trailing
from stepdistill.eval import protocol, score
from stepdistill.eval.extractors import digest
from stepdistill.eval.generate import generate
from stepdistill.eval.parts import Parts, Taken
from stepdistill.export import NO_PROTOCOL, load_student
from stepdistill.models.load import Teacher, is_prompted, load_teacher, read_json
from stepdistill.models.prompted import PromptTeacher


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
        """How many pictures may share a batch: prompts that are padded together would change with their neighbours."""
        return 1 if isinstance(self.teacher, PromptTeacher) and self.teacher.bank is None else sys.maxsize

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
        """The result file's model block: name, digest of the weights, and of a student its recipe's method, step and average."""
        weights = sorted((self.teacher.folder / "unet").glob("*.safetensors")) or sorted(self.teacher.folder.glob("*.safetensors"))
        notes = {key: self.teacher.notes[key] for key in ("method", "step", "ema") if key in self.teacher.notes}
        return {"name": self.name, "is_teacher": self.is_teacher, "sha256": self.teacher.notes.get("unet_sha256") or digest(weights[0]),
                **notes}


def open_model(name: str, steps: int | None = None, guidance: float | None = None, *, solver: str | None = None,
               renoise: float | None = None, shift: float | None = None, device: torch.device | str = "cpu",
               autocast: torch.dtype | None = None, prompts: Sequence[str] = ()) -> Opened:
    """`name` is an exported folder or "teacher:WORLD". Steps and guidance override the model's own sampler; so do solver, renoise and
    the shift of the times for a teacher, whose own sampler is the one its model card calls its best setting. Other steps than its own
    are equal ones unless `shift` says otherwise. `prompts` are for students of a pipeline with prompts, and for no other model."""
    prompted = is_prompted(Path(name))
    if prompted and not prompts:
        raise ValueError(f"{name} makes pictures of prompts: give --prompt or --prompts")
    if prompts and not prompted:
        raise ValueError(f"{name} is class-conditional and takes no prompts: name a class with --label")
    if name.startswith("teacher:") or worlds.teacher_folder(name):
        teacher = load_teacher(name, device=device, autocast=autocast)
        own = SamplerSpec.from_dict(dict(teacher.notes["sampler"]))
        if solver is not None:
            own = replace(own, solver=cast(Solver, solver), renoise=renoise or 0.0)
        elif renoise is not None:
            own = replace(own, renoise=renoise)
        if steps is not None or shift is not None:
            own = replace(own, times=trailing(steps or len(own.times), 1.0 if shift is None else shift))
        opened = Opened(name, teacher, own, True, len(own.times))
    else:
        student, own = load_student(Path(name), prompts=prompts, device=device, autocast=autocast)
        if (solver, renoise, shift) != (None, None, None):
            raise ValueError("--solver, --renoise and --shift are for teachers; a student is sampled as it was trained")
        opened = Opened(name, student, own.at(steps) if steps else own, False, len(own.times))
    if guidance is not None:
        opened = replace(opened, spec=opened.spec.guided(guidance))
    if opened.spec.guidance != 1 and not opened.guides:
        raise ValueError(f"{name} has no null class, so it cannot be guided: leave --guidance at 1")
    return opened


def evaluate(model: str, protocol_name: str, count: int, to: Path, *, steps: int | None = None, guidance: float | None = None,
             solver: str | None = None, renoise: float | None = None, shift: float | None = None, seed: int = 0,
             batch_size: int = 100, device: torch.device | str = "cpu", quiet: bool = False) -> dict[str, Any]:
    """Generate in fp32, score, and write the result file with features and samples beside it; returns the result.

    Finished batches are kept beside `to` meanwhile: the same call goes on where one was interrupted, and helps one that runs.

    Raises ValueError or FileNotFoundError before anything is generated where model, protocol or target file are unfit.
    """
    exam = protocol.get(protocol_name, count, seed)
    if to.is_dir() or to.suffix != ".json":
        raise ValueError(f"{to} must name a .json file")
    if is_prompted(Path(model)):
        raise ValueError(f"{model} {NO_PROTOCOL}")
    opened = open_model(model, steps, guidance, solver=solver, renoise=renoise, shift=shift, device=device)
    to.parent.mkdir(parents=True, exist_ok=True)
    started, began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    sampler = {**opened.spec.to_dict(), "nfe": opened.spec.nfe}
    meta = {"model": opened.describe(), "sampler": sampler, "protocol": exam.hash, "batch": batch_size}
    parts = Parts.open(to.with_suffix(".parts"), meta)
    try:
        made = generate(opened.teacher, opened.spec, exam.count, exam.seed, batch_size=batch_size, quiet=quiet, parts=parts)
    except Taken:
        return read_json(to)
    scored = score.score(made.images, made.labels, exam)
    result = score.write_result(
        to, exam, scored, model=opened.describe(), sampler=sampler, images=made.images,
        speed={"ms_per_image": made.ms_per_image, "batch_size": batch_size, "precision": "fp32"}, env=score.environment(device),
        started=started, seconds=round(time.monotonic() - began, 1))
    parts.remove()
    return result
