"""Train a teacher of the emoji world over the latents of its autoencoder, told captions through MiniLM.

    python scripts/emoji_teacher.py sd --vae runs/emoji_vae/vae --out runs/emoji_sd        # UNet2DConditionModel, eps, DDPM table
    python scripts/emoji_teacher.py dit --vae runs/emoji_vae/vae --out runs/emoji_dit      # a transformer, flow matching

Each goes on by itself where its folder holds a checkpoint, on the latents that it began with. A tenth of the captions is replaced by the
empty one, for guidance. The latents of several moved versions of every picture are made once, at the start, and the states of a caption
when it first comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from stepdistill.diffusion.draws import key
from stepdistill.diffusion.process import Flow, NoiseProcess, TableVP, like
from stepdistill.eval.weights import digest
from stepdistill.models.load import read_weights
from stepdistill.worlds.emoji import data, text
from stepdistill.worlds.fit import fit

VERSIONS, EMPTY = 8, 0.1                                 # moved versions of each picture; share of empty captions
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", clip_sample=False,
             set_alpha_to_one=False, steps_offset=1)


@dataclass(frozen=True)
class Kind:
    """A network and how it is taught: its process, what it is told of t in [0, 1], what it should answer to x0 and eps, how much that
    counts, and whether it is told the states of padding, as its pipeline does or does not."""

    make: Callable[[], torch.nn.Module]
    process: NoiseProcess
    time: Callable[[Tensor], Tensor]                     # (B,) in [0, 1] from uniform numbers
    clock: Callable[[Tensor], Tensor]
    target: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]                   # (B,) of t
    scheduler: Any
    component: str
    padding: bool


def unet() -> UNet2DConditionModel:
    """Cross-attention at 8x8 alone: at 16x16 it costs three times as much. Every block is told the pooled words with the time, too, as
    scale and shift. Heads of 32, whose number diffusers asks for by another name."""
    return UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 160),
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=text.WIDTH,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=5, norm_num_groups=32,
                                addition_embed_type="text", addition_embed_type_num_heads=6, resnet_time_scale_shift="scale_shift")


def transformer() -> AuraFlowTransformer2DModel:
    """Patches of 2x2: 64 tokens."""
    return AuraFlowTransformer2DModel(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
                                      num_single_dit_layers=6, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=text.WIDTH,
                                      caption_projection_dim=192, pos_embed_max_size=64)


def min_snr(t: Tensor) -> Tensor:
    """min(SNR, 5)/SNR of eps: else what is hardly noised would count most. Hang et al., 2023, https://arxiv.org/abs/2303.09556, eq. 5."""
    process = TableVP.scaled_linear()
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    return snr.clamp(max=5) / snr


KINDS = {
    "sd": lambda: Kind(unet, TableVP.scaled_linear(), lambda u: (1 + (1000 * u).floor()) / 1000, lambda t: 1000 * t - 1,
                       lambda x0, eps: eps, min_snr, DDIMScheduler(**TABLE), "unet", True),
    "dit": lambda: Kind(transformer, Flow(), lambda u: torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))), lambda t: t,
                        lambda x0, eps: eps - x0, torch.ones_like, FlowMatchEulerDiscreteScheduler(shift=1.0), "transformer", False),
}


@torch.no_grad()
def latents(folder: Path, images: Tensor, seed: int, kept: Path) -> Tensor:
    """Scaled latent means (VERSIONS, N, 4, 16, 16) of moved pictures, in half precision; the first version is not moved.

    They are read from `kept` where that was made with the autoencoder in `folder`, and else made and kept there.
    """
    maker = {"vae": digest(folder / "diffusion_pytorch_model.safetensors"), "seed": str(seed), "versions": str(VERSIONS)}
    if kept.is_file():
        with safe_open(kept, "pt") as file:
            if file.metadata() == maker:
                return file.get_tensor("latents")
    vae, made = read_weights(AutoencoderKL, folder).eval(), []
    for version in tqdm(range(VERSIONS), desc="encode"):
        generator = torch.Generator().manual_seed(key(seed, "moved", version))
        x = data.moved(images, generator) if version else images
        made.append(torch.cat([vae.encode(part).latent_dist.mean for part in x.split(100)]).mul(vae.config.scaling_factor).half())
    temporary = kept.with_name(f".{kept.name}.partial")
    save_file({"latents": torch.stack(made)}, temporary, metadata=maker)
    os.replace(temporary, kept)
    return torch.stack(made)


def main(
    kind: Annotated[str, typer.Argument(help="sd or dit")],
    vae: Annotated[Path, typer.Option(help="the trained autoencoder's folder")],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, the log and, at the end, the network and its scheduler")],
    updates: int = 12000,
    batch_size: int = 48,
    learning_rate: float = 6e-4,
    seed: int = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="with torch.compile, which needs a C++ compiler: on a CPU a third faster for "
                                                             "dit and an eighth for sd")] = False,
) -> None:
    """Train one of the two emoji teachers."""
    if kind not in KINDS:
        raise typer.BadParameter(f"kind must be sd or dit, got {kind!r}")
    chosen, emojis = KINDS[kind](), data.split(False)
    shares = data.shares(emojis)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # on a CPU the backward pass of the fused attention would cost as much as all matrices of a transformer together
    attention = partial(sdpa_kernel, SDPBackend.MATH) if device.type == "cpu" else nullcontext
    out.mkdir(parents=True, exist_ok=True)
    codes, words = latents(vae, data.to_model(data.pictures(emojis)), seed, out / "latents.safetensors"), dict[str, Tensor]()
    torch.manual_seed(key(seed, "weights"))
    net = chosen.make().to(device)
    denoise = torch.compile(net) if compiled else net

    def told(captions: list[str]) -> Tensor:
        if new := [c for c in dict.fromkeys(captions) if c not in words]:
            words.update(zip(new, text.states(new, chosen.padding).half(), strict=True))
        return torch.stack([words[c] for c in captions]).float().to(device)

    def loss(update: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key(seed, "batch", update))
        rows = torch.multinomial(shares, batch_size, generator=generator)
        x0 = codes[torch.randint(VERSIONS, (batch_size,), generator=generator), rows].float().to(device)
        captions = data.captions([emojis[i] for i in rows.tolist()], generator)
        empty = torch.rand(batch_size, generator=generator) < EMPTY
        cond = told(["" if none else caption for none, caption in zip(empty.tolist(), captions, strict=True)])
        t = chosen.time(torch.rand(batch_size, generator=generator, dtype=torch.float64)).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        x_t = like(chosen.process.alpha(t), x0) * x0 + like(chosen.process.sigma(t), x0) * eps
        with torch.autocast(device.type, torch.bfloat16), attention():
            y = denoise(x_t, timestep=chosen.clock(t).float(), encoder_hidden_states=cond, return_dict=False)[0]
        return {"loss": (like(chosen.weight(t), x0) * (y.float() - chosen.target(x0, eps)).square()).mean()}

    best = fit(net, loss, out, updates, learning_rate).to("cpu")
    best.half().save_pretrained(out / chosen.component)
    chosen.scheduler.save_pretrained(out / "scheduler")
    (out / "teacher.json").write_text(json.dumps({
        "kind": kind, "updates": updates, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "parameters": sum(p.numel() for p in best.parameters()), "data": data.ATTRIBUTION,
        "command": f"python scripts/emoji_teacher.py {kind} --vae VAE --out runs/emoji_{kind} --updates {updates} --seed {seed}"
                   + compiled * " --compile"}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
