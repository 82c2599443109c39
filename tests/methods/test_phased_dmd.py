"""Phased DMD: laws matched at the end of each phase, a fake score of its own for each, and the boundary between them."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from small import COUNT, TABLE, AffineStudent, bare, keyed, labelled, unet_roles
from tiny import final_tensors, tiny_recipe, unequal
from toys import Counted, FastDraws, train

from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.process import Flow, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec, sample, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Setup, Stage, Update
from stepdistill.methods.phased_dmd import PhasedDMD, PhasedDMDConfig
from stepdistill.models.experts import parts_of
from stepdistill.recipe import OptimRecipe
from stepdistill.training import checkpoint, loop
from stepdistill.training.assemble import updates_of

GRID = (1.0, 0.9, 0.75, 0.5)


def phased(process=TABLE, shape=(1, 8, 8), times=GRID, phase=0, **options) -> PhasedDMD:
    """With one student for all phases unless `experts`; with them, in the stage of `phase`."""
    method = PhasedDMD(PhasedDMDConfig(**{"experts": False, **options}), Setup(process, shape, SamplerSpec(times)))
    method.restore({"phase": phase})
    return method


def test_phases_divide_the_calls():
    """The boundary is exact: the time of the next phase's first call, 0 at the end."""
    assert [phased().calls(i) for i in (0, 1)] == [(0, 2, 0.75), (2, 4, 0.0)]
    assert [phased(phases=3).calls(i) for i in range(3)] == [(0, 1, 0.9), (1, 2, 0.75), (2, 4, 0.0)]
    assert phased(phases=1, times=(1.0,)).calls(0) == (0, 1, 0.0)
    with pytest.raises(ValueError, match="2 phases need a student of as many steps"):
        phased(times=(1.0,))


def test_experts_are_the_default():
    """One expert for each phase, one stage for each, one fake score; where one takes over from the other is the end of a phase."""
    cfg = PhasedDMDConfig(phases=3)
    assert {name: (role.trains, role.experts) for name, role in PhasedDMD.needs(cfg).items()} == {
        "teacher": (False, 1), "student": (True, 3), "fake": (True, 1)}
    method = phased(phases=3, experts=True)
    assert method.sampler() == SamplerSpec(GRID, renoise=0.0, boundaries=(0.9, 0.75))
    assert phased().sampler().boundaries == ()
    assert method.stages(10) == [Stage("phase 1", 3, ("student", "fake")), Stage("phase 2", 3, ("student", "fake")),
                                 Stage("phase 3", 4, ("student", "fake"))]
    assert phased().stages(10) == (Stage("main", 10),)


def test_plan_of_experts():
    """The same in every phase, but for the expert that moves."""
    for phase in (0, 1):
        method, critic = phased(experts=True, fake_updates=3, phase=phase), Update("critic", ("fake",))
        student = Update("student", ("student",), expert=phase)
        assert [tuple(method.plan(step)) for step in range(5)] == [(student, critic), (critic,), (critic,), (student, critic), (critic,)]


def test_the_switch_is_exact():
    """At the grid's own times, bitwise: the call at the boundary is the lower expert's first."""
    method = phased(experts=True)
    m = unet_roles(method)
    high, low = m.student.network.experts
    told = {0: [], 1: []}
    for i, expert in enumerate((high, low)):
        expert.register_forward_pre_hook(lambda module, args, i=i: told[i].append(float(args[1][0])))
    sample(m.student, method.sampler(), labelled(keyed(), method)["main"].cond, keyed(), (1, 8, 8))
    assert [told[i] for i in (0, 1)] == [pytest.approx([999, 899]), pytest.approx([749, 499])]
    m.student(torch.zeros(1, 1, 8, 8), f64([0.75]).nextafter(f64([1.0])), labelled(keyed(count=1), method)["main"].cond)
    assert len(told[0]) == 3


class Phases:
    """What a training in two phases leaves behind, watched as it runs."""

    def __init__(self, experts: bool = True, **optim):
        self.method = phased(experts=experts, fake_updates=2)
        self.m, self.fakes = unet_roles(self.method), []
        self.first = self.weights()
        recipe = {name: OptimRecipe(1e-3, betas=(0.9, 0.999), weight_decay=0.1) for name in self.m.trains}
        train(self.method, self.m, recipe, 8, keyed, lambda draws: labelled(draws, self.method), self.look)
        self.last = self.weights()

    def weights(self):
        return [[p.clone() for p in part.parameters()] for part in parts_of(self.m.module("student"))]

    def look(self, step, update):
        if step == 3:
            self.middle = self.weights()
        if update.loss == "student":
            pairs = zip(self.m.parameters("fake"), self.m.parameters("teacher"), strict=True)
            self.fakes.append(all(torch.equal(a, b) for a, b in pairs))


def same(a, b):
    return [all(torch.equal(p, q) for p, q in zip(one, other, strict=True)) for one, other in zip(a, b, strict=True)]


def test_phases_leave_each_other_alone():
    """Bitwise, under weight decay and momentum: phase 1 the expert of phase 2, and phase 2 that of phase 1."""
    run = Phases()
    assert same(run.first, run.middle) == [False, True]
    assert same(run.middle, run.last) == [True, False]


def test_each_phase_begins_with_the_teacher_as_its_fake_score():
    """At the first update of the student in phase 2 and at no other; the tests' roles begin elsewhere in phase 1."""
    assert Phases().fakes == [False, False, True, False]


def test_a_phase_goes_on_after_a_break():
    method = phased(experts=True, phase=1)
    fresh = phased(experts=True)
    fresh.restore(method.state())
    assert (fresh.phase(3), fresh.plan(0)) == (1, method.plan(0))
    assert fresh.plan(0)[0].expert == 1


@pytest.mark.parametrize("lora", [{}, {"lora__student__rank": 2, "lora__fake__rank": 2}], ids=["copies", "adapters"])
def test_a_run_of_experts_is_saved_averaged_and_resumed(tmp_path, lora):
    """Bit for bit from a checkpoint within phase 2. The average of phase 1's expert stays as it was when its phase ended."""
    options = {"steps": 6, "checkpoint_every": 1, "keep": 6, "method__phases": 2, "method__fake_updates": 1, "student__steps": 2, **lora}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert loop.start(tiny_recipe(tmp_path, "phased_dmd", **options), whole).finished
    saved = [checkpoint.read(path)[0] for path in checkpoint.listed(whole / loop.CHECKPOINTS)]
    averages = [{k: v for k, v in tensors.items() if k.startswith("ema/experts.0.")} for tensors in saved]
    assert averages[0]
    assert unequal(averages[1], averages[2])
    assert not unequal(averages[2], averages[5])
    raw = {k.replace("role/student/", "ema/"): v for k, v in saved[5].items() if k.startswith("role/student/experts.0.")}
    assert unequal(raw, averages[5])
    shutil.copytree(whole, broken)
    shutil.rmtree(checkpoint.listed(broken / loop.CHECKPOINTS)[-1])
    assert loop.resume(broken).finished
    assert unequal(final_tensors(broken), saved[5]) == []


@pytest.mark.parametrize("lora", [{}, {"lora__student__rank": 2}], ids=["copies", "adapters"])
def test_more_experts_than_can_be_exported_are_refused_before_they_are_trained(tmp_path, lora):
    recipe = tiny_recipe(tmp_path, "phased_dmd", method__phases=5, student__steps=5, **lora)
    with pytest.raises(ValueError, match="5 networks, and its pipeline holds 4"):
        loop.start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plan():
    """Phases take turns; each moves its own fake score every turn and the student every k-th."""
    method = phased(fake_updates=3)
    student, critics = Update("student", ("student",)), [Update("critic", (f"fake_{i}",)) for i in (1, 2)]
    assert [tuple(method.plan(step)) for step in range(8)] == [
        (student, critics[0]), (student, critics[1]), *[(critics[i % 2],) for i in range(4)], (student, critics[0]), (student, critics[1])]
    assert updates_of(method, 12) == {"student": 4, "fake_1": 6, "fake_2": 6}
    assert set(PhasedDMD.needs(PhasedDMDConfig(phases=3, experts=False))) == {"teacher", "student", "fake_1", "fake_2", "fake_3"}


@pytest.mark.parametrize("process", [Flow(), Trig(), TABLE], ids=["flow", "trig", "table"])
@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("experts", [True, False])
def test_gradient_on_the_states_of_a_phase(process, phase, experts):
    """A·(fake - teacher)/mean|x0 - teacher|/numel at x_s, by hand, of the drawn call's jump to the boundary."""
    times = (1.0, 0.5)
    method, draws = phased(process, (3,), times, phase if experts else 0, experts=experts), keyed(step=phase)
    student, teacher = AffineStudent(process, 0.2, 0.6), GaussianTeacher(process, "v")
    fakes = {"fake_1": GaussianTeacher(process, "flow", f64(0.1), f64(0.8)), "fake_2": GaussianTeacher(process, "eps", f64(-0.3), f64(0.5))}
    m = SimpleNamespace(student=student, teacher=teacher, **fakes, fake=fakes[f"fake_{phase + 1}"])
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
