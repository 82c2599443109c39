"""The demo's page: what it offers, what it draws, and the line that bad input gets. The page itself where gradio is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo import desk

from stepdistill import cli, demo
from stepdistill import recipe as recipes
from stepdistill.eval.models import Opened, open_model
from stepdistill.models.load import load_pipeline
from stepdistill.training import loop


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The U-Net teacher of a tiny emoji world, in two steps."""
    with desk.lived_in(desk.build(tmp_path_factory.mktemp("worlds"))):
        (model,) = demo.open_pair("teacher:emoji")
    return replace(model, spec=demo.sampler(model, 2), trained=2)


@pytest.fixture(scope="module")
def labelled() -> Opened:
    return open_model("teacher:fashion")


def test_steps_that_are_offered(labelled: Opened) -> None:
    student = replace(labelled, is_teacher=False, spec=replace(labelled.spec, times=(0.9, 0.3), renoise=0.0), trained=2)
    assert demo.counts(student) == [2]                                           # times of its own, along the ODE
    assert demo.counts(labelled) == [1, 2, 4, 8, 25]
    assert demo.sampler(labelled, 4).times == (1.0, 0.75, 0.5, 0.25)
    assert demo.sampler(labelled, 4).guidance == labelled.spec.guidance


def test_a_prompt_and_a_seed_make_the_picture(prompted: Opened) -> None:
    apple, milliseconds = demo.pictures(prompted, "red apple", 3, 1)
    assert apple.size == (2 * 3 * 64 + 6,) * 2
    assert milliseconds > 0
    assert demo.pictures(prompted, " red apple ", 3, 1)[0] == apple
    assert demo.pictures(prompted, "snowman", 3, 1)[0] != apple
    assert demo.pictures(prompted, "red apple", 4, 1)[0] != apple


def test_a_class_makes_the_picture(labelled: Opened) -> None:
    bag = demo.pictures(labelled, "Bag", 0, 1)[0]
    assert bag.size == (2 * 7 * 28 + 6,) * 2
    assert demo.pictures(labelled, "Sneaker", 0, 1)[0] != bag


def test_bad_input_is_one_line(prompted: Opened, labelled: Opened) -> None:
    for model, asked, seed, line in ((prompted, "  ", 0, "there is no prompt"), (labelled, "Hat", 0, "no class 'Hat'"),
                                     (labelled, "Bag", None, "got none"), (labelled, "Bag", -1, "from 0 to 2147483647, got -1")):
        with pytest.raises(ValueError, match=line):
            demo.pictures(model, asked, seed, 1)


def test_a_pipeline_that_says_nothing_of_its_sampler(tmp_path: Path) -> None:
    with desk.lived_in(desk.build(tmp_path)):
        load_pipeline(tmp_path / "emoji" / "sd").save_pretrained(tmp_path / "plain")
        first, second = demo.open_pair("teacher:emoji", str(tmp_path / "plain"))
        (alone,) = demo.open_pair(str(tmp_path / "plain"))
    assert (first.trained, first.spec.guidance) == (25, 3.0)
    assert (second.trained, second.spec.guidance) == (alone.trained, alone.spec.guidance) == (demo.STEPS, 1.0)


def test_a_student_stands_beside_the_teacher_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk.lived_in(desk.build(tmp_path)):
        student = replace(demo.open_pair("teacher:emoji")[0], name="mine", is_teacher=False)
        student = replace(student, teacher=replace(student.teacher, folder=tmp_path))
        (tmp_path / loop.RECIPE).write_text(recipes.dump(recipes.load("emoji/dmd2_dit")))
        opened = demo._opened
        monkeypatch.setattr(demo, "_opened", lambda name, *rest: student if name == "mine" else opened(name, *rest))
        assert [model.name for model in demo.open_pair("mine")] == ["mine", "emoji/dit"]
        (tmp_path / loop.RECIPE).write_text(recipes.dump(recipes.load("emoji/dmd2", [f"teacher.path={tmp_path / 'gone'}"])))
        assert demo.open_pair("mine") == (student,)


def test_models_of_two_kinds_do_not_share_a_page(tmp_path: Path) -> None:
    (desk.build(tmp_path) / "fashion").symlink_to(desk.SHIPPED / "fashion")
    with desk.lived_in(tmp_path), pytest.raises(ValueError, match="one takes prompts, the other classes"):
        demo.open_pair("teacher:emoji", "teacher:fashion")


def test_gradio_is_asked_for(labelled: Opened, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest))
    assert cli.run(["demo", "teacher:fashion"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "stepdistill: the page needs gradio: pip install 'stepdistill[demo]'"


def test_the_page_draws_and_answers_in_words(labelled: Opened) -> None:
    pytest.importorskip("gradio")
    draw = next(iter(demo.page((labelled, labelled)).fns.values())).fn
    *_, last = draw("Bag", 0, 1, 2)
    assert [type(value).__name__ for value in last] == ["Image", "str", "Image", "str"]
    assert last[1].startswith("network evaluations: 2;")
    assert last[3].startswith("network evaluations: 4;")
    *_, unchanged = draw("Bag", None, 1, 2)
    assert not any(isinstance(value, str) for value in unchanged)
    assert torch.is_grad_enabled()
