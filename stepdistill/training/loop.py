"""The loop: Roles, a Loss, and a batch that is any pytree. It contains no method's name."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from stepdistill import recipe as recipes
from stepdistill.losses.reported import Mean
from stepdistill.recipe import Recipe
from stepdistill.training import checkpoint
from stepdistill.training.assemble import Run, assemble, run_update
from stepdistill.training.log import Log, Means
from stepdistill.training.look import look, preview

RECIPE, LOCK, CHECKPOINTS, BEST = "recipe.yaml", "lock.json", "checkpoints", "best"


@dataclass(frozen=True)
class Outcome:
    """How a call ended: `finished` is False when a signal stopped it after saving; `already` when there was nothing left to do."""

    folder: str
    step: int
    steps: int
    finished: bool
    already: bool = False
    skipped: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class State:
    """What a hook is given: the run after a step, its folder, and whether that step was the last.

    `notes` is what hooks remember, plain JSON values that every checkpoint keeps. `log` writes a line of its own for this step, and `keep`
    puts this step's checkpoint into another folder, in the place of the one there; both are for the main process.
    """

    run: Run
    out: Path
    last: bool
    notes: dict[str, Any]
    log: Callable[[Mapping[str, float]], None]
    keep: Callable[[Path], None]


Hook = Callable[[int, State], None]                                             # called after so many finished steps, on every process


def say(message: str) -> None:
    """A line on standard error that does not break the progress bar."""
    tqdm.write(message, file=sys.stderr)


def start(recipe: Recipe, out: Path, hooks: Sequence[Hook] = (), accelerator: Accelerator | None = None) -> Outcome:
    """Train from the beginning into a new or empty folder; a hook knows its own period.

    ValueError where the folder holds anything, or the recipe asks for exams and there is no hook.
    """
    _handed_in(recipe, hooks)
    accelerator = accelerator or make_accelerator(recipe, out)
    if out.exists() and (not out.is_dir() or any(p.name != f".{RECIPE}.partial" for p in out.iterdir())):     # what a kill may leave
        raise ValueError(f"{out} is not empty: choose another --out, or continue it with --resume {out}")
    run = begun(assemble(recipe, accelerator))
    accelerator.wait_for_everyone()                                             # every process has looked before one writes
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(out / RECIPE, recipes.dump(recipe))
    accelerator.wait_for_everyone()
    return train(run, out, hooks)


def resume(out: Path, hooks: Sequence[Hook] = ()) -> Outcome:
    """Go on from the newest readable checkpoint, or from the beginning where there is none yet. The hooks are those that `start` had."""
    if not (out / RECIPE).is_file():
        raise FileNotFoundError(f"{out} is not a run: it has no {RECIPE}")
    recipe = recipes.load(out / RECIPE)
    _handed_in(recipe, hooks)
    run = assemble(recipe, make_accelerator(recipe, out))
    return train(run if checkpoint.listed(out / CHECKPOINTS) else begun(run), out, hooks)


def _handed_in(recipe: Recipe, hooks: Sequence[Hook]) -> None:
    """ValueError where a recipe asks for exams, which are a hook, and there is no hook at all."""
    if recipe.exam.every and not hooks:
        raise ValueError("exam.every asks for scores, and no hook was handed in: give stepdistill.eval.exam.examine, or set it to 0")


def begun(run: Run) -> Run:
    """The run with the networks of `recipe.start` where it names one. FileNotFoundError or ValueError where that is no such run."""
    folder = run.recipe.start
    if folder is None:
        if run.method.finishes and run.recipe.student.weights is None:
            raise ValueError(f"method {run.recipe.method['name']} ends a trained student: name its run with start=RUN, or student.weights")
        return run
    found = checkpoint.newest(folder / CHECKPOINTS, say)
    if found is None:
        raise FileNotFoundError(f"start: {folder} is not a run with a checkpoint")
    try:
        fresh = run.begin(found[0])
    except ValueError as error:
        raise ValueError(f"start: {folder}: {error}") from error
    if run.accelerator.is_main_process:
        say(f"begins with the networks of {folder}, step {found[1]['step']}" + (f"; {', '.join(fresh)} from new" if fresh else ""))
    return run


def make_accelerator(recipe: Recipe, out: Path | None) -> Accelerator:
    """Precision is the denoisers' business, so accelerate's own mixed precision stays off."""
    trackers = list(recipe.trackers) if out else []
    folders = ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")) if out else None
    return Accelerator(mixed_precision="no", log_with=trackers or None, project_config=folders)


def train(run: Run, out: Path, hooks: Sequence[Hook] = ()) -> Outcome:
    """The training loop proper."""
    recipe, accelerator, main = run.recipe, run.accelerator, run.accelerator.is_main_process
    with locked(out, main), interruptible() as stop:
        first, skipped, seconds, notes = restore(run, out)
        began = time.monotonic() - seconds                                      # of all sittings of this run
        if first >= recipe.steps:
            if main:
                checkpoint.prune(out / CHECKPOINTS, recipe.keep)                # a kill may have come between the last save and its pruning
                say(f"{out} is finished: {recipe.steps} of {recipe.steps} steps. Export it with: stepdistill export {out} --to FOLDER")
            return Outcome(str(out), first, recipe.steps, True, already=True, skipped=skipped, seconds=seconds)
        log = Log(out, first) if main else None
        accelerator.init_trackers("stepdistill", init_kwargs={"wandb": {"name": out.name, "dir": str(out)}})
        bar = tqdm(total=recipe.steps, initial=first, disable=not main, file=sys.stderr, unit="step", dynamic_ncols=True, desc=out.name)
        means, bad = Means(), Counter[str]()                                    # skips in a row, of each of the method's losses
        unseen = set(run.roles.trains)                                          # whose weights were not compared since the last line
        for step in range(first, recipe.steps):
            stage, begins = run.stage_at(step)
            if begins:
                run.method.enter(stage, run.roles)
                for name in stage.resets:
                    run.optim.reset(name)
            batches: list[Any] = []
            for index, update in enumerate(run.method.plan(step)):
                batches, logs = run_update(run, step, index, update, batches)
                norms, changed = run.optim.step(update.trains, unseen & set(update.trains))
                unseen -= set(update.trains)
                if not all(math.isfinite(n) for n in norms.values()):
                    bad[update.loss], skipped = bad[update.loss] + 1, skipped + 1
                    if main:
                        say(f"step {step}: gradient of {', '.join(n for n in norms if not math.isfinite(norms[n]))} is not finite; skipped")
                    if bad[update.loss] >= recipe.max_skips:
                        raise FloatingPointError(
                            f"{recipe.max_skips} {update.loss} updates in a row had no finite gradient; the run stops at step {step}. "
                            "The last checkpoint is whole: lower the learning rate or use precision: fp32, and resume it")
                    continue
                bad[update.loss] = 0
                run.method.after_update(run.roles, update, run.optim.counts[update.trains[0]])
                if run.ema and "student" in update.trains:
                    run.ema.after(run.roles.module("student"), run.optim.age("student"))
                values = {**{f"grad/{n}": v for n, v in norms.items()}, **changed}
                means.add({**logs, **{name: Mean.of(value, accelerator.device) for name, value in values.items()}})
            done, last = step + 1, step + 1 == recipe.steps
            halt = stop(accelerator)
            if done % recipe.log_every == 0 or last:
                values, unseen = means.take(run), set(run.roles.trains)
                if run.ema:
                    values["ema/distance"] = run.ema.distance(run.roles.module("student"))
                accelerator.log(values, step=done)
                if log:
                    rates = {f"lr/{n}": v for n, v in run.optim.rates().items()}
                    log.write({"step": step, "seconds": round(time.monotonic() - began, 3), **values, **rates, "skipped": skipped})
                bar.set_postfix({k.split("/")[-1]: f"{v:.3g}" for k, v in values.items() if k.endswith("/loss")}, refresh=False)
            if log and recipe.preview_every and (last or done % recipe.preview_every == 0):
                tell(run, log, done, look(run, out / "previews", done))
            elif main and last:
                preview(run, out / "previews" / f"{done:08d}.png")
            state = State(run, out, last, notes, partial(tell, run, log, done),
                          partial(write, run, done, skipped, time.monotonic() - began, notes, 1))
            for hook in hooks:
                hook(done, state)
            if done % recipe.checkpoint_every == 0 or last or halt:
                save(run, out, done, skipped, time.monotonic() - began, notes)
            bar.update()
            if halt and not last:
                bar.close()
                accelerator.end_training()
                if main:
                    say(f"stopped by {halt.name} after step {done}, saved; continue with: stepdistill train --resume {out}")
                return Outcome(str(out), done, recipe.steps, False, skipped=skipped, seconds=time.monotonic() - began)
        bar.close()
        accelerator.end_training()
    return Outcome(str(out), recipe.steps, recipe.steps, True, skipped=skipped, seconds=time.monotonic() - began)


def tell(run: Run, log: Log | None, done: int, values: Mapping[str, float]) -> None:
    """A line of its own after `done` steps, in the log and for the trackers."""
    run.accelerator.log(dict(values), step=done)
    if log:
        log.write({"step": done - 1, **values})


def write(run: Run, done: int, skipped: int, seconds: float, notes: Mapping[str, Any], keep: int, folder: Path) -> None:
    """A checkpoint after `done` finished steps, into a folder that keeps so many."""
    state = {"counts": run.optim.counts, "method": run.method.state(), "skipped": skipped, "seconds": seconds, "notes": notes,
             "threads": torch.get_num_threads(), "torch": torch.__version__, "processes": run.accelerator.num_processes,
             "sampler": replace(run.method.sampler(), built_in=run.method.built_in).to_dict(), "call": run.teacher.call}
    checkpoint.save(folder, done, run.tensors(), state, keep)


def save(run: Run, out: Path, done: int, skipped: int, seconds: float, notes: Mapping[str, Any]) -> None:
    """A checkpoint of the run, by the main process."""
    if run.accelerator.is_main_process:
        write(run, done, skipped, seconds, notes, run.recipe.keep, out / CHECKPOINTS)
    run.accelerator.wait_for_everyone()


def restore(run: Run, out: Path) -> tuple[int, int, float, dict[str, Any]]:
    """(first step to do, updates skipped and seconds trained so far, notes of hooks), with the newest readable checkpoint loaded."""
    main = run.accelerator.is_main_process
    found = checkpoint.newest(out / CHECKPOINTS, say if main else lambda line: None)
    if found is None:
        return 0, 0, 0.0, {}
    tensors, state = found
    run.load(tensors, state)
    if state["threads"] != torch.get_num_threads() and main:
        say(f"this run was saved with {state['threads']} threads and goes on with {torch.get_num_threads()}: "
            f"results will differ in the last bits; OMP_NUM_THREADS={state['threads']} makes it bit-exact")
    return int(state["step"]), int(state["skipped"]), float(state.get("seconds", 0.0)), dict(state.get("notes", {}))


@contextmanager
def interruptible() -> Iterator[Callable[[Accelerator], signal.Signals | None]]:
    """SIGINT and SIGTERM let the step finish and save; a second one interrupts at once. Processes agree on what they saw."""
    seen: list[signal.Signals] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number))

    def asked(accelerator: Accelerator) -> signal.Signals | None:
        if accelerator.num_processes > 1:
            number = int(accelerator.gather(torch.tensor([seen[0] if seen else 0], device=accelerator.device)).max())
            return signal.Signals(number) if number else None
        return seen[0] if seen else None

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:                                                          # not the main thread: the caller keeps its own handlers
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(out: Path, main: bool) -> Iterator[None]:
    """One trainer per run folder. A lock whose process is gone is taken over with a word; a live one raises ValueError."""
    if not main:
        yield
        return
    path, mine = out / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    if path.exists():
        try:
            owner = json.loads(path.read_text())
            alive = owner["host"] == mine["host"] and owner["pid"] != mine["pid"] and _alive(owner["pid"])
            elsewhere = owner["host"] != mine["host"]
        except (ValueError, KeyError, TypeError):
            owner, alive, elsewhere = {}, False, False
        if alive or elsewhere:
            raise ValueError(f"{out} is in use by process {owner['pid']} on {owner['host']}: stop it, or delete {path} if it is gone")
        say(f"taking over a stale lock in {out}")
    checkpoint.write_atomically(path, json.dumps(mine))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Is there such a process, and not merely its exit status waiting to be read?"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
