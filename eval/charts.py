"""The figures of a report: PNG files beside the Markdown, SVG inside the page, where they take the page's colours."""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any, Literal

import torch
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from stepdistill.eval.tables import biased

INK, GREY, LINE, PAPER, TEACHER = "#1f2933", "#69737e", "#e4e7eb", "#ffffff", "#52606d"
COLOURS = ("#0b6e99", "#c73b4f", "#25813a", "#9c6010", "#7b4ea3", "#00798c", "#8c5e58", "#5f6caf")
MARKERS = ("o", "D", "^", "v", "P", "X", "p", "h")      # of students; the teacher's are squares and hollow ones
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
PROPERTIES = {INK: "--ink", GREY: "--grey", LINE: "--line", PAPER: "--paper", TEACHER: "--teacher",
              **{colour: f"--series-{i}" for i, colour in enumerate(COLOURS)}}          # what page.html calls them
NFE, MS = "network evaluations per picture", "milliseconds per picture"
COST, CLASS_WIDTH, CURVE = (4.0, 3.3), 4.4, (3.2, 2.2)  # inches of the page's figures: small, so that a phone does not shrink their text
LETTERS, HANDLE = 40, 6                                 # letters in a row of a curve's legend, and what a piece of line takes of them
MANY, LONG = 6, 24                                      # names and characters of one that have room beside the points
WIDE = 8                                                # largest over smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A model between cost x and distance y, whose 95 % interval is `low` to `high`. Points of one series are joined."""

    label: str
    series: str
    is_teacher: bool
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Dots:
    """A model's value in every class, with half of each 95 % interval."""

    label: str
    series: str
    is_teacher: bool
    values: Sequence[float]
    halves: Sequence[float]


def palette(marks: Sequence[Point | Dots]) -> dict[str, str]:
    """Series to colour, the same in every figure that shows the models in one order."""
    colours = cycle(COLOURS)
    return {mark.series: TEACHER if mark.is_teacher else next(colours) for mark in {m.series: m for m in marks}.values()}


def points(rows: Sequence[Mapping[str, Any]], cost: Literal["nfe", "ms_per_image"]) -> list[Point]:
    """The first metric of report.json's rows, as their interval stands around it (without its bias, or the mean over seeds), against one of
    their costs, where that is known."""
    head = next(iter(rows[0]["metrics"]))
    return [Point(row["label"], row["series"], row["is_teacher"], row[cost], block["value" if row["seeds"] else "corrected"],
                  *block["ci95"]) for row in rows for block in (row["metrics"][head],) if (row[cost] or 0) > 0]


def without_bias(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a caption adds where the values of `points` are not the table's."""
    head = next(iter(rows[0]["metrics"]))
    return ", values without bias" if any(biased(row["metrics"][head]) and not row["seeds"] for row in rows) else ""


def bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of `points` are of."""
    return "the mean over seeds" if any(row["seeds"] for row in rows) else "the generated sample"


def front(points: Sequence[Point]) -> list[Point]:
    """Pareto front: the points that no cheaper one equals, from the cheapest to the best. By the values alone, not their errors."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def plot_quality(points: Sequence[Point], xlabel: str, title: str = "", size: tuple[float, float] = (8, 4.8)) -> Figure:
    """Distance against cost, axes logarithmic where the values allow it. Bars are 95 % intervals, the dotted steps the Pareto front."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    costs, values = sorted({p.x for p in points}), [p.y for p in points]
    counted = all(float(x).is_integer() for x in costs)
    if counted or costs[-1] > WIDE * costs[0]:
        axes.set_xscale("log")
        axes.set_xlim(costs[0] / 1.25, costs[-1] * 1.35)
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    colours, labels = palette(points), []
    # strict=False here and below: the names end, the cycles do not
    markers = dict(zip((s for s, colour in colours.items() if colour != TEACHER), cycle(MARKERS), strict=False))
    for series, colour in colours.items():
        line = sorted((p for p in points if p.series == series), key=lambda p: p.x)
        reach = [[max(0.0, p.y - p.low) for p in line], [max(0.0, p.high - p.y) for p in line]]
        axes.errorbar([p.x for p in line], [p.y for p in line], reach, color=colour, marker=markers.get(series, "s"), markersize=6.5,
                      linewidth=1.6, capsize=3, markeredgecolor=PAPER, zorder=3, label=series)
        labels.append((series, line[0].x, line[0].y, colour))
    best = front(points)
    axes.plot([p.x for p in best], [p.y for p in best], color=GREY, linewidth=1.4, linestyle=(0, (1, 2)), drawstyle="steps-post", zorder=2)
    if teachers := [p for p in points if p.is_teacher]:
        level = min(teachers, key=lambda p: p.y)
        axes.axhline(level.y, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        side = 1 if level.x == min(p.x for p in points) else -1                  # beside its bar, where other points are
        axes.annotate(f"best teacher: {level.y:.3g}", (level.x, level.y), xytext=(8 * side, -6), textcoords="offset points",
                      ha="left" if side > 0 else "right", va="top", color=GREY, fontsize=9)
    axes.margins(y=0.14)                                # room for the name of what stands highest
    _plain(axes)
    if counted:
        axes.xaxis.set_major_locator(FixedLocator(costs))
    tidy(axes)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    if len(labels) <= MANY and max(len(name) for name, *_ in labels) <= LONG:
        _label(figure, axes, labels)
    else:
        figure.set_figheight(size[1] + 0.2 * _legend(figure, *axes.get_legend_handles_labels(), "outside lower left"))
    return figure


def shortened(name: str, most: int) -> str:
    """Its first and last parts where it has more than so many characters."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[most // 3 + 1 - most :]}"


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], where: str) -> int:
    """In two columns where the names are short; returns the number of its lines."""
    names = [shortened(label, 2 * LONG) for label in labels]
    columns = 2 if max(map(len, names)) <= LONG + 4 else 1
    figure.legend(handles, names, loc=where, ncols=columns, frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.3, columnspacing=1.2)
    return -(-len(names) // columns)


def _label(figure: Figure, axes: Axes, labels: Sequence[tuple[str, float, float, str]], size: float = 10) -> None:
    """Names beside the first point of each line: to its left where the right has no room, pushed up where they would lie on one another."""
    figure.draw_without_rendering()                                             # the layout settles where data coordinates lie
    placed: list[tuple[float, float, float]] = []
    unit = figure.dpi / 72
    edge = axes.get_window_extent().x1 / unit
    at = {name: axes.transData.transform((x, y)) / unit for name, x, y, _ in labels}            # in points
    for name, x, y, colour in sorted(labels, key=lambda item: at[item[0]][1]):
        low, width = at[name][1] + 4, 0.65 * size * len(name)
        right = at[name][0] + 9 + width <= edge
        left = at[name][0] + 9 if right else at[name][0] - 9 - width
        for other_left, other_low, other_width in placed:
            if left < other_left + other_width and other_left < left + width and low < other_low + 1.25 * size:
                low = other_low + 1.25 * size
        placed.append((left, low, width))
        axes.annotate(name, (x, y), xytext=(9 if right else -9, low - at[name][1]), textcoords="offset points",
                      ha="left" if right else "right", color=colour, fontsize=size, weight="bold", zorder=4,
                      path_effects=[withStroke(linewidth=3, foreground=PAPER)])


def _plain(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 of every power where an axis is logarithmic, and no powers in their labels."""
    for scale, axis in ((axes.get_xscale(), axes.xaxis), (axes.get_yscale(), axes.yaxis)):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
    """The house's lines: two spines, a pale grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, which="both")
    axes.grid(axis=grid, color=LINE, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def plot_classes(classes: Sequence[str], dots: Sequence[Dots], xlabel: str, *, real: Sequence[float] = (), least: float = 0.0) -> Figure:
    """A line a class, a mark a model, on a logarithmic axis. `real` are the values of real pictures. Shares, which may be 0, are drawn in
    proportion below `least`."""
    figure = Figure(figsize=(CLASS_WIDTH, 0.9 + 0.5 * len(classes) + 0.1 * len(dots)), layout="constrained")
    axes = figure.subplots()
    if least:
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    else:
        axes.set_xscale("log")
    colours, gap = palette(dots), 0.72 / len(dots)
    students, hollow = cycle(MARKERS), cycle(("s", *MARKERS[1:]))
    for number, dot in enumerate(dots):
        heights = [c + (number - (len(dots) - 1) / 2) * gap for c in range(len(classes))]
        below = [min(half, 0.95 * value) for half, value in zip(dot.halves, dot.values, strict=True)]
        colour = colours[dot.series]
        face = PAPER if dot.is_teacher and number else colour                   # the first row alone is a full square
        axes.errorbar(dot.values, heights, xerr=[below, list(dot.halves)], linestyle="none", color=colour, elinewidth=1, zorder=3,
                      marker=next(hollow if dot.is_teacher else students), markersize=5.5, markerfacecolor=face, markeredgewidth=1.1,
                      label=dot.label)
    if real:
        axes.plot(real, range(len(classes)), linestyle="none", marker="|", markersize=17, markeredgewidth=1.6, color=GREY,
                  label="real pictures")
    for boundary in range(1, len(classes)):
        axes.axhline(boundary - 0.5, color=LINE, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    tidy(axes, "x")
    axes.tick_params(axis="y", length=0)
    if least:
        axes.xaxis.set_major_locator(FixedLocator([0.0, *(10.0**k for k in range(math.ceil(math.log10(least) - 1e-9), 1))]))
        axes.set_xlim(-0.3 * least, 1.5 * max(max(dot.values) for dot in dots) + least)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter((lambda v, _: f"{100 * v:g} %") if least else (lambda v, _: f"{v:g}")))
    axes.set_xlabel(xlabel, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    first = len(labels) - len(dots)                                             # the models come before the real pictures
    _legend(figure, handles[first:] + handles[:first], labels[first:] + labels[:first], "outside upper left")
    return figure


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], logarithmic: bool = False) -> Figure:
    """Small: logged values over steps, pale where there are many, with their running median; one line a name."""
    figure = Figure(figsize=CURVE, layout="constrained")
    axes, labels = figure.subplots(), _short(list(curves))
    drawn = [value for points in curves.values() for _, value in points]
    if logarithmic and min(drawn) > 0 and max(drawn) > WIDE * min(drawn):
        axes.set_yscale("log")
    # colours and dashes begin again, without end
    for (name, points), colour, dashes in zip(curves.items(), cycle(COLOURS), cycle(DASHES), strict=False):
        steps, values = [step for step, _ in points], [value for _, value in points]
        window = len(values) // 40
        if window:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        calm = [statistics.median(values[max(0, i - window) : i + window + 1]) for i in range(len(values))]
        axes.plot(steps, calm, color=colour, linewidth=1.7, linestyle=dashes, marker="" if window else "o", markersize=4,
                  label=labels[name])
    _plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_yscale() == "linear":                   # by itself it would change its ticks with the room that was made for them
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    tidy(axes)
    axes.set_xlabel("step", color=INK)
    if len(curves) > 1:
        columns = max(1, min(4, LETTERS // (HANDLE + max(map(len, labels.values())))))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.8, columnspacing=1)
    return figure


def _short(names: Sequence[str]) -> dict[str, str]:
    """What tells curves apart: the role where that differs, else the name without its role and the words that all begin with."""
    if len({name.partition("/")[0] for name in names}) > 1:
        return {name: name.partition("/")[0] for name in names}
    words = [name.partition("/")[2].split("_") for name in names]
    # names have words in different numbers: up to the end of the shortest
    alike = next((i for i, each in enumerate(zip(*words, strict=False)) if len(set(each)) > 1), min(map(len, words)))
    return {name: "_".join(each[min(alike, len(each) - 1):]) for name, each in zip(names, words, strict=True)}


def plot_samples(pictures: Sequence[tuple[str, Tensor]], groups: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """One strip a model, from its label and uint8 pictures (N, C, H, W) of one size, grey or in colours; columns are the same samples.

    `groups` are titles and the numbers of the samples under each; they stand a little apart.
    """
    high, wide = pictures[0][1].shape[-2:]
    gap = max(2, wide // 14)                                                    # pixels between pictures; three of them between groups
    spans, left = [], 0
    for _, members in groups:
        spans.append([left + k * (wide + gap) for k in range(len(members))])
        left = spans[-1][-1] + wide + 3 * gap
    width = left - 3 * gap
    scale, margin = 11 / width, 1.9                                             # inches per pixel, inches of labels
    heads = [_folded(title, (span[-1] + wide + gap - span[0]) * scale) for (title, _), span in zip(groups, spans, strict=True)]
    above, row = 0.16 + 0.14 * max(head.count("\n") + 1 for head in heads), (high + gap) * scale                # inches
    across, height = 11 + margin + 0.15, above + 0.1 + len(pictures) * row
    figure = Figure(figsize=(across, height))
    for number, (label, images) in enumerate(pictures):
        strip = torch.full((high, width, 3), 255, dtype=torch.uint8)
        for (_, members), span in zip(groups, spans, strict=True):
            for x, index in zip(span, members, strict=True):
                strip[:, x : x + wide] = images[index].permute(1, 2, 0)
        axes = figure.add_axes((margin / across, (height - above - (number + 1) * row) / height, 11 / across, high * scale / height))
        axes.imshow(strip.numpy(), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        name, _, rest = label.partition(", ")
        lines = [shortened(name, LONG), *textwrap.wrap(rest, LONG + 2)]
        axes.text(-0.012, 0.5, "\n".join(lines), transform=axes.transAxes, ha="right", va="center", fontsize=9.5, color=INK)
        for head, span in zip(heads, spans, strict=True) if number == 0 else ():
            axes.text((span[0] + span[-1] + wide) / 2, -0.05 / scale, head, ha="center", va="bottom", fontsize=9, color=INK)
    return figure


def _folded(title: str, inches: float) -> str:
    """A title in up to three lines, for text of nine points."""
    return "\n".join(textwrap.wrap(title, max(6, int(inches * 14)), max_lines=3, placeholder="…"))


def svg(figure: Figure, name: str, words: str) -> str:
    """A figure as one SVG element for the inside of a page. Its colours are the page's custom properties, its ids begin with `name`, which
    must be unique in the page, and `words` say to a screen reader what it shows."""
    written = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True)
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(PROPERTIES), lambda found: f"var({PROPERTIES[found[0]]})", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1).strip()
