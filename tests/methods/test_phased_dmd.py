"""Phased DMD: laws matched at the end of each phase, a fake score of its own for each, and the boundary between them."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from small import COUNT, TABLE, AffineStudent, bare, keyed, labelled, unet_roles
from toys import Counted, FastDraws

from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.process import Flow, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec, sample, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Setup, Update
from stepdistill.methods.phased_dmd import PhasedDMD, PhasedDMDConfig
from stepdistill.training.assemble import updates_of

GRID = (1.0, 0.9, 0.75, 0.5)


def phased(process=TABLE, shape=(1, 8, 8), times=GRID, **options) -> PhasedDMD:
    return PhasedDMD(PhasedDMDConfig(**options), Setup(process, shape, SamplerSpec(times)))


def test_phases_divide_the_calls():
    """The boundary is exact: the time of the next phase's first call, 0 at the end."""
    assert [phased().calls(i) for i in (0, 1)] == [(0, 2, 0.75), (2, 4, 0.0)]
    assert [phased(phases=3).calls(i) for i in range(3)] == [(0, 1, 0.9), (1, 2, 0.75), (2, 4, 0.0)]
    assert phased(phases=1, times=(1.0,)).calls(0) == (0, 1, 0.0)
    with pytest.raises(ValueError, match="2 phases need a student of as many steps"):
        phased(times=(1.0,))


def test_plan():
    """Phases take turns; each moves its own fake score every turn and the student every k-th."""
    method = phased(fake_updates=3)
    student, critics = Update("student", ("student",)), [Update("critic", (f"fake_{i}",)) for i in (1, 2)]
    assert [tuple(method.plan(step)) for step in range(8)] == [
        (student, critics[0]), (student, critics[1]), *[(critics[i % 2],) for i in range(4)], (student, critics[0]), (student, critics[1])]
    assert updates_of(method, 12) == {"student": 4, "fake_1": 6, "fake_2": 6}
    assert set(PhasedDMD.needs(PhasedDMDConfig(phases=3))) == {"teacher", "student", "fake_1", "fake_2", "fake_3"}


@pytest.mark.parametrize("process", [Flow(), Trig(), TABLE], ids=["flow", "trig", "table"])
@pytest.mark.parametrize("phase", [0, 1])
def test_gradient_on_the_states_of_a_phase(process, phase):
    """A·(fake - teacher)/mean|x0 - teacher|/numel at x_s, by hand, of the drawn call's jump to the boundary."""
    times = (1.0, 0.5)
    method, draws = phased(process, (3,), times), keyed(step=phase)
    student, teacher = AffineStudent(process, 0.2, 0.6), GaussianTeacher(process, "v")
    fakes = {"fake_1": GaussianTeacher(process, "flow", f64(0.1), f64(0.8)), "fake_2": GaussianTeacher(process, "eps", f64(-0.3), f64(0.5))}
    m = SimpleNamespace(student=student, teacher=teacher, **fakes)
    method.student_loss(m, bare(), draws).value.backward()
    spec, z = method.sampler(), draws.each("start").normal(3)
    step = list(steps(student, start(process, spec, z), spec, None, draws))[phase]
    w = student.weights.detach().clone().requires_grad_()
    s = f64(times[1] if phase == 0 else 0.0)
    x, alpha, sigma = step.pred.x_t, step.pred.alpha, step.pred.sigma
    x0 = w[0] + w[1] * x
    x_s = like(process.alpha(s), x) * x0 + like(process.sigma(s), x) * (x - like(alpha, x) * x0) / like(sigma, x)
    t = s + (1 - s) * Uniform(0.02, 0.98).sample(draws.each("t"))
    x_t = process.travel(x_s.detach(), draws.each("eps").normal_like(x_s), s, t)
    real, fake = teacher(x_t, t).x0, fakes[f"fake_{phase + 1}"](x_t, t).x0
    g = like(process.alpha(t) / process.alpha(s) * dmd_scale(x0.detach(), real), x0) * (fake - real) / x0.numel()
    (expected,) = torch.autograd.grad((x_s * g).sum(), w)
    torch.testing.assert_close(student.weights.grad, expected)


def test_no_gradient_where_the_laws_agree():
    """T3 on both phases: the teacher's own score in the fake's place."""
    for phase in (0, 1):
        method, teacher = phased(Flow(), (3,), (1.0, 0.5)), GaussianTeacher(Flow(), "v")
        student = AffineStudent(Flow(), 0.2, 0.6)
        method.student_loss(SimpleNamespace(student=student, teacher=teacher, fake_1=teacher, fake_2=teacher), bare(),
                            keyed(step=phase)).value.backward()
        assert float(student.weights.grad.abs().max()) < 1e-8


def test_the_fake_score_of_a_phase_learns_the_law_of_its_states():
    """An exact fake is left alone by its loss at s > 0; the naive target, x0 of plain denoising, would move it.

    From z the only call before t = .5 gives x_s = .1 + .95·z, the marginal of N(.2, 1.616²) there.
    """
    process, method = Flow(), phased(Flow(), (1,), (1.0, 0.5))
    exact = GaussianTeacher(process, "x0", f64(0.2), f64((0.95**2 / 0.25 - 1) ** 0.5))
    gain = torch.zeros((), dtype=torch.float64, requires_grad=True)
    asked = []

    def fake(x_t, t, cond, *, w=None, tap=False):
        asked.append((x_t, t))
        return from_x0(exact(x_t, t).raw + gain * x_t, x_t, process.alpha(t), process.sigma(t))

    m, draws = SimpleNamespace(student=AffineStudent(process, 0.2, 0.9), fake_1=fake), FastDraws(0, range(400_000))
    method.critic_loss(m, bare(), draws).value.backward()
    x_t, t = asked[0]
    assert float(t.min()) >= 0.51
    x_s = 0.1 + 0.95 * draws.each("start").normal(1).double()
    naive = (2 * (exact(x_t, t).raw - x_s) * x_t).mean()
    assert abs(float(gain.grad)) < 0.015 < 0.1 < abs(float(naive))                 # its standard error is .004


def test_the_last_phase_learns_by_plain_denoising():
    """s = 0: the ordinary target and weight 1, at the samples of inference."""
    method = phased()
    m, draws = unet_roles(method), keyed(step=1)
    batch = labelled(draws, method)
    with torch.no_grad():
        got = method.critic_loss(m, batch, draws).value
        cond, x0 = batch["main"].cond, sample(m.student, method.sampler(), batch["main"].cond, draws, (1, 8, 8))
        t, eps = method.cfg.fake_times.sample(draws.each("t")), draws.each("eps").normal_like(x0)
        expected = denoising_loss(m.fake_2(TABLE.add_noise(x0, eps, t), t, cond), x0, eps).mean()
    torch.testing.assert_close(got, expected)


def test_states_are_those_of_inference():
    """The fake score's states end a whole rollout of the phase, bitwise; the student jumps to the boundary from any call of the phase."""
    method = phased()
    assert method.sampler() == SamplerSpec(GRID, renoise=0.0)
    m, draws = unet_roles(method), keyed()
    cond = labelled(draws, method)["main"].cond
    walk = list(steps(m.student, start(TABLE, method.sampler(), draws.each("start").normal(1, 8, 8)), method.sampler(), cond, draws))
    with torch.no_grad():
        assert torch.equal(method.call(m, cond, draws, 1, grad=False).x_next, walk[2].pred.x_t)
        torch.testing.assert_close(jump(walk[1].pred, TABLE, f64(0.75)), walk[2].pred.x_t)


def test_calls_of_each_phase():
    """Phase 1 never asks the student, teacher or its fake below the boundary; the other fake is not asked; one call keeps its gradient."""
    method = phased()
    m = unet_roles(method)
    for phase, most in ((0, 2), (1, 4)):
        for seed in range(4):
            draws, grads = keyed(step=phase, seed=seed), []
            hook = m.student.network.register_forward_hook(lambda module, args, out, grads=grads: grads.append(out[0].requires_grad))
            m.train_only(("student",))
            with Counted(m.teacher.network) as teacher, Counted(m.fake_1.network) as first, Counted(m.fake_2.network) as second:
                method.student_loss(m, labelled(draws, method), draws)
            hook.remove()
            assert (teacher, [first, second][phase], [first, second][1 - phase]) == ([2 * COUNT], [COUNT], [])
            n = method.calls(phase)[0] + int(draws.shared("call").integers(2))
            assert grads == [False] * n + [True]
            assert n < most


@pytest.mark.parametrize(("options", "named"), [({"phases": 0}, "phases"), ({"fake_updates": 0}, "fake_updates"),
                                                ({"fake_times": Uniform(0.0, 1.0)}, "fake_times.low")])
def test_impossible_values(options, named):
    with pytest.raises(ValueError, match=named):
        PhasedDMDConfig(**options)


def test_more_steps_than_phases_share_a_phase_evenly():
    assert [phased(times=trailing(8), phases=2).calls(i)[:2] for i in (0, 1)] == [(0, 4), (4, 8)]
