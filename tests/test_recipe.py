"""Recipes: every mistake is one line that names the key and the remedy, and what is written reads back equal."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepdistill import recipe as recipes
from stepdistill.diffusion.times import Uniform
from stepdistill.methods import METHODS
from stepdistill.recipe import Recipe

SHIPPED = recipes.names()


def tree(**changes: Any) -> dict[str, Any]:
    """A right recipe; `a__b` reaches inside."""
    right: dict[str, Any] = {"teacher": {"path": "fashion"}, "method": {"name": "dmd2", "gan_weight": 0.1},
                             "optim": {name: {"lr": 1e-4} for name in ("student", "fake", "disc")}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = right
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return right


def refusal(broken: Any) -> str:
    """The one line a broken recipe is refused with."""
    with pytest.raises(ValueError) as caught:
        recipes.parse(broken)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_the_recipe_of_these_tests_is_right() -> None:
    chosen = recipes.parse(tree())
    assert (chosen.steps, chosen.optim["fake"].lr, chosen.method_config.gan_weight) == (1000, 1e-4, 0.1)


@pytest.mark.parametrize(("key", "named", "near"), [
    ("stepz", "stepz", "steps"),
    ("checkpoint_evry", "checkpoint_evry", "checkpoint_every"),
    ("teacher__pth", "teacher.pth", "path"),
    ("student__step", "student.step", "steps"),
    ("optim__student__warm_up", "optim.student.warmup", "warmup"),
    ("method__fake_update", "method.fake_update", "fake_updates"),
    ("method__times__hihg", "method.times.hihg", "high"),
    ("data__foldr", "data.foldr", "folder"),
])
def test_an_unknown_key_is_named_with_the_nearest_one(key: str, named: str, near: str) -> None:
    message = refusal(tree(**{key: 1}))
    assert f"unknown recipe key '{named.replace('warmup', 'warm_up')}'" in message
    assert f"did you mean '{near}'?" in message


def test_an_unknown_key_near_none_lists_what_is_known() -> None:
    assert refusal(tree(student__zzz=1)) == "unknown recipe key 'student.zzz'; known here: steps, times, clip_x0, weights, taps"
    assert "unknown recipe key '7'" in refusal({**tree(), 7: 1})


@pytest.mark.parametrize(("changes", "words"), [
    ({"steps": "many"}, ("steps: ", "integer", "'many'")),
    ({"steps": 1.5}, ("steps: ", "1.5")),
    ({"steps": None}, ("steps: ", "None")),
    ({"steps": True}, ("steps: ", "number", "True")),
    ({"guidance": False}, ("guidance: ", "number", "False")),
    ({"optim__fake__lr": True}, ("optim.fake.lr: ", "number")),
    ({"teacher": "fashion"}, ("teacher: ", "'fashion'")),
    ({"teacher__path": 5}, ("teacher.path: ", "string", "5")),
    ({"optim": [1]}, ("optim: ", "dictionary", "[1]")),
    ({"optim__student": 1e-4}, ("optim.student: ", "0.0001")),
    ({"optim__student__betas": [0.9]}, ("the recipe lacks optim.student.betas.1",)),
    ({"optim__student__name": "sgd"}, ("optim.student.name: ", "'adamw'", "'sgd'")),
    ({"method": "dmd2"}, ("method: ", "'dmd2'")),
    ({"method__fake_updates": "often"}, ("method.fake_updates: ", "'often'")),
    ({"method__features": "eyes"}, ("method.features: ", "'fake' or 'teacher'", "'eyes'")),
    ({"method__times__low": "x"}, ("method.times.low: ", "'x'")),
    ({"student__taps": "mid_block"}, ("student.taps: ", "'mid_block'")),
    ({"precision": "fp8"}, ("precision: ", "'bf16'", "'fp8'")),
    ({"trackers": ["mlflow"]}, ("trackers.0: ", "'tensorboard'", "'mlflow'")),
    ({"compile": "perhaps"}, ("compile: ", "'perhaps'")),
])
def test_a_wrong_type_names_the_key_and_the_value(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refusal(tree(**changes))
    assert message.startswith(words[0])
    assert all(word in message for word in words[1:]), message


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
    ({"batch_size": 10, "accumulate": 4}, "batch_size 10 is not a multiple of accumulate 4"),
    ({"seed": -1}, "seed must lie in [0, 2^63)"),
    ({"ema_decay": 1.0}, "ema_decay must lie in [0, 1)"),
    ({"keep": 0}, "keep must be at least 1, got 0"),
    ({"student__steps": 0}, "student.steps must be at least 1, got 0"),
    ({"student__times": [1.0, 0.5]}, "student.times names 2 times for student.steps 1"),
    ({"student__times": [1.5]}, "sampler times must fall strictly within"),
    ({"student__clip_x0": 0}, "clip_x0 is the largest absolute value of x0 and must be positive"),
    ({"optim__fake__lr": 0}, "optim.fake: an optimizer needs lr > 0"),
    ({"optim__fake__decay_from": 1}, "optim.fake: an optimizer needs lr > 0"),
    ({"optim__fake__lr": float("nan")}, "optim.fake.lr must be a finite number, got nan"),
    ({"guidance": float("inf")}, "guidance must be a finite number, got inf"),
    ({"method__gan_weight": "nan"}, "method.gan_weight must be a finite number, got nan"),
    ({"method__fake_updates": 0}, "method.fake_updates must be at least 1, got 0"),
    ({"method__gan_weight": -1}, "method.gan_weight and method.disc_weight cannot be negative"),
    ({"method__times": {"low": 0.9, "high": 0.1}}, "method.times: times need 0 <= low <= high <= 1"),
    ({"method__fake_times": {"low": 0.5}}, "method.fake_times must hold the range of method.times"),
    ({"method__name": "dmd3"}, "unknown method 'dmd3', did you mean 'dmd'?"),
    ({"method__name": 3}, "the recipe lacks method.name"),
    ({"optim__disk": {"lr": 1}}, "optim.disk: this configuration of dmd2 trains student, fake, disc"),
    ({"optim__teacher": {"lr": 1}}, "optim.teacher: this configuration of dmd2 trains student, fake, disc"),
])
def test_an_impossible_value_says_what_would_be_possible(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(tree(**changes))


@pytest.mark.parametrize(("path", "message"), [
    (("teacher",), "the recipe lacks teacher"), (("teacher", "path"), "the recipe lacks teacher.path"),
    (("optim",), "the recipe lacks optim"),
    (("optim", "fake", "lr"), "the recipe lacks optim.fake.lr"), (("method", "name"), "the recipe lacks method.name"),
    (("optim", "disc"), "optim.disc is missing: dmd2 trains student, fake, disc; give it an lr"),
])
def test_a_missing_key_is_named(path: tuple[str, ...], message: str) -> None:
    broken = tree()
    inner = broken
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    assert refusal(broken).startswith(message)


# ---- files, short names, overrides

def lines(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(("text", "message"), [
    ("steps: [1, 2", "is not valid YAML"), ("- a\n- b", "must hold a mapping"), ("", "must hold a mapping"),
    ("!!python/object:os.system {}", "YAML"),
])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        recipes.load(tmp_path / "r.yaml")
    assert "r.yaml" in lines(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(ValueError, match="is not a text file"):
        recipes.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("path", ["nowhere/r.yaml", "./nowhere", "/nowhere/at/all", "~/no such recipe"])
def test_a_missing_file_is_a_missing_file(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe at") as caught:
        recipes.load(path)
    lines(caught.value)


@pytest.mark.parametrize(("name", "message"), [
    ("fashion/dmd_2", "no recipe 'fashion/dmd_2', did you mean 'fashion/dmd2'?"), ("fashion/dmd2.", "did you mean 'fashion/dmd2'"),
    ("zzzzzz", "no recipe 'zzzzzz'; shipped: "), ("", "no recipe ''"),
])
def test_a_short_name_that_is_none(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        recipes.load(name)
    assert message in lines(caught.value)


def write(folder: Path, **changes: Any) -> Path:
    (folder / "r.yaml").write_text(yaml.safe_dump(tree(**changes)))
    return folder / "r.yaml"


def test_overrides_are_dotted_yaml(tmp_path: Path) -> None:
    chosen = recipes.load(write(tmp_path), [
        "steps=7", "optim.fake.lr=2e-3", "method.times.low=0.1", "method.features=teacher", "student.steps=2", "student.times=[1.0, 0.4]",
        "compile=true", "optim.disc.betas=[0.0, 0.9]", "teacher.path=runs/a=b", "data.folder=~"])
    assert (chosen.steps, chosen.optim["fake"].lr, chosen.compile, chosen.optim["disc"].betas) == (7, 2e-3, True, (0.0, 0.9))
    assert (chosen.method_config.times, chosen.method_config.features) == (Uniform(0.1, 0.98), "teacher")
    assert (chosen.student.times, chosen.teacher.path, chosen.data.folder) == ((1.0, 0.4), str(Path("runs/a=b").absolute()), None)
    assert chosen.optim["student"].lr == 1e-4                                # its neighbours stay


def test_a_group_given_in_part_keeps_the_rest_of_its_default(tmp_path: Path) -> None:
    """DMD2's times end at 0.98, those of Uniform itself at 1."""
    assert recipes.load(write(tmp_path), ["method.times.low=0.1"]).method_config.times == Uniform(0.1, 0.98)
    assert recipes.parse(tree(method__times={"shift": 3.0})).method_config.times == Uniform(0.02, 0.98, 3.0)
    assert recipes.parse(tree(method__times={})).method_config.times == Uniform(0.02, 0.98)


def test_an_optimizer_for_a_role_that_is_switched_off_is_left_out() -> None:
    assert set(recipes.parse(tree(method__gan_weight=0)).optim) == {"student", "fake"}


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is resumed from anywhere."""
    monkeypatch.chdir(tmp_path)
    chosen = recipes.parse(tree(teacher__path="mine", data__folder="pictures"))
    assert (chosen.teacher.path, chosen.data.folder) == (str(tmp_path / "mine"), tmp_path / "pictures")
    for name in ("fashion", "teacher:fashion"):
        assert recipes.parse(tree(teacher__path=name)).teacher.path == name


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert recipes.load(write(tmp_path), ["steps=7", "steps=9"]).steps == 9


@pytest.mark.parametrize(("item", "message"), [
    ("steps", "override 'steps' must read key=value"), ("=3", "override '=3' must read key=value"),
    ("steps.more=3", "override 'steps.more=3': steps is a value, not a group of keys"), ("steps=[1", "the value is not valid YAML"),
    ("stpes=3", "unknown recipe key 'stpes'; did you mean 'steps'?"), ("method.gan_wieght=0", "did you mean 'gan_weight'?"),
    ("optim.fake.lr=fast", "optim.fake.lr: "),
])
def test_a_wrong_override_is_one_line(tmp_path: Path, item: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipes.load(write(tmp_path, steps=3), [item])
    assert message in lines(caught.value)


def test_numbers_that_yaml_reads_as_words(tmp_path: Path) -> None:
    """PyYAML takes 1e-4 for a string, having no point; the recipe wants a float and gets one."""
    assert yaml.safe_load("1e-4") == "1e-4"
    lr = recipes.load(write(tmp_path), ["optim.student.lr=1e-4", "method.gan_weight=5e-2"])
    assert (lr.optim["student"].lr, lr.method_config.gan_weight) == (1e-4, 5e-2)
    assert isinstance(lr.optim["student"].lr, float)


# ---- what ships, and what is written

def test_every_yaml_in_the_package_has_a_short_name() -> None:
    files = {f"{folder.name}/{file.name}" for folder in resources.files("stepdistill.configs").iterdir() if folder.is_dir()
             for file in folder.iterdir() if file.name.endswith(".yaml")}
    assert files == {f"{name}.yaml" for name in SHIPPED}
    assert "fashion/dmd2" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_read_back_equal(name: str, tmp_path: Path) -> None:
    chosen = recipes.load(name)
    assert chosen.method["name"] in METHODS
    (tmp_path / "r.yaml").write_text(recipes.dump(chosen))
    assert recipes.load(tmp_path / "r.yaml") == chosen


def test_what_is_dumped_is_resolved_and_reads_back_equal(tmp_path: Path) -> None:
    chosen = recipes.parse(tree(
        method__times={"low": 0.1}, student={"steps": 2, "times": [1.0, 0.3]}, data__folder="~/pictures", seed=2**63 - 1,
        optim__fake={"lr": 1e-7, "betas": [0.0, 0.999]}, ema_decay=0.1 + 0.2, trackers=[]))
    text = recipes.dump(chosen)
    (tmp_path / "r.yaml").write_text(text)
    again = recipes.load(tmp_path / "r.yaml")
    assert isinstance(again, Recipe)
    assert again == chosen
    written = yaml.safe_load(text)
    assert set(written["method"]) == {"name"} | {f.name for f in fields(chosen.method_config)}      # every default too
    assert written["method"]["times"] == {"low": 0.1, "high": 0.98, "shift": 1.0}
    assert written["optim"]["student"]["clip"] == 10.0
    assert recipes.dump(again) == text


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        recipes.parse(tree()).steps = 5                                      # type: ignore[misc]
