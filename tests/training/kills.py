"""Run by test_resume.py: trainings in forked children that are killed with SIGKILL, each resumed until it is finished.

    python kills.py BASE POINT...      BASE holds recipe.yaml; run folders and report.json are written there

A POINT is a name of POINTS, or "random-N". Forking after the imports makes a kill cheap; nothing here may run a backward pass before it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill import recipe as recipes
from stepdistill.training import checkpoint, log, look, loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, matches: Callable[..., bool] = lambda *a, **k: True, count: int = 1, half: Any = None) -> None:
    """Die just before the `count`-th matching call of a function; `half` does part of its work first."""
    original, left = getattr(module, name), [count]

    def spy(*args: Any, **kwargs: Any) -> Any:
        if matches(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                if half:
                    half(*args, **kwargs)
                die()
        return original(*args, **kwargs)

    setattr(module, name, spy)


def half_a_file(tensors: Any, path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def half_a_folder(path: Path, *args: Any, **kwargs: Any) -> None:
    next(p for p in Path(path).iterdir()).unlink()


def half_a_line(self: log.Log, values: Any) -> None:
    self.file.write(json.dumps(values)[:40])
    self.file.flush()


def inside(part: str) -> Callable[..., bool]:
    return lambda path, *a, **k: part in str(path)


POINTS: dict[str, Callable[[], None]] = {
    "recipe before fsync": lambda: before(checkpoint, "fsync", inside("recipe.yaml")),
    "recipe before rename": lambda: before(checkpoint.os, "replace", inside("recipe.yaml")),
    "after the recipe": lambda: before(loop, "train"),
    "lock before fsync": lambda: before(checkpoint, "fsync", inside("lock.json")),
    "within save_file": lambda: before(checkpoint, "save_file", count=2, half=half_a_file),
    "tensors before fsync": lambda: before(checkpoint, "fsync", inside("tensors.safetensors"), count=2),
    "folder before fsync": lambda: before(checkpoint, "fsync", lambda p: str(p).endswith(".partial") and p.is_dir()),
    "before rename": lambda: before(checkpoint.os, "replace", inside(".step-"), count=2),
    "between rename and prune": lambda: before(checkpoint, "prune", count=3),
    "within prune": lambda: before(checkpoint.shutil, "rmtree", lambda p, *a, **k: Path(p).name == "step-00000002", half=half_a_folder),
    "within a line of the log": lambda: before(log.Log, "write", count=5, half=half_a_line),
    "before the picture": lambda: before(look, "save_png"),
    "within the picture": lambda: before(Path, "replace", lambda path, to: path.name.endswith(".png.partial")),
}


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Exit status of `work` in a child: 0 done, -9 killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 1e9)
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def go(base: Path, out: Path) -> None:
    """What a user does after a crash: resume where there is a run, start where there is none."""
    if (out / loop.RECIPE).is_file():
        loop.resume(out)
    else:
        loop.start(recipes.load(base / "recipe.yaml"), out)


def main(base: Path, points: list[str]) -> None:
    report: dict[str, Any] = {}
    began = time.monotonic()
    assert forked(lambda: go(base, base / "whole")) == 0
    length, rng = time.monotonic() - began, random.Random(0)
    for point in points:
        out = base / point.replace(" ", "-")
        if point in POINTS:
            killed = forked(lambda point=point, out=out: (POINTS[point](), go(base, out)))
        else:
            delay = rng.uniform(0, length)
            while (killed := forked(lambda out=out: go(base, out), delay)) == 0:          # it was faster than the first: kill earlier
                shutil.rmtree(out)
                delay /= 2
        left = sorted(str(p.relative_to(out)) for p in out.rglob("*")) if out.exists() else []
        report[point] = {"killed": killed, "left": left, "resumed": forked(lambda out=out: go(base, out))}
    (base / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
