"""The page of a report: report.json's content, pictures and training curves as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from stepdistill.eval import charts, metrics, tables
from stepdistill.eval.curves import Training
from stepdistill.eval.tables import Table
from stepdistill.images import to_image

TEMPLATE = "page.html"
MARKS = {"better": "▲", "worse": "▼", "undecided": "≈", "unpaired": "?",      # beside a word, for those who see no colours
         "healthy": "✓", "ill": "▼", "unknown": "?"}
SHOWN = 4                                               # pictures of each class and model
CLASSES, CAPTION = 20, 160                              # most grids of classes, and characters of a prompt above one
NARROW = 40                                             # most characters of a prompt above a column of single pictures
LARGE = 56                                              # CSS pixels that a small picture is shown wide, about
GAP, MIDDLE = 1, 128                                    # pixels between pictures, and their grey: seen on black and on white
TOGETHER = re.compile(r"\[.*?\]| ?[±=] ?|≠ | (?=[%↓↑]|steps?\b)")              # of a sentence, on one line


@dataclass(frozen=True)
class Chart:
    """A figure of `charts.svg` with what is to be seen in it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Strip:
    """A model's pictures of one class, as a data URI of a PNG in its own pixels; it is shown `width` by `height` CSS pixels large."""

    model: str
    uri: str
    width: int
    height: int
    words: str


@dataclass(frozen=True)
class Page:
    """What the template shows, from top to bottom. `judged` are the rows of report.json that have a verdict."""

    title: str
    lead: str
    warning: str
    judged: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    scores: Sequence[Table]                              # as the formulas give them, and without bias
    glossary: Mapping[str, str]
    paired: Sequence[Table]
    costs: Sequence[Chart]
    prompted: bool                                       # whether it is taken apart by prompts, or by classes
    class_charts: Sequence[Chart]
    class_tables: Sequence[Table]
    grids: Sequence[tuple[str, Sequence[Strip]]]         # by class or prompt
    matrix: Sequence[tuple[str, Sequence[Strip | None]]]     # the same by model, or nothing
    runs: Sequence[tuple[Training, Sequence[Chart]]]
    protocol: Mapping[str, str]
    environment: Mapping[str, str]                       # what all rows share
    made: Table                                          # row by row, what they do not
    commands: Sequence[str]


def assemble(report: Mapping[str, Any], pictures: Sequence[tuple[str, Tensor]], trainings: Sequence[Training]) -> Page:
    """From report.json's content, each row's label and first pictures (uint8, (n, C, H, W), sample i of class or prompt i mod their
    number), and runs."""
    rows, protocol = report["rows"], report["protocol"]
    students, teachers = tables.sides(report)
    who = [tables.plural(students, "student")] * bool(students) + [f"{tables.plural(teachers, 'sampling')} of the teacher"] * bool(teachers)
    lead = f"{' and '.join(who)}: {protocol['count']:,} pictures of {protocol['dataset']} each, from the same seeds."
    lead += f" All are held against the first row: {report['first']}." if len(rows) > 1 else ""
    notes = [tables.errors(report), *filter(None, [tables.correction(report)])]
    if alone := [row["label"] for row in rows if not row["features"]]:
        notes.append(f"Without features beside its result, and so without paired differences: {'; '.join(alone)}.")
    grids = _grids(report, pictures)
    return Page(
        title=tables.title(report), lead=lead, warning=tables.warning(report), judged=[row for row in rows if row["verdict"]], notes=notes,
        scores=[tables.scores(report), *tables.without_bias(report), *tables.shuffled(report)], glossary=tables.glossary(report),
        paired=tables.paired(report),
        costs=_costs(report), prompted="prompts" in protocol, class_charts=_class_charts(report), class_tables=tables.by_class(report),
        grids=grids, matrix=matrix(grids),
        runs=[(training, _curves(training, f"run{i}")) for i, training in enumerate(trainings)],
        protocol={"hash": report["protocol_hash"], **{k: _told(v) for k, v in protocol.items()}},
        environment=report["environment"]["same"], made=tables.made(report),
        commands=[command for row in rows for command in row["commands"]])


def _told(value: Any) -> str:
    """A field of the protocol."""
    if isinstance(value, dict):
        return " ".join(str(each) for each in value.values() if each)
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)


def html(page: Page) -> str:
    """The file's text. Everything but the figures is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": prose, "parts": parts}
    template = environment.from_string(resources.files("stepdistill.eval").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(page=page, marks=MARKS, long=charts.LONG) + "\n"


def prose(text: str) -> str:
    """With unbreakable spaces in what stands together."""
    return TOGETHER.sub(lambda found: found[0].replace(" ", "\u00a0"), text)


def parts(cell: str) -> list[str]:
    """A cell's text where a line of it may end: before a bracket, and behind a comma outside of one."""
    return re.split(r" (?=\[)|(?<=,) (?![^\[]*\])", cell)


def strip(model: str, words: str, pictures: Tensor) -> Strip:
    """uint8 pictures (N, C, H, W) side by side, shown in whole multiples of their pixels."""
    image = to_image(torch.cat([pad(picture, (0, GAP), value=MIDDLE) for picture in pictures], 2)[..., :-GAP])
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True)
    uri, times = base64.b64encode(written.getvalue()).decode(), max(1, round(LARGE / pictures.shape[-1]))
    return Strip(model, f"data:image/png;base64,{uri}", times * image.width, times * image.height, words)


def matrix(grids: Sequence[tuple[str, Sequence[Strip]]]) -> list[tuple[str, list[Strip | None]]]:
    """Grids as rows of one table, model by model, where each strip is one small picture under few words; otherwise nothing."""
    if len(grids) < 2 or any(len(name) > NARROW or strip.width > 2 * LARGE for name, strips in grids for strip in strips):
        return []
    columns = [{strip.model: strip for strip in strips} for _, strips in grids]
    return [(model, [column.get(model) for column in columns]) for model in dict.fromkeys(m for column in columns for m in column)]


def _grids(report: Mapping[str, Any], pictures: Sequence[tuple[str, Tensor]]) -> list[tuple[str, list[Strip]]]:
    """Of each class, or of the first prompts or classes where they are many; of large pictures fewer, which would make a heavy page."""
    if not pictures:
        return []
    protocol, names = report["protocol"], report["classes"]["names"]
    shown, turns = names[:CLASSES] or report["prompts"]["first"], max(1, protocol.get("prompts", 0) or protocol["classes"])
    seeds = SHOWN
    if pictures[0][1].shape[-1] > 2 * LARGE:
        shown, seeds = shown[:SHOWN], 1 if shown else SHOWN
    if not shown:
        shown, turns = ["The first pictures"], 1
    picked = [(name, [(label, images[i::turns][:seeds]) for label, images in pictures if len(images) > i]) for i, name in enumerate(shown)]
    return [(charts.shortened(name, CAPTION), [strip(label, f"{name} by {label}, {tables.plural(len(some), 'seed')}", some)
                                              for label, some in strips]) for name, strips in picked if strips]


def _costs(report: Mapping[str, Any]) -> list[Chart]:
    """The first metric against network evaluations and milliseconds."""
    head, made = next(iter(report["rows"][0]["metrics"])), []
    costs = (("nfe", charts.NFE, "Both halves of guidance are counted."), ("ms_per_image", charts.MS, tables.timing(report)))
    for cost, axis, more in costs:
        points, name = charts.points(report["rows"], cost), f"{head} against {axis.removesuffix(' per picture')}"
        if not points:                                  # of folders of pictures nobody knows what they took
            continue
        words = "; ".join(f"{point.label}: {point.y:.3g} at {point.x:.4g}" for point in points)
        ahead = "; ".join(point.label for point in charts.front(points))
        caption = (f"Lower and further left is better{charts.without_bias(report['rows'])}; bars are 95 % intervals of "
                   f"{charts.bars(report['rows'])}. The dotted steps are the Pareto front, which no cheaper model beats by its value: "
                   f"{ahead}. {more}")
        figure = charts.plot_quality(points, axis, f"{head}, lower is better", charts.COST)
        made.append(Chart(name, caption.strip(), charts.svg(figure, cost, f"{name}. {words}")))
    return made


def _class_charts(report: Mapping[str, Any]) -> list[Chart]:
    """What goes wrong in which class; the tables have the numbers."""
    names, protocol, made = report["classes"]["names"], report["protocol"], []
    if not tables.few_classes(names):
        return []
    labelled = next((name for name in report["rows"][0]["metrics"] if name.startswith("accuracy")), "accuracy")
    wrong, far = (_dots(report, kind, reach) for kind, reach in
                  ((labelled, metrics.Z95), ("distance", metrics.student_t(protocol["groups"] - 1))))
    if wrong:
        wrong = [replace(dot, values=[1 - value for value in dot.values]) for dot in wrong]
        least = protocol["classes"] / protocol["count"]
        figure = charts.plot_classes(names, wrong, "share of pictures taken for another class", least=least)
        caption = "Further left is better; bars are 95 % intervals. Below one picture the axis is in proportion, down to none."
        made.append(_by_class("Wrong labels by class", caption, figure))
    if far:
        real = report["classes"]["real_distance"]
        figure = charts.plot_classes(names, far, "squared distance of mean features to real ones", real=real)
        caption = ("Further left is better; bars are 95 % intervals. Upright strokes: real training pictures, held against real test "
                   "pictures as the models are.")
        made.append(_by_class("Distance by class", caption, figure))
    return made


def _by_class(title: str, caption: str, figure: Figure) -> Chart:
    return Chart(title, caption, charts.svg(figure, title.split()[0].lower(), f"{title}; the numbers are in the table below"))


def _dots(report: Mapping[str, Any], kind: str, reach: float) -> list[charts.Dots]:
    """Of the rows that have values by class; `reach` is the half width of a 95 % interval in standard errors."""
    return [charts.Dots(row["label"], row["series"], row["is_teacher"], block["value"], [reach * se for se in block["se"]])
            for row in report["rows"] if (block := (row["classes"] or {}).get(kind))]


def _curves(training: Training, name: str) -> list[Chart]:
    """One small figure for each curve that the log has."""
    made = []
    for i, (curve, lines) in enumerate(training.curves):
        words = "; ".join(f"{key} from {values[0][1]:.3g} to {values[-1][1]:.3g}" for key, values in lines.items())
        made.append(Chart(curve.title, f"{', '.join(lines)}. Healthy: {curve.healthy}.",
                          charts.svg(charts.plot_curves(lines, curve.logarithmic), f"{name}-{i}", f"{curve.title}. {words}")))
    return made
