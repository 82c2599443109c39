"""Layouts, and calls built from a wiring."""

import math

import pytest
import torch

from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.models.wiring import (
    FromClock,
    FromCondition,
    FromSample,
    FromScale,
    Layout,
    Static,
    Unrecordable,
    Wiring,
    at,
    leaves_of,
    same,
)


def order(shape):
    return torch.arange(math.prod(shape)).reshape(shape)


@pytest.mark.parametrize(("how", "source", "make"), [
    ("same", (4, 2, 3), lambda x: x),
    ("singles", (4, 2, 3), lambda x: x[:, None]),
    ("squeezed", (4, 1, 3), lambda x: x[:, 0]),
    ("slice", (8, 2, 3), lambda x: x[:4]),
    ("slice", (6, 5), lambda x: x[:, :2]),
    ("gather", (4, 2, 3), lambda x: x.flip(0)),
    ("gather", (4, 2, 2), lambda x: x.permute(1, 2, 0).reshape(4, 4)),
])
def test_a_layout_is_recognised_and_repeats_the_arrangement(how, source, make):
    target = make(order(source))
    layout = Layout.of(target.flatten(), source, tuple(target.shape))
    rows = torch.randn(3, *source)
    assert layout.how == how
    assert torch.equal(layout(rows, target.shape), torch.stack([make(row) for row in rows]))


def test_what_the_condition_brings_is_put_behind_the_sample():
    target = torch.full((9, 2), -1)
    target[:4] = order((4, 2))
    layout = Layout.of(target.flatten(), (4, 2), (9, 2))
    x, rest = torch.randn(3, 4, 2), torch.randn(3, 9, 2)
    assert layout.how == "cat"
    assert torch.equal(layout(x, (), rest), torch.cat([x, rest[:, 4:]], 1))


def test_a_scattered_sample_is_refused():
    target = torch.tensor([0, -1, 1, -1, 2, 3])
    with pytest.raises(Unrecordable, match="scattered"):
        Layout.of(target, (4,), (6,))


def test_only_a_gather_is_bound_to_its_size():
    wide = order((4, 6))
    assert Layout.of(wide[:2].flatten(), (4, 6), (2, 6))(torch.randn(1, 4, 99), (2, 99)).shape == (1, 2, 99)
    with pytest.raises(ValueError, match="record the pipeline at this size"):
        Layout.of(wide.flip(0).flatten(), (4, 6), (4, 6))(torch.randn(1, 4, 99))


def test_a_call_is_put_together_from_its_leaves():
    wiring = Wiring({"sample": FromSample(Layout(), True), "clock": FromClock("1000sigma", -0.001, 1.0, ()), "switch": Static(False),
                     "extra": {"text": FromCondition("extra.text"), "ids": (FromCondition("extra.ids", shared=True),)},
                     "folded": FromCondition("folded", rows=2), "guidance": FromScale(1000.0, 0.0, ())}, Layout(), -1.0)
    cond = {"extra.text": torch.randn(2, 5), "extra.ids": torch.arange(3), "folded": torch.randn(2, 2, 7)}
    x_t, t = torch.randn(2, 4), torch.tensor([0.25, 0.5], dtype=torch.float64)
    call = wiring.call(x_t, t, cond, Flow(), 3.5, torch.float32)
    assert [torch.equal(row, x) for row, x in zip(call["sample"], x_t, strict=True)] == [True, True]
    assert torch.allclose(call["clock"], torch.tensor([0.75, 0.5]))
    assert call["clock"].dtype == torch.float32
    assert call["switch"] is False
    assert torch.equal(call["extra"]["text"], cond["extra.text"])
    assert isinstance(call["extra"]["ids"], tuple)
    assert torch.equal(call["extra"]["ids"][0], torch.arange(3))
    assert torch.equal(call["folded"], cond["folded"].flatten(0, 1))
    assert torch.equal(call["guidance"], torch.tensor([3500.0, 3500.0]))
    assert wiring.embeds
    assert torch.equal(wiring.read((x_t,), x_t), -x_t)
    assert wiring.shared == {"extra.ids"}


def test_one_python_number_for_a_batch_of_several_times_is_an_error():
    wiring = Wiring({"t": FromClock("index", 1.0, 0.0, None)}, Layout(), 1.0)
    process = TableVP.scaled_linear()
    assert wiring.call(torch.zeros(2, 1), torch.tensor([0.5, 0.5]), {}, process, 1.0, torch.float32)["t"] == pytest.approx(499)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        wiring.call(torch.zeros(2, 1), torch.tensor([0.5, 0.6]), {}, process, 1.0, torch.float32)


def test_a_time_for_every_token_takes_its_length_from_the_condition():
    wiring = Wiring({"t": FromClock("t", 1.0, 0.0, (6,), "t")}, Layout(), 1.0)
    call = wiring.call(torch.zeros(2, 1), torch.tensor([0.5, 0.25]), {"t": (9,)}, Flow(), 1.0, torch.float32)
    assert call["t"].shape == (2, 9)
    assert torch.equal(call["t"][:, 0], torch.tensor([0.5, 0.25]))
    assert wiring.shared == {"t"}


def test_leaves_of_a_condition_are_read_off_the_rows_of_their_branch():
    wiring = Wiring({"text": FromCondition("text"), "deep": {"frames": FromCondition("deep.frames", axis=1, rows=2)},
                     "list": FromCondition("list")}, Layout(), 1.0)
    text, frames = torch.randn(4, 3), torch.randn(5, 8)
    found = wiring.condition({"text": text, "deep": {"frames": frames}, "list": ["a", "b", "c", "d"]}, 1, 2, 2)
    assert torch.equal(found["text"], text[2:])
    assert found["list"] == ("c", "d")
    assert found["deep.frames"].shape == (2, 2, 5)
    assert torch.equal(found["deep.frames"][0, 1], frames[:, 5])


def test_paths_and_equality_of_nestings():
    tree = {"a": (1, {"b": torch.ones(2)}), "c": None}
    assert dict(leaves_of(tree))["a.1.b"] is tree["a"][1]["b"]
    assert at(tree, "a.1.b") is tree["a"][1]["b"]
    assert at(tree, "a.1.x") is None
    assert at(tree, "c.d") is None
    assert same(tree, {"a": (1, {"b": torch.ones(2)}), "c": None})
    assert not same(tree, {"a": (1, {"b": torch.zeros(2)}), "c": None})
    assert not same(torch.ones(2), torch.ones(2).double())
