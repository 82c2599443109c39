"""Exams while training: what the log says, which checkpoint is kept, and that training does not notice; and the hooks they hang on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import final_tensors, log_lines, snapshot, tiny_file, tiny_recipe, tiny_run, unequal
from torch import Tensor

from stepdistill import recipe as recipes
from stepdistill.cli import run as command
from stepdistill.diagnose import mismatch
from stepdistill.eval import exam, metrics, protocol, score
from stepdistill.eval.exam import examine
from stepdistill.eval.extractors import EXTRACTORS, Tiny, extract
from stepdistill.eval.generate import generate
from stepdistill.eval.models import open_model
from stepdistill.export import export
from stepdistill.training import checkpoint, loop
from stepdistill.training.assemble import assemble
from stepdistill.training.loop import State

DATA_FREE = {"method__gan_weight": 0}
OPTIONS: dict[str, Any] = {**DATA_FREE, "steps": 6, "checkpoint_every": 2, "keep": 1, "exam": {"every": 2, "count": 50}}
NAMES = ("frechet_tiny_teacher", "kid_tiny_teacher")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was examined three times, beside its teacher."""
    folder = tmp_path_factory.mktemp("world")
    assert loop.start(tiny_recipe(folder, **OPTIONS), folder / "run", (examine,)).finished
    return folder


def exams(run: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(run) if any(key.startswith("exam") for key in line)]


def kept(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The one checkpoint in RUN/best."""
    (path,) = (run / "best").iterdir()
    return checkpoint.read(path)


# ---- hooks

def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loop fails when it reaches a step, once."""
    original, waiting = loop.run_update, [True]

    def spy(run: Any, now: int, *args: Any) -> Any:
        if now == step and waiting:
            waiting.clear()
            raise RuntimeError("crash")
        return original(run, now, *args)

    monkeypatch.setattr(loop, "run_update", spy)


def test_a_hook_sees_every_step_and_its_notes_survive(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count after step 3 is lost with the crash, that after step 2 is in the checkpoint."""
    seen: list[tuple[int, bool]] = []

    def count(done: int, state: State) -> None:
        seen.append((done, state.last))
        state.notes["count"] = state.notes.get("count", 0) + 1
        state.log({"count": float(state.notes["count"])})

    crash_at(monkeypatch, 3)
    recipe = tiny_recipe(base, **DATA_FREE, steps=4)
    with pytest.raises(RuntimeError, match="crash"):
        loop.start(recipe, tmp_path / "run", (count,))
    assert loop.resume(tmp_path / "run", (count,)).finished
    assert seen == [(1, False), (2, False), (3, False), (3, False), (4, True)]
    assert checkpoint.newest(tmp_path / "run" / loop.CHECKPOINTS)[1]["notes"] == {"count": 4}            # type: ignore[index]
    assert [(line["step"], line["count"]) for line in log_lines(tmp_path / "run") if "count" in line] == [(i, i + 1) for i in range(4)]


# ---- what is said

def test_the_log_has_the_average_and_the_raw_weights(base: Path) -> None:
    lines = exams(base / "run")
    assert [line["step"] for line in lines] == [1, 3, 5]
    wanted = {f"{kind}/{name}{end}" for kind in ("exam", "exam_raw") for name in NAMES for end in ("", "_se")}
    assert all(set(line) == {"step", *wanted} for line in lines)
    assert all(line[f"{kind}/{name}_se"] > 0 for line in lines for kind in ("exam", "exam_raw") for name in NAMES)
    assert len({line["exam/kid_tiny_teacher"] for line in lines}) == 3


@pytest.mark.parametrize(("weights", "kind"), [("ema", "exam"), ("raw", "exam_raw")])
def test_the_scores_are_those_of_the_exported_student(base: Path, tmp_path: Path, weights: Any, kind: str) -> None:
    """Opened from its folder, sampled with the exam's seed, and held against the teacher's kept features by the plain formulas."""
    export(base / "run", tmp_path / "student", weights)
    opened = open_model(str(tmp_path / "student"))
    features, _ = extract(Tiny(), generate(opened.teacher, opened.spec, 50, 1_000_000, batch_size=4, quiet=True).images, 50)
    reference = load_file(base / "run" / "exam" / "teacher.safetensors")["features"]
    last = exams(base / "run")[-1]
    assert last[f"{kind}/kid_tiny_teacher"] == pytest.approx(metrics.kid(features, reference), rel=1e-4)
    distance = metrics.frechet(metrics.Moments.of(features), metrics.Moments.of(reference))
    assert last[f"{kind}/frechet_tiny_teacher"] == pytest.approx(distance, rel=1e-4)


def test_the_final_score_has_other_noise_than_the_exams(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused for the seed of the run's own exams and of those of a student merged into it; not where no exam was held."""
    student = tmp_path / "student"
    export(base / "run", student)

    def refusal(seed: int) -> str:
        asked = ["--protocol", "custom", "--extractor", "tiny", "--reference", str(tmp_path / "none"), "--count", "50", "--seed", str(seed)]
        assert command(["eval", str(student), *asked, "--to", str(tmp_path / "r.json")]) == 2
        return capfd.readouterr().err

    assert "was examined with seed 1000000 while it was trained" in (said := refusal(1_000_000))
    assert said.count("\n") == 1
    assert all("needs a reference" in refusal(seed) for seed in (0, 999_999, 1_000_001))
    written = (student / "recipe.yaml").read_text()
    assert "seed: 1000000" in written
    (student / "recipe_merged.yaml").write_text(written.replace("seed: 1000000", "seed: 7"))
    assert "was examined with seed 7" in refusal(7)
    recipe = recipes.load(student / "recipe.yaml")
    (student / "recipe.yaml").write_text(recipes.dump(replace(recipe, exam=replace(recipe.exam, every=0))))
    assert "needs a reference" in refusal(1_000_000)


def test_the_teachers_side_is_its_own_sampler_at_other_noise(base: Path) -> None:
    run = tiny_run(base, **OPTIONS)
    own = exam.teacher_sampler(run)
    assert (len(own.times), own.guidance, own.renoise) == (25, 1.5, 0.0)
    kept = load_file(base / "run" / "exam" / "teacher.safetensors")["features"]
    same, other = (extract(Tiny(), generate(run.teacher, own, 50, seed, batch_size=4, quiet=True).images, 50)[0]
                   for seed in (1_000_001, 1_000_000))
    torch.testing.assert_close(kept, same, rtol=1e-4, atol=1e-4)
    assert float((kept - other).abs().max()) > 0.01


def test_without_an_average_the_raw_weights_are_examined(base: Path, tmp_path: Path) -> None:
    loop.start(tiny_recipe(base, **{**OPTIONS, "steps": 2, "ema_decay": 0}), tmp_path / "run", (examine,))
    (line,) = exams(tmp_path / "run")
    assert {key.split("/")[0] for key in line} == {"step", "exam"}


def test_a_world_is_examined_by_its_own_protocol(tmp_path: Path) -> None:
    """In float32, though the recipe trains in bfloat16; the student is still its teacher."""
    chosen = recipes.load("fashion/dmd2_datafree", ["exam={every: 1, count: 50}", "trackers=[]", "batch_size=50", "ema_decay=0"])
    assert chosen.precision == "bf16"
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    found = exam.marks(run, None, tmp_path)
    asked = protocol.get("fashion", 50, 1_000_000)
    asked = replace(asked, metrics=asked.metrics[:2])
    plain = replace(run.teacher, denoiser=replace(run.teacher.denoiser, autocast=None))
    made = generate(plain, run.method.sampler(), 50, 1_000_000, batch_size=50, quiet=True)
    assert found == score.score(made.images, made.labels, asked).metrics
    assert set(found) == {"frechet_fashion", "kid_fashion"}
    assert not list(tmp_path.iterdir())                                                               # the world has its own reference


@pytest.mark.parametrize("classes", [0, 1, 2, 3, 10, 11, 1000])
def test_any_number_of_classes_or_prompts(classes: int) -> None:
    images = torch.randint(0, 256, (50, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = exam.to_teacher(images, extract(Tiny(), 255 - images, 50)[0][:40], classes, Tiny())
    assert {estimate.n for estimate in found.values()} == {50}
    assert {estimate.groups for estimate in found.values()} == {25 if classes in (0, 1, 2) or classes > 10 else 50 // classes}
    assert all(estimate.se > 0 for estimate in found.values())


class Louder(Tiny):
    """Another extractor than tiny."""

    name = "lou-der"

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return 2 * super().features(images)[0], None


def test_an_extractor_of_the_recipes_choice(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    """In its features, beside the teacher's own pictures; a name that there is not, or missing weights, are told before the run begins."""
    monkeypatch.setitem(EXTRACTORS, "lou-der", Louder)
    run = tiny_run(base, **{**OPTIONS, "exam": {"every": 2, "count": 50, "extractor": "lou-der"}})
    found = exam.marks(run, None, tmp_path)
    plain = exam.marks(tiny_run(base, **OPTIONS), None, tmp_path / "plain")
    assert set(found) == {"frechet_lou_der_teacher", "kid_lou_der_teacher"}
    assert found["frechet_lou_der_teacher"].value == pytest.approx(4 * plain["frechet_tiny_teacher"].value, rel=1e-6)
    recipe = tiny_file(base, **OPTIONS)
    for name, words in (("dinosaur", "exam.extractor: there is no 'dinosaur'; there are"), ("dinov2-l14", "dinov2-l14")):
        assert command(["train", "--config", str(recipe), f"exam.extractor={name}", "--out", str(tmp_path / "run")]) == 2
        assert words in capfd.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run").exists()


# ---- what is kept

def test_the_best_checkpoint_is_kept(base: Path) -> None:
    """Of three exams the smallest kernel distance of the average, though only the newest checkpoint is kept otherwise."""
    lines = exams(base / "run")
    best = min(lines, key=lambda line: line["exam/kid_tiny_teacher"])
    tensors, state = kept(base / "run")
    note = {"step": best["step"] + 1, "measure": "kid_tiny_teacher", "value": best["exam/kid_tiny_teacher"]}
    assert state["step"] == note["step"]
    assert state["notes"] == {"exam": note}
    assert checkpoint.newest(base / "run" / loop.CHECKPOINTS)[1]["notes"] == {"exam": note}              # type: ignore[index]
    assert set(tensors) == set(final_tensors(base / "run"))
    assert len(checkpoint.listed(base / "run" / loop.CHECKPOINTS)) == 1


@pytest.mark.parametrize(("best", "step"), [("kid", 4), ("frechet", 2)])
def test_the_named_measure_of_the_average_decides(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: str,
                                                  step: int) -> None:
    """Raw weights never do, and a tie keeps the earlier checkpoint."""
    script = {"kid": [3.0, 1.0, 1.0], "frechet": [1.0, 2.0, 3.0]}
    asked: list[bool] = []

    def marks(run: Any, average: Any, out: Path) -> dict[str, metrics.Estimate]:
        asked.append(average is not None)
        turn = (len(asked) - 1) // 2
        return {f"{name}_x": metrics.Estimate(values[turn] if average is not None else -turn, 0, 0, (0, 0), 50, 5)
                for name, values in script.items()}

    monkeypatch.setattr(exam, "marks", marks)
    loop.start(tiny_recipe(base, **{**OPTIONS, "exam": {"every": 2, "best": best}}), tmp_path / "run", (examine,))
    assert asked == [True, False] * 3
    state = kept(tmp_path / "run")[1]
    assert (state["step"], state["notes"]["exam"]["measure"]) == (step, f"{best}_x")


def test_the_last_step_is_examined_too(base: Path, tmp_path: Path) -> None:
    loop.start(tiny_recipe(base, **{**OPTIONS, "steps": 3}), tmp_path / "run", (examine,))
    assert [line["step"] for line in exams(tmp_path / "run")] == [1, 2]


def test_export_takes_the_best(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors, state = kept(base / "run")
    assert command(["export", str(base / "run"), "--to", str(tmp_path / "student"), "--best", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["step"] == state["step"]
    weights = load_file(tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[f"ema/{name}"], value) for name, value in weights.items())
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"**Chosen:** step {state['step']} of 6, which had the smallest distance (kid) on 50" in card
    assert "Unfinished" not in card
    assert mismatch(base / "run", tmp_path / "student") == []


@pytest.mark.parametrize(("changes", "words"), [({}, "looks for no best checkpoint: train with exam.every, or leave --best out"),
                                                ({"exam": {"every": 9}}, "has kept no best checkpoint: one is kept after the first exam")])
def test_without_a_best_there_is_one_line(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any],
                                          words: str) -> None:
    loop.start(tiny_recipe(base, **DATA_FREE, steps=1, **changes), tmp_path / "run", (lambda done, state: None,))
    assert command(["export", str(tmp_path / "run"), "--to", str(tmp_path / "student"), "--best"]) == 2
    err = capfd.readouterr().err
    assert words in err.strip().splitlines()[-1]
    assert not (tmp_path / "student").exists()


# ---- training does not notice

def test_training_is_the_same_with_exams(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, average and the global generator, though the exam draws from that; modes are what they were."""
    modes: list[bool] = []

    def careless(*args: Any, **options: Any) -> Any:
        torch.rand(3)
        return generate(*args, **options)

    def look(done: int, state: State) -> None:
        modes.append(state.run.roles.module("student").training)

    monkeypatch.setattr(exam, "generate", careless)
    loop.start(tiny_recipe(base, **OPTIONS), tmp_path / "run", (look, examine, look))
    loop.start(tiny_recipe(base, **{**OPTIONS, "exam": {"every": 0}}), tmp_path / "plain", (examine,))
    assert unequal(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "plain")) == []
    assert modes[::2] == modes[1::2]
    assert not (tmp_path / "plain" / "best").exists()
    assert exams(tmp_path / "plain") == []


def hit(done: int, state: State) -> None:
    if done == 4:
        raise RuntimeError("crash")


@pytest.mark.parametrize("where", ["before the next exam", "between the exam and its checkpoint"])
def test_a_resumed_run_is_examined_alike(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The same log, the same best, whose step may lie beyond the checkpoint that the run goes on from."""
    hooks: tuple[Callable[[int, State], None], ...] = (examine,)
    if where == "before the next exam":
        crash_at(monkeypatch, 3)
    else:
        hooks = (examine, hit)
    with pytest.raises(RuntimeError, match="crash"):
        loop.start(tiny_recipe(base, **OPTIONS), tmp_path / "run", hooks)
    assert loop.resume(tmp_path / "run", (examine,)).finished
    without = [[{k: v for k, v in line.items() if k != "seconds"} for line in log_lines(run)] for run in (tmp_path / "run", base / "run")]
    assert without[0] == without[1]
    (ours, state), (theirs, whole) = kept(tmp_path / "run"), kept(base / "run")
    assert unequal(ours, theirs) == []
    assert (state["step"], state["notes"]) == (whole["step"], whole["notes"])
    assert set(snapshot(tmp_path / "run")) == set(snapshot(base / "run"))


# ---- the command and the recipe

def test_the_command_examines(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(tiny_file(base, **{**OPTIONS, "steps": 4}))
    crash_at(monkeypatch, 3)
    assert command(["train", "--config", config, "--out", str(tmp_path / "run")]) == 1
    assert [line["step"] for line in exams(tmp_path / "run")] == [1]
    assert command(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [line["step"] for line in exams(tmp_path / "run")] == [1, 3]
    assert "crash" in capfd.readouterr().err


def test_exams_without_a_hook_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no hook was handed in: give stepdistill"):
        loop.start(tiny_recipe(base, **OPTIONS), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no hook was handed in"):
        loop.resume(base / "run")


@pytest.mark.parametrize(("changes", "words"), [
    ({"every": -1}, "exam.every cannot be negative"), ({"count": 49}, "exam.count must be at least 50"),
    ({"seed": -1}, "exam.seed must lie in"), ({"best": "fid"}, "exam.best: Input should be 'kid' or 'frechet', got 'fid'"),
    ({"evry": 5}, "unknown recipe key 'exam.evry'; did you mean 'every'?"),
])
def test_a_wrong_exam_is_one_line(base: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_recipe(base, exam=changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
