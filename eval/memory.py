"""Memorisation: is a generated picture a training picture?

For every sample the nearest training feature is found, and its distance is held against how near training pictures lie to each other: a
sample is suspect where it is nearer than all but 1 % of the training pictures are to their own nearest neighbour. Held-out real pictures
go the same way; their share is what chance gives, about 1 %. Which features are fed decides what counts as a copy: DINOv2 for the
content, a copy-detection network (SSCD) for the picture itself. Run it on the teacher too: a student trained without data can only
pass on what its teacher had learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval.metrics import Estimate, proportion

FEWEST_SAMPLES = 20                                     # of which a 95th percentile says anything
CELLS = 2**26                                           # distances held at a time: 256 MB


def nearest(samples: Tensor, train: Tensor, *, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """Row of the nearest training feature (T, d) to each sample (N, d), int64 (N,), and its Euclidean distance, float64 (N,).

    `leave_one_out` is for samples that are the training set itself: row i is then not its own neighbour. The search runs in float32 over
    blocks of samples, about 256 MB at a time; the distance to the row it finds is then taken from the difference itself, so that a copy
    is at 0. Raises ValueError for features of unequal width or that are not finite, and for too few training rows.
    """
    if samples.ndim != 2 or train.ndim != 2 or samples.shape[1] != train.shape[1]:
        raise ValueError(f"nearest neighbours need features (N, d) and (T, d), got {tuple(samples.shape)} and {tuple(train.shape)}")
    if not len(samples) or len(train) < 1 + leave_one_out:
        raise ValueError(f"a nearest neighbour needs a sample and at least {1 + leave_one_out} training features, got {len(samples)} and "
                         f"{len(train)}")
    if leave_one_out and len(samples) != len(train):
        raise ValueError(f"leave_one_out compares the training set with itself, got {len(samples)} samples and {len(train)} features")
    if not (bool(samples.isfinite().all()) and bool(train.isfinite().all())):
        raise ValueError("a feature is not finite: look at the picture it came from")
    centre = train.double().mean(0)                                             # smaller numbers round less
    x, y = (samples - centre).float(), (train - centre).float()
    norms, block = y.square().sum(1), max(1, CELLS // len(train))
    neighbours, distances = [], []
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        away = torch.addmm(norms, rows, y.T, alpha=-2)                          # |x|^2 is the same for all neighbours
        if leave_one_out:
            away[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        neighbours.append(away.argmin(1))
        distances.append((samples[start : start + block].double() - train[neighbours[-1]].double()).norm(dim=1))
    return torch.cat(neighbours), torch.cat(distances)


@dataclass(frozen=True)
class Memorisation:
    """How near generated pictures lie to training pictures, beside held-out real ones.

    `share` and `held_out` are shares at or below `threshold`, `excess` their difference: 0 where nothing was learnt by heart.
    """

    neighbour: Tensor                                   # (N,) row of the nearest training feature
    distance: Tensor                                    # (N,) to it
    threshold: float                                    # the 1 % quantile of distances among training features
    closest5: float                                     # distance below which the closest 5 % lie: the 95th percentile of closeness
    held_out_closest5: float
    share: Estimate
    held_out: Estimate
    excess: Estimate

    @property
    def suspects(self) -> Tensor:
        """Samples at or below the threshold, closest first: the ones to look at beside `neighbour`."""
        order = self.distance.argsort()
        return order[: int((self.distance <= self.threshold).sum())]


def check(samples: int, train: int, held_out: int, quantile: float = 0.01) -> None:
    """ValueError where so many features of each are too few: what can be asked before any picture is made."""
    least = round(1 / quantile)
    if train < least:
        raise ValueError(f"a quantile of {quantile:g} needs at least {least} training features, got {train}: make the reference of more "
                         "pictures, or with a larger --keep")
    for name, count in (("generated", samples), ("held-out", held_out)):
        if count < FEWEST_SAMPLES:
            raise ValueError(f"memorisation needs at least {FEWEST_SAMPLES} {name} features, got {count}: raise the count")


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor, quantile: float = 0.01) -> Memorisation:
    """Of features of generated (N, d), training (T, d) and held-out real pictures (H, d), all from one extractor.

    Cost: N·T, H·T and T^2 distances, in blocks. Raises ValueError as `check` does: below 20 samples or held-out features, or for fewer
    training features than the quantile needs (100 for 1 %).
    """
    check(len(samples), len(train), len(held_out), quantile)
    threshold = float(nearest(train, train, leave_one_out=True)[1].quantile(quantile))
    neighbour, distance = nearest(samples, train)
    real = nearest(held_out, train)[1]
    share, chance = proportion(distance <= threshold), proportion(real <= threshold)
    return Memorisation(neighbour, distance, threshold, float(distance.quantile(0.05)), float(real.quantile(0.05)), share, chance,
                        _difference(share, chance))


def told(samples: Tensor, train: Tensor, held_out: Tensor, names: Sequence[str] = (), most: int = 20) -> dict[str, Any]:
    """A block of a result file, of features as in `memorisation`: how many training features were searched, the shares with their errors,
    and of the nearest `most` suspects each its row, its neighbour's, their distance, and the neighbour's name (None where the training
    pictures have no names)."""
    found = memorisation(samples, train, held_out)
    suspects = [(int(row), int(found.neighbour[row])) for row in found.suspects[:most]]
    return {"train": len(train), "threshold": found.threshold, "closest5": found.closest5,
            "held_out_closest5": found.held_out_closest5, "share": found.share.to_dict(), "held_out": found.held_out.to_dict(),
            "excess": found.excess.to_dict(),
            "suspects": [[row, near, float(found.distance[row]), names[near] if names else None] for row, near in suspects]}


def _difference(a: Estimate, b: Estimate) -> Estimate:
    """Of two independent shares, with the interval made from both Wilson intervals (R. G. Newcombe, Statistics in Medicine 17, 1998)."""
    delta = a.value - b.value
    low = ((a.value - a.ci95[0]) ** 2 + (b.ci95[1] - b.value) ** 2) ** 0.5
    high = ((a.ci95[1] - a.value) ** 2 + (b.value - b.ci95[0]) ** 2) ** 0.5
    return Estimate(delta, delta, (a.se**2 + b.se**2) ** 0.5, (delta - low, delta + high), a.n, a.groups)
