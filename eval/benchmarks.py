"""Benchmarks whose judges live elsewhere, for a model and a result: pictures in the layout of a judge, and its scores in a result file.

    layout     prompts                                                       pictures of each
    plain      any file of prompts                                           4
    geneval    GenEval's evaluation_metadata.jsonl                           4
    dpg        DPG-Bench's folder of prompts, NAME.txt                       4
    hpsv2      a folder of HPSv2's lists, anime.json and so on               1
    vbench     a file of prompts; `frames` says how many a video has         5
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.prompts import objects, read_prompts
from stepdistill.eval import outside, score
from stepdistill.eval.generate import of_prompts
from stepdistill.eval.models import open_model
from stepdistill.eval.outside import Judged
from stepdistill.training.checkpoint import write_atomically

SEEDS = {"plain": 4, "geneval": 4, "dpg": 4, "hpsv2": 1, "vbench": 5}


@dataclass(frozen=True)
class Asked:
    """Prompts in a judge's order, and what its layout needs besides: lines of metadata, names of files, prompts in each style."""

    prompts: tuple[str, ...]
    metadata: Sequence[Mapping[str, Any]] = ()
    names: Sequence[str] = ()
    styles: Mapping[str, int] | None = None


def read(layout: str, source: Path) -> Asked:
    """A judge's own prompts. Raises FileNotFoundError or ValueError where `source` is not what the layout reads."""
    _known(layout)
    if layout == "geneval":
        if not source.is_file():
            raise FileNotFoundError(f"no file {source}: name GenEval's evaluation_metadata.jsonl")
        lines = [line for _, line in objects(source)]
        return Asked(tuple(str(line.get("prompt", "")) for line in lines), metadata=lines)
    if layout == "dpg":
        files = sorted(source.glob("*.txt")) if source.is_dir() else []
        if not files:
            raise FileNotFoundError(f"{source} holds no prompts NAME.txt: name DPG-Bench's folder of prompts")
        return Asked(tuple(" ".join(path.read_text(encoding="utf-8").split()) for path in files), names=[path.stem for path in files])
    if layout == "hpsv2":
        files = [source / f"{style}.json" for style in outside.STYLES if (source / f"{style}.json").is_file()]
        if not files:
            raise FileNotFoundError(f"{source} holds none of {', '.join(f'{style}.json' for style in outside.STYLES)}: name the folder of "
                                    "HPSv2's lists of prompts")
        lists = {path.stem: _listed(path) for path in files}
        return Asked(tuple(prompt for each in lists.values() for prompt in each), styles={s: len(each) for s, each in lists.items()})
    return Asked(read_prompts(source))


def write(layout: str, model: str, prompts: Path, to: Path, *, seeds: int | None = None, frames: int | None = None, seed: int = 0,
          steps: int | None = None, guidance: float | None = None, call: Mapping[str, Any] | None = None,
          device: torch.device | str = "cpu", quiet: bool = False) -> int:
    """Make a model's pictures of a judge's prompts in its layout, in the new or empty folder `to`; returns how many.

    `seeds` is the number of each prompt (default: the judge's). Raises ValueError or FileNotFoundError where something is unfit.
    """
    asked, each = read(layout, prompts), seeds or SEEDS[_known(layout)]
    if layout in ("dpg", "hpsv2") and each != SEEDS[layout]:
        raise ValueError(f"{layout} takes {SEEDS[layout]} pictures of each prompt, neither more nor fewer: leave --seeds out")
    if (layout == "vbench") != (frames is not None):
        raise ValueError("--frames is the number of frames of a video: vbench needs it, and no other layout takes it")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not empty: choose another folder")
    opened = open_model(model, steps, guidance, prompts=asked.prompts, call=call, device=device)
    made = of_prompts(opened.teacher, opened.spec, each, seed, quiet=quiet)
    if layout == "geneval":
        outside.write_geneval(to, asked.metadata, made)
    elif layout == "dpg":
        outside.write_dpg(to, asked.names, made)
    elif layout == "hpsv2":
        pictures = (seeds_of[0] for seeds_of in made)
        outside.write_hpsv2(to, {style: islice(pictures, count) for style, count in (asked.styles or {}).items()})
    elif layout == "vbench":
        outside.write_vbench(to, asked.prompts, _videos(made, frames or 1))
    else:
        outside.write_plain(to, asked.prompts, made)
    return len(asked.prompts) * each


def take(layout: str, scores: Path, result: Path, *, folder: Path | None = None, name: str | None = None) -> dict[str, Any]:
    """Read what a judge wrote into the block `judges` of a result file; returns what was added, by name.

    `folder` is the one that was judged, for the plain layout; `name` what the judge is called there. Raises FileNotFoundError or ValueError
    for a result or a judge's file that is none.
    """
    _known(layout)
    if (layout == "plain") != (folder is not None) or (name is not None and layout != "plain"):
        raise ValueError("--folder and --name are for the plain layout, which needs the folder that was judged")
    if layout == "plain":
        found: Mapping[str, Any] = {name or "plain": outside.read_plain(folder or Path(), scores)}
    elif layout == "geneval":
        found = {"geneval": (judged := outside.read_geneval(scores)), **{f"geneval_{s}": e for s, e in judged.by_skill.items()}}
    elif layout == "dpg":
        found = {"dpg": outside.read_dpg(scores)}
    elif layout == "hpsv2":
        found = {f"hpsv2_{style}": estimate for style, estimate in outside.read_hpsv2(scores).items()}
    else:
        found = {f"vbench_{dimension}": judged for dimension, judged in outside.read_vbench(scores).items()}
    added = {key: each.to_dict() for key, each in found.items()}
    whole = score.read_result(result)
    write_atomically(result, json.dumps({**whole, "judges": {**whole.get("judges", {}), **added}}, indent=2) + "\n")
    return added


def paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any] | None:
    """Difference a - b of two blocks of one judge and the win rate of a; None where prompts were not kept. Raises as `outside.paired`."""
    mine, its = Judged.from_dict(a), Judged.from_dict(b)
    return None if mine is None or its is None else outside.paired(mine, its).to_dict()


def _known(layout: str) -> str:
    if layout not in SEEDS:
        raise ValueError(f"no layout {layout!r}: there are {', '.join(SEEDS)}")
    return layout


def _listed(path: Path) -> list[str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): get it again") from error
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError(f"{path} is no list of prompts: name the folder of HPSv2's lists")
    return value


def _videos(made: Iterator[Tensor], frames: int) -> Iterator[Tensor]:
    """Pictures (V, C, H, T·W) of frames side by side as videos (V, T, C, H, W)."""
    for pictures in made:
        if pictures.shape[-1] % frames:
            raise ValueError(f"{pictures.shape[-1]} pixels across are no {frames} frames side by side: give the model's --frames")
        yield pictures.unflatten(-1, (frames, -1)).permute(0, 3, 1, 2, 4)
