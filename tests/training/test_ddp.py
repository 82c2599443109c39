"""Two processes equal one, and many micro-batches equal one batch.

In float64 weights agree within 1e-10 after five Adam steps of every role; in float32 each role's gradient agrees within 1e-5 of its norm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import final_tensors, tiny_recipe, tiny_run, tiny_teacher, tiny_tree
from torch import Tensor
from training.ranks import gradients

from stepdistill.training import checkpoint, loop

FIVE: dict[str, Any] = {"precision": "fp64", "steps": 5, "checkpoint_every": 5, "log_every": 5, "batch_size": 8, "method__fake_updates": 1}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd2": ("dmd2", FIVE),
    "dmd2-teacher-features": ("dmd2", {**FIVE, "method__features": "teacher", "student__steps": 2}),
    "dmd2-accumulated": ("dmd2", {**FIVE, "accumulate": 2}),
    "dmd2-adapters": ("dmd2", {**FIVE, "lora__student__rank": 2, "lora__fake__rank": 2, "gradient_checkpointing": True}),
    "phased_dmd": ("phased_dmd", {**FIVE, "method__phases": 2, "student__steps": 2}),
    "phased_dmd-adapters": ("phased_dmd", {**FIVE, "method__phases": 2, "student__steps": 2, "lora__student__rank": 2,
                                           "gradient_checkpointing": True}),
    "dmd2-teacher-of-two": ("dmd2", {**FIVE, "method__gan_weight": 0, "teacher__path": "two"}),
    "add": ("add", {k: v for k, v in FIVE.items() if k != "method__fake_updates"}),                 # differentiates its head twice
    "consistency": ("consistency", {k: v for k, v in FIVE.items() if k != "method__fake_updates"}),
    "ctm": ("ctm", {**{k: v for k, v in FIVE.items() if k != "method__fake_updates"}, "method__points": 6, "method__solver_steps": 1,
                    "method__gan_weight": 1.0, "method__adaptive_denoise": True, "optim__disc__lr": 1e-3}),     # norms of the whole batch
}
GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradients-dmd2": ("dmd2", {"batch_size": 8}), "gradients-consistency": ("consistency", {"batch_size": 8}),
    "gradients-dp_dmd": ("dp_dmd", {"batch_size": 8, "student__steps": 3})}                        # calls the student three times


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes, started once."""
    folder = tmp_path_factory.mktemp("ranks")
    two(folder)
    for name, (method, overrides) in {**RUNS, **GRADIENTS}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tiny_tree(folder, method, **placed(folder, overrides))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(Path(__file__).parent / "ranks.py"), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def two(folder: Path) -> None:
    """A teacher of two networks, of which the first has so little of the noise that most micro-batches leave it out."""
    whole = tiny_teacher(folder / "two")
    (whole / "unet").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (whole / name).rename(whole / "unet" / name)
    shutil.copytree(whole / "unet", whole / "unet_2")
    notes = json.loads((whole / "stepdistill.json").read_text())
    (whole / "stepdistill.json").write_text(json.dumps({**notes, "sampler": {"boundaries": [0.9]}}))


def placed(base: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """With the teacher's path below `base`."""
    return {k: str(base / v) if k == "teacher__path" else v for k, v in overrides.items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> float:
    names = sorted(name for name in a if name.startswith(prefix))
    assert names
    assert names == sorted(name for name in b if name.startswith(prefix))
    return max(float((a[name] - b[name]).abs().max()) for name in names)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_the_same_weights(base: Path, tmp_path: Path, name: str) -> None:
    method, overrides = RUNS[name][0], placed(base, RUNS[name][1])
    state = checkpoint.read(checkpoint.listed(base / name / loop.CHECKPOINTS)[-1])[1]
    assert state["processes"] == 2
    assert set(state["counts"].values()) == {5}
    loop.start(tiny_recipe(base, method, **{**overrides, "accumulate": 1}), tmp_path / "one")
    one, two = final_tensors(tmp_path / "one"), final_tensors(base / name)
    before = tiny_run(base, method, **overrides)
    for role in state["counts"]:
        taken = [int(v) for k, v in one.items() if k.startswith(f"optim/{role}/") and k.endswith("/step")]
        assert max(taken) == before.stages[-1].steps
        assert furthest(one, two, f"role/{role}/") < 1e-10, role
        start = {f"role/{role}/{k}": v for k, v in before.roles.module(role).state_dict().items()}
        assert furthest(one, start, f"role/{role}/") > 1e-3                  # they did move
    assert furthest(one, two, "ema/") < 1e-10


@pytest.mark.parametrize("name", GRADIENTS)
def test_two_processes_find_the_same_gradient(base: Path, name: str) -> None:
    method, overrides = GRADIENTS[name]
    one, two = gradients(tiny_run(base, method, **overrides)), load_file(base / f"{name}.safetensors")
    assert set(one) == set(two)
    for role in {key.split("/")[0] for key in two}:
        flat = [torch.cat([g[key].flatten() for key in sorted(two) if key.startswith(f"{role}/")]) for g in (one, two)]
        assert flat[0].dtype == torch.float32
        assert flat[0].norm() > 0
        assert (flat[0] - flat[1]).norm() < 1e-5 * flat[0].norm(), role


def test_a_log_of_two_processes_is_written_once(base: Path) -> None:
    assert len((base / "dmd2" / "log.jsonl").read_text().splitlines()) == 1
    assert not (base / "dmd2" / loop.LOCK).exists()


@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_eight_micro_batches_equal_one_batch(base: Path, tmp_path: Path, name: str) -> None:
    """1x8 accumulation against 8x1."""
    method, overrides = RUNS[name]
    for accumulate in (1, 8):
        loop.start(tiny_recipe(base, method, **{**overrides, "accumulate": accumulate}), tmp_path / str(accumulate))
    one, eight = final_tensors(tmp_path / "1"), final_tensors(tmp_path / "8")
    assert furthest(one, eight, "role/") < 1e-10
    assert furthest(one, eight, "ema/") < 1e-10
