"""A trained student as a diffusers folder that loads where stepdistill is not installed, with its model card; and back again.

    model_index.json  pipeline.py     the self-contained pipeline and its settings
    unet/  scheduler/  vae/           weights in safetensors; a stock scheduler set up as the student needs it; the teacher's VAE if any
    recipe.yaml  stepdistill.json     how it was made; what a diffusers folder cannot say (codec, labels, sampler, digest, ...)
    README.md                         the model card
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import diffusers
import jinja2
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from peft import LoraConfig
from torch import Tensor

import stepdistill
from stepdistill import recipe as recipes
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.methods import find
from stepdistill.models.adapters import LoraRecipe, diffusers_names, is_adapter, layers_of, merged
from stepdistill.models.drive import Driven
from stepdistill.models.load import NOTES, Teacher, Vae, is_prompted, load_pipeline, load_teacher, read_json
from stepdistill.recipe import Recipe
from stepdistill.training import checkpoint
from stepdistill.training.loop import CHECKPOINTS, RECIPE, say

CARD, PIPELINE, INDEX = "README.md", "pipeline.py", "model_index.json"
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
LICENCES = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
            "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause")                   # ids of the Hugging Face hub; any other is "other"
STOCK_TABLES = ("linear", "scaled_linear", "squaredcos_cap_v2")                  # beta schedules that LCM and DDIM know, too


@dataclass(frozen=True)
class Exported:
    """What was written. `ema` is False for a run that keeps no average, or where the raw weights were asked for."""

    folder: str
    step: int
    steps: int
    ema: bool
    unet_sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(run: Path, to: Path, weights: Literal["ema", "raw"] = "ema", *, dtype: Literal["float32", "bfloat16", "float16"] = "float32",
           results: Sequence[Path] = ()) -> Exported:
    """Write the newest readable checkpoint of a run, finished or not, into the new or empty folder `to`, in one move.

    "ema" takes the average where the run keeps one. `results` are result files of the evaluation, for the card. Raises
    FileNotFoundError or ValueError where `run` is not a run, has trained nothing yet or is damaged, or where `to` holds anything.
    """
    run, to = Path(run).expanduser(), Path(to).expanduser().resolve()
    if not (run / RECIPE).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {RECIPE}")
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not empty: choose another folder to export into")
    recipe = recipes.load(run / RECIPE)
    found = checkpoint.newest(run / CHECKPOINTS, say)
    if found is None:
        raise ValueError(f"nothing trained yet: {run} has no checkpoint; the first is written after step "
                         f"{min(recipe.checkpoint_every, recipe.steps)}, or when the run is interrupted")
    tensors, state = found
    ema = weights == "ema" and recipe.ema_decay > 0
    spec = _spec(state.get("sampler"), run)
    if is_prompted(Path(recipe.teacher.path)):
        return _export_pipeline(run, to, tensors, state, spec, recipe, getattr(torch, dtype), ema, results)
    teacher = load_teacher(recipe.teacher.path)
    network = torch.nn.Module.to(_filled(teacher, tensors, "ema/" if ema else "role/student/", run), getattr(torch, dtype))
    with in_one_move(to) as folder:
        _pipeline(teacher, network, spec).save_pretrained(folder, safe_serialization=True, max_shard_size="1000GB")
        for inner in folder.glob("*/config.json"):
            _edit(inner, {"_name_or_path": None})                                # a path of the machine it was made on
        _edit(folder / INDEX, {"_class_name": [Path(PIPELINE).stem, "ClassConditionalPipeline"], "_name_or_path": None})
        code = resources.files("stepdistill.pipelines").joinpath("class_conditional.py")
        (folder / PIPELINE).write_bytes(code.read_bytes())
        (folder / RECIPE).write_text(recipes.dump(recipe))
        notes = _notes(recipe, teacher, spec) | {"step": int(state["step"]), "ema": ema, "unet_sha256": sha256(folder / WEIGHTS)}
        (folder / NOTES).write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n")
        (folder / CARD).write_text(card(to.name, notes, recipe, results))
    return Exported(str(to), notes["step"], recipe.steps, ema, notes["unet_sha256"])


def _export_pipeline(run: Path, to: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], spec: SamplerSpec, recipe: Recipe,
                     dtype: torch.dtype, ema: bool, results: Sequence[Path]) -> Exported:
    """The teacher's own pipeline with the student's weights and a stock scheduler: nothing of ours is needed to run it."""
    source = Path(recipe.teacher.path)
    pipeline = load_pipeline(source)
    prefix = "ema/" if ema else "role/student/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    lora = recipe.lora.get("student")
    fits = (lambda part: layers_of(weights) <= dict(part.named_modules()).keys()) if lora else (
        lambda part: part.state_dict().keys() == weights.keys())
    component = next((n for n, part in pipeline.components.items() if isinstance(part, torch.nn.Module) and fits(part)), None)
    if component is None or is_adapter(weights) != bool(lora):
        raise ValueError(f"the checkpoint of {run} fits no network of the pipeline at {source}; was the teacher replaced?")
    network = getattr(pipeline, component)
    if lora:
        merged(network, weights, lora)
    else:
        network.load_state_dict(weights)
    torch.nn.Module.to(network, dtype)
    driven = Driven(pipeline)
    pipeline.scheduler = scheduler_of({"_class_name": type(driven.scheduler).__name__, **driven.scheduler.config}, spec)
    notes = {"pipeline": type(pipeline).__name__, "component": component, "sampler": spec.to_dict(), "method": recipe.method["name"],
             "teacher": source.name, "call": {**recipe.teacher.call, "num_inference_steps": len(spec.times), **state["call"]},
             "licence": read_json(source / NOTES).get("licence") if (source / NOTES).is_file() else None,
             "step": int(state["step"]), "ema": ema, "versions": _versions()}
    with in_one_move(to) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for inner in (*folder.glob("*/config.json"), folder / INDEX):
            _edit(inner, {"_name_or_path": None})
        if lora:
            _save_lora(pipeline, component, weights, lora, folder / "lora")
        (folder / RECIPE).write_text(recipes.dump(recipe))
        digest = sha256(next(iter(sorted((folder / component).glob("*.safetensors")))))
        (folder / NOTES).write_text(json.dumps({**notes, "weights_sha256": digest}, indent=1, ensure_ascii=False) + "\n")
        (folder / CARD).write_text(pipeline_card(to.name, notes, recipe))
    return Exported(str(to), notes["step"], recipe.steps, ema, digest)


def _save_lora(pipeline: Any, component: str, weights: Mapping[str, Tensor], lora: LoraRecipe, folder: Path) -> None:
    """The adapter alone, for `load_lora_weights` on the teacher's own pipeline at scale 1; its alpha is in the file."""
    names = diffusers_names(weights)
    layers = sorted({name.rpartition(".lora_")[0] for name in names})
    metadata = LoraConfig(r=lora.rank, lora_alpha=lora.scale, target_modules=layers).to_dict()
    save = getattr(pipeline, "save_lora_weights", None)
    if save is None or f"{component}_lora_layers" not in inspect.signature(save).parameters:
        return                                                                   # this pipeline class has no loader for adapters
    save(folder, **{f"{component}_lora_layers": {k: v.contiguous() for k, v in names.items()},
                    f"{component}_lora_adapter_metadata": metadata}, safe_serialization=True)


def load_student(folder: Path, *, device: torch.device | str = "cpu", autocast: torch.dtype | None = None,
                 dtype: torch.dtype = torch.float32) -> tuple[Teacher, SamplerSpec]:
    """An exported student as a model of this package, and how it must be run. FileNotFoundError or ValueError where it is damaged."""
    folder = Path(folder).expanduser().resolve()
    notes = _read_notes(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}: export the student again")
    if sha256(folder / WEIGHTS) != notes["unet_sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is damaged or was replaced: it does not match the digest in {NOTES}; export it again")
    return load_teacher(folder, device=device, autocast=autocast, dtype=dtype), _spec(notes["sampler"], folder)


def add_results(folder: Path, results: Sequence[Path]) -> None:
    """Write the model card again with these figures instead of those it had."""
    folder = Path(folder).expanduser().resolve()
    notes = _read_notes(folder)
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} has no {RECIPE}: export the student again")
    checkpoint.write_atomically(folder / CARD, card(folder.name, notes, recipes.load(folder / RECIPE), results))


def scheduler_of(teacher: Mapping[str, Any], spec: SamplerSpec) -> Any:
    """A stock scheduler on the teacher's noise process, set up to come as near this sampler as a stock one does.

    LCM for re-noising and DDIM (trailing) for the ODE on a DDPM table, Euler for flow matching. Tables that LCM and DDIM cannot build
    stay with DDPMScheduler.
    """
    if teacher["_class_name"].startswith("FlowMatch"):
        return _built(FlowMatchEulerDiscreteScheduler, {**teacher, "stochastic_sampling": spec.renoise == 1})
    whole = spec.times == trailing(len(spec.times))                              # any training step may be called, not every 20th only
    table = {**DDPMScheduler.from_config(dict(teacher)).config, "timestep_spacing": "trailing", "thresholding": False,
             "clip_sample": spec.clip_x0 is not None, "clip_sample_range": spec.clip_x0 or 1.0}
    if table["trained_betas"] is None and table["beta_schedule"] not in STOCK_TABLES:
        return _built(DDPMScheduler, table)
    if spec.renoise < 1:
        return _built(DDIMScheduler, table)
    return _built(LCMScheduler, {**table, "original_inference_steps": table["num_train_timesteps"] if whole else 50})


def _built(cls: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler of this class from those values it knows; `from_config` would keep the others, and ignore those that were defaults."""
    return cls(**{k: v for k, v in config.items() if k in inspect.signature(cls.__init__).parameters})


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def in_one_move(to: Path) -> Iterator[Path]:
    """A hidden sibling to fill, which takes the place of the new or empty folder `to` at the end, or leaves nothing."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            checkpoint.fsync(path)
        os.replace(partial, to)
        checkpoint.fsync(to.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _filled(teacher: Teacher, tensors: Mapping[str, Tensor], prefix: str, run: Path) -> torch.nn.Module:
    """The teacher's network with the weights of a checkpoint."""
    network = teacher.denoiser.network
    try:
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise ValueError(f"the checkpoint of {run} does not fit the teacher at {teacher.folder}; was the teacher replaced? "
                         f"{' '.join(str(error).split())[:300]}") from error
    return network


def _pipeline(teacher: Teacher, network: torch.nn.Module, spec: SamplerSpec) -> Any:
    from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

    vae = teacher.codec.model if isinstance(teacher.codec, Vae) else None
    return ClassConditionalPipeline(
        unet=network, scheduler=scheduler_of(teacher.scheduler, spec), vae=vae,
        space_to_depth=teacher.codec.to_dict().get("space_to_depth", 1), null_class=teacher.null_class, labels=list(teacher.labels),
        sampler={**spec.to_dict(), "steps": len(spec.times)})


def _notes(recipe: Recipe, teacher: Teacher, spec: SamplerSpec) -> dict[str, Any]:
    """What a diffusers folder cannot say. The first five are a teacher's notes, so an export is loaded as a teacher is."""
    picture = teacher.pictures(torch.zeros(1, *teacher.shape)).shape[1:]
    return {"codec": teacher.codec.to_dict(), "classes": teacher.classes, "null_class": teacher.null_class, "labels": list(teacher.labels),
            "licence": teacher.notes.get("licence"), "picture": list(picture), "sampler": spec.to_dict(), "method": recipe.method["name"],
            "teacher": recipe.teacher.path, "versions": _versions()}


def _versions() -> dict[str, str]:
    return {"stepdistill": stepdistill.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def _spec(values: Any, where: Path) -> SamplerSpec:
    try:
        return SamplerSpec.from_dict(values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is damaged: what it says of its sampler cannot be used ({error})") from error


def _read_notes(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no exported student at {folder}")
    if not (folder / NOTES).is_file() or "sampler" not in (notes := read_json(folder / NOTES)):
        raise FileNotFoundError(f"{folder} is not an exported student: it has no {NOTES} with a sampler")
    if missing := sorted({"codec", "classes", "labels", "picture", "method", "teacher", "step", "ema", "unet_sha256"} - set(notes)):
        raise ValueError(f"{folder / NOTES} is damaged: it lacks {', '.join(missing)}; export the student again")
    return notes


def _edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file, or drop those set to None."""
    values = {k: v for k, v in {**read_json(path), **changes}.items() if v is not None or k not in changes}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


# ---- the model card

TEMPLATE = """\
---
{{ front }}---

# {{ name }}

A **{{ calls }}-step**{{ " class-conditional" if notes.classes }} image model: a student of `{{ teacher }}`, distilled with
[{{ method.title }}](https://arxiv.org/abs/{{ method.arxiv }}) by stepdistill.
{% if notes.step < recipe.steps %}

**Unfinished:** exported after step {{ notes.step }} of {{ recipe.steps }}.
{% endif %}

Pictures of {{ notes.picture[2] }}x{{ notes.picture[1] }} pixels, {{ notes.picture[0] }} channel{{ "s" if notes.picture[0] > 1 }}.
{% if notes.classes %}
Classes: {{ notes.labels[:20] | join(", ") }}{{ ", ..." if notes.labels | length > 20 }}.
{% else %}
Unconditional.
{% endif %}

## Use

Needs torch and diffusers; `pipeline.py` in this folder is the code that `trust_remote_code` allows.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ path }}, trust_remote_code=True)
images = pipe({{ example }}, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
```

The pipeline runs the student as it was trained: {{ calls }} network call{{ "s" if calls > 1 }} at {{ times }} (1 is pure noise),
{% if calls > 1 %}
{% if sampler.renoise == 1 %}
re-noising its clean estimate between them,
{% elif sampler.renoise == 0 %}
following the ODE between them,
{% else %}
re-noising with share {{ sampler.renoise }} between them,
{% endif %}
{% endif %}
guidance {{ sampler.guidance }}{{ " (none: it is built in)" if sampler.guidance == 1 }}.

## Figures

{% for table in tables %}
Protocol `{{ table.protocol }}` (hash `{{ table.hash }}`), value ± standard error:

| model | sampler |{% for m in table.metrics %} {{ m }} |{% endfor %}

|---|---|{% for m in table.metrics %}---|{% endfor %}

{% for row in table.rows %}
| {{ row.name }} | {{ row.sampler }} |{% for m in table.metrics %} {{ row.figures.get(m, "-") }} |{% endfor %}

{% endfor %}

{% else %}
None: this student has not been evaluated for this card.

{% endfor %}
## How it was made

| | |
|---|---|
| teacher | `{{ teacher }}`, guidance {{ recipe.guidance }} |
| method | {{ method.title }} (`{{ notes.method }}`), arXiv [{{ method.arxiv }}](https://arxiv.org/abs/{{ method.arxiv }}) |
| training | {{ notes.step }} of {{ recipe.steps }} steps, {{ recipe.batch_size }} samples each, {{ recipe.precision }} |
| seed | {{ recipe.seed }} |
| weights | {{ "EMA, decay %s" % recipe.ema_decay if notes.ema else "as trained, no average" }}, SHA-256 `{{ notes.unet_sha256 }}` |
| versions | {% for k, v in notes.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %} |

`recipe.yaml` is the whole recipe: `stepdistill train --config recipe.yaml --out RUN` repeats it.

## Limits

- It was trained for {{ calls }} step{{ "s" if calls > 1 }}; other numbers are refused, or run with a warning and no promise.
{% if sampler.guidance == 1 %}
- The teacher's guidance {{ recipe.guidance }} is built in and cannot be turned afterwards; guiding the student again overdoes it.
{% endif %}
- It knows what its teacher knows: the same classes and size, and the faults and biases of the teacher and of its data.
- Few-step students tend to show less variety than their teacher. Judge a measure of it (recall, coverage) beside any of realism.
{% if notes.step < recipe.steps %}
- Its training had not ended: expect less than the method can do.
{% endif %}

## Licence

{{ notes.licence or "The teacher's folder names no licence: ask its authors before passing this student on." }}
"""


PIPELINE_TEMPLATE = """\
---
{{ front }}---

# {{ name }}

A **{{ calls }}-step** student of `{{ notes.teacher }}` (`{{ notes.pipeline }}`), distilled with
[{{ method.title }}](https://arxiv.org/abs/{{ method.arxiv }}) by stepdistill.
{% if notes.step < recipe.steps %}

**Unfinished:** exported after step {{ notes.step }} of {{ recipe.steps }}.
{% endif %}

## Use

Needs torch and diffusers alone.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ path }})
images = pipe({{ example }}, {{ arguments }}, generator=torch.Generator().manual_seed(0))[0]
```
{% if recipe.lora.get("student") %}

`lora/` holds the adapter alone, of rank {{ recipe.lora["student"].rank }}: `load_lora_weights` puts it on the teacher's own pipeline, at
scale 1. The weights in this folder have it merged in.
{% endif %}

It was trained for {{ calls }} step{{ "s" if calls > 1 }} and this guidance, which is built in: other values give no promise.

## How it was made

`recipe.yaml` is the whole recipe: step {{ notes.step }} of {{ recipe.steps }}, {{ "moving average" if notes.ema else "last weights" }},
teacher's guidance {{ recipe.guidance }}, seed {{ recipe.seed }}.
{% for k, v in notes.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}.

## Licence

{{ notes.licence or "The teacher's folder names no licence: the terms of the teacher's weights hold for this student, too." }}
"""


def pipeline_card(name: str, notes: Mapping[str, Any], recipe: Recipe) -> str:
    """The model card of a student that is a whole pipeline of its teacher's class."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(PIPELINE_TEMPLATE).render(
        name=name, path=json.dumps(f"./{name}"), notes=notes, recipe=recipe, method=find(notes["method"]),
        calls=len(notes["sampler"]["times"]),
        example='"a photograph of a red apple"', arguments=", ".join(f"{k}={v!r}" for k, v in notes["call"].items()),
        front=yaml.safe_dump(_front(notes), sort_keys=False, allow_unicode=True))


def card(name: str, notes: Mapping[str, Any], recipe: Recipe, results: Sequence[Path] = ()) -> str:
    """The model card, with one table of figures for each protocol among the result files."""
    sampler, method = notes["sampler"], find(notes["method"])
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        name=name, path=json.dumps(f"./{name}"), notes=notes, recipe=recipe, sampler=sampler, method=method, calls=len(sampler["times"]),
        times=", ".join(f"t = {t:.4g}" for t in sampler["times"]), teacher=Path(notes["teacher"]).name,
        example=(list(notes["labels"]) or [None])[:2], front=yaml.safe_dump(_front(notes), sort_keys=False, allow_unicode=True),
        tables=_tables(results, notes["unet_sha256"]))


def _front(notes: Mapping[str, Any]) -> dict[str, Any]:
    licence = str(notes.get("licence") or "")
    short = licence.split(";")[0].strip().lower()
    return {"license": short if short in LICENCES else "other", **({} if short in LICENCES else {"license_name": licence or "unknown"}),
            "library_name": "diffusers",
            "tags": ["stepdistill", "distillation", "few-step", notes["method"], *(["class-conditional"] if notes.get("classes") else [])]}


def _tables(results: Sequence[Path], sha: str) -> list[dict[str, Any]]:
    """One table for each protocol hash, teachers first: figures of different protocols never share one."""
    tables: dict[str, dict[str, Any]] = {}
    for path in map(Path, results):
        if not path.is_file():
            raise FileNotFoundError(f"no result file at {path}")
        result = read_json(path)
        try:
            row = _row(result, sha)
            table = tables.setdefault(result["protocol_hash"], {"protocol": result["protocol"]["name"], "hash": result["protocol_hash"],
                                                                "metrics": [], "rows": []})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a result file of the evaluation: {type(error).__name__} {error}") from error
        table["rows"] = sorted([*table["rows"], row], key=lambda r: not r["teacher"])
        table["metrics"] = list(dict.fromkeys([*table["metrics"], *row["figures"]]))
    return list(tables.values())


def _row(result: Mapping[str, Any], sha: str) -> dict[str, Any]:
    """One result: "this student" only where its model block holds the digest of these very weights."""
    model, sampler = result["model"], result["sampler"]
    count = len(sampler["times"])
    said = f"{count} step{'s' if count > 1 else ''}" + (f", guidance {sampler['guidance']:g}" if sampler["guidance"] != 1 else "")
    name = "this student" if sha in model.values() else "teacher" if model.get("is_teacher") else Path(model["name"]).name
    figures = {m: f"{v['value']:.4g}" + (f" ± {v['se']:.2g}" if v.get("se") is not None else "") for m, v in result["metrics"].items()}
    return {"name": name.replace("|", "\\|"), "teacher": bool(model.get("is_teacher")), "sampler": said, "figures": figures}
