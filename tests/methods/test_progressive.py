"""Progressive distillation: two jumps in one in every space, the student that makes them, stages, and resuming in a later one (card 1)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, PROCESSES, GaussianTeacher, f64
from tiny import final_tensors, tiny_tree, unequal

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction, target
from stepdistill.diffusion.process import Flow, TableVP, Trig
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import trailing
from stepdistill.methods.base import Batch, Sample, Setup
from stepdistill.methods.progressive import Progressive, ProgressiveConfig
from stepdistill.models.adapters import LoraRecipe
from stepdistill.models.conditioning import Conditioning
from stepdistill.training import checkpoint, loop

COUNT = 64
KEYED = Draws(0, range(COUNT))


def progressive(process=None, times=trailing(2), start=8) -> Progressive:
    return Progressive(ProgressiveConfig(start), Setup(process or Flow(), (3,), SamplerSpec(times)))


class TwoInOne:
    """The student whose jump down one step of `grid` is two jumps of the teacher."""

    def __init__(self, teacher: GaussianTeacher, grid: torch.Tensor, kind: str = "x0"):
        self.teacher, self.process, self.grid, self.kind = teacher, teacher.process, grid.flip(0), kind

    def __call__(self, x_t, t, cond=None, *, w=None, tap=False):
        process, x = self.process, x_t.double()
        place = torch.searchsorted(self.grid, f64(t).expand(len(x)))
        now, h, s = self.grid[place], self.grid[place - 1], self.grid[place - 2]
        y = jump(self.teacher(jump(self.teacher(x, now), process, h), h), process, s)
        alpha, sigma, alpha_s, sigma_s = (c[:, None] for c in (process.alpha(now), process.sigma(now), process.alpha(s), process.sigma(s)))
        det = alpha * sigma_s - sigma * alpha_s
        x0, eps = (sigma_s * x - sigma * y) / det, (alpha * y - alpha_s * x) / det
        return Prediction(target(self.kind, x0, eps, process.alpha(now), process.sigma(now)), self.kind, x,
                          process.alpha(now), process.sigma(now))


def loss_of(method, teacher, student, previous=None):
    batch = Batch({"real": Sample(Conditioning(), teacher.data(COUNT, torch.Generator().manual_seed(0), 3))})
    return method.student_loss(SimpleNamespace(teacher=teacher, student=student, previous=previous), batch, KEYED).value


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_reached_in_one_jump(name, kind):
    """x* and the eps it names jump onto y: a student that does so pays nothing, in any space (card 1, test 10a)."""
    if kind == "eps" and float(PROCESSES[name].alpha(f64(1.0))) < 1e-6:
        pytest.skip("eps names no x0 where alpha is 0")
    process = PROCESSES[name]
    method, teacher = progressive(process), GaussianTeacher(process, kind)
    grid = method.grid(8)
    assert float(loss_of(method, teacher, TwoInOne(teacher, grid, kind))) < 1e-12
    assert float(loss_of(method, teacher, teacher)) > 1e-5                                          # the teacher itself does not


@pytest.mark.parametrize("process", [Flow(), Trig(), TableVP.scaled_linear()], ids=["flow", "trig", "table"])
def test_its_sampler_is_the_teachers_of_twice_the_steps(process):
    """Noise by noise (card 1, test 10b)."""
    method, teacher = progressive(process, trailing(4), 8), GaussianTeacher(process, "v")
    student = TwoInOne(teacher, method.grid(8))
    half = sample(student, method.sampler(), None, KEYED, (3,))
    whole = sample(teacher, SamplerSpec(trailing(8), renoise=0.0), None, KEYED, (3,))
    torch.testing.assert_close(half.double(), whole.double(), rtol=1e-5, atol=1e-5)
    assert float((half - sample(teacher, method.sampler(), None, KEYED, (3,))).abs().max()) > 0.02


def test_weight_is_the_truncated_snr():
    """max(SNR, 1) on the error of x0: that of eps below the middle, of x0 above."""
    method, teacher = progressive(Trig(), (1.0,), 8), GaussianTeacher(Trig(), "v")
    exact = TwoInOne(teacher, method.grid(8))

    def off(x_t, t, cond=None, *, w=None, tap=False):
        pred = exact(x_t, t)
        return Prediction(pred.x0 + 0.1, "x0", pred.x_t, pred.alpha, pred.sigma)

    t = method.grid(8)[2 * KEYED.each("i").integers(4)]
    snr = (Trig().alpha(t) / Trig().sigma(t)).square()
    assert float(loss_of(method, teacher, off)) == pytest.approx(float(0.01 * snr.clamp_min(1).mean()), rel=1e-4)


def test_grids_divide_the_students_own_steps():
    assert progressive(times=trailing(2)).grid(8).tolist() == pytest.approx([1 - i / 8 for i in range(9)])
    assert progressive(times=(1.0, 0.4)).grid(4).tolist() == pytest.approx([1, 0.7, 0.4, 0.2, 0])
    assert progressive(times=(1.0, 0.4)).grid(2).tolist() == [1, 0.4, 0]


def test_stages():
    """Halvings down to the student's steps, the last two twice as long; only later ones copy the student."""
    method, copied = progressive(times=trailing(1), start=16), []
    m = SimpleNamespace(follow=lambda *args: copied.append(args))
    stages = method.stages(600)
    assert [(s.name, s.steps, s.resets) for s in stages] == [
        ("8 steps", 100, ("student",)), ("4 steps", 100, ("student",)), ("2 steps", 200, ("student",)), ("1 steps", 200, ("student",))]
    teacher, other = GaussianTeacher(Flow(), "v"), GaussianTeacher(Flow(), "v", mean=f64(0.3))
    for stage, steps in zip(stages, (8, 4, 2, 1), strict=True):
        method.enter(stage, m)
        assert method.steps == steps
        assert len(copied) == (steps != 8)
        copied.clear()
        guide = teacher if steps == 8 else other                                                    # `previous`, from the second on
        assert float(loss_of(method, teacher, TwoInOne(guide, method.grid(2 * steps)), other)) < 1e-12
    assert method.state() == {"steps": 1}


@pytest.mark.parametrize(("start", "times"), [(8, trailing(8)), (12, trailing(2)), (8, trailing(3)), (4, trailing(8))])
def test_starts_that_are_no_power_of_two_away_are_refused(start, times):
    with pytest.raises(ValueError, match=r"student\.steps"):
        progressive(times=times, start=start)


def test_a_start_of_one_step_is_refused():
    with pytest.raises(ValueError, match=r"method\.start must be at least 2"):
        ProgressiveConfig(1)


# ---- in the loop

def tiny(folder, **overrides):
    tree = tiny_tree(folder, "consistency", checkpoint_every=1, keep=9, **overrides)
    return recipes.parse({**tree, "method": {"name": "progressive", "start": 8}, "student": {"steps": 2}})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two stages of two and four steps, uninterrupted, beside its teacher."""
    folder = tmp_path_factory.mktemp("progressive")
    assert loop.start(tiny(folder), folder / "whole").finished
    return folder


def test_a_checkpoint_holds_what_a_later_stage_asks(base):
    """After a stage `previous` is its student; the teacher is not saved, since nothing moves it."""
    read = [checkpoint.read(path) for path in checkpoint.listed(base / "whole" / loop.CHECKPOINTS)]
    assert [state["method"]["steps"] for _, state in read] == [4, 4, 2, 2, 2, 2]
    key = "role/{}/conv_in.weight"
    assert torch.equal(read[2][0][key.format("previous")], read[1][0][key.format("student")])
    assert torch.equal(read[5][0][key.format("previous")], read[1][0][key.format("student")])
    assert not torch.equal(read[1][0][key.format("previous")], read[1][0][key.format("student")])
    assert [float(tensors["optim/student/0/step"]) for tensors, _ in read] == [1, 2, 1, 2, 3, 4]
    assert not any(name.startswith("role/teacher") for name in read[-1][0])


@pytest.mark.parametrize("stop", [2, 4])
def test_a_later_stage_resumes_bit_for_bit(base, tmp_path, monkeypatch, stop):
    """From the border and from the middle of the second stage."""
    original = loop.run_update

    def crash(run, step, *args):
        if step == stop:
            raise RuntimeError("crash")
        return original(run, step, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "run_update", crash)
        with pytest.raises(RuntimeError, match="crash"):
            loop.start(tiny(base), tmp_path / "run")
    assert loop.resume(tmp_path / "run").finished
    assert unequal(final_tensors(tmp_path / "run"), final_tensors(base / "whole")) == []


def test_adapters_on_one_base(base, tmp_path):
    """Student and previous as two adapters: the second stage asks the base with the first stage's adapter."""
    recipe = replace(tiny(base), lora={"student": LoraRecipe(2), "previous": LoraRecipe(2)})
    loop.start(recipe, tmp_path / "run")
    read = [checkpoint.read(path)[0] for path in checkpoint.listed(tmp_path / "run" / loop.CHECKPOINTS)]
    student, previous = ({k.removeprefix(f"role/{role}/").replace(role, ""): v for k, v in tensors.items() if k.startswith(f"role/{role}/")}
                         for role, tensors in (("student", read[1]), ("previous", read[5])))
    assert student.keys() == previous.keys()
    assert any(bool(v.any()) for v in student.values())
    assert all(torch.equal(v, previous[k]) for k, v in student.items())
