"""The judge that ships, and what it was found to be worth."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from stepdistill.worlds.emoji import data, judge, text


def test_it_was_found_to_judge() -> None:
    """The stored validation: retrieval far above chance, and every way of spoiling pictures costs more the further it goes."""
    told = json.loads((judge.FOLDER / judge.CONFIG).read_text())
    found = told["validation"]
    assert told["held_out_names"] > 150
    assert found["trained"]["retrieval_top1"] > 0.8
    assert found["clean"]["retrieval_top1"] > 0.2 > 20 / told["held_out_names"]
    for side in ("trained", "clean"):
        assert found[side]["alignment"] > found[side]["alignment_shuffled"] + 0.15
    for how in ("blur", "noise", "colour"):
        course = [found["clean"], *(found[f"{how} {strength}"] for strength in (1, 2, 3))]
        assert all(a["alignment"] > b["alignment"] for a, b in pairwise(course))
        assert all(a["frechet"] < b["frechet"] for a, b in pairwise(course))


def test_pictures_align_with_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (*data.PACKAGES, text.PACKAGE):
        pytest.importorskip(module)
    monkeypatch.delenv(text.ENVIRONMENT, raising=False)
    names = ("tomato", "cat face", "flag: Japan", "green apple", "rocket")
    chosen = {e.name: e for e in data.emojis()}
    pictures = data.pictures([chosen[name] for name in names], quiet=True)
    net = judge.load()
    own = net.alignment(pictures, names)
    assert own.shape == (5,)
    assert float(own.mean()) > float(net.alignment(pictures, names[1:] + names[:1]).mean()) + 0.3
    assert torch.equal(net.of_pictures(net.features(data.to_model(pictures))).norm(dim=1) > 0.999, torch.ones(5, dtype=torch.bool))
