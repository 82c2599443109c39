"""From a recipe to a student and its pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from stepdistill.commands.options import (
    Batch,
    Config,
    Device,
    Json,
    Overrides,
    Renoise,
    Shift,
    Solver,
    chosen_recipe,
    fresh,
    pick_device,
    show,
)


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
    from stepdistill.eval.exam import examine, judge_of
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
        if chosen.exam.every:
            judge_of(chosen.exam.extractor)                                      # what is missing is told before anything is trained
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

    fresh(to)
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
