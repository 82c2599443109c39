"""The league: what a step costs, that equal budgets are equal, and that a folder is filled once, resumed, and told honestly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stepdistill import league
from stepdistill import recipe as recipes
from stepdistill.methods import METHODS
from stepdistill.training import loop


def test_cost_of_a_step_by_hand():
    """dmd2 without GAN, one call, guided, two critics a student: student 3, teacher 2, fake 1; critics 3 each; one more student pass."""
    chosen = recipes.load("fashion/dmd2_datafree")
    assert league.cost(chosen) == pytest.approx((3 + 2 + 1 + 2 * 3 + 1) / 2)
    sid = replace(chosen, method={"name": "sid"})                 # through both scores: student 3, teacher 2·2, fake 2; critic 1 and 3
    assert league.cost(sid) == pytest.approx(3 + 2 * 2 + 2 + 1 + 3)


def test_steps_pay_the_budget(tmp_path: Path):
    part = league.entry("fashion", "dmd2", tmp_path, 100_000)
    assert part.recipe.steps * part.recipe.batch_size * part.cost == part.passes == pytest.approx(100_000, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_pairs_are_paid_for_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sixth of the budget, ten guided steps each; the second time makes none."""
    first = league.entry("fashion", "dmd", tmp_path, 1200)
    assert first.paired == 200 == 10 * 2 * json.loads((tmp_path / "pairs/pairs.json").read_text())["count"]
    assert first.passes == pytest.approx(1200, rel=0.2)
    assert (first.recipe.student.steps, first.recipe.student.times) == (1, (0.4,))
    assert first.cost == pytest.approx(3 * 2 + 2 + 1 + 3)         # student on noise and pairs; guided teacher, fake; critic
    monkeypatch.setattr("stepdistill.data.pairs._pairs", None)
    assert league.entry("fashion", "dmd", tmp_path, 1200) == first


def test_members_are_methods_with_a_recipe():
    assert {"dmd2", "consistency"} <= set(league.members("fashion")) <= set(METHODS) - {"polish"}
    with pytest.raises(ValueError, match="no method has a recipe for the world 'mars'"):
        league.members("mars")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("league") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(league, "BASELINES", [("ddim", 1), ("ddim", 4)])
        league.play("fashion", out, ["consistency", "dmd2"], 700, 50)
    return out


def test_rows_and_page(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(league, "BASELINES", [("ddim", 1), ("ddim", 4)])
    content = league.publish(played, tmp_path / "docs")
    named = {(e["name"], e["calls"]) for e in content["entries"]}
    assert {("teacher, ddim", 1), ("teacher, ddim", 4)} < named
    assert {name for name, _ in named} == {"teacher, ddim", "consistency", "dmd2"}
    page = (tmp_path / "docs/league.md").read_text()
    for e in content["entries"]:
        file = f"teacher/ddim_{e['calls']}.json" if "teacher" in e["name"] else f"{e['name']}/{e['calls']}.json"
        assert e["metrics"] == json.loads((played / file).read_text())["metrics"]
        assert f"| {e['name']} | {e['calls']} |" in page
        if "passes" in e:
            assert 0.5 * 700 < e["passes"] < 1.5 * 700
            assert set(e["difference"]) >= {"frechet_fashion"}
    assert (tmp_path / "docs/league.png").stat().st_size > 5000


def test_nothing_is_done_twice(played: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(league, "BASELINES", [("ddim", 1), ("ddim", 4)])
    before = {p: p.stat().st_mtime_ns for p in played.rglob("*.json") if p.name != "league.json"}
    monkeypatch.setattr(loop, "start", None)
    league.play("fashion", played, ["consistency", "dmd2"], 700, 50)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(ValueError, match="other terms"):
        league.play("fashion", played, [], 800, 50)
    with pytest.raises(ValueError, match="no recipe fashion/nothing"):
        league.play("fashion", played, ["nothing"], 700, 50)


def test_an_interrupted_run_goes_on_and_a_failure_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(league, "BASELINES", [])
    real, seen = loop.start, []

    def interrupted(recipe, out):
        seen.append(recipe.steps)
        outcome = real(replace(recipe, checkpoint_every=1), out)
        raise KeyboardInterrupt if len(seen) == 1 else FloatingPointError(f"no finite gradient after {outcome.step}")

    monkeypatch.setattr(loop, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        league.play("fashion", tmp_path, ["dmd2"], 300, 50)
    league.play("fashion", tmp_path, ["dmd2"], 300, 50)
    assert len(seen) == 1, "the second call resumes"
    assert json.loads((tmp_path / "dmd2/row.json").read_text())["results"]
    league.play("fashion", tmp_path, ["consistency"], 300, 50)
    assert "no finite gradient" in json.loads((tmp_path / "consistency/row.json").read_text())["failed"]
    assert next(r for r in league.rows(tmp_path) if r["name"] == "consistency")["result"] is None
