"""SwiftBrush v2: SwiftBrush to the bit where the judge is satisfied, a known gradient where it is not, and a weight that runs out."""

import json
from pathlib import Path

import pytest
import torch
from oracles import f64
from small import COUNT, TABLE, bare, gaussians, keyed, labelled, student_gradient, unet_roles
from tiny import log_lines, tiny_recipe, tiny_run, tiny_teacher
from toys import Counted

from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import trailing
from stepdistill.methods.base import Batch, Sample, Setup
from stepdistill.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from stepdistill.methods.swiftbrush_v2 import SwiftBrushV2, SwiftBrushV2Config
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role
from stepdistill.training import loop
from stepdistill.worlds.fashion.data import CLASSES

SATISFIED = {"align_above": -0.999}
AXES = f64([[1, 1], [1, -1], [-1, 0]])
LABELS = torch.tensor([0, 1, 2, 0])


def v2(process=TABLE, shape=(1, 8, 8), steps=1, decode=lambda x0: x0, **options) -> SwiftBrushV2:
    return SwiftBrushV2(SwiftBrushV2Config(**options), Setup(process, shape, SamplerSpec(trailing(steps)), decode))


def directions(pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A judge of pictures of two pixels, by the axis of each label."""
    return torch.cosine_similarity(pictures, AXES[labels], dim=1)


# ---- the two terms

@pytest.mark.parametrize("w", [1.0, 3.0])
def test_a_satisfied_judge_changes_not_one_bit(w):
    """Above `align_above` its term and the gradient of that are exactly zero: what is left is SwiftBrush, as where no judge is asked."""
    found = []
    for method in (SwiftBrush(SwiftBrushConfig(), Setup(TABLE, (1, 8, 8))), v2(align_weight=0.0), v2(align_weight=7.0, **SATISFIED)):
        m, batch = unet_roles(method, w), labelled(keyed(), method)
        loss = method.student_loss(m, batch, keyed())
        critic = method.critic_loss(m, batch, keyed(update=1)).value
        found.append((loss, loss.value.detach(), critic.detach(), student_gradient(method, m, keyed())))
    (_, *expected), (silent, *without), (judged, *satisfied) = found
    assert "align" not in silent.log
    assert float(judged.log["align"]) == 0.0
    assert float(judged.log["cosine"]) > -0.999
    for a, b, c in zip(expected, without, satisfied, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_judges_gradient_by_hand():
    """With both scores at rest only the judge pulls, by -lam/B·(axis - cos·x/|x|)/|x|, and only where the cosine is too small."""
    method = v2(Flow(), (2,), align_weight=0.7, align_above=0.9)
    m = gaussians(Flow(), (1.3, 0.6))
    m.judge = directions
    loss = method.student_loss(m, Batch({"main": Sample(Conditioning(), labels=LABELS)}), keyed())
    (found,) = torch.autograd.grad(loss.value, m.student.weights)
    z = keyed().each("start").normal(2).double()
    x = 1.3 + 0.6 * z
    size, axis = x.norm(dim=1, keepdim=True), torch.nn.functional.normalize(AXES[LABELS], dim=1)
    cosine = (x / size * axis).sum(1, keepdim=True)
    below = cosine < 0.9
    assert below.any()
    assert not below.all()
    g = -0.7 / COUNT * below * (axis - cosine * x / size) / size
    torch.testing.assert_close(found, torch.stack([g.sum(), (g * z).sum()]))
    torch.testing.assert_close(loss.log["align"].detach(), (below * (0.9 - cosine)).mean())
    torch.testing.assert_close(loss.log["cosine"].detach(), cosine.mean())


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_fixed_point(kind):
    """The teacher's own law, an exact fake score and a judge content with it: no gradient, whatever the fake speaks."""
    m = gaussians(Flow(), (1.3, 0.6), kind=kind)
    m.judge = lambda pictures, labels: torch.cosine_similarity(pictures, pictures.detach(), dim=1)
    batch = Batch({"main": Sample(Conditioning(), labels=LABELS)})
    v2(Flow(), (3,), align_weight=5.0).student_loss(m, batch, keyed()).value.backward()
    assert float(m.student.weights.grad.abs().max()) < 1e-8


def test_the_pull_of_the_shipped_judge_makes_pictures_fit_better():
    """A small step against what it adds to the gradient raises the mean cosine of the same samples."""
    method, silent = v2(align_weight=1000.0, align_above=1.0), v2(align_weight=0.0)
    m, batch = unet_roles(method), labelled(keyed(), method)
    pull = student_gradient(method, m, keyed()) - student_gradient(silent, unet_roles(silent), keyed())

    @torch.no_grad()
    def cosine() -> float:
        x0 = one_call(m.student, method.sampler(), batch["main"].cond, keyed(), (1, 8, 8), grad=False).x0
        return float(m.judge(x0, batch["main"].rows).mean())

    before, step = cosine(), 0.01 * pull / pull.norm()
    with torch.no_grad():
        for p, change in zip(m.parameters("student"), step.split([p.numel() for p in m.parameters("student")]), strict=True):
            p.sub_(change.reshape(p.shape))
    assert cosine() > before + 1e-5


def test_pictures_are_decoded_with_their_gradient():
    """States of one channel are judged as pictures twice as large: another decoder, another gradient, one look at each picture."""
    found = []
    for gain in (1.0, 0.3):
        def decode(x0, gain=gain):
            return torch.nn.functional.pixel_shuffle(gain * x0.repeat(1, 4, 1, 1), 2)

        method = v2(align_weight=1000.0, align_above=1.0, decode=decode)
        m = unet_roles(method)
        with Counted(m.judge) as rows:
            found.append(student_gradient(method, m, keyed()))
        assert rows == [COUNT]
    assert not torch.allclose(found[0], found[1], rtol=0.1)


# ---- the weight

def test_the_weight_falls_to_nothing_over_the_run():
    """In equal parts for each step; before a run says how long it is, all of it."""
    method = v2(align_weight=0.1, align_above=1.0)
    assert [method.weight(step) for step in (0, 1000)] == [0.1, 0.1]
    assert sum(stage.steps for stage in method.stages(40)) == 40
    assert [method.weight(step) for step in (0, 10, 39, 40)] == pytest.approx([0.1, 0.075, 0.0025, 0.0], abs=1e-15)
    m, parts = unet_roles(method), []
    for step in (0, 20):
        loss = method.student_loss(m, labelled(keyed(step), method), keyed(step))
        assert float(loss.log["align"]) > 0
        parts.append(float((loss.value - loss.log["pull"]).detach() / loss.log["align"].detach()))
    assert parts == pytest.approx([0.1, 0.05], rel=1e-3)


# ---- what it is made of, and what is refused

def test_roles():
    """No judge without a weight; a folder's path is made absolute, so that a run folder can be used from anywhere."""
    assert SwiftBrushV2.needs(SwiftBrushV2Config())["judge"] == Role(source="judge", of="fashion")
    assert set(SwiftBrushV2.needs(SwiftBrushV2Config(align_weight=0))) == {"teacher", "student", "fake"}
    assert SwiftBrushV2Config(judge="clip").judge == str(Path.cwd() / "clip")


def test_pipelines_with_prompts_are_refused_where_there_is_a_judge():
    with pytest.raises(ValueError, match=r"no gradient passes through the decoder.*method\.align_weight=0"):
        v2(decode=None)
    assert v2(decode=None, align_weight=0.0).decode is None


def test_a_batch_that_does_not_say_its_labels():
    m = gaussians(Flow())
    m.judge = directions
    with pytest.raises(ValueError, match="does not say which labels"):
        v2(Flow(), (2,)).student_loss(m, bare(), keyed())


@pytest.mark.parametrize(("options", "named"), [
    ({"align_weight": -0.1}, "align_weight"), ({"align_above": -1.0}, "align_above"), ({"align_above": 1.1}, "align_above"),
    ({"fake_updates": 0}, "fake_updates"), ({"dropout": 1.0}, "dropout")])
def test_impossible_values(options, named):
    with pytest.raises(ValueError, match=named):
        SwiftBrushV2Config(**options)


# ---- a run

def relabelled(folder: Path) -> Path:
    """The tiny teacher with labels that the classifier knows."""
    notes = tiny_teacher(folder / "teacher") / "stepdistill.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "labels": CLASSES[-3:]}))
    return folder


def test_a_run_judges_its_own_labels_and_keeps_no_judge(tmp_path):
    run = tiny_run(relabelled(tmp_path), "swiftbrush_v2", lora={"student": {"rank": 2}})
    assert run.method.steps == 6
    assert run.roles.judge.rows.shape == (3, 64)
    assert run.roles.given == ("teacher", "judge")
    assert {name.split("/")[1] for name in run.tensors() if name.startswith("role/")} == {"student", "fake"}
    main = run.batch(run.draws(0, 0, 0))["main"]
    assert torch.equal(main.rows, main.cond["class_labels"])


def test_the_weight_of_a_resumed_run_goes_on(tmp_path):
    recipe = tiny_recipe(relabelled(tmp_path), "swiftbrush_v2", steps=4, method__align_weight=0.2)
    assert loop.start(recipe, tmp_path / "run").finished
    for late in (tmp_path / "run" / loop.CHECKPOINTS).glob("*4"):
        late.rename(tmp_path / "late")
    assert loop.resume(tmp_path / "run").finished
    weights = [line["student/align_weight"] for line in log_lines(tmp_path / "run") if "student/align_weight" in line]
    assert weights[-2:] == pytest.approx([0.1, 0.05])


def test_a_teacher_whose_labels_the_judge_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"the classifier of fashion knows no 'sock': name a folder with a CLIP model"):
        tiny_run(tmp_path, "swiftbrush_v2")
