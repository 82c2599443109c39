"""Train the autoencoder of the emoji world: 64x64x3 pictures to 16x16x4 latents.

    python scripts/emoji_vae.py --out runs/emoji_vae                # goes on by itself where the folder holds a checkpoint

Loss: L1 of the pictures, L1 of their horizontal and vertical differences (line art is edges), and a small KL. Every name comes equally
often; every picture is shifted and scaled a little on white. The latents' scaling factor is 1 over their standard deviation on the
training pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from stepdistill.diffusion.draws import key
from stepdistill.images import grid, save_png
from stepdistill.worlds.emoji import data
from stepdistill.worlds.fit import fit

NETWORK = dict(in_channels=3, out_channels=3, latent_channels=4, sample_size=64, block_out_channels=(32, 64, 96), layers_per_block=1,
               down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=16,
               mid_block_add_attention=False)


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Along rows and columns."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


@torch.no_grad()
def codes(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latent means (N, 4, 16, 16) of pictures in [-1, 1], unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, the log and, at the end, vae/ and two grids")],
    updates: int = 3000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    edges: Annotated[float, typer.Option(help="weight of the differences")] = 1.0,
    kl: Annotated[float, typer.Option(help="weight of the KL, per latent value")] = 1e-4,
    seed: int = 0,
) -> None:
    """Train the emoji autoencoder."""
    train, held_out = data.split(False), data.split(True)
    images, shares = data.to_model(data.pictures(train)), data.shares(train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(key(seed, "weights"))
    vae = AutoencoderKL(**NETWORK).to(device)

    def loss(update: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key(seed, "batch", update))
        x = data.moved(images[torch.multinomial(shares, batch_size, generator=generator)], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(x)
            y = vae.decode(z).sample
        y, mean, log_variance = y.float(), posterior.mean.float(), posterior.logvar.float()
        sharp = sum((a - b).abs().mean() for a, b in zip(differences(x), differences(y), strict=True))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"l1": (x - y).abs().mean(), "edges": edges * torch.as_tensor(sharp), "kl": kl * divergence}

    best = fit(vae, loss, out, updates, learning_rate)
    assert isinstance(best, AutoencoderKL)
    best.to("cpu")
    scale = 1 / float(codes(best, images[::4]).std())
    best.register_to_config(scaling_factor=scale)
    best.half().save_pretrained(out / "vae")
    best.float()
    shown = data.pictures(held_out[:: max(1, len(held_out) // 60)][:60])
    again = best.decode(codes(best, data.to_model(shown))).sample.detach().clamp(-1, 1)
    beside = torch.stack([shown, ((again + 1) * 127.5).round().to(torch.uint8)], 1).flatten(0, 1)
    save_png(grid(beside, 12), out / "held_out.png")
    error = float((data.to_model(shown) - again).abs().mean())
    (out / "vae.json").write_text(json.dumps({
        "network": NETWORK, "scaling_factor": scale, "held_out_l1": error, "updates": updates, "seed": seed,
        "parameters": sum(p.numel() for p in best.parameters()), "data": data.ATTRIBUTION,
        "command": f"python scripts/emoji_vae.py --out runs/emoji_vae --updates {updates} --seed {seed}"}, indent=1) + "\n")
    print(f"mean absolute error {error:.4f} of [-1, 1] on held-out pictures; written to {out / 'vae'}")


if __name__ == "__main__":
    typer.run(main)
