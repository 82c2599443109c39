"""Conditions: named leaves with a batch axis, and the null that travels with them."""

import pytest
import torch

from stepdistill.models.conditioning import Conditioning


def labels(*values: int, null: int | None = 9) -> Conditioning:
    nulls = None if null is None else {"class_labels": torch.full((len(values),), null)}
    return Conditioning({"class_labels": torch.tensor(values)}, nulls)


def test_is_a_mapping_of_leaves():
    cond = Conditioning({"a": torch.zeros(2, 3), "b": torch.ones(2)})
    assert list(cond) == ["a", "b"]
    assert len(cond) == 2
    assert dict(**cond)["b"].tolist() == [1, 1]
    assert len(Conditioning()) == 0


def test_null_keeps_the_shared_leaves():
    cond = Conditioning({"text": torch.ones(2, 3), "size": torch.full((2,), 64.0)}, {"text": torch.zeros(2, 3)})
    assert not cond.null["text"].any()
    assert cond.null["size"].tolist() == [64, 64]
    assert not cond.null.null["text"].any()
    with pytest.raises(ValueError, match="use guidance 1"):
        Conditioning({"text": torch.ones(2, 3)}).null  # noqa: B018


def test_slice_takes_nulls_along():
    cond = labels(1, 2, 3).slice(slice(1, 3))
    assert cond["class_labels"].tolist() == [2, 3]
    assert cond.null["class_labels"].tolist() == [9, 9]
    assert labels(1, 2, 3).slice(torch.tensor([2, 0]))["class_labels"].tolist() == [3, 1]


def test_cat():
    both = labels(1, 2).cat(labels(3, null=7))
    assert both["class_labels"].tolist() == [1, 2, 3]
    assert both.null["class_labels"].tolist() == [9, 9, 7]
    assert labels(1, null=None).cat(labels(2, null=None)).nulls is None
    halves = labels(1, 2).cat(labels(1, 2).null)                                                    # what guidance asks of the network
    assert halves["class_labels"].tolist() == [1, 2, 9, 9]


def test_cat_where_only_one_side_names_a_null_leaf():
    a = Conditioning({"text": torch.ones(1), "size": torch.ones(1)}, {"text": torch.zeros(1)})
    b = Conditioning({"text": torch.ones(1), "size": torch.full((1,), 2.0)}, {"text": torch.zeros(1), "size": torch.full((1,), 5.0)})
    assert a.cat(b).null["size"].tolist() == [1, 5]


@pytest.mark.parametrize("other", [labels(1, null=None), Conditioning({"text": torch.zeros(1)}), Conditioning()])
def test_cat_refuses_different_conditions(other):
    with pytest.raises(ValueError, match="cannot be joined"):
        labels(1).cat(other)


def test_to_keeps_precision():
    cond = Conditioning({"a": torch.zeros(2, dtype=torch.float64)}, {"a": torch.ones(2, dtype=torch.float64)}).to("meta")
    assert cond["a"].device.type == "meta"
    assert cond.null["a"].device.type == "meta"
    assert cond["a"].dtype == torch.float64


def test_errors():
    with pytest.raises(ValueError, match="share their batch size"):
        Conditioning({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="share their batch size"):
        Conditioning({"a": torch.zeros(2)}, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lacks: \['b'\]"):
        Conditioning({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
