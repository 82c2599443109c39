"""TCD: the law of the target time, its two ends (LCM and the state itself), and the sampler with the exact two-time map (card 7)."""

from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, GaussianTeacher, MapOfTimes, MapStudent, MixtureTeacher, f64, ks

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import lcm_grid, trailing
from stepdistill.losses.distance import pseudo_huber
from stepdistill.methods.base import Batch, Sample, Setup
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.methods.tcd import TCD, TCDConfig
from stepdistill.models.conditioning import Conditioning

COUNT, TABLE = 64, TableVP.scaled_linear()
KEYED = Draws(0, range(COUNT))


def tcd(process=TABLE, **options) -> TCD:
    return TCD(TCDConfig(**options), Setup(process, (3,), SamplerSpec(lcm_grid(4), clip_x0=2.0)))


def with_s(u: float, count: int = COUNT) -> SimpleNamespace:
    """Draws whose target time is a fixed share of what is allowed."""
    each = lambda tag: SimpleNamespace(uniform=lambda: f64([u] * count)) if tag == "s" else KEYED.each(tag)                   # noqa: E731
    return SimpleNamespace(each=each)


def roles(teacher, student) -> SimpleNamespace:
    return SimpleNamespace(teacher=teacher, student=student)


def batch_of(teacher) -> Batch:
    return Batch({"real": Sample(Conditioning(), teacher.data(COUNT, torch.Generator().manual_seed(0), 3))})


def times_of(keyed: Draws = KEYED, points: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    n = 1 + keyed.each("n").integers(points)
    return n.double() / points, (n - 1).double() / points


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("u", [0.0, 0.4, 0.999])
def test_loss_is_that_of_two_jumps_to_one_time(kind, u):
    """s = floor(u·(n' + 1)) on the grid; where it is r the target is the teacher's landing itself."""
    teacher, student = GaussianTeacher(TABLE, kind), MapOfTimes(GaussianTeacher(TABLE, kind), kind=kind, bend=0.2)
    batch = batch_of(teacher)
    got = tcd().student_loss(roles(teacher, student), batch, with_s(u)).value
    t, r = times_of()
    s = (u * (r * 50 + 1)).floor() / 50
    assert bool((s <= r).all())
    x_t = TABLE.add_noise(batch["real"].clean, KEYED.each("eps").normal_like(batch["real"].clean), t)
    x_r = jump(teacher(x_t, t), TABLE, r)
    target = torch.where((s == r)[:, None], x_r, jump(student(x_r, r), TABLE, s))
    torch.testing.assert_close(got, pseudo_huber(jump(student(x_t, t), TABLE, s), target).mean(), rtol=1e-6, atol=0)


def test_the_latest_target_is_the_landing_and_asks_nothing_of_the_student():
    """r = n' (card 7, test 10): whatever the target network says, q is x_r; the earliest, s = 0, is LCM."""
    teacher = GaussianTeacher(TABLE, "v")
    batch, bent = batch_of(teacher), [MapOfTimes(teacher, bend=b) for b in (0.0, 0.3)]
    m = SimpleNamespace(teacher=teacher, student=bent[0], target=bent[1])
    same, other = (tcd(target=whose).student_loss(m, batch, with_s(0.999)).value for whose in ("student", "ema"))
    assert float(same) == float(other)
    assert float(tcd(target="ema").student_loss(m, batch, KEYED).value) != float(tcd().student_loss(m, batch, KEYED).value)
    lcm = LCM(LCMConfig(), Setup(TABLE, (3,))).student_loss(roles(teacher, bent[1]), batch, KEYED).value
    torch.testing.assert_close(tcd().student_loss(roles(teacher, bent[1]), batch, with_s(0.0)).value, lcm, rtol=1e-12, atol=0)


def test_every_target_below_is_drawn():
    """Given n' the index of s is even on 0..n'."""
    many = Draws(0, range(6000))
    asked = []
    process = SimpleNamespace(add_noise=TABLE.add_noise, sigma=TABLE.sigma, alpha=lambda t: asked.append(t) or TABLE.alpha(t))
    method = TCD(TCDConfig(points=4), Setup(process, (1,)))
    teacher = GaussianTeacher(TABLE)
    x0 = teacher.data(6000, torch.Generator().manual_seed(0), 1)
    method.student_loss(roles(teacher, teacher), Batch({"real": Sample(Conditioning(), x0)}), many)
    s, (_, r) = asked[-1], times_of(many, 4)
    for n in range(4):
        counts = (s[r == n / 4] * 4).round().long().bincount(minlength=n + 1)
        assert len(counts) == n + 1
        assert float((counts / counts.sum() - 1 / (n + 1)).abs().max()) < 0.05


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_sampling_with_the_exact_two_time_map_keeps_every_marginal(gamma):
    """KS against the mixture at each time of the grid, from quantiles of the noise (card 7, test 10). Without noise it is deterministic."""
    process, times, count = Flow(), trailing(4), 20_000
    spec = TCD(TCDConfig(gamma=gamma), Setup(process, (), SamplerSpec(times))).sampler()
    teacher = MixtureTeacher(process)
    student = MapStudent(teacher, dict(zip(times, ((1 - gamma) * t for t in (*times[1:], 0.0)), strict=True)))
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)

    def walk(x, seed):
        z = torch.randn(4, len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return list(steps(student, start(process, spec, x), spec, None, Draws(0), noise=lambda i: z[i]))

    for step, later in zip(walk(quantiles, 1), (*times[1:], None), strict=True):
        x, at = (step.x0, 0.0) if later is None else (step.x_next, later)
        assert ks(x, teacher.cdf(x, at)) < 0.012
    few = quantiles[::400]
    assert torch.equal(walk(few, 1)[-1].x0, walk(few, 2)[-1].x0) == (gamma == 0)


def test_sampler():
    assert tcd().sampler() == SamplerSpec(lcm_grid(4), renoise=0.3, clip_x0=2.0)
    assert tcd(gamma=1.0).sampler().renoise == 1


def test_needs_and_target():
    assert set(TCD.needs(TCDConfig())) == {"teacher", "student"}
    assert set(TCD.needs(TCDConfig(target="ema"))) == {"teacher", "student", "target"}
    moved = []
    m = SimpleNamespace(follow=lambda *args: moved.append(args))
    for options in ({}, {"target": "ema", "target_decay": 0.9}):
        method = tcd(**options)
        method.after_update(m, method.plan(0)[0], 1)
    assert moved == [("target", "student", 0.9)]


@pytest.mark.parametrize("options", [{"skip": 0}, {"skip": 50}, {"gamma": 1.1}, {"target_decay": 1.0}, {"huber": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TCDConfig(**options)
