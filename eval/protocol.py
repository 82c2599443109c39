"""What a score belongs to. Two results may stand in one table only when their protocols have the same hash."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.eval.extractors import fashion_file
from stepdistill.eval.metrics import Moments, frechet
from stepdistill.eval.weights import digest
from stepdistill.worlds.fashion import classifier, data

REFERENCE = "reference.safetensors"                     # in the fashion world; written by scripts/make_reference.py
BATCH = 250                                             # pictures per call of the extractor, here and in the reference
PRECISION = "float32, TF32 off"                         # of the extractors


View = Literal["whole", "patch"]                        # of a picture: cropped and resized as the protocol says, or its middle as it is


@dataclass(frozen=True)
class Measure:
    """How a number comes about: its kind (a key of `measures.KINDS`), and the extractor that looks at which view of the pictures."""

    kind: str
    extractor: str
    view: View = "whole"
    convention: str = ""                                # of a CLIP score, and of what LPIPS is fed

    @property
    def key(self) -> str:
        """What its features are kept under."""
        return self.extractor if self.view == "whole" else f"{self.extractor}.{self.view}"


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on except the model and its sampler.

    A field with a default is left out of the hash and of the file while it has it, so that protocols of before it keep theirs.

    `quantise` and `precision` state how every score here is made, and switch nothing: values go to the nearest of 256 levels, and
    extractors run in float32 without TF32. A paper that truncates (DMD2, half a level darker) is not imitated; pictures quantised in
    another way can be scored as a folder of PNG files, which the field then does not speak of.
    """

    name: str
    dataset: str
    reference: str
    reference_sha256: str
    count: int                                          # generated pictures
    seed: int                                           # sample i is made from (seed, i)
    resolution: int                                     # of the model's pictures; 0: what it makes
    labels: str                                         # class or prompt of sample i
    classes: int                                        # 0: none, or prompts
    extractor: str
    extractor_sha256: str
    metrics: tuple[str, ...]
    groups: int                                         # of the jackknife, each of whole rounds of labels
    quantise: str
    batch_size: int
    precision: str
    frechet_reference: str
    set_reference: str                                  # of kid, precision and recall
    neighbours: int
    recall_sets: int
    measures: tuple[Measure, ...] = ()                  # behind each of the metrics; none: KIND_EXTRACTOR is the metric's name
    further_extractors: tuple[tuple[str, str], ...] = ()        # besides the first: names and digests
    crop: str = "none"                                  # centre: to the short side
    metric_size: int = 0                                # side of the pictures that are judged; 0: as they are
    filter: str = "lanczos"                             # by which they come to it
    prompts: int = 0                                    # sample i has prompt i mod prompts
    prompts_sha256: str = ""
    cover_neighbours: int = 5                           # of density and coverage
    variety: tuple[int, int] = (0, 0)                   # prompts (or classes) and seeds of each that variety is told from
    variety_apart: bool = False                         # whether these are samples of their own, which come after the `count` others

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default}
        if self.measures:
            told["measures"] = [asdict(measure) for measure in self.measures]
        return {name: _listed(value) for name, value in told.items()}

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same in every process and Python version."""
        return hash_of(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Protocol:
        """The inverse of `to_dict`; ValueError for keys of another version."""
        known, needed = {f.name for f in fields(cls)}, {f.name for f in fields(cls) if f.default is MISSING}
        if odd := sorted((set(values) - known) | (needed - set(values))):
            raise ValueError(f"a protocol of another version (differs in {', '.join(odd)}): score the model again")
        told = {name: _tupled(value) for name, value in values.items() if name != "measures"}
        return cls(**told, measures=tuple(Measure(**each) for each in values.get("measures", ())))

    @property
    def plan(self) -> dict[str, Measure]:
        """How each metric comes about, by its name."""
        plain = (Measure(name.split("_")[0], self.extractor) for name in self.metrics)
        return dict(zip(self.metrics, self.measures or plain, strict=True))

    def only(self, kinds: Collection[str]) -> Protocol:
        """The same with the measures of these kinds alone."""
        kept = {name: measure for name, measure in self.plan.items() if measure.kind in kinds}
        return replace(self, metrics=tuple(kept), measures=tuple(kept.values()) if self.measures else ())

    @property
    def extractors(self) -> dict[str, str]:
        """Name to digest, the first one first."""
        return {self.extractor: self.extractor_sha256, **dict(self.further_extractors)}

    @property
    def turns(self) -> int:
        """Sample i has the class or the prompt i mod turns."""
        return max(1, self.prompts or self.classes)

    @property
    def total(self) -> int:
        """Pictures in all: `count`, and after them those of variety where they are apart."""
        return self.count + (self.variety[0] * self.variety[1] if self.variety_apart else 0)

    def label(self, i: int) -> int:
        """The class or the prompt of sample i, below `total`."""
        return i % self.turns if i < self.count else (i - self.count) % self.variety[0]

    @property
    def strata(self) -> int:
        """How many kinds of samples every group of the jackknife holds equally many of."""
        return max(1, self.classes)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def hash_of(values: dict[str, Any]) -> str:
    """Of canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def differing_fields(a: Protocol | dict[str, Any], b: Protocol | dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field to its two values, where they differ."""
    left, right = (p.to_dict() if isinstance(p, Protocol) else p for p in (a, b))
    return {k: (left.get(k), right.get(k)) for k in sorted(set(left) | set(right)) if left.get(k) != right.get(k)}


def told_apart(a: Protocol | dict[str, Any], b: Protocol | dict[str, Any]) -> str:
    """The fields that differ with their values, long ones cut, in one line."""
    short = lambda value: text if len(text := repr(value)) <= 24 else f"{text[:20]}..."                       # noqa: E731
    return "; ".join(f"{name}: {short(x)} and {short(y)}" for name, (x, y) in differing_fields(a, b).items())


class Real(Interface):
    """Real data as an extractor saw it: moments of all pictures, and features (M, d) of those that kernels and neighbours look at."""

    @property
    def train(self) -> Moments: ...

    @property
    def test_features(self) -> Tensor: ...


@dataclass(frozen=True)
class Reference:
    """Real data of a world with classes: moments of all pictures, features (10000, d) and labels (10000,) of the test pictures and of a
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
    return Protocol(
        name="fashion", dataset="Fashion-MNIST 28x28", reference="fashion train 60000, test 10000",
        reference_sha256=_shipped(REFERENCE, "scripts/make_reference.py"),
        count=count, seed=seed, resolution=28, labels=f"i mod {classes}", classes=classes,
        extractor="fashion", extractor_sha256=_shipped(classifier.WEIGHTS, "scripts/train_classifier.py"),
        metrics=("frechet_fashion", "kid_fashion", "precision_fashion", "recall_fashion", "accuracy_fashion"),
        groups=groups_of("fashion", count, classes), quantise="round", batch_size=BATCH, precision=PRECISION,
        frechet_reference="train moments", set_reference="10,000 test pictures", neighbours=3, recall_sets=5,
    )


def groups_of(name: str, count: int, classes: int = 1) -> int:
    """Groups of the jackknife; ValueError where there are too few pictures for five."""
    least = max(classes, 2)
    if count < 5 * least:
        raise ValueError(f"protocol {name!r} needs at least {5 * least} pictures for its error bars, got {count}: raise the count")
    return min(25, count // least)


@dataclass(frozen=True)
class World:
    """The exam of a shipped world: its protocol of a count and a seed, its real data, and its prompts where it has no classes.

    `reference` gives real data by `Measure.key`; a protocol takes the first of the prompts, whose `groups` are told apart. `count` is how
    many pictures are made where nobody says.
    """

    protocol: Callable[[int, int], Protocol]
    reference: Callable[[], Mapping[str, Real]]
    prompts: Callable[[], tuple[str, ...]] = tuple
    groups: Callable[[], tuple[str, ...]] = tuple
    count: int = 10_000


def _emoji(held_out: bool, count: int) -> World:
    def exam() -> Any:                                  # read when it is asked for: it needs packages that most do without
        from stepdistill.eval import emoji

        return emoji

    return World(lambda count, seed: exam().protocol(held_out, count, seed), lambda: exam().reference(held_out),
                 lambda: exam().prompts(held_out), lambda: exam().groups(held_out), count)


PROTOCOLS: dict[str, World] = {
    "fashion": World(fashion, lambda: {"fashion": fashion_reference()}),
    "emoji": _emoji(held_out=False, count=3400), "emoji-held-out": _emoji(held_out=True, count=360),
}


def get(name: str, count: int = 10000, seed: int = 0) -> Protocol:
    """The protocol of a shipped world; ValueError naming the nearest one for an unknown name."""
    if name not in PROTOCOLS:
        raise unknown(name, PROTOCOLS)
    return PROTOCOLS[name].protocol(count, seed)


def unknown(name: str, known: Collection[str]) -> ValueError:
    """What to raise for a protocol that there is not."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ValueError(f"no protocol {name!r}: did you mean {near!r}? There are {', '.join(known)}")


def floor() -> float:
    """Frechet distance of the real test pictures to the training ones: what a perfect model scores at 10,000 pictures, roughly."""
    reference = fashion_reference()
    return frechet(reference.test, reference.train)
