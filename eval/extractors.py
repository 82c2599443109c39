"""Networks that turn pictures into features: fp32, no autocast, TF32 off, evaluation mode, one fixed batch size.

    extractor          network                   pictures are resized to               for
    fashion            the world's classifier    28x28 as they are                     the fashion world
    emoji              the world's judge         64x64 as they are                     the emoji world
    emoji-captions     the same and MiniLM       the same                              the emoji world: pictures and their captions
    tiny               a random convolution      any size                              tests
    inception-tf       Inception 2015-12-05      299, TF1's bilinear, aliasing         tables of EDM and ADM
    inception-clean    the same                  299, bicubic, clipped to 0..255       tables of clean-fid
    dinov2-l14, -s14   DINOv2                    224, bicubic                          FD-DINOv2 (dgm-eval, EDM2)
    clip-l14-336       CLIP ViT-L/14-336         336, bicubic                          CMMD
    clip-b32           CLIP ViT-B/32             224 by CLIP's own preprocessing       CLIP score, "A photo depicts " before the prompt
    clip-l14           CLIP ViT-L/14             the same                              CLIP score of the bare prompt
    clip-g14           open_clip ViT-g/14        the same                              CLIP score of DMD2's tables, with that prefix

Bicubic is antialiased, in float and not rounded again, and bends pictures that are not square. Public networks need their weights first,
by `stepdistill weights`. An extractor is an nn.Module: `.to(device)` moves it, and it fetches pictures to where it is.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.diffusion.draws import key
from stepdistill.eval import diversity, weights
from stepdistill.eval.weights import digest
from stepdistill.models.precision import exact
from stepdistill.worlds.emoji import judge, text
from stepdistill.worlds.emoji.data import to_model
from stepdistill.worlds.fashion import classifier

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)          # open_clip's networks keep to it
REGISTERED = "stepdistill-"                             # before the names that torch-fidelity knows our extractors by


class Extractor(Protocol):
    """A judge with a name and the digest of its weights."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 pictures (B, C, H, W) to float32 features (B, d) and, from a classifier, logits (B, classes)."""
        ...


class TextImage(Extractor, Protocol):
    """A judge whose features of a picture and of its prompt can be compared: both have norm 1, their dot product is the cosine."""

    @property
    def prefix(self) -> str:
        """What it puts before every prompt."""
        ...

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Float32 embeddings (B, d). What lies beyond the network's context (77 tokens of CLIP) is not read. ValueError for no prompts."""
        ...


def fashion_file(name: str, remedy: str) -> Path:
    """A file that ships in the fashion world; FileNotFoundError naming it and the remedy."""
    path = Path(str(resources.files("stepdistill.worlds.fashion") / name))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall stepdistill, or make it with `python {remedy}`")
    return path


# -------------------------------------------------------------------------------------------------------------------------- preprocessing

Resize = Callable[[Tensor, int], Tensor]                # uint8 (B, 3, H, W) and a side to float32 (B, 3, side, side), in grey levels


def bicubic(images: Tensor, side: int) -> Tensor:
    """Antialiased, at pixel centres, with a = -1/2: Pillow's filter on float planes. Sharp edges overshoot 0..255."""
    return functional.interpolate(images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)


def _clipped(images: Tensor, side: int) -> Tensor:
    return bicubic(images, side).clamp(0, 255)


def _tensorflow1(images: Tensor, side: int) -> Tensor:
    """Bilinear from the top left corner, without antialiasing."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(side, side), align_corners=False)


def _cropped(images: Tensor, side: int) -> Tensor:
    """CLIP's own: the short side resized by antialiased bicubic in 8 bits, then the centre."""
    from torchvision.transforms import functional as vision

    resized = vision.resize(images, [side], vision.InterpolationMode.BICUBIC, antialias=True)
    return vision.center_crop(resized, [side, side]).float()


def _normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey levels to what a network was trained on."""
    return (levels / 255 - levels.new_tensor(mean)[:, None, None]) / levels.new_tensor(std)[:, None, None]


def _fetched(extractor: nn.Module, images: Tensor) -> Tensor:
    """Pictures where the extractor is."""
    return images.to(next(itertools.chain(extractor.parameters(), extractor.buffers())).device)


def _colours(extractor: nn.Module, images: Tensor) -> Tensor:
    """Pictures where the extractor is, (B, 3, H, W); grey is repeated."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"extractor {extractor.name!r} reads pictures of one or three channels, got {tuple(images.shape)}")
    return _fetched(extractor, images).expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------------------------------------------------------ networks


class Fashion(nn.Module):
    """The shipped classifier: 64 pooled features and ten logits."""

    name = "fashion"

    def __init__(self) -> None:
        super().__init__()
        file = fashion_file(classifier.WEIGHTS, "scripts/train_classifier.py")
        fashion_file(classifier.CONFIG, "scripts/train_classifier.py")
        self.net = classifier.load(file.parent)
        self.sha256, self.dim = digest(file), self.net.dim

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(f"extractor 'fashion' reads pictures (N, 1, 28, 28), got {tuple(images.shape)}")
        return self.net(_fetched(self, images))


class Emoji(nn.Module):
    """The judge of the emoji world: 256 features of a picture, before they become a direction."""

    name = "emoji"

    def __init__(self) -> None:
        super().__init__()
        self.net = judge.load()
        self.sha256, self.dim = digest(judge.FOLDER / judge.WEIGHTS), self.net.dim

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.shape[1:] != (3, 64, 64):
            raise ValueError(f"extractor {self.name!r} reads pictures (N, 3, 64, 64), got {tuple(images.shape)}")
        return self.net.features(to_model(_fetched(self, images))), None


class EmojiCaptions(nn.Module):
    """The same judge where pictures and captions meet: directions of 128 numbers."""

    name, prefix = "emoji-captions", ""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Emoji()
        encoder = digest(text.folder() / "model.safetensors")
        self.sha256 = hashlib.sha256(f"{self.seen.sha256} {encoder}".encode()).hexdigest()
        self.dim = self.seen.net.image.out_features

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.seen.net.of_pictures(self.seen.features(images)[0]), None

    def text(self, prompts: Sequence[str]) -> Tensor:
        if not prompts:
            raise ValueError("there are no prompts to embed")
        return self.seen.net.of_captions(_fetched(self, text.embedded(prompts)))


class Tiny(nn.Module):
    """A fixed random convolution over pictures of any size and one or three channels: makes every measure testable without weights."""

    name, dim = "tiny", 16
    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key("tiny extractor"))
        self.register_buffer("kernel", torch.randn(self.dim, 1, 5, 5, generator=generator) / 5)
        self.sha256 = hashlib.sha256(self.kernel.numpy().tobytes()).hexdigest()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        grey = _fetched(self, images).float().mean(1, keepdim=True) / 127.5 - 1
        return functional.conv2d(grey, self.kernel, stride=2).relu().mean((2, 3)), None


class Inception(nn.Module):
    """Inception of 2015-12-05: 2048 pooled features, and 1008 logits without their bias, which is how inception scores are computed.

    Salimans et al., 2016 (https://arxiv.org/abs/1606.03498); Heusel et al., 2017 (https://arxiv.org/abs/1706.08500).
    """

    dim = 2048

    def __init__(self, name: str, resize: Resize) -> None:
        super().__init__()
        self.name, self.resize = name, resize
        net, self.sha256 = weights.network("inception-2015-12-05")
        *trunk, head = net.children()                   # in the order they are run
        self.trunk, self.head = nn.Sequential(*trunk), head

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        levels = self.resize(_colours(self, images), 299)
        pooled = self.trunk((levels - 128) / 128).flatten(1)
        return pooled, pooled @ self.head.weight.T


class Dinov2(nn.Module):
    """The CLS token of DINOv2 after the last norm. Oquab et al., 2023 (https://arxiv.org/abs/2304.07193)."""

    side = 224

    def __init__(self, name: str) -> None:
        super().__init__()
        net, self.sha256 = weights.network(name)
        grid = net.embeddings
        table = positions(grid.position_embeddings, self.side // net.config.patch_size)
        grid.position_embeddings = nn.Parameter(table, requires_grad=False)
        self.name, self.dim, self.net = name, net.config.hidden_size, net

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = _normalised(bicubic(_colours(self, images), self.side), *IMAGENET)
        return self.net(pixel_values=x).last_hidden_state[:, 0], None


def positions(table: Tensor, side: int) -> Tensor:
    """DINOv2's embeddings (1, 1 + n*n, d) of the CLS token and n x n patches, for side x side patches, as its authors interpolate them.

    They ask for a scale of (side + 0.1) / n, and bicubic interpolation takes its points from that scale. transformers asks for the size,
    which moves the points by up to a tenth of a patch.
    """
    n = math.isqrt(table.shape[1] - 1)
    if side == n:
        return table
    grid = table[:, 1:].unflatten(1, (n, n)).movedim(-1, 1)                      # (1, d, n, n)
    grid = functional.interpolate(grid, scale_factor=((side + 0.1) / n,) * 2, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).mT], 1)


class Clip(nn.Module):
    """Embeddings of norm 1 of a CLIP. Radford et al., 2021 (https://arxiv.org/abs/2103.00020)."""

    def __init__(self, name: str, resize: Resize, prefix: str = "") -> None:
        super().__init__()
        self.name, self.resize, self.prefix = name, resize, prefix
        net, self.sha256 = weights.network(name)
        self.config: Any = net.config
        self.dim, self.net = self.config.projection_dim, net
        self.tokenizer: Any = None

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = _normalised(self.resize(_colours(self, images), self.config.vision_config.image_size), *OPENAI)
        pooled = self.net.vision_model(pixel_values=x).pooler_output
        return functional.normalize(self.net.visual_projection(pooled), dim=-1), None

    def text(self, prompts: Sequence[str]) -> Tensor:
        if not prompts:
            raise ValueError("there are no prompts to embed")
        if self.tokenizer is None:
            self.tokenizer = weights.tokenizer(self.name)
        tokens = self.tokenizer([self.prefix + prompt for prompt in prompts], padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.config.text_config.max_position_embeddings).input_ids
        pooled = self.net.text_model(input_ids=_fetched(self, tokens)).pooler_output
        return functional.normalize(self.net.text_projection(pooled), dim=-1)


TEXT_IMAGE: dict[str, Callable[[], TextImage]] = {
    "clip-b32": partial(Clip, "clip-b32", _cropped, "A photo depicts "),
    "clip-l14": partial(Clip, "clip-l14", _cropped),
    "clip-g14": partial(Clip, "clip-g14", _cropped, "A photo depicts "),
    EmojiCaptions.name: EmojiCaptions,
}
SHIPPED: dict[str, Callable[[], Extractor]] = {"fashion": Fashion, "emoji": Emoji, EmojiCaptions.name: EmojiCaptions, "tiny": Tiny}
EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    **SHIPPED,
    "inception-tf": partial(Inception, "inception-tf", _tensorflow1),
    "inception-clean": partial(Inception, "inception-clean", _clipped),
    "dinov2-l14": partial(Dinov2, "dinov2-l14"), "dinov2-s14": partial(Dinov2, "dinov2-s14"),
    "clip-l14-336": partial(Clip, "clip-l14-336", bicubic),
    **TEXT_IMAGE,
}


def weights_of(name: str) -> Path | None:
    """Where the public weights of an extractor lie, or of LPIPS's network; None where they ship. FileNotFoundError says how to get them."""
    if name in SHIPPED:
        return None
    return weights.find("inception-2015-12-05" if name.startswith("inception") else name)


def digest_of(name: str) -> str:
    """The digest of an extractor's weights, or of those of LPIPS's network. Raises as what opens them does."""
    if name != diversity.JUDGE:
        return EXTRACTORS[name]().sha256
    diversity.load_lpips()
    return weights.network(name)[1]


def extract(extractor: Extractor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Features (N, d) and logits (N, classes) of uint8 pictures (N, C, H, W), on the CPU."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"pictures must be a uint8 tensor (N, C, H, W), got {images.dtype} {tuple(images.shape)}: quantise them first")
    features, logits = [], []
    with exact(), torch.inference_mode():
        for batch in images.split(batch_size):
            made, answers = extractor.features(batch)
            features.append(made.cpu())
            logits += [] if answers is None else [answers.cpu()]
    return torch.cat(features), torch.cat(logits) if logits else None


def embed(judge: TextImage, prompts: Sequence[str], batch_size: int) -> Tensor:
    """Embeddings (N, d) of prompts, on the CPU; ValueError for none."""
    with exact(), torch.inference_mode():
        return torch.cat([judge.text(prompts[i:i + batch_size]).cpu() for i in range(0, max(1, len(prompts)), batch_size)])


def register() -> None:
    """Make every extractor known to torch-fidelity as `stepdistill-NAME`, for a second opinion by its `calculate_metrics`.

    Layers are "features", which its fid, kid and prc read, and "logits", which its isc reads. A second call changes nothing.
    """
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: Any) -> None:
            if settings.get("feature_extractor_weights_path") is not None:
                raise ValueError(f"{name} finds its weights where `stepdistill weights` says: leave feature_extractor_weights_path out")
            super().__init__(name, features_list)
            self.extractor: Any = EXTRACTORS[name.removeprefix(REGISTERED)]()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            with exact(), torch.inference_mode():
                features, logits = self.extractor.features(images)
            if logits is None and "logits" in self.features_list:
                raise ValueError(f"extractor {self.extractor.name!r} is no classifier: it has no inception score")
            layers: dict[str, Any] = {"features": features, "logits": logits}
            return tuple(layers[name] for name in self.features_list)

    for name in EXTRACTORS:
        if REGISTERED + name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(REGISTERED + name, Registered)
