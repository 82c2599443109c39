"""What losses report beside their value, for the log and for `stepdistill diagnose`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = (0.0, 0.25, 0.5, 0.75)                         # lower edges of the bands of s


@dataclass(frozen=True)
class Mean:
    """A mean over some of the samples, as a sum and a number: a batch or a process that has none of them counts for nothing."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, number: Tensor | float, device: torch.device) -> Mean:
        """One number."""
        total = torch.as_tensor(number, device=device).detach()
        return cls(total, torch.ones_like(total))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        """nan of none."""
        return self.total / self.count


def level(x0: Tensor) -> dict[str, Tensor | Mean]:
    """Mean and standard deviation of all values of a student's samples x0 (B, ...)."""
    values = x0.detach()
    return {"x0_mean": values.mean(), "x0_std": values.std()}


def accuracy(on_real: Tensor, on_generated: Tensor) -> dict[str, Tensor | Mean]:
    """Share of a discriminator's logits (B,) with the right sign, + on real samples and - on the student's: of each, and their mean."""
    real, generated = (on_real > 0).float().mean(), (on_generated < 0).float().mean()
    return {"disc_accuracy": (real + generated) / 2, "disc_accuracy_real": real, "disc_accuracy_generated": generated}


def score_gap(fake: Tensor, real: Tensor, s: Tensor) -> dict[str, Tensor | Mean]:
    """Root mean square of fake - real (both x0, (B, ...)), over all and as `score_gap_s25` for the samples with s (B,) in [0.25, 0.5).

    The gap is what distribution matching descends. At large s both scores expect little more than the mean picture; what stays open at
    small s is texture.
    """
    gap = (fake - real).detach().float().reshape(len(s), -1).square().mean(1)                    # (B,)
    band = torch.bucketize(s.detach().to(gap), torch.tensor(LEVELS[1:], device=gap.device), right=True)
    parts: dict[str, Tensor | Mean] = {"score_gap": gap.mean().sqrt()}
    for number, low in enumerate(LEVELS):
        here = (band == number).to(gap)
        parts[f"score_gap_s{round(100 * low):02d}"] = Mean((here * gap.sqrt()).sum(), here.sum())
    return parts
