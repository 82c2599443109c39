"""What commands share: options, and how they show what they found."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Config = Annotated[str | None, typer.Option("--config", help="a recipe: a YAML file, or the short name of a shipped one (fashion/dmd2)")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys to change: steps=500 method.gan_weight=0")]
Batch = Annotated[int, typer.Option(help="pictures made at a time; changes speed, never a picture")]
Solver = Annotated[str | None, typer.Option(help="for a teacher: ddim, heun or dpmpp_2m, without re-noising")]
Renoise = Annotated[float | None, typer.Option(min=0, max=1, help="for a teacher: 0 follows the ODE, 1 re-noises x0, between is both")]
Shift = Annotated[float | None, typer.Option(min=0.01, max=100, help="for a teacher: equal steps, moved towards noise (above 1) or detail")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: what accelerate finds")]


def show(value: Any, as_json: bool, human: str) -> None:
    """Print a result for a program or for a person."""
    print(json.dumps(value) if as_json else human)


def pick_device(name: str | None) -> Any:
    """The device named, or the accelerator if there is one: of several processes of a launch each has its own."""
    import torch

    if name is None:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def chosen_recipe(config: str | None, overrides: list[str] | None) -> Any:
    """The recipe that is named, with its keys changed."""
    from stepdistill import recipe

    if config is None:
        raise ValueError(f"name a recipe with --config ({recipe.shown()}, or a YAML file)")
    return recipe.load(config, overrides or [])


def call_keywords(items: Sequence[str] | None) -> dict[str, Any]:
    """Keywords of a pipeline's call from `key=value` strings, values as YAML reads them. Raises ValueError for others."""
    import yaml

    pairs = [item.partition("=") for item in items or []]
    if wrong := [key for key, sign, _ in pairs if not sign or not key]:
        raise ValueError(f"{wrong[0]!r} must read key=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def fresh(folder: Path) -> None:
    """Raises ValueError unless a folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --to")
