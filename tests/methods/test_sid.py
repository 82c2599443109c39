"""SiD: the closed form on Gaussians (card T8), gradients through both scores, the guidance variants, one graph against two products."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from toys import Counted, ring, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP, like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.matching import dmd_scale, sid_loss
from stepdistill.methods.base import Batch, Images, Sample, Setup
from stepdistill.methods.sid import SiD, SiDConfig
from stepdistill.models.adapters import LoraRecipe, checkpoint_activations
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles

TABLE = TableVP.scaled_linear()
COUNT = 4


def sid(process=TABLE, shape=(1, 8, 8), steps=1, **options) -> SiD:
    return SiD(SiDConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps))))


def draws(step: int = 0, update: int = 0) -> Draws:
    return Draws(0, range(COUNT), step, update)


def unet_roles(method: SiD, guidance: float = 1.0, lora=None, checkpointing: bool = False) -> Roles:
    network = tiny_unet()
    if checkpointing:
        checkpoint_activations(network)
    teacher = Denoiser(network, TABLE, "eps", guidance=guidance, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example, lora=lora)
    with torch.no_grad():                                                                           # equal scores would hide mistakes
        for name in ("student", "fake"):
            generator = torch.Generator().manual_seed(len(name))
            for p in m.parameters(name):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return m


def labelled(draws: Draws, method: SiD) -> Batch:
    made = {}
    for name, stream in method.data(method.cfg).items():
        labels = draws.each(f"{name}/labels").integers(3)
        x0 = draws.each(f"{name}/x0").normal(*method.setup.shape) if isinstance(stream, Images) else None
        made[name] = Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}), x0)
    return Batch(made)


def gradient(method: SiD, m: Roles) -> torch.Tensor:
    """The student's gradient of one update, all parameters in one vector."""
    m.train_only(("student",))
    method.student_loss(m, labelled(draws(), method), draws()).value.backward()
    found = torch.cat([p.grad.flatten() for p in m.parameters("student")])
    for role in m.names:
        if role != "student":
            assert all(p.grad is None for p in m.parameters(role))
    m.module("student").zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_closed_form_on_gaussians(alpha, t):
    """N(0, 1) and N(mu, 1): d = -mu·s²/V, the gradient at x0 is mu·s⁴/V² for any alpha, the value at the optimal fake (1 - alpha)·d²."""
    mu, process = 0.4, Flow()
    real, fake = GaussianTeacher(process, "flow", f64(0.0), f64(1.0)), GaussianTeacher(process, "flow", f64(mu), f64(1.0))
    z = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = (mu + z).requires_grad_()
    s = f64(t).expand(len(z))
    x_s = process.add_noise(x0, torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), s)
    at_real, at_fake = real(x_s, s).x0, fake(x_s, s).x0
    value = sid_loss(x0, at_real, at_fake, alpha)
    scale = dmd_scale(x0.detach(), at_real.detach())
    alpha_s, sigma_s = float(process.alpha(f64(t))), float(process.sigma(f64(t)))
    v = alpha_s**2 + sigma_s**2
    torch.testing.assert_close(at_real - at_fake, torch.full_like(x0, -mu * sigma_s**2 / v))
    (grad,) = torch.autograd.grad((value / scale).sum(), x0)
    torch.testing.assert_close(grad, torch.full_like(x0, mu * sigma_s**4 / v**2))
    plain = (value / scale).detach()
    expected, error = (1 - alpha) * (mu * sigma_s**2 / v) ** 2, float(plain.std()) / len(plain) ** 0.5
    assert abs(float(plain.mean()) - expected) < 4 * error


def test_alpha_one_is_the_short_form():
    a, b, c = (torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    short = ((b - c) * (c - a)).mean(1) / (a - b).abs().mean(1)
    torch.testing.assert_close(sid_loss(a, b, c, 1.0), short)


def test_no_gradient_where_the_student_is_the_teacher():
    """Student law = teacher law and the exact fake score: the gradient is zero pointwise, at every s."""
    teacher = ring()
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    method = sid(Flow(), (2,))
    net = lambda x_t, t, cond, *, w=None, tap=False: SimpleNamespace(x0=weight * x_t.double())                   # noqa: E731
    net.process = Flow()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    m = SimpleNamespace(student=net, teacher=teacher, fake=teacher)
    keyed = Draws(0, range(len(z)), 0, 0)
    loss = method.student_loss(m, Batch({"main": Sample(Conditioning())}), keyed)
    loss.value.backward()
    assert float(loss.value) == 0
    assert float(weight.grad) == 0


def test_gradient_runs_through_both_scores_and_not_through_the_divisor():
    """Against central differences of the same loss with the divisor held, on linear scores."""
    method = sid(Flow(), (3,), alpha=1.2)
    real, fake = GaussianTeacher(Flow(), "flow", f64(1.3), f64(0.6)), GaussianTeacher(Flow(), "flow", f64(0.1), f64(0.9))
    keyed, held = draws(), []

    def loss(weight):
        net = lambda x_t, t, cond, *, w=None, tap=False: SimpleNamespace(x0=0.2 + weight * x_t.double())         # noqa: E731
        net.process = Flow()
        return method.student_loss(SimpleNamespace(student=net, teacher=real, fake=fake), Batch({"main": Sample(Conditioning())}), keyed)

    def by_hand(weight):
        x0 = 0.2 + weight * keyed.each("start").normal(3).double()
        s = Uniform(0.02, 0.98).sample(keyed.each("s"))
        x_s = Flow().add_noise(x0, keyed.each("eps").normal_like(x0), s)
        a, b = real(x_s, s).x0, fake(x_s, s).x0
        if not held:
            held.append(like(dmd_scale(x0, a), x0))
        return (held[0] * (a - b) * (a - x0 - 1.2 * (a - b))).mean()

    weight = f64(0.8).requires_grad_()
    loss(weight).value.backward()
    by_hand(f64(0.8))
    h = 1e-5
    assert float(weight.grad) == pytest.approx(float(by_hand(f64(0.8 + h)) - by_hand(f64(0.8 - h))) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("lora", [None, {"student": LoraRecipe(4), "fake": LoraRecipe(4)}], ids=["copies", "shared base"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("options", [{}, {"gan_weight": 0.1, "fake_guidance": 2.0}], ids=["", "GAN, guided"])
def test_two_products_equal_one_graph(lora, checkpointing, options):
    """Vector-Jacobian products through one score at a time give the gradient of the one graph, on one base with adapters, too."""
    both = sid(**options), sid(split=True, **options)
    whole, parts = (gradient(method, unet_roles(method, 2.0, lora, checkpointing)) for method in both)
    assert float(whole.norm()) > 0
    assert float((whole - parts).norm()) < 1e-5 * float(whole.norm())


def test_the_student_fools_the_discriminator():
    """What the GAN term adds to loss and gradient is gan_weight·softplus(-logits) at the fake score's features of the same x_s."""
    plain, both = sid(), sid(gan_weight=0.3)
    m, keyed = unet_roles(both), draws()
    added = gradient(both, m) - gradient(plain, m)
    m.train_only(("student",))
    x0 = both.rollout(m, labelled(keyed, both)["main"].cond, keyed, grad=True)
    x_s = TABLE.add_noise(x0, keyed.each("eps").normal_like(x0), s := Uniform(0.02, 0.98).sample(keyed.each("s")))
    fool = torch.nn.functional.softplus(-m.disc(m.fake(x_s, s, labelled(keyed, both)["main"].cond, tap=True).features)).mean()
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(0.3 * fool, list(m.parameters("student")))])
    assert float((added - by_hand).norm()) < 1e-3 * float(by_hand.norm())
    losses = [method.student_loss(m, labelled(keyed, method), keyed).value.detach() for method in (both, plain)]
    torch.testing.assert_close(losses[0] - losses[1], 0.3 * fool.detach(), rtol=1e-4, atol=1e-6)


def test_the_discriminator_is_never_told_by_the_condition():
    """An update that drops the student's condition drops the pictures', too."""
    seen = []
    method = sid(gan_weight=0.1, fake_guidance=-1.0, dropout=0.5)
    m = unet_roles(method)
    m.fake.network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True)
    for step in range(8):
        method.critic_loss(m, labelled(draws(step), method), draws(step))
    null = [labels.count(3) for labels in seen]
    assert set(null) == {0, 2 * COUNT}


def test_the_split_holds_one_score_network_at_a_time():
    """Bytes that autograd keeps: at most one network's activations beside the student's, where one graph keeps both."""
    def kept(split: bool) -> int:
        method = sid(split=split)
        m, alive, peak = unet_roles(method), [0], [0]

        class Held:
            def __init__(self, tensor):
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                alive[0] += self.bytes
                peak[0] = max(peak[0], alive[0])

            def __del__(self):
                alive[0] -= self.bytes

        m.train_only(("student",))
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            method.student_loss(m, labelled(draws(), method), draws()).value.backward()
        return peak[0]

    assert kept(True) < 0.75 * kept(False)


@pytest.mark.parametrize(("w", "options", "rows"), [(1.0, {}, [COUNT]), (2.0, {"fake_guidance": 2.0, "dropout": 0.0}, [2 * COUNT]),
                                                    (1.0, {"fake_guidance": 0.0}, [COUNT]), (1.0, {"fake_guidance": -1.0}, [2 * COUNT])],
                         ids=["plain", "long-short", "zero", "anti"])
def test_guidance_of_the_two_scores(w, options, rows):
    """The loss is sid_loss at these very predictions; Zero-CFG asks the null condition in one pass."""
    method = sid(**options)
    m, keyed = unet_roles(method, w), draws()
    batch = labelled(keyed, method)
    with Counted(m.fake.network) as calls:
        got = method.student_loss(m, batch, keyed).value
    assert calls == rows
    with torch.no_grad():
        x0 = method.rollout(m, batch["main"].cond, keyed, grad=False)
        s = Uniform(0.02, 0.98).sample(keyed.each("s"))
        x_s = TABLE.add_noise(x0, keyed.each("eps").normal_like(x0), s)
        cond, null = (m.fake(x_s, s, c, w=1.0).x0 for c in (batch["main"].cond, batch["main"].cond.null))
        fake = null + method.cfg.fake_guidance * (cond - null)
        torch.testing.assert_close(got, sid_loss(x0, m.teacher(x_s, s, batch["main"].cond).x0, fake, 1.0).mean(), rtol=1e-4, atol=1e-6)


def test_how_the_fake_score_is_trained():
    """Guided when long-short, without the condition under Zero-CFG, plain under Anti-CFG; conditions drop by whole batches, there only."""
    calls = []

    def fake(x_t, t, cond, *, w=None, tap=False):
        calls.append((w, cond["class_labels"].tolist()))
        return GaussianTeacher(TABLE, "eps")(x_t, t)

    def trained(**options):
        calls.clear()
        method = sid(**options)
        m = SimpleNamespace(student=GaussianTeacher(TABLE, "eps"), fake=fake)
        for step in range(40):
            method.critic_loss(m, labelled(draws(step), method), draws(step))
        assert len({w for w, _ in calls}) == 1
        return calls[0][0], sum(labels == [3] * COUNT for _, labels in calls)

    assert trained() == (1.0, 0)
    assert trained(fake_guidance=0.0) == (0.0, 0)
    assert trained(fake_guidance=3.0, dropout=0.0) == (3.0, 0)
    w, dropped = trained(fake_guidance=-1.0, dropout=0.3)
    assert w == 1.0
    assert 4 < dropped < 22


def test_steps_are_drawn_evenly_and_only_the_drawn_one_keeps_its_gradient():
    method = sid(steps=4)
    drawn = [int(Draws(0, range(2), step, 0).shared("call").integers(4)) for step in range(400)]
    assert all(60 < drawn.count(i) < 140 for i in range(4))
    m, keyed = unet_roles(method), draws()
    grads = []
    m.student.network.register_forward_hook(lambda module, args, out: grads.append(out[0].requires_grad))
    m.train_only(("student",))
    method.student_loss(m, labelled(keyed, method), keyed)
    assert grads == [False] * (len(grads) - 1) + [True]
    assert len(grads) == int(keyed.shared("call").integers(4)) + 1


@pytest.mark.parametrize("options", [{"fake_updates": 0}, {"gan_weight": -1.0}, {"disc_weight": -1.0}, {"dropout": 1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SiDConfig(**options)
