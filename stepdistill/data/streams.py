"""Batches from keyed draws: which pictures and labels a batch holds depends on (seed, step, update, sample), so nothing needs a state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stepdistill import worlds
from stepdistill.data.pairs import PairSet
from stepdistill.data.pictures import SUFFIXES, Picture, picture_files, tensors
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Batch, Images, Pairs, Sample, Stream
from stepdistill.models.load import Teacher

NO_PAIRS = ("this method reads pairs of a noise and what the teacher's ODE makes of it: make them with `stepdistill pairs --config RECIPE "
            "--to FOLDER`, and name that folder with data.pairs")


@dataclass(frozen=True)
class PictureSet:
    """uint8 pictures (N, C, H, W) and labels (N,), held in memory."""

    images: Tensor
    labels: Tensor

    @torch.no_grad()
    def states(self, rows: Tensor, teacher: Teacher) -> Tensor:
        """Some of the pictures as states, encoded now."""
        return teacher.codec.encode(self.images[rows].to(teacher.device).float() / 127.5 - 1)


class CleanStates(Protocol):
    """Real data: states x0 by their numbers, and the label (or prompt) of each."""

    @property
    def labels(self) -> Tensor: ...

    def states(self, rows: Tensor, teacher: Teacher) -> Tensor: ...


def world_pictures(name: str) -> PictureSet:
    """The labelled training pictures of a shipped world. ValueError where there is none of this name that has any."""
    world = worlds.world_of(name)
    if world is None or world.labelled is None:
        raise ValueError(f"unknown world {name!r} of labelled pictures")
    return PictureSet(*world.labelled())


def folder_pictures(folder: Path, size: tuple[int, int], channels: int, labels: tuple[str, ...]) -> PictureSet:
    """Pictures in one sub-folder per class (named by label or number), centre-cropped and resized (Lanczos) to `size` (H, W).

    A folder without sub-folders is unlabelled: for models with one class or none. Raises FileNotFoundError or ValueError naming the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder {folder} does not exist")
    groups = sorted(p for p in folder.iterdir() if p.is_dir()) or [folder]
    if groups == [folder] and len(labels) > 1:
        raise ValueError(f"data.folder {folder} has no sub-folders, and this teacher has {len(labels)} classes: put each class into a "
                         f"folder of its own, named {labels[0]!r} or 0, {labels[1]!r} or 1, ...")
    found, numbers = [], []
    for group in groups:
        number = 0 if group == folder else _class_of(group.name, labels, folder)
        for path in picture_files(group):
            found.append(Picture(str(path), "", path.read_bytes))
            numbers.append(number)
    if not found:
        raise ValueError(f"data.folder {folder} holds no pictures ({', '.join(SUFFIXES)})")
    return PictureSet(torch.stack(list(tensors(found, size, channels))), torch.tensor(numbers))


def _class_of(name: str, labels: tuple[str, ...], folder: Path) -> int:
    if name in labels:
        return labels.index(name)
    if name.isdigit() and int(name) < len(labels):
        return int(name)
    if not labels:
        raise ValueError(f"{folder / name} is a sub-folder, and this teacher has no classes: put the pictures into {folder} itself")
    raise ValueError(f"{folder / name} is no class of this teacher; sub-folders are named {labels[:3]}... or 0..{len(labels) - 1}")


@dataclass(frozen=True)
class Source:
    """Makes batches for a method: labels are uniform over the classes, pictures and pairs over their sets, all by the sample's key.

    Of a teacher that takes prompts the first `prompts` are drawn where no picture is asked for, 0 for all: captions may follow them.
    """

    teacher: Teacher
    pictures: CleanStates | None = None
    prompts: int = 0
    pairs: PairSet | None = None

    def batch(self, streams: Mapping[str, Stream], draws: Draws) -> Batch:
        """One batch with the streams a method declared. ValueError where it wants pictures and none were given."""
        return Batch({name: self._sample(name, stream, draws) for name, stream in streams.items()}, shape=tuple(self.teacher.shape))

    def rows(self, streams: Mapping[str, Stream]) -> int:
        """How many samples there are: pictures where any are read, else prompts or classes."""
        pictures = self.pictures if any(isinstance(stream, Images) for stream in streams.values()) else None
        return self.prompts or max(1, self.teacher.classes) if pictures is None else len(pictures.labels)

    def _sample(self, name: str, stream: Stream, draws: Draws) -> Sample:
        rows, device = draws.each(f"data/{name}"), self.teacher.device
        if isinstance(stream, Pairs):
            if self.pairs is None:
                raise ValueError(NO_PAIRS)
            z, y, labels = self.pairs.rows(rows.integers(self.pairs.count))
            return self._of(labels, y.to(device), z.to(device))
        if not isinstance(stream, Images):
            return self._of(rows.integers(self.prompts or max(1, self.teacher.classes)))
        if self.pictures is None:
            raise ValueError("this method reads real pictures: set data.folder (or, for DMD2 without pictures, method.gan_weight=0)")
        chosen = rows.integers(len(self.pictures.labels)).cpu()
        return self._of(self.pictures.labels[chosen], self.pictures.states(chosen, self.teacher))

    def _of(self, labels: Tensor, x0: Tensor | None = None, z: Tensor | None = None) -> Sample:
        return Sample(self.teacher.condition(labels), x0, z, labels.to(self.teacher.device))


@dataclass(frozen=True)
class Buckets:
    """Several sources, one for each size. An update has one of them, drawn as often as it has samples: equal on every process and
    micro-batch."""

    sources: Sequence[Source]

    def batch(self, streams: Mapping[str, Stream], draws: Draws) -> Batch:
        """A batch of one size."""
        ends = list(accumulate(source.rows(streams) for source in self.sources))
        row = int(draws.shared("data/bucket").integers(ends[-1]))
        return self.sources[bisect_right(ends, row)].batch(streams, draws)


def wants_pictures(streams: Mapping[str, Stream], given: bool) -> bool:
    """Whether a method with these streams reads pictures; ValueError where it does and none are `given`."""
    wants = any(isinstance(s, Images) for s in streams.values())
    if wants and not given:
        raise ValueError("this method reads real pictures: set data.folder to a folder of pictures, or choose a data-free method")
    return wants


def wants_pairs(streams: Mapping[str, Stream], given: bool) -> bool:
    """Whether a method with these streams reads pairs; ValueError where it does and none are `given`."""
    wants = any(isinstance(s, Pairs) for s in streams.values())
    if wants and not given:
        raise ValueError(NO_PAIRS)
    return wants


def source(teacher: Teacher, streams: Mapping[str, Stream], world: str | None, folder: Path | None) -> Source:
    """The data a method needs for a teacher with classes, read only where a stream wants pictures."""
    if not wants_pictures(streams, folder is not None or world is not None):
        return Source(teacher)
    if folder is not None:
        return Source(teacher, folder_pictures(folder.expanduser(), *picture_size(teacher), teacher.labels))
    return Source(teacher, world_pictures(str(world)))


def captioned_source(teacher: Teacher, prompts: int, pictures: Sequence[Picture]) -> Source:
    """The data for a teacher whose conditions are so many prompts and then the captions of these pictures (none for data-free methods)."""
    if not pictures:
        return Source(teacher)
    images = torch.stack(list(tensors(pictures, *picture_size(teacher))))
    return Source(teacher, PictureSet(images, prompts + torch.arange(len(pictures))), prompts)


def picture_size(teacher: Teacher) -> tuple[tuple[int, int], int]:
    """((H, W), channels) of what the teacher makes."""
    channels, height, width = teacher.pictures(torch.zeros(1, *teacher.shape, device=teacher.device)).shape[1:]
    return (height, width), channels
