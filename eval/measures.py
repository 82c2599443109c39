"""The kinds of measures that a protocol may name: what each looks at, what it finds, and which way is better.

    frechet fid fd patchfid     Frechet distance to real pictures; fid on Inception, fd on DINOv2, patchfid on the middle of large pictures
    kid kd cmmd                 kernel distances; cmmd is the one on CLIP embeddings, times 1000
    precision recall density coverage
    is accuracy                 of an extractor that is a classifier: inception score (ten splits), share of labels that it confirms
    clip                        cosine of a picture and its prompt, in one of the scales of `alignment.CONVENTIONS`
    variety vendi lpips         how different the pictures of one prompt (or class) are

Beside its estimate a measure leaves what a paired comparison needs: its value without each group of the jackknife, or a value for each
sample, prompt or disjoint set of samples. These are kept with the features, so that two results are compared without looking at a picture
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.eval import alignment, diversity, kernels, metrics
from stepdistill.eval.metrics import Estimate, LeftOut, Moments
from stepdistill.eval.pictures import Pictures, shrunk, together
from stepdistill.eval.protocol import Measure, Protocol, Real

SPLITS = 10                                             # of an inception score, as papers print it
IN_PROMPT = frozenset(("variety", "vendi", "lpips"))    # told from several pictures of one prompt
APART = ".variety"                                      # behind a key: features of the pictures that are made for these alone
# What LPIPS is fed for 0 and 255, and the most pixels of the short side, larger pictures being resized (0: they stay as they are). DMD2's
# figures are of (0, 1); 512 pixels are usual.
LPIPS = {"": ((-1.0, 1.0), 0), "01": ((0.0, 1.0), 0), "512": ((-1.0, 1.0), 512), "512_01": ((0.0, 1.0), 512)}


@dataclass(frozen=True)
class Seen:
    """What a measure may look at: features (N, d) of its view, logits (N, classes) of a classifier, the labels or prompt numbers (N,), real
    data, embeddings of all prompts (P, d), and for LPIPS all pictures with its distance. Where variety has pictures of its own, features of
    its measures are of those, prompt by prompt in turn."""

    protocol: Protocol
    measure: Measure
    labels: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None
    real: Real | None = None
    texts: Tensor | None = None
    pictures: Pictures | None = None
    distance: diversity.Distance | None = None


@dataclass(frozen=True)
class Found:
    """An estimate, and what it is paired by: values with each group left out, or of each sample, prompt or disjoint set (n,). `shuffled` is
    the estimate of the same pictures, each told the next prompt."""

    estimate: Estimate
    left: LeftOut | None = None
    values: Tensor | None = None
    shuffled: Estimate | None = None


@dataclass(frozen=True)
class Kind:
    """How a number is found, where its better values lie, what it says to somebody who meets it for the first time, what it leaves to pair
    it by (a field of `Found`), and what `values` are of."""

    find: Callable[[Seen], Found]
    better: Literal["↓", "↑"]
    words: str
    leaves: Literal["left", "values", ""] = ""
    real: bool = False                                  # whether it is a distance to real data
    unit: Literal["sample", "prompt", "set"] = "sample"

    def paired(self, a: Found, b: Found) -> Estimate | None:
        """Difference a - b of two models with the same noise and labels; None where nothing is kept to tell it from."""
        if a.left is not None and b.left is not None:
            return metrics.paired_jackknife(a.left, b.left)
        if a.values is None or b.values is None:
            return None
        if self.unit == "set":
            return metrics.paired_sets(a.values, b.values)
        if self.unit == "prompt":
            return alignment.paired_means(a.values, b.values).delta
        return metrics.paired_accuracy(a.values, b.values)


def groups(features: Tensor, protocol: Protocol) -> list[Moments]:
    """Moments of the jackknife's groups."""
    member = members(protocol, protocol.groups)
    return [Moments.of(features[member == j]) for j in range(protocol.groups)]


def members(protocol: Protocol, sets: int) -> Tensor:
    """Which of so many sets, each with every class equally often, a sample belongs to, (N,)."""
    return metrics.members(protocol.count, sets, protocol.strata)


def kernel_sums(features: Tensor, protocol: Protocol, reference: Real) -> metrics.KernelSums:
    """Kernel sums of the same groups against the real ones."""
    return metrics.kernel_sums(features, reference.test_features, members(protocol, protocol.groups))


def by_prompt(rows: Tensor, protocol: Protocol) -> Tensor:
    """Rows (N, ...) of samples as (P, M, ...), prompts or classes and seeds of each: all that are whole."""
    turns = min(protocol.turns, protocol.count)
    seeds = protocol.count // turns
    return rows[: seeds * turns].unflatten(0, (seeds, turns)).transpose(0, 1)


def _some(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _real(seen: Seen) -> Real:
    assert seen.real is not None
    return seen.real


def _frechet(seen: Seen) -> Found:
    left = metrics.left_out(groups(_some(seen.features), seen.protocol), _real(seen).train)
    return Found(metrics.jackknife(*left), left)


def _kid(seen: Seen) -> Found:
    left = metrics.without_each(kernel_sums(_some(seen.features), seen.protocol, _real(seen)), metrics.KernelSums.u_statistic)
    return Found(metrics.jackknife(*left), left)


def _cmmd(seen: Seen) -> Found:
    member = members(seen.protocol, seen.protocol.groups)
    left = kernels.left_out(kernels.cmmd_sums(_some(seen.features), _real(seen).test_features, member))
    return Found(metrics.jackknife(*left), left)


def _precision(seen: Seen) -> Found:
    hits = metrics.inside(_real(seen).test_features, _some(seen.features), seen.protocol.neighbours)
    return Found(metrics.proportion(hits), values=hits)


def _recall(seen: Seen) -> Found:
    member = members(seen.protocol, seen.protocol.recall_sets)
    found, shares = metrics.recall_of_sets(_some(seen.features), _real(seen).test_features, seen.protocol.neighbours, member)
    return Found(found, values=shares)


def _density(seen: Seen) -> Found:
    values = metrics.lies_in(_some(seen.features), _real(seen).test_features, seen.protocol.cover_neighbours)
    return Found(metrics.mean_estimate(values), values=values)


def _coverage(seen: Seen) -> Found:
    member = members(seen.protocol, seen.protocol.recall_sets)
    found, shares = metrics.coverage_of_sets(_some(seen.features), _real(seen).test_features, seen.protocol.cover_neighbours, member)
    return Found(found, values=shares)


def _classified(seen: Seen) -> Tensor:
    if seen.logits is None:
        raise ValueError(f"extractor {seen.measure.extractor!r} is no classifier: leave {seen.measure.kind!r} out of the protocol")
    return seen.logits


def _accuracy(seen: Seen) -> Found:
    hits = _classified(seen).argmax(1) == seen.labels
    return Found(metrics.proportion(hits), values=hits)


def _inception(seen: Seen) -> Found:
    """The value of ten splits, which papers print; bias and error from the jackknife of all pictures at once."""
    logits = _classified(seen)
    whole = metrics.inception_estimate(logits, members(seen.protocol, seen.protocol.groups))
    return Found(replace(whole, value=metrics.inception_splits(logits, SPLITS)[0]))


def _clip(seen: Seen) -> Found:
    images = by_prompt(_some(seen.features), seen.protocol)
    texts, convention = _some(seen.texts)[: len(images)], seen.measure.convention
    values = alignment.clip_scores(images, texts, convention)
    others = alignment.clip_scores(images, texts.roll(-1, 0), convention)
    return Found(metrics.bootstrap_mean(values), values=values, shuffled=metrics.mean_estimate(others))


def _together(seen: Seen) -> Tensor:
    prompts, seeds = seen.protocol.variety
    if seen.protocol.variety_apart:
        return _some(seen.features).unflatten(0, (seeds, prompts)).transpose(0, 1)
    return by_prompt(_some(seen.features), seen.protocol)[:prompts, :seeds]


def _variety(seen: Seen) -> Found:
    values = diversity.mean_distance(_together(seen))
    return Found(metrics.bootstrap_mean(values), values=values)


def _vendi(seen: Seen) -> Found:
    values = diversity.vendi(_together(seen))
    return Found(metrics.bootstrap_mean(values), values=values)


def _lpips(seen: Seen) -> Found:
    assert seen.pictures is not None
    assert seen.distance is not None
    (prompts, seeds), read = seen.protocol.variety, seen.pictures.read
    start, turns = (seen.protocol.count, prompts) if seen.protocol.variety_apart else (0, seen.protocol.turns)
    (range_, side), found = LPIPS[seen.measure.convention], []
    for prompt in range(prompts):
        rows = range(start + prompt, start + prompt + seeds * turns, turns)
        those = [shrunk(picture, side, seen.protocol.filter) for row in rows for picture in read(range(row, row + 1))]
        found.append(diversity.lpips_distance(together(those).expand(-1, 3, -1, -1)[None], seen.distance, range_))
    values = torch.cat(found)
    return Found(metrics.bootstrap_mean(values), values=values)


_CROWDS = ("how far the crowd of generated pictures lies from the crowd of real ones. It grows with faults and with missing variety; 0 "
           "would be no difference.")
_KERNEL = "Kernel distance of the same two crowds: another formula, that does not grow where pictures are few."

KINDS = {
    **{name: Kind(_frechet, "↓", f"Fréchet distance: {_CROWDS}", "left", real=True) for name in ("frechet", "fid", "fd")},
    "patchfid": Kind(_frechet, "↓", "The same of a small square from the middle of each picture: texture, which the whole picture hides.",
                     "left", real=True),
    **{name: Kind(_kid, "↓", _KERNEL, "left", real=True) for name in ("kid", "kd")},
    "cmmd": Kind(_cmmd, "↓", "Kernel distance of the two crowds as CLIP sees them.", "left", real=True),
    "precision": Kind(_precision, "↑", "Share of the generated pictures that lie among real ones: quality.", "values", real=True),
    "recall": Kind(_recall, "↑", "Share of the real pictures that lie among generated ones: variety.", "values", real=True, unit="set"),
    "density": Kind(_density, "↑", "How thickly real pictures lie around generated ones; about 1 for real ones.", "values", real=True),
    "coverage": Kind(_coverage, "↑", "Share of the real pictures that have a generated one near by: variety.", "values", real=True,
                     unit="set"),
    "is": Kind(_inception, "↑", "Inception score: whether a classifier is sure of each picture and sees every class. No distance to real "
                                "pictures."),
    "accuracy": Kind(_accuracy, "↑", "Share of the generated pictures that a classifier takes for the class that was asked for.", "values"),
    "clip": Kind(_clip, "↑", "How well pictures fit their prompts, by a network that knows both.", "values", unit="prompt"),
    "variety": Kind(_variety, "↑", "How different the pictures of one prompt or class are: one less the mean cosine of their features.",
                    "values", unit="prompt"),
    "vendi": Kind(_vendi, "↑", "How many different pictures there are among those of one prompt or class.", "values", unit="prompt"),
    "lpips": Kind(_lpips, "↑", "How different the pictures of one prompt or class look, by LPIPS.", "values", unit="prompt"),
}


def fewest_real(protocol: Protocol, kind: str) -> int:
    """Of how many real pictures a kind needs features: each point's neighbours and itself; pairs for a kernel distance."""
    return {"precision": protocol.neighbours + 1, "density": protocol.cover_neighbours + 1, "coverage": protocol.cover_neighbours + 1,
            "kid": 2, "kd": 2}.get(kind, 0)


def by_group(kept: Mapping[str, Tensor], protocol: Protocol, groups: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """What is told per prompt (`packed`), by metric and by those `groups` of the prompts (P,) that hold two or more."""
    rows = {group: torch.tensor([other == group for other in groups]) for group in sorted(set(groups)) if groups.count(group) > 1}
    told = {name: kept[f"values/{name}"] for name, measure in protocol.plan.items() if KINDS[measure.kind].unit == "prompt"}
    return {name: {group: metrics.mean_estimate(values[mine]) for group, mine in rows.items()} for name, values in told.items()}


# ------------------------------------------------------------------------------------------------------------------------- what is kept


def packed(found: dict[str, Found]) -> dict[str, Tensor]:
    """What pairs results, as tensors beside the features: left/METRIC (1 + groups,) and values/METRIC (n,)."""
    left = {f"left/{name}": torch.tensor([f.left[0], *f.left[1]], dtype=torch.float64) for name, f in found.items() if f.left}
    return left | {f"values/{name}": f.values for name, f in found.items() if f.values is not None}


def unpacked(kept: Mapping[str, Tensor], name: str, estimate: Estimate) -> Found:
    """The inverse for one metric."""
    left, values = kept.get(f"left/{name}"), kept.get(f"values/{name}")
    return Found(estimate, None if left is None else (float(left[0]), left[1:].tolist(), estimate.n), values)


def key_of(measure: Measure, protocol: Protocol) -> str:
    """What a measure's features are found by: its own key, or KEY.variety where it has pictures of its own."""
    return f"{measure.key}{APART}" if protocol.variety_apart and measure.kind in IN_PROMPT else measure.key


def rows_kept(protocol: Protocol) -> dict[str, int]:
    """How many rows each tensor of `packed` has."""
    rows = {}
    for name, measure in protocol.plan.items():
        kind = KINDS[measure.kind]
        if kind.leaves == "left":
            rows[f"left/{name}"] = 1 + protocol.groups
        elif kind.leaves:
            prompts = min(protocol.turns, protocol.count) if measure.kind == "clip" else protocol.variety[0]
            rows[f"values/{name}"] = {"sample": protocol.count, "prompt": prompts, "set": protocol.recall_sets}[kind.unit]
    return rows


def estimate(block: Mapping[str, Any]) -> Estimate:
    """The inverse of `Estimate.to_dict`."""
    return Estimate(**{**block, "ci95": tuple(block["ci95"])})
