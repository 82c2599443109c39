"""A league: every method of a world trained at one budget of network passes, sampled in 1, 2 and 4 calls, and scored by one protocol.

What is finished is kept in the league's folder and never done twice; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stepdistill import pairs, worlds
from stepdistill import recipe as recipes
from stepdistill.eval import charts, models, report, score, tables
from stepdistill.eval.evaluate import evaluate
from stepdistill.export import export
from stepdistill.methods import METHODS
from stepdistill.methods.base import Pairs
from stepdistill.recipe import ExamRecipe, Recipe
from stepdistill.training import loop, measure
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import write_atomically

BUDGET = 600_000                                        # passes of one sample: some 12 minutes on two cores in the fashion world
CALLS = (1, 2, 4)                                       # in which a student is sampled, where its sampler can
COST = {"none": 1, "input": 2, "weights": 3}            # of a forward pass, and of the two halves of a backward pass beside it
PAIRED = 1 / 6                                          # of the budget of a method that reads pairs: what they may cost
PAIR_STEPS = 10                                         # of the ODE that makes them, by dpmpp_2m
BASELINES = [(solver, calls) for solver in ("ddim", "dpmpp_2m") for calls in (1, 2, 4, 8, 50)]


@dataclass(frozen=True)
class Entry:
    """One method's part: its recipe, cut to the budget, what one step of it costs in passes of one sample, and what its pairs cost."""

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
    """The method's recipe, its student made for the most calls in equal steps from noise, with as many steps as the budget pays for.

    A method of one call keeps its recipe's student. What a method reads of pairs is made here, in `folder`, resumably, and paid for first.
    """
    chosen, method = recipes.load(f"{world}/{name}"), METHODS[name]
    if not method.one_step:
        chosen = replace(chosen, student=replace(chosen.student, steps=max(CALLS), times=None))
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


def play(world: str, out: Path, names: Sequence[str] = (), budget: int = BUDGET, count: int = 2000,
         say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> list[dict[str, Any]]:
    """Train, export and score what is missing of the league in `out`; returns its rows, baselines first.

    A method that fails keeps its row, with the error. Raises ValueError for a name that has no recipe, or a folder of another budget.
    """
    known, exam = members(world), exam_of(world)
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"no recipe {world}/{unknown[0]}; there are {', '.join(known)}")
    terms = {"world": world, "budget": budget, "count": count}
    out.mkdir(parents=True, exist_ok=True)
    written = out / "league.json"
    if written.is_file() and (before := json.loads(written.read_text())) != terms:
        raise ValueError(f"{out} is a league of other terms ({before}): choose another --out")
    write_atomically(written, json.dumps(terms) + "\n")
    for solver, calls in BASELINES:
        path = out / "teacher" / f"{solver}_{calls}.json"
        if not path.is_file():
            say(f"teacher, {solver}, {calls} steps")
            evaluate(f"teacher:{world}", exam, count, path, steps=calls, solver=solver)
    for name in names or known:
        if not (out / name / "row.json").is_file():
            say(f"{name}")
            write_atomically(out / name / "row.json", json.dumps(_row(world, name, out / name, budget, count), indent=1) + "\n")
    return rows(out)


def _row(world: str, name: str, folder: Path, budget: int, count: int) -> dict[str, Any]:
    """Everything of one method. A numerical failure or a refusal of its own is a row, too; other errors are raised."""
    method, part = METHODS[name], entry(world, name, folder, budget)
    row: dict[str, Any] = {"name": name, "title": method.title, "arxiv": method.arxiv, "family": method.family, "steps": part.recipe.steps,
                           "passes": part.passes, "results": {}}
    run, student = folder / "run", folder / "student"
    try:
        outcome = loop.resume(run) if (run / loop.RECIPE).is_file() else loop.start(part.recipe, run)
        if not outcome.finished:
            raise KeyboardInterrupt
        row["seconds"] = round(outcome.seconds, 1)
        row["bytes"] = sum(v for held in measure.bytes_of(assemble(part.recipe, loop.make_accelerator(part.recipe, None))).values()
                           for k, v in held.items() if k != "parameters")
        shutil.rmtree(student, ignore_errors=True)
        export(run, student)
        for calls in CALLS:
            if method.one_step and calls > 1:
                row["results"][str(calls)] = {"left_out": "trained in one call"}
                continue
            try:
                models.open_model(str(student), calls)
            except ValueError as error:                                         # its sampler has its own number of steps
                row["results"][str(calls)] = {"left_out": str(error)}
                continue
            evaluate(str(student), exam_of(world), count, folder / f"{calls}.json", steps=calls)
            row["results"][str(calls)] = {"file": f"{name}/{calls}.json"}
    except (FloatingPointError, ValueError) as error:
        row["failed"] = str(error)
    return row


def rows(out: Path) -> list[dict[str, Any]]:
    """One dictionary for each model and number of calls: `name, calls, file, result`, and of a method what its row says besides.

    Baselines come first. A method without any score has one entry, with result None.
    """
    table = []
    for solver, calls in BASELINES:
        if (path := out / "teacher" / f"{solver}_{calls}.json").is_file():
            table.append({"name": f"teacher, {solver}", "calls": calls, "file": path, "result": score.read_result(path)})
    for path in sorted(out.glob("*/row.json")):
        row = json.loads(path.read_text())
        scored = [(int(calls), out / found["file"]) for calls, found in row["results"].items() if "file" in found]
        table += [{**row, "calls": calls, "file": file, "result": score.read_result(file)} for calls, file in scored]
        if not scored:
            table.append({**row, "calls": 0, "file": None, "result": None})
    return table


def publish(out: Path, to: Path) -> dict[str, Any]:
    """league.md, league.json and league.png in the folder `to`, from what the league in `out` holds; returns league.json's content.

    Every number comes from a result file; the differences to the teacher in four calls are paired (eval.report).
    """
    table = [row for row in rows(out) if row["result"]]
    failed = [row for row in rows(out) if row["result"] is None]
    if not any("passes" in row for row in table) or not any("passes" not in row for row in table):
        raise ValueError(f"{out} holds no finished method and baseline yet")
    terms = json.loads((out / "league.json").read_text())
    first = min((r for r in table if "passes" not in r and r["calls"] == max(CALLS)), key=_head)
    compared = [_reported(r) for r in [first, *(r for r in table if "passes" in r)]]
    paired = iter(report.differences(compared, report.pairings(compared))[1:])
    entries = [{"name": r["name"], "calls": r["calls"], "nfe": r["result"]["sampler"]["nfe"], "metrics": r["result"]["metrics"],
                "ms_per_image": r["result"]["speed"]["ms_per_image"],
                **{k: r[k] for k in ("family", "arxiv", "steps", "passes", "seconds", "bytes") if k in r},
                "difference": next(paired) if "passes" in r else None} for r in table]
    content = {**terms, "protocol": table[0]["result"]["protocol"], "protocol_hash": table[0]["result"]["protocol_hash"],
               "compared_with": f"{first['name']}, {first['calls']} steps", "entries": entries,
               "failed": {r["name"]: r.get("failed", "left out everywhere") for r in failed}}
    to.mkdir(parents=True, exist_ok=True)
    figure = plot(entries)
    figure.savefig(to / "league.png", dpi=160)
    write_atomically(to / "league.json", json.dumps(content, indent=1) + "\n")
    write_atomically(to / "league.md", markdown(content))
    return content


def _head(row: dict[str, Any]) -> float:
    return float(next(iter(row["result"]["metrics"].values()))["value"])


def _reported(row: dict[str, Any]) -> report.Row:
    return report.Row(row["file"], row["name"], f"{row['name']}, {row['calls']}", row["calls"], "passes" not in row, row["result"])


def markdown(content: dict[str, Any]) -> str:
    """The page: terms, one line for each model and number of calls, what failed."""
    names = list(content["entries"][0]["metrics"])
    heads = ["model", "calls", "NFE", *(f"{n} {tables.arrow(n)}" for n in names), "against the teacher in 4", "ms / image",
             "passes", "MiB", "minutes"]
    lines = [f"# League of the {content['world']} world", "",
             f"Made by `stepdistill league --world {content['world']}`. Every student is made for 4 equal steps, or for the one step "
             f"that its method trains, trained for {content['budget']:,} passes of one sample (forward 1, backward to the input 1 more, to "
             f"the weights 2 more, the teacher's calls for stored pairs among them) and sampled in "
             f"1, 2 and 4 of those calls where its sampler can; one run each, {content['count']:,} pictures, protocol "
             f"`{content['protocol_hash']}`. Errors are those of the generated sample. The paired difference in {names[0]} is to "
             f"{content['compared_with']}. NFE counts both halves of guidance.", "",
             f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for e in content["entries"]:
        delta = (e["difference"] or {}).get(names[0])
        cells = [e["name"], str(e["calls"]), str(e["nfe"]),
                 *(tables.number(e["metrics"][n]["value"], e["metrics"][n]["se"]) for n in names),
                 tables.number(delta["delta"], delta["se"]) if delta else "", f"{e['ms_per_image']:.2f}",
                 f"{e['passes']:,}" if "passes" in e else "", f"{e['bytes'] / 2**20:.0f}" if "bytes" in e else "",
                 f"{e['seconds'] / 60:.1f}" if "seconds" in e else ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"- {name} failed: {why}" for name, why in content["failed"].items()]
    return "\n".join([*lines, "", f"![{names[0]} of every method](league.png)"]) + "\n"


def plot(entries: Sequence[dict[str, Any]]) -> Figure:
    """The first metric of every method, a point for each number of calls, the best methods on top; the teacher's are lines."""
    head = next(iter(entries[0]["metrics"]))
    value = lambda e: e["metrics"][head]["value"]                                                            # noqa: E731
    students = {n: [e for e in entries if e["name"] == n] for n in dict.fromkeys(e["name"] for e in entries if "passes" in e)}
    order = sorted(students, key=lambda n: min(map(value, students[n])), reverse=True)
    figure = Figure(figsize=(8, 1.4 + 0.32 * max(1, len(order))), layout="constrained")
    axes = figure.subplots()
    for calls, colour in zip(CALLS, charts.COLOURS[:len(CALLS)], strict=True):
        points = [(value(e), i) for i, n in enumerate(order) for e in students[n] if e["calls"] == calls]
        axes.scatter([x for x, _ in points], [y for _, y in points], color=colour, s=42, zorder=3, edgecolor="white",
                     label=f"{calls} call{'s' if calls > 1 else ''}")
    for calls, style in ((max(CALLS), (0, (4, 3))), (50, "-")):
        found = [value(e) for e in entries if "passes" not in e and e["calls"] == calls]
        if found:
            axes.axvline(min(found), color=charts.GREY, linewidth=1.2, linestyle=style, zorder=1, label=f"teacher, {calls} steps")
    axes.set_yticks(range(len(order)), order)
    axes.set_xscale("log")
    axes.set_xlabel(f"{head}, lower is better", color=charts.INK)
    axes.grid(axis="x", which="both", color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
