"""The commands. Each is a few lines over the library.

Exit codes: 0 done, 2 the user's input (one line that names the remedy), 1 a fault of ours, 130 interrupted. With --json one JSON object
goes to standard output and everything else to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  help="Turn any diffusers pipeline into a one-to-four-step one.",
                  epilog="First try: `bash scripts/quickstart.sh`, or `stepdistill train --config fashion/dmd2 --out runs/first`.")
bench = typer.Typer(no_args_is_help=True, help="Timings: of training steps, and of models.")
app.add_typer(bench, name="bench")
weights = typer.Typer()
app.add_typer(weights, name="weights")
judges = typer.Typer(no_args_is_help=True, help="Judges that live in environments of their own: pictures for them, and what they said.")
app.add_typer(judges, name="judges")

Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Config = Annotated[str | None, typer.Option("--config", help="a recipe: a YAML file, or the short name of a shipped one (fashion/dmd2)")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys to change: steps=500 method.gan_weight=0")]
Batch = Annotated[int, typer.Option(help="pictures made at a time; changes speed, never a picture")]
Solver = Annotated[str | None, typer.Option(help="for a teacher: ddim, heun or dpmpp_2m, without re-noising")]
Renoise = Annotated[float | None, typer.Option(min=0, max=1, help="for a teacher: 0 follows the ODE, 1 re-noises x0, between is both")]
Shift = Annotated[float | None, typer.Option(min=0.01, max=100, help="for a teacher: equal steps, moved towards noise (above 1) or detail")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: what accelerate finds")]


def show(value: Any, as_json: bool, human: str) -> None:
    """Print a result for a program or for a person."""
    print(json.dumps(value) if as_json else human)


def pick_device(name: str | None) -> Any:
    """The device named, or the accelerator if there is one: of several processes of a launch each has its own."""
    import torch

    if name is None:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def chosen_recipe(config: str | None, overrides: list[str] | None) -> Any:
    """The recipe that is named, with its keys changed."""
    from stepdistill import recipe

    if config is None:
        raise ValueError(f"name a recipe with --config ({recipe.shown()}, or a YAML file)")
    return recipe.load(config, overrides or [])


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    out: Annotated[Path | None, typer.Option(help="a new folder for the run")] = None,
    resume: Annotated[Path | None, typer.Option(help="a run folder to continue")] = None,
    dry_run: Annotated[bool, typer.Option(help="build everything, time one iteration, write nothing")] = False,
    as_json: Json = False,
) -> None:
    """Distil a teacher: `stepdistill train --config fashion/dmd2 steps=600 --out runs/mine`.

    Ctrl-C saves and exits with 130; `--resume RUN` continues bit for bit.
    """
    from stepdistill import recipe
    from stepdistill.eval.exam import examine
    from stepdistill.training import loop

    if resume is not None:
        if config or out or overrides or dry_run:
            raise ValueError("--resume takes the recipe from the run folder: give it alone, without --config, --out or key=value")
        outcome = loop.resume(resume, (examine,))
    else:
        if config is None:
            raise ValueError(f"name a recipe with --config ({recipe.shown()}, or a YAML file), or a run with --resume")
        chosen = recipe.load(config, overrides or [])
        if dry_run:
            return _dry_run(chosen, as_json)
        if out is None:
            raise ValueError("name a new folder for the run with --out")
        outcome = loop.start(chosen, out, (examine,))
    if int(os.environ.get("RANK", "0")) == 0:
        done = f"{outcome.step} of {outcome.steps} steps in {outcome.folder}"
        show(outcome.to_dict(), as_json, f"{done}\nnext: stepdistill export {outcome.folder} --to FOLDER" if outcome.finished else done)
    if not outcome.finished:
        raise typer.Exit(130)


def _dry_run(chosen: Any, as_json: bool) -> None:
    from stepdistill.training import loop, measure
    from stepdistill.training.assemble import assemble

    report = measure.dry_run(assemble(chosen, loop.make_accelerator(chosen, None)))
    mib = 2**20
    lines = [f"{'role':<10}{'parameters':>12}{'weights':>11}{'gradients':>11}{'optimizer':>11}   MiB"]
    lines += [f"{name:<10}{row['parameters']:>12,}" + "".join(f"{row[k] / mib:>11.1f}" for k in ("weights", "gradients", "optimizer"))
              for name, row in report["bytes"].items()]
    lines += [f"in all {report['total_bytes'] / mib:.1f} MiB without activations, on {report['device']}", "passes of one iteration "
              f"({report['steps_per_iteration']} steps; updates {report['updates_per_iteration']}):"]
    lines += [f"  {p['role']:<10}{p['rows']:>5} samples, gradient: {p['gradient']}" for p in report["passes"]]
    lines += [f"one iteration {report['iteration_seconds']:.2f} s; {chosen.steps} steps in about {report['eta_seconds'] / 60:.1f} min"]
    show(report, as_json, "\n".join(lines))


@app.command()
def cache(overrides: Overrides = None, config: Config = None, device: Device = None, as_json: Json = False) -> None:
    """Encode the prompts and pictures of a recipe once, into its data.cache; training then loads no encoders.

    What Ctrl-C or a crash interrupts goes on the next time; `train` fills what is missing, too. Several processes share the work:
    `accelerate launch -m stepdistill cache --config RECIPE`.
    """
    from stepdistill.data.cache import fill_all
    from stepdistill.training import loop
    from stepdistill.training.assemble import parts_of

    chosen = chosen_recipe(config, overrides)
    accelerator = loop.make_accelerator(chosen, None)
    done = fill_all([part.cache for part in parts_of(chosen) if part.cache], accelerator.device if device is None else pick_device(device))
    accelerator.end_training()
    if done is None:
        raise ValueError("name a folder for the cache with data.cache")
    if not accelerator.is_main_process:
        return
    whole = f"\ntraining loads the encoders all the same: {done.whole}" if done.whole else ""
    show(done.to_dict(), as_json, f"{done.conditions} conditions and {done.latents} latents in {done.folder}: {done.encoded} encoded now, "
                                  f"{done.shards} shards, {done.bytes / 2**20:.1f} MiB{whole}")


@app.command()
def pairs(
    count: Annotated[int, typer.Option(min=1, help="how many")],
    overrides: Overrides = None,
    config: Config = None,
    to: Annotated[Path | None, typer.Option(help="a folder for them; default: the recipe's data.pairs")] = None,
    steps: Annotated[int, typer.Option(min=1, help="of the teacher's ODE, equal ones from pure noise")] = 50,
    solver: Annotated[str, typer.Option(help="ddim, heun or dpmpp_2m")] = "dpmpp_2m",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Batch = 64,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Store noises with what the teacher's ODE makes of them, for methods that regress on such pairs: `--config fashion/dmd --count 5000`.

    Teacher, prompts, guidance and precision are the recipe's. What Ctrl-C or a crash interrupts goes on the next time. Several processes
    share the work: `accelerate launch -m stepdistill pairs --config RECIPE --count N`.
    """
    from stepdistill import pairs as making
    from stepdistill.training import loop

    chosen = chosen_recipe(config, overrides)
    folder = to or chosen.data.pairs
    if folder is None:
        raise ValueError("name a folder for the pairs with --to, or with data.pairs in the recipe")
    accelerator = loop.make_accelerator(chosen, None)
    done = making.make(chosen, folder, count=count, steps=steps, solver=cast(Any, solver), seed=seed, batch_size=batch_size,
                       device=accelerator.device if device is None else pick_device(device))
    accelerator.end_training()
    if accelerator.is_main_process:
        given = "" if folder == chosen.data.pairs else f" data.pairs={folder}"
        show(done.to_dict(), as_json, f"{done.pairs} pairs in {done.folder}: {done.made} made now, {done.shards} shards, "
                                      f"{done.bytes / 2**20:.1f} MiB\nnext: stepdistill train --config {config}{given} --out RUN")


@app.command()
def plan(
    overrides: Overrides = None,
    config: Config = None,
    network: Annotated[str | None, typer.Option(help="for a teacher not here: sd15, flux-dev, wan21-1.3b, ... or a JSON file")] = None,
    gpu: Annotated[str | None, typer.Option(help="a card's memory, 24GB: does it fit, and what would make it fit")] = None,
    as_json: Json = False,
) -> None:
    """Count a recipe's bytes on a GPU without weights and without one: per role, at the peak, and against a card.

    Minutes for a network of billions, since its operations are gone through one by one. Exit code 0 whether it fits or not.
    """
    from stepdistill.models import networks
    from stepdistill.training import plan as planning

    chosen = chosen_recipe(config, overrides)
    card = None if gpu is None else planning.bytes_of_card(gpu)
    found = planning.plan(chosen, None if network is None else networks.find(network), card)
    show(found.to_dict(), as_json, planning.shown(found))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[Path, typer.Option(help="a new folder for the pipeline")],
    raw: Annotated[bool, typer.Option(help="the last weights instead of their moving average")] = False,
    best: Annotated[bool, typer.Option(help="the best checkpoint by the recipe's exam instead of the newest")] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="a fully trained pipeline as an adapter of this rank, too")] = None,
    merge: Annotated[Path | None, typer.Option(help="another run of the same teacher, whose student's weights are averaged in")] = None,
    share: Annotated[float | None, typer.Option(min=0, max=1, help="RUN's part in a merge; default: 0.5")] = None,
    as_json: Json = False,
) -> None:
    """Write a trained student as a diffusers folder that loads without stepdistill."""
    from stepdistill.export import export as write
    from stepdistill.models.load import is_prompted

    done = write(run, to, weights="raw" if raw else "ema", lora_rank=lora_rank, best=best, merge=merge, share=share)
    lines = [f"student of step {done.step} in {done.folder}"]
    if done.merged:
        lines.append(f"{done.merged['share']:g} of it, the rest the student of step {done.merged['step']} of {merge}")
    if done.fit:
        lines.append(f"adapter of rank {done.fit.rank}: relative error {done.fit.error:.3g} over {done.fit.layers} layers, "
                     f"{done.fit.worst_error:.3g} in {done.fit.worst}; {done.fit.beyond:.3g} of the squared change is beyond any adapter")
    asked = '--prompt "a red apple" --count 4' if is_prompted(Path(done.folder)) else "--count 40"
    show(done.to_dict(), as_json, "\n".join([*lines, f"next: stepdistill sample {done.folder} --to pictures {asked}"]))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="DIR", help="an exported folder, teacher:fashion, teacher:emoji or teacher:emoji/dit")],
    to: Annotated[Path, typer.Option(help="a new folder for 000000.png ... and grid.png")],
    count: Annotated[int | None, typer.Option(min=1, help="default: 40, or one for each of --prompts")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="network calls per picture; default: the model's own")] = None,
    guidance: Annotated[float | None, typer.Option(help="w in null + w·(cond - null); default: the model's own")] = None,
    label: Annotated[str | None, typer.Option(help="one class, by name or number; default: all in turn")] = None,
    solver: Solver = None,
    renoise: Renoise = None,
    shift: Shift = None,
    prompt: Annotated[str | None, typer.Option(help="for a pipeline with prompts")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a file of them, as data.prompts; they take turns")] = None,
    batch_size: Batch = 100,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make pictures. Picture i depends on the seed and on i alone; of a pipeline with prompts, prompts.txt names its prompt in line i."""
    from stepdistill.data.prompts import read_prompts
    from stepdistill.eval.generate import balanced, generate
    from stepdistill.eval.models import open_model
    from stepdistill.images import grid, save_png, to_image

    _fresh(to)
    if prompt is not None and prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    texts = read_prompts(prompts) if prompts else () if prompt is None else (prompt,)
    opened = open_model(model, steps, guidance, solver=solver, renoise=renoise, shift=shift, device=pick_device(device), prompts=texts)
    if texts and label is not None:
        raise ValueError(f"{model} has prompts and no classes: leave --label out")
    if not opened.is_teacher and steps not in (None, opened.trained):
        print(f"stepdistill: {model} was made for {opened.trained} steps and is run with {steps} equal ones", file=sys.stderr)
    count = count or (len(texts) if prompts else 40)
    choose = balanced(opened.teacher.classes) if label is None else (lambda i, n=opened.class_number(label): n)
    made = generate(opened.teacher, opened.spec, count, seed, batch_size=min(batch_size, opened.most_at_once), label=choose)
    to.mkdir(parents=True, exist_ok=True)
    if texts:
        (to / "prompts.txt").write_text("".join(f"{' '.join(texts[i % len(texts)].split())}\n" for i in range(count)))
    for i, picture in enumerate(made.images):
        save_png(to_image(picture), to / f"{i:06d}.png")
    save_png(grid(made.images[:100], columns=min(10, count)), to / "grid.png")
    value = {"folder": str(to), "count": count, "seed": seed, "sampler": opened.spec.to_dict(), "nfe": opened.spec.nfe,
             "ms_per_image": made.ms_per_image}
    show(value, as_json, f"{count} pictures and grid.png in {to} ({made.ms_per_image:.1f} ms each)")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an exported folder, a diffusers pipeline, teacher:fashion, or a folder of "
                                                               "PNG pictures")],
    to: Annotated[Path, typer.Option(help="the result file, result.json")],
    protocol: Annotated[str, typer.Option(help="which exam, as `stepdistill protocols` lists them")] = "fashion",
    count: Annotated[int | None, typer.Option(min=50, help="pictures; scores of unequal counts are never compared. Default: the "
                                                           "protocol's own number")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="network calls per picture; default: the model's own")] = None,
    guidance: Annotated[float | None, typer.Option(help="w; default: the model's own")] = None,
    solver: Solver = None,
    renoise: Renoise = None,
    shift: Shift = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Batch = 100,
    prompts: Annotated[Path | None, typer.Option(help="a file of them, as data.prompts; picture i has prompt i mod their number")] = None,
    reference: Annotated[Path | None, typer.Option(help="real pictures as `stepdistill reference` keeps them")] = None,
    against: Annotated[str | None, typer.Option(help="a teacher, or its result: distances to its pictures, drift, variety as a share of "
                                                     "its own")] = None,
    extractor: Annotated[str | None, typer.Option(help="what custom and teacher-only are measured on; default: dinov2-l14")] = None,
    also: Annotated[list[str] | None, typer.Option(help="a further measure, KIND:EXTRACTOR; may be repeated: --also clip:clip-l14 --also "
                                                        "vendi:dinov2-s14")] = None,
    call: Annotated[list[str] | None, typer.Option(help="a keyword of a teacher's pipeline; may be repeated: --call height=512")] = None,
    train: Annotated[Path | None, typer.Option(help="a reference of training pictures: are any of them learnt by heart?")] = None,
    held_out: Annotated[Path | None, typer.Option(help="with --train, a reference of real pictures that were not trained on")] = None,
    features_to: Annotated[Path | None, typer.Option(help="a second place for the features, a .safetensors file")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score a model in fp32 and write a result file with its protocol, sampler and error bars.

    Several processes share the work: `torchrun --nproc-per-node 4 -m stepdistill eval MODEL --to FILE`.
    """
    from stepdistill.eval.cards import Brought
    from stepdistill.eval.evaluate import evaluate as score

    brought = Brought(reference, prompts, extractor, tuple(also or ()))
    result = score(model, protocol, count, to, steps=steps, guidance=guidance, solver=solver, renoise=renoise, shift=shift, seed=seed,
                   batch_size=batch_size, device=pick_device(device), features_to=features_to, brought=brought,
                   call=_keywords(call) or None, against=against, train=train, held_out=held_out)
    if int(os.environ.get("RANK", "0")) == 0:
        wide = max(20, *map(len, result["metrics"]))
        lines = [f"{name:<{wide}}{m['value']:>10.4f} ± {m['se']:.4f}" for name, m in result["metrics"].items()]
        show(result, as_json, "\n".join([*lines, f"written to {to}"]))


@app.command()
def protocols(as_json: Json = False) -> None:
    """List the protocols: their hashes, what each measures, and what it needs that is not on this machine."""
    from stepdistill.eval import cards

    rows = cards.listing()
    lines = [line for row in rows for line in (
        f"{row['name']:<18}{row['hash'] or '-':<16}  {row['dataset']}, {row['count']:,} pictures", f"    {', '.join(row['measures'])}",
        *(f"    missing: {told}" for told in row["missing"]))]
    show(rows, as_json, "\n".join(lines))


@app.command()
def reference(
    source: Annotated[Path, typer.Argument(help="a folder of real pictures, or published statistics (.npz with mu and sigma)")],
    protocol: Annotated[str, typer.Option(help="for which protocol: its crop, size and extractors")],
    to: Annotated[Path | None, typer.Option(help="a .safetensors file; default: where `eval` looks for the protocol's own")] = None,
    set_from: Annotated[Path | None, typer.Option(help="another source for what kernel distances and neighbours look at")] = None,
    keep: Annotated[int | None, typer.Option(min=2, help="pictures whose features are kept, evenly spaced; default: the protocol's "
                                                         "number")] = None,
    extractor: Annotated[str | None, typer.Option(help="of custom and teacher-only; default: dinov2-l14")] = None,
    also: Annotated[list[str] | None, typer.Option(help="a further measure, as of `eval`")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make statistics of real pictures, once: `stepdistill reference val2014 --protocol coco14-30k-256`.

    They hold the moments of all pictures, the features of some, and the digests of pictures and weights.
    """
    from stepdistill.eval import cards, references

    stored, path = cards.make_reference(protocol, source, to, set_from=set_from, keep=keep,
                                        brought=cards.Brought(extractor=extractor, also=tuple(also or ())), device=pick_device(device))
    value = {"file": str(path), "sha256": stored.sha256, "count": stored.count, "features": references.kept(stored)}
    show(value, as_json, f"{stored.count:,} pictures in {path}; features kept: "
                         + ", ".join(f"{number:,} of {key}" for key, number in value["features"].items()))


@judges.command("write")
def write_for_judges(
    layout: Annotated[str, typer.Argument(help="plain, geneval, dpg, hpsv2 or vbench")],
    model: Annotated[str, typer.Argument(help="a pipeline with prompts, exported or not")],
    prompts: Annotated[Path, typer.Option(help="the judge's own: evaluation_metadata.jsonl, the folder of DPG-Bench or HPSv2; any file for "
                                               "plain and vbench")],
    to: Annotated[Path, typer.Option(help="a new folder")],
    seeds: Annotated[int | None, typer.Option(min=1, help="pictures of each prompt; default: the judge's number")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="of a video, for vbench")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="network calls per picture; default: the model's own")] = None,
    guidance: Annotated[float | None, typer.Option(help="w; default: the model's own")] = None,
    call: Annotated[list[str] | None, typer.Option(help="a keyword of a teacher's pipeline; may be repeated")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a model's pictures in the folder layout of a judge: `stepdistill judges write geneval student --prompts FILE --to FOLDER`."""
    from stepdistill.eval import benchmarks

    count = benchmarks.write(layout, model, prompts, to, seeds=seeds, frames=frames, seed=seed, steps=steps, guidance=guidance,
                             call=_keywords(call) or None, device=pick_device(device))
    show({"folder": str(to), "count": count}, as_json,
         f"{count} pictures in {to}; when the judge has written its scores: stepdistill judges read {layout} SCORES --into RESULT")


@judges.command("read")
def read_from_judges(
    layout: Annotated[str, typer.Argument(help="plain, geneval, dpg, hpsv2 or vbench")],
    scores: Annotated[Path, typer.Argument(help="what the judge wrote; for plain, JSON lines of file and score")],
    into: Annotated[Path, typer.Option(help="the model's result file")],
    folder: Annotated[Path | None, typer.Option(help="for plain: the folder that was judged")] = None,
    name: Annotated[str | None, typer.Option(help="for plain: what the judge is called")] = None,
    as_json: Json = False,
) -> None:
    """Put what a judge said into a model's result, where `compare` shows it with its error and paired with the other models' scores."""
    from stepdistill.eval import benchmarks

    added = benchmarks.take(layout, scores, into, folder=folder, name=name)
    show(added, as_json, "\n".join([*(f"{key:<28}{block['value']:>10.4f} ± {block['se']:.4f}" for key, block in added.items()),
                                    f"written to {into}"]))


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="result files of one protocol; the teacher with most steps is compared with")],
    to: Annotated[Path, typer.Option(help="a folder for report.html, report.md, report.json, the grid and the plot")],
    run: Annotated[list[Path] | None, typer.Option(help="a run folder whose training curves are shown, too; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """Put results of one protocol into a page: a table, picture grids, a quality-against-NFE plot, classes, and how to repeat it."""
    from stepdistill.eval.report import compare as write

    report = write(results, to, run or ())
    show(report, as_json, f"report in {to / 'report.html'} and {to / 'report.md'}")


@app.command()
def league(
    names: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="default: all with a recipe in this world")] = None,
    out: Annotated[Path, typer.Option(help="where runs, students and results are kept; what is there is not done again")] = Path("league"),
    to: Annotated[Path | None, typer.Option(help="a folder for league.md, league.json and league.png; default: OUT/report")] = None,
    world: Annotated[str, typer.Option(help="whose recipes and protocol: fashion")] = "fashion",
    budget: Annotated[int | None, typer.Option(min=1, help="passes of one sample for each method; default: 600,000")] = None,
    count: Annotated[int, typer.Option(min=50, help="pictures for each score")] = 2000,
    as_json: Json = False,
) -> None:
    """Train every method of a world at one budget, score its student in 1, 2 and 4 calls, and write the table. Hours; Ctrl-C and go on."""
    from stepdistill import league as playing

    playing.play(world, out, names or (), budget or playing.BUDGET, count)
    content = playing.publish(out, to or out / "report")
    show(content, as_json, f"{len(content['entries'])} rows in {(to or out / 'report') / 'league.md'}")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the distillation methods, their papers, data and roles."""
    from stepdistill.methods import METHODS

    rows = [{"name": name, "title": m.title, "arxiv": m.arxiv, "family": m.family,
             "data": sorted({type(s).__name__.lower() for s in m.data(m.Config()).values()}), "roles": list(m.needs(m.Config()))}
            for name, m in METHODS.items()]
    lines = [f"{r['name']:<14}{r['title']} (arXiv:{r['arxiv']}; {r['family']}; reads {', '.join(r['data'])})" for r in rows]
    show(rows, as_json, "\n".join(lines))


@app.command()
def probe(
    path: Annotated[str, typer.Argument(help="a diffusers pipeline folder, emoji or emoji/dit")],
    keywords: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of its call: height=512 width=512")] = None,
    other: Annotated[list[str] | None, typer.Option(help="a keyword at which the proof is repeated: --other width=768")] = None,
    dtype: Annotated[str, typer.Option(help="float32 proves to 1e-4; bfloat16 needs half the memory and proves less")] = "float32",
    device: Device = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that lies in the folder")] = False,
    as_json: Json = False,
) -> None:
    """Watch a pipeline call its network, say what was learnt, and prove that we call it the same way.

    Exit code 0 when it can be distilled as it is, 2 with the reason when not.
    """
    import torch

    from stepdistill import probe as probing
    from stepdistill import worlds
    from stepdistill.models.load import load_pipeline
    from stepdistill.models.recording import usual_inputs

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    pipeline = load_pipeline(worlds.teacher_folder(path) or path, device=pick_device(device), dtype=getattr(torch, dtype),
                             trust_remote_code=trust_remote_code)
    inputs = usual_inputs(pipeline, **{**worlds.call_of(path), **_keywords(keywords)})
    report = probing.probe(pipeline, inputs, _keywords(other) or None)
    show(report, as_json, probing.show(report))
    if not report["fits"]:
        raise typer.Exit(2)


def _keywords(items: Sequence[str] | None) -> dict[str, Any]:
    import yaml

    pairs = [item.partition("=") for item in items or []]
    if wrong := [key for key, sign, _ in pairs if not sign or not key]:
        raise ValueError(f"{wrong[0]!r} must read key=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="a run folder, finished or not")],
    export: Annotated[Path | None, typer.Option(help="an export of it: is it sampled as it was trained?")] = None,
    as_json: Json = False,
) -> None:
    """Say which known illnesses a run's curves and pictures show, by what evidence, and what helps."""
    from stepdistill import diagnose as physician

    found = physician.examine(run, export)
    show(found.to_dict(), as_json, physician.shown(found))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Examine the environment: versions, device, attention back ends, threads, and where data and weights are looked for."""
    from stepdistill.doctor import examine

    report = examine()
    show(report, as_json, "\n".join(f"{key:<22}{value}" for key, value in report.items()))


@weights.callback(invoke_without_command=True)
def list_weights(context: typer.Context, as_json: Json = False) -> None:
    """List the public networks that judge pictures: which weights are there, and which are missing and where to get them.

    They are looked for in `$STEPDISTILL_EVAL_WEIGHTS`, else in `~/.cache/stepdistill/eval`, and never downloaded: fetch the public file
    yourself, then `stepdistill weights convert NAME FILE`. Checked weights came from the file with the published SHA-256.
    """
    from stepdistill.eval import weights as kept

    if context.invoked_subcommand is not None:
        return
    rows = kept.listing()
    lines = [f"in {kept.root()}:", *(f"{row['name']:<22}{row['state']:<11}{row['serves']}" for row in rows)]
    lines += [f"to get {entry.name}: {entry.described}" for entry in (kept.known(r["name"]) for r in rows if r["state"] == "missing")]
    show(rows, as_json, "\n".join([*lines, "next: stepdistill weights convert NAME FILE"]))


@weights.command("convert")
def convert_weights(
    name: Annotated[str, typer.Argument(help="as `stepdistill weights` lists it")],
    file: Annotated[Path, typer.Argument(help="the public file")],
    to: Annotated[Path | None, typer.Option(help="another place than where weights are looked for")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="for a CLIP that is to read prompts: a folder with vocab.json and merges.txt, "
                                                         "such as the tokenizer of any Stable Diffusion pipeline")] = None,
    unchecked: Annotated[bool, typer.Option(help="trust a file whose SHA-256 is not known for certain")] = False,
    as_json: Json = False,
) -> None:
    """Turn a public file into safetensors, once: `stepdistill weights convert clip-l14 ViT-L-14.pt --vocabulary MODEL/tokenizer`.

    The file may hold code, so it is opened only if its SHA-256 is the published one.
    """
    from stepdistill.eval import weights as kept

    folder = kept.convert(name, file, to, vocabulary=vocabulary, unchecked=unchecked)
    show({"name": name, "folder": str(folder), "fingerprint": kept.fingerprint(folder / kept.WEIGHTS)}, as_json, f"{name} in {folder}")


@bench.command("step")
def bench_step(config: Config = None, overrides: Overrides = None, repeats: Annotated[int, typer.Option(min=1)] = 30,
               as_json: Json = False) -> None:
    """Time an iteration against the bare network passes it needs, alternating in one process."""
    from tqdm import tqdm

    from stepdistill.training import loop, measure
    from stepdistill.training.assemble import assemble

    chosen = chosen_recipe(config, overrides)
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    with tqdm(total=repeats, file=sys.stderr, desc="bench step", dynamic_ncols=True) as bar:
        report = measure.bench_step(run, repeats, lambda n: bar.update(n - bar.n))
    human = (f"iteration {report['iteration_seconds']:.3f} s, bare passes {report['passes_seconds']:.3f} s, ratio {report['ratio']:.3f} "
             f"(median of {repeats}; {report['steps_per_iteration']} steps an iteration, {len(report['passes'])} passes)")
    show(report, as_json, human)


@bench.command("speed")
def bench_speed(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="exported folders, or teacher:fashion")],
    against: Annotated[str | None, typer.Option(help="one more model in its own steps; the others are so many times faster")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="network calls per picture of each MODEL; default: its own")] = None,
    batches: Annotated[str, typer.Option(help="how many pictures at a time, one number or several")] = "1,8",
    runs: Annotated[int, typer.Option(min=30, help="timed, of each model at each batch size")] = 30,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile denoiser and decoder; the first run is told apart")] = False,
    precision: Annotated[str, typer.Option(help="fp32, or bf16: autocast of the denoiser")] = "fp32",
    prompt: Annotated[str | None, typer.Option(help="for pipelines with prompts")] = None,
    to: Annotated[Path | None, typer.Option(help="a result file, speed.json")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time models in turns: denoiser, with text encoders, with decoder; medians, operations, and memory on a GPU.

    `stepdistill bench speed student --against teacher:fashion`. On a CPU, OMP_NUM_THREADS says how many threads.
    """
    from stepdistill.eval import speed
    from stepdistill.training.checkpoint import write_atomically

    if not all(part.strip().isdecimal() for part in batches.split(",")):
        raise ValueError(f"--batches is one number or several with commas between, 1,8: got {batches!r}")
    if to is not None and (to.is_dir() or to.suffix != ".json"):
        raise ValueError(f"{to} must name a .json file")
    report = speed.bench(models, against=against, steps=steps, batches=[int(part) for part in batches.split(",")], runs=runs,
                         compiled=compiled, precision=precision, prompt=prompt, device=pick_device(device))
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, json.dumps(report, indent=2) + "\n")
    show(report, as_json, speed.shown(report) + ("" if to is None else f"\nwritten to {to}"))


@app.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="DIR", help="an exported folder, or a teacher: teacher:emoji")],
    teacher: Annotated[str | None, typer.Option(help="what stands beside it; default: its own teacher, where that is here")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Serve a page to this machine, until Ctrl-C: prompt or class, seed and steps; the model's pictures beside its teacher's."""
    from stepdistill import demo as showing

    models = showing.open_pair(model, teacher, pick_device(device))
    beside = f" beside {models[1].name}" if len(models) > 1 else "" if models[0].is_teacher else " alone (--teacher puts one beside it)"
    showing.serve(models, port, lambda address: show({"address": address, "models": [m.name for m in models]}, as_json,
                                                     f"{model}{beside}: {address} (Ctrl-C ends it)"))


def _fresh(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --to")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run a command; the exit code."""
    show_trace = os.environ.get("STEPDISTILL_TRACEBACK") == "1"
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if show_trace:
            traceback.print_exc()
        print(f"stepdistill: {_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ in ("Abort",):
            return 130
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):    # the parser's own errors
            message = error.format_message()
            if message:
                print(f"stepdistill: {' '.join(message.split())} (see --help)", file=sys.stderr)
            return int(error.exit_code) if message else 2
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            print("stepdistill: too little memory: lower batch_size, or raise accumulate to keep it", file=sys.stderr)
            return 2
        if isinstance(error, FloatingPointError):
            print(f"stepdistill: {error}", file=sys.stderr)
            return 1
        traceback.print_exc()
        return 1


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or error}: {error.filename}; check the path and who may write there"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
