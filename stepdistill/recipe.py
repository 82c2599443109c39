"""Recipes: one YAML is one experiment. Typed dataclasses checked by pydantic; unknown keys are errors that name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from stepdistill import worlds
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.methods import find
from stepdistill.models.adapters import LoraRecipe
from stepdistill.models.quantize import QuantizeRecipe


@dataclass(frozen=True)
class TeacherRecipe:
    """What is distilled: the name of a shipped world, or a diffusers folder."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"    # of the frozen weights
    call: Mapping[str, Any] = field(default_factory=dict)  # keywords of a pipeline with prompts: height, width, negative_prompt
    loras: Mapping[str, float] = field(default_factory=dict)  # LoRA files merged into it first, with their scales: {style.safetensors: 0.8}
    quantize: QuantizeRecipe | None = None               # of the frozen base, where every copy of a pipeline's network is an adapter on it

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return worlds.teacher_folder(self.path) or Path(self.path)

    @property
    def name(self) -> str:
        """What it is called where its folder may be another: a shipped one by its name, another by the folder's."""
        return self.path if worlds.teacher_folder(self.path) else Path(self.path).name


@dataclass(frozen=True)
class StudentRecipe:
    """What comes out."""

    steps: int = 1                                       # network calls per sample
    times: tuple[float, ...] | None = None               # the calls' times, 1 = pure noise; default: equal steps from 1
    clip_x0: float | None = None                         # bound of each call's x0, in training too: 1 for pixels, none for latents
    weights: Path | None = None                          # a published few-step model (diffusers folder) or LoRA file that it begins as
    taps: tuple[str, ...] = ()                           # modules whose outputs a discriminator reads; default: by structure

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"student.steps must be at least 1, got {self.steps}")
        if self.times is not None and len(self.times) != self.steps:
            raise ValueError(f"student.times names {len(self.times)} times for student.steps {self.steps}")
        _ = self.sampler

    @property
    def sampler(self) -> SamplerSpec:
        """How it is run, unless its method says otherwise; ValueError for times or a clip that no sampler takes."""
        return SamplerSpec(self.times or trailing(self.steps), clip_x0=self.clip_x0)


@dataclass(frozen=True)
class OptimRecipe:
    """One role's optimizer. `lr` is reached after `warmup` of the role's own updates and follows `schedule` from there."""

    lr: float
    name: Literal["adamw", "radam", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: float = 0.0                              # share of the updates after which "linear" and "cosine" start falling
    clip: float = 10.0                                   # gradient norm; 0 never clips

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup < 0 or self.weight_decay < 0 or self.clip < 0 or not 0 <= self.decay_from < 1:
            raise ValueError("an optimizer needs lr > 0, warmup, weight_decay and clip >= 0, and decay_from in [0, 1)")


@dataclass(frozen=True)
class DataRecipe:
    """Pictures for the methods that read them, prompts for the pipelines that take them. A world brings its own of both."""

    folder: Path | None = None                           # one sub-folder per class; captioned pictures, tars or a dataset for a pipeline
    prompts: Path | None = None                          # one prompt per line, or a table or dataset of them
    cache: Path | None = None                            # where conditions and latents of a pipeline are kept; filled where it lacks some
    buckets: tuple[tuple[int, int], ...] = ()            # (height, width) of each, teacher.call's among them; a batch has one of them
    pairs: Path | None = None                            # noises and what the teacher's ODE makes of them: `stepdistill pairs` fills it

    def __post_init__(self) -> None:
        if any(min(bucket) < 1 for bucket in self.buckets) or len(set(self.buckets)) < len(self.buckets):
            raise ValueError(f"data.buckets are heights and widths, each pair once, got {self.buckets}")


@dataclass(frozen=True)
class ExamRecipe:
    """Scores while training. `stepdistill train` writes them into the log as exam/... and keeps the best checkpoint in RUN/best."""

    every: int = 0                                       # loop steps from exam to exam, and one after the last; 0: never
    count: int = 500                                     # pictures of each exam, once of the average and once of the raw weights
    seed: int = 1_000_000                                # of their noise: not one that the final score uses
    best: Literal["kid", "frechet"] = "kid"              # the distance whose smallest value marks the best checkpoint
    extractor: str | None = None                         # of distances to the teacher's own pictures: dinov2-s14, ...; default: the world's
                                                         # protocol where there is one, else the random features of `tiny`

    def __post_init__(self) -> None:
        if self.every < 0 or self.count < 50 or not 0 <= self.seed < 2**63:
            raise ValueError("exam.every cannot be negative, exam.count must be at least 50, exam.seed must lie in [0, 2^63)")


@dataclass(frozen=True)
class Recipe:
    """A whole experiment. `batch_size` counts the samples of one optimiser step over all processes and micro-batches."""

    teacher: TeacherRecipe
    method: Mapping[str, Any]
    optim: Mapping[str, OptimRecipe]
    lora: Mapping[str, LoraRecipe] = field(default_factory=dict)  # roles that are adapters on the teacher's own network: one base for all
    student: StudentRecipe = StudentRecipe()
    start: Path | None = None                            # another run, whose student's average and critics this one begins with
    data: DataRecipe = DataRecipe()
    guidance: float = 1.0                                # the teacher's w in null + w·(cond - null); 1 is none
    steps: int = 1000                                    # loop iterations
    seed: int = 0
    batch_size: int = 64
    accumulate: int = 1                                  # micro-batches per optimiser step
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # of the forward passes; trained weights stay float32
    weights: Literal["float32", "bfloat16"] = "float32"  # what trained weights are stored in
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"  # auto leaves the choice to torch and diffusers
    gradient_checkpointing: bool = False                 # recompute activations in the backward pass: less memory, a third slower
    channels_last: bool = False                          # convolution weights as tensor cores like them: faster U-Nets on a GPU
    compile: bool = False                                # torch.compile of every denoiser
    ema_decay: float = 0.999                             # of the student, per student update; 0 keeps none
    checkpoint_every: int = 500
    keep: int = 2                                        # newest checkpoints kept
    log_every: int = 10
    preview_every: int = 0                               # 0: only at the end
    preview_count: int = 40
    exam: ExamRecipe = ExamRecipe()                      # scores on a few pictures while training
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    max_skips: int = 10                                  # non-finite updates in a row before the run stops

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every", "preview_count", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not 0 <= self.ema_decay < 1 or self.preview_every < 0 or not 0 <= self.seed < 2**63:
            raise ValueError("ema_decay must lie in [0, 1), preview_every cannot be negative, seed must lie in [0, 2^63)")

    @property
    def method_config(self) -> Any:
        """The method's own dataclass."""
        options = {k: v for k, v in self.method.items() if k != "name"}
        return build(find(self.method["name"]).Config, options, "method")


def names() -> list[str]:
    """Short names of the shipped recipes."""
    root = resources.files("stepdistill.configs")
    return sorted(f"{folder.name}/{file.name.removesuffix('.yaml')}" for folder in root.iterdir() if folder.is_dir()
                  for file in folder.iterdir() if file.name.endswith(".yaml"))


def shown() -> str:
    """The shipped recipes in a few words: of a folder with many, how many."""
    folders: dict[str, list[str]] = {}
    for folder, _, name in (full.partition("/") for full in names()):
        folders.setdefault(folder, []).append(name)
    return ", ".join(f"{f}/{found[0]}" if len(found) == 1 else f"{f}/{{{','.join(found)}}}" if len(found) < 4
                     else f"{f}/METHOD ({len(found)} of them)" for f, found in folders.items())


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a path or a shipped short name, with `key=value` overrides (dotted keys, YAML values).

    Raises FileNotFoundError or ValueError with one line that names the key and the remedy.
    """
    text, label = _read(str(source))
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{label} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{label} must hold a mapping of recipe keys")
    for item in overrides:
        _override(tree, item)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Check a plain mapping. Paths become absolute, so that a run folder can be used from anywhere."""
    recipe: Recipe = build(Recipe, tree, "")
    if not isinstance(recipe.method.get("name"), str):
        raise ValueError("the recipe lacks method.name; `stepdistill methods` lists them")
    config, method = recipe.method_config, find(recipe.method["name"])
    trained, usually = ([n for n, role in method.needs(c).items() if role.trains] for c in (config, method.Config()))
    if unknown := sorted(set(recipe.optim) - {*trained, *usually}):
        raise ValueError(f"optim.{unknown[0]}: this configuration of {recipe.method['name']} trains {', '.join(trained)}")
    if missing := [n for n in trained if n not in recipe.optim]:
        raise ValueError(f"optim.{missing[0]} is missing: {recipe.method['name']} trains {', '.join(trained)}; give it an lr")
    optim = {n: recipe.optim[n] for n in trained}            # method.gan_weight=0 needs no edit of a recipe that names the discriminator
    copies = [n for n, role in method.needs(config).items() if role.source == "teacher" and n not in ("teacher", *recipe.lora)]
    if recipe.teacher.quantize and copies:
        raise ValueError(f"teacher.quantize: {copies[0]} would be a full copy, and only a frozen base can be quantised; make it an adapter "
                         f"with lora.{copies[0]}.rank")
    given = recipe.teacher
    path = given.path if worlds.teacher_folder(given.path) else str(_absolute(Path(given.path)))
    loras = {str(_absolute(Path(file))): scale for file, scale in given.loras.items()}
    teacher = dataclasses.replace(given, path=path, call={**worlds.call_of(path), **given.call}, loras=loras)
    student = dataclasses.replace(recipe.student, weights=_absolute(recipe.student.weights))
    if recipe.data.buckets and (teacher.call.get("height"), teacher.call.get("width")) not in recipe.data.buckets:
        raise ValueError("data.buckets must hold the height and width of teacher.call, the size of previews and of what plan counts")
    given_data, start = recipe.data, _absolute(recipe.start)
    data = dataclasses.replace(given_data, folder=_absolute(given_data.folder), prompts=_absolute(given_data.prompts),
                               cache=_absolute(given_data.cache), pairs=_absolute(given_data.pairs))
    return dataclasses.replace(recipe, method=_resolved(recipe), optim=optim, teacher=teacher, student=student, data=data, start=start)


def _absolute(path: Path | None) -> Path | None:
    return path and path.expanduser().absolute()


def _resolved(recipe: Recipe) -> dict[str, Any]:
    config = recipe.method_config
    return {"name": recipe.method["name"], **TypeAdapter(type(config)).dump_python(config, mode="json")}


def dump(recipe: Recipe) -> str:
    """YAML with every value resolved, method defaults too; `load` reads it back to an equal recipe."""
    return yaml.safe_dump({**TypeAdapter(Recipe).dump_python(recipe, mode="json"), "method": _resolved(recipe)}, sort_keys=False)


def build(cls: type, values: Any, where: str) -> Any:
    """A checked instance of a dataclass from plain values; every error is one line naming the key."""
    _check_keys(cls, values, where)
    try:
        built: Any = TypeAdapter(cls).validate_python(_with_group_defaults(cls, values))
        _check_finite(dataclasses.asdict(built), where)
        return built
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([*([where] if where else []), *(str(p) for p in first["loc"])])
        if first["type"] == "missing":
            raise ValueError(f"the recipe lacks {key}") from error
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        raise ValueError(f"{key + ': ' if key and key not in message else ''}{message}{got}") from error


def _with_group_defaults(cls: type, values: Any) -> Any:
    """A group of keys given in part keeps the rest of its field's own default: `method.times.low=0.1` leaves high alone."""
    if not isinstance(values, Mapping):
        return values
    groups = {f.name: dataclasses.asdict(f.default) for f in dataclasses.fields(cls)
              if dataclasses.is_dataclass(f.default) and not isinstance(f.default, type)}
    return {key: {**groups[key], **inner} if key in groups and isinstance(inner, Mapping) else inner for key, inner in values.items()}


def _check_finite(value: Any, where: str) -> None:
    """Neither nan nor infinity anywhere: every comparison with nan is false, so range checks let it pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, inner in items:
        _check_finite(inner, ".".join(filter(None, [where, str(key)])))


def _check_keys(annotation: Any, value: Any, where: str) -> None:
    """Unknown keys anywhere below, which pydantic lets pass for standard dataclasses, and truth values where a number belongs."""
    if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
        hints = typing.get_type_hints(annotation)
        known = [f.name for f in dataclasses.fields(annotation)]
        for key, inner in value.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
                raise ValueError(f"unknown recipe key {'.'.join(filter(None, [where, str(key)]))!r}; {hint}")
            _check_keys(hints[key], inner, ".".join(filter(None, [where, key])))
    elif typing.get_origin(annotation) in (types.UnionType, typing.Union):
        for option in typing.get_args(annotation):
            if dataclasses.is_dataclass(option):
                _check_keys(option, value, where)
    elif isinstance(value, bool) and annotation in (int, float):
        raise ValueError(f"{where}: Input should be a number, got {value}")
    elif isinstance(value, Mapping) and len(args := typing.get_args(annotation)) == 2:
        for key, inner in value.items():
            _check_keys(args[1], inner, f"{where}.{key}")


def _read(source: str) -> tuple[str, str]:
    path = Path(os.path.expanduser(source))
    if path.is_file():
        try:
            return path.read_text(), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file") from error
    if path.suffix in (".yaml", ".yml") or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no recipe at {path}")
    if source in (known := names()):
        return resources.files("stepdistill.configs").joinpath(f"{source}.yaml").read_text(), source
    near = difflib.get_close_matches(source, known, 1)
    raise FileNotFoundError(f"no recipe {source!r}" + (f", did you mean {near[0]!r}?" if near else f"; shipped: {shown()}"))


def _override(tree: dict[str, Any], item: str) -> None:
    key, sign, text = item.partition("=")
    if not sign or not key:
        raise ValueError(f"override {item!r} must read key=value")
    *parents, last = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {item!r}: {name} is a value, not a group of keys")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {item!r}: the value is not valid YAML") from error


