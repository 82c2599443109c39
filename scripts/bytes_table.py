"""Count DMD2's bytes at full size, measure them on tiny networks, and write docs/bytes.md and docs/bytes.json.

    python scripts/bytes_table.py
    python scripts/bytes_table.py recipes       # this table alone; the others stay as they are
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from zoo.sized import SIZED  # noqa: E402

from stepdistill import recipe as recipes  # noqa: E402
from stepdistill import worlds  # noqa: E402
from stepdistill.models import networks  # noqa: E402
from stepdistill.training import loop, plan  # noqa: E402

FILE = ROOT / "docs" / "bytes.json"
GIB, MIB = 2**30, 2**20
CARDS = (24, 40, 80)                                                             # GiB
RECIPES = {"sd15": "sd15/dmd2", "sdxl": "sdxl/dmd2", "sd35-medium": "sd35_medium/dmd2", "flux-dev": "flux_dev/dmd2"}
KINDS = {"three full copies": ("lora={}",), "LoRA on one base": ("lora.student.rank=64", "lora.fake.rank=64")}
HEAD = """# What DMD2 asks of a card

Made by `python scripts/bytes_table.py` with torch {torch} and diffusers {diffusers} on a machine without a GPU; the numbers, and more of
them, are in `docs/bytes.json`. **No run of these sizes has been made on a GPU.** GiB and MiB are powers of two.

## At full size, counted

DMD2 without its GAN term, the shipped recipes with one sample in each micro-batch: bfloat16 passes, bfloat16 frozen weights, gradient
checkpointing, text encoders on the card. "Three full copies" is a frozen teacher, a student and a fake score, the trained ones with float32
weights and Adam moments; "LoRA" the same roles with adapters of rank 64 on the teacher's own network. The activations are the most that the
passes of one role hold at one time. A full copy under autocast holds bfloat16 copies of its weights while its forward pass lasts, and they
are among them. The peak is the highest sum of everything at one time; the context of CUDA, workspaces and gaps in its allocator come on top
({reserve:.0f} GiB is set aside for them by rule of thumb). Each row is one command:

"""
TINY = """
## On tiny networks, measured

The same classes with one to two million weights in float32 on a CPU (`tests/zoo/sized.py`), four samples, adapters of rank 8. Measured is
the largest sum of the bytes of all tensor storages alive at one time in a real iteration; planned is what `plan` says of the same recipe
from the configs alone, with the attention of a CPU. The bound is 15 % (`tests/training/test_plan.py`). What a card does in another way,
fused attention and the float32 of its autocast, is counted by rule and was not measured.

"""
SHIPPED = """
## The shipped recipes, counted

As they stand: adapters on one base (but for the student of SwiftBrush and the fake score of Phased DMD), text encoders on the card, prompts
as long as the pipeline takes them. The card is the first of {cards} GiB that the recipe fits on. Each row is
`stepdistill plan --config RECIPE --network NETWORK`; with `--gpu 24GB` that command says what would make it fit on a smaller one.

"""


def counted() -> list[dict[str, Any]]:
    """Every network in both kinds."""
    rows = []
    for (network, name), (kind, keys) in tqdm([(n, k) for n in RECIPES.items() for k in KINDS.items()], unit="plan"):
        keys = (f"accumulate={recipes.load(name).batch_size}", *keys)
        found = plan.plan(recipes.load(name, keys), networks.find(network))
        command = f"stepdistill plan --config {name} --network {network} {' '.join(keys)}"
        rows.append({"kind": kind, "command": command, **found.to_dict()})
    return rows


def measured() -> list[dict[str, Any]]:
    """Every tiny pipeline in both kinds, planned and run."""
    rows = []
    for name, sized in SIZED.items():
        with tempfile.TemporaryDirectory() as folder:
            network = sized.save(Path(folder))
            for kind, lora in zip(KINDS, ({}, {"student": {"rank": 8}, "fake": {"rank": 8}}), strict=True):
                recipe = sized.recipe(Path(folder), lora=lora)
                real = plan.measured(recipe, loop.make_accelerator(recipe, None))
                found = plan.plan(recipe, network, card=False)
                rows.append({"network": name, "kind": kind, "parameters": found.roles["teacher"].parameters, "resident": found.resident,
                             "planned": found.peak, "measured": real, "ratio": found.peak / real})
    return rows


def shipped() -> list[dict[str, Any]]:
    """Every recipe for a published teacher, with the network that its comment names."""
    rows = []
    for name in tqdm([name for name in recipes.names() if name.split("/")[0] not in worlds.WORLDS], unit="plan"):
        named = re.search(rf"stepdistill plan --config {name} --network ([\w.-]+)", (ROOT / "configs" / f"{name}.yaml").read_text())
        if named is None:
            raise ValueError(f"configs/{name}.yaml names no network: write 'stepdistill plan --config {name} --network NETWORK' into it")
        found = plan.plan(recipes.load(name), networks.find(named[1]))
        card = next((card for card in CARDS if found.peak + plan.RESERVE <= card * GIB), None)
        rows.append({"recipe": name, "command": named[0], **found.to_dict(), "card": card})
    return rows


def full_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["```", *(row["command"] for row in rows), "```", "",
             "| network | roles | parameters | weights | gradients | optimizer | average | encoders | activations | peak, GiB |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        roles = row["roles"].values()
        sums = [sum(role[key] for role in roles) for key in ("weights", "gradients", "optimizer")]
        cells = [*sums, row["ema"], sum(row["encoders"].values()), max(role["activations"] for role in roles), row["peak"]]
        lines.append(f"| {row['network']} | {row['kind']} | {row['roles']['teacher']['parameters'] / 1e6:,.1f} M | "
                     + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + " |")
    return [*lines, "", "Gradients of student and fake score are not alive together, so a row's columns do not add up to its peak."]


def tiny_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| network | roles | parameters | held between updates | planned peak | measured peak, MiB | planned / measured |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        mib = " | ".join(f"{row[key] / MIB:.1f}" for key in ("resident", "planned", "measured"))
        lines.append(f"| {row['network']} | {row['kind']} | {row['parameters']:,} | {mib} | {row['ratio']:.3f} |")
    return lines


def shipped_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| recipe | network | parameters | micro-batch | held between updates | encoders of these | activations | peak, GiB | card |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        roles = row["roles"]
        cells = [row["resident"], sum(row["encoders"].values()), max(role["activations"] for role in roles.values()), row["peak"]]
        lines.append(f"| {row['recipe']} | {row['network']} | {roles['teacher']['parameters'] / 1e6:,.1f} M | {row['micro_batch']} | "
                     + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + f" | {row['card'] or 'none'} |")
    return lines


def page(found: dict[str, Any]) -> str:
    """docs/bytes.md."""
    parts = [HEAD.format(torch=found["torch"], diffusers=found["diffusers"], reserve=plan.RESERVE / GIB), *full_lines(found["counted"]),
             TINY, *tiny_lines(found["measured"]), SHIPPED.format(cards=", ".join(map(str, CARDS))), *shipped_lines(found["recipes"])]
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)


TABLES = {"counted": counted, "measured": measured, "recipes": shipped}


def main(tables: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(TABLES)}; by default all")] = None) -> None:
    """Make the tables, but for those that are kept: not named, and made with the same torch and diffusers."""
    if unknown := sorted(set(tables or ()) - set(TABLES)):
        raise typer.BadParameter(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}")
    warnings.filterwarnings("ignore")
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    before = json.loads(FILE.read_text()) if tables and FILE.is_file() else {}
    kept = set(before) - set(tables or ()) if versions.items() <= before.items() else set()
    found = versions | {name: before[name] if name in kept else make() for name, make in TABLES.items()}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    typer.run(main)
