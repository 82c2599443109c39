"""Frozen judges of how well pictures fit their labels: a world's second classifier, or a CLIP model from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.models.features import load_model, prepared
from stepdistill.models.load import NOTES, read_json
from stepdistill.worlds.fashion import classifier
from stepdistill.worlds.fashion.data import CLASSES

CLASSIFIERS = ("fashion",)                             # worlds whose second classifier is a judge
TOGETHER = 256                                          # labels that are read at a time


class Judge(nn.Module):
    """A frozen network from pictures to embeddings (B, D), and one embedding for each label: `rows` (N, D).

    The network sees pictures as `features.prepared` makes them.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor

    def __init__(self, network: nn.Module, rows: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("rows", rows.detach())
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """Cosine (B,) between pictures (B, C, H, W) in [-1, 1] and labels (B,) int64, differentiable in the pictures.

        ValueError for the wrong channels.
        """
        embedded = self.network(prepared(pictures, self.size, self.mean, self.std))
        return functional.cosine_similarity(embedded, self.rows[labels], dim=1)


def load_judge(source: str, labels: Sequence[str]) -> Judge:
    """A judge of these labels: "fashion", that world's second classifier, or a folder with a CLIP model and its tokenizer.

    The classifier compares its pooled features with the weights of each class in its last layer, CLIP a picture with each label as a text.
    Only safetensors are read and nothing is downloaded. FileNotFoundError or ValueError with the remedy.
    """
    if not labels:
        raise ValueError("method.judge compares pictures with labels, and this teacher has none: set method.align_weight=0")
    return _classifier(labels) if source in CLASSIFIERS else _clip(Path(source), labels)


def _classifier(labels: Sequence[str]) -> Judge:
    if unknown := [label for label in labels if label not in CLASSES]:
        raise ValueError(f"method.judge: the classifier of fashion knows no {unknown[0]!r}: name a folder with a CLIP model instead")
    net = classifier.load(classifier.SECOND)
    rows = net.head.weight[[CLASSES.index(label) for label in labels]]
    return Judge(nn.Sequential(net.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()), rows, (28, 28), (0.0,), (1.0,))


class _Eye(nn.Module):
    """The half of a CLIP model that sees: normalised pixels (B, 3, H, W) to embeddings (B, D)."""

    def __init__(self, model: Any):
        super().__init__()
        self.trunk, self.head = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.trunk(pixel_values=pixels).pooler_output)


def _clip(folder: Path, labels: Sequence[str]) -> Judge:
    from transformers import CLIPModel

    model, mean, std = load_model("method.judge", folder, "a CLIP model, with its tokenizer (ViT-B/32 in the paper)")
    if not isinstance(model, CLIPModel):
        raise ValueError(f"method.judge: {folder} holds a {type(model).__name__}, which is no CLIP model")
    if tuple(labels) == tuple(map(str, range(len(labels)))):
        raise ValueError(f"method.judge reads labels as texts, and this teacher numbers its classes: name them under labels in its {NOTES}")
    side = model.config.vision_config.image_size
    return Judge(_Eye(model), _texts(model, folder, labels), (side, side), mean, std)


@torch.no_grad()
def _texts(model: Any, folder: Path, labels: Sequence[str]) -> Tensor:
    """Embeddings (N, D) of texts by the other half of a CLIP model; what is too long for it is cut."""
    from transformers import AutoTokenizer

    words = next((path for name in ("tokenizer.json", "vocab.json") if (path := folder / name).is_file()), None)
    if words is None:
        raise FileNotFoundError(f"method.judge: {folder} has neither tokenizer.json nor vocab.json: copy the CLIP model's tokenizer there")
    read_json(words)                                    # says in words what the tokenizer would in a bare Exception
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"method.judge: the tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    model.eval()
    longest = model.config.text_config.max_position_embeddings
    parts = []
    for first in range(0, len(labels), TOGETHER):
        tokens = tokenizer(list(labels[first : first + TOGETHER]), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        seen = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        parts.append(model.text_projection(seen.pooler_output))
    return torch.cat(parts)
