"""Imagine Flash: the student's own states, its own noise, what the teacher answers, and the first step's known noise."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from oracles import GaussianTeacher, MapStudent, MixtureTeacher, f64
from small import COUNT, NULL, TABLE, AffineStudent, bare, keyed, labelled, student_gradient, unet_roles
from toys import Counted, tiny_unet

from stepdistill.diffusion.process import Flow, Karras, Trig
from stepdistill.diffusion.sampler import SamplerSpec, one_call, sample, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.export.schedule import few_steps
from stepdistill.methods.base import Setup
from stepdistill.methods.imagine_flash import ImagineFlash, ImagineFlashConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline


def flash(process=TABLE, shape=(1, 8, 8), steps=3, **options) -> ImagineFlash:
    return ImagineFlash(ImagineFlashConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps))))


def test_states_are_those_of_inference():
    """Bitwise: the trained call is the same call of the sampler at inference, with its corrected first step."""
    method = flash()
    assert method.sampler() == SamplerSpec(trailing(3), renoise=0.0, known_noise=True)
    assert not flash(noise_correction=False).sampler().known_noise
    m = unet_roles(method)
    for seed in range(6):
        draws = keyed(seed=seed)
        cond = labelled(draws, method)["main"].cond
        z = start(TABLE, method.sampler(), draws.each("start").normal(1, 8, 8))
        walk = list(steps(m.student, z, method.sampler(), cond, draws))
        with torch.no_grad():
            call = one_call(m.student, method.sampler(), cond, draws, (1, 8, 8), grad=False)
        assert torch.equal(call.pred.x_t, walk[call.index].pred.x_t)
        assert torch.equal(walk[-1].x0, sample(m.student, method.sampler(), cond, draws, (1, 8, 8)))


@pytest.mark.parametrize("process", [Flow(), Trig(), TABLE], ids=["flow", "trig", "table"])
@pytest.mark.parametrize("steps_of_teacher", [1, 4])
def test_without_noise_the_teacher_returns_the_sample(process, steps_of_teacher):
    """Card 14: g = 0 gives zero loss."""
    method = flash(process, (3,), times=Uniform(0.0, 0.0), teacher_steps=steps_of_teacher)
    m = SimpleNamespace(student=AffineStudent(process, 0.2, 0.9), teacher=GaussianTeacher(process, "eps"))
    assert float(method.student_loss(m, bare(), keyed()).value.detach()) < 1e-12


def test_the_target_is_the_teachers_answer_to_the_students_x0_noised_by_its_own_noise():
    """The loss, by hand: z = (x_t - alpha·x0)/sigma of the call, g a share of its time; fresh z is a draw of its own."""
    for noise in ("own", "fresh"):
        method = flash(noise=noise)
        m, draws = unet_roles(method, 2.0), keyed()
        batch = labelled(draws, method)
        with torch.no_grad():
            got = method.student_loss(m, batch, draws).value
            call = one_call(m.student, method.sampler(), batch["main"].cond, draws, (1, 8, 8), grad=False)
            t = float(call.t[0])
            alpha, sigma = float(TABLE.alpha(f64(t))), float(TABLE.sigma(f64(t)))
            z = (call.pred.x_t - alpha * call.x0) / sigma if noise == "own" else draws.each("z").normal(1, 8, 8)
            g = t * Uniform(0.05, 0.95).sample(draws.each("g"))
            y = m.teacher(TABLE.add_noise(call.x0, z, g), g, batch["main"].cond).x0
        torch.testing.assert_close(got, (call.x0 - y).square().mean(), rtol=1e-3, atol=1e-6)


def test_the_target_is_stopped():
    """The gradient is 2·(x0 - y)/numel at x0: none comes back through the teacher."""
    process, draws = Flow(), keyed()
    method = flash(process, (3,), 1)
    m = SimpleNamespace(student=AffineStudent(process, 0.2, 0.9), teacher=GaussianTeacher(process, "flow"))
    method.student_loss(m, bare(), draws).value.backward()
    z = draws.each("start").normal(3).double()
    x0, g = 0.2 + 0.9 * z, Uniform(0.05, 0.95).sample(draws.each("g"))
    y = m.teacher(process.add_noise(x0, z, g), g).x0                                # at t = 1 of a flow the noise is the input
    pull = 2 * (x0 - y) / x0.numel()
    torch.testing.assert_close(m.student.weights.grad, torch.stack([pull.sum(), (pull * z).sum()]))


@pytest.mark.parametrize("teacher", [GaussianTeacher(Flow(), "v"), MixtureTeacher(Flow(), "flow")], ids=["gaussian", "mixture"])
def test_without_the_shift_the_flow_map_is_the_fixed_point(teacher):
    """The teacher's whole ODE from the student's state: a student that knows the map to 0 has no loss, one that does not has one."""
    method = flash(Flow(), (1,), 1, shifted=False, teacher_steps=64, solver="heun")
    exact = SimpleNamespace(student=MapStudent(teacher), teacher=teacher)
    wrong = SimpleNamespace(student=AffineStudent(Flow(), 0.0, 1.0), teacher=teacher)
    assert float(method.student_loss(exact, bare(), keyed(count=32)).value) < 2e-3
    assert float(method.student_loss(wrong, bare(), keyed(count=32)).value.detach()) > 0.1


def test_straight_jumps_to_an_endpoint_come_out_too_wide():
    """Card 14, S6: even the exact endpoint map in three jumps: the samples' std is well above the teacher's."""
    teacher = MixtureTeacher(Flow(), "flow")
    truth = float(teacher.data(20_000, torch.Generator().manual_seed(0)).std())
    stds = {}
    for count in (1, 3):
        draws = keyed(count=4000)
        stds[count] = float(sample(MapStudent(teacher), flash(Flow(), (1,), count).sampler(), None, draws, (1,)).std())
    assert stds[1] == pytest.approx(truth, rel=0.03)
    assert stds[3] > 1.1 * truth


def test_the_corrected_first_step():
    """It is the jump itself where the noise is exact: on a flow at t = 1, or where the student says so; elsewhere the state's own noise."""
    z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))
    for process in (Flow(), Trig(), TABLE, Karras()):
        plain, known = (SamplerSpec((1.0, 0.5), renoise=0.0, known_noise=k) for k in (False, True))
        student = AffineStudent(process, 0.2, 0.1)
        x = start(process, known, z)
        with torch.no_grad():
            states = [list(steps(student, x, spec, None, keyed()))[1].pred.x_t for spec in (plain, known)]
        first = student(x, torch.ones(COUNT, dtype=torch.float64), None)
        r = f64(0.5)
        torch.testing.assert_close(states[0], jump(first, process, r).detach())
        torch.testing.assert_close(states[1], process.add_noise(first.x0, z.double(), r).detach())
        exact = isinstance(process, Flow | Trig)                                    # alpha is 0 at t = 1
        assert torch.allclose(states[0], states[1], atol=1e-6) == exact


def test_the_corrected_step_below_one_uses_the_size_of_that_noise():
    process = TABLE
    spec = SamplerSpec((0.6, 0.2), renoise=0.0, known_noise=True)
    student, z = AffineStudent(process, 0.2, 0.1), torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))
    x = start(process, spec, z)
    with torch.no_grad():
        second = list(steps(student, x, spec, None, keyed()))[1].pred.x_t
        x0 = student(x, f64([0.6] * COUNT), None).x0
    torch.testing.assert_close(second, process.add_noise(x0, z.double(), f64(0.2)))


@pytest.mark.parametrize("times", [(1.0, 0.6, 0.25), (0.6, 0.25)])
def test_exports_take_the_corrected_step(times):
    """Our scheduler and our class-conditional pipeline end where the sampler ends, and elsewhere without the correction."""
    spec = SamplerSpec(times, renoise=0.0, clip_x0=2.0, known_noise=True)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = Denoiser(tiny_unet(), TABLE, "eps")
    cond, x = Conditioning({"class_labels": torch.tensor([0, 2])}), start(TABLE, spec, z)
    walk = list(steps(net, x, spec, cond, keyed(count=2)))
    driven = SimpleNamespace(process=TABLE, kind="eps", flip=1.0, times=lambda ts: [1000 * t - 1 for t in ts], scheduler=DDPMScheduler())
    scheduler = few_steps(driven, spec)
    for step in walk:
        with torch.no_grad():
            x = scheduler.step(net.raw(x, step.t, cond), None, x, return_dict=False)[0]
    torch.testing.assert_close(x, walk[-1].x0, rtol=1e-4, atol=1e-4)
    pipeline = ClassConditionalPipeline(
        unet=net.network, scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), null_class=NULL,
        labels=["a", "b", "c"], sampler={**spec.to_dict(), "steps": len(times)})
    torch.testing.assert_close(pipeline(["a", "c"], noise=[z], output_type="latent").images, walk[-1].x0, rtol=1e-4, atol=1e-4)
    *_, plain = steps(net, start(TABLE, spec, z), replace(spec, known_noise=False), cond, keyed(count=2))
    assert float((plain.x0 - walk[-1].x0).abs().max()) > 1e-2


@pytest.mark.parametrize("options", [{"renoise": 1.0}, {"renoise": 0.0, "solver": "heun"}])
def test_known_noise_is_a_step_of_ddim(options):
    with pytest.raises(ValueError, match="known_noise is a step of ddim"):
        SamplerSpec((1.0, 0.5), known_noise=True, **options)


def test_passes_and_gradients_of_a_step():
    """One call with gradients however many come before it; the guided teacher once, or as often as its ODE has steps."""
    for options, rows in (({}, 1), ({"teacher_steps": 3}, 3), ({"shifted": False, "teacher_steps": 2, "solver": "heun"}, 3)):
        method = flash(**options)
        m, draws, grads = unet_roles(method, 2.0), keyed(), []
        m.student.network.register_forward_hook(lambda module, args, out, grads=grads: grads.append(out[0].requires_grad))
        with Counted(m.teacher.network) as teacher:
            assert float(student_gradient(method, m, draws).norm()) > 0
        assert teacher == [2 * COUNT] * rows
        assert grads == [False] * int(draws.shared("call").integers(3)) + [True]


def test_impossible_values():
    with pytest.raises(ValueError, match="teacher_steps must be at least 1, got 0"):
        ImagineFlashConfig(teacher_steps=0)
