"""Put tests/ on the path, so that every test file can `from oracles import ...` under --import-mode=importlib; an option and a mark for the
table of what diagnose finds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import confusion

from stepdistill.methods import METHODS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--confusion", type=Path, metavar="FILE", help="write what diagnose finds in every toy, as Markdown and JSON")


@pytest.fixture(autouse=True)
def judged(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that says it judges a method's toy has recorded one."""
    first = len(confusion.SEEN)
    yield
    healthy = {where for made, where, _ in confusion.SEEN[first:] if not made}
    for mark in request.node.iter_markers("judges"):
        assert METHODS[mark.args[0]].__name__ in healthy, f"no run of {mark.args[0]} was judged here"


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist is through."""
    confusion.SEEN.extend(tuple(row) for row in getattr(node, "workeroutput", {}).get("confusion", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["confusion"] = confusion.SEEN
    elif (path := session.config.getoption("--confusion")) is not None:
        confusion.write(path)
