"""What report.json holds, as numbers with their errors, tables and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from stepdistill.eval import breakdown
from stepdistill.eval.measures import KINDS
from stepdistill.eval.provenance import TIMING
from stepdistill.eval.seeds import least_name
from stepdistill.eval.timings import SPANS

ENOUGH = 1000                                           # pictures, below which no difference is claimed: a rule of thumb
FEW = 3                                                 # comparisons that need no correction for their number
SPOKEN = dict(zip(SPANS, ("of the denoiser", "with text encoders", "with decoder"), strict=True))
TIMES = 4                                               # of a sampler that are told, where it has more
ABREAST = 6                                             # models beside one another in a table of classes: as many as paper holds
SUSPECTS = 3                                            # of being learnt by heart that are named
DISTANCES = ("Squared distance between the mean features of the class's pictures and of real test pictures, ± one standard error. Real: "
             "the same of real training pictures.")
OF_ONE = ("Values are what the formula gives on all pictures, with its bias if it has one, ± one standard error of the generated sample: "
          "what other seeds would move.")
ERRORS = ("Each student is one training run; the spread between training runs is not in it. NFE: network evaluations for one picture, "
          "both halves of guidance counted. w: the guidance scale, 1 where none is said.")

T = TypeVar("T")


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


def errors(report: Mapping[str, Any]) -> str:
    """What the numbers are, and what stands behind them."""
    numbers = ", ".join(map(str, report["seeds"]))
    over = f"Values are means over the seeds {numbers}, ± the standard deviation between them."
    return f"{over if len(report['seeds']) > 1 else OF_ONE} {ERRORS}"


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


def many(comparisons: int) -> bool:
    """Whether so many differences to one row are too many for each to be judged as if it were alone."""
    return comparisons > FEW


def compared(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that have a paired difference to the first one, students and samplings of the teacher alike: as many as Holm counts."""
    return [row for row in report["rows"] if row["difference"]]


def correction(report: Mapping[str, Any]) -> str:
    """Of a report with many comparisons: what is asked of each for their number; empty where they are few."""
    count = len(compared(report))
    if not many(count):
        return ""
    return (f"{count} rows are held against the first. The intervals are not widened for their number; a claim needs a p value, adjusted "
            "for it (Holm), of 0.05 or less.")


def warning(report: Mapping[str, Any]) -> str:
    """Of pictures that are too few for any claim; empty where they are enough."""
    count = report["protocol"]["count"]
    if enough(count):
        return ""
    return (f"Nothing can be concluded from {count:,} pictures. This report shows that everything runs; to compare models, score each with "
            f"--count {ENOUGH} or more.")


def timing(report: Mapping[str, Any]) -> str:
    """Of the file that the milliseconds are from, or of milliseconds that were taken in different ways; empty where there is no such thing
    to say."""
    if told := report["speed"]:
        env, missing = told["env"], [row["label"] for row in report["rows"] if row["ms"] is None]
        where = f"{env['device']}, {env['threads']} threads" if env["device_type"] == "cpu" else env["device"]
        last = f" Not timed there: {'; '.join(missing)}." if missing else ""
        return (f"Milliseconds are medians for one picture at batch size {told['batch']}, models in turn, in {env['precision']} on "
                f"{where}, by stepdistill bench speed; the figure has those {SPOKEN[told['span']]}.{last}")
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


def _milliseconds(row: Mapping[str, Any], spans: Sequence[str]) -> list[str]:
    """Of the timed spans, or where nothing was timed apart those of the scoring itself."""
    if not spans:
        return [f"{row['ms_per_image']:.2f}"]
    return [f"{row['ms'][span]:.2f}" if row["ms"] and row["ms"][span] is not None else "" for span in spans]


def p_value(block: Mapping[str, Any]) -> str:
    """That of a paired difference, adjusted for the number of comparisons; empty where they are few."""
    if "p_holm" not in block:
        return ""
    return "< 0.001" if block["p_holm"] < 0.001 else f"{block['p_holm']:.3f}"


def biased(block: Mapping[str, Any]) -> bool:
    """Whether a metric's value has a bias that its `corrected` value is without."""
    return bool(block["corrected"] != block["value"])


def unbiased(block: Mapping[str, Any]) -> str:
    """A metric's value without its bias and, in brackets, the 95 % interval, which stands around it."""
    places = len(number(0, block["se"]).split(" ")[0].partition(".")[2])
    low, high = (f"{x:.{places}f}" for x in block["ci95"])
    return f"{block['corrected']:.{places}f} [{low}, {high}]"


def without_bias(report: Mapping[str, Any]) -> list[Table]:
    """The metrics whose formula is biased, without their bias; none where every formula is free of it, or where rows are of several seeds,
    whose intervals stand around the means."""
    single = [row for row in report["rows"] if not row["seeds"]]
    names = [name for name in report["rows"][0]["metrics"] if any(biased(row["metrics"][name]) for row in single)]
    note = ("By the formula alone a value is off by about c/N, with c of every model its own; the jackknife takes that off. In brackets "
            "the 95 % interval, which stands around this value. Papers print the values above.")
    rows = [(row["label"], *(unbiased(row["metrics"][name]) for name in names)) for row in report["rows"]]
    return [Table("Without bias", note, ("model", *(f"{name} {arrow(name)}" for name in names)), rows)] if names else []


def shuffled(report: Mapping[str, Any]) -> list[Table]:
    """What measures that read prompts give where every picture is told the next one; none where no row tells that, or rows are of several
    seeds."""
    names = list(dict.fromkeys(name for row in report["rows"] if not row["seeds"] for name in row["shuffled"]))
    note = "The same pictures, each held against the next picture's prompt: what a model gets that does not listen. Chance, not zero."
    rows = [(row["label"], *(number(found["value"], found["se"]) if (found := row["shuffled"].get(name)) else "" for name in names))
            for row in report["rows"]]
    return [Table("With another's prompt", note, ("model", *names), rows)] if names else []


def scores(report: Mapping[str, Any]) -> Table:
    """Every metric of every row."""
    names = list(report["rows"][0]["metrics"])
    spans = [span for span in SPANS if any((row["ms"] or {}).get(span) is not None for row in report["rows"])]
    rows = [(row["label"], str(row["nfe"]), *(number(row["metrics"][n]["value"], row["metrics"][n]["se"]) for n in names),
             *_milliseconds(row, spans)) for row in report["rows"]]
    best = frozenset((i, 2 + names.index(name)) for i, row in enumerate(report["rows"]) for name in row["best"])
    adjusted = ", with a p value of 0.05 or less, adjusted for their number (Holm)" if many(len(rows) - 1) else ""
    star = f"★ better than every other row by more than two paired standard errors{adjusted}." if best else ""
    heads = ("model", "NFE", *(f"{name} {arrow(name)}" for name in names), *(f"ms, {SPOKEN[span]}" for span in spans))
    heads = heads if spans else (*heads, "ms / image")
    return Table("All measures", f"{star} {timing(report)}".strip(), heads, rows, best)


def paired(report: Mapping[str, Any]) -> list[Table]:
    """The differences to the first row, and what is won and lost against it, where there are any."""
    names, tables = list(report["rows"][0]["metrics"]), seed_by_seed(report)
    if held := compared(report):
        shown = [name for name in names if any(name in row["difference"] for row in held)]
        with_p = many(len(held))
        rows = [(row["label"], *(cell for name in shown for cell in _difference(row["difference"].get(name), with_p))) for row in held]
        note = ("Same noise, same labels, same groups, so what both models share cancels. In brackets the 95 % interval, which stands "
                "around the difference without its bias; one that holds 0 shows no difference.")
        if any(KINDS[name.split("_")[0]].unit == "set" for name in shown):
            note += " Of recall and coverage: the mean difference over disjoint sets, which are smaller than the whole and lie lower."
        heads = ("model", *(head for name in shown for head in ((name, "p") if with_p else (name,))))
        tables.append(Table(f"Difference to {report['first']}", f"{note} {correction(report)}".strip(), heads, rows))
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


def seed_by_seed(report: Mapping[str, Any]) -> list[Table]:
    """What every seed gave, and the least of three, where rows are of several seeds."""
    if len(report["seeds"]) < 2:
        return []
    heads, note, rows = [f"seed {seed}" for seed in report["seeds"]], "", []
    if any(row["seeds"]["least"] for row in report["rows"]):
        heads.append("min3")
        note = ("min3, the least of three, is what CIFAR-10 and ImageNet-64 tables print. It lies 0.85 standard deviations below the mean "
                "whatever the model: hold it against such a table, and the mean against everything else.")
    for row in report["rows"]:
        for name, values in row["seeds"]["values"].items():
            told = [*values, *(value for called, value in row["seeds"]["least"].items() if called == least_name(name))]
            cells = [number(value, row["metrics"][name]["se"]).split(" ")[0] for value in told]
            rows.append((f"{row['label']}: {name}", *cells, *[""] * (len(heads) - len(cells))))
    return [Table("Seed by seed", note, ("model", *heads), rows)]


def _difference(block: Mapping[str, Any] | None, with_p: bool) -> tuple[str, ...]:
    cells = ("", "") if block is None else (delta(block), p_value(block))
    return cells if with_p else cells[:1]


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
    """What is told of every class, for the rows that kept it; of many classes the best and the worst."""
    names, real, tables = report["classes"]["names"], report["classes"]["real_distance"], []
    told = [(row["label"], row["classes"]) for row in report["rows"] if row["classes"]]
    for kind in dict.fromkeys(kind for _, classes in told for kind in classes):
        shown = [(label, classes[kind]) for label, classes in told if kind in classes]
        values, better = torch.tensor([block["value"] for _, block in shown]), "↓" if kind == "distance" else arrow(kind)
        chosen = list(range(values.shape[1])) if few_classes(names) else breakdown.extremes(values, better == "↑")
        last = {c: (f"{real[c]:.3g}",) if kind == "distance" else () for c in chosen}
        note = DISTANCES if kind == "distance" else "± one standard error." if shown[0][1]["se"] else "Of all pictures of a class together."
        between = _between(values.shape[1], chosen)
        for some, title in _abreast(shown, "Distance by class" if kind == "distance" else f"{kind} by class"):
            rows = [(names[c], *(_of_class(block, c) for _, block in some), *last[c]) for c in chosen]
            heads = ("class", *(label for label, _ in some), *(("real",) if kind == "distance" else ()))
            tables.append(Table(title, "" if title.endswith("continued") else f"{note} {between}".strip(), heads, rows))
    return tables + by_prompt(report) + by_group(report)


def few_classes(names: Sequence[str]) -> bool:
    """Whether there are so few that all are shown."""
    return len(names) <= 2 * breakdown.EACH


def _between(count: int, chosen: Sequence[int]) -> str:
    """What stands in a table of the best and the worst; nothing where all stand in it."""
    some = breakdown.EACH
    return "" if len(chosen) == count else f"The {some} best and the {some} worst of {count:,}, best first, by the mean of all models."


def _of_class(block: Mapping[str, Any], c: int) -> str:
    return number(block["value"][c], block["se"][c]) if block["se"] else f"{block['value'][c]:#.4g}"


def _abreast(shown: Sequence[T], title: str) -> list[tuple[Sequence[T], str]]:
    """So many models as a table holds, and its title."""
    return [(shown[start : start + ABREAST], f"{title}, continued" if start else title) for start in range(0, len(shown), ABREAST)]


def by_prompt(report: Mapping[str, Any]) -> list[Table]:
    """The best and the worst prompts of every measure that has a value for each prompt, for the rows that kept them."""
    tables = []
    for name, found in report["prompts"]["extremes"].items():
        shown = [(row["label"], values) for row, values in zip(report["rows"], found["values"], strict=True) if values]
        note = _between(found["count"], found["chosen"]) or "Best first, by the mean of all models."
        for some, title in _abreast(shown, f"{name} by prompt"):
            rows = [(text, *(f"{values[i]:#.4g}" for _, values in some)) for i, text in enumerate(found["texts"])]
            tables.append(Table(title, "" if title.endswith("continued") else note, ("prompt", *(label for label, _ in some)), rows))
    return tables


def by_group(report: Mapping[str, Any]) -> list[Table]:
    """What the prompts of each group got, of a protocol that has groups."""
    told, tables = [row for row in report["rows"] if row["groups"]], []
    for name in dict.fromkeys(name for row in told for name in row["groups"]):
        shown = [(row["label"], row["groups"][name]) for row in told if name in row["groups"]]
        groups = list(dict.fromkeys(group for _, found in shown for group in found))
        for some, title in _abreast(shown, f"{name} by group"):
            rows = [(group, *(number(found[group]["value"], found[group]["se"]) if group in found else "" for _, found in some))
                    for group in groups]
            tables.append(Table(title, "" if title.endswith("continued") else "± one standard error over prompts.",
                                ("group", *(label for label, _ in some)), rows))
    return tables


def made(report: Mapping[str, Any]) -> Table:
    """Where each row came from, and the fields of the environment that differ."""
    differing = report["environment"]["differing"]
    rows = [(row["label"], (row["weights"] or "")[:12], row["trained"] or "", _times(row["times"]), row["started"][:16].replace("T", " "),
             *(values[i][:12] if field == "commit" else values[i] for field, values in differing.items()))
            for i, row in enumerate(report["rows"])]
    return Table("Row by row", "≠ marks what is not the same in all rows." if differing else "",
                 ("model", "weights", "trained by", "times", "scored", *(f"≠ {field}" for field in differing)), rows)


def _times(times: Sequence[float]) -> str:
    """The first and the last where they are many, on one line; report.json has all."""
    told = [f"{t:.3g}" for t in times]
    return ",\u00a0".join(told if len(told) <= TIMES else [*told[: TIMES - 1], "…", told[-1]])


def _environment(report: Mapping[str, Any]) -> list[str]:
    """What the rows share and what they do not, and the commands that make them again, in Markdown."""
    table = made(report)
    return ["", "## Environment", "", "The same for every row:", "",
            *(f"- {field}: {value}" for field, value in report["environment"]["same"].items()), "",
            *([table.note, ""] if table.note else []), *_lines(table), "", "## How to repeat it", "", "```",
            *(command for row in report["rows"] for command in row["commands"]), "```"]


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
    """What was measured, the table, the students in words, the differences, the classes or prompts, the health of the runs, the
    pictures, the environment."""
    table = scores(report)
    lines = [f"# {title(report)}", "", *([f"**{warning(report)}**", ""] if warning(report) else [])]
    several = len(report["seeds"]) > 1
    seed = f"seed{'s' if several else ''} {', '.join(map(str, report['seeds']))}, hash {'without the seed ' if several else ''}"
    lines += [f"Protocol `{report['protocol']['name']}`, {seed}`{report['protocol_hash']}`. {errors(report)}", ""]
    lines += [*_lines(table), *(["", table.note] if table.note else [])]
    lines += ["", *(f"- `{name}`: {words}" for name, words in glossary(report).items())]
    if judged := [row for row in report["rows"] if row["verdict"]]:
        lines += ["", "## In words", "", *(f"- {row['label']}: {row['verdict']['text']}" for row in judged)]
    for table in (*without_bias(report), *shuffled(report), *paired(report), *by_class(report)):
        lines += ["", f"## {table.title}", *(["", table.note] if table.note else []), "", *_lines(table)]
    lines += _health(report["runs"])
    if any(row["nfe"] for row in report["rows"]):
        lines += ["", f"![{next(iter(report['rows'][0]['metrics']))} against network evaluations](quality_vs_nfe.png)"]
    if any(row["ms_per_image"] for row in report["rows"]):
        lines += ["", f"![{next(iter(report['rows'][0]['metrics']))} against milliseconds](quality_vs_ms.png)"]
    lines += ["", "![samples of every model from the same seeds](samples.png)"] if with_samples else []
    lines += _environment(report)
    return "\n".join(lines) + "\n"
