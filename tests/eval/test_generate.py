"""Generation from (seed, i) alone, and the commands that make and score pictures, on the shipped teacher and on tiny students."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import LABELS, tiny_recipe, tiny_teacher

from stepdistill.cli import run as command
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.eval.generate import generate
from stepdistill.eval.models import open_model
from stepdistill.export import export
from stepdistill.models.load import load_teacher
from stepdistill.training import loop
from stepdistill.worlds import stored_results


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An export of two steps of training, as a folder."""
    base = tmp_path_factory.mktemp("student")
    loop.start(tiny_recipe(base, method__gan_weight=0, steps=2, student={"steps": 2}), base / "run")
    export(base / "run", base / "export")
    return base / "export"


@pytest.mark.parametrize("renoise", [0.0, 0.3, 1.0])
def test_sample_i_depends_on_seed_and_i_alone(teacher, renoise):
    spec = SamplerSpec(trailing(3), renoise=renoise, guidance=1.5)
    whole = generate(teacher, spec, 7, 5, batch_size=7, quiet=True)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (whole.images[0].float() - whole.images[3].float()).abs().mean() > 1                     # the same label, another picture
    for size in (1, 3):
        other = generate(teacher, spec, 7, 5, batch_size=size, quiet=True)
        assert (other.images.int() - whole.images.int()).abs().max() <= 1                          # one rounding of the last bit
        assert (other.images == whole.images).float().mean() > 0.999
    assert torch.equal(generate(teacher, spec, 3, 5, batch_size=3, quiet=True).images, generate(teacher, spec, 3, 5, quiet=True).images)
    assert not torch.equal(generate(teacher, spec, 7, 6, quiet=True).images, whole.images)


def test_pictures_are_made_without_tf32(teacher, monkeypatch):
    """Which cuDNN uses unless told otherwise; neither does an autocast from outside reach what decodes them. Settings come back."""
    seen, pictures = [], type(teacher).pictures
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"))  # noqa: E731
    monkeypatch.setattr(type(teacher), "pictures", lambda self, x0: seen.append(flags()) or pictures(self, x0))
    hook = teacher.denoiser.network.register_forward_pre_hook(lambda *_: seen.append(flags()))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.autocast("cpu", torch.bfloat16):
        generate(teacher, SamplerSpec((1.0,)), 4, 0, quiet=True)
        assert flags() == (False, True, True)
    hook.remove()
    assert seen == [(False, False, False)] * 2


def test_one_label_for_all(teacher):
    made = generate(teacher, SamplerSpec((1.0,)), 4, 0, label=lambda i: 2, quiet=True)
    assert made.labels.tolist() == [2] * 4
    assert made.images.shape == (4, 1, 16, 16)
    assert made.images.dtype == torch.uint8


def test_a_student_is_known_by_its_recipe(student, teacher):
    """As it lies in the export; a teacher has none."""
    wanted = hashlib.sha256((student / "recipe.yaml").read_bytes()).hexdigest()
    assert open_model(str(student)).describe()["recipe_sha256"] == wanted
    assert "recipe_sha256" not in open_model(str(teacher.folder), 1, 1.0).describe()


def test_sample_writes_numbered_pictures_and_a_grid(student, tmp_path, capfd):
    common = ["sample", str(student), "--seed", "4"]
    assert command([*common, "--to", str(tmp_path / "a"), "--count", "3", "--label", LABELS[1], "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert (value["nfe"], value["count"]) == (2, 3)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["000000.png", "000001.png", "000002.png", "grid.png"]
    with Image.open(tmp_path / "a" / "000002.png") as picture:
        assert (picture.size, picture.mode) == ((16, 16), "L")
        third = picture.tobytes()
    assert command([*common, "--to", str(tmp_path / "b"), "--count", "4", "--label", "1", "--batch-size", "1"]) == 0
    with Image.open(tmp_path / "b" / "000002.png") as picture:
        assert sum(abs(x - y) for x, y in zip(third, picture.tobytes(), strict=True)) <= 2         # number or name, whatever the batch


@pytest.mark.parametrize(("arguments", "said"), [
    (["sample", "{student}", "--to", "{tmp}/x", "--label", "boot"], "no class 'boot'"),
    (["sample", "{student}", "--to", "{tmp}/x", "--prompt", "a sock"], "class-conditional"),
    (["sample", "{student}", "--to", "{tmp}/x", "--solver", "heun"], "for teachers"),
    (["sample", "{student}", "--to", "{tmp}/x", "--shift", "2"], "for teachers"),
    (["sample", "teacher:fashion", "--to", "{tmp}/x", "--shift", "0"], "shift"),
    (["sample", "{tmp}/nowhere", "--to", "{tmp}/x"], "no exported student"),
    (["sample", "{student}", "--to", "{student}"], "not empty"),
    (["sample", "{student}", "--to", "{tmp}/x", "--count", "0"], "count"),
    (["sample", "teacher:fashion", "--to", "{tmp}/x", "--solver", "dpm"], "solver"),
    (["eval", "teacher:fashion", "--to", "{tmp}/x.json", "--protocol", "fashio"], "did you mean 'fashion'"),
    (["eval", "teacher:fashion", "--to", "{tmp}", "--count", "50"], "must name a .json file"),
    (["eval", "{tmp}/nowhere", "--to", "{tmp}/x.json", "--count", "50"], "no exported student"),
    (["compare", "{tmp}/none.json", "--to", "{tmp}/x"], "no result file"),
    (["export", "{tmp}/nowhere", "--to", "{tmp}/x"], "not a run"),
])
def test_mistakes_are_one_line_and_write_nothing(student, tmp_path, capfd, arguments, said):
    assert command([a.format(student=student, tmp=tmp_path) for a in arguments]) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_teachers_times_are_its_own_unless_asked_for():
    own = open_model("teacher:fashion").spec
    assert open_model("teacher:fashion", shift=2.0).spec == replace(own, times=trailing(len(own.times), 2.0))
    assert open_model("teacher:fashion", 4).spec == replace(own, times=trailing(4))
    assert open_model("teacher:fashion", 4, 3.0, shift=0.5, renoise=0).spec == replace(
        own, times=trailing(4, 0.5), guidance=3.0, renoise=0)


def test_eval_and_compare_on_the_shipped_teacher(tmp_path, capfd):
    """One and two DDIM steps of the real teacher on 50 pictures: plumbing, and the order of the two."""
    files = []
    for steps in (1, 4):
        files.append(tmp_path / f"t{steps}.json")
        arguments = ["eval", "teacher:fashion", "--count", "50", "--steps", str(steps), "--solver", "ddim", "--json"]
        assert command([*arguments, "--to", str(files[-1])]) == 0
        result = json.loads(capfd.readouterr().out)
        assert result == json.loads(files[-1].read_text())
        assert result["sampler"]["nfe"] == 2 * steps
        assert result["model"]["is_teacher"]
        assert set(result["metrics"]) == {f"{m}_fashion" for m in ("frechet", "kid", "precision", "recall", "accuracy")}
    one, four = (json.loads(f.read_text())["metrics"]["frechet_fashion"]["value"] for f in files)
    assert four < one / 2
    assert command(["compare", *map(str, files), "--to", str(tmp_path / "report")]) == 0
    assert {"report.md", "report.json", "samples.png", "quality_vs_nfe.png"} <= {p.name for p in (tmp_path / "report").iterdir()}


def test_the_stored_scores_belong_to_the_shipped_teacher():
    """The teacher's own sampler and its naive few steps, under one protocol, with the weights that ship."""
    results = [json.loads(path.read_text()) for path in stored_results("fashion")]
    teacher = load_teacher("fashion")
    own = SamplerSpec.from_dict(dict(teacher.notes["sampler"]))
    assert {r["protocol_hash"] for r in results} == {results[0]["protocol_hash"]}
    assert len({r["model"]["sha256"] for r in results}) == 1
    assert {len(r["sampler"]["times"]) for r in results} >= {1, 2, 4, len(own.times)}
    best = min(results, key=lambda r: r["metrics"]["frechet_fashion"]["value"])
    assert SamplerSpec.from_dict({k: v for k, v in best["sampler"].items() if k != "nfe"}) == own
    assert best["metrics"]["accuracy_fashion"]["value"] > 0.9
    assert replace(own, guidance=1.0).nfe * 2 == best["sampler"]["nfe"]
