"""What a score belongs to. Two results may stand in one table only when their protocols have the same hash."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.eval.extractors import digest, fashion_file
from stepdistill.eval.metrics import Moments, frechet
from stepdistill.worlds.fashion import classifier, data

REFERENCE = "reference.safetensors"                     # in the fashion world; written by scripts/make_reference.py
BATCH = 250                                             # pictures per call of the extractor, here and in the reference


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on except the model and its sampler."""

    name: str
    dataset: str
    reference: str
    reference_sha256: str
    count: int                                          # generated pictures
    seed: int                                           # sample i is made from (seed, i)
    resolution: int
    labels: str                                         # class of sample i
    classes: int
    extractor: str
    extractor_sha256: str
    metrics: tuple[str, ...]
    groups: int                                         # of the jackknife, each of whole rounds of labels
    quantise: str = "round"
    batch_size: int = BATCH
    precision: str = "float32, TF32 off"
    frechet_reference: str = "train moments"
    set_reference: str = "10,000 test pictures"         # of kid, precision and recall
    neighbours: int = 3
    recall_sets: int = 5

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "metrics": list(self.metrics)}

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same in every process and Python version."""
        return hash_of(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Protocol:
        """The inverse of `to_dict`; ValueError for keys of another version."""
        if set(values) != {f.name for f in fields(cls)}:
            odd = sorted(set(values) ^ {f.name for f in fields(cls)})
            raise ValueError(f"a protocol of another version (differs in {', '.join(odd)}): score the model again")
        return cls(**{**values, "metrics": tuple(values["metrics"])})


def hash_of(values: dict[str, Any]) -> str:
    """Of canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def differing_fields(a: Protocol | dict[str, Any], b: Protocol | dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field to its two values, where they differ."""
    left, right = (p.to_dict() if isinstance(p, Protocol) else p for p in (a, b))
    return {k: (left.get(k), right.get(k)) for k in sorted(set(left) | set(right)) if left.get(k) != right.get(k)}


@dataclass(frozen=True)
class Reference:
    """Real data as the extractor saw it: moments of all pictures, features (10000, d) and labels (10000,) of the test pictures and of a
    fixed subset of the training pictures."""

    train: Moments
    test: Moments
    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


@cache
def fashion_reference() -> Reference:
    """The shipped statistics. Raises FileNotFoundError or ValueError with the remedy."""
    path = fashion_file(REFERENCE, "scripts/make_reference.py")
    try:
        t = load_file(path)
        moments = {s: Moments.from_statistics(int(t[f"{s}.n"]), t[f"{s}.mean"], t[f"{s}.cov"]) for s in ("train", "test")}
        return Reference(moments["train"], moments["test"], t["train.features"].float(), t["train.labels"].long(),
                         t["test.features"].float(), t["test.labels"].long())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): reinstall stepdistill, or run `python scripts/make_reference.py`") from error


@cache
def _sha256(path: Path, modified: int) -> str:
    return digest(path)


def _shipped(name: str, remedy: str) -> str:
    path = fashion_file(name, remedy)
    return _sha256(path, path.stat().st_mtime_ns)


def fashion(count: int, seed: int) -> Protocol:
    """Fashion-MNIST: Frechet to all training pictures; kernel distance, precision and recall to the test pictures; accuracy of labels."""
    classes = len(data.CLASSES)
    if count < 5 * classes:
        raise ValueError(f"protocol 'fashion' needs at least {5 * classes} pictures for its error bars, got {count}: raise the count")
    return Protocol(
        name="fashion", dataset="Fashion-MNIST 28x28", reference="fashion train 60000, test 10000",
        reference_sha256=_shipped(REFERENCE, "scripts/make_reference.py"),
        count=count, seed=seed, resolution=28, labels=f"i mod {classes}", classes=classes,
        extractor="fashion", extractor_sha256=_shipped(classifier.WEIGHTS, "scripts/train_classifier.py"),
        metrics=("frechet_fashion", "kid_fashion", "precision_fashion", "recall_fashion", "accuracy_fashion"),
        groups=min(25, count // classes),
    )


PROTOCOLS: dict[str, Callable[[int, int], Protocol]] = {"fashion": fashion}


def get(name: str, count: int = 10000, seed: int = 0) -> Protocol:
    """A registered protocol; ValueError naming the nearest one for an unknown name."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no protocol {name!r}: did you mean {near!r}? There are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name](count, seed)


def floor() -> float:
    """Frechet distance of the real test pictures to the training ones: what a perfect model scores at 10,000 pictures, roughly."""
    reference = fashion_reference()
    return frechet(reference.test, reference.train)
