"""What can be counted on pictures alone: brightness, contrast, colours, saturation, clipping, sharpness, grids, variety.

Free beside any distance, and early: over-saturation, grey wash, oil-paint texture, grids and lost modes show here long before a Frechet
distance notices. Only the comparison with a teacher's pictures of the same conditions says anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

PERIODS, REPEATS = (2, 4, 8, 16), 4                      # of patches and of the strides of autoencoders, in pixels; the fewest in a picture
COARSE = 8                                               # variety is looked for in pictures of this size
COLOURS = ("red", "green", "blue")


def drift(pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Of uint8 pictures (N, C, H, W), each of the class or prompt labels (N,).

    brightness, contrast  mean and standard deviation of all values, in [0, 1]
    red, red_contrast     the same of one channel, likewise of green and blue, of pictures of three: a colour cast shows here alone
    saturation            mean of (largest - smallest) / largest over the channels; 0 for grey
    clipped               share of values that are 0 or 255
    sharpness             root mean square of the Laplacian of the grey picture, in [0, 1] units
    grid                  `grid_score`
    spread                root mean square deviation from the mean picture of the same label, at 8x8 pixels; nan where every label has one
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or len(pictures) != len(labels) or not len(pictures):
        raise ValueError(f"drift reads uint8 pictures (N, C, H, W) and N labels, got {pictures.dtype} {tuple(pictures.shape)} and "
                         f"{len(labels)} labels")
    x = pictures.float() / 255
    top = x.amax(1)
    colours = dict(zip(COLOURS, x.unbind(1), strict=True)) if x.shape[1] == len(COLOURS) else {}
    return {"brightness": float(x.mean()), "contrast": float(x.std(correction=0)),
            **{name: float(channel.mean()) for name, channel in colours.items()},
            **{f"{name}_contrast": float(channel.std(correction=0)) for name, channel in colours.items()},
            "saturation": float(((top - x.amin(1)) / top.clamp_min(1 / 255)).mean()),
            "clipped": float(((pictures == 0) | (pictures == 255)).float().mean()),
            "sharpness": float(_laplacian(x.mean(1, keepdim=True)).square().mean().sqrt()),
            "grid": grid_score(pictures), "spread": spread(x, labels)}


def _laplacian(grey: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=grey.device)
    return functional.conv2d(grey, kernel[None, None])


def grid_score(pictures: Tensor) -> float:
    """How far the power at the periods of patches and strides stands out, as ln of power over that of its neighbours; the largest.

    Rows and columns of each picture (N, C, H, W) are windowed and transformed; the powers at frequencies j/period are held against the
    frequencies just below and above; 0 is none. Periods with fewer than four repeats in a picture are left out, and nan is said where
    none is left.
    """
    grey = pictures.float().mean(1)
    found = [_stands_out(rows, period) for rows in (grey, grey.mT) for period in PERIODS if rows.shape[-1] >= REPEATS * period]
    return max(found, default=math.nan)


def _stands_out(rows: Tensor, period: int) -> float:
    """Of pictures (N, H, W) along their last axis."""
    width = rows.shape[-1] // period * period                                                    # so that j/period is a bin of its own
    rows = rows[..., :width] - rows[..., :width].mean(-1, keepdim=True)
    power = torch.fft.rfft(rows * torch.hann_window(width, periodic=True, device=rows.device)).abs().square().mean((0, 1))
    bins = [width * j // period for j in range(1, period // 2 + 1)]
    logs = (power + 1e-6 * power.mean() + 1e-12).log()
    top = len(power) - 1                                                                         # beyond it powers are mirrored
    return max(float(logs[b] - (logs[b - 2] + logs[min(b + 2, 2 * top - b - 2)]) / 2) for b in bins)        # a line fills b-1 .. b+1


def spread(x: Tensor, labels: Tensor) -> float:
    """Of pictures (N, C, H, W) in [0, 1]: see `drift`."""
    coarse = functional.adaptive_avg_pool2d(x, COARSE).flatten(1)
    squares, freedom = 0.0, 0
    for label in labels.unique():
        group = coarse[labels == label]
        squares += float((group - group.mean(0)).square().mean(1).sum())
        freedom += len(group) - 1
    return (squares / freedom) ** 0.5 if freedom else float("nan")


RATIOS = ("contrast", *(f"{name}_contrast" for name in COLOURS), "saturation", "sharpness", "spread")


def against(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """Ratios of contrast, saturation, sharpness and spread (1 is the teacher's), differences of the others; without what has no number.

    What only one of them has is left out: a teacher's numbers may have been kept by a run from before there were so many.
    """
    both = [name for name in student if name in teacher]
    ratios = {name: student[name] / teacher[name] for name in both if name in RATIOS and teacher[name] > 0}
    others = {name: student[name] - teacher[name] for name in both if name not in RATIOS}
    return {name: value for name, value in {**ratios, **others}.items() if math.isfinite(value)}
