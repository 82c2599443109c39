"""Batches from keyed draws: which pictures and labels a batch holds depends on (seed, step, update, sample), so nothing needs a state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepdistill.data.prompts import SUFFIXES, read_captions
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Batch, Images, Sample, Stream
from stepdistill.models.load import Teacher
from stepdistill.models.prompted import PromptTeacher


@dataclass(frozen=True)
class PictureSet:
    """uint8 pictures (N, C, H, W) and labels (N,), held in memory."""

    images: Tensor
    labels: Tensor


def world_pictures(name: str) -> PictureSet:
    """The training pictures of a shipped world."""
    from stepdistill.worlds.fashion import data

    if name != "fashion":
        raise ValueError(f"unknown world {name!r}")
    pictures = data.load("train")
    return PictureSet(pictures.images, pictures.labels)


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
    images, numbers = [], []
    for group in groups:
        number = 0 if group == folder else _class_of(group.name, labels, folder)
        for path in sorted(p for p in group.iterdir() if p.suffix.lower() in SUFFIXES):
            images.append(_read(path, size, channels))
            numbers.append(number)
    if not images:
        raise ValueError(f"data.folder {folder} holds no pictures ({', '.join(SUFFIXES)})")
    return PictureSet(torch.stack(images), torch.tensor(numbers))


def captioned_pictures(folder: Path, size: tuple[int, int], channels: int) -> PictureSet:
    """The captioned pictures of a folder (data.prompts.read_captions), whose labels are the numbers of their captions."""
    images = [_read(path, size, channels) for path, _ in read_captions(folder)]
    return PictureSet(torch.stack(images), torch.arange(len(images)))


def _class_of(name: str, labels: tuple[str, ...], folder: Path) -> int:
    if name in labels:
        return labels.index(name)
    if name.isdigit() and int(name) < len(labels):
        return int(name)
    if not labels:
        raise ValueError(f"{folder / name} is a sub-folder, and this teacher has no classes: put the pictures into {folder} itself")
    raise ValueError(f"{folder / name} is no class of this teacher; sub-folders are named {labels[:3]}... or 0..{len(labels) - 1}")


def _read(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:     # what Pillow raises for damaged files
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    side = min(image.width * size[0], image.height * size[1])
    crop = round(side / size[0]), round(side / size[1])                              # (width, height) of the target's aspect
    left, top = (image.width - crop[0]) // 2, (image.height - crop[1]) // 2
    image = image.crop((left, top, left + crop[0], top + crop[1])).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(size[0], size[1], channels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Source:
    """Makes batches for a method: labels are uniform over the classes, pictures uniform over the set, both by the sample's key."""

    teacher: Teacher
    pictures: PictureSet | None = None

    def batch(self, streams: Mapping[str, Stream], draws: Draws) -> Batch:
        """One batch with the streams a method declared. ValueError where it wants pictures and none were given."""
        return Batch({name: self._sample(name, stream, draws) for name, stream in streams.items()})

    def _sample(self, name: str, stream: Stream, draws: Draws) -> Sample:
        rows = draws.each(f"data/{name}")
        if not isinstance(stream, Images):
            return Sample(self.teacher.condition(rows.integers(max(1, self.teacher.classes))))
        if self.pictures is None:
            raise ValueError("this method reads real pictures: set data.folder (or, for DMD2 without pictures, method.gan_weight=0)")
        chosen = rows.integers(len(self.pictures.images)).cpu()
        images = self.pictures.images[chosen].to(self.teacher.device).float() / 127.5 - 1
        with torch.no_grad():
            return Sample(self.teacher.condition(self.pictures.labels[chosen]), self.teacher.codec.encode(images))


def source(teacher: Teacher, streams: Mapping[str, Stream], world: str | None, folder: Path | None) -> Source:
    """The data a method needs, read only where a stream wants pictures."""
    if not any(isinstance(s, Images) for s in streams.values()):
        return Source(teacher)
    if folder is None and world is None:
        raise ValueError("this method reads real pictures: set data.folder to a folder of pictures, or choose a data-free method")
    if folder is not None:
        channels, height, width = teacher.pictures(torch.zeros(1, *teacher.shape, device=teacher.device)).shape[1:]
        if isinstance(teacher, PromptTeacher):
            return Source(teacher, captioned_pictures(folder.expanduser(), (height, width), channels))
        return Source(teacher, folder_pictures(folder.expanduser(), (height, width), channels, teacher.labels))
    return Source(teacher, world_pictures(str(world)))
