"""What a method is: the models it needs, the data it reads, who moves when, and the loss each move descends.

The loop knows this contract and no method by name; a method knows its losses and no optimizer, precision, checkpoint or process count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.losses.reported import Mean
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class Conditions:
    """A stream of conditions only (prompts, labels): all that data-free methods need."""


@dataclass(frozen=True)
class Images:
    """A stream of clean states x0 with their conditions."""


@dataclass(frozen=True)
class Pairs:
    """A stream of stored noises z with the clean states x0 that the teacher's ODE makes of them, and their conditions."""


Stream = Conditions | Images | Pairs


@dataclass(frozen=True)
class Sample:
    """One stream's part of a batch. x0 is (B, ...) in the network's space, None for a stream of conditions.

    z is standard normal noise of x0's shape, None but for a stream of pairs; `sampler.start` scales it for whoever is called with it.
    `labels` (B,) int64 say which class or prompt each condition is: rows of the teacher's `labels`, 0 where it has none.
    """

    cond: Conditioning
    x0: Tensor | None = None
    z: Tensor | None = None
    labels: Tensor | None = None

    @property
    def clean(self) -> Tensor:
        """x0, of a stream declared as Images or Pairs."""
        if self.x0 is None:
            raise ValueError("this stream carries conditions only; declare it as Images() to read x0")
        return self.x0

    @property
    def noise(self) -> Tensor:
        """z, of a stream declared as Pairs."""
        if self.z is None:
            raise ValueError("this stream carries no noise; declare it as Pairs() to read z")
        return self.z

    @property
    def rows(self) -> Tensor:
        """labels, which a run's own batches always carry."""
        if self.labels is None:
            raise ValueError("this sample does not say which labels its conditions are: give them with labels=")
        return self.labels


@dataclass
class Batch(Mapping[str, Sample]):
    """Samples keyed by stream. `scratch` is handed on to an update that reuses this batch (a detached rollout, say).

    `shape` is that of one state, where a run has several sizes; the loop sets `Setup.shape` to it. None: the run's only one.
    """

    streams: Mapping[str, Sample]
    scratch: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> Sample:
        return self.streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)


@dataclass(frozen=True)
class Update:
    """One optimiser step: calls `<loss>_loss`, moves the roles in `trains`. `reuse` takes the batch of the update before it.

    Of roles that are several experts only `expert` moves; None moves all that the loss reaches.
    """

    loss: str
    trains: tuple[str, ...]
    reuse: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Stage:
    """A stretch of training. On entering it `Method.enter` is called and the optimizers of `resets` start afresh, schedules too."""

    name: str
    steps: int
    resets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """A scalar to descend (a mean over the samples of this batch) and what to log of it.

    `measured` are means over the samples, too: `Method.learn` is given them for all samples of the update.
    """

    value: Tensor
    log: Mapping[str, Tensor | Mean | float] = field(default_factory=dict)
    measured: Mapping[str, Tensor] = field(default_factory=dict)


ONE_STEP = SamplerSpec((1.0,))


def as_they_are(x0: Tensor) -> Tensor:
    """The pictures of a teacher whose states are pictures."""
    return x0


@dataclass(frozen=True)
class Setup:
    """What a method is told of the run: the teacher's process, one state's shape (C, H, W), and the sampler that the recipe asks for.

    `decode` makes pictures (B, C, H, W) in [-1, 1] of states and lets gradients through; None where the teacher has no such decoder.
    `guidance` is the teacher's.
    """

    process: NoiseProcess
    shape: tuple[int, ...]
    sampler: SamplerSpec = ONE_STEP
    decode: Callable[[Tensor], Tensor] | None = as_they_are
    guidance: float = 1.0


C = TypeVar("C")


class Method(ABC, Generic[C]):
    """A distillation algorithm. Subclasses live in one file each, beside the dataclass that is their part of the recipe."""

    title: ClassVar[str]
    arxiv: ClassVar[str]
    family: ClassVar[str]
    Config: ClassVar[type]
    finishes: ClassVar[bool] = False                                     # begins at a student that has been trained, not at the teacher
    one_step: ClassVar[bool] = False                                     # trains a student of one call, and refuses more
    on_trajectories: ClassVar[bool] = False                              # the student's first call learns what holds on trajectories alone

    def __init__(self, cfg: C, setup: Setup):
        """ValueError for a first time below 1 where pure noise must be a state of a trajectory: below 1 those hold some of x0.

        With Stable Diffusion's table and data of N(1.3, 0.6²), the end of the ODE from the noise of t = 0.4 is N(0.70, 0.53²).
        """
        self.cfg, self.setup, self.process = cfg, setup, setup.process
        if self.on_trajectories and (first := setup.sampler.times[0]) < 1:
            raise ValueError(f"student.times must begin at 1 for {type(self).__name__}, which learns along trajectories, where at "
                             f"{first:g} no state is noise alone")

    @classmethod
    @abstractmethod
    def needs(cls, cfg: C) -> Mapping[str, Role]:
        """The models of this configuration: GAN weight 0 needs no discriminator."""

    @classmethod
    def data(cls, cfg: C) -> Mapping[str, Stream]:
        """The streams of this configuration."""
        return {"main": Conditions()}

    def without_null(self) -> str | None:
        """What to change of the recipe for a teacher that has no null condition; None where this method never asks it.

        Guided teachers are the loader's business: this is about what the method itself asks and drops.
        """
        return None

    def stages(self, steps: int) -> Sequence[Stage]:
        """How `steps` iterations are divided; one stage unless the method says otherwise."""
        return (Stage("main", steps),)

    def enter(self, stage: Stage, m: Roles) -> None:
        """Called once before the first step of a stage."""

    def plan(self, step: int) -> Sequence[Update]:
        """Who moves at this step, in order."""
        return (Update("student", ("student",)),)

    def loss(self, update: Update, m: Roles, batch: Batch, draws: Draws) -> Loss:
        """Dispatch to `<update.loss>_loss`."""
        return getattr(self, f"{update.loss}_loss")(m, batch, draws)

    def learn(self, measured: Mapping[str, Tensor]) -> None:
        """What the losses of one update measured, averaged over micro-batches and processes: for the updates after it.

        It is called before the optimiser steps, so numbers may not be finite where the step is skipped.
        """

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        """Targets and curricula, after `count` optimiser steps of this update's first role."""

    def state(self) -> dict[str, Any]:
        """Running quantities as plain JSON values, saved in checkpoints."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)}")

    @property
    def built_in(self) -> float:
        """The teacher's guidance that is part of the student for good; 1 where none is, it is told, or it learnt both halves."""
        none = "w" in self.sampler().inputs or "teacher" not in self.needs(self.cfg)
        return 1.0 if none else self.setup.guidance

    @abstractmethod
    def sampler(self) -> SamplerSpec:
        """How the student must be run; training rollouts use it too."""
