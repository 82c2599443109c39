"""Run by test_repeatable.py: two processes of one gloo group make one set of pictures together, taking batches from each other, and then
evaluate as two ranks of one launch.

    python shares.py BASE      BASE holds teacher/; together.safetensors and ranks/ are written there
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.diffusion.draws import Noise
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.eval import generate as generating
from stepdistill.eval.cards import Brought
from stepdistill.eval.evaluate import evaluate
from stepdistill.eval.parts import Parts
from stepdistill.models.load import Teacher, load_teacher

SPEC, SEED, COUNT = SamplerSpec((0.1, 0.05), guidance=1.5), 3, 75        # two calls: noise at the start, and noise again between them


@contextmanager
def watched(pause: float = 0.0) -> Iterator[dict[int, Tensor]]:
    """By sample: the noise it was started from, the noise it was given after the first call, and its x0 in float32; (3, C, H, W) each."""
    seen: dict[int, Tensor] = {}
    drawn: list[Tensor] = []
    sample, normal = generating.sample, Noise.normal

    def spy(net: Any, spec: Any, cond: Any, draws: Any, shape: Any) -> Tensor:
        drawn.clear()
        x0 = sample(net, spec, cond, draws, shape)
        start, again = drawn
        seen.update({i: torch.stack([start[row], again[row], x0[row]]) for row, i in enumerate(draws.indices)})
        time.sleep(pause)
        return x0

    def noted(self: Noise, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn.append(normal(self, *shape, dtype=dtype))
        return drawn[-1]

    generating.sample, Noise.normal = spy, noted                         # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        generating.sample, Noise.normal = sample, normal                 # type: ignore[method-assign]


def made(teacher: Teacher, batch_size: int, parts: Parts | None = None, pause: float = 0.0) -> tuple[dict[int, Tensor], Tensor]:
    """(what `watched` saw in this process, the whole set's uint8 pictures)."""
    with watched(pause) as seen:
        if parts is None:
            return seen, generating.generate(teacher, SPEC, COUNT, SEED, batch_size=batch_size, quiet=True).images
        generating.fill(parts, teacher, SPEC, COUNT, SEED, batch_size=batch_size, quiet=True)
    return seen, torch.stack(list(parts.pictures(COUNT, batch_size).read(range(COUNT))))


def share(base: Path, rank: int) -> None:
    """One process's part; the first of them writes what both saw."""
    dist.init_process_group("gloo", init_method=f"file://{base / 'rendezvous'}", rank=rank, world_size=2)
    teacher = load_teacher(base / "teacher")
    for turn in range(2):                                                # who comes second finds the folder
        if turn == rank:
            parts = Parts.open(base / "parts", {"set": "one"})
        dist.barrier()
    seen, images = made(teacher, 7, parts, pause=0.03)
    whole, owners = torch.zeros(COUNT, 3, *teacher.shape), torch.zeros(COUNT, 2)
    for i, row in seen.items():
        whole[i], owners[i, rank] = row, 1
    for tensor in (whole, owners):
        dist.all_reduce(tensor)                                          # nobody else has this row, so the sum is the row
    if rank == 0:
        save_file({"seen": whole, "owners": owners, "images": images}, base / "together.safetensors")
    evaluated(base / "ranks" / "r.json")
    dist.destroy_process_group()


def evaluated(to: Path) -> dict[str, Any]:
    """The teacher under teacher-only: two sets of 60 pictures, 7 at a time."""
    return evaluate(str(to.parents[1] / "teacher"), "teacher-only", 60, to, steps=2, guidance=1.5, renoise=1.0, batch_size=7, quiet=True,
                    brought=Brought(extractor="tiny"))


def main(base: Path) -> int:
    """Forked after the imports, which takes half the time; the exit code."""
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
                share(base, rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
