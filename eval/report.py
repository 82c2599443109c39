"""Results of one protocol side by side: report.html, report.md, report.json, quality_vs_nfe.png, quality_vs_ms.png, samples.png.

A difference is claimed where it is beyond two paired standard errors and its 95 % interval on one side of zero. Where there is no paired
error, as of a row whose features were not kept, nothing is claimed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval import (
    alignment,
    benchmarks,
    breakdown,
    charts,
    curves,
    measures,
    metrics,
    page,
    provenance,
    score,
    seeds,
    tables,
    timings,
)
from stepdistill.eval.measures import KINDS, Seen
from stepdistill.eval.metrics import Estimate
from stepdistill.eval.pairing import OverSeeds, Pairing
from stepdistill.eval.protocol import Protocol, fashion_reference, told_apart
from stepdistill.eval.tables import arrow, delta, enough, many, markdown, number, p_value, plural
from stepdistill.worlds.fashion.data import CLASSES

SHOWN, PER_CLASS = 10, 2                                # pictures of each row of samples.png, or of each class where these are few


@dataclass(frozen=True)
class Row:
    """One result: where it lies, what it is called, and its block of the result file. Of several seeds: those of the first, and `group` has
    the results of all."""

    path: Path
    model: str
    label: str
    steps: int
    is_teacher: bool
    result: dict[str, Any]
    group: Sequence[seeds.Loaded] = ()

    @cached_property
    def each(self) -> list[Row]:
        """A row for every seed; without `group` itself."""
        return [replace(self, path=path, result=result, group=()) for path, result in self.group] or [self]

    @property
    def nfe(self) -> int:
        """Network evaluations per picture, both halves of guidance counted."""
        return int(self.result["sampler"]["nfe"])

    @property
    def ms(self) -> float:
        """Milliseconds per picture."""
        return float(self.result["speed"]["ms_per_image"])

    @property
    def series(self) -> str:
        """What it shares with the same model at other numbers of steps."""
        guidance = float(self.result["sampler"].get("guidance", 1.0))
        return self.model if guidance == 1 else f"{self.model}, w = {guidance:g}"

    def metric(self, name: str) -> dict[str, Any]:
        return self.result["metrics"][name]

    def estimate(self, name: str) -> Estimate:
        """The same as an Estimate."""
        return measures.estimate(self.metric(name))

    @cached_property
    def kept(self) -> dict[str, Tensor] | None:
        """What the result kept beside it: features (N, d), labels (N,), where a classifier answered `predicted` (N,), prompts, and what
        pairs results. Of several seeds None: `each` of them has its own."""
        found = None if self.group else score.read_features(self.path, self.result)
        return None if found is None else _completed(found, Protocol.from_dict(self.result["protocol"]))

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Its first pictures, uint8 (n, C, H, W), as `images`, with their prompts; nothing where none are kept. Of several seeds those of
        the first."""
        path, result = self.each[0].path, self.each[0].result
        found = score.read_tensors(path.with_name(result["samples"]), result, {"images": None}) if result["samples"] else None
        return found or {}

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts where it kept features, those of the first pictures where it kept only these, or none."""
        return score.prompts_in(self.each[0].kept or {}) or score.prompts_in(self.samples)


def compare(results: list[Path], to: Path, runs: Sequence[Path] = (), speed: Path | None = None,
            over_seeds: bool = False) -> dict[str, Any]:
    """Write the report into the folder `to`, with the training curves of `runs` and the milliseconds of `speed`, a file of `bench speed`;
    returns report.json's content.

    `over_seeds` makes one row of a model's results of several seeds (`seeds.gathered`).

    Raises ValueError for results of unequal protocols, naming the fields that differ, and FileNotFoundError or ValueError for a result, a
    run or a file of timings that is none, or that times no model of these. Teachers come first, the one of most steps (and of those the
    best) at the head; every paired difference is to that first row.
    """
    if to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file: name a folder with --to")
    if not results:
        raise ValueError("nothing to compare: name at least one result file")
    if repeated := sorted({str(p) for p in results if sum(q.resolve() == p.resolve() for q in results) > 1}):
        raise ValueError(f"{repeated[0]} is named twice: name each result once")
    loaded = [(path, score.read_result(path)) for path in results]
    _refuse_mixed(loaded, over_seeds)
    trainings = [curves.read(run) for run in runs]
    groups = {group[0][0]: group for group in seeds.gathered(loaded)} if over_seeds else {}
    rows = arrange([(path, seeds.pooled(group)) for path, group in groups.items()] or loaded)
    rows = [replace(row, group=groups.get(row.path, ())) for row in rows]
    report = {**gather(rows, None if speed is None else timings.read(speed)), "runs": [training.to_dict() for training in trainings]}
    pictures = [(row.label, row.samples["images"]) for row in rows if row.samples]
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        head, count = next(iter(rows[0].result["metrics"])), report["protocol"]["count"]
        title = (f"{head}, {'lower' if arrow(head) == '↓' else 'higher'} is better{charts.without_bias(report['rows'])}\n"
                 f"({count:,} pictures, bars: 95 % of {charts.bars(report['rows'])})")
        drawn = (("quality_vs_nfe.png", charts.points(report["rows"], "nfe"), charts.NFE),
                 ("quality_vs_ms.png", charts.points(report["rows"], "ms_per_image"), charts.MS))
        for name, points, axis in drawn:
            if points:
                charts.plot_quality(points, axis, title).savefig(temporary / name, dpi=160)
        if pictures:
            alike = [(label, images) for label, images in pictures if images.shape[1:] == pictures[0][1].shape[1:]]
            columns = _columns(report["classes"]["names"], rows[0].prompts, min(len(images) for _, images in alike))
            charts.plot_samples(alike, columns).savefig(temporary / "samples.png", dpi=160)
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (temporary / "report.md").write_text(markdown(report, with_samples=bool(pictures)), encoding="utf-8")
        (temporary / "report.html").write_text(page.html(page.assemble(report, pictures, trainings)), encoding="utf-8")
        to.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, to / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _columns(classes: Sequence[str], prompts: Sequence[str], count: int) -> list[tuple[str, list[int]]]:
    """Which of the first `count` samples are shown, under what: some of every class where these are few, or else the first ones."""
    if classes and tables.few_classes(classes) and count >= len(classes):
        return [(name, list(range(c, count, len(classes)))[:PER_CLASS]) for c, name in enumerate(classes)]
    return [(prompts[i % len(prompts)] if prompts else "", [i]) for i in range(min(SHOWN, count))]


def _refuse_mixed(loaded: Sequence[seeds.Loaded], over_seeds: bool) -> None:
    head, first = loaded[0]
    for path, result in loaded[1:]:
        one, other = (seeds.without_seed(each["protocol"]) if over_seeds else each["protocol"] for each in (first, result))
        if one != other:
            told = told_apart(one, other)
            raise ValueError(f"{head} and {path} were scored under different protocols ({told}): score both under one")
        if list(result["metrics"]) != list(first["metrics"]):
            raise ValueError(f"{head} and {path} hold different metrics: score both again with one version")


def arrange(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> list[Row]:
    """Teachers before students; teachers from many steps to few, the best first; students by name, from few to many. Labels are unique."""
    rows, short = [], _short_names({str(result["model"]["name"]) for _, result in loaded})
    for path, result in loaded:
        sampler, is_teacher = result["sampler"], bool(result["model"].get("is_teacher", False))
        model = "teacher" if is_teacher else short[str(result["model"]["name"])]
        steps = len(sampler.get("times", ())) or sampler["nfe"]
        label = f"{model}, {steps} step{'s' if steps != 1 else ''}" if steps else model
        guidance = float(sampler.get("guidance", 1.0))
        rows.append(Row(path, model, label if guidance == 1 else f"{label}, w = {guidance:g}", steps, is_teacher, result))
    labels = [row.label for row in rows]
    rows = [replace(r, label=f"{r.label} ({r.path.stem})") if labels.count(r.label) > 1 else r for r in rows]
    head = next(iter(rows[0].result["metrics"]))
    teachers = sorted((r for r in rows if r.is_teacher), key=lambda r: (-r.steps, r.metric(head)["value"]))
    return teachers + sorted((r for r in rows if not r.is_teacher), key=lambda r: (r.model, r.nfe, r.label))


def _short_names(names: Collection[str]) -> dict[str, str]:
    """The fewest last parts of each path that keep the names apart."""
    parts = {name: re.split(r"[/\\]+", name.rstrip("/\\")) for name in names}
    for depth in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(p[-depth:]) for name, p in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


# ----------------------------------------------------------------------------------------------------------------------- what is compared


def pairings(rows: Sequence[Row]) -> Mapping[str, Pairing | OverSeeds]:
    """By metric, of those that leave something to subtract; empty for a single row."""
    if not rows[0].group:
        return _pairings(rows)
    found = [_pairings(seed) for seed in zip(*(row.each for row in rows), strict=True)]
    return {name: OverSeeds([each[name] for each in found]) for name in found[0] if all(name in each for each in found)}


def _pairings(rows: Sequence[Row]) -> dict[str, Pairing]:
    """Of one seed."""
    if len(rows) < 2:
        return {}
    protocol, out = Protocol.from_dict(rows[0].result["protocol"]), {}
    for name, measure in protocol.plan.items():
        found = [None if row.kept is None else measures.unpacked(row.kept, name, row.estimate(name)) for row in rows]
        made = [None if one is None or (one.left is None and one.values is None) else one for one in found]
        if any(made):
            out[name] = Pairing(KINDS[measure.kind], made)
    return out


def _completed(kept: dict[str, Tensor], protocol: Protocol) -> dict[str, Tensor]:
    """Features with what pairs them, which results from before it was kept lack: those are of the fashion world."""
    if protocol.name != "fashion" or any(key.startswith(("left/", "values/")) for key in kept):
        return kept
    found = {name: KINDS[measure.kind].find(Seen(protocol, measure, kept["labels"], kept["features"], real=fashion_reference()))
             for name, measure in protocol.plan.items() if measure.kind in ("frechet", "kid", "precision")}
    hits = {f"values/{name}": kept["predicted"] == kept["labels"]
            for name, measure in protocol.plan.items() if measure.kind == "accuracy" and "predicted" in kept}
    return {**kept, **measures.packed(found), **hits}


def judge(name: str, difference: Estimate, pictures: int | None = None, p: float = 0.0) -> str:
    """What a paired difference shows: better or worse where it is beyond two standard errors and its interval, and made of enough pictures
    (its samples unless told), else undecided. `p` is its p value where it is one of many, which must not be above 0.05."""
    low, high = difference.ci95
    if not enough(pictures or difference.n) or p > 0.05 or abs(difference.corrected) <= 2 * difference.se or low <= 0 <= high:
        return "undecided"
    return "better" if (difference.corrected > 0) == (arrow(name) == "↑") else "worse"


def differences(rows: Sequence[Row], paired: Mapping[str, Pairing | OverSeeds]) -> list[dict[str, Any] | None]:
    """Paired difference of each row to the first, by metric, where both kept their features; None for the first row."""
    return [None, *judged(subtracted(rows, paired), rows[0].result["protocol"]["count"])]


def subtracted(rows: Sequence[Row], paired: Mapping[str, Pairing | OverSeeds]) -> list[dict[str, Estimate]]:
    """Every further row minus the first, by metric, where both kept their features."""
    return [{name: e for name, pairing in paired.items() if (e := pairing.difference(i, 0)) is not None} for i in range(1, len(rows))]


def judged(found: Sequence[Mapping[str, Estimate]], count: int) -> list[dict[str, Any]]:
    """Differences of several rows to one, of `count` pictures, with what they show. Where the rows that have some are `tables.many`, each
    difference has a p value, too, adjusted for their number (Holm)."""
    adjusted = {name: alignment.holm({str(row): alignment.p_value(each[name]) for row, each in enumerate(found) if name in each})
                for name in {name: None for each in found for name in each}} if many(sum(map(bool, found))) else {}
    told = []
    for row, each in enumerate(found):
        p = {name: adjusted[name][str(row)] for name in each if adjusted}
        told.append({name: {"delta": e.value, "corrected": e.corrected, "se": e.se, "ci95": list(e.ci95),
                            "verdict": judge(name, e, count, p.get(name, 0.0)), **({"p_holm": p[name]} if adjusted else {})}
                     for name, e in each.items()})
    return told


def best(rows: Sequence[Row], name: str, pairing: Pairing | OverSeeds) -> int | None:
    """The row that is better than every other one by `judge`, if one is; p values are adjusted where the others are many, too."""
    sign, count = 1 if arrow(name) == "↑" else -1, rows[0].result["protocol"]["count"]
    top = max(range(len(rows)), key=lambda i: sign * rows[i].metric(name)["value"])
    found = [pairing.difference(top, i) for i in range(len(rows)) if i != top]
    told = [e for e in found if e is not None]
    p = alignment.holm({str(i): alignment.p_value(e) for i, e in enumerate(told)}) if many(len(found)) else {}
    ahead = [judge(name, e, count, p.get(str(i), 0.0)) == "better" for i, e in enumerate(told)]
    return top if len(told) == len(found) and all(ahead) else None


def _wins(paired: Mapping[str, Pairing | OverSeeds], row: int) -> dict[str, Any]:
    """Of a row against the first, by metric, where samples or prompts can be won."""
    return {name: {"ahead": won.ahead, "behind": won.behind, "decided": won.decided,
                   "win_rate": won.share and won.share.value, "ci95": won.share and list(won.share.ci95)}
            for name, pairing in paired.items() if (won := pairing.wins(row, 0)) is not None}


def _judged(row: Row, first: Row) -> dict[str, Any]:
    """What outside judges said of a row, each with its paired difference to the first row where both kept their scores."""
    return {name: {**{key: block[key] for key in ("value", "se", "ci95", "n")},
                   "difference": benchmarks.paired(block, there[name]) if row is not first and name in there else None}
            for there in (first.result.get("judges", {}),) for name, block in row.result.get("judges", {}).items()}


def _by_class(row: Row, protocol: Protocol, real: Tensor | None) -> dict[str, Any] | None:
    """By metric what each class has: means of its samples' values with standard errors, or the value that is told of a class, without one.
    `distance`: squared distance of the mean features to real ones (classes, d), where these are known. None without classes or features,
    and of several seeds."""
    kept = row.kept
    if kept is None or not protocol.classes:
        return None
    found: dict[str, Any] = {}
    for name, measure in protocol.plan.items():
        values = kept.get(f"values/{name}")
        if values is not None and KINDS[measure.kind].unit == "sample":
            found[name] = _block(breakdown.by_class(values, kept["labels"], protocol.classes))
        elif values is not None and KINDS[measure.kind].unit == "prompt":
            found[name] = {"value": values.tolist(), "se": None}
    if real is not None:
        member = metrics.members(protocol.count, protocol.groups, protocol.classes)
        found["distance"] = _block(breakdown.class_distances(kept["features"], kept["labels"], real, member))
    return found


def _block(estimates: Sequence[Estimate]) -> dict[str, list[float]]:
    return {"value": [e.value for e in estimates], "se": [e.se for e in estimates]}


def _by_prompt(rows: Sequence[Row], protocol: Protocol) -> dict[str, Any]:
    """`first`: the texts of the first prompts. `extremes`: by metric, of those that have a value for each prompt, the numbers and texts of
    the best and the worst, and each row's values of these (None without features, and of several seeds)."""
    if not protocol.prompts:
        return {"first": [], "extremes": {}}
    texts = max((row.prompts for row in rows), key=len)
    found: dict[str, Any] = {}
    for name, measure in protocol.plan.items():
        told = [None if row.kept is None else row.kept.get(f"values/{name}") for row in rows]
        known = [values for values in told if values is not None]
        if KINDS[measure.kind].unit == "prompt" and known:
            chosen = breakdown.extremes(torch.stack(known), KINDS[measure.kind].better == "↑")
            found[name] = {"count": len(known[0]), "chosen": chosen,
                           "texts": [texts[i] if i < len(texts) else f"prompt {i}" for i in chosen],
                           "values": [None if values is None else values[chosen].tolist() for values in told]}
    return {"first": list(texts[:SHOWN]), "extremes": found}


def gather(rows: Sequence[Row], speed: timings.Timings | None = None) -> dict[str, Any]:
    """report.json's content but for the runs: every row with what can be said of it. Milliseconds are those of `speed` where it is given:
    None for a row that it does not time."""
    clocked = [None for _ in rows] if speed is None else speed.told([row.result for row in rows])
    block = None if speed is None else speed.describe(clocked)
    protocol, paired = Protocol.from_dict(rows[0].result["protocol"]), pairings(rows)
    real, names, floor = None, [f"class {c}" for c in range(protocol.classes)], torch.zeros(0)
    if protocol.name == "fashion":
        reference, names = fashion_reference(), list(CLASSES)
        real = breakdown.class_means(reference.test_features, reference.test_labels, protocol.classes)
        floor = (breakdown.class_means(reference.train_features, reference.train_labels, protocol.classes) - real).square().sum(1)
    leading = {name: best(rows, name, pairing) for name, pairing in paired.items()}
    same, differing = provenance.environments([row.result for row in rows])
    told = [{"label": row.label, "series": row.series, "result": str(row.path), "is_teacher": row.is_teacher, "nfe": row.nfe,
             "ms_per_image": row.ms if block is None else ms and ms[block["span"]], "ms": ms, "metrics": row.result["metrics"],
             "best": [name for name, leader in leading.items() if leader == i],
             "difference": difference, "wins": _wins(paired, i) if i else None, "classes": _by_class(row, protocol, real),
             "features": all(each.kept is not None for each in row.each), "teacher": row.result["teacher"],
             "memory": row.result.get("memory"), "judges": _judged(row, rows[0]), "groups": row.result.get("groups"),
             "shuffled": row.result.get("shuffled", {}),
             **provenance.origin(row.result), "seeds": seeds.told(row.group) if row.group else None,
             "commands": [provenance.command(each.result, each.path.name) for each in row.each]}
            for i, (row, ms, difference) in enumerate(zip(rows, clocked, differences(rows, paired), strict=True))]
    return {"protocol": rows[0].result["protocol"], "protocol_hash": rows[0].result["protocol_hash"], "first": rows[0].label,
            "seeds": [each.result["protocol"]["seed"] for each in rows[0].each],
            "rows": [{**row, "verdict": verdict(row, told) if i and not row["is_teacher"] else None} for i, row in enumerate(told)],
            "classes": {"names": names, "real_distance": floor.tolist()}, "prompts": _by_prompt(rows, protocol),
            "environment": {"same": same, "differing": differing}, "speed": block}


def verdict(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A row against the first of all: `word` is better, worse, undecided, or unpaired; `text` is the first metric in numbers, beside the
    teacher's cut to as few network evaluations, and a sentence on where the other metrics stand."""
    (head, *others), first = row["metrics"], rows[0]
    value = lambda of: number(of["metrics"][head]["value"], of["metrics"][head]["se"])                                       # noqa: E731
    whose = "the teacher's" if first["is_teacher"] else "the first row's"
    better, calls = "lower" if arrow(head) == "↓" else "higher", plural(row["nfe"], "network evaluation")
    said = [f"{head} ({better} is better) is {value(row)} with {calls} per picture, against {whose} {value(first)} with {first['nfe']}."]
    block = row["difference"].get(head)
    if block is None:
        word = "unpaired"
        said.append("Without the features of both there is no paired difference, and no claim.")
    else:
        word = block["verdict"]
        small = f"too {'small' if enough(row['metrics'][head]['n']) else 'uncertain from so few pictures'} to call either better"
        p = f", p {p_value(block)} adjusted for the number of rows" if p_value(block) else ""
        said.append(f"Paired difference {delta(block)}{p}, {small if word == 'undecided' else f'so {word}'}.")
    if cut := [other for other in rows[1:] if other["is_teacher"] and row["nfe"] <= other["nfe"] < first["nfe"]]:
        least = min(cut, key=lambda other: int(other["nfe"]))
        said.append(f"The teacher itself, cut to {plural(least['nfe'], 'evaluation')}, is at {value(least)}.")
    stands = {name: row["difference"][name]["verdict"] if name in row["difference"] else "unpaired" for name in others}
    words = {"better": "better", "worse": "worse", "undecided": "undecided", "unpaired": "without a paired error, so without a claim,"}
    named = {kind: ", ".join(name for name in others if stands[name] == kind) for kind in words}
    if others:
        said.append(f"By the other measures {'; '.join(f'{words[kind]} in {names}' for kind, names in named.items() if names)}.")
    return {"word": word, "text": " ".join(said)}
