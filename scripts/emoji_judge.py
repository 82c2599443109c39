"""Train the image-text model that judges the emoji world, and validate it.

    python scripts/emoji_judge.py --out runs/emoji_judge            # goes on by itself where the folder holds a checkpoint

Symmetric InfoNCE (Radford et al. 2021, https://arxiv.org/abs/2103.00020) over batches of different pictures; captions vary as for
the teachers, pictures are moved on white and lightly noised, every name comes equally often. Measured at the end, on weights rounded to
half precision: retrieval among the names that were trained on, of pictures moved anew, and among held-out ones; the mean cosine of true
and of shuffled captions; and how held-out pictures fare under blur, noise and exchanged colours, in three strengths each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.diffusion.draws import key
from stepdistill.eval.metrics import Moments, frechet
from stepdistill.worlds.emoji import data, text
from stepdistill.worlds.emoji.judge import CONFIG, WEIGHTS, Architecture, Judge
from stepdistill.worlds.fit import fit


def spoilt(pictures: Tensor, how: str, strength: int) -> Tensor:
    """uint8 pictures, blurred, noised or with their channels exchanged in a growing share of them."""
    x = pictures.float()
    if how == "blur":
        size = 2 * strength + 1
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (strength,) * 4, mode="replicate"), size, 1)
    elif how == "noise":
        x = x + 20 * strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(strength))
    else:
        wrong = torch.arange(len(x)) % 3 < strength
        x[wrong] = x[wrong][:, [1, 2, 0]]
    return x.round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def measured(judge: Judge, pictures: Tensor, told: Tensor, real: Moments) -> dict[str, float]:
    """Of uint8 pictures (N, 3, 64, 64) and the directions (N, 128) of their names, all different; the distance to real ones."""
    features = seen(judge, pictures)
    cosine = judge.of_pictures(features) @ told.T
    rank = (cosine > cosine.diag()[:, None]).sum(1)
    return {"retrieval_top1": float((rank == 0).double().mean()), "retrieval_top5": float((rank < 5).double().mean()),
            "alignment": float(cosine.diag().mean()), "alignment_shuffled": float(cosine.diag(1).mean()),
            "frechet": frechet(Moments.of(features), real)}


def seen(judge: Judge, pictures: Tensor) -> Tensor:
    """Features (N, 256) of uint8 pictures."""
    return torch.cat([judge.features(data.to_model(part)) for part in pictures.split(200)])


@torch.no_grad()
def validation(judge: Judge, train: Sequence[data.Emoji], held_out: Sequence[data.Emoji], seed: int) -> dict[str, dict[str, float]]:
    """Of one picture for each name; distances are to those trained on, as they are drawn."""
    images, unseen = data.pictures(train), data.pictures(held_out)
    real = Moments.of(seen(judge, images))
    moved = data.moved(data.to_model(images), torch.Generator().manual_seed(key(seed, "validation")))
    told, names = (judge.of_captions(text.embedded([e.name for e in side])) for side in (train, held_out))
    shown = {"clean": unseen, **{f"{how} {s}": spoilt(unseen, how, s) for how in ("blur", "noise", "colour") for s in (1, 2, 3)}}
    return {"trained": measured(judge, ((moved + 1) * 127.5).round().to(torch.uint8), told, real),
            **{label: measured(judge, pictures, names, real) for label, pictures in shown.items()}}


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, the log and, at the end, judge.safetensors and judge.json")],
    updates: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train the emoji judge."""
    train = data.split(False)
    images, shares = data.pictures(train), data.shares(train)
    torch.manual_seed(key(seed, "weights"))
    judge, words = Judge(Architecture()).to(memory_format=torch.channels_last), dict[str, Tensor]()

    def told(captions: list[str]) -> Tensor:
        if new := [c for c in dict.fromkeys(captions) if c not in words]:
            words.update(zip(new, text.embedded(new), strict=True))
        return torch.stack([words[c] for c in captions])

    def loss(update: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key(seed, "batch", update))
        rows = torch.multinomial(shares, batch_size, generator=generator)
        x = data.moved(data.to_model(images[rows]), generator)
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        captions = told(data.captions([train[i] for i in rows.tolist()], generator))
        with torch.autocast("cpu", torch.bfloat16):
            features = judge.features(x.contiguous(memory_format=torch.channels_last))
        cosine = judge.of_pictures(features.float()) @ judge.of_captions(captions).T
        logits, own = judge.temperature.clamp(max=4.6).exp() * cosine, torch.arange(len(x))
        cross = torch.nn.functional.cross_entropy
        return {"pictures": 0.5 * cross(logits, own), "captions": 0.5 * cross(logits.T, own)}

    best = fit(judge, loss, out, updates, learning_rate, weight_decay=0.05)
    assert isinstance(best, Judge)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in best.state_dict().items()}
    best.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    held_out = data.plain(data.split(True))
    found = validation(best, data.plain(train), held_out, seed)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps({
        "architecture": Architecture().to_dict(), "updates": updates, "batch_size": batch_size, "learning_rate": learning_rate,
        "seed": seed, "parameters": sum(p.numel() for p in best.parameters()), "held_out_names": len(held_out), "validation": found,
        "data": data.ATTRIBUTION,
        "command": f"python scripts/emoji_judge.py --out runs/emoji_judge --updates {updates} --seed {seed}"}, indent=1) + "\n")
    print(json.dumps({side: found[side] for side in ("trained", "clean")}, indent=1))


if __name__ == "__main__":
    typer.run(main)
