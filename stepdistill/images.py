"""PNG files and grids of uint8 pictures (N, C, H, W)."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_image(picture: Tensor) -> Image.Image:
    """One uint8 picture (C, H, W), C 1 or 3."""
    array = picture.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def from_image(image: Image.Image) -> Tensor:
    """uint8 (C, H, W) of a picture of 8 bits a channel: the inverse of `to_image`."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def grid(pictures: Tensor, columns: int, scale: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures in rows of `columns` on white; small ones are enlarged without smoothing so that each is about 64 pixels or more."""
    n, c, h, w = pictures.shape
    scale = scale or max(1, -(-56 // min(h, w)))
    pictures = pictures.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    h, w, rows = h * scale, w * scale, -(-n // columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = picture
    return to_image(sheet)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
