"""The league: what a step costs, that equal budgets are equal, and that a folder is filled once, resumed, and told honestly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stepdistill import league
from stepdistill import recipe as recipes
from stepdistill.cli import run
from stepdistill.eval.report import compare
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


def test_four_calls_begin_where_the_recipe_does(tmp_path: Path):
    assert league.entry("fashion", "dmd2", tmp_path, 1000).recipe.student.times == pytest.approx((0.4, 0.3, 0.2, 0.1))
    assert league.entry("fashion", "lcm", tmp_path, 1000).recipe.student.times is None
    assert "dmd2_datafree" in league.known("fashion")
    assert not {"polish", "polish_4step"} & set(league.known("fashion"))


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
    assert league.members("fashion") == [name for name, method in METHODS.items() if not method.finishes]      # each has one
    with pytest.raises(ValueError, match="no method has a recipe for the world 'mars'"):
        league.members("mars")


TEACHERS = [("ddim", 1), ("ddim", 4)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs` and, of what is finished, `kept.v1`."""
    folder = tmp_path_factory.mktemp("league")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(league, "BASELINES", TEACHERS)
        league.play("fashion", folder / "runs", folder / "kept.v1", ["consistency", "dmd2"], 700, 50)
    return folder


@pytest.fixture(autouse=True)
def few_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(league, "BASELINES", TEACHERS)


def test_rows_and_page(played: Path):
    content = json.loads((played / "kept.v1.json").read_text())
    named = {(e["name"], e["calls"]) for e in content["entries"]}
    assert {("teacher:fashion, ddim", 1), ("teacher:fashion, ddim", 4)} < named
    assert {name for name, _ in named} == {"teacher:fashion, ddim", "consistency", "dmd2"}
    page = (played / "kept.v1.md").read_text()
    for e in content["entries"]:
        file = f"teachers/fashion/ddim_{e['calls']}.json" if "teacher:" in e["name"] else f"{e['name']}/{e['calls']}.json"
        assert e["metrics"] == json.loads((played / "kept.v1" / file).read_text())["metrics"]
        assert f"| {e['name']} | {e['calls']} |" in page
        if "passes" in e:
            assert 0.5 * 700 < e["passes"] < 1.5 * 700
            assert e["ill"] == []
            assert all(0.05 < e["drift"][name]["value"] < 20 for name in ("contrast", "spread"))
    assert "| contrast | spread |" in page
    assert (played / "kept.v1.png").stat().st_size > 5000
    assert "(kept.v1.png)" in page


def test_differences_are_the_reports(played: Path, tmp_path: Path):
    """What rows keep of the features, which stay behind, is what `compare` tells with them."""
    students = [played / f"runs/{name}/4.json" for name in ("consistency", "dmd2")]
    report = compare([played / "runs/teachers/fashion/ddim_4.json", *students], tmp_path)
    told = {e["name"]: e["difference"] for e in json.loads((played / "kept.v1.json").read_text())["entries"] if e["calls"] == 4}
    for row, name in zip(report["rows"][1:], ("consistency", "dmd2"), strict=True):
        assert told[name]["frechet_fashion"]["delta"] == pytest.approx(row["difference"]["frechet_fashion"]["delta"])
        assert told[name]["frechet_fashion"]["se"] == pytest.approx(row["difference"]["frechet_fashion"]["se"])


def test_nothing_is_done_twice_wherever_the_runs_have_gone(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {p: p.read_bytes() for p in [*played.glob("kept.v1/**/*.json"), played / "kept.v1.json", played / "kept.v1.md"]}
    monkeypatch.setattr(loop, "start", None)
    league.play("fashion", tmp_path / "elsewhere", played / "kept.v1", ["consistency", "dmd2"], 700, 50)
    assert before == {p: p.read_bytes() for p in before}
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="other terms"):
        league.play("fashion", tmp_path, played / "kept.v1", [], 800, 50)
    with pytest.raises(ValueError, match="no recipe fashion/nothing"):
        league.play("fashion", tmp_path, played / "kept.v1", ["nothing"], 700, 50)


def test_rows_wait_for_what_they_are_compared_with_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    monkeypatch.setattr(league, "BASELINES", [("ddim", 50), ("ddim", 4)])
    monkeypatch.setattr(league, "publish", lambda to: {})
    monkeypatch.setattr(league, "_row", lambda world, name, *rest: {"name": name})

    def score(model, exam, count, out, to, file, calls, solver):
        assert not (to / file).exists()
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        (to / file).touch()

    monkeypatch.setattr(league, "_score", score)
    league.play("fashion", tmp_path / "runs", tmp_path / "kept", ["dmd2"], 700, 50, say=done.append)
    assert done == ["fashion, ddim, 4 steps", "dmd2", "fashion, ddim, 50 steps"]


def test_the_command_names_the_page_it_wrote(played: Path, capfd: pytest.CaptureFixture[str]):
    kept = played / "kept.v1"
    assert run(["league", "consistency", "dmd2", "--out", str(played / "runs"), "--to", str(kept), "--budget", "700", "--count", "50"]) == 0
    said = capfd.readouterr().out.strip()
    assert said.endswith(f"rows in {played / 'kept.v1.md'}")


def test_an_interrupted_run_goes_on_and_a_failure_is_a_row(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, seen, kept = loop.start, [], tmp_path / "kept"
    shutil.copytree(played / "kept.v1", kept, ignore=shutil.ignore_patterns("consistency", "dmd2"))

    def interrupted(recipe, out):
        seen.append(recipe.steps)
        outcome = real(replace(recipe, checkpoint_every=1), out)
        raise KeyboardInterrupt if len(seen) == 1 else FloatingPointError(f"no finite gradient after {outcome.step}")

    monkeypatch.setattr(loop, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        league.play("fashion", tmp_path / "runs", kept, ["dmd2"], 700, 50)
    league.play("fashion", tmp_path / "runs", kept, ["dmd2"], 700, 50)
    assert len(seen) == 1, "the second call resumes"
    row = json.loads((kept / "dmd2/row.json").read_text())
    assert row["results"]["4"]["difference"]["frechet_fashion"], "the teacher's were made again"
    content = league.play("fashion", tmp_path / "runs", kept, ["consistency"], 700, 50)
    assert "no finite gradient" in content["failed"]["consistency"]["why"]
    assert next(r for r in league.rows(kept) if r["name"] == "consistency")["result"] is None
    page = (tmp_path / "kept.md").read_text()
    assert "failed: no finite gradient" in page
    assert (tmp_path / content["failed"]["consistency"]["log"]).stat().st_size
