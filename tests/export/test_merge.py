"""Two students in one export: their weights averaged, adapters merged first; and class-conditional students that are adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_prompt_export import PROMPTS, TWO, Taught, adapter, shaken
from tiny import ADAM, final_tensors, tiny_recipe, tiny_teacher, tiny_tree, unequal
from torch import Tensor

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.export import add_results, export, load_student
from stepdistill.export.students import averaged
from stepdistill.models.adapters import Adapter, LoraRecipe, inject
from stepdistill.models.load import load_teacher
from stepdistill.training import loop

DATA_FREE = {"method__gan_weight": 0, "method__fake_updates": 1, "steps": 2}
RANK = {"rank": 2, "alpha": 3.0}


def trained(root: Path, name: str, **changes: Any) -> Path:
    """The run `name` of data-free DMD2, two steps from the teacher in `root`."""
    assert loop.start(tiny_recipe(root, **DATA_FREE, **changes), root / name).finished
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one teacher: a full copy, an adapter, and one with another sampler."""
    root = tmp_path_factory.mktemp("runs")
    trained(root, "full")
    trained(root, "adapted", seed=1, lora={"student": RANK}, optim__student={**ADAM, "lr": 1e-2})
    trained(root, "two", student={"steps": 2})
    return root


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stepdistill.json").read_text()))


# ---- a student that is an adapter

def test_an_adapter_on_a_class_conditional_teacher_is_exported(root: Path, tmp_path: Path) -> None:
    """The folder answers as the teacher's network does under the adapter that was trained."""
    export(root / "adapted", tmp_path / "to")
    model, teacher = load_student(tmp_path / "to")[0], load_teacher(root / "teacher")
    inject(teacher.denoiser.network, "student", LoraRecipe(**RANK), 0)
    held = {k.removeprefix("ema/"): v for k, v in final_tensors(root / "adapted").items() if k.startswith("ema/")}
    Adapter(teacher.denoiser.network, "student").load_state_dict(held)
    x, t, cond = torch.randn(3, *teacher.shape), torch.full((3,), 0.4, dtype=torch.float64), teacher.condition(torch.arange(3))
    with torch.no_grad():
        expected, plain = (teacher.denoiser.shared(name).raw(x, t, cond) for name in ("student", None))
        torch.testing.assert_close(model.denoiser.raw(x, t, cond), expected, rtol=1e-4, atol=1e-5)
        assert float((expected - plain).norm()) > 1e-3 * float(plain.norm())


# ---- the average

@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_weights_are_the_average_and_at_both_ends_one_of_the_two(root: Path, tmp_path: Path, weights: Any) -> None:
    """Bit for bit at 1 and 0, the adapter merged as its own export merges it."""
    alone = {}
    for name in ("full", "adapted"):
        export(root / name, tmp_path / name, weights)
        alone[name] = written(tmp_path / name)
    for share in (0.0, 0.25, 1.0):
        done = export(root / "full", tmp_path / f"{share}", weights, merge=root / "adapted", share=share)
        found = written(tmp_path / f"{share}")
        if share in (0, 1):
            assert unequal(found, alone["full" if share else "adapted"]) == []
        for key, value in found.items():
            torch.testing.assert_close(value, share * alone["full"][key] + (1 - share) * alone["adapted"][key])
        assert done.merged == {"run": "adapted", "share": share, "method": "dmd2", "step": 2, "steps": 2, "ema": weights == "ema"}
    assert len(unequal(alone["full"], alone["adapted"])) > 10


def test_half_of_each_unless_told_otherwise_and_none_without_another(root: Path, tmp_path: Path) -> None:
    export(root / "full", tmp_path / "default", merge=root / "adapted")
    export(root / "full", tmp_path / "half", merge=root / "adapted", share=0.5)
    assert unequal(written(tmp_path / "default"), written(tmp_path / "half")) == []
    assert export(root / "full", tmp_path / "alone").merged is None
    assert told(tmp_path / "alone")["merged"] is None
    assert not (tmp_path / "alone" / "recipe_merged.yaml").exists()


def test_a_student_averaged_with_itself_is_itself(root: Path, tmp_path: Path) -> None:
    export(root / "adapted", tmp_path / "alone")
    export(root / "adapted", tmp_path / "twice", merge=root / "adapted", share=0.3)
    assert unequal(written(tmp_path / "alone"), written(tmp_path / "twice")) == []


def test_other_kinds_of_numbers() -> None:
    """Half precision is averaged in full, whole numbers are those of the first; other names or shapes have no average."""
    one, other = ({"a": torch.tensor([v], dtype=torch.bfloat16), "n": torch.tensor(int(v))} for v in (1.0, 1.0078125))
    mixed = averaged(one, {"a": other["a"].double(), "n": torch.tensor(7)}, 0.5)
    assert mixed["a"].dtype == torch.float32
    assert mixed["a"].tolist() == [1.00390625]
    assert int(mixed["n"]) == 1
    assert averaged(one, other, 1)["a"].dtype == torch.bfloat16
    for wrong in ({"a": other["a"]}, {**other, "a": torch.zeros(2)}):
        with pytest.raises(ValueError, match="different networks"):
            averaged(one, wrong, 1)


def test_notes_card_and_both_recipes_say_so(root: Path, tmp_path: Path) -> None:
    to = tmp_path / "merged"
    export(root / "full", to, merge=root / "adapted", share=0.25)
    assert told(to)["merged"] == {"run": "adapted", "share": 0.25, "method": "dmd2", "step": 2, "steps": 2, "ema": True}
    assert recipes.load(to / "recipe.yaml") == recipes.load(root / "full" / "recipe.yaml")
    assert recipes.load(to / "recipe_merged.yaml") == recipes.load(root / "adapted" / "recipe.yaml")
    text = (to / "README.md").read_text()
    assert "Its weights are 0.25 times that student's plus 0.75 times those of another student of the\nsame teacher, distilled" in text
    assert "Distribution Matching Distillation (`dmd2`), step 2 of 2, EMA; recipe in `recipe_merged.yaml` |\n| seed |" in text
    assert "`stepdistill export RUN --merge OTHER --share 0.25`" in text
    add_results(to, [])
    assert (to / "README.md").read_text() == text
    assert load_student(to)[1] == load_student(_alone(root, tmp_path))[1]


def _alone(root: Path, tmp_path: Path) -> Path:
    export(root / "full", tmp_path / "alone")
    assert "merged" not in (tmp_path / "alone" / "README.md").read_text()
    return tmp_path / "alone"


# ---- pipelines with prompts

@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return Taught("sd", tmp_path_factory.mktemp("sd") / "teacher")


@pytest.fixture(scope="module")
def students(sd: Taught, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Runs of a full copy and of an adapter."""
    root = tmp_path_factory.mktemp("students")
    return {"full": sd.run(root / "full", TWO), "adapted": sd.run(root / "adapted", TWO, adapter(sd, 3), lora={"student": {"rank": 3}})}


def test_students_of_a_pipeline(sd: Taught, students: Mapping[str, Path], tmp_path: Path) -> None:
    alone = {}
    for name, run in students.items():
        export(run, tmp_path / name)
        alone[name] = written(tmp_path / name)
    for share in (0.0, 0.25, 1.0):
        export(students["adapted"], tmp_path / f"{share}", merge=students["full"], share=share)
        found = written(tmp_path / f"{share}")
        if share in (0, 1):
            assert unequal(found, alone["adapted" if share else "full"]) == []
        for key, value in found.items():
            torch.testing.assert_close(value, share * alone["adapted"][key] + (1 - share) * alone["full"][key])
        assert not (tmp_path / f"{share}" / "lora").exists()
    text = (tmp_path / "0.25" / "README.md").read_text()
    assert "Its weights are 0.25 times that student's plus 0.75 times" in text
    assert "`recipe_merged.yaml` is that of the other student: step 5 of 5,\nlast weights." in text
    assert told(tmp_path / "0.25")["merged"]["run"] == "full"
    load_student(tmp_path / "0.25", prompts=PROMPTS)


def test_an_average_is_factored_like_a_full_copy(sd: Taught, students: Mapping[str, Path], tmp_path: Path) -> None:
    """Two adapters of rank 3 are one of rank 6; the notes say what the factors leave out."""
    run = sd.run(tmp_path / "second", TWO, shaken(adapter(sd, 3)), lora={"student": {"rank": 3}})
    done = export(students["adapted"], tmp_path / "to", merge=run, lora_rank=6)
    assert done.fit is not None
    assert done.fit.error < 1e-4
    assert (tmp_path / "to" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(ValueError, match="is an adapter of rank 3 already"):
        export(students["adapted"], tmp_path / "again", lora_rank=6)


# ---- what is refused

def test_students_that_have_no_average(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "world"
    tiny_teacher(other / "teacher", seed=2)
    trained(other, "elsewhere")
    for run, words in ((other / "elsewhere", "another teacher"), (root / "two", "another sampler")):
        with pytest.raises(ValueError, match=rf"{words} than that of .*: only weights that began alike and are run alike") as caught:
            export(root / "full", tmp_path / "to", merge=run)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        export(root / "full", tmp_path / "to", merge=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1\.5"):
        export(root / "full", tmp_path / "to", merge=root / "adapted", share=1.5)
    with pytest.raises(ValueError, match="name the other run with --merge"):
        export(root / "full", tmp_path / "to", share=0.5)
    assert not (tmp_path / "to").exists()


def test_an_adapter_of_another_network(sd: Taught, students: Mapping[str, Path], tmp_path: Path) -> None:
    strange = {"nowhere/to_q/lora_A": torch.zeros(3, 2), "nowhere/to_q/lora_B": torch.zeros(2, 3)}
    run = sd.run(tmp_path / "strange", TWO, strange, lora={"student": {"rank": 3}})
    with pytest.raises(ValueError, match=r"the adapter of .*strange does not fit the teacher"):
        export(students["full"], tmp_path / "to", merge=run)
    tree = tiny_tree(tmp_path, **DATA_FREE)
    assert loop.start(recipes.parse(tree), tmp_path / "run").finished
    held = recipes.load(tmp_path / "run" / "recipe.yaml")
    (tmp_path / "run" / "recipe.yaml").write_text(recipes.dump(held).replace("lora: {}", "lora: {student: {rank: 2}}"))
    with pytest.raises(ValueError, match="does not fit the teacher"):
        export(tmp_path / "run", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["export", str(root / "full"), "--to", str(tmp_path / "to"), "--merge", str(root / "adapted"), "--share", "0.75"]
    assert cli.run(asked) == 0
    assert "0.75 of it, the rest the student of step 2 of" in capsys.readouterr().out
    assert cli.run(["export", str(root / "full"), "--to", str(tmp_path / "no"), "--share", "0.5"]) == 2
    assert "name the other run with --merge" in capsys.readouterr().err
    assert cli.run(["export", str(root / "full"), "--to", str(tmp_path / "no"), "--merge", str(root / "two"), "--share", "2"]) == 2
    assert not (tmp_path / "no").exists()
