"""Made results for the report and its page."""

from functools import partial

import pytest
from results import make_result, small_world

from stepdistill.eval import protocol


@pytest.fixture
def reference(monkeypatch) -> protocol.Reference:
    """What the report holds features against."""
    return small_world(monkeypatch)


@pytest.fixture
def made(tmp_path, reference):
    """make(stem, name, steps, shift, ...): see results.make_result."""
    return partial(make_result, tmp_path)
