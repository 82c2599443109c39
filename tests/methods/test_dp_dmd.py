"""DP-DMD: what reaches the first call and what does not, and the regression that keeps the teacher's pairing of noise and sample."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, MapStudent, f64
from small import COUNT, TABLE, AffineStudent, bare, gaussians, keyed, labelled, student_gradient, unet_roles
from toys import Counted

from stepdistill.diffusion.process import Flow, Karras, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec, sample, start
from stepdistill.diffusion.solver import follow, jump
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Setup, Update
from stepdistill.methods.dp_dmd import DPDMD, DPDMDConfig


def dp_dmd(steps=4, process=TABLE, shape=(1, 8, 8), **options) -> DPDMD:
    return DPDMD(DPDMDConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps))))


class Recorded:
    """A student whose first and later calls have weights of their own, so that a gradient says which call it came from."""

    def __init__(self, process, times):
        self.calls = [AffineStudent(process, 0.1 * i, 0.5 + 0.1 * i) for i in range(len(times))]
        self.process, self.times = process, times

    def __call__(self, x_t, t, cond, *, w=None, tap=False):
        return self.calls[self.times.index(float(t[0]))](x_t, t, cond)


def recorded(weight: float, steps: int = 4):
    method, process = dp_dmd(steps, Flow(), (3,), weight=weight), Flow()
    student = Recorded(process, trailing(steps))
    m = SimpleNamespace(student=student, teacher=GaussianTeacher(process, "v"), fake=GaussianTeacher(process, "flow", f64(0.2), f64(0.9)))
    method.student_loss(m, bare(), keyed()).value.backward()
    return method, [net.weights.grad for net in student.calls]


def test_matching_reaches_every_call_but_the_first():
    """Card 6: with weight 0 the first call has no gradient; the middle ones have theirs through the calls after them."""
    _, grads = recorded(0.0)
    assert grads[0] is None or not bool(grads[0].any())
    assert all(bool(g.any()) for g in grads[1:])


def test_the_regression_reaches_the_first_call_alone():
    _, without = recorded(0.0)
    _, some = recorded(0.05)
    _, more = recorded(0.10)
    assert bool(some[0].any())
    torch.testing.assert_close(more[0], 2 * some[0])
    for a, b in zip(without[1:], some[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_step_carries_both():
    _, (both,) = recorded(0.05, 1)
    _, (matching,) = recorded(0.0, 1)
    assert bool(matching.any())
    assert not torch.allclose(both, matching)


@pytest.mark.parametrize("process", [Flow(), Flow(3.0), Trig(), TABLE], ids=["flow", "shifted", "trig", "table"])
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_the_target_is_the_teachers_mean_velocity(process, kind):
    """The chord of the exact flow map has no loss: a student that knows the map to the anchor is the fixed point, whatever it speaks."""
    if kind == "eps" and float(process.alpha(f64(1.0))) < 1e-6:
        pytest.skip("an eps network says nothing of x0 where alpha is 0")
    teacher = GaussianTeacher(process, "v")
    method = dp_dmd(2, process, (3,), teacher_steps=400, anchor_steps=100)
    mapped = MapStudent(teacher, {1.0: 0.75, 0.5: 0.0}, kind)
    loss = method.student_loss(SimpleNamespace(student=mapped, teacher=teacher, fake=teacher), bare(), keyed())
    assert float(loss.log["variety"]) < 2e-4                                        # of the teacher's 100 steps of first order
    wrong = MapStudent(teacher, {1.0: 0.25, 0.5: 0.0}, kind)
    assert float(method.student_loss(SimpleNamespace(student=wrong, teacher=teacher, fake=teacher), bare(), keyed()).log["variety"]) > 2e-3


def test_the_mean_velocity_in_closed_form():
    """Flow matching: the target of the first call is (z - z_a)/(t_1 - t_a), here against one exact Gaussian."""
    process, draws = Flow(), keyed()
    teacher, m = GaussianTeacher(process, "flow"), gaussians(process)
    m.teacher = teacher
    method = dp_dmd(2, process, (3,), teacher_steps=30, anchor_steps=5)
    variety = method.student_loss(m, bare(), draws).log["variety"]
    z, one = draws.each("start").normal(3).double(), torch.ones(COUNT, dtype=torch.float64)
    z_a = z
    for i in range(5):
        t = one * (1 - i / 30)
        z_a = z_a - teacher(z_a, t).velocity / 30
    said = m.student(z, one, None).velocity
    torch.testing.assert_close(variety.double(), (said - (z - z_a) * 6).square().mean(), rtol=1e-5, atol=1e-7)


def test_the_matching_gradient_has_the_published_normaliser():
    """With one step and no regression: (fake - teacher)/mean|x_s - teacher|/numel, x_s and not x0."""
    method, m, draws = dp_dmd(1, Flow(), (3,), weight=0.0), gaussians(Flow()), keyed()
    method.student_loss(m, bare(), draws).value.backward()
    z, s = draws.each("start").normal(3), Uniform(0.02, 0.98).sample(draws.each("s"))
    x0 = 0.2 + 0.9 * z.double()
    x_s = Flow().add_noise(x0, draws.each("eps").normal_like(x0), s)
    real, fake = m.teacher(x_s, s).x0, m.fake(x_s, s).x0
    g = like(dmd_scale(x_s, real), x0) * (fake - real) / x0.numel()
    torch.testing.assert_close(m.student.weights.grad, torch.stack([g.sum(), (g * z).sum()]))


def test_training_walks_the_path_of_inference():
    """Bitwise: x0 of the rollout is the sample at inference from the same noise, and the sampler follows the ODE."""
    method = dp_dmd()
    m, draws = unet_roles(method), keyed()
    cond = labelled(draws, method)["main"].cond
    assert method.sampler() == SamplerSpec(trailing(4), renoise=0.0)
    with torch.no_grad():
        first, x0 = method.rollout(m, cond, draws, grad=False)
    assert torch.equal(x0, sample(m.student, method.sampler(), cond, draws, (1, 8, 8)))
    assert torch.equal(first.pred.x_t, start(TABLE, method.sampler(), draws.each("start").normal(1, 8, 8)))


def test_teacher_and_student_start_from_the_same_noise():
    """Deterministic pairing: the anchor is the guided teacher's ODE from the very state that the first call was fed."""
    method = dp_dmd(anchor_steps=2, teacher_steps=8)
    m, draws, seen = unet_roles(method, 3.0), keyed(), []
    m.teacher.network.register_forward_hook(lambda module, args, out: seen.append((args[0], args[1])))
    batch = labelled(draws, method)
    method.student_loss(m, batch, draws)
    z = draws.each("start").normal(1, 8, 8)
    assert [len(x) for x, _ in seen] == [2 * COUNT] * 3                             # the score, then two guided steps
    assert torch.equal(seen[1][0][:COUNT], z)
    with torch.no_grad():
        t = torch.ones(COUNT, dtype=torch.float64)
        torch.testing.assert_close(seen[2][0][:COUNT], jump(m.teacher(z, t, batch["main"].cond), TABLE, t * 0.875))


def test_passes_of_a_step():
    method = dp_dmd(anchor_steps=5)
    m, draws = unet_roles(method), keyed()
    batch = labelled(draws, method)
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher, Counted(m.fake.network) as fake:
        method.student_loss(m, batch, draws)
        assert (student, teacher, fake) == ([COUNT] * 4, [2 * COUNT] * 6, [COUNT])
        method.critic_loss(m, batch, draws)
        assert (len(student), len(teacher), fake) == (4, 6, [COUNT] * 2)
        method.critic_loss(m, labelled(draws, method), draws)                       # a critic of its own walks the whole trajectory
        assert (len(student), len(fake)) == (8, 3)
    assert float(student_gradient(method, m, draws).norm()) > 0


def test_following_the_teacher_in_equal_steps():
    """follow = so many jumps; it converges to the flow map at first order, with heun at second, and takes times per sample."""
    for process in (Flow(), Trig(), TABLE, Karras()):
        teacher = GaussianTeacher(process, "v")
        x = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t, r = f64([0.9, 0.8, 0.7, 0.6]), f64([0.1, 0.2, 0.1, 0.4])
        exact = torch.stack([teacher.flow_map(x[i : i + 1], t[i], r[i])[0] for i in range(COUNT)])
        for solver, gains in (("ddim", 2), ("heun", 4)):
            few, many = (float((follow(teacher, x, t, r, n, process, solver) - exact).abs().max()) for n in (40, 80))
            assert few / many == pytest.approx(gains, rel=0.3)


def test_plan():
    method = dp_dmd(fake_updates=5)
    assert method.plan(5) == (Update("student", ("student",)), Update("critic", ("fake",), reuse=True))
    assert all(method.plan(step) == (Update("critic", ("fake",)),) for step in range(1, 5))


@pytest.mark.parametrize("options", [{"fake_updates": 0}, {"weight": -1.0}, {"anchor_steps": 0}, {"anchor_steps": 31}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DPDMDConfig(**options)
