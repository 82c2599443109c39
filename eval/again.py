"""Further measures of a result, from the features that it kept: no picture is made again, and none is looked at."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval import cards, measures, references, score, teachers
from stepdistill.eval.cards import Brought, Card
from stepdistill.eval.evaluate import ranks
from stepdistill.eval.extractors import embed
from stepdistill.eval.measures import KINDS, Seen
from stepdistill.eval.protocol import PROTOCOLS, Measure, Protocol, Real
from stepdistill.models.precision import exact

ANSWERS = ("is", "accuracy")                            # kinds of measures that read a classifier's answers, which are not kept


def measure_again(path: Path, also: Sequence[str], to: Path, *, reference: Path | None = None, prompts: Path | None = None,
                  device: torch.device | str = "cpu") -> dict[str, Any]:
    """Write the result at `path` as `to` with further measures, in words (`cards.measure`), as if the model had been scored with them at
    once; returns it. Features and first pictures are copied beside it; the block `again` tells where they came from.

    The reference and the prompts are looked for where the result says that they were, unless they are named here; no weights are needed but
    those of a network that reads prompts. Raises FileNotFoundError or ValueError for a measure that needs pictures, or an extractor that
    never ran, and where something is unfit, before anything is written.
    """
    started, began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    if to.is_dir() or to.suffix != ".json" or to.resolve() == path.resolve():
        raise ValueError(f"{to} must name a .json file, another than {path}")
    if ranks() > 1:
        raise ValueError(f"{path} is a result, to which one process adds measures alone: run eval without torchrun")
    result = score.read_result(path)
    old, asked = Protocol.from_dict(result["protocol"]), result.get("asked", {})
    card = cards.find(old.name)
    if card is None and (reference or prompts):
        raise ValueError(f"protocol {old.name!r} brings all that it needs: leave --reference and --prompts out")
    for measure in map(cards.measure, also):
        _refuse_unseen(path, old, measure)
    protocol = cards.extended(old, also)
    if protocol.total > old.total:
        raise ValueError(f"{path} has one picture of each prompt, and variety needs more of them: score the model itself with --also")
    if protocol == old:
        raise ValueError("there is nothing to add: name a measure that is not there yet with --also KIND:EXTRACTOR")
    added = {name: measure for name, measure in protocol.plan.items() if name not in old.plan}
    real: Mapping[str, Real] = {}
    if card is None:
        real = PROTOCOLS[old.name].reference()
    elif wanted := [name for name, measure in added.items() if KINDS[measure.kind].real]:
        place = _first(reference, asked.get("reference"), _beside(path, card, asked.get("against")))
        found = _reference(path, old, card, place, wanted[0], protocol)
        real, protocol = found.real, replace(protocol, set_reference=cards.set_reference(card, protocol, found))
    texts = _texts(path, protocol, card, score.readers(added), _first(prompts, asked.get("prompts")), device)

    needed = {old.extractor, *(measures.key_of(measure, old) for measure in added.values())}
    kept = {key: _kept(path, result, key) for key in keys_of(old) if key in needed or score.features_path(path, key).is_file()}
    first = kept.pop(old.extractor)
    pictures = score.read_samples(score.samples_path(path), result)
    if pictures is None:
        raise FileNotFoundError(f"{score.samples_path(path)} is missing: put it back, or score the model again")
    answers: score.Answers = {key: (tensors["features"], None) for key, tensors in {old.extractor: first, **kept}.items()}
    more = score.measure_all(added, answers, real, texts, Seen(protocol, Measure("", ""), first["labels"]))
    estimates = {name: measures.estimate(block) for name, block in result["metrics"].items()}
    pairs = {name: tensor for name, tensor in first.items() if name in measures.rows_kept(old)}
    scored = score.Scored(estimates | {name: each.estimate for name, each in more.items()}, first["features"], first["labels"],
                          first.get("predicted"), {key: tensors["features"] for key, tensors in kept.items()},
                          pairs | measures.packed(more), score.prompts_in(first),
                          {name: measures.estimate(block) for name, block in result.get("shuffled", {}).items()} | score.shuffled(more))
    with exact():
        env = score.environment(device)
    brought = {name: str(file) for name, file in (("reference", reference), ("prompts", prompts)) if file is not None}
    blocks = {name: block for name, block in result.items() if name not in score.KEYS} | {
        "asked": {**asked, **brought, "also": [*asked.get("also", ()), *also]},
        "again": {"result": path.name, "measures": list(added), "env": env, "started": started,
                  "seconds": round(time.monotonic() - began, 1)}}
    same = ("model", "sampler", "speed", "env", "started", "seconds", "teacher", "paired")
    return score.write_result(to, protocol, scored, images=pictures, blocks=blocks, **{name: result[name] for name in same})


def keys_of(protocol: Protocol) -> tuple[str, ...]:
    """What a result of the protocol keeps features of, its first extractor first."""
    return tuple(dict.fromkeys((protocol.extractor, *(measures.key_of(m, protocol) for m in protocol.plan.values() if m.kind != "lpips"))))


def _refuse_unseen(path: Path, protocol: Protocol, measure: Measure) -> None:
    again = "score the model itself with --also"
    if measure.kind == "lpips":
        raise ValueError(f"lpips looks at pictures, and {path} kept features alone: {again}")
    if measure.kind in ANSWERS:
        raise ValueError(f"{measure.kind} reads the answers of {measure.extractor}, and {path} kept its features alone: {again}")
    if (key := measures.key_of(measure, protocol)) not in keys_of(protocol):
        whose = measure.extractor if measure.view == "whole" else f"{measure.extractor} on the middle of pictures"
        whose += " on the pictures of variety" * key.endswith(measures.APART)
        raise ValueError(f"{measure.kind} needs {whose}, which never ran for {path} (what did: {', '.join(keys_of(protocol))}): {again}")


def _kept(path: Path, result: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    kept = score.read_features(path, result, key)
    if kept is None:
        raise FileNotFoundError(f"{score.features_path(path, key)} is missing: put it back, or score the model again")
    return kept


def _first(*places: Path | str | None) -> Path | None:
    return next((Path(place) for place in places if place is not None), None)


def _beside(path: Path, card: Card, against: str | None) -> Path:
    """Where the reference is that nobody named: the card's, or under teacher-only the teacher's own pictures'."""
    if card is not cards.TEACHER:
        return card.place / cards.REFERENCE
    if against is None:
        return teachers.reference_path(path)
    return teachers.reference_path(Path(against) if against.endswith(".json") else teachers.made_beside(path))


def _reference(path: Path, old: Protocol, card: Card, place: Path | None, wanted: str, protocol: Protocol) -> references.Stored:
    """What the result was scored against, which the measure of the name `wanted` looks at."""
    if place is None or not place.is_file():
        raise FileNotFoundError(f"{wanted} is a distance to the reference of {path}, which is not at {place}: name it with --reference")
    found = references.read(place, protocol)
    if found.sha256 != old.reference_sha256 or cards.set_reference(card, old, found) != old.set_reference:
        raise ValueError(f"{place} is another reference than the one of {path}: name that one with --reference")
    return found


def _texts(path: Path, protocol: Protocol, card: Card | None, readers: Sequence[str], prompts: Path | None,
           device: torch.device | str) -> dict[str, Tensor]:
    """Embeddings of the result's prompts by the networks that must read them."""
    if not readers:
        return {}
    if card is None:
        texts = PROTOCOLS[protocol.name].prompts()[: protocol.prompts]
    else:
        texts = cards.prompts_of(card, Brought(prompts=prompts))
        if cards.digest_of_prompts(texts) != protocol.prompts_sha256:
            raise ValueError(f"{path} was scored with other prompts than those of {prompts or card.place}: name them with --prompts")
    judges = score.judges_of(protocol, readers, device)
    return {name: embed(judges[name], texts, protocol.batch_size) for name in readers}
