"""From a recipe to everything a run holds: teacher, method, roles, data, optimizers, EMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from stepdistill import worlds
from stepdistill.data.cache import Cache, Wanted, divided, fill_all
from stepdistill.data.pairs import PairSet, origin
from stepdistill.data.pictures import Picture, read_pictures
from stepdistill.data.prompts import read_prompts
from stepdistill.data.streams import Buckets, Source, captioned_source, source, wants_pairs, wants_pictures
from stepdistill.diffusion.draws import Draws
from stepdistill.losses.reported import Mean
from stepdistill.methods import find
from stepdistill.methods.base import Batch, Method, Setup, Stage, Stream, Update
from stepdistill.models.adapters import checkpoint_activations
from stepdistill.models.attention import switch
from stepdistill.models.discriminator import MapHead
from stepdistill.models.experts import Experts
from stepdistill.models.kept import Kept
from stepdistill.models.load import Teacher, is_prompted, load_teacher
from stepdistill.models.prompted import PromptTeacher
from stepdistill.models.roles import Roles
from stepdistill.models.weights import begin_as
from stepdistill.recipe import Recipe
from stepdistill.training.ema import Ema
from stepdistill.training.optim import Optimizers

AUTOCAST = {"bf16": torch.bfloat16, "fp32": None, "fp64": None}


@dataclass
class Run:
    """Everything assembled. `streams` are what the method reads; `stages` divide `recipe.steps`."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    method: Method[Any]
    roles: Roles
    source: Source | Buckets
    streams: Mapping[str, Stream]
    stages: Sequence[Stage]
    optim: Optimizers
    ema: Ema | None

    @property
    def rows(self) -> int:
        """Samples of one micro-batch of this process."""
        return self.recipe.batch_size // (self.accelerator.num_processes * self.recipe.accumulate)

    def draws(self, step: int, update: int, micro: int) -> Draws:
        """The randomness of one micro-batch of this process: keyed by the global positions of its samples."""
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * self.rows
        return Draws(self.recipe.seed, range(first, first + self.rows), step, update, self.accelerator.device)

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
        """All tensors a checkpoint holds. Those of the teacher are not among them: no method changes it."""
        named = {f"role/{name}/{key}": value for name in self.roles.names if name not in self.roles.given
                 for key, value in self.roles.module(name).state_dict().items()}
        if self.ema:
            named |= {f"ema/{key}": value for key, value in self.ema.network.state_dict().items()}
        return named | {f"optim/{key}": value for key, value in self.optim.tensors().items()} | {"rng": torch.get_rng_state()}

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


def restarts_of(method: Method[Any], stages: Sequence[Stage]) -> dict[str, list[int]]:
    """At which of its updates each role's schedule starts afresh: where a stage resets its optimizer."""
    found: dict[str, list[int]] = {}
    first = 0
    for stage in stages:
        for name in stage.resets:
            found.setdefault(name, []).append(updates_of(method, first).get(name, 0))
        first += stage.steps
    return found


def teacher_of(recipe: Recipe, device: torch.device) -> tuple[Teacher, tuple[Part, ...], list[Kept | None]]:
    """(the teacher of a recipe, what it reads at each size, what the caches of those have kept), the caches filled first."""
    parts = parts_of(recipe)
    fill_all([part.cache for part in parts if part.cache], device)
    kept = [part.cache.kept() if part.cache else None for part in parts]
    if any(k is not None and k.learnt is None for k in kept):                   # the encoders are loaded: every size is recorded with them
        kept = [k and replace(k, learnt=None) for k in kept]
    teacher = load_teacher(recipe.teacher.path, device=device, autocast=AUTOCAST[recipe.precision], dtype=dtype_of(recipe),
                           guidance=recipe.guidance, taps=recipe.student.taps, prompts=parts[0].texts, call=parts[0].call, kept=kept[0],
                           loras=recipe.teacher.loras, quantize=recipe.teacher.quantize)
    return teacher, parts, kept


def assemble(recipe: Recipe, accelerator: Accelerator) -> Run:
    """Build a run. Everything a recipe can get wrong is found here, before any file is written: ValueError or FileNotFoundError."""
    processes = accelerator.num_processes
    if recipe.batch_size % (processes * recipe.accumulate):
        raise ValueError(f"batch_size {recipe.batch_size} cannot be divided over {processes} processes x accumulate {recipe.accumulate}")
    cls, config = find(recipe.method["name"]), recipe.method_config
    paired = wants_pairs(cls.data(config), recipe.data.pairs is not None)
    if paired and recipe.data.buckets:
        raise ValueError("data.pairs are of one size, that of teacher.call: leave data.buckets out")
    teacher, parts, kept = teacher_of(recipe, accelerator.device)
    data: Source | Buckets
    if isinstance(teacher, PromptTeacher):
        teachers = [teacher, *(teacher.at(part.call, part.texts, k) for part, k in zip(parts[1:], kept[1:], strict=True))]
        sources = [part.source(one) for part, one in zip(parts, teachers, strict=True)]
        data = sources[0] if len(sources) == 1 else Buckets(sources)
        teacher = teacher if len(sources) == 1 else teacher.of_sizes(teachers[1:])
    else:
        world = recipe.teacher.path if worlds.world_of(recipe.teacher.path) else None
        data = source(teacher, cls.data(config), world, recipe.data.folder)
    if paired and recipe.data.pairs and isinstance(data, Source):
        data = replace(data, pairs=PairSet.open(recipe.data.pairs, origin_of(recipe, teacher)))
    torch.manual_seed(recipe.seed)
    decode = None if isinstance(teacher, PromptTeacher) else teacher.codec.decode               # a pipeline's own tail passes no gradient
    method = cls(config, Setup(teacher.denoiser.process, teacher.shape, recipe.student.sampler, decode, recipe.guidance))
    spec = method.sampler()                                                     # a wrong grid speaks up before anything is built
    if spec.boundaries:
        teacher.check_room(len(spec.boundaries) + 1)
    if (remedy := method.without_null()) and teacher.example()[2].nulls is None:
        raise ValueError(f"{recipe.method['name']} asks the null condition, and this teacher has none: {remedy}")
    needs, streams = cls.needs(config), cls.data(config)
    roles = Roles.build(needs, teacher.denoiser, teacher.example, recipe.seed, recipe.lora, spec.boundaries, teacher.labels)
    heads = (head for name in roles.heads for head in roles.module(name).modules())
    if len(parts) > 1 and any(isinstance(head, MapHead) for head in heads):
        raise ValueError("data.buckets: the discriminator of a U-Net reads maps of one size; leave the buckets out, or train without it "
                         "(method.gan_weight=0)")
    if recipe.student.weights:
        begin_as(roles.denoisers["student"], recipe.student.weights, teacher.component)
    for network in roles.networks:
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
    optim = Optimizers(roles, recipe.optim, horizons, restarts_of(method, stages))
    ema = Ema(roles.module("student"), recipe.ema_decay) if recipe.ema_decay else None
    if processes > 1:
        if any(isinstance(d.network, Experts) for d in roles.denoisers.values()):
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)           # a batch may leave experts out
        roles.wrap(accelerator.prepare_model)
    return Run(recipe, accelerator, teacher, method, roles, data, streams, stages, optim, ema)


@dataclass(frozen=True)
class Part:
    """What a run reads at one size of picture: the keywords of its pipeline, prompts, captioned pictures, and the cache of both."""

    call: Mapping[str, Any]
    prompts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    cache: Cache | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, and behind them the captions."""
        return *self.prompts, *(picture.caption for picture in self.pictures)

    def source(self, teacher: Teacher) -> Source:
        """Its batches, for a teacher of these texts at this size."""
        if self.cache:
            return Source(teacher, self.cache.states(), len(self.prompts))
        return captioned_source(teacher, len(self.prompts), self.pictures)


def parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """One part, or with data.buckets one for each size that has samples, the size of teacher.call first.

    A picture is in the bucket nearest to its aspect. Prompts take turns: each belongs to one size, as a picture does. ValueError where
    a size would have none, or teacher.call's no picture.
    """
    (prompts, pictures), buckets = texts_of(recipe), recipe.data.buckets
    if not buckets:
        return (_part_of(recipe, prompts, pictures, None),)
    if not is_prompted(recipe.teacher.folder):
        raise ValueError(f"data.buckets is for pipelines that take prompts, and {recipe.teacher.path} takes none: leave it out")
    own = recipe.teacher.call["height"], recipe.teacher.call["width"]
    sizes = (own, *(size for size in buckets if size != own))
    placed = divided(pictures, sizes, _drawn_from(recipe), recipe.data.cache)
    used = sorted(set(placed)) if pictures else list(range(len(sizes)))
    if 0 not in used:
        raise ValueError(f"data.buckets: no picture is nearest to {own[0]}x{own[1]}, the size of teacher.call: set that to one with some")
    if prompts and len(prompts) < len(used):
        raise ValueError(f"data.buckets: {len(used)} sizes and {len(prompts)} prompts, each of which belongs to one: name more prompts")
    return tuple(_part_of(recipe, prompts[turn :: len(used)], tuple(p for p, at in zip(pictures, placed, strict=True) if at == number),
                       sizes[number]) for turn, number in enumerate(used))


def _part_of(recipe: Recipe, prompts: tuple[str, ...], pictures: tuple[Picture, ...], size: tuple[int, int] | None) -> Part:
    cache = cache_of(recipe, prompts, pictures, size) if recipe.data.cache else None
    return Part(_call(recipe, size), prompts, pictures, cache)


def _call(recipe: Recipe, size: tuple[int, int] | None) -> Mapping[str, Any]:
    return recipe.teacher.call if size is None else {**recipe.teacher.call, "height": size[0], "width": size[1]}


def texts_of(recipe: Recipe) -> tuple[tuple[str, ...], tuple[Picture, ...]]:
    """(the prompts of a recipe, the captioned pictures that its method reads), where the teacher takes prompts.

    Without data.folder they are those of the teacher's world, if it has any. Without a file of prompts the captions take their place,
    whether the method reads their pictures or not.
    """
    prompts, read = recipe.data.prompts, _captioned(recipe)
    texts = read_prompts(prompts) if prompts else ()
    if not is_prompted(recipe.teacher.folder):
        return texts, ()
    reads = wants_pictures(find(recipe.method["name"]).data(recipe.method_config), read is not None)
    if read is None or (prompts and not reads):
        return texts, ()
    pictures = read()
    return (texts, pictures) if reads else (tuple(p.caption for p in pictures), ())


def _captioned(recipe: Recipe) -> Callable[[], tuple[Picture, ...]] | None:
    """Reads the captioned pictures of data.folder, or of the teacher's world; None where there are none."""
    if (folder := recipe.data.folder) is not None:
        return lambda: read_pictures(folder)
    world = worlds.world_of(recipe.teacher.path)
    return world.captioned if world else None


def _drawn_from(recipe: Recipe) -> Path | None:
    """The folder that those pictures come from."""
    world = worlds.world_of(recipe.teacher.path)
    return recipe.data.folder or (world.drawn_from() if world and world.drawn_from else None)


def cache_of(recipe: Recipe, prompts: Sequence[str], pictures: Sequence[Picture], size: tuple[int, int] | None = None) -> Cache:
    """The cache that a recipe names, of these texts and pictures; a bucket of this size (H, W) has a folder of its own in it.

    ValueError where it names none, or one made of something else.
    """
    if recipe.data.cache is None:
        raise ValueError("name a folder for the cache with data.cache")
    folder = recipe.data.cache if size is None else recipe.data.cache / f"{size[0]}x{size[1]}"
    texts = (*prompts, *(picture.caption for picture in pictures))
    return Cache(folder, Wanted(recipe.teacher.folder, _call(recipe, size), dtype_of(recipe), recipe.guidance, texts,
                                tuple(pictures), _drawn_from(recipe) if pictures else None, recipe.teacher.loras, recipe.teacher.quantize))


def origin_of(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """What pairs must have been made of to be read by this recipe, `teacher` being its own."""
    return origin(teacher, recipe.guidance, recipe.teacher.call, recipe.teacher.loras)


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What the frozen weights are stored in."""
    return torch.float64 if recipe.precision == "fp64" else getattr(torch, recipe.teacher.dtype)


def run_update(run: Run, step: int, index: int, update: Update, before: Sequence[Batch]) -> tuple[list[Batch], dict[str, Mean]]:
    """Forward and backward of one update over its micro-batches; gradients are left on the roles. Returns the batches and the log.

    The method learns what its losses measured.
    """
    recipe, roles = run.recipe, run.roles
    roles.train_only(update.trains, update.expert)
    batches: list[Batch] = []
    logs: dict[str, Mean] = {}
    measured: dict[str, Tensor] = {}
    for micro in range(recipe.accumulate):
        draws = run.draws(step, index, micro)
        batch = before[micro] if update.reuse else run.batch(draws)
        batches.append(batch)
        run.method.setup = replace(run.method.setup, shape=batch.shape or run.teacher.shape)
        with roles.no_sync(update.trains, unless=micro == recipe.accumulate - 1):
            loss = run.method.loss(update, roles, batch, draws)
            run.accelerator.backward(loss.value / recipe.accumulate)
        for name, value in {"loss": loss.value, **loss.log}.items():
            key, mean = f"{update.loss}/{name}", value if isinstance(value, Mean) else Mean.of(value, loss.value.device)
            logs[key] = logs[key] + mean if key in logs else mean
        for name, part in loss.measured.items():
            share = part.detach() / recipe.accumulate
            measured[name] = measured[name] + share if name in measured else share
    if measured:
        run.method.learn({name: run.accelerator.reduce(mean, "mean") for name, mean in measured.items()})
    return batches, logs
