"""From a recipe to everything a run holds: teacher, method, roles, data, optimizers, EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.data.cache import Cache, Wanted
from stepdistill.data.pictures import Picture, read_pictures
from stepdistill.data.prompts import read_prompts
from stepdistill.data.streams import Source, captioned_source, source, wants_pictures
from stepdistill.diffusion.draws import Draws
from stepdistill.methods import find
from stepdistill.methods.base import Batch, Method, Setup, Stage, Stream, Update
from stepdistill.models.adapters import checkpoint_activations
from stepdistill.models.attention import switch
from stepdistill.models.load import Teacher, is_prompted, load_teacher
from stepdistill.models.roles import Roles
from stepdistill.models.weights import begin_as
from stepdistill.recipe import Recipe
from stepdistill.training.ema import Ema
from stepdistill.training.optim import Optimizers
from stepdistill.worlds import NAMES

AUTOCAST = {"bf16": torch.bfloat16, "fp32": None, "fp64": None}


@dataclass
class Run:
    """Everything assembled. `streams` are what the method reads; `stages` divide `recipe.steps`."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    method: Method[Any]
    roles: Roles
    source: Source
    streams: Mapping[str, Stream]
    stages: Sequence[Stage]
    optim: Optimizers
    ema: Ema | None

    def draws(self, step: int, update: int, micro: int) -> Draws:
        """The randomness of one micro-batch of this process: keyed by the global positions of its samples."""
        size = self.recipe.batch_size // (self.accelerator.num_processes * self.recipe.accumulate)
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        return Draws(self.recipe.seed, range(first, first + size), step, update, self.accelerator.device)

    def batch(self, draws: Draws) -> Batch:
        """The data of those samples."""
        return self.source.batch(self.streams, draws)

    def stage_at(self, step: int) -> tuple[Stage, bool]:
        """The stage of a step, and whether it begins there."""
        first = 0
        for stage in self.stages:
            if step < first + stage.steps:
                return stage, step == first
            first += stage.steps
        raise ValueError(f"step {step} lies past the last stage")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors a checkpoint holds. The teacher is not among them unless a method changes it."""
        named = {f"role/{name}/{key}": value for name in self.roles.names if name != "teacher" or self.teacher_changes
                 for key, value in self.roles.module(name).state_dict().items()}
        if self.ema:
            named |= {f"ema/{key}": value for key, value in self.ema.network.state_dict().items()}
        return named | {f"optim/{key}": value for key, value in self.optim.tensors().items()} | {"rng": torch.get_rng_state()}

    @property
    def teacher_changes(self) -> bool:
        """Several stages may replace the teacher (progressive distillation)."""
        return len(self.stages) > 1

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Inverse of `tensors`, with the counts and the method's state from the checkpoint's JSON."""
        for name in self.roles.names:
            if weights := _part(tensors, f"role/{name}/"):
                self.roles.module(name).load_state_dict(weights)
        if self.ema:
            self.ema.network.load_state_dict(_part(tensors, "ema/"))
        self.optim.load(_part(tensors, "optim/"), state["counts"])
        self.method.restore(state["method"])
        torch.set_rng_state(tensors["rng"])

    def begin(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Take the networks of another run, its student's average for the student; returns the roles that had none or another shape.

        ValueError where its student does not fit.
        """
        fresh = []
        for name in self.roles.trains:
            weights = _part(tensors, f"role/{name}/")
            if name == "student":
                weights = _part(tensors, "ema/") or weights
            module = self.roles.module(name)
            if {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in module.state_dict().items()}:
                module.load_state_dict(weights)
            elif name == "student":
                raise ValueError("its student is another network, or an adapter where this one is full (or the other way round)")
            else:
                fresh.append(name)
        if self.ema:
            self.ema.network.load_state_dict(self.roles.module("student").state_dict())
        return fresh


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def updates_of(method: Method[Any], steps: int) -> dict[str, int]:
    """How many optimiser steps each role will take."""
    counts: dict[str, int] = {}
    for step in range(steps):
        for update in method.plan(step):
            for name in update.trains:
                counts[name] = counts.get(name, 0) + 1
    return counts


def assemble(recipe: Recipe, accelerator: Accelerator) -> Run:
    """Build a run. Everything a recipe can get wrong is found here, before any file is written: ValueError or FileNotFoundError."""
    processes = accelerator.num_processes
    if recipe.batch_size % (processes * recipe.accumulate):
        raise ValueError(f"batch_size {recipe.batch_size} cannot be divided over {processes} processes x accumulate {recipe.accumulate}")
    cls, config = find(recipe.method["name"]), recipe.method_config
    prompts, pictures = texts_of(recipe)
    cache = cache_of(recipe, prompts, pictures) if recipe.data.cache else None
    if cache and processes > 1 and not cache.complete:
        raise ValueError(f"data.cache {cache.folder} is not complete: fill it in one process first, with stepdistill cache")
    if cache:
        cache.fill(accelerator.device)
    teacher = load_teacher(recipe.teacher.path, device=accelerator.device, autocast=AUTOCAST[recipe.precision], dtype=dtype_of(recipe),
                           guidance=recipe.guidance, taps=recipe.student.taps, prompts=(*prompts, *(p.caption for p in pictures)),
                           call=recipe.teacher.call, kept=cache.kept() if cache else None, loras=recipe.teacher.loras,
                           quantize=recipe.teacher.quantize)
    torch.manual_seed(recipe.seed)
    method = cls(config, Setup(teacher.denoiser.process, teacher.shape, recipe.student.sampler))
    method.sampler()                                                            # a wrong grid speaks up before anything is built
    needs, streams = cls.needs(config), cls.data(config)
    if is_prompted(Path(recipe.teacher.path)):
        data = Source(teacher, cache.states(), len(prompts)) if cache else captioned_source(teacher, len(prompts), pictures)
    else:
        data = source(teacher, streams, _world(recipe.teacher.path), recipe.data.folder)
    roles = Roles.build(needs, teacher.denoiser, teacher.example, recipe.seed, recipe.lora)
    if recipe.student.weights:
        begin_as(roles.denoisers["student"], recipe.student.weights, teacher.component)
    for network in {id(d.network): d.network for d in roles.denoisers.values()}.values():
        if recipe.gradient_checkpointing:
            checkpoint_activations(network)
        if recipe.attention != "auto":
            switch(network, recipe.attention, accelerator.device)
        if recipe.channels_last:
            network.to(memory_format=torch.channels_last)
        if recipe.compile:
            network.compile()
    if recipe.weights == "bfloat16":
        for name in roles.trains:
            roles.module(name).to(torch.bfloat16)
    stages = tuple(method.stages(recipe.steps))
    if sum(stage.steps for stage in stages) != recipe.steps:
        raise ValueError(f"the stages of {recipe.method['name']} must add up to steps {recipe.steps}")
    horizons = {**dict.fromkeys(roles.trains, 0), **updates_of(method, recipe.steps)}
    optim = Optimizers(roles, recipe.optim, horizons)
    ema = Ema(roles.module("student"), recipe.ema_decay) if recipe.ema_decay else None
    if processes > 1:
        roles.wrap(accelerator.prepare_model)
    return Run(recipe, accelerator, teacher, method, roles, data, streams, stages, optim, ema)


def texts_of(recipe: Recipe) -> tuple[tuple[str, ...], tuple[Picture, ...]]:
    """(the prompts of a recipe, the captioned pictures that its method reads), where the teacher takes prompts.

    Without a file of prompts the captions take their place, whether the method reads their pictures or not.
    """
    prompts, folder = recipe.data.prompts, recipe.data.folder
    texts = read_prompts(prompts) if prompts else ()
    if not is_prompted(Path(recipe.teacher.path)):
        return texts, ()
    reads = wants_pictures(find(recipe.method["name"]).data(recipe.method_config), folder is not None)
    if folder is None or (prompts and not reads):
        return texts, ()
    pictures = read_pictures(folder)
    return (texts, pictures) if reads else (tuple(p.caption for p in pictures), ())


def cache_of(recipe: Recipe, prompts: Sequence[str], pictures: Sequence[Picture]) -> Cache:
    """The cache that a recipe names, of these texts and pictures. ValueError where it names none, or one made of something else."""
    if recipe.data.cache is None:
        raise ValueError("name a folder for the cache with data.cache")
    texts = (*prompts, *(picture.caption for picture in pictures))
    return Cache(recipe.data.cache, Wanted(Path(recipe.teacher.path), recipe.teacher.call, dtype_of(recipe), recipe.guidance, texts,
                                           tuple(pictures), recipe.data.folder, recipe.teacher.loras, recipe.teacher.quantize))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What the frozen weights are stored in."""
    return torch.float64 if recipe.precision == "fp64" else getattr(torch, recipe.teacher.dtype)


def _world(path: str) -> str | None:
    name = path.removeprefix("teacher:")
    return name if name in NAMES else None


def run_update(run: Run, step: int, index: int, update: Update, before: Sequence[Batch]) -> tuple[list[Batch], dict[str, Tensor]]:
    """Forward and backward of one update over its micro-batches; gradients are left on the roles. Returns the batches and the log."""
    recipe, roles = run.recipe, run.roles
    roles.train_only(update.trains)
    batches: list[Batch] = []
    logs: dict[str, Tensor] = {}
    for micro in range(recipe.accumulate):
        draws = run.draws(step, index, micro)
        batch = before[micro] if update.reuse else run.batch(draws)
        batches.append(batch)
        with roles.no_sync(update.trains, unless=micro == recipe.accumulate - 1):
            loss = run.method.loss(update, roles, batch, draws)
            run.accelerator.backward(loss.value / recipe.accumulate)
        for name, value in {"loss": loss.value, **loss.log}.items():
            value = torch.as_tensor(value, device=loss.value.device).detach() / recipe.accumulate
            logs[f"{update.loss}/{name}"] = logs.get(f"{update.loss}/{name}", 0) + value
    return batches, logs
