"""TDM: the target of a sub-interval against closed forms (card T7), the trajectory, who is asked where, and the last rung as DMD."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from small import COUNT, TABLE, AffineStudent, bare, gaussian_kl, gaussians, keyed, labelled, unet_roles
from toys import Counted, FastDraws, run_of

from stepdistill.diffusion.prediction import COEFFICIENTS, combine, from_x0
from stepdistill.diffusion.process import Flow, Karras, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import subinterval_target
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Setup, Update
from stepdistill.methods.tdm import TDM, TDMConfig
from stepdistill.training.assemble import run_update, updates_of

GRID = trailing(4)


def tdm(process=TABLE, shape=(1, 8, 8), times=GRID, clip_x0=None, **options) -> TDM:
    return TDM(TDMConfig(**options), Setup(process, shape, SamplerSpec(times, clip_x0=clip_x0)))


def regression(process, mean: float, variance: float, s: float, t: float, kind: str, naive: bool = False) -> tuple[float, float]:
    """Slope and intercept of the best line from x_t to the target in this space: the target is linear in x_s and eps, so both are exact.

    The naive target takes x_s for clean.
    """
    s, t, zero, one = f64([s]), f64([t]), f64([[0.0]]), f64([[1.0]])
    a_s, s_s = process.alpha(s), process.sigma(s)
    a, b = COEFFICIENTS[kind](process.alpha(t), process.sigma(t))
    target = lambda x_s, eps: (x_s, eps) if naive else subinterval_target(process, x_s, eps, s, t)[:2]                 # noqa: E731
    parts = [(combine(a, b, *target(x_s, eps)), process.travel(x_s, eps, s, t)) for x_s, eps in ((one, zero), (zero, one))]
    (of_x, kept), (of_eps, fresh) = ((float(v), float(x)) for v, x in parts)
    spread, centre = float(a_s**2 * variance + s_s**2), float(a_s * mean)
    slope = (of_x * spread * kept + of_eps * fresh) / (spread * kept**2 + fresh**2)
    return slope, of_x * centre - slope * kept * centre


def test_the_figures_of_the_card():
    """T7: N(.7, .3) seen from s = .4 at t = .8 under flow matching."""
    for kind, figures in (("flow", (1.135, -0.859)), ("eps", (1.227, -0.172)), ("x0", (0.092, 0.687))):
        assert regression(Flow(), 0.7, 0.3, 0.4, 0.8, kind) == pytest.approx(figures, abs=6e-4)
    assert regression(Flow(), 0.7, 0.3, 0.4, 0.8, "flow", naive=True) == pytest.approx((1.073, -0.570), abs=6e-4)


@pytest.mark.parametrize("process", [Flow(), Flow(3.0), Trig(), Karras(), TABLE], ids=["flow", "shifted", "trig", "karras", "table"])
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_regression_on_a_sub_interval_learns_the_denoiser(process, kind):
    """The line is that of the closed-form denoiser."""
    teacher = GaussianTeacher(process, kind, f64(0.7), f64(0.3).sqrt())
    s, t = 0.3, 0.7
    slope, intercept = regression(process, 0.7, 0.3, s, t, kind)
    x_t = f64([[0.0], [1.0]])
    low, high = teacher(x_t, f64([t, t])).raw.flatten().tolist()
    assert (slope, intercept) == pytest.approx((high - low, low), rel=1e-6, abs=1e-9)
    kernel_kept, kernel_fresh = (float(process.travel(f64([[x]]), f64([[e]]), f64([s]), f64([t]))) for x, e in ((1.0, 0.0), (0.0, 1.0)))
    a_s, s_s, a_t, s_t = (float(c(f64(v))) for v in (s, t) for c in (process.alpha, process.sigma))
    assert kernel_kept**2 * (a_s**2 * 0.3 + s_s**2) + kernel_fresh**2 == pytest.approx(a_t**2 * 0.3 + s_t**2)      # the marginal of t


def test_regression_on_a_sub_interval_of_four_points():
    """Given its point, x_s is Gaussian: the target's mean is a line for each, and their posterior mix is the mixture's denoiser."""
    process, s, t = Flow(), 0.4, 0.8
    weights, points = f64([0.1, 0.2, 0.3, 0.4]), f64([-2.0, -0.5, 1.0, 2.5])
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha, sigma = process.alpha(f64(t)), process.sigma(f64(t))
    posterior = (weights.log() - (x_t[:, None] - alpha * points).square() / (2 * sigma**2)).softmax(1)
    lines = f64([regression(process, float(point), 0.0, s, t, "x0") for point in points])
    learnt = (posterior * (lines[:, 0] * x_t[:, None] + lines[:, 1])).sum(1)
    torch.testing.assert_close(learnt, (posterior * points).sum(1))


def test_the_target_makes_up_the_state_and_is_the_plain_one_where_s_is_clean():
    x_s, eps = (torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    t = f64([0.3, 0.5, 0.7, 0.9])
    for process in (Flow(), TABLE):
        for s in (f64([0.1, 0.2, 0.3, 0.4]), torch.zeros(COUNT, dtype=torch.float64)):
            x0, e, q = subinterval_target(process, x_s, eps, s, t)
            torch.testing.assert_close(combine(process.alpha(t), process.sigma(t), x0, e), process.travel(x_s, eps, s, t))
            assert q.shape == (COUNT,)
        torch.testing.assert_close(x0, x_s)
        torch.testing.assert_close(e, eps)
        assert not bool(q.any())


def test_the_published_target_is_biased_and_ours_is_not():
    """Where the fake score is exact on both rungs, its own loss leaves it alone under `subinterval` and moves it under `tdm`.

    From z the first call gives y = .1 + .95·z at t = .5, the marginal of N(.2, 1.616²) there; the second .2 + .9·y, clean.
    """
    process, found = Flow(), {}
    upper = GaussianTeacher(process, "x0", f64(0.2), f64((0.95**2 / 0.25 - 1) ** 0.5))
    lower = GaussianTeacher(process, "x0", f64(0.29), f64(0.855))
    for target in ("subinterval", "tdm"):
        gain = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def fake(x_t, t, cond, *, w=None, tap=False, gain=gain):
            above = (t > 0.5)[:, None]
            exact = torch.where(above, upper(x_t, t).raw, lower(x_t, t).raw)
            return from_x0(exact + gain * above * x_t, x_t, process.alpha(t), process.sigma(t))

        m, method = SimpleNamespace(student=AffineStudent(process, 0.2, 0.9), fake=fake), tdm(process, (1,), (1.0, 0.5), fake_target=target)
        method.critic_loss(m, bare(), FastDraws(0, range(400_000))).value.backward()
        found[target] = abs(float(gain.grad))
    assert found["subinterval"] < 0.003
    assert found["tdm"] > 0.03


def test_states_are_those_of_inference():
    """Bitwise, and only N - 1 calls: the last one's answer is not a state. The sampler follows the ODE."""
    method = tdm(clip_x0=2.0)
    m, draws = unet_roles(method), keyed()
    batch = labelled(draws, method)
    assert method.sampler() == SamplerSpec(GRID, renoise=0.0, clip_x0=2.0)
    with Counted(m.student.network) as rows:
        states = method.states(m, batch, draws)
        assert rows == [COUNT] * 3
    z = start(TABLE, method.sampler(), draws.each("start").normal(1, 8, 8))
    walk = list(steps(m.student, z, method.sampler(), batch["main"].cond, draws))
    assert torch.equal(states, torch.stack([step.pred.x_t for step in walk]))
    assert not states.requires_grad


def test_each_sample_takes_a_call_of_its_own_and_stays_in_its_interval():
    method, seen = tdm(Flow(), (2,)), []
    m = gaussians(Flow())
    with torch.no_grad():
        for step in range(100):
            at = method.rung(m, bare(), keyed(step), grad=False)
            seen += list(zip(at.r.tolist(), at.s.tolist(), strict=True))
    for low, high in zip((*GRID[1:], 0.0), GRID, strict=True):
        s = [value for r, value in seen if r == low]
        assert 60 < len(s) < 140
        assert low + 0.02 * (high - low) <= min(s) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(s) <= high - 0.02 * (high - low)
    assert len({r for r, _ in seen[:COUNT]}) > 1


def test_the_noised_point_has_the_marginal_of_its_time():
    """y_s is y noised by the Markov kernel, so an affine student's law at s follows from its law at r."""
    method, m = tdm(Flow(), (1,), (1.0, 0.5)), gaussians(Flow())
    with torch.no_grad():
        at = method.rung(m, bare(), keyed(count=4), grad=False)
    assert torch.equal(at.y_s, Flow().travel(at.y, at.eps, at.r, at.s))
    torch.testing.assert_close(at.y[at.r == 0.0], at.x0[at.r == 0.0])             # after the last call the point is the sample


def test_with_one_step_it_is_dmd():
    """k = K: under plain l2 twice the gradient of DMD, with DMD's own normaliser."""
    method, m, draws = tdm(Flow(), (3,), (1.0,), huber=0.0), gaussians(Flow()), keyed(update=1)
    method.student_loss(m, bare(), draws).value.backward()
    z, s = draws.each("start").normal(3), Uniform(0.02, 0.98).sample(draws.each("s"))
    x0 = 0.2 + 0.9 * z.double()
    x_s = Flow().add_noise(x0, draws.each("eps").normal_like(x0), s)
    real, fake = m.teacher(x_s, s).x0, m.fake(x_s, s).x0
    g = 2 * like(dmd_scale(x0, real), x0) * (fake - real) / x0.numel()
    torch.testing.assert_close(m.student.weights.grad, torch.stack([g.sum(), (g * z).sum()]))


def test_pseudo_huber_takes_the_sign_of_large_differences():
    method, m, draws = tdm(Flow(), (3,), (1.0,), huber=1e-9), gaussians(Flow()), keyed()
    method.student_loss(m, bare(), draws).value.backward()
    at = method.rung(m, bare(), draws, grad=False)
    real, fake = m.teacher(at.y_s, at.s).x0, m.fake(at.y_s, at.s).x0
    g = like(dmd_scale(at.x0, real), real) * (fake - real).sign() / real.numel()
    z = draws.each("start").normal(3)
    torch.testing.assert_close(m.student.weights.grad, torch.stack([g.sum(), (g * z).sum()]), rtol=1e-4, atol=1e-6)


def test_one_step_descends_to_the_teacher():
    method, m = tdm(Flow(), (8,), (1.0,), huber=0.0), gaussians(Flow(), (-0.5, 1.4))
    optimizer = torch.optim.Adam([m.student.weights], 0.05, betas=(0.0, 0.9))
    for step in range(150):
        m.fake = m.student.law()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        method.student_loss(m, bare(), keyed(step, count=64)).value.backward()
        optimizer.step()
    assert gaussian_kl(m.student.weights) < 1e-3


def test_both_updates_read_one_trajectory():
    """The fake score moves first, then the student on the same states; each draws calls and noise of its own."""
    method = tdm()
    m = unet_roles(method)
    assert method.plan(0) == (Update("critic", ("fake",)), Update("student", ("student",), reuse=True))
    run = run_of(method, m, keyed, lambda d: labelled(d, method))
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher, Counted(m.fake.network) as fake:
        batches, _ = run_update(run, 0, 0, method.plan(0)[0], [])
        assert (student, teacher, fake) == ([COUNT] * 4, [], [COUNT])
        states = batches[0].scratch["states"]
        run_update(run, 0, 1, method.plan(0)[1], batches)
        assert (student, teacher, fake) == ([COUNT] * 5, [2 * COUNT], [COUNT] * 2)
    assert batches[0].scratch["states"] is states
    assert updates_of(tdm(fake_updates=3), 7) == {"student": 3, "fake": 7}


def test_without_guidance_the_target_is_the_plain_difference():
    """w = 1: the teacher is asked for the condition alone; above, the guided teacher is the target."""
    method = tdm()
    for w, rows in ((1.0, [COUNT]), (3.0, [2 * COUNT])):
        m, draws = unet_roles(method, w), keyed()
        batch = labelled(draws, method)
        with Counted(m.teacher.network) as teacher:
            log = method.student_loss(m, batch, draws).log
        assert teacher == rows
        with torch.no_grad():
            at, cond = method.rung(m, batch, draws, grad=False), batch["main"].cond
            told, null = (m.teacher(at.y_s, at.s, c, w=1.0).x0 for c in (cond, cond.null))
            gap = m.fake(at.y_s, at.s, cond).x0 - null - w * (told - null)
        torch.testing.assert_close(log["score_gap"], gap.square().mean().sqrt(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("options", "named"), [({"fake_updates": 0}, "fake_updates"), ({"huber": -1.0}, "huber"),
                                                ({"times": Uniform(0.0, 0.9)}, "times.low")])
def test_impossible_values(options, named):
    with pytest.raises(ValueError, match=named):
        TDMConfig(**options)
    TDMConfig(fake_target="tdm", times=Uniform(0.0, 0.9))
