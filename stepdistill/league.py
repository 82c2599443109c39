"""A league: every method of a world trained at one budget of network passes, sampled in 1, 2 and 4 calls, and scored by one protocol.

Two folders: runs, students and features lie in one; the other gets the results of what is finished, small JSON files alone, and has the
table beside it. What it holds is never done again, wherever the first has gone. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from stepdistill import diagnose, methods, pairs, worlds
from stepdistill import recipe as recipes
from stepdistill.diffusion.times import trailing
from stepdistill.eval import charts, measures, models, report, score, tables
from stepdistill.eval.evaluate import evaluate
from stepdistill.export import export
from stepdistill.methods import METHODS
from stepdistill.methods.base import Pairs
from stepdistill.models.load import is_prompted
from stepdistill.recipe import ExamRecipe, Recipe
from stepdistill.training import loop, measure
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import write_atomically

BUDGET = 600_000                                        # passes of one sample: some 12 minutes on two cores in the fashion world
CALLS = (1, 2, 4)                                       # in which a student is sampled, where its sampler can
COST = {"none": 1, "input": 2, "weights": 3}            # of a forward pass, and of the two halves of a backward pass beside it
PAIRED = 1 / 6                                          # of the budget of a method that reads pairs: what they may cost
PAIR_STEPS = 10                                         # of the ODE that makes them, by dpmpp_2m
LOG = "log.jsonl"
DRIFTS = ("contrast", "spread")                         # of `stepdistill.drift`, in the table
BASELINES = [(solver, calls) for solver in ("ddim", "dpmpp_2m") for calls in (1, 2, 4, 8, 50)]


@dataclass(frozen=True)
class Entry:
    """One recipe's part: the recipe cut to the budget, what one step of it costs in passes of one sample, and what its pairs cost."""

    name: str
    recipe: Recipe
    cost: float
    paired: int = 0

    @property
    def passes(self) -> int:
        """Of one sample, all in all."""
        return self.paired + round(self.cost * self.recipe.batch_size * self.recipe.steps)


def members(world: str) -> list[str]:
    """The methods that ship a recipe WORLD/METHOD and begin at the teacher, in METHODS' order; ValueError where there are none."""
    known = set(recipes.names())
    found = [name for name, method in METHODS.items() if f"{world}/{name}" in known and not method.finishes]
    if not found:
        raise ValueError(f"no method has a recipe for the world {world!r}; worlds: {', '.join(sorted({n.split('/')[0] for n in known}))}")
    return found


def known(world: str) -> list[str]:
    """Every recipe of a world that begins at a teacher, by its short name without the world."""
    found = (full.removeprefix(f"{world}/") for full in recipes.names() if full.startswith(f"{world}/"))
    return [name for name in found if not methods.find(recipes.load(f"{world}/{name}").method["name"]).finishes]


def exam_of(world: str) -> str:
    """The protocol that scores a world; ValueError where none does."""
    found = worlds.WORLDS.get(world)
    if found is None or found.protocol is None:
        raise ValueError(f"no protocol scores {world!r} yet, so it has no league")
    return found.protocol


def cost(recipe: Recipe, rounds: int = 4) -> float:
    """Passes of one sample that one loop step makes for each sample of its batch, a mean over some rounds of the method's plan.

    Counted on batches of two. Rollouts of random length make it a mean; the draws are keyed, so it is the same mean every time.
    """
    small = replace(recipe, batch_size=2, accumulate=1)
    run = assemble(small, loop.make_accelerator(small, None))
    steps = measure.period(run) * max(rounds, -(-12 // measure.period(run)))
    with measure.recorded(run) as passes:
        measure.iterate(run, 0, steps)
    return sum(COST[p.gradient] * p.rows for p in passes) / (steps * small.batch_size)


def entry(world: str, name: str, folder: Path, budget: int = BUDGET) -> Entry:
    """The recipe, its student made for the most calls in equal steps from its first time, with as many steps as the budget pays for.

    A method of one call keeps its recipe's student. What a method reads of pairs is made here, in `folder`, resumably, and paid for first.
    """
    chosen = recipes.load(f"{world}/{name}")
    method = methods.find(chosen.method["name"])
    if not method.one_step:
        own = chosen.student.times
        times = tuple(own[0] * t for t in trailing(max(CALLS))) if own else None
        chosen = replace(chosen, student=replace(chosen.student, steps=max(CALLS), times=times))
    paired = 0
    if any(isinstance(stream, Pairs) for stream in method.data(chosen.method_config).values()):
        chosen = replace(chosen, data=replace(chosen.data, pairs=folder / "pairs"))
        nfe = pairs.ode(chosen, PAIR_STEPS).nfe
        count = max(1, round(PAIRED * budget / nfe))
        pairs.make(chosen, folder / "pairs", count=count, steps=PAIR_STEPS, device=loop.make_accelerator(chosen, None).device)
        paired = count * nfe
    each = cost(chosen)
    steps = max(1, round((budget - paired) / (each * chosen.batch_size)))
    chosen = replace(chosen, steps=steps, preview_every=0, exam=ExamRecipe(), checkpoint_every=max(1, steps // 4))
    return Entry(name, chosen, each, paired)


def play(world: str, out: Path, to: Path, names: Sequence[str] = (), budget: int = BUDGET, count: int = 2000,
         say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> dict[str, Any]:
    """Train, export and score what is missing of the league in `to`, in the folder `out`; the table is written anew after each recipe.

    Unless `names` says otherwise there is one recipe of each method. One that fails keeps its row, with the error. Returns the table's
    content. Raises ValueError for a name that has no recipe, or a folder of another budget.
    """
    names = names or members(world)
    if unknown := [n for n in names if n not in known(world)]:
        raise ValueError(f"no recipe {world}/{unknown[0]}; there are {', '.join(known(world))}")
    exam = exam_of(world)
    terms, held = {"world": world, "budget": budget, "count": count}, to / "terms.json"
    if held.is_file() and (before := json.loads(held.read_text())) != terms:
        raise ValueError(f"{to} is a league of other terms ({before}): choose another --to")
    _write(held, json.dumps(terms) + "\n")
    teachers = dict.fromkeys(recipes.load(f"{world}/{name}").teacher.path for name in names)
    wanted = [(t, solver, calls) for t in teachers for solver, calls in BASELINES]

    def baselines(of: Sequence[tuple[str, str, int]]) -> None:
        for teacher, solver, calls in of:
            if not (to / _baseline(teacher, solver, calls)).is_file():
                say(f"{teacher}, {solver}, {calls} steps")
                _score(f"teacher:{teacher}", exam, count, out, to, _baseline(teacher, solver, calls), calls, solver)

    baselines([b for b in wanted if b[2] <= max(CALLS)])
    for name in names:
        if not (to / name / "row.json").is_file():
            say(name)
            row = _row(world, name, out, to, budget, count)
            _write(to / name / "row.json", json.dumps(row, indent=1) + "\n")
            publish(to)
    baselines(wanted)                                                           # the long ones, which no row waits for
    return publish(to)


def _baseline(teacher: str, solver: str, calls: int) -> str:
    return f"teachers/{teacher.replace('/', '_')}/{solver}_{calls}.json"


def _score(model: str, exam: str, count: int, out: Path, to: Path, file: str, calls: int, solver: str | None = None,
           against: Path | None = None) -> None:
    """Evaluate into `out`, with features, and put the result itself into `to`."""
    evaluate(model, exam, count, out / file, steps=calls, solver=solver, against=str(against) if against else None)
    _write(to / file, (out / file).read_text())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _row(world: str, name: str, out: Path, to: Path, budget: int, count: int) -> dict[str, Any]:
    """Everything of one method. A numerical failure or a refusal of its own is a row, too; other errors are raised."""
    part = entry(world, name, out / name, budget)
    method = methods.find(part.recipe.method["name"])
    row: dict[str, Any] = {"name": name, "teacher": part.recipe.teacher.path, "title": method.title, "arxiv": method.arxiv,
                           "family": method.family, "steps": part.recipe.steps, "passes": part.passes, "results": {}}
    run, student = out / name / "run", out / name / "student"
    try:
        outcome = loop.resume(run) if (run / loop.RECIPE).is_file() else loop.start(part.recipe, run)
        if not outcome.finished:
            raise KeyboardInterrupt
        row["seconds"] = round(outcome.seconds, 1)
        row["bytes"] = sum(v for held in measure.bytes_of(assemble(part.recipe, loop.make_accelerator(part.recipe, None))).values()
                           for k, v in held.items() if k != "parameters")
        shutil.rmtree(student, ignore_errors=True)
        export(run, student)
        theirs = _theirs(row["teacher"], exam_of(world), out, to, count)
        for calls in CALLS:
            if method.one_step and calls > 1:
                row["results"][str(calls)] = {"left_out": "trained in one call"}
                continue
            try:
                models.open_model(str(student), calls, prompts=("",) if is_prompted(student) else ())
            except ValueError as error:                                         # its sampler has its own number of steps
                row["results"][str(calls)] = {"left_out": str(error)}
                continue
            file = f"{name}/{calls}.json"
            _score(str(student), exam_of(world), count, out, to, file, calls, against=theirs)
            row["results"][str(calls)] = {"file": file, "difference": _difference(theirs, out / file)}
    except (FloatingPointError, ValueError) as error:
        row["failed"] = str(error)
        if (run / LOG).is_file():                                               # its curve is part of the row
            _write(to / name / LOG, (run / LOG).read_text())
    if (run / loop.RECIPE).is_file():
        row["ill"] = [finding.illness for finding in diagnose.examine(run).findings]
    return row


def _theirs(teacher: str, exam: str, out: Path, to: Path, count: int) -> Path:
    """The result in `out` of the teacher in the most calls, made again where that folder does not hold it with its features."""
    first = compared_with(rows(to), teacher)
    theirs: Path = out / first["file"].relative_to(to)
    if not theirs.is_file():
        evaluate(f"teacher:{teacher}", exam, count, theirs, steps=first["calls"], solver=first["solver"])
    return theirs


def _difference(theirs: Path, mine: Path) -> dict[str, Any]:
    """Of two results with features beside them, paired."""
    pair = [report.Row(path, path.stem, path.stem, 0, path == theirs, score.read_result(path)) for path in (theirs, mine)]
    return {metric: e.to_dict() for metric, e in report.subtracted(pair, report.pairings(pair))[0].items()}


def rows(to: Path) -> list[dict[str, Any]]:
    """One dictionary for each model and number of calls: `name, calls, file, result`, and of a method what its row says besides.

    Baselines come first, which have a solver besides. A recipe without any score has one entry, with result None.
    """
    table: list[dict[str, Any]] = []
    for teacher in [name for name in worlds.teachers() if (to / _baseline(name, "", 0)).parent.is_dir()]:
        for solver, calls in BASELINES:
            if (path := to / _baseline(teacher, solver, calls)).is_file():
                table.append({"name": f"teacher:{teacher}, {solver}", "teacher": teacher, "solver": solver, "calls": calls, "file": path,
                              "result": score.read_result(path)})
    for path in sorted(to.glob("*/row.json")):
        row = json.loads(path.read_text())
        scored = [(int(calls), found) for calls, found in row["results"].items() if "file" in found]
        table += [{**row, "calls": calls, "file": to / found["file"], "difference": found["difference"],
                   "result": score.read_result(to / found["file"])} for calls, found in scored]
        if not scored:
            table.append({**row, "calls": 0, "file": None, "result": None})
    return table


def compared_with(table: Sequence[dict[str, Any]], teacher: str) -> dict[str, Any]:
    """A teacher's best row in the most calls, which its students are held against."""
    return min((r for r in table if r["teacher"] == teacher and "solver" in r and r["calls"] == max(CALLS)),
               key=lambda r: float(next(iter(r["result"]["metrics"].values()))["value"]))


def publish(to: Path) -> dict[str, Any]:
    """TO.md, TO.json and TO.png of the rows in the folder `to`; returns TO.json's content. Every number comes from a result file."""
    every = rows(to)
    table, failed = [row for row in every if row["result"]], {row["name"]: row["failed"] for row in every if "failed" in row}
    protocol = table[0]["result"]["protocol"]
    first = {teacher: compared_with(table, teacher) for teacher in {r["teacher"]: None for r in table}}
    told = iter(report.judged([{name: measures.estimate(e) for name, e in r["difference"].items()} for r in table if "passes" in r],
                              protocol["count"]))
    entries = [{"name": r["name"], "calls": r["calls"], "nfe": r["result"]["sampler"]["nfe"], "metrics": r["result"]["metrics"],
                "drift": (r["result"]["teacher"] or {}).get("drift", {}),
                "ms_per_image": r["result"]["speed"]["ms_per_image"],
                **{k: r[k] for k in ("teacher", "family", "arxiv", "steps", "passes", "seconds", "bytes", "ill") if k in r},
                "difference": next(told) if "passes" in r else None} for r in table]
    content = {**json.loads((to / "terms.json").read_text()), "protocol": protocol, "protocol_hash": table[0]["result"]["protocol_hash"],
               "compared_with": {teacher: f"{r['name']}, {r['calls']} steps" for teacher, r in first.items()},
               "figure": f"{to.name}.png", "entries": entries,
               "failed": {name: {"why": why, "log": f"{to.name}/{name}/{LOG}" if (to / name / LOG).is_file() else None}
                                              for name, why in failed.items()}}
    plot(entries).savefig(to.with_name(content["figure"]), dpi=160)
    write_atomically(to.with_name(f"{to.name}.json"), json.dumps(content, indent=1) + "\n")
    write_atomically(to.with_name(f"{to.name}.md"), markdown(content))
    return content


def markdown(content: dict[str, Any]) -> str:
    """The page, which lies beside the folder of the rows: terms, one line for each model and number of calls, what failed."""
    names = list(content["entries"][0]["metrics"])
    drifts = [name for name in DRIFTS if any(name in e["drift"] for e in content["entries"])]
    heads = ["model", "calls", "NFE", *(f"{n} {tables.arrow(n)}" for n in names), "against the teacher in 4", *drifts, "ms / image",
             "passes", "MiB", "minutes", "diagnose finds"]
    lines = [f"# League of the {content['world']} world", "",
             f"Made by `stepdistill league --world {content['world']}`. Every student is made for 4 equal steps from its recipe's first "
             f"time, or for the one step that its method trains, trained for {content['budget']:,} passes of one sample (forward 1, "
             f"backward to the input 1 more, to the weights 2 more, the teacher's calls for stored pairs among them) and sampled in 1, 2 "
             f"and 4 of those calls where its sampler can; one run each, {content['count']:,} pictures, protocol "
             f"`{content['protocol_hash']}`. Errors are those of the generated sample. The paired difference in {names[0]} is to "
             f"{' or '.join(content['compared_with'].values())}, the student's own; better or worse is beyond two "
             "standard errors and, where many are compared, still so after Holm's adjustment. NFE counts both halves of guidance."
             + (f" What the features may not see: {' and '.join(drifts)} of the kept pictures over that teacher's; spread is how much "
                "those of one class differ at 8x8 pixels." if drifts else ""), "",
             f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 2)}:--|"]
    for e in content["entries"]:
        delta = (e["difference"] or {}).get(names[0])
        cells = [e["name"], str(e["calls"]), str(e["nfe"]),
                 *(tables.number(e["metrics"][n]["value"], e["metrics"][n]["se"]) for n in names),
                 f"{tables.number(delta['delta'], delta['se'])}, {delta['verdict']}" if delta else "",
                 *(tables.number(e["drift"][n]["value"], e["drift"][n]["se"]) if n in e["drift"] else "" for n in drifts),
                 f"{e['ms_per_image']:.2f}",
                 f"{e['passes']:,}" if "passes" in e else "", f"{e['bytes'] / 2**20:.0f}" if "bytes" in e else "",
                 f"{e['seconds'] / 60:.1f}" if "seconds" in e else "", ", ".join(e.get("ill", []))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} |{' |' * (len(heads) - 2)} failed: {found['why']}{' ([log](' + found['log'] + '))' if found['log'] else ''} |"
              for name, found in content["failed"].items()]
    return "\n".join([*lines, "", f"![{names[0]} of every method]({content['figure']})"]) + "\n"


def plot(entries: Sequence[dict[str, Any]]) -> Figure:
    """The first metric of every recipe, a point for each number of calls, the best recipes on top; the teachers' are lines."""
    head = next(iter(entries[0]["metrics"]))
    value = lambda e: e["metrics"][head]["value"]                                                            # noqa: E731
    students = {n: [e for e in entries if e["name"] == n] for n in dict.fromkeys(e["name"] for e in entries if "passes" in e)}
    order = sorted(students, key=lambda n: min(map(value, students[n])), reverse=True)
    figure = Figure(figsize=(8, 1.4 + 0.32 * max(1, len(order))), layout="constrained")
    axes = figure.subplots()
    for place, (calls, colour) in enumerate(zip(CALLS, charts.COLOURS[:len(CALLS)], strict=True)):
        points = [(value(e), i + 0.2 * (1 - place), 2 * e["metrics"][head]["se"])
                  for i, n in enumerate(order) for e in students[n] if e["calls"] == calls]
        if points:
            x, y, halves = zip(*points, strict=True)
            axes.errorbar(x, y, xerr=halves, linestyle="none", marker="o", markersize=6.5, markeredgecolor="white", elinewidth=1.2,
                          color=colour, zorder=3, label=f"{calls} call{'s' if calls > 1 else ''}")
    teachers = dict.fromkeys(e["teacher"] for e in entries if "passes" not in e)
    for teacher, colour in zip(teachers, cycle((charts.GREY, charts.INK)), strict=False):                    # the colours do not end
        for calls, style in ((max(CALLS), (0, (4, 3))), (50, "-")):
            found = [value(e) for e in entries if "passes" not in e and (e["teacher"], e["calls"]) == (teacher, calls)]
            if found:
                axes.axvline(min(found), color=colour, linewidth=1.2, linestyle=style, zorder=1, label=f"teacher:{teacher}, {calls} steps")
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_xlabel(f"{head}, lower is better; bars are two standard errors", color=charts.INK)
    charts.tidy(axes, "x")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
