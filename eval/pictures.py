"""Pictures to be judged, wherever they are: in memory, in a folder, in the parts of an evaluation. And what a protocol does to each first.

Sets may be larger than the memory, so they are read a few rows at a time. A protocol's crop and filter are Pillow's, on 8 bits, the same
for real pictures and made ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stepdistill.data.pictures import DAMAGED, SUFFIXES
from stepdistill.images import from_image, to_image

SHEET = "grid.png"                                      # what `stepdistill sample` lays beside its pictures
PATCH = 299                                             # side of the middle that patch FID looks at: Inception's own, so nothing is resized
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "box": Image.Resampling.BOX}


@dataclass(frozen=True)
class Pictures:
    """`count` uint8 pictures (C, H, W); `read` gives some of them. Real ones may differ in size."""

    count: int
    read: Callable[[range], Sequence[Tensor]]

    @classmethod
    def of(cls, images: Tensor) -> Pictures:
        """Of pictures in memory, (N, C, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"pictures must be a uint8 tensor (N, C, H, W), got {images.dtype} {tuple(images.shape)}: quantise them first")
        return cls(len(images), lambda rows: list(images[rows.start : rows.stop]))

    def part(self, start: int, stop: int) -> Pictures:
        """Those from `start` to below `stop`."""
        return Pictures(stop - start, lambda rows: self.read(range(start + rows.start, start + rows.stop)))

    def first(self, count: int) -> Tensor:
        """The first ones of one size, (n, C, H, W)."""
        return torch.stack(list(self.read(range(min(count, self.count)))))


# ------------------------------------------------------------------------------------------------------------------------------- folders


def files_in(folder: Path, nested: bool = False) -> list[Path]:
    """The picture files of a folder in the order of their names, without the sheet of `stepdistill sample`.

    `nested` also takes a folder whose pictures lie in its subfolders (of classes or categories), one level down, in the order of the
    subfolders' names and then of theirs. Raises FileNotFoundError for no folder, ValueError for one without pictures, and for one that has
    some itself and others in subfolders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name one that holds pictures")
    own = _flat(folder)
    if own and not nested:
        return own
    inner = {path: found for path in sorted(folder.iterdir())
             if path.is_dir() and not path.name.startswith(".") and (found := _flat(path))}
    if nested and own and inner:
        raise ValueError(f"{folder} holds {len(own):,} pictures itself and others in {next(iter(inner)).name}: name a folder that holds "
                         "either pictures or folders of them")
    if not nested and inner:
        raise ValueError(f"{folder} holds no pictures itself, and those in {next(iter(inner)).name} have no place in the order of samples: "
                         "put picture i of sample i into one folder")
    if found := own + [path for each in inner.values() for path in each]:
        return found
    raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})" + " and no folders of them" * nested)


def _flat(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in SUFFIXES and path.name != SHEET and not path.name.startswith("."))


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 over the digests of files, in their order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def made(files: Sequence[Path], count: int) -> Pictures:
    """The first `count` files as pictures of a model: PNG, of one size, grey or RGB. ValueError with the remedy where they are not.

    All headers are read at once, pixels when they are asked for.
    """
    if len(files) < count:
        raise ValueError(f"{files[0].parent} holds {len(files):,} pictures and {count:,} are wanted: make more, or lower --count (scores "
                         "of unequal counts are never compared)")
    files, seen = files[:count], None
    for path in files:
        with _opened(path) as image:
            if image.format != "PNG":
                raise ValueError(f"{path} is {image.format}, and what that loses moves every score: save the model's pictures as PNG")
            if image.mode not in ("L", "RGB"):
                raise ValueError(f"{path} is a PNG of mode {image.mode}: save pictures as grey or RGB of 8 bits")
            seen = seen or (image.size, image.mode)
            if (image.size, image.mode) != seen:
                raise ValueError(f"{path} is {_told(image.size, image.mode)}, {files[0].name} {_told(*seen)}: all pictures must be alike")
    return Pictures(count, lambda rows: [_pixels(path) for path in files[rows.start : rows.stop]])


def real(files: Sequence[Path]) -> Pictures:
    """Real pictures of any size and kind that Pillow reads, grey or as RGB."""
    return Pictures(len(files), lambda rows: [_pixels(path) for path in files[rows.start : rows.stop]])


def _told(size: tuple[int, int], mode: str) -> str:
    return f"{size[0]}x{size[1]} {'grey' if mode == 'L' else mode}"


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _pixels(path: Path) -> Tensor:
    with _opened(path) as image:
        try:
            return from_image(image if image.mode == "L" else image.convert("RGB"))
        except DAMAGED as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error


# --------------------------------------------------------------------------------------------------------------- on their way to a judge


def whole(picture: Tensor, crop: str, size: int, by: str) -> Tensor:
    """A picture (C, H, W) as a protocol wants it: `crop` "centre" cuts it to its short side, `size` is then the side it gets by the filter
    `by` (a key of FILTERS; 0: it stays as it is).

    Raises ValueError for one smaller than `size`, which no protocol enlarges.
    """
    height, width = picture.shape[1:]
    side = min(height, width)
    if crop == "centre":
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[:, top : top + side, left : left + side]
    if not size or picture.shape[1:] == (size, size):
        return picture
    if side < size:
        raise ValueError(f"a picture is {width}x{height} and the protocol looks at {size}x{size}: make larger ones")
    return from_image(to_image(picture).resize((size, size), FILTERS[by]))


def shrunk(picture: Tensor, size: int, by: str) -> Tensor:
    """A picture (C, H, W) whose short side is `size` at most, by a filter of FILTERS; smaller ones stay as they are, all do for 0."""
    height, width = picture.shape[1:]
    side = min(height, width)
    if not 0 < size < side:
        return picture
    return from_image(to_image(picture).resize((round(width * size / side), round(height * size / side)), FILTERS[by]))


def patch(picture: Tensor) -> Tensor:
    """The middle PATCH x PATCH pixels of a picture (C, H, W) as they are; what is missing of a smaller one is mirrored at its edges."""
    missing = [max(0, PATCH - size) for size in picture.shape[1:]]
    if any(missing):
        if any(-(-gap // 2) >= size for gap, size in zip(missing, picture.shape[1:], strict=True)):
            raise ValueError(f"a picture of {picture.shape[2]}x{picture.shape[1]} is too small for a patch of {PATCH}x{PATCH}")
        (down, across) = ((gap // 2, gap - gap // 2) for gap in missing)
        picture = functional.pad(picture[None].float(), (*across, *down), mode="reflect")[0].to(torch.uint8)
    top, left = ((size - PATCH) // 2 for size in picture.shape[1:])
    return picture[:, top : top + PATCH, left : left + PATCH]


def together(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of one size as a batch (N, C, H, W); grey ones among coloured ones are repeated."""
    channels = max(len(picture) for picture in pictures)
    return torch.stack([picture.expand(channels, -1, -1) for picture in pictures])
