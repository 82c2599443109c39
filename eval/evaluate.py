"""A model or a folder of pictures under a protocol: generate, score, and write the result with all that further questions need.

Processes that are given the same task at once share its batches, as those of one `torchrun` do. The pictures are the same bytes then.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from stepdistill import recipe as recipes
from stepdistill import worlds
from stepdistill.eval import cards, measures, memory, pictures, references, score, teachers
from stepdistill.eval.cards import Brought, Card, Exam
from stepdistill.eval.generate import fill
from stepdistill.eval.models import Opened, is_model, open_model
from stepdistill.eval.parts import Parts, Taken
from stepdistill.eval.pictures import Pictures
from stepdistill.eval.protocol import PROTOCOLS, Protocol, hash_of
from stepdistill.export import OTHER_RECIPE
from stepdistill.models.load import is_prompted, read_json
from stepdistill.models.precision import exact
from stepdistill.training.loop import RECIPE

WAIT = 0.2                                              # seconds between looks at what another process does


def evaluate(model: str, protocol_name: str, count: int | None, to: Path, *, steps: int | None = None, guidance: float | None = None,
             solver: str | None = None, renoise: float | None = None, shift: float | None = None, seed: int = 0,
             batch_size: int = 100, device: torch.device | str = "cpu", features_to: Path | None = None, brought: Brought = Brought(),
             call: Mapping[str, Any] | None = None, against: str | None = None, train: Path | None = None, held_out: Path | None = None,
             quiet: bool = False) -> dict[str, Any]:
    """Score a model, sampled in fp32, or a folder of PNG files, and write the result file with features and samples beside it; returns it.

    `count` is the protocol's own number unless given. `brought` and `call` (keywords of a teacher's pipeline) are for protocols and models
    that need them. `against` is a teacher, or its result, in whose light the model is told (`teachers.Light`); under the protocol
    teacher-only its pictures of other seeds are the reference, and a teacher that is scored without it makes them. `train` and `held_out`
    are references of real pictures, in which memorised ones are looked for. `features_to` is a second place for the features, a
    .safetensors file.

    Finished batches are kept beside `to` meanwhile: the same call goes on where one was interrupted, and helps one that runs.

    Raises ValueError or FileNotFoundError before anything is generated where model, protocol or files are unfit, or where the seed is that
    of the exams by which a student's best checkpoint was chosen.
    """
    if to.is_dir() or to.suffix != ".json":
        raise ValueError(f"{to} must name a .json file")
    if features_to is not None and (features_to.is_dir() or features_to.suffix != ".safetensors"):
        raise ValueError(f"{features_to} must name a .safetensors file: features are kept in no other format")
    if (train is None) != (held_out is None):
        raise ValueError("memorised pictures are told from two references, --train and --held-out: give both")
    asked = _told(reference=brought.reference, prompts=brought.prompts, extractor=brought.extractor, also=brought.also,
                  call=[f"{key}={value}" for key, value in (call or {}).items()], against=against, train=train, held_out=held_out,
                  solver=solver, renoise=renoise, shift=shift)
    card = cards.find(protocol_name)
    started, began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    if is_model(model):
        _refuse_own_exam(model, seed)
    real = [_looked_at(path, protocol_name, count, brought) for path in (train, held_out) if path is not None]
    if real:
        memory.check(count or (card or PROTOCOLS[protocol_name]).count, *(len(each.test_features) for each in real))
    other = _teacher(against, protocol_name, count, to, seed=seed, batch_size=batch_size, device=device, brought=brought, call=call,
                     quiet=quiet)
    if other is not None and card is cards.TEACHER:
        brought = replace(brought, reference=brought.reference or teachers.reference_path(other),
                          classes=int(score.read_result(other)["protocol"]["classes"]))
    texts = cards.prompts_of(card, brought) if card else cards.ready(protocol_name, count, seed).prompts
    subject: Opened | None = None
    if is_model(model):
        _refuse_without_prompts(model, card, texts)
        subject = open_model(model, steps, guidance, solver=solver, renoise=renoise, shift=shift, device=device, prompts=texts, call=call)
        brought = replace(brought, classes=0 if texts else subject.teacher.classes)
        subject = subject if other is None else replace(subject, is_teacher=False)
        batch_size = min(batch_size, subject.most_at_once)
        if card is cards.TEACHER and brought.reference is None:
            brought = replace(brought, reference=teachers.reference_path(to))
            _own_reference(subject, cards.draft(card, count or card.count, seed, brought, texts), to, batch_size, device, quiet)
    else:
        _refuse_for_pictures(model, card, brought, steps=steps, guidance=guidance, solver=solver, renoise=renoise, shift=shift, call=call)
        files = pictures.files_in(Path(model).expanduser())
    exam = cards.ready(protocol_name, count, seed, brought)
    sitting = Sitting(exam, to, device, asked, None if other is None else teachers.Light.of(other, exam.protocol, device),
                      (real[0], real[1]) if real else None, started, began, subject and subject.teacher.latents)
    if subject is None:
        if exam.protocol.count <= len(files) < exam.protocol.total:
            raise ValueError(f"{model} holds {len(files):,} pictures: after the {exam.protocol.count:,} there must be "
                             f"{exam.protocol.total - exam.protocol.count:,} for variety, of the first {exam.protocol.variety[0]} prompts "
                             "in turn; make them, or leave its measure out of --also")
        seen = pictures.made(files, exam.protocol.total)
        _sized(seen, exam.protocol, model)
        described = {"name": model, "is_teacher": False, "sha256": pictures.digest_of(files[: exam.protocol.total])}
        sitting.finish(seen, described, {"nfe": 0}, {"ms_per_image": 0.0})
    else:
        _generated(subject, exam.protocol, to, ".parts", batch_size, sitting.finish, quiet)
    if features_to is not None:
        score.copy_features(to, exam.protocol.extractor, features_to)
    return read_json(to)


@dataclass(frozen=True)
class Sitting:
    """An exam that is held, where its result goes, and what the result tells besides: what was asked for, the teacher's light, real
    training and held-out pictures among which memorised ones are looked for. `encode` makes latents of pictures, if the model has some."""

    exam: Exam
    to: Path
    device: torch.device | str
    asked: Mapping[str, Any]
    light: teachers.Light | None
    real: tuple[references.Statistics, references.Statistics] | None
    started: str
    began: float
    encode: Callable[[Tensor], Tensor | None] | None

    def finish(self, seen: Pictures, described: Mapping[str, Any], sampler: Mapping[str, Any], speed: Mapping[str, Any]) -> None:
        """Score pictures and write the result."""
        protocol, labels = self.exam.protocol, torch.tensor([self.exam.protocol.label(i) for i in range(seen.count)])
        first = seen.part(0, protocol.count).first(score.SAMPLES)
        scored = score.score(seen, labels, protocol, self.exam.real, prompts=self.exam.prompts, device=self.device)
        first = first[: score.sampled(first)]
        with exact():                                                            # as pictures were made and judged
            env = score.environment(self.device)
        blocks: dict[str, Any] = {"asked": self.asked}
        if self.real is not None:
            train, held_out = self.real
            blocks["memory"] = memory.told(scored.features, train.test_features, held_out.test_features, train.names)
        if self.exam.groups:
            blocks["groups"] = {name: {group: estimate.to_dict() for group, estimate in told.items()}
                                for name, told in measures.by_group(scored.pairs, protocol, self.exam.groups).items()}
        score.write_result(
            self.to, protocol, scored, model=described, sampler=sampler, images=first, speed=speed, env=env, started=self.started,
            seconds=round(time.monotonic() - self.began, 1), blocks=blocks,
            teacher=None if self.light is None else self.light.beside(scored, first, self.encode),
            paired={} if self.light is None else self.light.paired(scored))


def _looked_at(path: Path, protocol_name: str, count: int | None, brought: Brought) -> references.Statistics:
    """What the first extractor of a protocol saw of the pictures of a reference."""
    card = cards.find(protocol_name)
    protocol = cards.bare(card, count or card.count, brought) if card else cards.ready(protocol_name, count).protocol
    found = references.read(path, protocol).real
    if protocol.extractor not in found:
        raise ValueError(f"{path} knows nothing of {protocol.extractor}, by which memorised pictures are looked for: make it again by "
                         f"`stepdistill reference SOURCE --protocol {protocol.name} --to {path}`")
    return found[protocol.extractor]


def _told(**asked: Any) -> dict[str, Any]:
    """What a command that repeats this must say, by the names of its options, in plain JSON values."""
    return {name.replace("_", "-"): str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asked.items() if value not in (None, (), [])}


def _refuse_without_prompts(model: str, card: Card | None, prompts: Sequence[str]) -> None:
    if not prompts and is_prompted(worlds.teacher_folder(model) or Path(model).expanduser()):
        raise ValueError(f"{model} makes pictures of prompts: " + ("name a file of them with --prompts" if card and card.captions else
                         "choose a protocol that has some, as `stepdistill protocols` lists them"))


def _refuse_own_exam(model: str, seed: int) -> None:
    """ValueError for a student whose exams while training had the same noise: its best checkpoint was chosen on these very pictures."""
    for file in (Path(model).expanduser() / name for name in (RECIPE, OTHER_RECIPE)):
        exam = recipes.load(file).exam if file.is_file() else None
        if exam is not None and exam.every and exam.seed == seed:
            raise ValueError(f"{model} was examined with seed {seed} while it was trained, and its best checkpoint chosen by that noise: "
                             "score it with another --seed")


def _refuse_for_pictures(model: str, card: Card | None, brought: Brought, **sampling: Any) -> None:
    if given := [name for name, value in sampling.items() if value is not None]:
        raise ValueError(f"{model} is a folder of pictures, which are made already: leave --{given[0]} out")
    if ranks() > 1:
        raise ValueError(f"{model} is a folder of pictures, which one process scores alone: run eval without torchrun")
    if card is cards.TEACHER and brought.reference is None:
        raise ValueError(f"{model} is a folder of pictures: say whose teacher's pictures they are held against, with --against")


def _teacher(against: str | None, protocol_name: str, count: int | None, to: Path, **options: Any) -> Path | None:
    """The result of the teacher that a model is told against, made first where a model was named."""
    if against is None or against.endswith(".json"):
        return None if against is None else Path(against)
    other = teachers.made_beside(to)
    evaluate(against, protocol_name, count, other, **options)
    return other


def _generated(subject: Opened, protocol: Protocol, to: Path, suffix: str, batch_size: int,
               finish: Callable[[Pictures, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], None], quiet: bool) -> None:
    """Make a protocol's pictures, with other processes where there are any; the first to find them complete finishes, the others wait.

    Labels are the protocol's, of whose classes the model must be, or have none.
    """
    classes = subject.teacher.classes
    if classes not in (0, protocol.turns):
        raise ValueError(f"protocol {protocol.name!r} has {protocol.turns} classes, and {subject.name} has {classes}")
    meta = _meta(subject, protocol)
    parts = Parts.open(to.with_suffix(suffix), {**meta, "batch": batch_size})
    _meet()
    try:
        milliseconds = fill(parts, subject.teacher, subject.spec, protocol.total, protocol.seed, batch_size=batch_size, quiet=quiet,
                            label=protocol.label)
        while not parts.claim_end():
            parts.check()
            time.sleep(WAIT)
    except Taken:
        return
    seen = parts.pictures(protocol.total, batch_size)
    _sized(seen, protocol, subject.name)
    finish(seen, meta["model"], meta["sampler"], {"ms_per_image": milliseconds, "batch_size": batch_size, "precision": "fp32"})
    parts.remove()


def _own_reference(subject: Opened, drafted: Protocol, to: Path, batch_size: int, device: torch.device | str, quiet: bool) -> None:
    """The reference of a protocol of teachers: the model's own pictures of the same prompts or classes, from the next seed."""
    protocol, path = replace(drafted, seed=drafted.seed + 1, variety_apart=False), teachers.reference_path(to)
    maker = hash_of({**_meta(subject, protocol), "batch": 0})
    if references.maker_of(path) == maker:
        return

    def finish(seen: Pictures, *_: Mapping[str, Any]) -> None:
        total = hashlib.sha256()
        for i in range(seen.count):
            total.update(seen.read(range(i, i + 1))[0].numpy().tobytes())
        found = references.gather(seen, protocol, cards.TEACHER.set_count, device)
        references.write(path, found, protocol, total.hexdigest(), seen.count, maker)

    _generated(subject, protocol, to, ".reference.parts", batch_size, finish, quiet)


def _meta(subject: Opened, protocol: Protocol) -> dict[str, Any]:
    """All that a model's pictures depend on, but for how many are made at a time."""
    return {"model": subject.describe(), "sampler": {**subject.spec.to_dict(), "nfe": subject.spec.nfe}, "protocol": protocol.hash}


def _sized(seen: Pictures, protocol: Protocol, whose: str) -> None:
    """ValueError unless the pictures have the size of the protocol, or may have any."""
    height, width = seen.read(range(1))[0].shape[1:]
    fixed, least = protocol.resolution, protocol.metric_size
    if fixed and (height, width) != (fixed, fixed):
        raise ValueError(f"protocol {protocol.name!r} looks at pictures of {fixed}x{fixed}, and those of {whose} are {width}x{height}")
    if min(height, width) < least:
        raise ValueError(f"protocol {protocol.name!r} looks at pictures of {least}x{least} and enlarges none, and those of {whose} are "
                         f"{width}x{height}")


def ranks() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _meet() -> None:
    """Wait until every process of a `torchrun` has come as far."""
    if ranks() > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
        distributed.barrier()
