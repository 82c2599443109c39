"""Captioned pictures from folders, WebDataset tars, parquet files and Hugging Face datasets: one shape for all, read when asked for."""

from __future__ import annotations

import functools
import io
import math
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from stepdistill.data import tables
from stepdistill.data.prompts import KEYS, captioned, decoded, objects, parsed, spoken
from stepdistill.images import from_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COLUMNS = ("image", "picture", "img", "jpg", "png", "webp")
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)     # what Pillow raises


@dataclass(frozen=True)
class Picture:
    """`where` names its file, and its member or row there; `read` returns the bytes of a picture file."""

    where: str
    caption: str
    read: Callable[[], bytes]

    def image(self, channels: int) -> Image.Image:
        """Grey for one channel, else RGB, turned as its camera says. Raises ValueError naming its place where it is damaged."""
        with self._opened() as file:
            return ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), turned as its camera says; no pixel is decoded. Raises as `image` does."""
        with self._opened() as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (file.width, file.height) if turned else (file.height, file.width)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(io.BytesIO(self.read())) as file:
                yield file
        except DAMAGED as error:
            raise ValueError(f"{self.where} cannot be read as a picture: {error}") from error


def nearest(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """The number of the bucket (H, W) to which a picture of this size (H, W) is cropped least.

    Of several with one aspect the largest that it need not be enlarged to; where it must be, the smallest.
    """
    def cost(number: int) -> tuple[float, bool, int]:
        height, width = buckets[number]
        small = size[0] < height or size[1] < width
        return abs(math.log(size[0] * width / (size[1] * height))), small, height * width * (1 if small else -1)

    return min(range(len(buckets)), key=cost)


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W): the middle of the picture in the aspect of `size` (H, W), resized with an antialiasing filter (Lanczos)."""
    side = min(image.width * size[0], image.height * size[1])
    crop = round(side / size[0]), round(side / size[1])                              # (width, height) of the target's aspect
    left, top = (image.width - crop[0]) // 2, (image.height - crop[1]) // 2
    return from_image(image.crop((left, top, left + crop[0], top + crop[1])).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def is_small(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether `fitted` enlarges it."""
    return image.height < size[0] or image.width < size[1]


def say_enlarged(small: Sequence[Picture], count: int, size: tuple[int, int]) -> None:
    """A line on standard error where some of `count` pictures were."""
    if small:
        tqdm.write(f"{len(small)} of {count} pictures are smaller than {size[1]}x{size[0]} and were enlarged, the first of them "
                   f"{small[0].where}", file=sys.stderr)


def tensors(pictures: Sequence[Picture], size: tuple[int, int], channels: int) -> Iterator[Tensor]:
    """`fitted` of each in turn; a line on standard error says at the end how many had to be enlarged."""
    small = []
    for picture in pictures:
        image = picture.image(channels)
        if is_small(image, size):
            small.append(picture)
        yield fitted(image, size)
    say_enlarged(small, len(pictures), size)


def read_pictures(path: Path) -> tuple[Picture, ...]:
    """Every captioned picture of `data.folder`, which is one of

    - a folder of picture files, with captions in a .txt beside each, or all in a metadata.jsonl of file_name and a key of KEYS;
    - WebDataset shards, one .tar or a folder of them in name order: 000.png with 000.txt or 000.json;
    - a table with a column of COLUMNS and one of KEYS: a .parquet, or a folder that `tables.find` reads.

    Raises FileNotFoundError or ValueError naming the file, and the line, member or row.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data.folder {path} does not exist")
    if path.is_file():
        readers = {".tar": _shard, ".parquet": _rows}
        if path.suffix not in readers:
            raise ValueError(f"data.folder {path}: the name of a file must end in {' or '.join(readers)}")
        found = list(readers[path.suffix](path))
    elif (path / "metadata.jsonl").is_file():
        found = list(_listed(path / "metadata.jsonl"))
    elif files := picture_files(path):
        found = [_beside(file) for file in files]
    elif shards := sorted(path.glob("*.tar")):
        found = [picture for shard in shards for picture in _shard(shard)]
    elif (path / tables.DICT).is_file() or (path / tables.STATE).is_file() or any(path.rglob("*.parquet")):
        found = list(_rows(path))
    else:
        found = []
    if not found:
        raise ValueError(f"data.folder {path} holds no pictures ({', '.join(SUFFIXES)}; .tar, .parquet or a dataset)")
    return tuple(found)


def picture_files(folder: Path) -> list[Path]:
    """The picture files of one folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _beside(file: Path) -> Picture:
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{file} has no caption: put it into {text.name} beside it, or all into {file.parent / 'metadata.jsonl'}")
    return Picture(str(file), spoken(decoded(text.read_bytes(), str(text)), str(text), "caption"), file.read_bytes)


def _listed(table: Path) -> Iterator[Picture]:
    folder = table.parent.resolve()
    for where, value in objects(table):
        name = value.get("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{where}: no file_name")
        file = table.parent / name
        if not file.is_file() or folder not in file.resolve().parents:
            raise ValueError(f"{where}: {name} is not in {table.parent}")
        yield Picture(str(file), spoken(captioned(value, where), where, "caption"), file.read_bytes)


def _shard(path: Path) -> Iterator[Picture]:
    """Members that share their name up to its first dot are one sample. Nothing is extracted: pictures are read where they lie."""
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if not stem or not member.isfile() or member.issparse():
                    continue
                key, kind = f"{folder}/{stem}", "." + kind.lower()
                if kind in SUFFIXES:
                    if key in pictures:
                        raise ValueError(f"{path}, {member.name}: a second picture beside {pictures[key].name}")
                    pictures[key] = member
                elif kind in (".txt", ".json"):
                    where = f"{path}, {member.name}"
                    text = decoded(_span(path, member.offset_data, member.size), where)
                    captions[key] = spoken(text if kind == ".txt" else captioned(parsed(text, where), where), where, "caption")
            if _span(path, tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):       # tarfile takes a cut header for the end
                raise tarfile.ReadError("it is cut short")
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}") from error
    for key, member in pictures.items():
        where = f"{path}, {member.name}"
        if key not in captions:
            raise ValueError(f"{where} has no caption: put a {key.rpartition('/')[2]}.txt or .json beside it")
        yield Picture(where, captions[key], functools.partial(_span, path, member.offset_data, member.size))


def _span(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _rows(path: Path) -> Iterator[Picture]:
    for table in tables.find(path):
        image, text = (tables.chosen(keys, table.columns, str(table.path)) for keys in (COLUMNS, KEYS))
        for row, caption in enumerate(table.values(text)):
            where = table.where(row)
            yield Picture(where, spoken(caption, where, "caption"), functools.partial(_cell, table, image, row))


def _cell(table: tables.Table, column: str, row: int) -> bytes:
    """The bytes of a cell: binary, or the pair of bytes and path that datasets keeps."""
    value = table.value(column, row)
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("the cell holds no bytes of a picture")
    return data
