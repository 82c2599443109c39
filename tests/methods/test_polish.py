"""Polish: the target is the student as it was found, ended by its teacher, and least squares reaches its closed form."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from toys import Counted, distil, draw_student, modes_covered, pretrained, ring, tiny_unet

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import trailing
from stepdistill.methods.base import Batch, Sample, Setup, Stage
from stepdistill.methods.polish import Polish, PolishConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.recipe import OptimRecipe
from stepdistill.training import checkpoint, loop

NOTHING = Batch({"main": Sample(Conditioning())})


class Affine:
    """x0 = a + b·x_t as a denoiser of the flow process, remembering when it was asked."""

    process = Flow()

    def __init__(self, a: float = 0.2, b: float = 0.9):
        self.weights = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x_t, t, cond, *, w=None, tap=False):
        self.asked.append((x_t, t))
        return SimpleNamespace(x0=self.weights[0] + self.weights[1] * x_t.double(), x_t=x_t, alpha=Flow().alpha(t), sigma=Flow().sigma(t))


def keyed(step: int = 0, count: int = 4) -> Draws:
    return Draws(0, range(count), step, 0)


def roles(teacher: GaussianTeacher | None = None, **student: float) -> SimpleNamespace:
    return SimpleNamespace(student=Affine(**student), before=Affine(), teacher=teacher or GaussianTeacher(Flow(), "flow"))


def test_least_squares_reaches_the_closed_form():
    """before: 0.2 + 0.9·z; teacher N(1.3, .6²) at s: the mean of its answer is m + k·(x0 - m), k = a²q²/(a²q² + s²)."""
    s, m = 0.3, roles()
    method = Polish(PolishConfig(s), Setup(Flow(), (256,)))
    optimizer = torch.optim.Adam([m.student.weights], 0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        method.student_loss(m, NOTHING, keyed(step)).value.backward()
        optimizer.step()
    signal = (1 - s) ** 2 * 0.36
    k = signal / (signal + s * s)
    assert m.student.weights.tolist() == pytest.approx([1.3 + k * (0.2 - 1.3), k * 0.9], abs=0.01)
    assert m.before.weights.grad is None


@pytest.mark.parametrize(("times", "folded"), [((1.0, 0.75, 0.5), True), ((1.0, 0.5, 0.3), False)], ids=["folded", "its own call"])
def test_who_is_the_target_of_which_call(times, folded):
    """Above s the student as it was; at s and below the teacher at that very state, or, where no call is there, after the last one."""
    teacher, seen = GaussianTeacher(Flow(), "flow"), set()
    method = Polish(PolishConfig(0.3), Setup(Flow(), (3,), SamplerSpec(times)))
    for step in range(30):
        m, calls = roles(teacher, a=0.5), len(teacher.calls)
        loss = method.student_loss(m, NOTHING, keyed(step)).value
        x_t, t = m.student.asked[-1]
        x0, last = 0.5 + 0.9 * x_t.double(), float(t[0]) == times[-1]
        y = 0.2 + 0.9 * x_t.double()
        if last:
            s = f64(0.3).expand(4)
            y = teacher(Flow().add_noise(y, keyed(step).each("eps").normal_like(y), s) if folded else x_t, s).x0
            calls += 1
        weight = max(1.0, (1 / float(t[0]) - 1) ** 2)                                   # max(SNR, 1)
        torch.testing.assert_close(loss.detach(), weight * (x0 - y).square().mean(), rtol=1e-6, atol=1e-9)
        assert len(teacher.calls) == calls + last
        assert len(m.before.asked) == (0 if last and not folded else 1)
        seen.add(float(t[0]))
    assert seen == set(times)


def test_states_are_the_students_own_and_both_ends_are_bounded():
    spec = SamplerSpec((1.0, 0.6, 0.2), clip_x0=0.5)
    method = Polish(PolishConfig(), Setup(Flow(), (3,), spec))
    for step in range(12):
        m, d = roles(b=10.0), keyed(step)
        loss = method.student_loss(m, NOTHING, d)
        x_t, t = m.student.asked[-1]
        walk = steps(Affine(b=10.0), start(Flow(), spec, d.each("start").normal(3)), spec, Conditioning(), d)
        torch.testing.assert_close(x_t, next(call.pred.x_t for call in walk if float(call.t[0]) == float(t[0])), rtol=0, atol=0)
        assert float(loss.log["distance"]) <= 1.0                                           # both ends lie within [-0.5, 0.5]


def test_before_is_taken_when_the_run_begins():
    table = TableVP.scaled_linear()
    teacher = Denoiser(tiny_unet(), table, "eps", guidance=1.0, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    method = Polish(PolishConfig(), Setup(table, (1, 8, 8), SamplerSpec(trailing(1))))
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example)
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(0.1)
    method.enter(Stage("main", 1), m)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters("student"), m.parameters("before"), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(m.parameters("teacher"), m.parameters("before"), strict=True))
    with Counted(m.teacher.network) as calls:
        method.student_loss(m, Batch({"main": Sample(Conditioning({"class_labels": torch.zeros(4, dtype=torch.long)}))}), keyed())
    assert calls == [4]


@pytest.mark.parametrize("time", [0.0, 1.0])
def test_impossible_times(time):
    with pytest.raises(ValueError, match=r"method\.time"):
        PolishConfig(time)


def test_it_begins_at_a_run_and_refuses_to_begin_at_the_teacher(tmp_path):
    few = ["steps=1", "batch_size=2", "preview_every=0", "trackers=[]", "precision=fp32"]
    with pytest.raises(ValueError, match="ends a trained student: name its run with start=RUN"):
        loop.start(recipes.load("fashion/polish", few), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    loop.start(recipes.load("fashion/dmd2_datafree", [*few, "ema_decay=0"]), tmp_path / "run")
    loop.start(recipes.load("fashion/polish", [*few, f"start={tmp_path / 'run'}", "student={steps: 3, times: [0.4, 0.1, 0.02]}"]),
               tmp_path / "polished")
    (begun, _), (ended, state) = (checkpoint.newest(tmp_path / name / loop.CHECKPOINTS, print) for name in ("run", "polished"))
    students = {k.removeprefix("role/student/"): v for k, v in begun.items() if k.startswith("role/student/")}
    assert students
    assert all(torch.equal(v, ended[f"role/before/{k}"]) for k, v in students.items())
    assert not all(torch.equal(v, ended[f"role/student/{k}"]) for k, v in students.items())
    assert state["sampler"]["times"] == [0.4, 0.1, 0.02]


@pytest.mark.judges("polish")
def test_a_student_of_four_steps_ends_nearer_to_the_modes():
    """Setting R, the student a network that was taught the velocity: 51 % of its samples lie near a mode, 60 % after 100 updates."""
    teacher = ring()
    begin = pretrained(teacher, 128, 600, batch=256)
    method = Polish(PolishConfig(0.2), Setup(Flow(), (2,), SamplerSpec((1.0, 0.75, 0.5, 0.25))))
    student = distil(method, teacher, begin, {"student": OptimRecipe(1e-3, schedule="cosine")}, 100, 256).student
    before, after = (modes_covered(draw_student(one, method, 8192, (2,)), teacher) for one in (begin, student))
    assert (before[0], after[0]) == (8, 8)
    assert after[1] > before[1] + 0.05
