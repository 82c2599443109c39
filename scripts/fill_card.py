"""Fill the figures of a world's model card from the results stored beside it: python scripts/fill_card.py stepdistill/worlds/emoji"""

from __future__ import annotations

from pathlib import Path

import typer

from stepdistill.training.checkpoint import write_atomically
from stepdistill.worlds.cards import filled


def main(world: Path) -> None:
    """Write WORLD/README.md again."""
    card = world / "README.md"
    write_atomically(card, filled(card.read_text(), world))


if __name__ == "__main__":
    typer.run(main)
