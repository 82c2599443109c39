"""What the newest checkpoint of a run holds of its student, and two such students averaged into one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill import recipe as recipes
from stepdistill import worlds
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.models.adapters import LoraRecipe, merged
from stepdistill.recipe import Recipe
from stepdistill.training import checkpoint
from stepdistill.training.loop import BEST, CHECKPOINTS, RECIPE, say


@dataclass(frozen=True)
class Student:
    """A student as it was saved, at the last step or, if `best`, at the one that its exams chose. `ema` is False for a run that keeps no
    average, or where the raw weights were asked for.

    `weights` are its network's, those of all its experts, or its adapter's; `spec` is how it is run, `call` what its pipeline is told.
    `merge` names another student that is to be averaged with it.
    """

    run: Path
    recipe: Recipe
    step: int
    ema: bool
    best: bool
    spec: SamplerSpec
    call: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    merge: Merge | None = None

    @property
    def adapter(self) -> LoraRecipe | None:
        """The adapter that it was trained as; None where all its weights were."""
        return self.recipe.lora.get("student")


@dataclass(frozen=True)
class Merge:
    """What a student is averaged with: its own weights count `share`, those of the other 1 - share."""

    other: Student
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, of the other student what a model card tells."""
        other = self.other
        return {"run": other.run.name, "share": self.share, "method": other.recipe.method["name"], "step": other.step,
                "steps": other.recipe.steps, "ema": other.ema}


def read(run: Path, weights: Literal["ema", "raw"], best: bool = False) -> Student:
    """The student of a run, or its best. FileNotFoundError or ValueError where that is no run, has trained nothing yet or is damaged."""
    run = Path(run).expanduser()
    if not (run / RECIPE).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {RECIPE}")
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    recipe = recipes.load(run / RECIPE)
    found = checkpoint.newest(run / (BEST if best else CHECKPOINTS), say)
    if found is None and best:
        raise ValueError(f"{run} has kept no best checkpoint: one is kept after the first exam, every {recipe.exam.every} steps"
                         if recipe.exam.every else f"{run} looks for no best checkpoint: train with exam.every, or leave --best out")
    if found is None:
        raise ValueError(f"nothing trained yet: {run} has no checkpoint; the first is written after step "
                         f"{min(recipe.checkpoint_every, recipe.steps)}, or when the run is interrupted")
    tensors, state = found
    ema = weights == "ema" and recipe.ema_decay > 0
    prefix = "ema/" if ema else "role/student/"
    held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Student(run, recipe, int(state["step"]), ema, best, spec_of(state.get("sampler"), run), dict(state.get("call", {})), held)


def spec_of(values: Any, where: Path) -> SamplerSpec:
    """A sampler from plain JSON values; ValueError naming where they stand if they make none."""
    try:
        return SamplerSpec.from_dict(values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is damaged: what it says of its sampler cannot be used ({error})") from error


def shares_of(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Saved weights or adapters of each expert, under the names they have in its network; of one network all of them."""
    named = {key: re.fullmatch(r"experts[./](\d+)[./](.+)", key) for key in weights}
    shares: dict[int, dict[str, Tensor]] = {}
    for key, match in named.items():
        shares.setdefault(int(match[1]) if match else 0, {})[match[2] if match else key] = weights[key]
    return [shares[i] for i in sorted(shares)]


# ---- two students in one

def merging(student: Student, other: Student, share: float) -> Student:
    """The student, to be averaged with another one. ValueError unless both are of one teacher, and run and told alike."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is the run's part of a merge and must lie in [0, 1], got {share:g}")
    for what, mine, theirs in (("teacher", _teacher(student), _teacher(other)), ("sampler", student.spec, other.spec),
                               ("call of its pipeline", student.call, other.call)):
        if mine != theirs:
            raise ValueError(f"the student of {other.run} has another {what} than that of {student.run}: only weights that began alike and "
                             "are run alike can be averaged")
    return replace(student, merge=Merge(other, share))


def _teacher(student: Student) -> tuple[Path, dict[str, float]]:
    given = student.recipe.teacher
    return (worlds.teacher_folder(given.path) or Path(given.path)).resolve(), dict(given.loras)


def whole(student: Student, networks: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """The full weights of each network of a student; an adapter is merged into copies of `networks`, which hold the teacher's.

    ValueError where it does not fit them.
    """
    shares, adapter = shares_of(student.weights), student.adapter
    if adapter is None:
        return shares
    try:
        return [merged(copy.deepcopy(network), share, adapter).state_dict() for network, share in zip(networks, shares, strict=True)]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter of {student.run} does not fit the teacher at {student.recipe.teacher.path}; was the teacher "
                         "replaced?") from error


@torch.no_grad()
def averaged(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """share·mine + (1 - share)·theirs of the weights of two networks, in float32; at 1 and 0 one of them, bit for bit.

    Numbers that are whole are mine. ValueError where the networks differ.
    """
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ValueError("the two students are different networks, and have no average")
    if share in (0, 1):
        return dict(mine if share else theirs)
    return {k: torch.lerp(theirs[k].double(), v.double(), share).float() if v.is_floating_point() else v for k, v in mine.items()}
