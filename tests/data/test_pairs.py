"""Pairs on disk: the teacher's ODE from the noise beside it, whole shards or none, the same after a kill, and never another run's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import final_tensors, snapshot, tiny_file, tiny_recipe, tiny_run, tiny_teacher, unequal

from stepdistill import cli, pairs
from stepdistill.data import pairs as stored
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Karras
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.recipe import Recipe
from stepdistill.training import loop
from stepdistill.training.assemble import teacher_of

TERMS: dict[str, Any] = {"count": 10, "steps": 3, "batch_size": 3}


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "SHARD", 4)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its pictures, and ten pairs in three shards."""
    folder = tmp_path_factory.mktemp("world")
    pairs.make(recipe(folder), folder / "pairs", **TERMS)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    return tiny_recipe(folder, "dmd", **{"data__pairs": str(folder / "pairs"), **overrides})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: value for name, value in snapshot(folder).items() if name != "lock"}


def test_what_is_written(base: Path) -> None:
    names = [f"pairs-0000000{a}-000000{b:02d}.safetensors" for a, b in ((0, 4), (4, 8), (8, 10))]
    assert list(shards(base / "pairs")) == [*names, "pairs.json"]
    made = tensors(base / "pairs")
    assert {name: (v.dtype, tuple(v.shape)) for name, v in made.items()} == {
        "z": (torch.float32, (10, 4, 8, 8)), "y": (torch.float32, (10, 4, 8, 8)),
        "label": (torch.int64, (10,)), "index": (torch.int64, (10,))}
    assert made["index"].tolist() == list(range(10))
    assert made["label"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    manifest = json.loads((base / "pairs/pairs.json").read_text())
    assert set(manifest) == {"teacher", "conditions", "shape", "guidance", "precision", "sampler", "seed", "count"}
    assert (manifest["shape"], manifest["guidance"], manifest["seed"], manifest["count"]) == ([4, 8, 8], 1.5, 0, 10)
    assert SamplerSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in manifest["sampler"].items()}) == pairs.ode(recipe(base), 3)
    assert pairs.ode(recipe(base, student__clip_x0=1.0), 4) == SamplerSpec((1.0, 0.75, 0.5, 0.25), 0.0, "dpmpp_2m", 1.0, 1.5)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim", "heun"])
def test_y_is_where_the_guided_ode_takes_z(base: Path, tmp_path: Path, solver: Any) -> None:
    chosen = recipe(base)
    pairs.make(chosen, tmp_path / "p", **{**TERMS, "solver": solver})
    made = tensors(tmp_path / "p")
    teacher = teacher_of(chosen, torch.device("cpu"))[0]
    spec = pairs.ode(chosen, 3, solver)
    assert (spec.renoise, spec.guidance, spec.solver) == (0.0, 1.5, solver)
    with torch.no_grad():
        x = start(teacher.denoiser.process, spec, made["z"])
        *_, last = steps(teacher.denoiser, x, spec, teacher.condition(made["label"]), Draws(9))
    torch.testing.assert_close(made["y"], last.x0, rtol=1e-4, atol=1e-4)


def test_noise_is_unit_noise_of_its_own(base: Path) -> None:
    """Of seed and index alone, whatever the process; an evaluation of the same seed never starts from it."""
    z = tensors(base / "pairs")["z"]
    assert torch.equal(z, Draws(0, range(10)).each("pairs").normal(4, 8, 8))
    teacher = teacher_of(recipe(base), torch.device("cpu"))[0]
    wide = replace(teacher, denoiser=replace(teacher.denoiser, process=Karras(), clock="t"))
    spec = pairs.ode(recipe(base), 2)
    made = stored._pairs(wide, spec, 0, range(10))
    assert torch.equal(made["z"], z)
    first = next(steps(wide.denoiser, start(Karras(), spec, z), spec, wide.condition(made["label"]), Draws(0)))
    assert float(first.pred.x_t.std()) == pytest.approx(80, rel=0.05)
    evaluated = Draws(0, range(10)).each("start").normal(4, 8, 8)
    assert float((z.flatten(1) @ evaluated.flatten(1).T / 256).abs().max()) < 0.35


def test_a_kill_changes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard left half-written is not seen, finished shards are not made again, and the rest is the same bit for bit."""
    chosen, folder, move = recipe(base), tmp_path / "p", os.replace

    def killed(partial: Path, path: Path) -> None:
        if path.name.startswith("pairs-00000004"):
            raise KeyboardInterrupt
        move(partial, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        pairs.make(chosen, folder, **TERMS)
    monkeypatch.setattr(os, "replace", move)
    assert list(shards(folder)) == [".pairs-00000004-00000008.safetensors.partial", "pairs-00000000-00000004.safetensors", "pairs.json"]
    with pytest.raises(ValueError, match="lacks 6 of 10 pairs: the same `stepdistill pairs` again goes on"):
        tiny_run(base, "dmd", data__pairs=str(folder))
    kept = (folder / "pairs-00000000-00000004.safetensors").stat().st_mtime_ns
    assert pairs.make(chosen, folder, **TERMS).made == 6
    assert shards(folder) == shards(base / "pairs")
    assert (folder / "pairs-00000000-00000004.safetensors").stat().st_mtime_ns == kept
    monkeypatch.setattr(stored, "_pairs", None)
    assert pairs.make(chosen, folder, **TERMS).made == 0


def test_two_processes_leave_what_one_leaves(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the empty folder before either writes, and each makes every second shard."""
    chosen, real, made = recipe(base), stored._pairs, dict[int, list[int]]()
    monkeypatch.setattr(stored.PairSet, "missing", lambda self: [(0, 4), (4, 8), (8, 10)])
    for rank in (1, 0):
        team = SimpleNamespace(is_main_process=rank == 0, process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
        monkeypatch.setattr(stored, "PartialState", lambda team=team: team)
        monkeypatch.setattr(stored, "_pairs", lambda *args, rank=rank: made.setdefault(rank, []).extend(args[3]) or real(*args))
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p/pairs.json").write_bytes((base / "pairs/pairs.json").read_bytes())       # as the main process has written it
        pairs.make(chosen, tmp_path / "p", **TERMS)
    assert made == {1: [4, 5, 6, 7], 0: [0, 1, 2, 3, 8, 9]}
    assert shards(tmp_path / "p") == shards(base / "pairs")


@pytest.mark.parametrize(("changed", "message"), [
    ({"count": 11}, "another count"), ({"steps": 4}, "another sampler"), ({"seed": 1}, "another seed"),
    ({"solver": "ddim"}, "another sampler")])
def test_other_settings_need_another_folder(base: Path, changed: dict[str, Any], message: str) -> None:
    before = snapshot(base / "pairs")
    with pytest.raises(ValueError, match=f"pairs holds pairs of {message}: choose another --to"):
        pairs.make(recipe(base), base / "pairs", **{**TERMS, **changed})
    with pytest.raises(ValueError, match="pictures holds something else: choose another --to"):
        pairs.make(recipe(base), base / "pictures", **TERMS)
    assert snapshot(base / "pairs") == before


@pytest.mark.parametrize("changed", [{"count": 0}, {"batch_size": 0}, {"steps": 0}, {"solver": "euler"}])
def test_settings_that_are_refused(base: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|must be one of"):
        pairs.make(recipe(base), tmp_path / "p", **{**TERMS, **changed})
    assert not (tmp_path / "p").exists()


# ---- reading

def test_batches_hold_pairs_by_their_keys(base: Path) -> None:
    """Noise, answer and label of one pair each, however the batch is split, and every pair in turn."""
    run = tiny_run(base, "dmd", data__pairs=str(base / "pairs"))
    made = tensors(base / "pairs")
    whole, parts = (run.batch(Draws(5, range(400), 3)), [run.batch(Draws(5, range(i, i + 100), 3)) for i in range(0, 400, 100)])
    z, y, label = whole["pairs"].noise, whole["pairs"].clean, whole["pairs"].cond["class_labels"]
    for name, value in (("noise", z), ("clean", y)):
        assert torch.equal(value, torch.cat([getattr(part["pairs"], name) for part in parts]))
    row = (z[:, None] == made["z"]).flatten(2).all(2).double().argmax(1)
    assert torch.equal(z, made["z"][row])
    assert torch.equal(y, made["y"][row])
    assert torch.equal(label, made["label"][row])
    assert torch.bincount(row, minlength=10).min() > 15
    assert not torch.equal(z, run.batch(Draws(5, range(400), 4))["pairs"].noise)
    assert whole["main"].x0 is whole["main"].z is None


@pytest.mark.parametrize(("overrides", "message"), [
    ({"guidance": 2.0}, "made with another guidance"), ({"guidance": 1.5, "precision": "bf16"}, None)])
def test_pairs_are_read_at_their_own_guidance(base: Path, overrides: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert tiny_run(base, "dmd", data__pairs=str(base / "pairs"), **overrides).source.pairs.count == 10
    else:
        with pytest.raises(ValueError, match=message):
            tiny_run(base, "dmd", data__pairs=str(base / "pairs"), **overrides)


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 2}, "another teacher: make new ones with"), ({"prediction_type": "v_prediction"}, "another teacher: make"),
    ({"sample_size": 4}, "another teacher, shape: make"), (None, "another conditions: make")])
def test_pairs_of_another_world_are_refused(base: Path, tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    tiny_teacher(tmp_path / "teacher", **(change or {}))
    if change is None:
        notes = json.loads((tmp_path / "teacher/stepdistill.json").read_text())
        (tmp_path / "teacher/stepdistill.json").write_text(json.dumps({**notes, "labels": ["hat", "sock", "glove"]}))
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, "dmd", data__pairs=str(base / "pairs"))


def test_a_damaged_shard_is_named(base: Path, tmp_path: Path) -> None:
    pairs.make(recipe(base), tmp_path / "p", **TERMS)
    run = tiny_run(base, "dmd", data__pairs=str(tmp_path / "p"))
    path = tmp_path / "p/pairs-00000004-00000008.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"data\.pairs: .*00000008\.safetensors is damaged or gone .*`stepdistill pairs` again"):
        run.batch(Draws(0, range(40)))


# ---- commands

def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err.strip().splitlines()[-1] if out.err.strip() else ""


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into --to, or the recipe's data.pairs; the keys of the recipe can be changed."""
    path, folder = str(tiny_file(base, "dmd")), tmp_path / "p"
    arguments = ("pairs", "--config", path, "--count", "10", "--steps", "3", "--batch-size", "3", "--json")
    code, out, _ = told(capsys, *arguments, "--to", str(folder))
    assert code == 0
    assert json.loads(out) == {"folder": str(folder), "pairs": 10, "made": 10, "shards": 3, "nfe": 6,
                               "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
    assert shards(folder) == shards(base / "pairs")
    assert told(capsys, *arguments, f"data.pairs={folder}")[1] == out.replace('"made": 10', '"made": 0')
    assert told(capsys, *arguments, f"data.pairs={folder}", "guidance=3")[::2] == (
        2, f"stepdistill: {folder} holds pairs of another guidance, sampler: choose another --to")
    assert told(capsys, *arguments)[::2] == (2, "stepdistill: name a folder for the pairs with --to, or with data.pairs in the recipe")
    told(capsys, "pairs", "--config", path, "--count", "10", "--steps", "3", "--batch-size", "3", "--to", str(folder))


def test_training_without_pairs_says_how_to_make_them(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_file(base, "dmd"))
    code, _, line = told(capsys, "train", "--config", path, "--out", str(tmp_path / "run"))
    assert code == 2
    assert "make them with `stepdistill pairs --config RECIPE --to FOLDER`, and name that folder with data.pairs" in line
    code, _, line = told(capsys, "train", "--config", path, f"data.pairs={tmp_path / 'none'}", "--out", str(tmp_path / "run"))
    assert code == 2
    assert f"data.pairs {tmp_path / 'none'} holds no pairs: make them first with `stepdistill pairs --config RECIPE --to" in line
    code, _, line = told(capsys, "train", "--config", path, f"data.pairs={base / 'pairs'}", "student.steps=2", "--out",
                         str(tmp_path / "run"))
    assert (code, "set student.steps to 1" in line) == (2, True)
    assert not (tmp_path / "run").exists()
    assert told(capsys, "train", "--config", path, "method.reg_weight=0", "steps=1", "--out", str(tmp_path / "run"))[0] == 0


def test_accumulation_and_resuming_change_nothing(base: Path, tmp_path: Path) -> None:
    """In float64 the weights of a run do not know how its batches were divided, nor that it was stopped; pairs of float32 stay theirs."""
    five = {"precision": "fp64", "steps": 2, "checkpoint_every": 1, "keep": 2}
    for accumulate in (1, 2):
        loop.start(recipe(base, **five, accumulate=accumulate), tmp_path / str(accumulate))
    one, two = (final_tensors(tmp_path / str(n)) for n in (1, 2))
    assert max(float((one[k].double() - two[k].double()).abs().max()) for k in one if k.startswith("role/")) < 1e-5
    last = sorted((tmp_path / "2/checkpoints").iterdir())[-1]
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    loop.resume(tmp_path / "2")
    assert unequal(final_tensors(tmp_path / "2"), two) == []
