"""ECT and iCT: k_r below k_t, denoising at the start, Karras intervals under the log-normal law, agreement with the teacher (card 4)."""

from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, PROCESSES, GaussianTeacher, MapOfTimes, f64

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import Flow, Karras, TableVP
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import LogNormal
from stepdistill.methods.base import Batch, Images, Sample, Setup
from stepdistill.methods.ect import ECT, ECTConfig, ect_below, ict_pair
from stepdistill.models.conditioning import Conditioning

COUNT = 64


def ect(process=None, shape=(3,), **options) -> ECT:
    return ECT(ECTConfig(**options), Setup(process or Flow(), shape, SamplerSpec((1.0,))))


def test_below_of_the_first_stage():
    """Card 4: with q = 2 and m = 0 small k map to 0 and large k to k/2; with q = 256 k_r is near k from the start."""
    k = f64([0.01, 1.0, 2.0, 3.0, 6.0, 80.0])
    golden = [max(0.0, float(v) * (1 - 0.5 * (1 + 8 / (1 + 2.718281828459045 ** float(v))))) for v in k]
    torch.testing.assert_close(ect_below(k, 0, 2.0), f64(golden))
    assert golden[:2] == [0, 0]
    assert golden[-1] == pytest.approx(40, abs=1e-9)
    assert bool((ect_below(k, 0, 256.0) > 0.96 * k).all())
    assert all(bool((ect_below(k, m + 1, 2.0) >= ect_below(k, m, 2.0)).all()) for m in range(8))
    assert bool((ect_below(k, 40, 2.0) <= 0.999 * k).all())                     # float32 could not tell nearer ones apart


def test_stages_are_counted_in_updates():
    method, law = ect(double_every=10), LogNormal()
    for step, stage in ((0, 0), (9, 0), (10, 1), (35, 3)):
        keyed = Draws(0, range(COUNT), step)
        k, below = method.levels(keyed)
        torch.testing.assert_close(k, law.sample(keyed.each("k")))
        torch.testing.assert_close(below, ect_below(k, stage, 2.0))
    for step, intervals in ((0, 10), (10, 20), (75, 1280), (95, 1280)):                             # 10·2^m, at most 1280
        k, below = ect(double_every=10, curriculum="ict").levels(Draws(0, range(2000), step))
        grid = Karras().sigma(torch.linspace(0, 1, intervals + 1, dtype=torch.float64))
        place = torch.searchsorted(grid, k)
        torch.testing.assert_close(grid[place], k)
        torch.testing.assert_close(below, torch.where(place == 1, 0.0, grid[place - 1]))


def test_intervals_follow_the_log_normal_law():
    """iCT's mass of an interval is that of the law between its ends, renormalised to the grid, and sums to 1."""
    law, count = LogNormal(-1.1, 2.0), 40_000
    k, _ = ict_pair((torch.arange(count, dtype=torch.float64) + 0.5) / count, 0, law)
    grid = Karras().sigma(torch.linspace(0, 1, 11, dtype=torch.float64))
    found = torch.searchsorted(grid, k).bincount(minlength=11)[1:] / count
    normal = torch.distributions.Normal(-1.1, 2.0)
    mass = normal.cdf(grid.log()).diff()
    assert float(found.sum()) == 1
    torch.testing.assert_close(found.double(), mass / mass.sum(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("options", [{}, {"curriculum": "ict"}], ids=["ect", "ict"])
def test_loss_by_hand_on_every_process(name, options):
    """|f(x0 + k_t·eps) - f(x0 + k_r·eps)| / (k_t - k_r) in the frame of k, with x0 for the target where k_r is 0; no k past the process."""
    process, keyed = PROCESSES[name], Draws(0, range(COUNT))
    teacher = GaussianTeacher(process, "x0")
    student, method = MapOfTimes(teacher, bend=0.2), ect(process, **options)
    x0 = teacher.data(COUNT, torch.Generator().manual_seed(0), 3)
    got = method.student_loss(SimpleNamespace(student=student), Batch({"real": Sample(Conditioning(), x0)}), keyed).value
    k_t, k_r = method.levels(keyed)
    one = f64(1.0)
    assert float(k_t.max()) <= float(process.sigma(one) / process.alpha(one)) * (1 + 1e-9)
    assert 0 < int((k_r == 0).sum()) < COUNT
    eps, expected = keyed.each("eps").normal_like(x0), []
    for i in range(COUNT):
        f = []
        for k in (k_t[i], k_r[i]):
            t = process.time_of(-2 * k.log())[None]
            f.append(student(process.add_noise(x0[i][None], eps[i][None], t), t).x0[0] if k > 0 else x0[i])
        expected.append((f[0] - f[1]).norm() / (k_t[i] - k_r[i]))
    torch.testing.assert_close(got, torch.stack(expected).mean(), rtol=1e-6, atol=0)
    times = student.calls[1]
    torch.testing.assert_close(process.sigma(times) / process.alpha(times), k_t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_loss_in_every_space(kind):
    process = TableVP.scaled_linear()
    values = []
    for k in ("x0", kind):
        teacher = GaussianTeacher(process, k)
        x0 = teacher.data(COUNT, torch.Generator().manual_seed(0), 3)
        batch = Batch({"real": Sample(Conditioning(), x0)})
        values.append(float(ect(process).student_loss(SimpleNamespace(student=MapOfTimes(teacher, kind=k, bend=0.2)), batch,
                                                      Draws(0, range(COUNT))).value))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


class Linear:
    """A student linear in x, one coefficient for all times."""

    def __init__(self, process, weight):
        self.process, self.weight = process, weight

    def __call__(self, x_t, t, cond=None, *, w=None, tap=False):
        return Prediction(0.3 + self.weight * x_t, "x0", x_t, self.process.alpha(t), self.process.sigma(t))


def gradient_of(method: ECT, x0: torch.Tensor, keyed: Draws) -> float:
    weight = f64(0.7).requires_grad_()
    m = SimpleNamespace(student=Linear(method.process, weight))
    method.student_loss(m, Batch({"real": Sample(Conditioning(), x0)}), keyed).value.backward()
    return float(weight.grad)


def test_a_gap_of_everything_is_denoising():
    """Where every k_r is 0 the gradient is that of |f(x_t) - x0|/k_t (card 4, test 10)."""
    process, keyed = Karras(), Draws(0, range(COUNT))
    method = ect(process, times=LogNormal(-4.0, 0.1))                                               # k near .02: all map to 0
    x0 = GaussianTeacher(process).data(COUNT, torch.Generator().manual_seed(0), 3)
    k, below = method.levels(keyed)
    assert not bool(below.any())
    weight = f64(0.7).requires_grad_()
    x_t = x0 + k[:, None] * keyed.each("eps").normal_like(x0)
    ((0.3 + weight * x_t - x0).norm(dim=1) / k).mean().backward()
    assert gradient_of(method, x0, keyed) == pytest.approx(float(weight.grad), rel=1e-6)


def test_without_a_teacher_it_learns_what_the_teacher_would_have_taught():
    """For a squared distance and a student linear in x, x_r of the same eps and x_r of the teacher's Euler step give one gradient in
    expectation, at every gap (card 4, test 10). Huber with a large c is the square over 2c."""
    process, count, c = Karras(), 200_000, 1e3
    teacher = GaussianTeacher(process, "edm")
    x0 = teacher.data(count, torch.Generator().manual_seed(0), 1)
    eps = torch.randn(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for stage in (0, 2, 5):
        k = torch.full((count,), 2.0, dtype=torch.float64)
        below = ect_below(k, stage, 2.0)
        keyed = SimpleNamespace(step=stage, each=lambda tag: SimpleNamespace(normal_like=lambda x: eps))
        method = ect(process, shape=(1,), huber=c, double_every=1)
        method.levels = lambda draws, k=k, below=below: (k, below)
        ours = 2 * c * gradient_of(method, x0, keyed)
        weight, (t, r) = f64(0.7).requires_grad_(), (process.time_of(-2 * v.log()) for v in (k, below))
        x_t = x0 + k[:, None] * eps
        pred = teacher(x_t, t)
        x_r = jump(pred, process, r) if bool((below > 0).all()) else pred.x0
        target = (0.3 + weight * x_r).detach() if bool((below > 0).all()) else pred.x0
        ((0.3 + weight * x_t - target).square().sum(1) / (k - below)).mean().backward()
        assert ours == pytest.approx(float(weight.grad), rel=0.03)


def test_needs_no_teacher():
    assert set(ECT.needs(ECTConfig())) == {"student"}
    assert ECT.data(ECTConfig()) == {"real": Images()}
    assert ect().sampler() == SamplerSpec((1.0,))


@pytest.mark.parametrize("options", [{"q": 1.0}, {"double_every": 0}, {"huber": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ECTConfig(**options)
