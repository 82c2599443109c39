"""What report.json holds, as numbers with their errors, tables and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.eval.measures import KINDS
from stepdistill.eval.provenance import TIMING

ENOUGH = 1000                                           # pictures, below which no difference is claimed: a rule of thumb
ABREAST = 6                                             # models beside one another in a table of classes: as many as paper holds
SUSPECTS = 3                                            # of being learnt by heart that are named
ERRORS = ("Values are what the formula gives on all pictures, ± one standard error of the generated sample: what other seeds would move. "
          "Each student is one training run; the spread between training runs is not in it. NFE: network evaluations for one picture, "
          "both halves of guidance counted. w: the guidance scale, 1 where none is said.")


@dataclass(frozen=True)
class Table:
    """A title, a note, column heads, and rows of text whose first cell names the row. `best` cells, (row, column), stand out."""

    title: str
    note: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def arrow(name: str) -> str:
    """Where better values of a metric lie, ↓ or ↑."""
    return KINDS[name.split("_")[0]].better


def glossary(report: Mapping[str, Any]) -> dict[str, str]:
    """What each metric of the report says."""
    return {name: KINDS[name.split("_")[0]].words for name in report["rows"][0]["metrics"]}


def plural(number: int, one: str, many: str = "") -> str:
    """A count with its noun, whose plural ends in s where none is given."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def sides(report: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows are students, and how many are the teacher's."""
    teachers = sum(row["is_teacher"] for row in report["rows"])
    return len(report["rows"]) - teachers, teachers


def title(report: Mapping[str, Any]) -> str:
    """Of the whole report."""
    (students, teachers), protocol = sides(report), report["protocol"]
    who = plural(students, "student") if students else "the teacher"
    beside = f" beside {'its' if students == 1 else 'their'} teacher" if students and teachers else ""
    return f"{protocol['dataset']}: {who}{beside}, {plural(protocol['count'], 'picture')} each"


def enough(count: int) -> bool:
    """Whether so many pictures carry a claim."""
    return count >= ENOUGH


def warning(report: Mapping[str, Any]) -> str:
    """Of pictures that are too few for any claim; empty where they are enough."""
    count = report["protocol"]["count"]
    if enough(count):
        return ""
    return (f"Nothing can be concluded from {count:,} pictures. This report shows that everything runs; to compare models, score each with "
            f"--count {ENOUGH} or more.")


def timing(report: Mapping[str, Any]) -> str:
    """Of milliseconds that were taken in different ways; empty where they were not."""
    unequal = [field for field in TIMING if field in report["environment"]["differing"]]
    if not unequal:
        return ""
    return f"The rows were timed with unequal {', '.join(unequal)}: only orders of magnitude of the milliseconds compare."


def number(value: float, se: float) -> str:
    """Digits down to the second of the error."""
    places = 4 if se <= 0 else max(0, min(6, 1 - int(torch.tensor(se).log10().floor())))
    return f"{value:.{places}f} ± {se:.{places}f}"


def delta(block: Mapping[str, Any]) -> str:
    """A paired difference with its error and, in brackets, its 95 % interval."""
    places = len(number(0, block["se"]).split(" ")[0].partition(".")[2])
    low, high = (f"{x:+.{places}f}" for x in block["ci95"])
    return f"{number(block['delta'], block['se'])} [{low}, {high}]"


def scores(report: Mapping[str, Any]) -> Table:
    """Every metric of every row."""
    names = list(report["rows"][0]["metrics"])
    rows = [(row["label"], str(row["nfe"]), *(number(row["metrics"][n]["value"], row["metrics"][n]["se"]) for n in names),
             f"{row['ms_per_image']:.2f}") for row in report["rows"]]
    best = frozenset((i, 2 + names.index(name)) for i, row in enumerate(report["rows"]) for name in row["best"])
    star = "★ better than every other row by more than two paired standard errors." if best else ""
    heads = ("model", "NFE", *(f"{name} {arrow(name)}" for name in names), "ms / image")
    return Table("All measures", f"{star} {timing(report)}".strip(), heads, rows, best)


def paired(report: Mapping[str, Any]) -> list[Table]:
    """The differences to the first row, and what is won and lost against it, where there are any."""
    names, tables = list(report["rows"][0]["metrics"]), []
    if compared := [row for row in report["rows"] if row["difference"]]:
        shown = [name for name in names if any(name in row["difference"] for row in compared)]
        rows = [(row["label"], *(delta(row["difference"][n]) if n in row["difference"] else "" for n in shown)) for row in compared]
        note = ("Same noise, same labels, same groups, so what both models share cancels. In brackets the 95 % interval, which stands "
                "around the difference without its bias; one that holds 0 shows no difference.")
        if any(KINDS[name.split("_")[0]].unit == "set" for name in shown):
            note += " Of recall and coverage: the mean difference over disjoint sets, which are smaller than the whole and lie lower."
        tables.append(Table(f"Difference to {report['first']}", note, ("model", *shown), rows))
    if counted := [row for row in report["rows"] if row["wins"]]:
        shown = [name for name in names if any(name in row["wins"] for row in counted)]
        rows = [(row["label"], *(cell for name in shown for cell in _won(row["wins"].get(name)))) for row in counted]
        note = ("From one seed both models make a picture. A picture is right where it has the label that was asked for (accuracy), or "
                "lies among real ones (precision); of what is told for each prompt, the higher is right. Shares of the seeds or prompts on "
                "which one of the two models alone is right, and the share of those that the row wins, with Wilson's 95 % interval: 50 % "
                "would be a draw.")
        heads = ("model", *(head for name in shown for head in (f"{name}: only this row", "only the other", "won by this row")))
        tables.append(Table(f"Won and lost against {report['first']}", note, heads, rows))
    return tables + in_light(report)


def _said(block: Mapping[str, Any] | None) -> str:
    if block is None:
        return ""
    paired = f" [{block['difference']['delta']:+.4f} ± {block['difference']['se']:.4f}]" if block["difference"] else ""
    return number(block["value"], block["se"]) + paired


def in_light(report: Mapping[str, Any]) -> list[Table]:
    """What was told of students in the light of their teacher, by outside judges, and of pictures learnt by heart; where it was asked."""
    tables, told = [], [row for row in report["rows"] if row["teacher"]]
    if told:
        blocks = [{**({"cosine of paired features": row["teacher"]["cos"]} if row["teacher"]["cos"] else {}),
                   **({"LPIPS of paired pictures": row["teacher"]["lpips"]} if row["teacher"].get("lpips") else {}),
                   **{f"{name}, share of the teacher's": block for name, block in row["teacher"]["ratio"].items()},
                   **{f"drift in {name}": block for name, block in row["teacher"]["drift"].items()}} for row in told]
        note = ("Same noise, same prompts; LPIPS is 0 for the teacher's own pictures. Contrast (of red, green and blue, too), saturation, "
                "sharpness, spread and latent_std are over the teacher's (1 is the teacher's), the other drifts less the teacher's (0 is), "
                "of the first pictures of both.")
        names = list(dict.fromkeys(name for block in blocks for name in block))
        rows = [(name, *(number(block[name]["value"], block[name]["se"]) if name in block else "" for block in blocks)) for name in names]
        tables.append(Table("In the light of the teacher", note, ("", *(row["label"] for row in told)), rows))
    if judged := [row for row in report["rows"] if row["judges"]]:
        note = ("By judges in environments of their own, ± one standard error over prompts. In brackets the paired difference to "
                f"{report['first']}.")
        names = list(dict.fromkeys(name for row in judged for name in row["judges"]))
        rows = [(name, *(_said(row["judges"].get(name)) for row in judged)) for name in names]
        tables.append(Table("Outside judges", note, ("", *(row["label"] for row in judged)), rows))
    if learnt := [row for row in report["rows"] if row["memory"]]:
        note = ("Share of the pictures that lie nearer to a training picture than all but 1 % of those lie to each other, the same of "
                "held-out real pictures, and the difference: 0 where nothing was learnt by heart. Searched: the training pictures whose "
                "features the reference keeps, and no others. Suspects: generated picture and nearest training picture, closest first.")
        rows = [(row["label"], *(number(row["memory"][key]["value"], row["memory"][key]["se"]) for key in ("share", "held_out", "excess")),
                 f"{row['memory']['train']:,}", _suspects(row["memory"]["suspects"])) for row in learnt]
        heads = ("model", "generated", "held-out", "difference", "searched", "suspects")
        tables.append(Table("Nearest training pictures", note, heads, rows))
    return tables


def _suspects(found: Sequence[Sequence[Any]]) -> str:
    """The first few, by the name of the training picture or, where the result has none, by its row in the reference."""
    return ", ".join(f"{row} → {name[0] if name and name[0] else f'row {near}'}" for row, near, _, *name in found[:SUSPECTS])


def _won(block: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if block is None:
        return "", "", ""
    share = "all the same"
    if block["decided"]:
        low, high = (100 * x for x in block["ci95"])
        share = f"{100 * block['win_rate']:.1f} % of {block['decided']:,} [{low:.1f}, {high:.1f}]"
    return f"{100 * block['ahead']:.2f} %", f"{100 * block['behind']:.2f} %", share


def by_class(report: Mapping[str, Any]) -> list[Table]:
    """Accuracy and distance of every class, for the rows that kept their features."""
    names, real = report["classes"]["names"], report["classes"]["real_distance"]
    kinds = {
        "accuracy": ("Accuracy by class", "Share of the class's pictures that the classifier takes for it, ± one standard error."),
        "distance": ("Distance by class", "Squared distance between the mean features of the class's pictures and of real test pictures, "
                     "± one standard error. Real: the same of real training pictures."),
    }
    tables = []
    for kind, (name, note) in kinds.items():
        if shown := [row for row in report["rows"] if kind in (row["classes"] or {})]:
            last = [(f"{value:.3g}",) if kind == "distance" else () for value in real]
            for start in range(0, len(shown), ABREAST):
                some = shown[start : start + ABREAST]
                rows = [(label, *(number(row["classes"][kind]["value"][c], row["classes"][kind]["se"][c]) for row in some), *last[c])
                        for c, label in enumerate(names)]
                heads = ("class", *(row["label"] for row in some), *(("real",) if kind == "distance" else ()))
                tables.append(Table(f"{name}, continued" if start else name, "" if start else note, heads, rows))
    return tables + by_group(report)


def by_group(report: Mapping[str, Any]) -> list[Table]:
    """What the prompts of each group got, of a protocol that has groups."""
    told, tables = [row for row in report["rows"] if row["groups"]], []
    for name in dict.fromkeys(name for row in told for name in row["groups"]):
        shown = [row for row in told if name in row["groups"]]
        groups = list(dict.fromkeys(group for row in shown for group in row["groups"][name]))
        for start in range(0, len(shown), ABREAST):
            some = [(row["label"], row["groups"][name]) for row in shown[start : start + ABREAST]]
            rows = [(group, *(number(found[group]["value"], found[group]["se"]) if group in found else "" for _, found in some))
                    for group in groups]
            tables.append(Table(f"{name} by group{', continued' if start else ''}", "" if start else "± one standard error over prompts.",
                                ("group", *(label for label, _ in some)), rows))
    return tables


def _lines(table: Table) -> list[str]:
    """A table in Markdown, without its title and note."""
    line = lambda cells: f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"                                       # noqa: E731
    rows = [[f"**{cell}** ★" if (i, j) in table.best else cell for j, cell in enumerate(row)] for i, row in enumerate(table.rows)]
    return [line(table.heads), f"|:--|{'--:|' * (len(table.heads) - 1)}", *map(line, rows)]


def _health(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is seen in every run, and what helps, in Markdown."""
    lines = ["", "## Training"] if runs else []
    for run in runs:
        lines += ["", f"`{run['folder']}`, {run['word']}: {run['summary']}"]
        found = [f"- {one['illness']}: {one['evidence']}. What helps: {one['remedy']}." for one in run["findings"]]
        lines += ["", *found] if found else []
    return lines


def markdown(report: Mapping[str, Any], with_samples: bool) -> str:
    """What was measured, the table, the students in words, the differences, the classes, the health of the runs, the pictures."""
    table = scores(report)
    lines = [f"# {title(report)}", "", *([f"**{warning(report)}**", ""] if warning(report) else [])]
    lines += [f"Protocol `{report['protocol']['name']}`, seed {report['protocol']['seed']}, hash `{report['protocol_hash']}`. {ERRORS}", ""]
    lines += [*_lines(table), *(["", table.note] if table.note else [])]
    lines += ["", *(f"- `{name}`: {words}" for name, words in glossary(report).items())]
    if judged := [row for row in report["rows"] if row["verdict"]]:
        lines += ["", "## In words", "", *(f"- {row['label']}: {row['verdict']['text']}" for row in judged)]
    for table in (*paired(report), *by_class(report)):
        lines += ["", f"## {table.title}", *(["", table.note] if table.note else []), "", *_lines(table)]
    lines += _health(report["runs"])
    if any(row["nfe"] for row in report["rows"]):
        lines += ["", f"![{next(iter(report['rows'][0]['metrics']))} against network evaluations](quality_vs_nfe.png)"]
    lines += ["", "![samples of every model from the same seeds](samples.png)"] if with_samples else []
    return "\n".join(lines) + "\n"
