"""A model card's figures are those of the stored results, or say that there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepdistill import worlds
from stepdistill.worlds.cards import MARK, NONE, filled

CARD = "| error | <!-- vae.json: a/b 1: .3f -->1.234<!-- --> of <!-- other.json: n: ,d -->7<!-- --> |"


def test_figures_come_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "vae.json").write_text(json.dumps({"a": {"b 1": 0.03456}}))
    once = filled(CARD, tmp_path)
    assert once == f"| error | <!-- vae.json: a/b 1: .3f -->0.035<!-- --> of <!-- other.json: n: ,d -->{NONE}<!-- --> |"
    (tmp_path / "other.json").write_text('{"n": 12000}')
    assert filled(once, tmp_path).endswith("-->12,000<!-- --> |")


@pytest.mark.parametrize("content", [{}, {"a": 1}, {"a": {"b 1": "good"}}])
def test_a_result_without_the_number_is_an_error(content: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "vae.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"vae\.json holds no number at a/b 1"):
        filled(CARD, tmp_path)


def test_the_emoji_card_says_what_is_stored() -> None:
    folder = worlds.FOLDER / "emoji"
    card = (folder / "README.md").read_text()
    assert len(MARK.findall(card)) > 20
    assert filled(card, folder) == card, "run: python scripts/fill_card.py stepdistill/worlds/emoji"
