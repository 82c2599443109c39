"""Put tests/ on the path, so that every test file can `from oracles import ...` under --import-mode=importlib; and one option."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import confusion


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--confusion", type=Path, metavar="FILE", help="write what diagnose finds in every toy, as Markdown and JSON")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist is through."""
    confusion.SEEN.extend(tuple(row) for row in getattr(node, "workeroutput", {}).get("confusion", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["confusion"] = confusion.SEEN
    elif (path := session.config.getoption("--confusion")) is not None:
        confusion.write(path)
