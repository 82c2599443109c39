"""A method of another package, named by its dotted path, from the command line to plain diffusers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ADAM, tiny_tree

from stepdistill.cli import run
from stepdistill.methods import find

METHOD = '''
"""Regress the student's one call on the teacher's."""
from dataclasses import dataclass

from stepdistill.diffusion.sampler import one_call
from stepdistill.losses.distance import l2
from stepdistill.methods.base import Loss, Method
from stepdistill.models.roles import Role


@dataclass(frozen=True)
class Options:
    scale: float = 2.0


class Copy(Method[Options]):
    title, arxiv, family = "Copy of the teacher", "0000.00000", "trajectory"
    Config = Options

    @classmethod
    def needs(cls, cfg):
        return {"teacher": Role(), "student": Role(trains=True)}

    def sampler(self):
        return self.setup.sampler

    def student_loss(self, m, batch, draws):
        cond = batch["main"].cond
        call = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True)
        return Loss(self.cfg.scale * l2(call.x0, m.teacher(call.pred.x_t, call.t, cond).x0.detach()).mean())


class Nameless(Method[Options]):
    Config = Options


class Loose(Copy):
    Config = dict
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package that this one has never heard of."""
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "__init__.py").touch()
    (tmp_path / "somebodys" / "copying.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("somebodys", "somebodys.copying"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "somebodys.copying"


def test_it_trains_resumes_and_exports(package: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = tiny_tree(tmp_path, steps=2)
    tree["method"], tree["optim"] = {"name": f"{package}:Copy", "scale": 3.0}, {"student": ADAM}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert run(["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["finished"] is True
    assert run(["train", "--resume", str(tmp_path / "run"), "--json"]) == 0
    assert run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "student"), "--json"]) == 0
    assert "Copy of the teacher" in (tmp_path / "student" / "README.md").read_text()
    capfd.readouterr()
    assert run(["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "other"), "method.scales=1"]) == 2
    assert "did you mean 'scale'?" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("nobodys.copying:Copy", "No module named 'nobodys'; install the package that holds it"),
    (".copying:Copy", "install the package"),
    (":Copy", "install the package"),
    ("somebodys.copying:Kopy", "has no subclass of stepdistill.methods.base.Method called 'Kopy'"),
    ("somebodys.copying:Options", "has no subclass"),
    ("somebodys.copying:Nameless", "Nameless lacks title, arxiv, family"),
    ("somebodys.copying:Loose", "Loose.Config must be a dataclass"),
])
def test_what_is_no_method_is_told_in_one_line(package: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"method\.name") as error:
        find(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
