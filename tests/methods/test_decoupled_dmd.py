"""Decoupled DMD: at equal levels it is DMD2, at guidance 1 it has one term, and its levels obey their bounds."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, MixtureTeacher, f64
from small import COUNT, TABLE, AffineStudent, bare, gaussian_kl, gaussians, keyed, labelled, unet_roles
from toys import Counted, FastDraws

from stepdistill.diffusion.draws import Draws, Noise
from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import Uniform, shift, trailing
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Batch, Sample, Setup, Update
from stepdistill.methods.decoupled_dmd import DecoupledDMD, DecoupledDMDConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.models.conditioning import Conditioning


def decoupled(process=TABLE, shape=(1, 8, 8), times=(1.0,), **options) -> DecoupledDMD:
    return DecoupledDMD(DecoupledDMDConfig(**options), Setup(process, shape, SamplerSpec(times)))


@dataclass(frozen=True)
class Merged(Draws):
    """Draws that make both levels one: r's numbers are s's."""

    def each(self, tag: str) -> Noise:
        return super().each({"r": "s", "r/eps": "eps", "s/eps": "eps"}.get(tag, tag))


def two_classes(w: float) -> tuple[MixtureTeacher, Batch]:
    labels = torch.tensor([0, 1, 0, 1])
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    return MixtureTeacher(Flow(), "flow", guidance=w), Batch({"main": Sample(cond)})


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_at_equal_levels_it_is_dmd2(w):
    """Card 3: the same s, the same noise: the gradient of DMD2 without its GAN, exactly."""
    teacher, batch = two_classes(w)
    draws, setup, found = Merged(0, range(COUNT)), Setup(Flow(), (1,)), []
    for method in (DecoupledDMD(DecoupledDMDConfig(), setup), DMD2(DMD2Config(gan_weight=0), setup)):
        student = AffineStudent(Flow(), 0.2, 0.9)
        m = SimpleNamespace(student=student, teacher=teacher, fake=MixtureTeacher(Flow(), "v", means=f64([-1.0, 1.0])))
        method.student_loss(m, Batch(batch.streams), draws).value.backward()
        found.append(student.weights.grad)
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(found[0], found[1])


def test_gradient_of_two_levels():
    """Its formula, each term at the level and with the normaliser of its own draw."""
    teacher, batch = two_classes(3.0)
    student, fake, draws = AffineStudent(Flow(), 0.2, 0.9), GaussianTeacher(Flow(), "v", f64(0.2), f64(0.9)), keyed()
    decoupled(Flow(), (1,)).student_loss(SimpleNamespace(student=student, teacher=teacher, fake=fake), batch, draws).value.backward()
    z, cond = draws.each("start").normal(1), batch["main"].cond
    x0 = 0.2 + 0.9 * z.double()

    def at(time_tag: str, noise_tag: str):
        t = Uniform(0.02, 0.98).sample(draws.each(time_tag))
        x_t = Flow().add_noise(x0, draws.each(noise_tag).normal_like(x0), t)
        told, null = teacher(x_t, t, cond, w=1.0).x0, teacher(x_t, t, None).x0
        return told, null, dmd_scale(x0, null + 3 * (told - null))[:, None], fake(x_t, t).x0

    real, _, c_s, away = at("s", "s/eps")
    told, null, c_r, _ = at("r", "r/eps")
    g = (c_s * (away - real) - 2 * c_r * (told - null)) / len(x0)
    torch.testing.assert_close(student.weights.grad, torch.stack([g.sum(), (g * z).sum()]))


def test_without_guidance_the_teacher_is_asked_once():
    method = decoupled()
    draws = keyed()
    for w, rows in ((1.0, [COUNT]), (3.0, [2 * COUNT, 4 * COUNT])):              # both levels plain, then both guided
        m = unet_roles(method, w)
        with Counted(m.teacher.network) as teacher, Counted(m.student.network) as student, Counted(m.fake.network) as fake:
            log = method.student_loss(m, labelled(draws, method), draws).log
        assert (teacher, student, fake) == (rows, [COUNT], [COUNT])
        assert ("ca_to_dm" in log) == (w != 1)


@pytest.mark.parametrize("m", [0.3, 1.0, 5.0])
def test_r_stays_below_the_time_the_student_was_told(m):
    """Card 3, after the shift; the draws still fill the range up to it."""
    method = decoupled(Flow(), (1,), ca_times=Uniform(0.02, 0.98, m))
    noise = Draws(0, range(4000)).each("r")
    for t in (1.0, 0.75, 0.4, 0.03):
        r = method.ca_times(t).sample(noise)
        assert float(r.max()) <= t + 1e-12
        top = min(t, float(shift(f64(0.98), m)))
        assert float(r.max()) > 0.97 * top
    assert Uniform(0.02, 0.98, m).below(1.0) == Uniform(0.02, 0.98, m)


def test_the_drawn_call_sets_the_bound():
    """In four steps, the level of what guidance adds follows the call that is trained."""
    times = trailing(4)
    method, seen = decoupled(TABLE, (1, 8, 8), times), {}
    teacher, fake = GaussianTeacher(TABLE, "eps", guidance=2.0), GaussianTeacher(TABLE, "eps")
    for seed in range(40):
        draws = keyed(seed=seed)
        m = SimpleNamespace(student=AffineStudent(TABLE, 0.2, 0.5), teacher=teacher, fake=fake)
        teacher.calls.clear()
        method.student_loss(m, Batch({"main": Sample(Conditioning({"class_labels": torch.zeros(COUNT)}))}), draws)
        t = times[int(draws.shared("call").integers(4))]
        seen[t] = max(seen.get(t, 0.0), float(teacher.calls[-1][COUNT:].max()))  # the second half of the batch is at r
    assert set(seen) == set(times)
    assert all(0.6 * t < r <= t for t, r in seen.items())


def train_affine(w: float, ca_only: bool, steps: int) -> list[float]:
    """Class 0 of two, N(1, .3²) against a null of both N(±1, .3²): the student's (mean, std) after so many steps, its fake score exact."""
    teacher = MixtureTeacher(Flow(), "flow", f64([0.5, 0.5]), f64([1.0, -1.0]), f64([0.3, 0.3]), guidance=w)
    labels = torch.zeros(256, dtype=torch.long)
    batch = Batch({"main": Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)}))})
    student, method = AffineStudent(Flow(), 1.0, 0.3), decoupled(Flow(), (1,))
    optimizer = torch.optim.Adam([student.weights], 0.02, betas=(0.0, 0.9))
    for step in range(steps):
        fake = teacher.plain if ca_only else student.law()                       # the teacher's own score leaves no term to match
        optimizer.zero_grad()
        method.student_loss(SimpleNamespace(student=student, teacher=teacher, fake=fake), Batch(batch.streams),
                            FastDraws(0, range(256), step)).value.backward()
        optimizer.step()
    return student.weights.tolist()


def test_what_guidance_adds_has_no_fixed_point_of_its_own():
    """Card 3: alone it drives the mean away at a constant pace; distribution matching holds the student back (the toy says for good)."""
    early, late, held = train_affine(3.0, True, 100)[0], train_affine(3.0, True, 200)[0], train_affine(3.0, False, 200)[0]
    assert late > early + 0.5 > 2.0
    assert 1.0 < held < 1.5


def test_without_guidance_it_descends_to_the_teacher():
    method, m = decoupled(Flow(), (8,)), gaussians(Flow(), (-0.5, 1.4))
    optimizer = torch.optim.Adam([m.student.weights], 0.05, betas=(0.0, 0.9))
    for step in range(150):
        m.fake = m.student.law()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        method.student_loss(m, bare(), keyed(step, count=64)).value.backward()
        optimizer.step()
    assert gaussian_kl(m.student.weights) < 1e-3


def test_critic_denoises_the_students_own_sample_unguided():
    method = decoupled()
    m, draws = unet_roles(method), keyed()
    batch = labelled(draws, method)
    method.student_loss(m, batch, draws)
    x0 = batch.scratch["x0"]
    s, eps = method.cfg.fake_times.sample(draws.each("fake/s")), draws.each("fake/eps").normal_like(x0)
    with torch.no_grad():
        expected = denoising_loss(m.fake(TABLE.add_noise(x0, eps, s), s, batch["main"].cond), x0, eps).mean()
        torch.testing.assert_close(method.critic_loss(m, batch, draws).value, expected)


def test_plan():
    method = decoupled(fake_updates=5)
    assert method.plan(5) == (Update("student", ("student",)), Update("critic", ("fake",), reuse=True))
    assert all(method.plan(step) == (Update("critic", ("fake",)),) for step in range(1, 5))


def test_impossible_values():
    with pytest.raises(ValueError, match="fake_updates must be at least 1, got 0"):
        DecoupledDMDConfig(fake_updates=0)
    with pytest.raises(ValueError, match="times need 0 <= low"):
        Uniform(0.5, 0.1)
