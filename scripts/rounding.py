"""How much of what methods on trajectories learn from is rounding: their first distances in float32 and in bfloat16.

In bfloat16 once as it is, the first layer reading the state in float32, and once with that layer rounding it as any other does.

    python scripts/rounding.py --to result.json
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from stepdistill import recipe
from stepdistill.training import loop
from stepdistill.training.assemble import assemble, run_update
from stepdistill.training.checkpoint import write_atomically

CASES: list[tuple[str, dict[str, Any]]] = [("tdd", {"points": 250}), *((name, {}) for name in ("tdd", "lcm", "pcm", "tcd", "consistency"))]
WAYS = {"float32": ("fp32", True), "bfloat16": ("bf16", True), "bfloat16, the first layer too": ("bf16", False)}


def main(to: Annotated[Path, typer.Option()], batches: int = 4, size: int = 64) -> None:
    """Means of the method's distance over the same samples, before the first update."""
    table = [{"method": name, **options, **{way: _distance(name, options, *how, batches, size) for way, how in WAYS.items()}}
             for name, options in CASES]
    for row in table:
        print(row)
    write_atomically(to, json.dumps({"samples": batches * size, "distance": table}, indent=1) + "\n")


def _distance(name: str, options: dict[str, Any], precision: str, careful: bool, batches: int, size: int) -> float:
    shipped = recipe.load(f"fashion/{name}")
    chosen = replace(shipped, precision=precision, batch_size=size, preview_every=0, method={**shipped.method, **options})
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    if not careful:
        for role in ("teacher", "student"):
            run.roles.denoisers[role].network.conv_in.__class__ = nn.Conv2d
    update, found = run.method.plan(0)[0], []
    for step in range(batches):
        log = run_update(run, step, 0, update, [])[1]
        found.append(torch.as_tensor(getattr(log["student/distance"], "value", log["student/distance"])))
        run.roles.module("student").zero_grad()
    return float(torch.stack(found).mean())


if __name__ == "__main__":
    typer.run(main)
