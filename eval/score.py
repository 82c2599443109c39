"""From pictures to a result file: every measure of a protocol with its error, the features kept so that nothing need be generated twice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from stepdistill.eval import diversity, measures, pictures
from stepdistill.eval.extractors import EXTRACTORS, Extractor, digest_of, embed, extract
from stepdistill.eval.measures import IN_PROMPT, KINDS, Found, Seen
from stepdistill.eval.metrics import Estimate
from stepdistill.eval.pictures import Pictures
from stepdistill.eval.protocol import PROTOCOLS, Measure, Protocol, Real, View, hash_of

SAMPLES, SAMPLE_BYTES = 100, 2**26                      # pictures kept beside a result for the grid, and the most that they may take
KEYS = frozenset(("protocol", "protocol_hash", "model", "sampler", "metrics", "paired", "teacher", "speed", "env", "started", "seconds",
                  "samples"))

Answers = dict[str, tuple[Tensor, Tensor | None]]       # features (N, d) and logits (N, classes), by `Measure.key`


@dataclass(frozen=True)
class Scored:
    """Estimates by metric name, and what they came from: the first extractor's features (N, d), labels (N,), its answers (N,) if it is a
    classifier, the other features by `measures.key_of`, what pairs results (`measures.packed`), the prompts, and by metric what those that
    read prompts give where every picture is told the next one."""

    metrics: dict[str, Estimate]
    features: Tensor
    labels: Tensor
    predicted: Tensor | None
    further: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    shuffled: Mapping[str, Estimate] = field(default_factory=dict)


def score(images: Tensor | Pictures, labels: Tensor, protocol: Protocol, reference: Real | Mapping[str, Real] | None = None, *,
          prompts: Sequence[str] = (), device: torch.device | str = "cpu") -> Scored:
    """Pictures, sample i at row i, and the class or the number of the prompt asked of each (N,); N is the protocol's total.

    The reference is that of a shipped world unless given: real data of the first extractor, or by `Measure.key`. Raises ValueError where
    pictures, labels, prompts, reference and protocol do not fit each other.
    """
    seen = images if isinstance(images, Pictures) else Pictures.of(images)
    labels, real = labels.long().cpu(), _real(protocol, reference)
    if seen.count != protocol.total or len(labels) != protocol.total:
        raise ValueError(f"protocol {protocol.name!r} wants {protocol.total} pictures, got {seen.count} and {len(labels)} labels")
    if labels.tolist() != [protocol.label(i) for i in range(protocol.total)]:
        raise ValueError(f"protocol {protocol.name!r} wants the labels {protocol.labels}: generate with balanced labels")
    if len(prompts) != protocol.prompts:
        raise ValueError(f"protocol {protocol.name!r} has {protocol.prompts} prompts, got {len(prompts)}")
    judges = judges_of(protocol, protocol.extractors, device)
    texts = {name: embed(judges[name], prompts, protocol.batch_size) for name in readers(protocol.plan)}
    distance = diversity.load_lpips(device) if diversity.JUDGE in protocol.extractors else None
    answers = look_at(seen, protocol, judges)
    labels = labels[: protocol.count]
    found = measure_all(protocol.plan, answers, real, texts, Seen(protocol, Measure("", ""), labels, pictures=seen, distance=distance))
    features, logits = answers.pop(protocol.extractor)
    return Scored({name: each.estimate for name, each in found.items()}, features, labels, None if logits is None else logits.argmax(1),
                  {key: others for key, (others, _) in answers.items()}, measures.packed(found), tuple(prompts), shuffled(found))


def shuffled(found: Mapping[str, Found]) -> dict[str, Estimate]:
    """What those measures give that read prompts, where every picture is told the next one."""
    return {name: each.shuffled for name, each in found.items() if each.shuffled is not None}


def _real(protocol: Protocol, reference: Real | Mapping[str, Real] | None) -> Mapping[str, Real]:
    if reference is None:
        return PROTOCOLS[protocol.name].reference()
    return reference if isinstance(reference, Mapping) else {protocol.extractor: reference}


def measure_all(plan: Mapping[str, Measure], answers: Answers, real: Mapping[str, Real], texts: Mapping[str, Tensor],
                seen: Seen) -> dict[str, Found]:
    """What measures find, by their names: of `seen`, and of what belongs to each of them among the answers, real data and texts."""
    found: dict[str, Found] = {}
    for name, measure in plan.items():
        features, logits = answers.get(measures.key_of(measure, seen.protocol), (None, None))
        if KINDS[measure.kind].real and measure.key not in real:
            raise ValueError(f"the reference knows nothing of {measure.key}, which {name} is measured on: make it again with this protocol")
        found[name] = KINDS[measure.kind].find(replace(seen, measure=measure, features=features, logits=logits, real=real.get(measure.key),
                                                       texts=texts.get(measure.extractor)))
    return found


def readers(plan: Mapping[str, Measure]) -> tuple[str, ...]:
    """The extractors that must read prompts."""
    return tuple(dict.fromkeys(measure.extractor for measure in plan.values() if measure.kind == "clip"))


def judges_of(protocol: Protocol, names: Collection[str], device: torch.device | str) -> dict[str, Any]:
    """Those of a protocol's extractors, whose weights are the ones that it names."""
    judges: dict[str, Any] = {}
    for name, wanted in ((name, digest) for name, digest in protocol.extractors.items() if name in names):
        if name != diversity.JUDGE:
            judges[name] = EXTRACTORS[name]()
        found = judges[name].sha256 if name in judges else digest_of(name)
        if found != wanted:
            raise ValueError(f"extractor {name!r} has the weights {found[:12]}, the protocol names {wanted[:12]}: use the stepdistill and "
                             "the weights that the protocol came from")
    return {name: judge.to(device) for name, judge in judges.items()}


def look_at(seen: Pictures, protocol: Protocol, judges: Mapping[str, Extractor]) -> Answers:
    """All that the measures of a protocol read of its pictures, by `measures.key_of`."""
    if not protocol.variety_apart:
        return look(seen, protocol, judges)
    asked = {measure.extractor for measure in protocol.plan.values() if measure.kind in IN_PROMPT}
    answers = look(seen.part(0, protocol.count), protocol.only(KINDS.keys() - IN_PROMPT), judges)
    others = {name: judge for name, judge in judges.items() if name in asked}
    apart = look(seen.part(protocol.count, protocol.total), protocol.only(IN_PROMPT), others)
    return answers | {f"{key}{measures.APART}": found for key, found in apart.items()}


def look(seen: Pictures, protocol: Protocol, judges: Mapping[str, Extractor]) -> Answers:
    """What the extractors say of pictures, some rows at a time: every one of `judges` on each view that a measure of the protocol takes."""
    wanted = dict.fromkeys([(protocol.extractor, "whole"), *((m.extractor, m.view) for m in protocol.plan.values() if m.kind != "lpips")])
    parts: dict[tuple[str, View], list[tuple[Tensor, Tensor | None]]] = {pair: [] for pair in wanted if pair[0] in judges}
    for start in range(0, seen.count if parts else 0, protocol.batch_size):
        rows = seen.read(range(start, min(seen.count, start + protocol.batch_size)))
        views = {view: shown(rows, view, protocol) for view in dict.fromkeys(view for _, view in parts)}
        for (name, view), answers in parts.items():
            answers.append(extract(judges[name], views[view], protocol.batch_size))
    return {Measure("", name, view).key: _joined(answers) for (name, view), answers in parts.items()}


def shown(rows: Sequence[Tensor], view: View, protocol: Protocol) -> Tensor:
    """A view of pictures (C, H, W) as one batch."""
    if view == "patch":
        return pictures.together([pictures.patch(picture) for picture in rows])
    return pictures.together([pictures.whole(picture, protocol.crop, protocol.metric_size, protocol.filter) for picture in rows])


def _joined(answers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    features, logits = zip(*answers, strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, device, threads, whether TF32 is on now, and the commit where the code runs from a git checkout (None elsewhere)."""
    packages = ("stepdistill", "torch", "diffusers", "safetensors")
    device = torch.device(device)
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(), "device_type": device.type,
        "threads": torch.get_num_threads(), "tf32": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32, "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).resolve()
    git = lambda *args: subprocess.run(["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10)  # noqa: E731
    try:
        if git("ls-files", "--error-unmatch", here.name).returncode:            # a site-packages inside someone else's checkout
            return None
        return git("rev-parse", "HEAD").stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def features_path(path: Path, extractor: str) -> Path:
    """Where a result keeps its features of an extractor, or of a `measures.key_of`."""
    return path.with_name(f"{path.stem}.features_{extractor}.safetensors")


def samples_path(path: Path) -> Path:
    """Where a result keeps its first pictures."""
    return path.with_name(f"{path.stem}.samples.safetensors")


def sampled(first: Tensor) -> int:
    """How many of some pictures (n, C, H, W) are kept beside a result."""
    return min(SAMPLES, max(1, SAMPLE_BYTES // first[0].numel()))


def write_result(path: Path, protocol: Protocol, scored: Scored, *, model: Mapping[str, Any], sampler: Mapping[str, Any],
                 images: Tensor, speed: Mapping[str, Any], env: Mapping[str, Any], started: str, seconds: float,
                 teacher: Mapping[str, Any] | None = None, paired: Mapping[str, Any] | None = None,
                 blocks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the result, its features and its first pictures beside it, each renamed into place and the result last; returns the result.

    `images` are the first pictures or all, (n, C, H, W). Other blocks of the result may be handed in as `blocks`.
    The report reads model["name"], model["is_teacher"], sampler["nfe"], sampler["times"], sampler["guidance"] and speed["ms_per_image"].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"features": scored.features, "labels": scored.labels, **scored.pairs}
    kept |= {} if scored.predicted is None else {"predicted": scored.predicted}
    kept |= {"prompts": spelled(scored.prompts)} if scored.prompts else {}
    result = {
        "protocol": protocol.to_dict(), "protocol_hash": protocol.hash, "model": dict(model), "sampler": dict(sampler),
        "metrics": {name: estimate.to_dict() for name, estimate in scored.metrics.items()}, "paired": dict(paired or {}),
        "teacher": None if teacher is None else dict(teacher), "speed": dict(speed), "env": dict(env), "started": started,
        "seconds": seconds, "samples": samples_path(path).name, **(blocks or {}),
        **({"shuffled": {name: estimate.to_dict() for name, estimate in scored.shuffled.items()}} if scored.shuffled else {}),
    }
    text = json.dumps(result, indent=2) + "\n"                                  # before anything is written: it may refuse a value
    _save(kept, features_path(path, protocol.extractor), protocol.hash)
    for key, features in scored.further.items():
        _save({"features": features}, features_path(path, key), protocol.hash)
    images = images[: sampled(images)]
    first = {"prompts": spelled(scored.prompts[: len(images)])} if scored.prompts else {}
    _save({"images": images.cpu(), "labels": scored.labels[: len(images)], **first}, samples_path(path), protocol.hash)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)
    return result


def spelled(texts: Sequence[str]) -> Tensor:
    """Texts among tensors: the bytes of their JSON, uint8 (n,)."""
    return torch.frombuffer(bytearray(json.dumps(list(texts)).encode()), dtype=torch.uint8)


def prompts_in(kept: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The prompts that a companion file holds; none where it is of classes, or of before they were kept."""
    return tuple(json.loads(kept["prompts"].numpy().tobytes())) if "prompts" in kept else ()


def _save(tensors: Mapping[str, Tensor], path: Path, protocol_hash: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata={"protocol_hash": protocol_hash}))
    os.replace(temporary, path)


def copy_features(result: Path, extractor: str, to: Path) -> None:
    """A result's features in another file, too, in one move."""
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.partial")
    shutil.copyfile(features_path(result, extractor), temporary)
    os.replace(temporary, to)


def read_result(path: Path) -> dict[str, Any]:
    """A result file, checked. Raises FileNotFoundError, or ValueError for a file that is no result or was changed by hand."""
    if not path.is_file():
        raise FileNotFoundError(f"no result file {path}: make it with `stepdistill eval MODEL --to {path}`")
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): score the model again") from error
    if not isinstance(result, dict) or not set(result) >= KEYS:
        missing = ", ".join(sorted(KEYS - set(result))) if isinstance(result, dict) else "everything"
        raise ValueError(f"{path} is no result file, it lacks {missing}: make one with `stepdistill eval MODEL --to FILE`")
    if hash_of(result["protocol"]) != result["protocol_hash"]:
        raise ValueError(f"{path} is damaged (its protocol does not have the hash it states): score the model again")
    try:
        for block in result["metrics"].values():
            if set(block) != {"value", "corrected", "se", "ci95", "n", "groups"}:
                raise KeyError(", ".join(block))
        float(result["sampler"]["nfe"]), float(result["speed"]["ms_per_image"]), str(result["model"]["name"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged (in metrics, sampler, speed or model: {error}): score the model again") from error
    return result


def read_features(path: Path, result: Mapping[str, Any], key: str | None = None) -> dict[str, Tensor] | None:
    """What the result at `path` keeps of an extractor or a `measures.key_of`: features (N, d), and of the first extractor, which is meant
    where none is named, labels (N,), predicted (N,) of a classifier, and what pairs results. None and errors as `read_tensors`."""
    protocol = Protocol.from_dict(result["protocol"])
    first, place = key in (None, protocol.extractor), features_path(path, key or protocol.extractor)
    rows = protocol.total - protocol.count if key is not None and key.endswith(measures.APART) else protocol.count
    kept = read_tensors(place, result, dict.fromkeys(("features", "labels") if first else ("features",), rows))
    if kept is not None and first:
        sets = {f"values/{name}" for name, measure in protocol.plan.items() if KINDS[measure.kind].unit == "set"}
        pairs = {name: rows for name, rows in measures.rows_kept(protocol).items() if name in kept or name not in sets}
        before = protocol.name == "fashion" and not set(pairs) & set(kept)       # results of before they kept them; sets came last
        _refuse_damaged(place, kept, ({} if before else pairs) | ({"predicted": protocol.count} if "predicted" in kept else {}))
    return kept


def read_samples(place: Path, result: Mapping[str, Any]) -> Tensor | None:
    """A result's first pictures, uint8 (n, C, H, W), which it keeps at `place`. None and errors as `read_tensors`."""
    kept = read_tensors(place, result, {"images": None})
    return None if kept is None else kept["images"]


def read_tensors(path: Path, result: Mapping[str, Any], rows: Mapping[str, int | None]) -> dict[str, Tensor] | None:
    """One of a result's companion files, or None where it is not there.

    `rows` names the tensors that it must hold, and how many rows each has (None: some). Raises ValueError for a damaged file, which one
    that lacks any of them is, or for one of another protocol.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("protocol_hash")
        if stated != result["protocol_hash"]:
            raise ValueError(f"{path} belongs to protocol {stated}, its result to {result['protocol_hash']}: score the model again")
        kept = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): score the model again") from error
    _refuse_damaged(path, kept, rows)
    return kept


def _refuse_damaged(path: Path, kept: Mapping[str, Tensor], rows: Mapping[str, int | None]) -> None:
    for name, wanted in rows.items():
        found = len(kept[name]) if name in kept and kept[name].ndim else 0
        if not found or found != (wanted or found):
            told = f"{found} rows of {name} in the place of {wanted}" if found else f"it lacks {name}"
            raise ValueError(f"{path} is damaged ({told}): score the model again")
