"""PG-SB: one random guidance per sample for both scores, and what SwiftBrush has besides."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, MixtureTeacher, f64, ks
from small import COUNT, NULL, TABLE, AffineStudent, keyed, labelled, unet_roles
from toys import Counted

from stepdistill.diffusion.process import Flow, like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import scaled_eps_loss
from stepdistill.methods.base import Batch, Sample, Setup, Update
from stepdistill.methods.pgsb import PGSB, PGSBConfig
from stepdistill.models.conditioning import Conditioning


def pgsb(process=TABLE, shape=(1, 8, 8), steps=1, **options) -> PGSB:
    return PGSB(PGSBConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps))))


def test_guidance_is_uniform_per_sample_and_the_same_for_both_scores():
    """Card 10: the histogram of w over many samples is flat on the range, and nothing reads the recipe's own guidance."""
    asked = {"teacher": [], "fake": []}

    def score(name):
        def net(x_t, t, cond, *, w=None, tap=False):
            asked[name].append(w)
            return GaussianTeacher(TABLE, "eps")(x_t, t)

        return net

    method = pgsb(guidance_low=0.5, guidance_high=3.0)
    m = SimpleNamespace(student=GaussianTeacher(TABLE, "eps"), teacher=score("teacher"), fake=score("fake"))
    for step in range(150):
        method.student_loss(m, labelled(keyed(step), method), keyed(step))
    teacher, fake = torch.cat(asked["teacher"]), torch.cat(asked["fake"])
    assert torch.equal(teacher, fake)
    assert teacher.shape == (150 * COUNT,)
    assert 0.5 <= float(teacher.min()) < 0.6 < 2.9 < float(teacher.max()) < 3.0
    assert ks(teacher, (teacher - 0.5) / 2.5) < 0.067                            # the 1 % bound at 600 draws
    assert len(set(asked["teacher"][0].tolist())) == COUNT


def test_gradient_is_that_of_the_guided_scores():
    """On a mixture of two classes: alpha·sigma·(fake^w - teacher^w) in x0 over numel, w of the sample's own draw."""
    process, draws = Flow(), keyed()
    teacher = MixtureTeacher(process, "flow")
    fake = MixtureTeacher(process, "v", means=f64([-1.0, 1.0]))
    student = AffineStudent(process, 0.2, 0.9)
    labels = torch.tensor([0, 1, 0, 1])
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    method = pgsb(process, ())
    method.student_loss(SimpleNamespace(student=student, teacher=teacher, fake=fake), Batch({"main": Sample(cond)}), draws).value.backward()
    z, s, w = draws.each("start").normal(), Uniform(0.02, 0.98).sample(draws.each("s")), draws.each("w").uniform(0.5, 4.0)
    x0 = 0.2 + 0.9 * z.double()
    x_s = process.add_noise(x0, draws.each("eps").normal_like(x0), s)
    pairs = [(net(x_s, s, None).x0, net(x_s, s, cond, w=1.0).x0) for net in (fake, teacher)]
    away, toward = (null + w * (told - null) for null, told in pairs)
    g = like(process.alpha(s) * process.sigma(s), x0) * (away - toward) / len(x0)
    torch.testing.assert_close(student.weights.grad, torch.stack([g.sum(), (g * z).sum()]))


def test_passes_of_a_step():
    """Both scores see the condition and its null at once; the critic reuses the sample and is not guided."""
    method = pgsb(dropout=0.0)
    m, draws = unet_roles(method), keyed()
    batch = labelled(draws, method)
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher, Counted(m.fake.network) as fake:
        method.student_loss(m, batch, draws)
        assert (student, teacher, fake) == ([COUNT], [2 * COUNT], [2 * COUNT])
        got = method.critic_loss(m, batch, draws).value
        assert (student, teacher, fake) == ([COUNT], [2 * COUNT], [2 * COUNT, COUNT])
    x0 = batch.scratch["x0"]
    s, eps = method.cfg.fake_times.sample(draws.each("fake/s")), draws.each("fake/eps").normal_like(x0)
    expected = scaled_eps_loss(m.fake(TABLE.add_noise(x0, eps, s), s, batch["main"].cond, w=1.0), x0, eps).mean()
    torch.testing.assert_close(got, expected)


def test_conditions_drop_by_whole_batches_in_the_critics_update():
    seen = []

    def fake(x_t, t, cond, *, w=None, tap=False):
        seen.append(cond["class_labels"].tolist())
        return GaussianTeacher(TABLE, "eps")(x_t, t)

    method = pgsb(dropout=0.5)
    m = SimpleNamespace(student=GaussianTeacher(TABLE, "eps"), fake=fake)
    for step in range(60):
        method.critic_loss(m, labelled(keyed(step), method), keyed(step))
    assert 15 < sum(labels == [NULL] * COUNT for labels in seen) < 45
    assert all(labels == [NULL] * COUNT or NULL not in labels for labels in seen)


def test_a_condition_without_null_is_refused():
    method = pgsb()
    m, draws = unet_roles(method), keyed()
    bare = Batch({"main": Sample(Conditioning({"class_labels": torch.zeros(COUNT, dtype=torch.long)}))})
    with pytest.raises(ValueError, match="guidance needs a null condition"):
        method.student_loss(m, bare, draws)


def test_plan():
    method = pgsb(fake_updates=2)
    assert method.plan(0) == (Update("student", ("student",)), Update("critic", ("fake",), reuse=True))
    assert method.plan(1) == (Update("critic", ("fake",)),)


@pytest.mark.parametrize(("options", "named"), [({"guidance_low": -1.0}, "guidance_low"), ({"guidance_high": 0.5}, "guidance_high"),
                                                ({"fake_updates": 0}, "fake_updates"), ({"dropout": 1.0}, "dropout")])
def test_impossible_values(options, named):
    with pytest.raises(ValueError, match=named):
        PGSBConfig(**options)
