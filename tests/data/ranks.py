"""Run by test_cache_ranks.py under `torch.distributed.run`: two processes fill caches together.

    python -m torch.distributed.run --nproc_per_node 2 ranks.py BASE      BASE holds one <name>.yaml per cache; of command.yaml the command
                                                                          fills it. BASE/kill names the file at which a process dies
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.data.cache import Rows
from stepdistill.models.conditioning import Conditioning
from stepdistill.training import loop
from stepdistill.training.assemble import cache_of, texts_of


def deadly(name: str) -> None:
    """From now on this process ends where it would put a file of this name into its place, as if it was killed."""
    replace = os.replace

    def move(partial: Path, path: Path) -> None:
        if path.name == name:
            os._exit(9)
        replace(partial, path)

    os.replace = move


@contextmanager
def written() -> Iterator[list[int]]:
    """The first rows of the shards that this process writes."""
    firsts: list[int] = []
    write = Rows._write

    def spy(self: Rows, first: int, rows: Sequence[Conditioning]) -> None:
        firsts.append(first)
        write(self, first, rows)

    Rows._write = spy
    try:
        yield firsts
    finally:
        Rows._write = write


def main(base: Path) -> None:
    if (base / "kill").is_file():
        deadly((base / "kill").read_text())
    for path in sorted(base.glob("*.yaml"), key=lambda path: path.stem == "command"):
        if path.stem == "command":
            sys.exit(cli.run(["cache", "--config", str(path), "--json"]))
        recipe = recipes.load(path)
        accelerator, cache = loop.make_accelerator(recipe, None), cache_of(recipe, *texts_of(recipe))
        cache.limit = 1
        with written() as shards:
            encoded = cache.fill(accelerator.device).encoded
        (base / f"{path.stem}-{accelerator.process_index}.txt").write_text(f"{encoded} {len(shards)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
