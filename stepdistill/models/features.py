"""Frozen networks over pictures whose blocks a discriminator reads: a world's second classifier, or a vision transformer from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.models.denoiser import tapped
from stepdistill.models.load import read_json
from stepdistill.worlds.fashion import classifier

PREPROCESSOR = "preprocessor_config.json"
WORLD = "fashion"                                       # the world whose second classifier can be read by its name
READ = 4                                                # blocks of a transformer, at even distances: 2, 5, 8, 11 of 12 (StyleGAN-T)


class PictureFeatures(nn.Module):
    """A frozen network and the blocks (`taps`) that are read of it; it sees pictures as `prepared` makes them."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, taps: Sequence[str], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.taps, self.size = network, tuple(taps), size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W) or tokens (B, N, D) of pictures (B, C, H, W), differentiable in them. ValueError for the wrong channels."""
        with tapped(self.network, self.taps) as features:
            self.network(prepared(pictures, self.size, self.mean, self.std))
        return tuple(features)

    @torch.no_grad()
    def seen(self) -> tuple[Tensor, ...]:
        """What it reads of one grey picture: the shapes that a discriminator is built for."""
        return self(self.mean.new_zeros(1, len(self.mean), *self.size))


def prepared(pictures: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean)/std of pictures x (B, C, H, W) in [-1, 1], resized to `size` (H, W); `mean` and `std` are (C', 1, 1).

    Grey pictures are repeated where the network has colours. ValueError for any other number of channels.
    """
    channels = len(mean)
    if pictures.ndim != 4 or pictures.shape[1] not in (1, channels):
        raise ValueError(f"the network that method.features or method.judge names reads pictures of {channels} channels, and these are "
                         f"{tuple(pictures.shape[1:])}: choose another one")
    x = pictures.to(mean).expand(-1, channels, -1, -1)
    if x.shape[2:] != size:
        x = functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    return (x - mean) / std


def load_features(source: str) -> PictureFeatures:
    """"fashion" is that world's second classifier, not its judge; anything else a folder with a vision transformer (DINOv2, ViT).

    Only safetensors are read and nothing is downloaded. FileNotFoundError or ValueError with the remedy.
    """
    if source == WORLD:
        trunk = classifier.load(classifier.SECOND).trunk
        ends = [i - 1 for i, layer in enumerate(trunk) if isinstance(layer, classifier.Block) and layer.halves]
        return PictureFeatures(trunk, [str(i) for i in (*ends, len(trunk) - 1)], (28, 28), (0.0,), (1.0,))
    return _transformer(Path(source))


def _transformer(folder: Path) -> PictureFeatures:
    kind = "a vision transformer (DINOv2 ViT-S in the paper)"
    network, mean, std = load_model("method.features", folder, kind, spare=("pooler.",))        # which comes after every block that is read
    stacks = {name: len(stack) for name, stack in network.named_modules() if isinstance(stack, nn.ModuleList)}
    config: Any = network.config
    if network.main_input_name != "pixel_values" or not hasattr(config, "image_size") or not stacks:
        raise ValueError(f"method.features: {folder} holds a {type(network).__name__}, which is no vision transformer")
    name = max(stacks, key=lambda n: stacks[n])
    side, depth = config.image_size, stacks[name]
    taps = dict.fromkeys(f"{name}.{max(1, round(depth * k / READ)) - 1}" for k in range(1, READ + 1))
    return PictureFeatures(network, list(taps), (side, side) if isinstance(side, int) else tuple(side), mean, std)


def load_model(key: str, folder: Path, kind: str, spare: tuple[str, ...] = ()) -> tuple[Any, list[float], list[float]]:
    """(a model of transformers in float32, mean and std of its pictures in [-1, 1]) from the folder that the recipe's `key` names.

    `kind` says what should be there, for the errors. Weights that begin with one of `spare` may be missing. Only safetensors are read and
    nothing is downloaded. FileNotFoundError or ValueError with the remedy.
    """
    from transformers import AutoModel

    for name in ("config.json", PREPROCESSOR):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{key}: {folder} has no {name}; name 'fashion', or a folder with config.json, {PREPROCESSOR} and "
                                    f"model.safetensors of {kind}")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{key}: {folder} holds no safetensors, and pickled weights are not read: save the model again with "
                                "save_pretrained")
    try:
        network, report = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                                                    dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{key}: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    lacks = [k for k in report["missing_keys"] if not k.startswith(spare)]
    if lacks or report["mismatched_keys"]:
        wrong = str([*lacks, *report["mismatched_keys"]])[:200]
        raise ValueError(f"{key}: the weights in {folder} do not fit its config: {wrong}")
    numbers = read_json(folder / PREPROCESSOR)
    if missing := [name for name in ("image_mean", "image_std") if name not in numbers]:
        raise ValueError(f"{folder / PREPROCESSOR} lacks {missing[0]}, by which pictures are normalised")
    return network, [2 * m - 1 for m in numbers["image_mean"]], [2 * s for s in numbers["image_std"]]
