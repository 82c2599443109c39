"""LCM: consistency distillation on its grid, the boundary, the band of guidance, and the same loss in every space (card 5)."""

from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, GaussianTeacher, MapOfTimes, MixtureTeacher, f64
from toys import Counted, run_of, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import lcm_grid
from stepdistill.losses.distance import pseudo_huber
from stepdistill.methods.base import Batch, Images, Sample, Setup
from stepdistill.methods.consistency import Consistency, ConsistencyConfig
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Roles
from stepdistill.training.assemble import run_update

COUNT, TABLE = 64, TableVP.scaled_linear()
KEYED = Draws(0, range(COUNT))


def lcm(process=TABLE, shape=(3,), **options) -> LCM:
    return LCM(LCMConfig(**options), Setup(process, shape, SamplerSpec(lcm_grid(4))))


def roles(teacher, student, target=None) -> SimpleNamespace:
    return SimpleNamespace(teacher=teacher, student=student, target=target or student)


def gaussian(teacher: GaussianTeacher) -> Batch:
    return Batch({"real": Sample(Conditioning(), teacher.data(COUNT, torch.Generator().manual_seed(0), 3))})


@pytest.mark.parametrize("process", [TABLE, Flow()], ids=["table", "flow"])
def test_is_consistency_distillation_on_its_grid(process):
    """Without a band of guidance, in every bit: N = 50, DDIM, Huber .001 and the student itself as its target."""
    teacher = GaussianTeacher(process, "v")
    m, batch = roles(teacher, MapOfTimes(teacher, bend=0.2)), gaussian(teacher)
    ours = lcm(process).student_loss(m, batch, KEYED).value
    plain = Consistency(ConsistencyConfig(intervals=50, target="student"), Setup(process, (3,)))
    torch.testing.assert_close(ours, plain.student_loss(m, batch, KEYED).value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_target_of_the_lowest_interval_is_the_state(kind):
    """There f is the identity, whatever the network says (card 5, test 10: c_skip = 1)."""
    teacher, wrong = GaussianTeacher(TABLE, "v"), Denoiser(tiny_unet().double(), TABLE, kind, clock="t")
    batch = Batch({"real": Sample(Conditioning({"class_labels": torch.zeros(4, dtype=torch.long)}),
                                  teacher.data(4, torch.Generator().manual_seed(0), 1, 8, 8))})
    lowest = SimpleNamespace(each=lambda tag: SimpleNamespace(integers=lambda high: torch.zeros(4, dtype=torch.long),
                                                              normal_like=Draws(0, range(4)).each(tag).normal_like))
    with torch.no_grad():
        value = lcm(shape=(1, 8, 8), huber=0.0).student_loss(roles(teacher, wrong), batch, lowest).value
        t, x0 = f64([1 / 50] * 4), batch["real"].clean
        x_t = TABLE.add_noise(x0, Draws(0, range(4)).each("eps").normal_like(x0), t)
        expected = (wrong(x_t, t, batch["real"].cond).x0 - teacher(x_t, t).x0).square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_loss_in_every_space(kind):
    """Teacher and student told in another space, guidance and all (card 5, test 10)."""
    labels = torch.arange(COUNT) % 2
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    teacher = MixtureTeacher(TABLE, kind)
    batch = Batch({"real": Sample(cond, teacher.data(COUNT, torch.Generator().manual_seed(0))[:, None])})
    method = lcm(shape=(1,), guidance=Band(2.0, 5.0))
    values = [float(method.student_loss(roles(MixtureTeacher(TABLE, k), MapOfTimes(MixtureTeacher(TABLE, k), kind=k, bend=0.2)),
                                        batch, KEYED).value) for k in ("x0", kind)]
    assert values[0] == pytest.approx(values[1], rel=1e-7)


def test_guidance_is_drawn_for_every_sample():
    """x_r is the step of the teacher guided with w ~ [low, high], and a band of one number is the recipe's guidance."""
    labels = torch.arange(COUNT) % 2
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    teacher = MixtureTeacher(TABLE, guidance=3.0)
    student = MapOfTimes(teacher, bend=0.2)
    batch = Batch({"real": Sample(cond, teacher.data(COUNT, torch.Generator().manual_seed(0))[:, None])})
    loss = lambda **options: lcm(shape=(1,), **options).student_loss(roles(teacher, student), batch, KEYED).value               # noqa: E731
    torch.testing.assert_close(loss(guidance=Band(3.0, 3.0)), loss(), rtol=1e-12, atol=0)
    n = 1 + KEYED.each("n").integers(50)
    t, r, zero = n.double() / 50, (n - 1).double() / 50, torch.zeros(COUNT, dtype=torch.float64)
    x_t = TABLE.add_noise(batch["real"].clean, KEYED.each("eps").normal_like(batch["real"].clean), t)
    x_r = jump(teacher(x_t, t, cond, w=KEYED.each("w").uniform(2.0, 8.0)), TABLE, r)
    target = torch.where((r == 0)[:, None], x_r, student(x_r, r).x0)
    expected = pseudo_huber(jump(student(x_t, t), TABLE, zero), target).mean()
    torch.testing.assert_close(loss(guidance=Band(2.0, 8.0)), expected, rtol=1e-9, atol=0)


def test_skip_is_counted_in_points():
    """points 1000 and skip 20, the paper's: any training step, and the one 20 below."""
    teacher = GaussianTeacher(TABLE)
    student = MapOfTimes(teacher)
    lcm(points=1000, skip=20).student_loss(roles(teacher, student), gaussian(teacher), KEYED)
    below, at = student.calls
    torch.testing.assert_close(below, (at - 0.02).clamp_min(0))
    assert len(set(at.tolist())) > 55


@pytest.mark.parametrize("whose", ["student", "ema"])
def test_calls_and_gradients(whose):
    """One guided pass of the teacher, one of the target, one with gradients; the gradient is that of the distance to a constant."""
    method = lcm(shape=(1, 8, 8), target=whose)
    teacher = Denoiser(tiny_unet(), TABLE, "eps", guidance=2.0)
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example)
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(0.01)

    def labelled(keyed: Draws) -> Batch:
        labels = keyed.each("labels").integers(3)
        return Batch({"real": Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}),
                                     keyed.each("x0").normal(1, 8, 8))})

    few = Draws(0, range(4))
    with Counted(m.student.network) as student, Counted(m.teacher.network) as guided:
        run_update(run_of(method, m, lambda step, update: few, labelled), 0, 0, method.plan(0)[0], ())
    assert guided == [8]
    assert student == ([4, 4] if whose == "student" else [4])
    got = torch.cat([p.grad.flatten() for p in m.parameters("student")])
    m.module("student").zero_grad()
    batch, n = labelled(few), 1 + few.each("n").integers(50)
    t, r, cond, x0 = n.double() / 50, (n - 1).double() / 50, batch["real"].cond, batch["real"].clean
    x_t = TABLE.add_noise(x0, few.each("eps").normal_like(x0), t)
    with torch.no_grad():
        fixed = (m.student if whose == "student" else m.target)(jump(m.teacher(x_t, t, cond), TABLE, r), r, cond).x0
    pseudo_huber(m.student(x_t, t, cond).x0, fixed).mean().backward()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in m.parameters("student")]), rtol=1e-3, atol=1e-6)


def test_needs_data_and_target():
    assert set(LCM.needs(LCMConfig())) == {"teacher", "student"}
    assert set(LCM.needs(LCMConfig(target="ema"))) == {"teacher", "student", "target"}
    assert LCM.data(LCMConfig()) == {"real": Images()}
    assert lcm().sampler() == SamplerSpec(lcm_grid(4))                                              # an endpoint student: re-noised
    moved = []
    m = SimpleNamespace(follow=lambda *args: moved.append(args))
    for options in ({}, {"target": "ema", "target_decay": 0.9}):
        method = lcm(**options)
        method.after_update(m, method.plan(0)[0], 1)
    assert moved == [("target", "student", 0.9)]


@pytest.mark.parametrize("options", [{"skip": 0}, {"skip": 50}, {"target_decay": 1.0}, {"huber": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LCMConfig(**options)
