"""Model cards of exported students: markdown with the front matter of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from stepdistill.methods import find
from stepdistill.models.guidance import Band
from stepdistill.models.load import read_json
from stepdistill.recipe import Recipe

LICENCES = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
            "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause")                   # ids of the Hugging Face hub; any other is "other"

TEMPLATE = """\
---
{{ front }}---

# {{ name }}

A **{{ calls }}-step**{{ " class-conditional" if notes.classes }} image model: a student of `{{ teacher }}`, distilled with
[{{ method.title }}](https://arxiv.org/abs/{{ method.arxiv }}) by stepdistill.
{% include "merged" %}
{% include "chosen" %}

Pictures of {{ notes.picture[2] }}x{{ notes.picture[1] }} pixels, {{ notes.picture[0] }} channel{{ "s" if notes.picture[0] > 1 }}.
{% if notes.classes %}
Classes: {{ notes.labels[:20] | join(", ") }}{{ ", ..." if notes.labels | length > 20 }}.
{% else %}
Unconditional.
{% endif %}

## Use

Needs torch and diffusers; `pipeline.py`{{ " and `unet/inputs.py`" if sampler.get("inputs") }} in this folder is the code that \
`trust_remote_code` allows.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ path }}, trust_remote_code=True)
images = pipe({{ example }}, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
```

{% if sampler.boundaries %}
It is {{ sampler.boundaries | length + 1 }} networks, which take turns: the next one answers from {{ sampler.boundaries | join(", ") }}
on down.
{% endif %}
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
{% if told %}
told guidance {{ sampler.guidance }}; `guidance_scale` takes any other that it was trained with{{ band }}, at no further cost.
{% else %}
guidance {{ sampler.guidance }}{{ " (none: it is built in)" if built_in != 1 }}.
{% endif %}

{% include "figures" %}
## How it was made

| | |
|---|---|
| teacher | `{{ teacher }}`, guidance {{ recipe.guidance }} |
| method | {{ method.title }} (`{{ notes.method }}`), arXiv [{{ method.arxiv }}](https://arxiv.org/abs/{{ method.arxiv }}) |
| training | {{ notes.step }} of {{ recipe.steps }} steps, {{ recipe.batch_size }} samples each, {{ recipe.precision }} |
{% if merged %}
| merged with | {{ merged.title }} (`{{ merged.method }}`), step {{ merged.step }} of {{ merged.steps }}, \
{{ "EMA" if merged.ema else "as trained, no average" }}; recipe in `recipe_merged.yaml` |
{% endif %}
| seed | {{ recipe.seed }} |
| weights | {{ "EMA, decay %s" % recipe.ema_decay if notes.ema else "as trained, no average" }}, SHA-256 `{{ notes.unet_sha256 }}` |
| versions | {% for k, v in notes.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %} |

`recipe.yaml` is the whole recipe: `stepdistill train --config recipe.yaml --out RUN` repeats it.
{% if merged %}
`recipe_merged.yaml` is that of the other student: train both, then `stepdistill export RUN --merge OTHER --share {{ merged.share }}`.
{% endif %}

## Limits

- It was trained for {{ calls }} step{{ "s" if calls > 1 }}{{ grids }}; other numbers are refused, or run with a warning and no promise.
{% if built_in != 1 %}
- The teacher's guidance {{ built_in }} is built in and cannot be turned afterwards; guiding the student again overdoes it.
{% elif not told and recipe.guidance != 1 %}
- No guidance is built in: guidance of its own multiplies the {{ recipe.guidance }} of its training.
{% endif %}
- It knows what its teacher knows: the same classes and size, and the faults and biases of the teacher and of its data.
- Few-step students tend to show less variety than their teacher. Judge a measure of it (recall, coverage) beside any of realism.
{% if notes.step < recipe.steps and not notes.get("best") %}
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
{% include "merged" %}
{% include "chosen" %}

## Use

{% if plan.stock %}
Needs torch and diffusers alone.
{% else %}
Needs torch and diffusers; `scheduler/few_step_scheduler.py` in this folder is the code that `trust_remote_code` allows.
{% endif %}

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ path }}{{ ", trust_remote_code=True" if not plan.stock }})
{% if fresh %}
torch.manual_seed(0)  # some pipelines hand their generator to no step of the scheduler, which then draws from torch's own
{% endif %}
output = pipe({{ example }}, {{ arguments }}, generator=torch.Generator().manual_seed(0))
{% if not notes.video %}
output.images[0].save("sample.png")
{% endif %}
```

The scheduler is `{{ plan.scheduler }}`{{ " of diffusers" if plan.stock }}. Told {{ calls }} step{{ "s" if calls > 1 }},
it calls the network at the times {{ times }} (noise levels {{ sigmas }}){{ ", re-noising between them" if fresh }},
as in training; that was proved on this pipeline when it was exported. Another number of steps {{ plan.other_steps }}.
{% if plan.scheduler == "TCDScheduler" and plan.renoise %}
`eta` is the share that it re-noises: left out it is 0, which this student was not trained for.
{% endif %}
{% if not plan.stock %}
No scheduler of diffusers runs these steps when told their number alone.
{% if plan.stock_call %}
One does when told the times: to run no code of this folder, put `stock_scheduler/` in the place of `scheduler/`, write
`["diffusers", "{{ plan.stock_call.scheduler }}"]` for the scheduler into `model_index.json`, and call the pipeline with
`{{ stock_arguments }}`, which replaces its number of steps.
{% endif %}
{% endif %}

{% if told %}
The student is told its guidance, in one network call a step. Any number that it was trained with{{ band }} will do.
Load it in float32: in half precision the pipeline tells it with too few digits.
{% elif built_in != 1 %}
The guidance of its teacher ({{ built_in }}) is built in: leave the pipeline's own at the value above.
{% else %}
No guidance is built in: the pipeline's own acts on top
{{- ", and multiplies the %s of its training" % recipe.guidance if recipe.guidance != 1 }}.
{% endif %}
{% if notes.lora %}

## As an adapter

`lora/` holds the student as an adapter of rank {{ notes.lora.rank }}: `load_lora_weights` puts it on the teacher's own pipeline, at
scale 1, to be run by the scheduler of this folder.
{% if notes.lora.files | length > 1 %}
`lora_kohya/` holds the same under kohya's names.
{% endif %}
{% if notes.lora.fit %}
{% set fit = notes.lora.fit %}
It is the difference to the teacher, factored by SVD. Of what changed in {{ fit.layers }} layers it leaves out a relative error of
{{ "%.3g" % fit.error }}, at worst {{ "%.3g" % fit.worst_error }} in `{{ fit.worst }}`; and a share of {{ "%.3g" % fit.beyond }} of the
squared change lies where no adapter reaches. The weights in this folder are the student itself.
{% else %}
The weights in this folder have it merged in.
{% endif %}
{% endif %}
{% if notes.dmd2_config %}

## In vLLM-Omni

`stepdistill.json` holds a `dmd2_config`; copied into `model_index.json` it is what vLLM-Omni's DMD2 pipelines read there.
{% endif %}

{% include "figures" %}
## How it was made

`recipe.yaml` is the whole recipe: step {{ notes.step }} of {{ recipe.steps }}, {{ "moving average" if notes.ema else "last weights" }},
teacher's guidance {{ recipe.guidance }}, seed {{ recipe.seed }}.
{% if merged %}
`recipe_merged.yaml` is that of the other student: step {{ merged.step }} of {{ merged.steps }},
{{ "moving average" if merged.ema else "last weights" }}. Train both, then
`stepdistill export RUN --merge OTHER --share {{ merged.share }}`.
{% endif %}
{% if recipe.teacher.quantize %}
Its adapter was trained on a base quantised with `{{ recipe.teacher.quantize.backend }}`. Here it is merged into the unquantised weights,
which differ from that base by its rounding.
{% endif %}
{% for k, v in notes.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}.

## Licence

{{ notes.licence or "The teacher's folder names no licence: the terms of the teacher's weights hold for this student, too." }}
"""


PARTS = {                                               # of both templates
    "merged": """\
{% if merged %}

Its weights are {{ "%g" % merged.share }} times that student's plus {{ "%g" % (1 - merged.share) }} times those of another student of the
same teacher, distilled with [{{ merged.title }}](https://arxiv.org/abs/{{ merged.arxiv }}).
{% endif %}
""",
    "chosen": """\
{% if notes.get("best") %}

**Chosen:** step {{ notes.step }} of {{ recipe.steps }}, which had the smallest distance ({{ recipe.exam.best }}) on {{ recipe.exam.count }}
pictures while training. That distance is no evidence: score the student on other seeds.
{% elif notes.step < recipe.steps %}

**Unfinished:** exported after step {{ notes.step }} of {{ recipe.steps }}.
{% endif %}
""",
    "figures": """\
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
""",
}


def _filled(template: str, **values: Any) -> str:
    environment = jinja2.Environment(loader=jinja2.DictLoader(PARTS), undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(**values)


def pipeline_card(name: str, notes: Mapping[str, Any], recipe: Recipe, results: Sequence[Path] = ()) -> str:
    """The model card of a student that is a whole pipeline of its teacher's class, with figures as in `card`."""
    plan, sampler = notes["schedule"], notes["sampler"]
    keywords = lambda values: ", ".join(f"{k}={v!r}" for k, v in values.items())                                # noqa: E731
    numbers = lambda values: ", ".join(f"{v:.5g}" for v in values)                                              # noqa: E731
    return _filled(
        PIPELINE_TEMPLATE, name=name, path=json.dumps(f"./{name}"), notes=notes, recipe=recipe, method=find(notes["method"]), plan=plan,
        calls=len(sampler["times"]), fresh=len(sampler["times"]) > 1 and sampler["renoise"] > 0, times=numbers(plan["timesteps"]),
        sigmas=numbers(plan["sigmas"]), example='prompt="a photograph of a red apple"', arguments=keywords(notes["call"]),
        stock_arguments=keywords({k: v for k, v in (plan["stock_call"] or {}).items() if k != "scheduler"}),
        front=yaml.safe_dump(_front(notes), sort_keys=False, allow_unicode=True), merged=_merged(notes),
        tables=_tables(results, notes["weights_sha256"]), **_told(notes, recipe))


def card(name: str, notes: Mapping[str, Any], recipe: Recipe, results: Sequence[Path] = ()) -> str:
    """The model card, with one table of figures for each protocol among the result files."""
    sampler, method = notes["sampler"], find(notes["method"])
    return _filled(
        TEMPLATE, name=name, path=json.dumps(f"./{name}"), notes=notes, recipe=recipe, sampler=sampler, method=method,
        calls=len(sampler["times"]), times=", ".join(f"t = {t:.4g}" for t in sampler["times"]), teacher=Path(notes["teacher"]).name,
        example=(list(notes["labels"]) or [None])[:2], front=yaml.safe_dump(_front(notes), sort_keys=False, allow_unicode=True),
        tables=_tables(results, notes["unet_sha256"]), merged=_merged(notes), **_told(notes, recipe))


def _told(notes: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Whether the student is told its guidance, which it was trained with, and what is built into it."""
    told, band = "w" in notes["sampler"].get("inputs", ()), getattr(recipe.method_config, "guidance", None)
    built_in = notes["sampler"].get("built_in", 1.0 if told else recipe.guidance)
    counts = [str(len(times)) for times in notes["sampler"].get("grids", ())]
    grids = f", and for {', '.join(counts)} (`stepdistill sample --steps`)" if counts else ""
    band_told = f" ({band.low:g} to {band.high:g})" if told and isinstance(band, Band) else ""
    return {"told": told, "built_in": built_in, "grids": grids, "band": band_told}


def _merged(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the notes say of the other student of a merge, with the title and paper of its method; None where there is none."""
    merged = notes.get("merged")
    if not merged:
        return None
    method = find(merged["method"])
    return {**merged, "title": method.title, "arxiv": method.arxiv}


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
