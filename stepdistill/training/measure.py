"""What an iteration costs: its network passes, their bare time, the loop's time, and the bytes each role holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.models.adapters import active, adapted
from stepdistill.models.attention import attention
from stepdistill.models.denoiser import Denoiser, tapped
from stepdistill.models.drive import driven
from stepdistill.models.experts import parts_of
from stepdistill.models.quantize import held
from stepdistill.models.sizes import SizedWiring
from stepdistill.models.wiring import FromSample, Wiring, leaves_of, primary
from stepdistill.training.assemble import Run, run_update


@dataclass(frozen=True)
class Pass:
    """One call of one role's network: how many samples, and what its backward reaches."""

    role: str
    rows: int
    gradient: Literal["none", "weights", "input"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    base: nn.Module                                                      # what the role runs on,
    network: nn.Module                                                   # or that of its experts which was called,
    adapter: str | None                                                  # and the adapter that was on
    sample: int | str = 0                                                # which of them is the state: a tensor, or a list of them

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "rows": self.rows, "gradient": self.gradient}


def period(run: Run, limit: int = 256) -> int:
    """After how many steps the method's plan repeats; an iteration is measured over one such round."""
    plans = [tuple(run.method.plan(step)) for step in range(2 * limit)]
    return next((p for p in range(1, limit) if all(plans[i] == plans[i + p] for i in range(limit))), 1)


def iterate(run: Run, first: int, steps: int) -> None:
    """The loop's own work without logging and saving: data, losses, backward, clipping, optimizer, targets, EMA."""
    for step in range(first, first + steps):
        batches: list[Any] = []
        for index, update in enumerate(run.method.plan(step)):
            batches, _ = run_update(run, step, index, update, batches)
            run.optim.step(update.trains)
            run.method.after_update(run.roles, update, run.optim.counts[update.trains[0]])
            if run.ema and "student" in update.trains:
                run.ema.after(run.roles.module("student"), run.optim.age("student"))


@contextmanager
def recorded(run: Run) -> Iterator[list[Pass]]:
    """Every network call made inside, with its inputs. What a pipeline asks while it encodes or decodes is none of a method's."""
    passes: list[Pass] = []
    hooks = []

    def note(network: nn.Module, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if driven():
            return
        name = callers[id(network), active(network)]                     # a shared network is the role whose adapter runs
        sample = _sample(run.roles.denoisers[name])
        x = args[sample] if isinstance(sample, int) else kwargs[sample]
        trains = any(p.requires_grad for p in run.roles.parameters(name)) and name in run.roles.trains
        gradient: Literal["none", "weights", "input"] = "none"
        if torch.is_grad_enabled() and (trains or any(v.requires_grad for v in _each(x))):
            gradient = "weights" if trains else "input"
        kept = tuple(map(_kept, args)), {k: _kept(v) for k, v in kwargs.items()}
        passes.append(Pass(name, len(x), gradient, *kept, network, part, active(network), sample))

    callers = run.roles.callers
    for network in run.roles.networks:
        hooks += [part.register_forward_pre_hook(partial(note, network), with_kwargs=True) for part in parts_of(network)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _sample(denoiser: Denoiser) -> int | str:
    """Where a call of this network holds its state: the first argument, or the keyword that a recording learnt."""
    wiring = denoiser.wiring.any if isinstance(denoiser.wiring, SizedWiring) else denoiser.wiring
    if not isinstance(wiring, Wiring):
        return 0
    return next(path for path, leaf in leaves_of(wiring.arguments) if isinstance(leaf, FromSample))


def _each(x: Any) -> Sequence[Tensor]:
    return x if isinstance(x, list | tuple) else (x,)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else [_kept(v) for v in value] if isinstance(value, list) else value


def replay(run: Run, one: Pass) -> None:
    """The bare network pass: the same module, inputs, autocast and backward, and nothing around it.

    Where a discriminator reads this role and gradients are on, its head is part of the pass; the gradient of a frozen role then comes
    from the features alone.
    """
    denoiser, module = run.roles.denoisers[one.role], one.network
    head = next((run.roles.module(h) for h, of in run.roles.heads.items() if of == one.role), None) if one.gradient != "none" else None
    run.roles.train_only((one.role,) if one.gradient == "weights" else ())
    args, kwargs = list(one.args), dict(one.kwargs)
    place: Any = args if isinstance(one.sample, int) else kwargs
    x = place[one.sample]
    fresh = [v.detach().requires_grad_(one.gradient == "input") for v in _each(x)]
    place[one.sample] = fresh if isinstance(x, list | tuple) else fresh[0]
    x = fresh[0]
    autocast = torch.autocast(x.device.type, denoiser.autocast or torch.bfloat16, enabled=denoiser.autocast is not None)
    with torch.set_grad_enabled(one.gradient != "none"), tapped(module, denoiser.taps if head else ()) as features:
        with attention(x.device), autocast, adapted(one.base, one.adapter):
            first = primary(module(*args, **kwargs))
        out = torch.stack(list(first)) if isinstance(first, list | tuple) else first
        if one.gradient != "none":
            loss = head(features).mean() if head else out.new_zeros(())
            (loss if head and one.gradient == "input" else loss + out.float().square().mean()).backward()
    for parameter in (*module.parameters(), *(head.parameters() if head else ())):
        parameter.grad = None


def clock(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bench_step(run: Run, repeats: int = 30, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Time of an iteration over the time of its bare passes, alternating in one process; medians.

    An iteration is one round of the method's plan (`steps_per_iteration` loop steps).
    """
    steps, device = period(run), run.accelerator.device
    iterate(run, 0, steps)                                                      # warm-up: optimizer state, kernels
    with recorded(run) as passes:
        iterate(run, 0, steps)
    run.roles.train_only(())

    def bare() -> None:
        for one in passes:
            replay(run, one)

    bare()
    loops, bares = [], []
    for i in range(repeats):
        loops.append(clock(lambda: iterate(run, 0, steps), device))
        bares.append(clock(bare, device))
        if progress:
            progress(i + 1)
    ratios = [a / b for a, b in zip(loops, bares, strict=True)]
    return {"iteration_seconds": statistics.median(loops), "passes_seconds": statistics.median(bares),
            "ratio": statistics.median(ratios), "ratio_quartiles": statistics.quantiles(ratios, n=4) if repeats > 1 else ratios,
            "steps_per_iteration": steps, "repeats": repeats, "batch_size": run.recipe.batch_size, "precision": run.recipe.precision,
            "threads": torch.get_num_threads(), "device": str(device), "passes": [p.to_dict() for p in passes]}


def bytes_of(run: Run) -> dict[str, dict[str, int]]:
    """Bytes of weights (buffers among them), gradients and optimizer state per role, and of the EMA."""
    table, needs = {}, run.method.needs(run.method.cfg)
    for name in run.roles.names:
        sizes = [held(p) for p in run.roles.parameters(name)]
        weights, trains = sum(size for _, size in sizes), name in run.roles.trains
        buffers = sum(b.nbytes for b in run.roles.module(name).buffers())
        table[name] = {"parameters": sum(number for number, _ in sizes), "weights": weights + buffers,
                       "gradients": weights // needs[name].experts if trains else 0,                     # one expert at a time
                       "optimizer": run.optim.bytes(name) // needs[name].experts if trains else 0}
    if run.ema:
        weights = sum(v.nbytes for v in (*run.ema.network.parameters(), *run.ema.network.buffers()))
        table["ema"] = {"parameters": 0, "weights": weights, "gradients": 0, "optimizer": 0}
    return table


def dry_run(run: Run) -> dict[str, Any]:
    """What would be built and how long it would take: bytes per role, passes per iteration, a timed iteration, an ETA."""
    steps = period(run)
    iterate(run, 0, steps)
    with recorded(run) as passes:
        seconds = clock(lambda: iterate(run, 0, steps), run.accelerator.device)
    counts = dict.fromkeys(run.roles.trains, 0)
    for step in range(steps):
        for update in run.method.plan(step):
            for name in update.trains:
                counts[name] += 1
    table = bytes_of(run)
    return {"method": run.recipe.method["name"], "device": str(run.accelerator.device), "processes": run.accelerator.num_processes,
            "bytes": table, "total_bytes": sum(sum(v for k, v in row.items() if k != "parameters") for row in table.values()),
            "passes": [p.to_dict() for p in passes], "steps_per_iteration": steps, "updates_per_iteration": counts,
            "iteration_seconds": seconds, "eta_seconds": seconds * run.recipe.steps / steps}
