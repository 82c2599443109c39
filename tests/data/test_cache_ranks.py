"""Two processes that fill a cache leave what one leaves, byte for byte: a new one, the rest of one, and one of prompts padded together."""

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
from tiny import snapshot
from zoo import basics, images

from stepdistill import recipe as recipes
from stepdistill.images import save_png, to_image
from stepdistill.training.assemble import cache_of, texts_of

CAPTIONS = ("one", "two", "three", "four", "five", "six", "seven")
UNEQUAL = "a cat\nsnow on a hill\nx\nsnow\n"
DIES = "conditions-00000003-00000004.safetensors"                            # the second shard of the second process


def launched(base: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(Path(__file__).parent / "ranks.py"), str(base)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def tree(base: Path, kind: str, cache: str) -> dict[str, Any]:
    size = {"sd": 16, "fibo": 128}[kind]
    data = {"folder": str(base / "pictures")} if kind == "sd" else {"prompts": str(base / "prompts.txt")}
    return {"teacher": {"path": str(base / kind), "call": {"height": size, "width": size}},
            "method": {"name": "dmd2", "gan_weight": 0.1 if kind == "sd" else 0},
            "optim": {name: {"lr": 1e-4} for name in ("student", "fake", "disc")[: 3 if kind == "sd" else 2]},
            "data": {"cache": str(base / cache), **data}, "batch_size": 2, "precision": "fp32", "trackers": []}


def one_process(base: Path, kind: str, limit: int = 1) -> dict[str, bytes]:
    """The files that one process leaves."""
    recipe = recipes.parse(tree(base, kind, f"alone-{kind}-{limit}"))
    cache = cache_of(recipe, *texts_of(recipe))
    cache.limit = limit
    cache.fill("cpu")                                                        # nothing, where it was filled before
    return snapshot(cache.folder)


def world(base: Path) -> Path:
    """Teachers and texts."""
    basics.stable_diffusion().save_pretrained(base / "sd")
    images.EXHIBITS["bria_fibo"].build().save_pretrained(base / "fibo")
    (base / "prompts.txt").write_text(UNEQUAL)
    for i, caption in enumerate(CAPTIONS):
        noise = torch.randint(0, 256, (3, 20, 16), generator=torch.Generator().manual_seed(i))
        save_png(to_image(noise.to(torch.uint8)), base / "pictures" / f"{i}.png")
        (base / "pictures" / f"{i}.txt").write_text(caption)
    return base


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by two processes: a new cache, the rest of one, one of prompts of unequal length, and one by the command."""
    base = world(tmp_path_factory.mktemp("ranks"))
    one_process(base, "sd")
    shutil.copytree(base / "alone-sd-1", base / "rest")
    for lost in ("conditions-00000003-00000004", "conditions-00000005-00000006", "conditions-00000006-00000007"):
        (base / "rest" / f"{lost}.safetensors").unlink()
    (base / "rest" / ".conditions-00000003-00000004.safetensors.partial").write_bytes(b"half of it")
    for name, kind in {"whole": "sd", "rest": "sd", "unequal": "fibo", "command": "sd"}.items():
        (base / f"{name}.yaml").write_text(yaml.safe_dump(tree(base, kind, name)))
    done = launched(base)
    assert done.returncode == 0, done.stderr[-4000:]
    (base / "stdout.txt").write_text(done.stdout)
    return base


@pytest.mark.parametrize(("name", "kind"), [("whole", "sd"), ("rest", "sd"), ("unequal", "fibo")])
def test_two_processes_leave_the_files_of_one(filled: Path, name: str, kind: str) -> None:
    one, two = one_process(filled, kind), snapshot(filled / name)
    assert sorted(one) == sorted(two)
    assert [file for file in one if one[file] != two[file]] == []


@pytest.mark.parametrize(("name", "count"), [("whole", 14), ("rest", 3), ("unequal", 4)])
def test_they_share_the_shards_and_count_all_that_was_encoded(filled: Path, name: str, count: int) -> None:
    (mine, here), (theirs, there) = (map(int, (filled / f"{name}-{rank}.txt").read_text().split()) for rank in (0, 1))
    assert mine == theirs == count
    assert min(here, there) >= count // 2 - 1
    assert here + there >= count if name == "unequal" else here + there == count      # those before the first unequal one are made twice


def test_the_command_speaks_once(filled: Path) -> None:
    line, = filter(None, (filled / "stdout.txt").read_text().splitlines())
    assert json.loads(line).items() >= {"conditions": 7, "latents": 7, "encoded": 14, "shards": 2, "whole": None}.items()
    assert snapshot(filled / "command") == one_process(filled, "sd", 2**28)


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(tmp_path: Path) -> None:
    base = world(tmp_path)
    (base / "killed.yaml").write_text(yaml.safe_dump(tree(base, "sd", "killed")))
    (base / "kill").write_text(DIES)
    assert launched(base).returncode != 0
    held = set(snapshot(base / "killed"))
    assert "conditions-00000001-00000002.safetensors" in held
    assert DIES not in held
    (base / "kill").unlink()
    assert launched(base).returncode == 0
    assert snapshot(base / "killed") == one_process(base, "sd")
    assert int((base / "killed-0.txt").read_text().split()[0]) < 14
