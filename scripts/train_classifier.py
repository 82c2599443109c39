"""Train the classifier that judges the fashion world, and write it beside its network class.

    python scripts/train_classifier.py                                    # classifier.safetensors and .json, 16 minutes on one core
    python scripts/train_classifier.py --seed 1 --out stepdistill/worlds/fashion/second                  # what methods may train against

AdamW, one cycle, batches of 128; pictures are shifted by up to two pixels, mirrored, and lose one 8x8 square. The score is measured on the
10,000 test pictures after the weights were rounded to fp16, that is, on the file that is shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from stepdistill.diffusion.draws import key
from stepdistill.worlds.fashion import data
from stepdistill.worlds.fashion.classifier import CONFIG, WEIGHTS, Architecture, Classifier

SHIFT, HOLE = 2, 8                                      # pixels


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror and cut a square out of uint8 pictures (B, 1, H, W)."""
    count, (height, width) = len(images), images.shape[2:]
    draw = lambda high: torch.randint(high, (count,), generator=generator)  # noqa: E731
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)                                   # (B, 1, 5, 5, H, W)
    out = windows[torch.arange(count), :, draw(2 * SHIFT + 1), draw(2 * SHIFT + 1)]
    out = torch.where(draw(2).bool()[:, None, None, None], out.flip(3), out)
    rows, columns = torch.arange(height) - draw(height)[:, None], torch.arange(width) - draw(width)[:, None]
    hole = ((rows.abs() < HOLE // 2)[:, :, None] & (columns.abs() < HOLE // 2)[:, None, :])[:, None]
    return out.masked_fill(hole, 0)


def batches(pictures: data.Pictures, seed: int, epoch: int, size: int) -> list[Tensor]:
    """Rows of every whole batch of one epoch, in an order keyed by (seed, epoch)."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(key(seed, "epoch", epoch)))
    return list(order[: len(order) // size * size].split(size))


@torch.inference_mode()
def accuracy(net: Classifier, pictures: data.Pictures) -> float:
    """Share of the pictures that the network names rightly."""
    hits = sum(int((net(x)[1].argmax(1) == y).sum()) for x, y in zip(pictures.images.split(500), pictures.labels.split(500), strict=True))
    return hits / len(pictures)


def main(
    out: Annotated[Path, typer.Option(help="folder for classifier.safetensors and classifier.json")] = Path("stepdistill/worlds/fashion"),
    epochs: int = 12,
    batch_size: int = 128,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.02,
    seed: int = 0,
    folder: Annotated[Path | None, typer.Option(help="folder with the four IDX files")] = None,
) -> None:
    """Train the fashion classifier."""
    train, test = data.load("train", folder), data.load("test", folder)
    torch.manual_seed(key(seed, "weights"))
    architecture = Architecture()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Classifier(architecture).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * (len(train) // batch_size))
    began = time.time()
    with tqdm(total=cycle.total_steps, mininterval=5) as bar:
        for epoch in range(epochs):
            for number, rows in enumerate(batches(train, seed, epoch, batch_size)):
                generator = torch.Generator().manual_seed(key(seed, "augment", epoch, number))
                images, labels = augment(train.images[rows], generator).to(device), train.labels[rows].to(device)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = net(images)[1]
                loss = torch.nn.functional.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.cpu().state_dict().items()}
    temporary = out / f"{WEIGHTS}.partial"
    temporary.write_bytes(save({k: v.contiguous() for k, v in weights.items()}))
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(temporary).items()})
    score = accuracy(net.eval(), test)
    description = {
        "architecture": architecture.to_dict(),
        "training": {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay,
                     "seed": seed},
        "parameters": sum(p.numel() for p in net.parameters()),
        "test_accuracy": score,
        "sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(),
        "data": "Fashion-MNIST train, 60,000 pictures (MIT licence)",
    }
    (out / f"{CONFIG}.partial").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(temporary, out / WEIGHTS)
    os.replace(out / f"{CONFIG}.partial", out / CONFIG)
    print(f"test accuracy {score:.4f} after fp16 rounding, {(time.time() - began) / 60:.1f} minutes; written to {out / WEIGHTS}")


if __name__ == "__main__":
    typer.run(main)
