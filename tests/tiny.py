"""A world small enough to train in milliseconds: a diffusers teacher on disk, pictures on disk, and recipes over both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from stepdistill import recipe as recipes
from stepdistill.images import save_png, to_image
from stepdistill.methods import find
from stepdistill.recipe import Recipe
from stepdistill.training import checkpoint, loop
from stepdistill.training.assemble import Run, assemble

LABELS = ("sock", "hat", "glove")
ADAM = {"lr": 1e-3, "betas": [0.0, 0.99]}


def tiny_teacher(folder: Path, seed: int = 1, prediction_type: str = "epsilon", **options: Any) -> Path:
    """A class-conditional UNet2DModel over 16x16 grey pictures seen as 4x8x8, three classes and the null class 3, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DModel(**{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
            "norm_num_groups": 4, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
            "num_class_embeds": len(LABELS) + 1, **options})
        for weight in network.class_embedding.parameters():
            weight.data.mul_(3)                                              # so that labels are seen in the output
    network.save_pretrained(folder)
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                  prediction_type=prediction_type).save_pretrained(folder)
    (folder / "stepdistill.json").write_text(json.dumps({
        "codec": {"space_to_depth": 2}, "classes": len(LABELS), "null_class": len(LABELS), "labels": LABELS, "licence": "Apache-2.0"}))
    return folder


def tiny_pictures(folder: Path, each: int = 5, size: int = 16) -> Path:
    """PNG files in one sub-folder per class: squares whose place tells the class, on noise."""
    generator = torch.Generator().manual_seed(2)
    for number, name in enumerate(LABELS):
        for i in range(each):
            picture = torch.randint(0, 60, (1, size, size), generator=generator).to(torch.uint8)
            picture[:, 4 * number : 4 * number + 6, 4:12] += 180
            save_png(to_image(picture), folder / name / f"{i}.png")
    return folder


def tiny_tree(folder: Path, method: str = "dmd2", **overrides: Any) -> dict[str, Any]:
    """A recipe as plain values; its teacher and pictures are made in `folder` on first use. `method__gan_weight=0` reaches inside."""
    if not (folder / "teacher").is_dir():
        tiny_teacher(folder / "teacher")
    if not (folder / "pictures").is_dir():
        tiny_pictures(folder / "pictures")
    options: dict[str, Any] = {"dmd2": {"fake_updates": 2, "gan_weight": 0.1}, "consistency": {"intervals": 10},
                               "phased_dmd": {"phases": 1}}.get(method, {})
    trained = [name for name, role in find(method).needs(recipes.build(find(method).Config, options, "method")).items() if role.trains]
    tree: dict[str, Any] = {
        "teacher": {"path": str(folder / "teacher")}, "method": {"name": method, **options},
        "optim": {name: dict(ADAM) for name in trained},
        "data": {"folder": str(folder / "pictures")}, "guidance": 1.5, "steps": 6, "batch_size": 4, "precision": "fp32", "ema_decay": 0.9,
        "checkpoint_every": 2, "log_every": 1, "preview_count": 3, "trackers": []}
    for key, value in overrides.items():
        *parents, last = key.split("__")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    if not tree["method"].get("gan_weight", True):
        tree["optim"].pop("disc", None)
    return tree


def tiny_recipe(folder: Path, method: str = "dmd2", **overrides: Any) -> Recipe:
    """`tiny_tree`, checked. Data-free DMD2 is method__gan_weight=0."""
    return recipes.parse(tiny_tree(folder, method, **overrides))


def tiny_file(folder: Path, method: str = "dmd2", **overrides: Any) -> Path:
    """`tiny_tree` as a YAML file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder, method, **overrides)))
    return path


def tiny_run(folder: Path, method: str = "dmd2", **overrides: Any) -> Run:
    """An assembled run that writes nothing."""
    chosen = tiny_recipe(folder, method, **overrides)
    return assemble(chosen, loop.make_accelerator(chosen, None))


def final_tensors(run: Path) -> dict[str, Tensor]:
    """Everything the newest checkpoint of a run folder holds: weights, moments, average, generator."""
    return checkpoint.read(checkpoint.listed(run / loop.CHECKPOINTS)[-1])[0]


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit, or that only one side has."""
    bits = lambda t: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist())                 # noqa: E731
    return sorted(set(a) ^ set(b)) + sorted(name for name in set(a) & set(b) if bits(a[name]) != bits(b[name]))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def png_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture file."""
    with Image.open(path) as image:
        return image.size
