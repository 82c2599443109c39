"""From pictures to a result file: every measure of a protocol with its error, the features kept so that nothing need be generated twice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from stepdistill.eval import metrics
from stepdistill.eval.extractors import EXTRACTORS, extract
from stepdistill.eval.metrics import Estimate, Moments
from stepdistill.eval.protocol import Protocol, Reference, fashion_reference, hash_of

SAMPLES = 100                                           # pictures kept beside a result for the grid
KEYS = frozenset(("protocol", "protocol_hash", "model", "sampler", "metrics", "paired", "teacher", "speed", "env", "started", "seconds",
                  "samples"))


@dataclass(frozen=True)
class Scored:
    """Estimates by metric name, and what they came from: features (N, d), labels (N,), and a classifier's answers (N,)."""

    metrics: dict[str, Estimate]
    features: Tensor
    labels: Tensor
    predicted: Tensor | None


def groups(features: Tensor, protocol: Protocol) -> list[Moments]:
    """Moments of the jackknife's groups."""
    member = metrics.members(len(features), protocol.groups, protocol.classes)
    return [Moments.of(features[member == j]) for j in range(protocol.groups)]


def kernel_sums(features: Tensor, protocol: Protocol, reference: Reference) -> metrics.KernelSums:
    """Kernel sums of the same groups against the test pictures."""
    return metrics.kernel_sums(features, reference.test_features, metrics.members(len(features), protocol.groups, protocol.classes))


def _recall(features: Tensor, protocol: Protocol, reference: Reference) -> Estimate:
    member = metrics.members(len(features), protocol.recall_sets, protocol.classes)
    return metrics.recall_estimate(features, reference.test_features, protocol.neighbours, member)


MEASURES: dict[str, Callable[[Tensor, Protocol, Reference], Estimate]] = {
    "frechet": lambda f, p, r: metrics.frechet_estimate(groups(f, p), r.train),
    "kid": lambda f, p, r: metrics.kid_estimate(kernel_sums(f, p, r)),
    "precision": lambda f, p, r: metrics.proportion(metrics.inside(r.test_features, f, p.neighbours)),
    "recall": _recall,
}


def score(images: Tensor, labels: Tensor, protocol: Protocol, reference: Reference | None = None) -> Scored:
    """uint8 pictures (N, C, H, W), sample i at row i, and the class asked of each (N,); N is the protocol's count.

    The reference is the protocol's own unless given. Raises ValueError where pictures, labels and protocol do not fit each other.
    """
    if len(images) != protocol.count or len(labels) != protocol.count:
        raise ValueError(f"protocol {protocol.name!r} wants {protocol.count} pictures, got {len(images)} and {len(labels)} labels")
    if not torch.equal(labels.long().cpu(), torch.arange(len(labels)) % protocol.classes):
        raise ValueError(f"protocol {protocol.name!r} wants the labels {protocol.labels}: generate with balanced labels")
    extractor = EXTRACTORS[protocol.extractor]()
    if extractor.sha256 != protocol.extractor_sha256:
        raise ValueError(f"extractor {extractor.name!r} has the weights {extractor.sha256[:12]}, the protocol names "
                         f"{protocol.extractor_sha256[:12]}: use the stepdistill that the protocol came from")
    reference = reference or fashion_reference()
    features, logits = extract(extractor, images, protocol.batch_size)
    estimates = {}
    for name in protocol.metrics:
        kind = name.split("_")[0]
        if kind != "accuracy":
            estimates[name] = MEASURES[kind](features, protocol, reference)
        elif logits is None:
            raise ValueError(f"extractor {extractor.name!r} is no classifier: leave {name!r} out of the protocol")
        else:
            estimates[name] = metrics.accuracy(logits, labels.cpu())
    return Scored(estimates, features, labels.cpu(), None if logits is None else logits.argmax(1))


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, device, threads, and the commit where the code runs from a git checkout (None elsewhere)."""
    packages = ("stepdistill", "torch", "diffusers", "safetensors")
    device = torch.device(device)
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(), "device_type": device.type,
        "threads": torch.get_num_threads(), "tf32": torch.backends.cuda.matmul.allow_tf32, "commit": _commit(),
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
    """Where a result keeps its features."""
    return path.with_name(f"{path.stem}.features_{extractor}.safetensors")


def samples_path(path: Path) -> Path:
    """Where a result keeps its first pictures."""
    return path.with_name(f"{path.stem}.samples.safetensors")


def write_result(path: Path, protocol: Protocol, scored: Scored, *, model: Mapping[str, Any], sampler: Mapping[str, Any],
                 images: Tensor, speed: Mapping[str, Any], env: Mapping[str, Any], started: str, seconds: float,
                 teacher: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the result, its features and its first pictures beside it, each renamed into place and the result last; returns the result.

    The report reads model["name"], model["is_teacher"], sampler["nfe"], sampler["times"], sampler["guidance"] and speed["ms_per_image"].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"features": scored.features, "labels": scored.labels} | ({} if scored.predicted is None else {"predicted": scored.predicted})
    result = {
        "protocol": protocol.to_dict(), "protocol_hash": protocol.hash, "model": dict(model), "sampler": dict(sampler),
        "metrics": {name: estimate.to_dict() for name, estimate in scored.metrics.items()}, "paired": {},
        "teacher": None if teacher is None else dict(teacher), "speed": dict(speed), "env": dict(env), "started": started,
        "seconds": seconds, "samples": samples_path(path).name,
    }
    text = json.dumps(result, indent=2) + "\n"                                  # before anything is written: it may refuse a value
    _save(kept, features_path(path, protocol.extractor), protocol.hash)
    _save({"images": images[:SAMPLES].cpu(), "labels": scored.labels[:SAMPLES]}, samples_path(path), protocol.hash)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)
    return result


def _save(tensors: Mapping[str, Tensor], path: Path, protocol_hash: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata={"protocol_hash": protocol_hash}))
    os.replace(temporary, path)


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


def read_tensors(path: Path, result: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """One of a result's companion files, or None where it is not there; ValueError for a damaged one or another protocol's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("protocol_hash")
        if stated != result["protocol_hash"]:
            raise ValueError(f"{path} belongs to protocol {stated}, its result to {result['protocol_hash']}: score the model again")
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): score the model again") from error
