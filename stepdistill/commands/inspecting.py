"""What this installation, a pipeline or a machine can do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.commands.options import Config, Device, Json, Overrides, call_keywords, chosen_recipe, pick_device, show


def methods(as_json: Json = False) -> None:
    """List the distillation methods, their papers, data and roles."""
    from stepdistill.methods import METHODS

    rows = [{"name": name, "title": m.title, "arxiv": m.arxiv, "family": m.family,
             "data": sorted({type(s).__name__.lower() for s in m.data(m.Config()).values()}), "roles": list(m.needs(m.Config()))}
            for name, m in METHODS.items()]
    lines = [f"{r['name']:<14}{r['title']} (arXiv:{r['arxiv']}; {r['family']}; reads {', '.join(r['data'])})" for r in rows]
    show(rows, as_json, "\n".join(lines))


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
    inputs = usual_inputs(pipeline, **{**worlds.call_of(path), **call_keywords(keywords)})
    report = probing.probe(pipeline, inputs, call_keywords(other) or None)
    show(report, as_json, probing.show(report))
    if not report["fits"]:
        raise typer.Exit(2)


def doctor(as_json: Json = False) -> None:
    """Examine the environment: versions, device, attention back ends, threads, and where data and weights are looked for."""
    from stepdistill.doctor import examine

    report = examine()
    show(report, as_json, "\n".join(f"{key:<22}{value}" for key, value in report.items()))


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
