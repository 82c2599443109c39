"""SwiftBrush: the weight alpha·sigma, both scores under one guidance, a fake score trained plain on adapters of the teacher."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher
from small import COUNT, NULL, TABLE, AffineStudent, bare, gaussian_kl, gaussians, keyed, labelled, unet_roles
from toys import Counted, run_of, train

from stepdistill.diffusion.prediction import Prediction, target
from stepdistill.diffusion.process import Flow, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import scaled_eps_loss
from stepdistill.methods.base import Setup, Update
from stepdistill.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from stepdistill.models.adapters import LoraRecipe
from stepdistill.recipe import OptimRecipe
from stepdistill.training.assemble import run_update, updates_of

RATES = {"student": OptimRecipe(1e-3), "fake": OptimRecipe(1e-2)}


def swiftbrush(process=TABLE, shape=(1, 8, 8), steps=1, **options) -> SwiftBrush:
    return SwiftBrush(SwiftBrushConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps))))


@pytest.mark.parametrize("process", [Flow(), Trig(), TABLE], ids=["flow", "trig", "table"])
def test_gradient_is_sigma_squared_times_the_difference_of_eps(process):
    """At x0 it is sigma²·(teacher - fake) of eps over numel, which is alpha·sigma·(fake - teacher) of x0: no other normaliser."""
    method = swiftbrush(process, (3,))
    m, draws = gaussians(process), keyed()
    method.student_loss(m, bare(), draws).value.backward()
    z = draws.each("start").normal(3)
    x0, s = 0.2 + 0.9 * z.double(), Uniform(0.02, 0.98).sample(draws.each("s"))
    x_s = process.add_noise(x0, draws.each("eps").normal_like(x0), s)
    real, fake = m.teacher(x_s, s), m.fake(x_s, s)
    g = like(process.sigma(s).square(), x0) * (real.eps - fake.eps) / x0.numel()
    torch.testing.assert_close(g, like(process.alpha(s) * process.sigma(s), x0) * (fake.x0 - real.x0) / x0.numel())
    torch.testing.assert_close(m.student.weights.grad, torch.stack([g.sum(), (g * z).sum()]))


def test_student_descends_towards_the_teacher():
    """T4: an affine student with its exact fake score reaches the teacher's mean and std."""
    process, method = Flow(), swiftbrush(Flow(), (8,))
    m = gaussians(process, (-0.5, 1.4))
    optimizer = torch.optim.Adam([m.student.weights], 0.05, betas=(0.0, 0.9))
    for step in range(150):
        m.fake = m.student.law()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        method.student_loss(m, bare(), keyed(step, count=64)).value.backward()
        optimizer.step()
    assert gaussian_kl(m.student.weights) < 1e-3


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_fixed_point(kind):
    """T3: student law = teacher law and an exact fake: no gradient, whatever the fake speaks."""
    m = gaussians(Flow(), (1.3, 0.6), kind=kind)
    swiftbrush(Flow(), (3,)).student_loss(m, bare(), keyed()).value.backward()
    assert float(m.student.weights.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_both_scores_are_guided_alike(w):
    """The pull is between fake and teacher at the recipe's guidance; at 1 each is one pass of the batch."""
    method = swiftbrush()
    m, draws = unet_roles(method, w), keyed()
    batch = labelled(draws, method)
    with Counted(m.fake.network) as fake_rows, Counted(m.teacher.network) as teacher_rows, Counted(m.student.network) as student_rows:
        log = method.student_loss(m, batch, draws).log
    assert fake_rows == teacher_rows == [COUNT if w == 1 else 2 * COUNT]
    assert student_rows == [COUNT]
    cond, x0 = batch["main"].cond, batch.scratch["x0"]
    s = Uniform(0.02, 0.98).sample(draws.each("s"))
    x_s = TABLE.add_noise(x0, draws.each("eps").normal_like(x0), s)
    with torch.no_grad():
        guided = [null + w * (net(x_s, s, cond, w=1.0).x0 - null)
                  for net in (m.fake, m.teacher) for null in [net(x_s, s, cond.null, w=1.0).x0]]
    torch.testing.assert_close(log["score_gap"], (guided[0] - guided[1]).square().mean().sqrt(), rtol=1e-3, atol=1e-5)


def test_the_fake_score_is_trained_plain_and_sometimes_without_the_condition():
    """Never guided; the null condition in a tenth of the updates and by whole batches; never where nothing is guided."""
    calls = []

    def fake(x_t, t, cond, *, w=None, tap=False):
        calls.append((w, cond["class_labels"].tolist()))
        return GaussianTeacher(TABLE, "eps")(x_t, t)

    def nulls(w, **options):
        calls.clear()
        method = swiftbrush(**options)
        teacher = GaussianTeacher(TABLE, "eps", guidance=w)
        m = SimpleNamespace(student=teacher, teacher=teacher, fake=fake)
        for step in range(60):
            method.critic_loss(m, labelled(keyed(step), method), keyed(step))
        assert {w for w, _ in calls} == {1.0}
        dropped = [labels == [NULL] * COUNT for _, labels in calls]
        assert all(NULL not in labels for (_, labels), null in zip(calls, dropped, strict=True) if not null)
        return sum(dropped)

    assert nulls(1.0) == nulls(4.5, dropout=0.0) == 0
    assert 1 <= nulls(4.5) <= 14
    assert 15 < nulls(4.5, dropout=0.5) < 45


def test_the_fake_loss_is_alpha_squared_times_that_of_eps():
    """In every space the same number: alpha²·|eps error|² = alpha⁴/sigma²·|x0 error|²."""
    x0, eps, wrong = (torch.randn(COUNT, 3, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    for process in (Flow(), TABLE):
        alpha, sigma, x_t = process.alpha(t), process.sigma(t), process.add_noise(x0, eps, t)
        expected = alpha**4 / sigma**2 * (wrong - x0).square().flatten(1).mean(1)
        for kind in ("eps", "v", "flow", "x0"):
            raw = target(kind, wrong, (x_t - like(alpha, x_t) * wrong) / like(sigma, x_t), alpha, sigma)
            torch.testing.assert_close(scaled_eps_loss(Prediction(raw, kind, x_t, alpha, sigma), x0, eps), expected)


def test_the_critic_descends_that_loss_at_the_students_own_sample():
    method = swiftbrush(dropout=0.0)
    m, draws = unet_roles(method), keyed()
    batch = labelled(draws, method)
    method.student_loss(m, batch, draws)
    x0 = batch.scratch["x0"]
    assert not x0.requires_grad
    s, eps = method.cfg.fake_times.sample(draws.each("fake/s")), draws.each("fake/eps").normal_like(x0)
    with torch.no_grad():
        got = method.critic_loss(m, batch, draws).value
        expected = scaled_eps_loss(m.fake(TABLE.add_noise(x0, eps, s), s, batch["main"].cond, w=1.0), x0, eps).mean()
    torch.testing.assert_close(got, expected)


def test_adapters_leave_the_teacher_alone_and_learn_the_null_branch():
    """Card 8: with the adapter off the base is the teacher bit for bit; after training the fake's null answer has moved."""
    method = swiftbrush(dropout=0.5)
    m = unet_roles(method, 3.0, lora={"fake": LoraRecipe(4)})
    draws = keyed()
    batch, s = labelled(draws, method), torch.full((COUNT,), 0.5, dtype=torch.float64)
    x, null = draws.each("x").normal(1, 8, 8), batch["main"].cond.null
    ask = torch.no_grad()(lambda: (m.teacher.raw(x, s, null), m.fake.raw(x, s, null)))
    before = ask()
    train(method, m, RATES, 6, keyed, lambda d: labelled(d, method))
    after = ask()
    assert torch.equal(before[0], after[0])
    assert float((before[1] - after[1]).norm()) > 1e-3 * float(before[1].norm())


@pytest.mark.parametrize("every", [1, 3])
def test_plan(every):
    """One to one as in the paper, on one sample: the critic reuses the batch of the student's update."""
    method = swiftbrush(fake_updates=every)
    for step in range(7):
        critic = Update("critic", ("fake",), reuse=step % every == 0)
        assert method.plan(step) == ((critic,) if step % every else (Update("student", ("student",)), critic))
    assert updates_of(method, 7) == {"student": -(-7 // every), "fake": 7}
    m = unet_roles(method)
    run = run_of(method, m, keyed, lambda d: labelled(d, method))
    with Counted(m.student.network) as rows:
        batches, _ = run_update(run, 0, 0, method.plan(0)[0], [])
        run_update(run, 0, 1, method.plan(0)[1], batches)
        assert rows == [COUNT]


def test_several_steps_train_one_call():
    method = swiftbrush(steps=4)
    m, draws, grads = unet_roles(method), keyed(), []
    m.student.network.register_forward_hook(lambda module, args, out: grads.append(out[0].requires_grad))
    m.train_only(("student",))
    method.student_loss(m, labelled(draws, method), draws)
    assert grads == [False] * int(draws.shared("call").integers(4)) + [True]


def test_the_students_law_is_what_its_weights_say():
    """The yardstick of the tests above: unit noise through the affine student."""
    student = AffineStudent(Flow(), 0.4, 0.7)
    x0 = student(torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)), torch.ones(100_000), None).x0.detach()
    assert (float(x0.mean()), float(x0.std())) == pytest.approx((0.4, 0.7), abs=0.01)


@pytest.mark.parametrize("options", [{"fake_updates": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SwiftBrushConfig(**options)
