"""The command line: exit codes, one JSON value on standard output, one line for every mistake."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import snapshot, tiny_file, tiny_recipe

from stepdistill import recipe as recipes
from stepdistill.cli import run
from stepdistill.methods import METHODS
from stepdistill.training import checkpoint, loop

COMMANDS = ("train", "sample", "export", "eval", "compare", "methods", "doctor", "bench")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file, its teacher and its pictures."""
    folder = tmp_path_factory.mktemp("world")
    tiny_file(folder, steps=2, method__fake_updates=2)
    return folder


def json_of(capfd: pytest.CaptureFixture[str]) -> Any:
    """The one JSON value on standard output, which holds nothing else."""
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def error_of(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line a mistake is answered with."""
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("stepdistill: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    return err.strip()


# ---- what the commands print and leave

def test_train_and_resume(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(out), "seed=3", "--json"]) == 0
    value = json_of(capfd)
    assert {k: v for k, v in value.items() if k != "seconds"} == {
        "folder": str(out), "step": 2, "steps": 2, "finished": True, "already": False, "skipped": 0}
    assert value["seconds"] > 0
    assert recipes.load(out / "recipe.yaml") == tiny_recipe(base, steps=2, seed=3)
    before = snapshot(out)
    assert run(["train", "--resume", str(out), "--json"]) == 0
    assert json_of(capfd)["already"] is True
    assert snapshot(out) == before
    assert run(["train", "--resume", str(out)]) == 0
    captured = capfd.readouterr()
    assert f"next: stepdistill export {out} --to FOLDER" in captured.out
    assert "is finished: 2 of 2 steps" in captured.err
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(out)]) == 2
    assert f"{out} is not empty: choose another --out, or continue it with --resume {out}" in error_of(capfd)
    assert snapshot(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_and_exits_with_130(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    original = loop.run_update

    def signalled(*args: Any) -> Any:
        signal.raise_signal(number)
        return original(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "run_update", signalled)
        assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(out), "method.fake_updates=1", "method.gan_weight=0",
                    "optim={student: {lr: 1e-3}, fake: {lr: 1e-3}}", "--json"]) == 130     # two updates, so two signals: the second at once
    capfd.readouterr()
    shutil.rmtree(out)

    def once(*args: Any) -> Any:
        monkeypatch.setattr(loop, "run_update", original)
        return signalled(*args)

    monkeypatch.setattr(loop, "run_update", once)
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(out), "--json"]) == 130
    captured = capfd.readouterr()
    value = json.loads(captured.out)
    assert (value["finished"], value["step"]) == (False, 1)
    assert f"stopped by {number.name} after step 1, saved; continue with: stepdistill train --resume {out}" in captured.err
    assert [p.name for p in checkpoint.listed(out / loop.CHECKPOINTS)] == ["step-00000001"]
    assert run(["train", "--resume", str(out), "--json"]) == 0
    assert json_of(capfd)["step"] == 2


def test_interrupting_before_the_loop_is_130_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "assemble", interrupted)
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 130
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_and_writes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(base)
    assert run(["train", "--config", str(base / "recipe.yaml"), "--dry-run", "--json"]) == 0
    value = json_of(capfd)
    assert set(value["bytes"]) == {"teacher", "student", "fake", "disc", "ema"}
    assert value["steps_per_iteration"] == 2
    assert value["passes"][0] == {"role": "student", "rows": 4, "gradient": "weights"}
    assert value["eta_seconds"] == pytest.approx(value["iteration_seconds"])
    assert run(["train", "--config", str(base / "recipe.yaml"), "--dry-run", "--out", str(tmp_path / "run")]) == 0
    text = capfd.readouterr().out
    assert "one iteration" in text
    assert "8 samples, gradient: none" in text
    assert not any(tmp_path.iterdir())
    assert snapshot(base) == before


def test_methods(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    rows = json_of(capfd)
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(set(row) == {"name", "title", "arxiv", "family", "data", "roles"} for row in rows)
    dmd2 = next(row for row in rows if row["name"] == "dmd2")
    assert (dmd2["arxiv"], dmd2["data"], dmd2["roles"]) == ("2405.14867", ["conditions", "images"], ["teacher", "student", "fake", "disc"])
    assert run(["methods"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(METHODS)
    assert all(line.startswith(name) for line, name in zip(lines, METHODS, strict=True))


def test_doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEPDISTILL_FASHION", str(tmp_path / "nowhere"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run(["doctor", "--json"]) == 0
    report = json_of(capfd)
    assert {"python", "stepdistill", "torch", "diffusers", "device", "threads", "attention", "xformers", "fashion data",
            "fashion teacher"} <= set(report)
    assert "math" in report["attention"]
    assert report["OMP_NUM_THREADS"] == "3"
    assert str(tmp_path / "nowhere") in report["fashion data"]               # what was named and does not work is said, not replaced
    assert "cannot be read" in report["fashion data"]
    assert run(["doctor"]) == 0
    assert "torch  " in capfd.readouterr().out


def test_bench_step(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "step", "--config", str(base / "recipe.yaml"), "--repeats", "1", "--json", "method.fake_updates=1"]) == 0
    value = json_of(capfd)
    assert {"iteration_seconds", "passes_seconds", "ratio", "passes"} <= set(value)
    assert value["ratio"] == pytest.approx(value["iteration_seconds"] / value["passes_seconds"])
    assert [p["role"] for p in value["passes"]] == ["student", "teacher", "fake", "fake"]


# ---- mistakes of the user: exit code 2, one line, nothing written

@pytest.mark.parametrize(("arguments", "words"), [
    (["train"], "name a recipe with --config ("),
    (["train", "--config", "fashion/dmd2"], "name a new folder for the run with --out"),
    (["train", "--config", "fashion/dmd22", "--out", "OUT"], "did you mean 'fashion/dmd2'?"),
    (["train", "--config", "nowhere.yaml", "--out", "OUT"], "no recipe at nowhere.yaml"),
    (["train", "--config", "RECIPE", "--out", "OUT", "stesp=3"], "unknown recipe key 'stesp'; did you mean 'steps'?"),
    (["train", "--config", "RECIPE", "--out", "OUT", "steps=soon"], "steps: Input should be a valid integer"),
    (["train", "--config", "RECIPE", "--out", "OUT", "steps=0"], "steps must be at least 1, got 0"),
    (["train", "--config", "RECIPE", "--out", "OUT", "method.name=gan"], "unknown method 'gan'"),
    (["train", "--config", "RECIPE", "--out", "OUT", "teacher.path=nowhere"], "nowhere: give a diffusers folder or the name of a shipped"),
    (["train", "--config", "RECIPE", "--out", "OUT", "data.folder=nowhere"], "nowhere does not exist"),
    (["train", "--config", "RECIPE", "--out", "OUT", "weights=bfloat16", "optim.student.lr=1e-6"], "it would never move"),
    (["train", "--config", "RECIPE", "--out", "FILE/run"], "Not a directory"),
    (["train", "--config", "RECIPE", "--out", "FILE"], "is not empty"),
    (["train", "--config", "RECIPE", "--resume", "OUT"], "--resume takes the recipe from the run folder"),
    (["train", "--resume", "OUT"], "is not a run: it has no recipe.yaml"),
    (["train", "--rsume", "OUT"], "No such option"),
    (["bench", "step"], "name a recipe with --config"),
    (["bench", "step", "--config", "RECIPE", "--repeats", "0"], "Invalid value for '--repeats'"),
    (["teach"], "No such command"),
])
def test_a_mistake_is_one_line_and_exit_code_2(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    arguments = [str(base / "recipe.yaml") if a == "RECIPE" else a for a in arguments]
    assert run(arguments) == 2
    assert words in error_of(capfd)
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]


def test_weights_that_cannot_be_read(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "diffusion_pytorch_model.safetensors"
    command = ["train", "--config", str(base / "recipe.yaml"), "--out", str(tmp_path / "run"), f"teacher.path={tmp_path / 'teacher'}"]
    for damage in (weights.read_bytes()[:1000], b"", b"PK\x03\x04 not safetensors at all"):
        weights.write_bytes(damage)
        assert run(command) == 2
        assert "cannot be read" in error_of(capfd)
    weights.unlink()
    assert run(command) == 2
    assert "holds no diffusion_pytorch_model*.safetensors" in error_of(capfd)
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_read(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "hat" / "0.png").write_bytes(b"not a picture")
    folder = tmp_path / "pictures"
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(tmp_path / "run"), f"data.folder={folder}"]) == 2
    assert f"{folder / 'hat' / '0.png'} cannot be read as a picture" in error_of(capfd)
    assert not (tmp_path / "run").exists()


# ---- faults that are not the user's: exit code 1

def test_a_run_that_diverges_is_one_line_and_exit_code_1(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capfd: pytest.CaptureFixture[str]) -> None:
    def diverged(*args: Any) -> None:
        raise FloatingPointError("10 critic updates in a row had no finite gradient")

    monkeypatch.setattr(loop, "start", diverged)
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert error_of(capfd) == "stepdistill: 10 critic updates in a row had no finite gradient"


def test_a_fault_of_ours_shows_where(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(loop, "start", broken)
    assert run(["train", "--config", str(base / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert "a bug" in err


# ---- help

def words_of(text: str) -> str:
    """Help without its boxes and line breaks."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(("arguments", "words"), [
    (["--help"], ("Turn any diffusers pipeline into a one-to-four-step one", *COMMANDS)),
    (["train", "--help"], ("Distil a teacher", "Ctrl-C saves", "--config", "--out", "--resume", "--dry-run", "--json", "KEY=VALUE")),
    (["export", "--help"], ("loads without stepdistill", "--to")),
    (["sample", "--help"], ("Make pictures", "--count", "--seed", "--steps", "--guidance", "--label", "--prompt")),
    (["eval", "--help"], ("Score a model", "--protocol", "--count", "--steps", "--to")),
    (["compare", "--help"], ("table", "quality-against-NFE", "--to")),
    (["methods", "--help"], ("List the distillation methods", "--json")),
    (["doctor", "--help"], ("Examine the environment", "--json")),
    (["bench", "--help"], ("Timings", "step")),
    (["bench", "step", "--help"], ("Time an iteration against the bare network passes", "--config", "--repeats")),
])
def test_help_says_what_a_command_does(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                       words: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(arguments) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(word in words_of(out) for word in words), out


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_no_command_at_all_shows_the_help(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 2
    out, err = capfd.readouterr()
    assert "Usage" in out + err
    assert (out + err).count("\n") > 5                                       # readable, not squeezed into one line
