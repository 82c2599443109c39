"""Exams, their references and judges, and what is read in their results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.commands.options import Batch, Device, Json, Renoise, Shift, Solver, call_keywords, pick_device, show

AGAIN = ("model", "to", "also", "reference", "prompts", "device", "as_json")            # of `eval`, where pictures are made already


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an exported folder, a diffusers pipeline, teacher:fashion, or a folder of "
                                                               "PNG pictures; a result, for --also alone")],
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

    Several processes share the work: `torchrun --nproc-per-node 4 -m stepdistill eval MODEL --to FILE`. Further measures of a result are
    taken from the features that it kept: `stepdistill eval result.json --also density:dinov2-l14 --to more.json`.
    """
    from stepdistill.eval import tables
    from stepdistill.eval.again import measure_again
    from stepdistill.eval.cards import Brought
    from stepdistill.eval.evaluate import evaluate as score

    if model.endswith(".json") and not Path(model).is_dir():
        sources = {name: context.get_parameter_source(name) for name in context.params}
        if given := [name for name, source in sources.items() if source and source.name == "COMMANDLINE" and name not in AGAIN]:
            raise ValueError(f"{model} is a result, whose pictures are made already: leave --{given[0].replace('_', '-')} out")
        result = measure_again(Path(model), also or (), to, reference=reference, prompts=prompts, device=pick_device(device))
    else:
        brought = Brought(reference, prompts, extractor, tuple(also or ()))
        result = score(model, protocol, count, to, steps=steps, guidance=guidance, solver=solver, renoise=renoise, shift=shift, seed=seed,
                       batch_size=batch_size, device=pick_device(device), features_to=features_to, brought=brought,
                       call=call_keywords(call) or None, against=against, train=train, held_out=held_out)
    if int(os.environ.get("RANK", "0")) == 0:
        wide = max(20, *map(len, result["metrics"]))
        lines = [f"{name:<{wide}}{m['value']:>10.4f} ± {m['se']:.4f}"
                 + (f"    without bias {tables.unbiased(m)}" if tables.biased(m) else "") for name, m in result["metrics"].items()]
        show(result, as_json, "\n".join([*lines, f"written to {to}"]))


def protocols(as_json: Json = False) -> None:
    """List the protocols: their hashes, what each measures, and what it needs that is not on this machine."""
    from stepdistill.eval import cards

    rows = cards.listing()
    lines = [line for row in rows for line in (
        f"{row['name']:<18}{row['hash'] or '-':<16}  {row['dataset']}, {row['count']:,} pictures", f"    {', '.join(row['measures'])}",
        *(f"    missing: {told}" for told in row["missing"]))]
    show(rows, as_json, "\n".join(lines))


def reference(
    source: Annotated[Path, typer.Argument(help="a folder of real pictures or of folders of them, or published statistics (.npz with "
                                                  "mu and sigma)")],
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
                             call=call_keywords(call) or None, device=pick_device(device))
    show({"folder": str(to), "count": count}, as_json,
         f"{count} pictures in {to}; when the judge has written its scores: stepdistill judges read {layout} SCORES --into RESULT")


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


def compare(
    results: Annotated[list[Path], typer.Argument(help="result files of one protocol; the teacher with most steps is compared with")],
    to: Annotated[Path, typer.Option(help="a folder for report.html, report.md, report.json, the grid and the plot")],
    run: Annotated[list[Path] | None, typer.Option(help="a run folder whose training curves are shown, too; may be repeated")] = None,
    seeds: Annotated[bool, typer.Option("--seeds", help="one row for a model's results of several seeds: mean and standard deviation over "
                                                        "them, and of three the least distance")] = False,
    speed: Annotated[Path | None, typer.Option(help="a file of `stepdistill bench speed --to`, for the milliseconds")] = None,
    as_json: Json = False,
) -> None:
    """Put results of one protocol into a page: a table, picture grids, a quality-against-NFE plot, classes, and how to repeat it."""
    from stepdistill.eval.report import compare as write

    report = write(results, to, run or (), speed, seeds)
    show(report, as_json, f"report in {to / 'report.html'} and {to / 'report.md'}")


def league(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="default: the world's one of every method")] = None,
    out: Annotated[Path, typer.Option(help="runs, students and features; runs go on from here")] = Path("runs/league"),
    to: Annotated[Path, typer.Option(help="results of what is finished, so not done again; the table is TO.md, TO.json and TO.png"
                                     )] = Path("docs/league"),
    world: Annotated[str, typer.Option(help="whose recipes and protocol: fashion, emoji")] = "fashion",
    budget: Annotated[int | None, typer.Option(min=1, help="passes of one sample for each recipe; default: 600,000")] = None,
    count: Annotated[int, typer.Option(min=50, help="pictures for each score")] = 2000,
    as_json: Json = False,
) -> None:
    """Train the recipes of a world at one budget, score its student in 1, 2 and 4 calls, and write the table. Hours; Ctrl-C and go on."""
    from stepdistill import league as playing

    content = playing.play(world, out, to, names or (), budget or playing.BUDGET, count)
    show(content, as_json, f"{len(content['entries'])} rows in {to.with_name(f'{to.name}.md')}")


def diagnose(
    run: Annotated[Path, typer.Argument(help="a run folder, finished or not")],
    export: Annotated[Path | None, typer.Option(help="an export of it: is it sampled as it was trained?")] = None,
    as_json: Json = False,
) -> None:
    """Say which known illnesses a run's curves and pictures show, by what evidence, and what helps."""
    from stepdistill import diagnose as physician

    found = physician.examine(run, export)
    show(found.to_dict(), as_json, physician.shown(found))
