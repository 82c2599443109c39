"""Run by test_ddp.py under `torch.distributed.run`: trainings and gradients of several processes, written where the test finds them.

    python -m torch.distributed.run --nproc_per_node 2 ranks.py BASE      BASE holds one <name>.yaml per run; "gradients*" write gradients
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from safetensors.torch import save_file

from stepdistill import recipe as recipes
from stepdistill.training import loop
from stepdistill.training.assemble import Run, assemble, run_update


def gradients(run: Run) -> dict[str, object]:
    """Every role's gradient of the updates of step 0, before any of them moves."""
    found, batches = {}, []
    for index, update in enumerate(run.method.plan(0)):
        batches, _ = run_update(run, 0, index, update, batches)
        for name in update.trains:
            for key, p in run.roles.module(name).named_parameters():
                assert p.grad is not None, (name, key)
                found[f"{name}/{key}"] = p.grad.clone()
                p.grad = None
    return found


def main(base: Path) -> None:
    Accelerator.end_training = lambda self: None                             # it closes the process group, and more runs follow
    for path in sorted(base.glob("*.yaml")):
        recipe = recipes.load(path)
        if path.stem.startswith("gradients"):
            accelerator = loop.make_accelerator(recipe, None)
            found = gradients(assemble(recipe, accelerator))
            if accelerator.is_main_process:
                save_file(found, base / f"{path.stem}.safetensors")
        else:
            loop.start(recipe, base / path.stem)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
