"""Polish: the target is the student as it was found followed by one teacher call, and least squares reaches its closed form."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from toys import Counted, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import trailing
from stepdistill.methods.base import Batch, Sample, Stage, Setup
from stepdistill.methods.polish import Polish, PolishConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles


def affine(a: torch.Tensor, b: torch.Tensor):
    """x0 = a + b·x_t as a denoiser of the flow process."""
    net = lambda x_t, t, cond, *, w=None, tap=False: SimpleNamespace(x0=a + b * x_t.double(), x_t=x_t)          # noqa: E731
    net.process = Flow()
    return net


def keyed(step: int = 0, count: int = 4) -> Draws:
    return Draws(0, range(count), step, 0)


def test_least_squares_reaches_the_closed_form():
    """before: 0.2 + 0.9·z; teacher N(1.3, .6²) at s: the mean of its answer is m + k·(x0 - m), k = a²q²/(a²q² + s²)."""
    s, a, b = 0.3, f64(0.2).requires_grad_(), f64(0.9).requires_grad_()
    method = Polish(PolishConfig(s), Setup(Flow(), (256,)))
    m = SimpleNamespace(student=affine(a, b), before=affine(f64(0.2), f64(0.9)), teacher=GaussianTeacher(Flow(), "flow"))
    optimizer = torch.optim.Adam([a, b], 0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        method.student_loss(m, Batch({"main": Sample(Conditioning())}), keyed(step)).value.backward()
        optimizer.step()
    signal = (1 - s) ** 2 * 0.36
    k = signal / (signal + s * s)
    assert float(a) == pytest.approx(1.3 + k * (0.2 - 1.3), abs=0.01)
    assert float(b) == pytest.approx(k * 0.9, abs=0.01)


def test_earlier_calls_keep_what_they_say():
    """At a call that is not the last the teacher is not asked, and a student that has not moved has no loss."""
    teacher = GaussianTeacher(Flow(), "flow")
    method = Polish(PolishConfig(0.3), Setup(Flow(), (3,), SamplerSpec(trailing(4))))
    seen = set()
    for step in range(30):
        weight = f64(0.9).requires_grad_()
        m = SimpleNamespace(student=affine(f64(0.2), weight), before=affine(f64(0.2), f64(0.9)), teacher=teacher)
        calls, last = len(teacher.calls), int(keyed(step).shared("call").integers(4))
        loss = method.student_loss(m, Batch({"main": Sample(Conditioning())}), keyed(step))
        assert (float(loss.value) == 0) == (last < 3)
        assert len(teacher.calls) - calls == (last == 3)
        seen.add(last)
    assert seen == {0, 1, 2, 3}


def test_the_state_is_that_of_the_sampler_before_the_student_moved():
    """The student is asked at the state and time that `before` reaches on inference's own path, clamped as inference clamps."""
    spec = SamplerSpec((1.0, 0.6, 0.2), clip_x0=0.5)
    method = Polish(PolishConfig(), Setup(Flow(), (3,), spec))
    asked = []

    def student(x_t, t, cond, *, w=None, tap=False):
        asked.append((x_t, t))
        return SimpleNamespace(x0=10 * x_t, x_t=x_t, alpha=Flow().alpha(t), sigma=Flow().sigma(t))

    def before(x_t, t, cond, *, w=None, tap=False):
        return SimpleNamespace(x0=0.7 * x_t, x_t=x_t, alpha=Flow().alpha(t), sigma=Flow().sigma(t))

    student.process = before.process = Flow()
    for step in range(12):
        asked.clear()
        d = keyed(step)
        loss = method.student_loss(SimpleNamespace(student=student, before=before, teacher=GaussianTeacher(Flow(), "flow")),
                                   Batch({"main": Sample(Conditioning())}), d)
        walk = list(steps(before, start(Flow(), spec, d.each("start").normal(3)), spec, Conditioning(), d))
        call = walk[int(d.shared("call").integers(3))]
        torch.testing.assert_close(asked[0][0], call.pred.x_t, rtol=0, atol=0)
        assert torch.equal(asked[0][1], call.t)
        assert float(loss.value) <= 1.0                                             # both ends lie within [-0.5, 0.5]


def test_before_is_taken_when_the_run_begins_and_stays():
    table = TableVP.scaled_linear()
    teacher = Denoiser(tiny_unet(), table, "eps", guidance=1.0, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    method = Polish(PolishConfig(), Setup(table, (1, 8, 8)))
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


@pytest.mark.parametrize("time", [0.0, 1.0, -0.1])
def test_impossible_times(time):
    with pytest.raises(ValueError, match=r"method\.time"):
        PolishConfig(time)
