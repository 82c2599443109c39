"""Classifier-free guidance: null + w·(cond - null), w = 1 means none (Ho & Salimans 2022, in the convention of diffusers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Noise
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import like


@dataclass(frozen=True)
class Band:
    """Guidance scales w, drawn evenly from [low, high]. Papers that write cond + w'·(cond - null) have w' = w - 1."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"a band of guidance needs low <= high, got {self.low} and {self.high}")

    def sample(self, noise: Noise) -> Tensor:
        """(B,) float64, or a scalar for shared draws."""
        return noise.uniform(self.low, self.high)

    def holding(self, w: float) -> float:
        """w, what a student that is told its guidance is told unless asked otherwise; ValueError where it lies outside."""
        if not self.low <= w <= self.high:
            raise ValueError(f"guidance {w:g} is what the student would be told by default, and method.guidance is {self.low:g} to "
                             f"{self.high:g}: set guidance to one of those")
        return w


def _norm(limit: float, axis: int) -> Callable[[Tensor, Tensor], Tensor]:
    def law(cond: Tensor, guided: Tensor) -> Tensor:
        if guided.ndim <= axis:
            return guided
        return guided * (cond.norm(dim=axis, keepdim=True) / guided.norm(dim=axis, keepdim=True).clamp_min(1e-8)).clamp(0, limit)

    return law


# What pipelines do to the guided output afterwards. Its length along an axis of the state becomes that of the conditional output
# (Qwen-Image, Lumina 2: the last axis; JoyImage: axis 2), or at most that (LongCat-Image). Lumina-Next guides three of its channels.
LAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda cond, guided: guided,
    "norm kept": _norm(math.inf, -1),
    "norm capped": _norm(1.0, -1),
    "norm kept, axis 2": _norm(math.inf, 2),
    "three channels": lambda cond, guided: torch.cat([guided[:, :3], cond[:, 3:]], 1),
}


def guide(cond: Prediction, null: Prediction, w: float | Tensor, law: str = "linear") -> Prediction:
    """Guided prediction at one x_t. w is a number or one per sample (B,); `law` is a row of LAWS, applied in the network's own space.

    Features stay those of the conditional half.
    """
    scale = like(w, cond.raw) if isinstance(w, Tensor) else w
    guided = LAWS[law](cond.raw, null.raw + scale * (cond.raw - null.raw))
    return Prediction(guided, cond.kind, cond.x_t, cond.alpha, cond.sigma, cond.features)
