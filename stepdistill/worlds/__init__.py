"""Small real worlds that ship with the package: teachers, a judge, reference statistics, model cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stepdistill.data.pictures import Picture

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shared:
    """A component that a teacher's pipeline names and its folder does not hold: where its files lie, and how it is made in a precision.

    `place` raises FileNotFoundError with the remedy where they are not installed.
    """

    place: Callable[[], Path]
    make: Callable[[torch.dtype], Any]


@dataclass(frozen=True)
class World:
    """What ships under one name.

    `teachers` are folders, the first of them the world's own, and the keywords that the calls of their pipelines need. Real pictures
    to train on are `labelled`, as uint8 (N, C, H, W) and labels (N,), or `captioned`: then `drawn_from` is the folder that they come
    from, and the captions are the default prompts. `shared` gives components by their names in the pipelines. `protocol` is its exam.
    """

    teachers: Mapping[str, Mapping[str, Any]]
    protocol: str | None = None
    labelled: Callable[[], tuple[Tensor, Tensor]] | None = None
    captioned: Callable[[], tuple[Picture, ...]] | None = None
    drawn_from: Callable[[], Path] | None = None
    shared: Callable[[], Mapping[str, Shared]] = dict


def _fashion() -> tuple[Tensor, Tensor]:
    from stepdistill.worlds.fashion import data

    pictures = data.load("train")
    return pictures.images, pictures.labels


def _emojis() -> tuple[Picture, ...]:
    from stepdistill.worlds.emoji import data

    return data.captioned()


def _emoji_files() -> Path:
    from stepdistill.worlds.emoji import data

    return data.svg_folder()


def _emoji_parts() -> Mapping[str, Shared]:
    from stepdistill.worlds.emoji.assemble import SHARED

    return SHARED


WORLDS = {
    "fashion": World({"teacher": {}}, "fashion", labelled=_fashion),
    "emoji": World({"sd": {}, "dit": {"height": 64, "width": 64, "max_sequence_length": 24}}, "emoji", captioned=_emojis,
                   drawn_from=_emoji_files, shared=_emoji_parts),
}


def _found(name: str) -> tuple[str, str] | None:
    """(world, folder) of a teacher's name; None where no world has it."""
    world, slash, folder = name.removeprefix("teacher:").partition("/")
    if world not in WORLDS:
        return None
    own = next(iter(WORLDS[world].teachers))
    return (world, folder or own) if not slash or folder in WORLDS[world].teachers else None


def teacher_folder(name: str) -> Path | None:
    """The folder of a shipped teacher; None where none has this name. "emoji", "teacher:emoji" and "emoji/sd" are the same."""
    found = _found(name)
    return FOLDER.joinpath(*found) if found else None


def world_of(name: str) -> World | None:
    """The world of a teacher's name; None where no world has it."""
    found = _found(name)
    return WORLDS[found[0]] if found else None


def call_of(name: str) -> Mapping[str, Any]:
    """The keywords that the calls of a shipped teacher's pipeline need; none where no world has this name."""
    found = _found(name)
    return WORLDS[found[0]].teachers[found[1]] if found else {}


def teachers() -> tuple[str, ...]:
    """The names of all shipped teachers: a world's own has the world's."""
    return tuple(name if i == 0 else f"{name}/{folder}" for name, world in WORLDS.items() for i, folder in enumerate(world.teachers))


def shared(folder: Path) -> Mapping[str, Shared]:
    """What a teacher's folder leaves to its world, by the components' names; nothing for a folder outside."""
    world = next((world for name, world in WORLDS.items() if folder.absolute().parent == FOLDER / name), None)
    return world.shared() if world else {}


def place_of(folder: Path, component: str) -> Path:
    """Where a component of the pipeline in a folder lies: in it, or where its world has it.

    Raises FileNotFoundError where that is not installed.
    """
    lent = shared(folder)
    return lent[component].place() if component in lent else folder / component


def stored_results(name: str) -> list[Path]:
    """Result files of a world's teacher, stored with the package (the model card names the commands that remake them)."""
    return sorted((FOLDER / name / "results").glob("*.json"))
