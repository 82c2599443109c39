"""A run that begins with another run's networks."""

import pytest
import torch
import yaml
from tiny import final_tensors, tiny_recipe, tiny_tree

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.training import loop
from stepdistill.training.assemble import assemble


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    assert loop.start(tiny_recipe(folder, steps=2), folder / "run").finished
    return folder


def begun(first, **changes):
    recipe = tiny_recipe(first, start=str(first / "run"), **changes)
    return loop.begun(assemble(recipe, loop.make_accelerator(recipe, None)))


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_student_begins_as_the_average_and_the_critics_as_they_were(first):
    run, before = begun(first), final_tensors(first / "run")
    assert same(run.roles.module("student").state_dict(), part(before, "ema/"))
    assert same(run.ema.network.state_dict(), part(before, "ema/"))
    assert same(run.roles.module("fake").state_dict(), part(before, "role/fake/"))
    assert same(run.roles.module("disc").state_dict(), part(before, "role/disc/"))
    assert not same(part(before, "ema/"), part(before, "role/student/"))


def test_a_critic_of_another_shape_is_new_and_named(first, capsys):
    run = begun(first, student={"taps": ["mid_block", "down_blocks.0"]})
    assert same(run.roles.module("fake").state_dict(), part(final_tensors(first / "run"), "role/fake/"))
    assert "step 2; disc from new" in capsys.readouterr().err


def test_optimizers_and_counts_begin_at_zero(first):
    assert set(begun(first).optim.counts.values()) == {0}


@pytest.mark.parametrize(("changes", "words"), [
    ({"start": "nowhere"}, "nowhere is not a run with a checkpoint"),
    ({"lora": {"student": {"rank": 2}}}, "its student is another network, or an adapter"),
])
def test_what_cannot_be_begun_with_is_one_line_and_no_folder(first, tmp_path, capsys, changes, words):
    tree = tiny_tree(first) | {"start": str(first / "run")} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert cli.run(["train", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_killed_before_its_first_checkpoint_it_begins_there_again(first, tmp_path):
    recipe = tiny_recipe(first, start=str(first / "run"), steps=2)
    assert loop.start(recipe, tmp_path / "whole").finished
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / loop.RECIPE).write_text(recipes.dump(recipe))
    assert loop.resume(tmp_path / "killed").finished
    assert same(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "killed"))
