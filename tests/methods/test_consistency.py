"""Consistency distillation: the boundary, the fixed point at the exact map, who is asked what, and the same loss in every space."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, GaussianTeacher, f64
from toys import Counted, run_of, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction, from_x0, target
from stepdistill.diffusion.process import Flow, Karras, TableVP, Trig
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import heun, jump
from stepdistill.diffusion.times import trailing
from stepdistill.losses.distance import pseudo_huber
from stepdistill.methods.base import Batch, Images, Sample, Setup, Update
from stepdistill.methods.consistency import Consistency, ConsistencyConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.training.assemble import run_update

COUNT = 64
BOTH = pytest.mark.parametrize("process", [Flow(), Trig()], ids=["flow", "trig"])


def method_of(process, shape=(3,), steps: int = 1, times=None, **options) -> Consistency:
    return Consistency(ConsistencyConfig(**options), Setup(process, shape, SamplerSpec(times or trailing(steps))))


class Map:
    """The exact consistency function of a Gaussian teacher, time by time, counting its calls; `bend` spoils it."""

    def __init__(self, teacher: GaussianTeacher, kind: str = "x0", bend: float = 0.0):
        self.teacher, self.process, self.kind, self.bend, self.calls = teacher, teacher.process, kind, bend, []

    def __call__(self, x_t, t, cond=None, *, w=None, tap=False):
        self.calls.append(t)
        x_t, alpha, sigma = x_t.double(), self.process.alpha(t), self.process.sigma(t)
        x0 = self.teacher.flow_map(x_t, t, f64(0.0)) + self.bend * torch.sin(3 * x_t)
        eps = torch.nan_to_num(from_x0(x0, x_t, alpha, sigma).eps)                                  # 0/0 at t = 0, where nothing reads it
        return Prediction(target(self.kind, x0, eps, alpha, sigma), self.kind, x_t, alpha, sigma)


def data(teacher: GaussianTeacher, shape=(3,)) -> Batch:
    return Batch({"real": Sample(Conditioning(), teacher.data(COUNT, torch.Generator().manual_seed(0), *shape))})


def draws(step: int = 0) -> Draws:
    return Draws(0, range(COUNT), step)


def loss_of(method: Consistency, student, teacher, target=None, step: int = 0) -> torch.Tensor:
    roles = SimpleNamespace(teacher=teacher, student=student, target=target or student)
    return method.student_loss(roles, data(teacher), draws(step)).value


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_boundary(kind):
    """f(x, 0) = x to machine precision, whatever the network says."""
    for process in (Flow(), Trig(), TableVP.scaled_linear()):
        net = Denoiser(tiny_unet().double(), process, kind, clock="t")
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        cond = Conditioning({"class_labels": torch.zeros(2, dtype=torch.long)})
        torch.testing.assert_close(net(x, f64(0.0), cond).x0, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_target_at_the_boundary_is_the_state(kind):
    """In the lowest interval r = 0, and the target is the solver's landing itself, even for a network that speaks x0 and is wrong."""
    process = TableVP.scaled_linear()
    teacher, wrong = GaussianTeacher(process, "v"), Denoiser(tiny_unet().double(), process, kind, clock="t")
    method = method_of(process, (1, 8, 8), intervals=2, huber=0.0, target="student")
    batch = Batch({"real": Sample(Conditioning({"class_labels": torch.zeros(8, dtype=torch.long)}),
                                  teacher.data(8, torch.Generator().manual_seed(0), 1, 8, 8))})
    keyed = Draws(0, range(8))
    low = keyed.each("n").integers(2) == 0
    assert 0 < int(low.sum()) < 8
    with torch.no_grad():
        value = method.student_loss(SimpleNamespace(teacher=teacher, student=wrong), batch, keyed).value
        x0, cond, t = batch["real"].clean, batch["real"].cond, torch.where(low, 0.5, 1.0).double()
        x_t = process.add_noise(x0, keyed.each("eps").normal_like(x0), t)
        pred = teacher(x_t, t)
        at = low[:, None, None, None]
        x_r = torch.where(at, jump(pred, process, f64(0.0)), jump(pred, process, f64(0.5)))
        f, at_half = wrong(x_t, t, cond).x0, wrong(x_r, f64(0.5), cond).x0
        expected = (f - torch.where(at, x_r, at_half)).square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@BOTH
@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
def test_fixed_point(process, solver, order):
    """With the exact map the distance is the solver's local error: it falls as the interval to the power 2 or 3 (card 3, test 10)."""
    teacher = GaussianTeacher(process, "v")
    errors = []
    for intervals in (20, 40, 80):
        method, student = method_of(process, intervals=intervals, huber=0.0, solver=solver), Map(teacher)
        middle = SimpleNamespace(each=lambda tag, n=intervals: SimpleNamespace(                     # everyone at t = 1/2 and just below
            integers=lambda high: torch.full((COUNT,), n // 2 - 1), normal_like=draws().each(tag).normal_like))
        roles = SimpleNamespace(teacher=teacher, student=student, target=student)
        errors.append(math.sqrt(float(method.student_loss(roles, data(teacher), middle).value)))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < (1e-3 if solver == "ddim" else 2e-5)


def test_golden_values_of_the_card():
    """Card 3, test 10 (T1 at k = 2): rms |p - q| at dk .2/.1/.05, for Heun and for Euler."""
    process = Karras()
    teacher = GaussianTeacher(process, "edm")
    exact = lambda x, k: 1.3 + 0.6 * (x - 1.3) / (0.36 + k * k) ** 0.5                              # noqa: E731
    time = lambda k: process.time_of(-2 * f64(k).log())                                             # noqa: E731
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 1.3 + (0.36 + 4) ** 0.5 * z
    for dk, by_heun, by_euler in ((0.2, 2.7e-5, 2.7e-4), (0.1, 3.0e-6, 6.2e-5), (0.05, 3.5e-7, 1.5e-5)):
        pred, r = teacher(x, time(2.0)), time(2.0 - dk)
        for landing, golden in ((heun(lambda y, at: teacher(y, at), pred, process, r), by_heun), (jump(pred, process, r), by_euler)):
            rms = (exact(landing, 2.0 - dk) - exact(x, 2.0)).square().mean().sqrt()
            assert float(rms) == pytest.approx(golden, rel=0.05)


@BOTH
def test_a_wrong_map_pays_more(process):
    teacher = GaussianTeacher(process, "v")
    method = method_of(process, intervals=40, huber=0.0, solver="heun")
    right = float(loss_of(method, Map(teacher), teacher))
    wrong = float(loss_of(method, Map(teacher, bend=0.1), teacher))
    assert wrong > 100 * right


def test_huber_zero_is_l2():
    teacher = GaussianTeacher(Flow(), "v")
    student, other = Map(teacher, bend=0.3), Map(teacher)
    plain = float(loss_of(method_of(Flow(), huber=0.0), student, teacher, other))
    wide = float(loss_of(method_of(Flow(), huber=1e4), student, teacher, other))
    assert wide * 2e4 == pytest.approx(plain, rel=1e-4)                                             # Huber's other limit
    small = float(loss_of(method_of(Flow(), huber=1e-3), student, teacher, other))
    assert small != pytest.approx(plain, rel=0.1)


@BOTH
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_same_loss_in_every_space(process, solver):
    """The problem, teacher and student, told in four spaces: one loss, to rounding. (eps names no x0 where alpha is 0: next test.)"""
    method = method_of(process, intervals=10, solver=solver)
    values = [float(loss_of(method, Map(GaussianTeacher(process), kind, bend=0.2), GaussianTeacher(process, kind)))
              for kind in ("x0", "v", "flow", "edm")]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_same_loss_when_the_network_speaks_eps(solver):
    """On a table with a non-zero terminal SNR eps names x0 everywhere."""
    process = TableVP.scaled_linear()
    method = method_of(process, intervals=10, solver=solver)
    values = [float(loss_of(method, Map(GaussianTeacher(process), kind, bend=0.2), GaussianTeacher(process, kind))) for kind in KINDS]
    assert values == pytest.approx([values[0]] * len(KINDS), rel=1e-6)


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("whose", ["ema", "student"])
def test_calls(solver, calls, whose):
    """Teacher once, twice for Heun; the target is asked once, at r, by whom the configuration says."""
    teacher = GaussianTeacher(Flow(), "v")
    student, average = Map(teacher), Map(teacher)
    loss_of(method_of(Flow(), solver=solver, target=whose, intervals=5), student, teacher, average)
    assert len(teacher.calls) == calls
    n = 1 + draws().each("n").integers(5)
    assert torch.equal(student.calls[-1], n.double() / 5)                                           # the gradient's call
    asked = average.calls if whose == "ema" else student.calls[:-1]
    assert len(asked) == 1
    assert torch.equal(asked[0], (n - 1).double() / 5)                                              # one skip interval below
    assert len(average.calls) == (whose == "ema")
    if solver == "heun":
        assert torch.equal(teacher.calls[1], (n - 1).double() / 5)


def test_every_interval_is_drawn():
    n = 1 + Draws(0, range(4000)).each("n").integers(7)
    counts = n.bincount(minlength=8)
    assert counts[0] == 0
    assert bool((counts[1:] > 450).all())


def test_needs_and_data():
    assert set(Consistency.needs(ConsistencyConfig())) == {"teacher", "student", "target"}
    assert set(Consistency.needs(ConsistencyConfig(target="student"))) == {"teacher", "student"}
    assert [n for n, r in Consistency.needs(ConsistencyConfig()).items() if r.trains] == ["student"]
    assert Consistency.data(ConsistencyConfig()) == {"real": Images()}


def unet_roles(method: Consistency, kind: str = "v") -> Roles:
    teacher = Denoiser(tiny_unet(), method.process, kind, guidance=2.0)
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    return Roles.build(method.needs(method.cfg), teacher, lambda: example)


def labelled(keyed: Draws) -> Batch:
    labels = keyed.each("labels").integers(3)
    return Batch({"real": Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}),
                                 keyed.each("x0").normal(1, 8, 8))})


@pytest.mark.parametrize("whose", ["ema", "student"])
def test_gradient_stops_at_the_target(whose):
    """Only f(x_t, t) carries a gradient: it is that of the distance to a constant."""
    method = method_of(TableVP.scaled_linear(), (1, 8, 8), target=whose, intervals=4)
    m = unet_roles(method)
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(0.01)
    few = lambda step, update: Draws(0, range(4), step, update)                                     # noqa: E731
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher:
        run_update(run_of(method, m, few, labelled), 0, 0, Update("student", ("student",)), ())
    assert teacher == [8]                                                                           # guided: one doubled batch
    assert student == ([4] if whose == "ema" else [4, 4])
    got = [p.grad.clone() for p in m.parameters("student") if p.grad is not None]
    assert all(p.grad is None for name in m.names if name != "student" for p in m.parameters(name))
    batch, keyed = labelled(few(0, 0)), few(0, 0)
    n = 1 + keyed.each("n").integers(4)
    t, r, cond, x0 = n.double() / 4, (n - 1).double() / 4, batch["real"].cond, batch["real"].clean
    x_t = method.process.add_noise(x0, keyed.each("eps").normal_like(x0), t)
    with torch.no_grad():
        x_r = jump(m.teacher(x_t, t, cond), method.process, r)
        fixed = getattr(m, "target" if whose == "ema" else "student")(x_r, r, cond).x0
    m.module("student").zero_grad()
    pseudo_huber(m.student(x_t, t, cond).x0, fixed).mean().backward()
    for mine, theirs in zip(got, [p.grad for p in m.parameters("student") if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_target_follows_after_the_update():
    method = method_of(TableVP.scaled_linear(), (1, 8, 8), target_decay=0.75)
    m = unet_roles(method)
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(1.0)
    before = [p.clone() for p in m.parameters("target")]
    method.after_update(m, method.plan(0)[0], 1)
    for now, old in zip(m.parameters("target"), before, strict=True):
        torch.testing.assert_close(now, old + 0.25)
    method_of(TableVP.scaled_linear(), target="student").after_update(m, method.plan(0)[0], 1)       # nothing to move


def test_sampler_is_that_of_an_endpoint_student():
    assert method_of(Flow(), steps=4).sampler().times == trailing(4)
    assert method_of(Flow(), steps=4).sampler().renoise == 1.0
    assert method_of(Flow(), steps=2, times=(1.0, 0.3)).sampler().times == (1.0, 0.3)


@pytest.mark.parametrize(("options", "message"), [
    ({"intervals": 1}, "intervals must be at least 2, got 1"), ({"target_decay": 1.0}, "target_decay must lie"),
    ({"target_decay": -0.1}, "target_decay must lie"), ({"huber": -1.0}, "huber cannot be negative")])
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**options)


def test_a_process_that_is_never_clean_has_the_same_fixed_point():
    """EDM's ends at sigma .002: f jumps there. The exact map pays next to nothing in whole intervals, a bent one much more."""
    teacher = GaussianTeacher(Karras(), "edm")
    method = method_of(Karras(), intervals=40, huber=0.0, solver="heun")
    assert float(loss_of(method, Map(teacher), teacher)) < 0.02 * float(loss_of(method, Map(teacher, bend=0.1), teacher))
