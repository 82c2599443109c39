"""PCM: phases that are the sampler's steps, the targets at their edges, the exact map, and the discriminator (card 8)."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, GaussianTeacher, MapOfTimes, MixtureTeacher, f64
from toys import Counted, run_of, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP, Trig
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import to_index, trailing
from stepdistill.losses.adversarial import hinge_discriminator_loss
from stepdistill.losses.distance import pseudo_huber
from stepdistill.methods.base import Batch, Sample, Setup
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.methods.pcm import PCM, PCMConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.training.assemble import run_update

COUNT, TABLE = 64, TableVP.scaled_linear()
KEYED = Draws(0, range(COUNT))


def pcm(process=TABLE, times=trailing(4), shape=(3,), **options) -> PCM:
    return PCM(PCMConfig(**options), Setup(process, shape, SamplerSpec(times)))


def gaussian(teacher: GaussianTeacher) -> Batch:
    return Batch({"real": Sample(Conditioning(), teacher.data(COUNT, torch.Generator().manual_seed(0), 3))})


@pytest.mark.parametrize(("points", "count", "indices"), [(40, 4, [249, 499, 749, 999]), (100, 2, [499, 999]), (50, 1, [999])])
def test_edges(points, count, indices):
    """Card 8: with N = 40 and M = 4 the phases end at 0, 249, 499, 749, where trailing samplers step."""
    method = pcm(times=trailing(count), points=points)
    assert [to_index(t, 1000) for t in method.edges.tolist()[1:]] == indices
    assert method.sampler() == SamplerSpec(trailing(count), renoise=0.0)
    edges = [0.0, *((n + 1) / 1000 for n in indices)]
    for t in torch.arange(1, points + 1, dtype=torch.float64) / points:
        lower, upper = (float(v) for v in method.phase(t[None]))
        assert (lower, upper) == next((a, b) for a, b in pairwise(edges) if a < float(t) <= b)


@pytest.mark.parametrize(("points", "times"), [(50, trailing(4)), (40, (1.0, 0.41))])
def test_steps_off_the_grid_are_refused(points, times):
    """N = 50 and M = 4 would train edges that no sampler steps on (card 8, pitfalls)."""
    with pytest.raises(ValueError, match=f"multiples of 1/{points}"):
        pcm(times=times, points=points)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_two_jumps_to_the_edge(kind):
    """And at the first point of a phase the target is the teacher's landing, whatever the student says."""
    teacher = GaussianTeacher(TABLE, kind)
    student, batch, method = MapOfTimes(teacher, kind=kind, bend=0.2), gaussian(teacher), pcm()
    got = method.student_loss(SimpleNamespace(teacher=teacher, student=student), batch, KEYED).value
    n = 1 + KEYED.each("n").integers(40)
    t, r, edge = n.double() / 40, (n - 1).double() / 40, ((n - 1) // 10).double() / 4
    assert 0 < int((r == edge).sum()) < COUNT
    x_t = TABLE.add_noise(batch["real"].clean, KEYED.each("eps").normal_like(batch["real"].clean), t)
    x_r = jump(teacher(x_t, t), TABLE, r)
    target = torch.where((r == edge)[:, None], x_r, jump(student(x_r, r), TABLE, edge))
    torch.testing.assert_close(got, pseudo_huber(jump(student(x_t, t), TABLE, edge), target).mean(), rtol=1e-6, atol=0)


def test_one_phase_is_lcm():
    teacher = GaussianTeacher(TABLE, "v")
    m, batch = SimpleNamespace(teacher=teacher, student=MapOfTimes(teacher, bend=0.2)), gaussian(teacher)
    lcm = LCM(LCMConfig(points=40), Setup(TABLE, (3,))).student_loss(m, batch, KEYED).value
    assert float(pcm(times=(1.0,)).student_loss(m, batch, KEYED).value) == float(lcm)


@pytest.mark.parametrize("process", [Flow(), Trig()], ids=["flow", "trig"])
def test_fixed_point(process):
    """With the exact map from edge to edge the distance is the solver's local error: order 2 in the interval."""
    teacher, errors = GaussianTeacher(process, "v"), []
    for points in (20, 40, 80):
        method = pcm(process, points=points, huber=0.0)
        student = MapOfTimes(teacher, lambda t, method=method: method.phase(t)[0])
        one = SimpleNamespace(shared=KEYED.shared, each=lambda tag, n=points: SimpleNamespace(      # everyone at t = 5/8, mid-phase
            integers=lambda high: torch.full((COUNT,), n * 5 // 8 - 1), normal_like=KEYED.each(tag).normal_like))
        m = SimpleNamespace(teacher=teacher, student=student)
        errors.append(float(method.student_loss(m, gaussian(teacher), one).value) ** 0.5)
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5.5


@pytest.mark.parametrize("process", [Flow(), Trig()], ids=["flow", "trig"])
def test_the_exact_student_is_sampled_exactly(process):
    """M steps from edge to edge are M(x, 1 -> 0) of the mixture, sample by sample (card 8, test 10)."""
    method, teacher = pcm(process, shape=()), MixtureTeacher(process)
    student, keyed = MapOfTimes(teacher, lambda t: method.phase(t)[0]), Draws(3, range(200))
    x0 = sample(student, method.sampler(), None, keyed, ())
    torch.testing.assert_close(x0.double(), teacher.flow_map(keyed.each("start").normal(), 1.0, 0.0), rtol=1e-5, atol=1e-5)
    assert len(student.calls) == 4


def unet_roles(method: PCM) -> Roles:
    teacher = Denoiser(tiny_unet(), TABLE, "eps", guidance=2.0, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example)
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return m


def labelled(keyed: Draws) -> Batch:
    labels = keyed.each("labels").integers(3)
    return Batch({"real": Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}),
                                 keyed.each("x0").normal(1, 8, 8))})


def test_student_and_discriminator_see_the_same_pair():
    """Two updates on one batch: the discriminator asks no student, only the teacher's features of p and q at g; both noised up from s."""
    method = pcm(shape=(1, 8, 8), gan_weight=0.1)
    m, few = unet_roles(method), lambda step, update: Draws(0, range(4), step, update)
    student, disc = method.plan(0)
    assert (student.trains, disc.trains, disc.reuse) == (("student",), ("disc",), True)
    run = run_of(method, m, few, labelled)
    with Counted(m.student.network) as asked, Counted(m.teacher.network) as read:
        batches, logs = run_update(run, 0, 0, student, ())
    assert (asked, read) == ([4, 4], [8, 4])                                                        # guided step, then features of p_g
    total = logs["student/distance"].value + 0.1 * logs["student/fool"].value
    assert float(logs["student/loss"].value) == pytest.approx(float(total), rel=1e-6)
    with Counted(m.student.network) as asked, Counted(m.teacher.network) as read:
        _, logs = run_update(run, 0, 1, disc, batches)
    assert (asked, read) == ([], [8])                                                               # of p_g and q_g together, unguided
    kept, keyed = batches[0].scratch, few(0, 1)
    assert not kept["p"].requires_grad
    g = kept["s"] + (kept["upper"] - kept["s"]) * keyed.each("g").uniform()
    assert bool(((g >= kept["s"]) & (g <= kept["upper"])).all())
    with torch.no_grad():
        cond, noised = batches[0]["real"].cond, [TABLE.travel(kept[n], keyed.each(n).normal_like(kept[n]), kept["s"], g) for n in "pq"]
        on_p, on_q = (m.disc(m.teacher.plain(x, g, cond, tap=True).features) for x in noised)
        torch.testing.assert_close(logs["disc/loss"].value, hinge_discriminator_loss(real=on_q, fake=on_p), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_term_runs_through_the_frozen_teacher():
    """Doubling its weight adds its gradient once more, which does not come from the distance."""
    grads = {}
    for weight in (0.0, 0.1, 0.2):
        method = pcm(shape=(1, 8, 8), gan_weight=weight)
        m, keyed = unet_roles(method), Draws(0, range(4))
        m.train_only(("student",))
        method.student_loss(m, labelled(keyed), keyed).value.backward()
        assert all(p.grad is None for role in m.names if role != "student" for p in m.parameters(role))
        grads[weight] = torch.cat([p.grad.flatten() for p in m.parameters("student")])
    one = grads[0.1] - grads[0.0]
    assert float(one.norm()) > 1e-4 * float(grads[0.0].norm())
    torch.testing.assert_close(grads[0.2] - grads[0.0], 2 * one, rtol=1e-2, atol=1e-6)


def test_discriminator_is_flat_where_nothing_differs():
    """p and q of one law: after training its loss is still about 2 and it pulls at no student (card 8, test 10); where they differ it does.

    The head is linear, so that its pull is its weight.
    """
    teacher, keyed = GaussianTeacher(Flow(), "flow"), None
    ends, pulls = {}, {}
    for apart in (0.0, 2.0):
        method, head = pcm(Flow(), shape=(1,), gan_weight=0.1), torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.Adam(head.parameters(), 2e-2)
        m = SimpleNamespace(teacher=teacher, disc=lambda features, head=head: head(features[0].float())[:, 0])
        losses = []
        for step in range(150):
            keyed = Draws(0, range(256), step)
            p, q = (teacher.data(256, torch.Generator().manual_seed(1000 * step + i), 1) for i in (1, 2))
            s = torch.full((256,), 0.25, dtype=torch.float64)
            batch = Batch({"real": Sample(Conditioning())}, {"p": p + apart, "q": q, "s": s, "upper": s + 0.25})
            loss = method.disc_loss(m, batch, keyed).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        ends[apart], pulls[apart] = sum(losses[-30:]) / 30, float(head.weight.detach().abs().max())
    assert ends[0.0] == pytest.approx(2.0, abs=0.1)
    assert ends[2.0] < 1.0
    assert pulls[0.0] < 0.1 * pulls[2.0]


def test_needs():
    assert set(PCM.needs(PCMConfig())) == {"teacher", "student"}
    with_disc = PCM.needs(PCMConfig(gan_weight=0.1))
    assert (with_disc["disc"].source, with_disc["disc"].of, with_disc["disc"].trains) == ("head", "teacher", True)


@pytest.mark.parametrize("options", [{"points": 0}, {"dropout": 1.0}, {"gan_weight": -1.0}, {"huber": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PCMConfig(**options)
