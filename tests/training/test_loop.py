"""What the loop promises every method: averages, schedules, skipped updates, precision, stages, previews, trackers, early errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import ADAM, final_tensors, log_lines, png_size, snapshot, tiny_recipe, tiny_run, tiny_tree, unequal
from torch import nn
from toys import tiny_unet

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.images import save_png, to_image
from stepdistill.losses.distance import l2
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch, Loss, Method, Stage
from stepdistill.methods.dmd2 import DMD2
from stepdistill.models.roles import Role, Roles
from stepdistill.recipe import OptimRecipe
from stepdistill.training import checkpoint, look, loop, measure
from stepdistill.training.assemble import assemble
from stepdistill.training.ema import Ema
from stepdistill.training.optim import Optimizers, change, rate, some_of

DATA_FREE = {"method__gan_weight": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the teacher and the pictures of all these runs lie."""
    return tmp_path_factory.mktemp("world")


# ---- the average

def test_the_average_follows_the_student_and_nobody_else(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the student's weights after each of its updates, with the decay written out: min(0.9, (1 + n)/(10 + n))."""
    seen: list[tuple[int, torch.Tensor]] = []
    original = Ema.after

    def spy(self: Ema, student: nn.Module, count: int) -> None:
        seen.append((count, student.conv_in.weight.detach().clone()))
        original(self, student, count)

    monkeypatch.setattr(Ema, "after", spy)
    before = tiny_run(base, **DATA_FREE).roles.module("student").conv_in.weight.detach().clone()
    loop.start(tiny_recipe(base, **DATA_FREE, method__fake_updates=3, steps=7, checkpoint_every=7), tmp_path / "run")
    assert [count for count, _ in seen] == [1, 2, 3]                         # seven critic updates moved nothing
    average = before
    for count, weight in seen:
        decay = min(0.9, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    tensors = final_tensors(tmp_path / "run")
    torch.testing.assert_close(tensors["ema/conv_in.weight"], average, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average, tensors["role/student/conv_in.weight"], atol=1e-5)
    averages = {name: value for name, value in tensors.items() if name.startswith("ema/")}
    apart = sum((value - tensors[f"role/student/{name[4:]}"]).square().sum() for name, value in averages.items())
    size = sum(value.square().sum() for value in averages.values())
    assert log_lines(tmp_path / "run")[-1]["ema/distance"] == pytest.approx(float(apart / size) ** 0.5, rel=1e-4)


def test_no_average_where_none_is_asked_for(base: Path) -> None:
    run = tiny_run(base, **DATA_FREE, ema_decay=0)
    assert run.ema is None
    assert not any(name.startswith("ema/") for name in run.tensors())


# ---- learning rates

def test_rate_warms_up_and_falls() -> None:
    recipe = OptimRecipe(lr=2.0, warmup=3, schedule="linear", decay_from=0.5)
    assert [rate(recipe, n, 10) for n in range(11)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.0])
    cosine = OptimRecipe(lr=2.0, schedule="cosine")
    assert [rate(cosine, n, 4) for n in range(5)] == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])
    assert [rate(OptimRecipe(lr=2.0), n, 4) for n in (0, 3, 99)] == [2.0] * 3


def test_every_role_counts_its_own_updates(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three student updates and six of the fake score, each along its own straight line to zero."""
    used: dict[str, list[float]] = {"student": [], "fake": []}
    original = Optimizers.step

    def spy(self: Optimizers, names: Sequence[str], watched: Collection[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
        found = original(self, names, watched)
        for name in names:
            used[name].append(self._optimizers[name].param_groups[0]["lr"])
        return found

    monkeypatch.setattr(Optimizers, "step", spy)
    falling = {"lr": 1e-3, "schedule": "linear"}
    optim = {"student": falling, "fake": {**falling, "lr": 6e-3}}
    loop.start(tiny_recipe(base, **DATA_FREE, optim=optim, checkpoint_every=6), tmp_path / "run")
    assert used["student"] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert used["fake"] == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_the_share_and_the_size_of_a_change() -> None:
    """Of 1002 weights all but the first two move, by a tenth of what most of them are; a large tensor is known by some of its numbers."""
    weights = [torch.nn.Parameter(torch.tensor([0.0, 3.0])), torch.nn.Parameter(torch.full((1000,), 2.0))]
    before = some_of(weights)
    assert change(before, weights) == (0.0, 0.0)
    with torch.no_grad():
        weights[1] += 0.2
    assert change(before, weights) == pytest.approx((1000 / 1002, 0.2 * 1000**0.5 / (9 + 4 * 1000) ** 0.5), rel=1e-5)


def test_clipping_is_per_role(base: Path) -> None:
    """The norm reported is the one before clipping; the step is taken with what is left of it."""
    run = tiny_run(base, **DATA_FREE, optim={"student": {**ADAM, "clip": 0.25}, "fake": {**ADAM, "clip": 0}})
    held: dict[str, float] = {}
    for name in ("student", "fake"):
        for p in run.roles.parameters(name):
            p.grad = torch.ones_like(p)
        optimizer, weights = run.optim._optimizers[name], run.roles.parameters(name)
        optimizer.register_step_pre_hook(
            lambda *args, name=name, weights=weights: held.update({name: float(sum(p.grad.square().sum() for p in weights)) ** 0.5}))
    norms, _ = run.optim.step(("student", "fake"))
    norm = sum(p.numel() for p in run.roles.parameters("fake")) ** 0.5
    assert norms == pytest.approx({"student": norm, "fake": norm}, rel=1e-4)
    assert held == pytest.approx({"student": 0.25, "fake": norm}, rel=1e-4)


# ---- gradients that are not finite

def broken_at(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool]) -> None:
    """A critic whose loss is nan at some steps."""
    original = DMD2.critic_loss

    def loss(self: DMD2, m: Roles, batch: Batch, draws: Draws) -> Loss:
        found = original(self, m, batch, draws)
        return Loss(found.value * float("nan"), found.log) if broken(draws.step) else found

    monkeypatch.setattr(DMD2, "critic_loss", loss)


def test_a_gradient_that_is_not_finite_skips_that_update_loudly(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capfd: pytest.CaptureFixture[str]) -> None:
    """Steps 1 and 3 fail, never two in a row; at step 2 both update."""
    broken_at(monkeypatch, lambda step: step in (1, 3))
    outcome = loop.start(tiny_recipe(base, steps=4, max_skips=2, checkpoint_every=1, keep=9), tmp_path / "run")
    assert (outcome.finished, outcome.skipped) == (True, 2)
    assert [line["skipped"] for line in log_lines(tmp_path / "run")] == [0, 1, 1, 2]
    err = capfd.readouterr().err
    assert "step 1: gradient of fake, disc is not finite; skipped" in err
    assert "step 2" not in err
    read = [checkpoint.read(path) for path in checkpoint.listed(tmp_path / "run" / loop.CHECKPOINTS)]
    assert unequal(read[0][0], read[1][0]) == []                             # step 1 left weights, moments and average untouched
    assert unequal(read[1][0], read[2][0]) != []
    assert [state["counts"]["fake"] for _, state in read] == [1, 1, 2, 2]
    assert read[-1][1]["skipped"] == 2
    assert all(torch.isfinite(value.float()).all() for value in read[-1][0].values())


def test_a_run_of_skipped_updates_stops_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the student's updates between them succeed: a dead critic must not train a student for hours."""
    broken_at(monkeypatch, lambda step: step >= 1)
    with pytest.raises(FloatingPointError, match="3 critic updates in a row had no finite gradient; the run stops at step 3"):
        loop.start(tiny_recipe(base, steps=20, method__fake_updates=1, max_skips=3, checkpoint_every=1), tmp_path / "run")
    assert checkpoint.listed(tmp_path / "run" / loop.CHECKPOINTS)[-1].name == "step-00000003"
    assert not (tmp_path / "run" / loop.LOCK).exists()


def test_one_bad_role_stops_all_roles_of_its_update(base: Path) -> None:
    run = tiny_run(base)
    before = {name: [p.detach().clone() for p in run.roles.parameters(name)] for name in ("fake", "disc")}
    for name in before:
        for p in run.roles.parameters(name):
            p.grad = torch.ones_like(p)
    run.roles.parameters("disc")[0].grad[0] = torch.inf
    norms, _ = run.optim.step(("fake", "disc"))
    assert norms["disc"] == float("inf")
    assert run.optim.counts == {"student": 0, "fake": 0, "disc": 0}
    for name, weights in before.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, run.roles.parameters(name), strict=True))
        assert all(p.grad is None for p in run.roles.parameters(name))


# ---- precision

def test_half_precision_storage_with_a_tiny_learning_rate_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"student is stored in bfloat16, where a typical weight .* at lr 1.0e-06 it would never move"):
        tiny_run(base, **DATA_FREE, weights="bfloat16", optim={"student": {"lr": 1e-6}, "fake": {"lr": 1e-2}})


def test_half_precision_storage_moves_at_a_large_learning_rate(base: Path) -> None:
    run = tiny_run(base, **DATA_FREE, weights="bfloat16", optim={"student": {"lr": 1e-2}, "fake": {"lr": 1e-2}})
    before = run.roles.module("student").conv_in.weight.detach().clone()
    assert before.dtype == torch.bfloat16
    measure.iterate(run, 0, 1)
    after = run.roles.module("student").conv_in.weight.detach()
    assert (after != before).float().mean() > 0.9
    assert run.ema is not None
    average = run.ema.network.conv_in.weight
    assert average.dtype == torch.float32                                    # in bfloat16 a share of 1e-3 would be rounded away
    torch.testing.assert_close(average, before.float().lerp(after.float(), 1 - 2 / 11))


def test_masters_are_float32_and_passes_bfloat16(base: Path) -> None:
    run, inside = tiny_run(base, precision="bf16"), dict[str, torch.dtype]()
    run.roles.module("student").mid_block.register_forward_hook(lambda module, args, out: inside.update(middle=out.dtype))
    run.roles.module("student").conv_out.register_forward_hook(lambda module, args, out: inside.update(last=out.dtype))
    measure.iterate(run, 0, 1)
    assert inside == {"middle": torch.bfloat16, "last": torch.float32}
    for name in run.roles.trains:
        assert {p.dtype for p in run.roles.parameters(name)} == {torch.float32}
        assert {v.dtype for k, v in run.optim.tensors().items() if k.startswith(f"{name}/")} == {torch.float32}


def test_whole_numbers_of_an_optimizer_survive(base: Path) -> None:
    """8-bit Adam keeps its count as a Python int; without it a resumed run would fail at its first step."""
    run = tiny_run(base, "consistency")
    measure.iterate(run, 0, 1)
    optimizer = run.optim._optimizers["student"]
    first = run.roles.parameters("student")[0]
    optimizer.state[first]["count"] = 5
    saved = {k: v.clone() for k, v in run.optim.tensors().items()}
    optimizer.state[first]["count"] = 0
    run.optim.load(saved, run.optim.counts)
    restored = optimizer.state[first]["count"]
    assert (restored, type(restored)) == (5, int)


# ---- stages

@dataclass(frozen=True)
class TwoConfig:
    """Nothing to set."""


class Two(Method[TwoConfig]):
    """Regression on another copy; at the second stage that becomes the student, whose optimizer starts afresh."""

    title, arxiv, family = "Two stages", "0000.00000", "toy"
    Config = TwoConfig

    def __init__(self, cfg: TwoConfig, setup: Any):
        super().__init__(cfg, setup)
        self.entered: list[str] = []

    @classmethod
    def needs(cls, cfg: TwoConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "previous": Role()}

    def stages(self, steps: int) -> Sequence[Stage]:
        return Stage("one", 2), Stage("two", steps - 2, resets=("student",))

    def enter(self, stage: Stage, m: Roles) -> None:
        self.entered.append(stage.name)
        if stage.name == "two":
            m.follow("previous", "student", 0)

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        t, cond = draws.each("t").uniform(0.3, 0.9), batch["main"].cond
        x_t = draws.each("x").normal(*self.setup.shape)
        with torch.no_grad():
            goal = m.previous(x_t, t, cond, w=2.0).x0
        return Loss(l2(m.student(x_t, t, cond).x0, goal).mean())

    def sampler(self) -> SamplerSpec:
        return SamplerSpec(trailing(1))

    def state(self) -> dict[str, Any]:
        return {"entered": self.entered}

    def restore(self, state: dict[str, Any]) -> None:
        self.entered = state["entered"]


@pytest.fixture
def two(base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe of the toy: two stages of two and four steps."""
    monkeypatch.setitem(METHODS, "two", Two)
    return recipes.parse({**tiny_tree(base, "consistency", checkpoint_every=1, keep=9), "method": {"name": "two"}})


def test_stages_are_entered_once_and_reset_their_optimizers(two: Any, tmp_path: Path) -> None:
    loop.start(two, tmp_path / "run")
    read = [checkpoint.read(path) for path in checkpoint.listed(tmp_path / "run" / loop.CHECKPOINTS)]
    assert read[-1][1]["method"] == {"entered": ["one", "two"]}
    assert [float(tensors["optim/student/0/step"]) for tensors, _ in read] == [1, 2, 1, 2, 3, 4]
    assert read[-1][1]["counts"] == {"student": 6}
    key = "role/{}/conv_in.weight"
    assert torch.equal(read[2][0][key.format("previous")], read[1][0][key.format("student")])
    assert not torch.equal(read[1][0][key.format("previous")], read[1][0][key.format("student")])
    assert not any(name.startswith("role/teacher") for name in read[-1][0])


def test_schedules_start_afresh_with_their_stage(two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of the first stage and four of the second, each falling to zero; a resumed run is on the same line."""
    falling = replace(two, optim={"student": OptimRecipe(8e-3, schedule="linear")})
    loop.start(replace(falling, steps=6), tmp_path / "run")
    rates = [line["lr/student"] for line in log_lines(tmp_path / "run")]                              # of the next update
    assert rates[:-1] == pytest.approx([4e-3, 8e-3, 6e-3, 4e-3, 2e-3])


@pytest.mark.parametrize("stop", [2, 4])
def test_stages_survive_resuming(two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """From the border between the stages, and from the middle of the second, whose copy is the student of the first."""
    loop.start(two, tmp_path / "whole")
    original = loop.run_update

    def crash(run: Any, step: int, *args: Any) -> Any:
        if step == stop:
            raise RuntimeError("crash")
        return original(run, step, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "run_update", crash)
        with pytest.raises(RuntimeError, match="crash"):
            loop.start(two, tmp_path / "run")
    loop.resume(tmp_path / "run")
    assert unequal(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole")) == []
    assert checkpoint.read(checkpoint.listed(tmp_path / "run" / loop.CHECKPOINTS)[-1])[1]["method"] == {"entered": ["one", "two"]}


def test_stages_must_add_up(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Two, "stages", lambda self, steps: (Stage("one", steps + 1),))
    with pytest.raises(ValueError, match="the stages of two must add up to steps 6"):
        assemble(two, loop.make_accelerator(two, None))


# ---- previews and trackers

def test_previews_show_conditions_from_all_over_their_list() -> None:
    """Prompts that stand together are often alike; of few classes every one is shown."""
    shown = lambda count, classes: look.labels_of(SimpleNamespace(recipe=SimpleNamespace(preview_count=count),                   # noqa: E731
                                                             teacher=SimpleNamespace(classes=classes))).tolist()
    assert shown(20, 1700) == 4 * [0, 340, 680, 1020, 1360]
    assert shown(40, 10) == 4 * list(range(10))
    assert shown(3, 0) == [0, 0, 0]


def test_previews_come_at_their_period(base: Path, tmp_path: Path) -> None:
    loop.start(tiny_recipe(base, **DATA_FREE, steps=5, preview_every=2, checkpoint_every=5), tmp_path / "run")
    files = sorted((tmp_path / "run" / "previews").glob("*.png"))
    assert [file.name for file in files] == ["00000002.png", "00000004.png", "00000005.png", "teacher.png"]
    assert {png_size(file) for file in files} == {(3 * (64 + 2) + 2, 64 + 2 + 2)}     # three pictures of 16, four times enlarged
    assert files[0].read_bytes() != files[2].read_bytes()


def test_a_look_counts_the_student_against_the_teacher(base: Path, tmp_path: Path) -> None:
    """At its period, for the average and for the raw weights; the teacher's side is made once, whatever interrupts."""
    changes = {**DATA_FREE, "steps": 4, "preview_every": 2, "preview_count": 12, "checkpoint_every": 4}
    loop.start(tiny_recipe(base, **changes), tmp_path / "run")
    lines = [line for line in log_lines(tmp_path / "run") if any(key.startswith("look") for key in line)]
    assert [line["step"] for line in lines] == [1, 3]
    names = {"brightness", "contrast", "clipped", "sharpness", "grid", "spread"}
    assert all({f"{kind}/{name}" for kind in ("look", "look_raw") for name in names} <= set(line) for line in lines)
    run = tiny_run(base, **changes)
    (tmp_path / "same").mkdir()
    untrained = look.look(run, tmp_path / "same", 0)
    kept = (tmp_path / "same" / "teacher.json").read_text()
    assert kept == (tmp_path / "run" / "previews" / "teacher.json").read_text()
    assert {key.removeprefix("look_raw/"): value for key, value in untrained.items() if key.startswith("look_raw")} == \
        {key.removeprefix("look/"): value for key, value in untrained.items() if key.startswith("look/")}     # nothing has moved yet
    with torch.no_grad():
        run.roles.module("student").conv_out.bias += 0.5
    moved = look.look(run, tmp_path / "same", 1)
    assert moved["look/brightness"] == untrained["look/brightness"]
    assert moved["look_raw/brightness"] != untrained["look_raw/brightness"]


def test_a_look_at_a_method_that_asks_no_teacher(base: Path, tmp_path: Path) -> None:
    """Easy consistency tuning declares no role of that name; its student is held against the teacher all the same."""
    assert loop.start(tiny_recipe(base, "ect", steps=1, preview_every=1), tmp_path / "run").finished
    assert (tmp_path / "run" / "previews" / "teacher.png").is_file()


def test_pictures_do_not_depend_on_how_many_are_made_at_a_time(base: Path) -> None:
    few, many = (tiny_run(base, **DATA_FREE, preview_count=5, batch_size=size) for size in (2, 8))
    a, b = (look.drawn(run, run.teacher.denoiser, run.method.sampler()) for run in (few, many))
    assert int((a.int() - b.int()).abs().max()) <= 1


def test_a_preview_is_the_average_at_fixed_noise(base: Path, tmp_path: Path) -> None:
    run, files = tiny_run(base), [tmp_path / f"{i}.png" for i in range(4)]
    look.preview(run, files[0])
    torch.manual_seed(123)
    run.roles.train_only(("student",))
    look.preview(run, files[1])
    assert files[1].read_bytes() == files[0].read_bytes()
    assert run.roles.module("student").training                              # as the loop left it
    with torch.no_grad():
        run.roles.module("student").conv_out.bias += 0.3
    look.preview(run, files[2])
    assert files[2].read_bytes() == files[0].read_bytes()                    # the student moved, its average did not
    assert run.ema is not None
    run.ema.network.conv_out.bias += 0.3
    look.preview(run, files[3])
    assert files[3].read_bytes() != files[0].read_bytes()


def test_tensorboard_writes_inside_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loop.start(tiny_recipe(base, **DATA_FREE, steps=2, trackers=["tensorboard"]), tmp_path / "run")
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert len(events) == 1
    data = events[0].read_bytes()
    assert all(tag in data for tag in (b"student/pull", b"critic/denoise", b"grad/student"))
    assert not any((tmp_path / "here").iterdir())


# ---- refusals, before anything is written or trained

@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(loop, "train", never)


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_holds_anything_is_refused_untouched(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    before = snapshot(tmp_path)
    for out in (tmp_path / "run", tmp_path / "run" / "thesis.txt"):
        with pytest.raises(ValueError, match="is not empty: choose another --out"):
            loop.start(tiny_recipe(base), out)
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_cannot_be_written_is_found_before_training(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        loop.start(tiny_recipe(base), tmp_path / "file" / "run")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("wrong", "message"), [
    ({"teacher__path": "nowhere/teacher"}, "no teacher at .*nowhere/teacher"),
    ({"data__folder": "nowhere/pictures"}, "data.folder .*nowhere/pictures does not exist"),
    ({"data__folder": None}, "reads real pictures: set data.folder"),
    ({"student": {"steps": 2, "times": [0.5, 1.0]}}, "sampler times must fall strictly"),
    ({"student__taps": ["middle"]}, "student.taps names 'middle'"),
])
def test_what_a_recipe_gets_wrong_writes_nothing(base: Path, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.start(tiny_recipe(base, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_null_class(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)                                                        # makes the teacher
    notes = tmp_path / "teacher" / "stepdistill.json"
    notes.write_text(json.dumps({k: v for k, v in json.loads(notes.read_text()).items() if k != "null_class"}))
    with pytest.raises(ValueError, match=r"guidance 1.5 needs a null class"):
        tiny_run(tmp_path)


def test_a_batch_is_divided_exactly(base: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of accumulate 3"):
        tiny_recipe(base, accumulate=3)
    three = SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided over 3 processes x accumulate 1"):
        assemble(tiny_recipe(base), three)                                   # type: ignore[arg-type]


def test_processes_and_micro_batches_share_out_the_samples(base: Path) -> None:
    """Two processes times two micro-batches hold every sample of the batch once."""
    run, held = tiny_run(base, batch_size=8, accumulate=2), []
    for process in (0, 1):
        run.accelerator = SimpleNamespace(num_processes=2, process_index=process, device=torch.device("cpu"))    # type: ignore[assignment]
        held += [i for micro in (0, 1) for i in run.draws(0, 0, micro).indices]
    assert sorted(held) == list(range(8))


# ---- teachers without conditions

@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unconditional")
    tiny_unet(classes=0, num_class_embeds=None).save_pretrained(folder / "teacher")
    DDPMScheduler().save_config(folder / "teacher")
    for i in range(6):
        save_png(to_image(torch.full((1, 8, 8), 40 * i, dtype=torch.uint8)), folder / "pictures" / f"{i}.png")
    return folder


@pytest.mark.parametrize("method", ["dmd2", "sid", "consistency"])
def test_unconditional_teachers_are_distilled(unconditional: Path, tmp_path: Path, method: str) -> None:
    assert loop.start(tiny_recipe(unconditional, method, guidance=1.0, steps=2), tmp_path / "run").finished
    student = {k: v for k, v in final_tensors(tmp_path / "run").items() if k.startswith("role/student/")}
    assert all(bool(torch.isfinite(v).all()) for v in student.values())


@pytest.mark.parametrize(("method", "options", "remedy"), [
    ("tdd", {}, "set method.dropout to 0"), ("pcm", {"method__dropout": 0.1}, "set method.dropout to 0"),
    ("sid", {"method__fake_guidance": 0.0}, "set method.fake_guidance to 1"), ("pgsb", {}, "take swiftbrush")])
def test_who_asks_the_null_condition_says_so_before_the_run(unconditional: Path, method: str, options: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^{method} asks the null condition, and this teacher has none: .*{remedy}$"):
        tiny_run(unconditional, method, guidance=1.0, **options)
