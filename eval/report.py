"""Results of one protocol side by side: report.md, report.json, quality_vs_nfe.png, samples.png."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from stepdistill.eval import metrics, score
from stepdistill.eval.metrics import Estimate
from stepdistill.eval.protocol import Protocol, differing_fields, fashion_reference
from stepdistill.worlds.fashion.data import CLASSES

INK, GREY, TEACHER = "#1f2933", "#8a94a0", "#52606d"
COLOURS = ("#0b6e99", "#d1495b", "#2e933c", "#b8741a", "#7b4ea3", "#00798c", "#8c5e58", "#5f6caf")
BETTER = {"frechet": "↓", "kid": "↓", "precision": "↑", "recall": "↑", "accuracy": "↑"}
PER_CLASS = 2                                           # columns of each class in samples.png


@dataclass(frozen=True)
class Row:
    """One result: where it lies, what it is called, and its block of the result file."""

    path: Path
    model: str
    label: str
    steps: int
    is_teacher: bool
    result: dict[str, Any]

    @property
    def nfe(self) -> int:
        """Network evaluations per picture, both halves of guidance counted."""
        return int(self.result["sampler"]["nfe"])

    @property
    def ms(self) -> float:
        return float(self.result["speed"]["ms_per_image"])

    def metric(self, name: str) -> dict[str, Any]:
        return self.result["metrics"][name]


def compare(results: list[Path], to: Path) -> dict[str, Any]:
    """Write the report into the folder `to`; returns report.json's content.

    Raises ValueError for results of unequal protocols, naming the fields that differ. Teachers come first, the one of most steps (and
    of those the best) at the head; every paired difference is to that first row.
    """
    if to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file: name a folder with --to")
    if not results:
        raise ValueError("nothing to compare: name at least one result file")
    if repeated := sorted({str(p) for p in results if sum(q.resolve() == p.resolve() for q in results) > 1}):
        raise ValueError(f"{repeated[0]} is named twice: name each result once")
    loaded = [(path, score.read_result(path)) for path in results]
    _refuse_mixed(loaded)
    rows = arrange(loaded)
    names = list(rows[0].result["metrics"])
    report: dict[str, Any] = {
        "protocol": rows[0].result["protocol"], "protocol_hash": rows[0].result["protocol_hash"], "first": rows[0].label,
        "rows": [{"label": row.label, "result": str(row.path), "is_teacher": row.is_teacher, "nfe": row.nfe, "ms_per_image": row.ms,
                  "metrics": row.result["metrics"], "difference": difference}
                 for row, difference in zip(rows, differences(rows), strict=True)],
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        plot_quality(rows, names[0]).savefig(temporary / "quality_vs_nfe.png", dpi=160)
        pictures = [(row, images) for row in rows if (images := _samples(row)) is not None]
        if pictures:
            plot_samples(pictures).savefig(temporary / "samples.png", dpi=160)
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (temporary / "report.md").write_text(markdown(report, names, with_samples=bool(pictures)))
        to.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, to / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _refuse_mixed(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    head, first = loaded[0]
    for path, result in loaded[1:]:
        if result["protocol_hash"] != first["protocol_hash"]:
            fields = differing_fields(first["protocol"], result["protocol"])
            told = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in fields.items())
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
        label = f"{model}, {steps} step{'s' if steps != 1 else ''}"
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


def differences(rows: Sequence[Row]) -> list[dict[str, Any] | None]:
    """Paired difference of each row to the first, by metric, where both kept their features; None for the first row."""
    kept = [score.read_tensors(score.features_path(r.path, r.result["protocol"]["extractor"]), r.result) for r in rows]
    first = kept[0]
    out: list[dict[str, Any] | None] = [None]
    if len(rows) == 1:
        return out
    protocol = Protocol.from_dict(rows[0].result["protocol"])
    reference = fashion_reference()

    def prepared(kind: str, make: Callable[[Tensor], Any], subtract: Callable[[Any, Any], Estimate]) -> dict[str, list[Estimate | None]]:
        name = next((n for n in protocol.metrics if n.startswith(kind)), None)
        if name is None or first is None:
            return {}
        head = make(first["features"])
        return {name: [None if t is None else subtract(make(t["features"]), head) for t in kept[1:]]}

    table = prepared("frechet", lambda f: score.groups(f, protocol), lambda a, b: metrics.paired_frechet(a, b, reference.train))
    table |= prepared("kid", lambda f: score.kernel_sums(f, protocol, reference), metrics.paired_kid)
    if first is not None and "predicted" in first:
        hits = [None if t is None else t["predicted"] == t["labels"] for t in kept]
        name = next(n for n in protocol.metrics if n.startswith("accuracy"))
        table[name] = [None if h is None else metrics.paired_accuracy(h, hits[0]) for h in hits[1:]]
    for i in range(len(rows) - 1):
        blocks = {name: e.to_dict() for name, column in table.items() if (e := column[i]) is not None}
        out.append({name: {"delta": b["value"], **{k: b[k] for k in ("corrected", "se", "ci95")}} for name, b in blocks.items()})
    return out


def _samples(row: Row) -> Tensor | None:
    tensors = score.read_tensors(row.path.with_name(row.result["samples"]), row.result) if row.result["samples"] else None
    return None if tensors is None else tensors["images"]


# ------------------------------------------------------------------------------------------------------------------------------- the page


def number(value: float, se: float) -> str:
    """Digits down to the second of the error."""
    places = 4 if se <= 0 else max(0, min(6, 1 - int(torch.tensor(se).log10().floor())))
    return f"{value:.{places}f} ± {se:.{places}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def markdown(report: dict[str, Any], names: Sequence[str], with_samples: bool) -> str:
    """The page: what was measured, the table, the differences, the pictures."""
    protocol = report["protocol"]
    heads = ["model", "NFE", *(f"{name} {BETTER[name.split('_')[0]]}" for name in names), "ms / image"]
    lines = [
        f"# {protocol['name']}: {protocol['count']:,} pictures, seed {protocol['seed']}", "",
        f"Protocol `{report['protocol_hash']}`. Values are what the formula gives on all pictures, ± one standard error of the generated "
        "sample (one training run each; the spread between training runs is not in it). NFE counts both halves of guidance.", "",
        _line(heads), f"|:--|{'--:|' * (len(heads) - 1)}",
    ]
    for row in report["rows"]:
        cells = [row["label"], str(row["nfe"]), *(number(row["metrics"][n]["value"], row["metrics"][n]["se"]) for n in names)]
        lines.append(_line([*cells, f"{row['ms_per_image']:.2f}"]))
    compared = [row for row in report["rows"] if row["difference"]]
    if compared:
        shown = [n for n in names if n in compared[0]["difference"]]
        lines += ["", f"## Difference to {report['first']}", "",
                  "Same noise, same labels, same groups, so what both models share cancels. In brackets the 95 % interval, which stands "
                  "around the difference without its bias.", "",
                  _line(["model", *shown]), f"|:--|{'--:|' * len(shown)}"]
        for row in compared:
            cells = []
            for block in (row["difference"][name] for name in shown):
                places = number(0, block["se"]).split(" ")[0].partition(".")[2]
                low, high = (f"{x:+.{len(places)}f}" for x in block["ci95"])
                cells.append(f"{number(block['delta'], block['se'])} [{low}, {high}]")
            lines.append(_line([row["label"], *cells]))
    lines += ["", f"![{names[0]} against network evaluations](quality_vs_nfe.png)"]
    lines += ["", "![samples of every model from the same seeds](samples.png)"] if with_samples else []
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------------------------- pictures


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that belong on one line: the same model (and guidance) at several step counts."""
    out: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.nfe):
        guidance = float(row.result["sampler"].get("guidance", 1.0))
        out.setdefault(row.model if guidance == 1 else f"{row.model}, w = {guidance:g}", []).append(row)
    return out


def plot_quality(rows: Sequence[Row], name: str) -> Figure:
    """The first metric against network evaluations, both axes logarithmic where the values allow it; bars are 95 % intervals."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    values = [row.metric(name)["value"] for row in rows]
    axes.set_xscale("log")
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
    teachers = [row for row in rows if row.is_teacher]
    colours, labels = iter(COLOURS * len(rows)), []
    for label, line in _series(rows).items():
        colour = TEACHER if line[0].is_teacher else next(colours)
        x, y = [r.nfe for r in line], [r.metric(name)["value"] for r in line]
        half = [(r.metric(name)["ci95"][1] - r.metric(name)["ci95"][0]) / 2 for r in line]
        marker = "s" if line[0].is_teacher else "o"
        axes.errorbar(x, y, half, color=colour, marker=marker, markersize=6, linewidth=1.6, capsize=3, markeredgecolor="white", zorder=3)
        labels.append((label, x[0], y[0], colour))
    if teachers:
        best = min(teachers, key=lambda r: r.metric(name)["value"])
        level = best.metric(name)["value"]
        axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(f"best teacher: {best.label.removeprefix('teacher, ')}, {level:.3g}", (0, level), xycoords=("axes fraction", "data"),
                      xytext=(4, -5), textcoords="offset points", va="top", color=GREY, fontsize=9)
    ticks = sorted({row.nfe for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * max(1.5, (ticks[-1] / ticks[0]) ** 0.25))
    _tidy(axes)
    count = rows[0].result["protocol"]["count"]
    axes.set_xlabel("network evaluations per picture (both halves of guidance counted)", color=INK)
    axes.set_title(f"{name}, lower is better ({count:,} pictures, bars: 95 % of the generated sample)", loc="left", fontsize=11, color=INK)
    _label(figure, axes, labels)
    return figure


def _label(figure: Figure, axes: Axes, labels: Sequence[tuple[str, float, float, str]], size: float = 10) -> None:
    """Names beside the first point of each line, pushed up where they would lie on one another."""
    figure.draw_without_rendering()                                             # the layout settles where data coordinates lie
    placed: list[tuple[float, float, float]] = []
    unit = figure.dpi / 72
    at = {name: axes.transData.transform((x, y)) / unit for name, x, y, _ in labels}            # in points
    for name, x, y, colour in sorted(labels, key=lambda item: at[item[0]][1]):
        left, low, width = at[name][0] + 9, at[name][1] + 4, 0.65 * size * len(name)
        for other_left, other_low, other_width in placed:
            if left < other_left + other_width and other_left < left + width and low < other_low + 1.25 * size:
                low = other_low + 1.25 * size
        placed.append((left, low, width))
        axes.annotate(name, (x, y), xytext=(9, low - at[name][1]), textcoords="offset points", color=colour, fontsize=size, weight="bold",
                      zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, which="both")
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8, zorder=0)


def plot_samples(pictures: Sequence[tuple[Row, Tensor]]) -> Figure:
    """One strip a model, the same seeds in the same columns, class by class."""
    classes = len(CLASSES)
    count = min(len(images) for _, images in pictures)
    columns = [i for c in range(classes) for i in range(c, count, classes)[:PER_CLASS]]
    cell, gap, group = 28, 2, 6                                                 # pixels: a picture, between pictures, between classes
    lefts = [k * (cell + gap) + (columns[k] % classes) * group for k in range(len(columns))]
    width = lefts[-1] + cell
    scale, margin = 11 / width, 1.9                                             # inches per pixel, inches of labels
    height = 0.42 + len(pictures) * (cell + 5) * scale
    figure = Figure(figsize=(width * scale + margin + 0.15, height))
    for number, (row, images) in enumerate(pictures):
        strip = torch.full((cell, width), 255, dtype=torch.uint8)
        for left, index in zip(lefts, columns, strict=True):
            strip[:, left : left + cell] = images[index, 0]
        bottom, across = height - 0.3 - (number + 1) * (cell + 5) * scale, figure.get_figwidth()
        axes = figure.add_axes((margin / across, bottom / height, width * scale / across, cell * scale / height))
        axes.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        name, _, rest = row.label.partition(", ")
        axes.text(-0.012, 0.5, f"{name}\n{rest}", transform=axes.transAxes, ha="right", va="center", fontsize=9.5, color=INK)
        if number == 0:
            for c in range(classes):
                ends = [left for left, index in zip(lefts, columns, strict=True) if index % classes == c]
                axes.text((ends[0] + ends[-1] + cell) / 2, -5, CLASSES[c], ha="center", va="bottom", fontsize=9, color=INK)
    return figure
