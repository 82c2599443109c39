"""Train the fashion teacher: a class-conditional UNet2DModel (eps prediction, Stable Diffusion's scaled-linear betas) on Fashion-MNIST.

    python scripts/train_teacher.py --out runs/teacher                    # resumes by itself when the folder holds a checkpoint
    python scripts/train_teacher.py --out runs/teacher --updates 20000    # longer, or further: a finished folder is trained on

The network sees 28x28 pictures as 14x14x4 (space to depth, lossless), which halves its cost. The learning rate is constant and falls
linearly to zero over the last quarter. A tenth of the labels is replaced by the null class so that the teacher can be guided.
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from stepdistill.diffusion.draws import Draws, key
from stepdistill.diffusion.process import TableVP
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.models.denoiser import attention
from stepdistill.models.load import NOTES
from stepdistill.worlds.fashion import data

NETWORK = dict(
    sample_size=14, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=32, norm_num_groups=32, num_class_embeds=len(data.CLASSES) + 1,
)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", clip_sample=False)


def rate(update: int, updates: int, peak: float, warmup: int = 200) -> float:
    """Warm-up, constant, then linear to zero over the last quarter."""
    return peak * min(1.0, (update + 1) / warmup, 4 * (updates - update) / updates)


def batch(pictures: data.Pictures, seed: int, update: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every picture once per epoch, in an order keyed by (seed, epoch)."""
    first, count = update * size, len(pictures)
    orders = {e: torch.randperm(count, generator=torch.Generator().manual_seed(key(seed, "epoch", e)))
              for e in {first // count, (first + size - 1) // count}}
    rows = torch.stack([orders[i // count][i % count] for i in range(first, first + size)])
    x0 = torch.nn.functional.pixel_unshuffle(data.to_model(pictures.images[rows]), 2)              # (B, 4, 14, 14)
    return x0, pictures.labels[rows]


def save(folder: Path, update: int, net: UNet2DModel, ema: UNet2DModel, optimizer: torch.optim.Optimizer) -> None:
    """One safetensors file, renamed into place."""
    moments = {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()} | moments
    temporary = folder / "checkpoint.partial"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"update": str(update)})
    os.replace(temporary, folder / "checkpoint.safetensors")


def restore(path: Path, net: UNet2DModel, ema: UNet2DModel, optimizer: torch.optim.Optimizer) -> int:
    """Load `save`'s file; returns the update it was written after."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        update = int(file.metadata()["update"])
    tensors = load_file(path)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    net.load_state_dict(part("net."))
    ema.load_state_dict(part("ema."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("adam.").items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return update


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, the log and, at the end, teacher/")],
    updates: int = 12800,
    batch_size: int = 64,
    learning_rate: float = 5e-4,
    ema_decay: float = 0.999,
    seed: int = 0,
    folder: Annotated[Path | None, typer.Option(help="folder with the four IDX files")] = None,
    every: Annotated[int, typer.Option(help="updates between checkpoints")] = 250,
) -> None:
    """Train the fashion teacher."""
    pictures = data.load("train", folder)
    torch.manual_seed(seed)
    process, net = TableVP.scaled_linear(), UNet2DModel(**NETWORK)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"
    start = restore(checkpoint, net, ema, optimizer) if checkpoint.exists() else 0
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, update {start} of {updates}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device), ema.to(device)
    log, began, mean = (out / "log.jsonl").open("a"), time.time(), None
    for update in (bar := tqdm(range(start, updates), initial=start, total=updates, mininterval=5)):
        draws = Draws(seed, range(update * batch_size, (update + 1) * batch_size), device=torch.device(device))
        x0, labels = batch(pictures, seed, update, batch_size)
        x0, labels = x0.to(device), torch.where(draws.each("drop").uniform().cpu() < 0.1, data.NULL, labels).to(device)
        index = draws.each("t").integers(process.steps)
        eps = draws.each("eps").normal_like(x0)
        x_t = process.add_noise(x0, eps, (index + 1) / process.steps)
        with attention(torch.device(device)), torch.autocast(device, torch.bfloat16):
            out_eps = net(x_t, index, class_labels=labels).sample
        loss = (out_eps.float() - eps).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(update, updates, learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (1 + update) / (10 + update))
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if update % 25 == 0:
            bar.set_postfix(loss=f"{mean:.4f}")
            log.write(json.dumps({"update": update, "loss": loss.item(), "mean": mean, "grad": norm.item(),
                                  "seconds": time.time() - began}) + "\n")
            log.flush()
        if (update + 1) % every == 0 or update + 1 == updates:
            save(out, update + 1, net, ema, optimizer)
    ema.half().save_pretrained(out / "teacher", variant="fp16")
    DDPMScheduler(**SCHEDULER).save_pretrained(out / "teacher")
    (out / "teacher" / NOTES).write_text(json.dumps({
        "codec": {"space_to_depth": 2}, "classes": len(data.CLASSES), "null_class": data.NULL, "labels": data.CLASSES,
        "sampler": SamplerSpec(trailing(25, 0.5), renoise=0.3, clip_x0=1.0, guidance=1.25).to_dict(),
        "licence": "Apache-2.0; trained on Fashion-MNIST (MIT)",
        "command": f"python scripts/train_teacher.py --out runs/teacher --updates {updates} --seed {seed}"}, indent=1))
    print(f"teacher written to {out / 'teacher'}")


if __name__ == "__main__":
    typer.run(main)
