"""DMD2: whose gradient goes where, how often each role moves, and that training walks the very path of inference."""

from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from toys import Counted, Mlp, Oracle, run_of, tiny_unet, toy_roles, train

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow, TableVP, Trig, like
from stepdistill.diffusion.sampler import SamplerSpec, sample, start, steps
from stepdistill.diffusion.times import Uniform, trailing
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods.base import Batch, Conditions, Images, Sample, Setup, Update
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.recipe import OptimRecipe
from stepdistill.training.assemble import run_update, updates_of

TABLE = TableVP.scaled_linear()
COUNT = 4


def dmd2(steps: int = 1, process=TABLE, shape=(1, 8, 8), times=None, clip_x0=None, **options) -> DMD2:
    return DMD2(DMD2Config(**options), Setup(process, shape, SamplerSpec(times or trailing(steps), clip_x0=clip_x0)))


def labelled(draws: Draws, method: DMD2) -> Batch:
    """Random labels, and pictures where the method reads them."""
    made = {}
    for name, stream in method.data(method.cfg).items():
        labels = draws.each(f"{name}/labels").integers(3)
        x0 = draws.each(f"{name}/x0").normal(*method.setup.shape) if isinstance(stream, Images) else None
        made[name] = Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}), x0)
    return Batch(made)


def unet_roles(method: DMD2, guidance: float = 2.0) -> Roles:
    teacher = Denoiser(tiny_unet(), TABLE, "eps", guidance=guidance, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example)
    with torch.no_grad():                                                                           # equal scores would hide mistakes
        for name in ("student", "fake"):
            generator = torch.Generator().manual_seed(len(name))
            for p in m.parameters(name):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return m


def draws(step: int = 0, update: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, range(COUNT), step, update)


def gaussian_student(mean: float, std: float):
    """x0 = mean + std·z, affine in the noise it starts from, with the two numbers as weights."""
    weights = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)

    def net(x_t, t, cond, *, w=None, tap=False):
        return SimpleNamespace(x0=weights[0] + weights[1] * x_t.double(), x_t=x_t)

    net.process = Flow()
    return net, weights


def oracles(method: DMD2, student_law=(0.2, 0.9), fake_law=None, kind: str = "flow"):
    """Exact teacher N(1.3, .6²), exact fake of the student's law (or another)."""
    student, weights = gaussian_student(*student_law)
    student.process = method.process
    mean, std = fake_law or student_law
    fake = GaussianTeacher(method.process, kind, f64(mean), f64(std))
    return SimpleNamespace(student=student, teacher=GaussianTeacher(method.process, "v"), fake=fake), weights


def test_gradient_is_the_score_difference():
    """With exact scores the gradient at x0 is (fake - teacher)/mean|x0 - teacher|/numel, at the s and eps of the keyed draws."""
    method = dmd2(process=Flow(), shape=(3,), gan_weight=0)
    m, weights = oracles(method)
    keyed, batch = draws(), Batch({"main": Sample(Conditioning())})
    method.student_loss(m, batch, keyed).value.backward()
    z = keyed.each("start").normal(3)
    x0 = 0.2 + 0.9 * z.double()
    s = Uniform(0.02, 0.98).sample(keyed.each("s"))
    x_s = Flow().add_noise(x0, keyed.each("eps").normal_like(x0), s)
    real, fake = m.teacher(x_s, s).x0, m.fake(x_s, s).x0
    g = like(dmd_scale(x0, real), x0) * (fake - real) / x0.numel()
    torch.testing.assert_close(weights.grad, torch.stack([g.sum(), (g * z).sum()]))


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_share_of_sds_puts_x0_in_the_fake_scores_place_at_small_times(share):
    method = dmd2(process=Flow(), shape=(3,), gan_weight=0, sds_share=share, sds_below=0.4)
    m, weights = oracles(method)
    keyed, batch = draws(), Batch({"main": Sample(Conditioning())})
    method.student_loss(m, batch, keyed).value.backward()
    z, s = keyed.each("start").normal(3), Uniform(0.02, 0.98).sample(keyed.each("s"))
    assert 0 < int((s < 0.4).sum()) < COUNT
    x0 = 0.2 + 0.9 * z.double()
    x_s = Flow().add_noise(x0, keyed.each("eps").normal_like(x0), s)
    real, fake = m.teacher(x_s, s).x0, m.fake(x_s, s).x0
    away = torch.where((s < 0.4)[:, None], (1 - share) * fake + share * x0, fake)
    g = like(dmd_scale(x0, real), x0) * (away - real) / x0.numel()
    torch.testing.assert_close(weights.grad, torch.stack([g.sum(), (g * z).sum()]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_share_of_sds_narrows_the_student_by_what_it_should(share):
    """On N(1.3, .6²) at one s the expected gradient vanishes where k(u) = (k(v) - share)/(1 - share), k(v) = a²v/(a²v + s²)."""
    s = 0.3
    cfg = DMD2Config(gan_weight=0, sds_share=share, sds_below=1.0, times=Uniform(s, s))
    method = DMD2(cfg, Setup(Flow(), (512,), SamplerSpec(trailing(1))))         # so wide that the normaliser is nearly constant
    m, weights = oracles(method, (0.9, 0.8))
    optimizer = torch.optim.Adam([weights], 0.05, betas=(0.0, 0.9))
    for step in range(200):
        m.fake = GaussianTeacher(Flow(), "flow", weights[0].detach().clone(), weights[1].detach().clone())
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        method.student_loss(m, Batch({"main": Sample(Conditioning())}), Draws(0, range(32), step)).value.backward()
        optimizer.step()
    a2, kept = (1 - s) ** 2, (1 - s) ** 2 * 0.36 / ((1 - s) ** 2 * 0.36 + s**2)
    narrowed = (kept - share) / (1 - share)
    std = (narrowed * s**2 / (a2 * (1 - narrowed))) ** 0.5
    assert weights.tolist() == pytest.approx([1.3, std], rel=0.02)


@pytest.mark.parametrize("process", [Flow(), Flow(3.0), Trig(), TABLE], ids=["flow", "shifted", "trig", "table"])
def test_student_descends_towards_the_teacher(process):
    """T4 in small: an affine student with its exact fake score reaches the teacher's mean and std."""
    method = dmd2(process=process, shape=(8,), gan_weight=0)
    m, weights = oracles(method, (-0.5, 1.4))
    optimizer = torch.optim.Adam([weights], 0.05, betas=(0.0, 0.9))
    for step in range(150):
        m.fake = GaussianTeacher(process, "flow", weights[0].detach().clone(), weights[1].detach().clone())
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        method.student_loss(m, Batch({"main": Sample(Conditioning())}), Draws(0, range(64), step)).value.backward()
        optimizer.step()
    mean, std = weights.tolist()
    kl = (std / 0.6) ** 2 / 2 + ((mean - 1.3) / 0.6) ** 2 / 2 - 0.5 - torch.tensor(std / 0.6).log().item()
    assert kl < 1e-3


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_fixed_point(kind):
    """T3: student law = teacher law and an exact fake: no gradient, whatever the fake speaks."""
    method = dmd2(process=Flow(), shape=(3,), gan_weight=0)
    m, weights = oracles(method, (1.3, 0.6), kind=kind)
    loss = method.student_loss(m, Batch({"main": Sample(Conditioning())}), draws())
    loss.value.backward()
    assert float(weights.grad.abs().max()) < 1e-8
    assert float(loss.log["score_gap"]) < 1e-8


def test_needs_and_data_follow_the_gan():
    with_gan, without = DMD2Config(), DMD2Config(gan_weight=0)
    assert set(DMD2.needs(with_gan)) == {"teacher", "student", "fake", "disc"}
    assert set(DMD2.needs(without)) == {"teacher", "student", "fake"}
    assert DMD2.needs(with_gan)["disc"].of == "fake"
    assert DMD2.needs(DMD2Config(features="teacher"))["disc"].of == "teacher"
    assert DMD2.data(with_gan) == {"main": Conditions(), "real": Images()}
    assert DMD2.data(without) == {"main": Conditions()}
    assert not DMD2.needs(with_gan)["teacher"].trains


@pytest.mark.parametrize(("every", "gan"), [(1, 0.0), (3, 0.0), (5, 1e-3)])
def test_plan(every, gan):
    """Every step moves the fake; every k-th moves the student first, and the critic then reuses its batch."""
    method = dmd2(fake_updates=every, gan_weight=gan)
    critic = ("fake", "disc") if gan else ("fake",)
    for step in range(11):
        plan = method.plan(step)
        if step % every:
            assert plan == (Update("critic", critic),)
        else:
            assert plan == (Update("student", ("student",)), Update("critic", critic, reuse=True))
    counts = updates_of(method, 11)
    assert counts["student"] == -(-11 // every)
    assert counts["fake"] == 11


def optim(m: Roles) -> dict[str, OptimRecipe]:
    return {name: OptimRecipe(1e-3) for name in m.trains}


@pytest.mark.parametrize("every", [1, 3])
def test_updates_of_a_real_run(every):
    method = dmd2(fake_updates=every)
    m, order = unet_roles(method), []
    counts = train(method, m, optim(m), 7, draws, lambda d: labelled(d, method), lambda step, update: order.append((step, update.loss)))
    assert counts == {"student": -(-7 // every), "fake": 7, "disc": 7}
    assert [step for step, loss in order if loss == "student"] == list(range(0, 7, every))
    assert [step for step, loss in order if loss == "critic"] == list(range(7))


def backward(method: DMD2, m: Roles, update: Update, step: int = 0, index: int = 0, before=()):
    return run_update(run_of(method, m, draws, lambda d: labelled(d, method)), step, index, update, before)


def grads(m: Roles, name: str) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in m.module(name).named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_gan_gradient_reaches_the_fakes_encoder():
    """In the critic's update the judge trains the fake's layers up to the tap, by design; nothing past it, and not the teacher."""
    plain, judged = dmd2(disc_weight=0.0), dmd2(disc_weight=1.0)
    m = unet_roles(plain)
    grads_of = []
    for method in (plain, judged):
        backward(method, m, method.plan(1)[0])
        grads_of.append({k: g.clone() for k, g in grads(m, "fake").items()})
        assert not grads(m, "teacher")
        assert not grads(m, "student")
        for name in m.names:
            m.module(name).zero_grad(set_to_none=True)
    for key, grad in grads_of[0].items():
        past = key.startswith(("up_blocks", "conv_out", "conv_norm_out"))
        same = torch.allclose(grad, grads_of[1][key], rtol=1e-3, atol=1e-6 * float(grad.abs().max()))
        assert same == past, key
    assert grads_of[1].keys() >= {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"}


def test_with_features_of_the_teacher_the_judge_trains_only_its_head():
    plain, judged = (dmd2(disc_weight=w, features="teacher") for w in (0.0, 1.0))
    m = unet_roles(plain)
    seen = []
    for method in (plain, judged):
        backward(method, m, method.plan(1)[0])
        seen.append(({k: g.clone() for k, g in grads(m, "fake").items()}, grads(m, "disc")))
        assert not grads(m, "teacher")
        assert not any(p.requires_grad for p in m.parameters("teacher"))
        for name in m.names:
            m.module(name).zero_grad(set_to_none=True)
    assert not seen[0][1]
    assert seen[1][1]
    for key, grad in seen[0][0].items():
        torch.testing.assert_close(grad, seen[1][0][key], rtol=0, atol=0)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_fooling_moves_the_student_alone(features):
    """The student's GAN term passes through the judge's features into x0 and leaves no gradient on the way."""
    none, some = dmd2(gan_weight=1e-12, features=features), dmd2(gan_weight=10.0, features=features)
    m = unet_roles(none)
    seen = []
    for method in (none, some):
        backward(method, m, method.plan(0)[0])
        seen.append({k: g.clone() for k, g in grads(m, "student").items()})
        for name in ("teacher", "fake", "disc"):
            assert all(p.grad is None for p in m.parameters(name))
        m.module("student").zero_grad(set_to_none=True)
    assert not torch.allclose(seen[0]["conv_in.weight"], seen[1]["conv_in.weight"], rtol=1e-2)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_guided_teacher_is_the_target(features):
    """The pull is towards the guided teacher; the judge of the critic reads it unguided."""
    method = dmd2(features=features)
    m = unet_roles(method, guidance=4.0)
    with Counted(m.teacher.network) as rows:
        batches, logs = backward(method, m, method.plan(0)[0])
        assert rows == [2 * COUNT]
        backward(method, m, method.plan(0)[1], index=1, before=batches)
        assert rows == [2 * COUNT] + ([2 * COUNT] if features == "teacher" else [])
    keyed, cond, x0 = draws(), batches[0]["main"].cond, batches[0].scratch["x0"]
    s = method.cfg.times.sample(keyed.each("s"))
    x_s = TABLE.add_noise(x0, keyed.each("eps").normal_like(x0), s)
    with torch.no_grad():
        gap = {w: (m.fake(x_s, s, cond).x0 - m.teacher(x_s, s, cond, w=w).x0).square().mean().sqrt() for w in (4.0, 1.0)}
    torch.testing.assert_close(logs["student/score_gap"].value, gap[4.0], rtol=1e-3, atol=1e-5)
    assert abs(float(gap[4.0] - gap[1.0])) > 1e-2 * float(gap[1.0])


@pytest.mark.parametrize("gan", [0.0, 1e-3])
def test_passes_of_a_step(gan):
    """A student step costs one call of each: the student, the teacher (a doubled batch), the fake. The critic then adds one of the fake."""
    method = dmd2(gan_weight=gan)
    m = unet_roles(method)
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher, Counted(m.fake.network) as fake:
        batches, _ = backward(method, m, method.plan(0)[0])
        assert (student, teacher, fake) == ([COUNT], [2 * COUNT], [COUNT])
        backward(method, m, method.plan(0)[1], index=1, before=batches)
        assert student == [COUNT]                                                                   # no new sample: the batch is reused
        assert teacher == [2 * COUNT]
        assert fake == [COUNT, 2 * COUNT if gan else COUNT]                                         # denoises one half, judges both
        backward(method, m, method.plan(1)[0], step=1)
        assert student == [COUNT, COUNT]                                                            # a fresh batch of its own
        assert fake[2:] == [2 * COUNT if gan else COUNT]


def test_critic_trains_on_the_very_sample_of_the_student_update():
    """Reused bitwise, though the student has moved in between; the fake's regression is to that sample."""
    method = dmd2(gan_weight=0, steps=4)
    m = unet_roles(method)
    batches, _ = backward(method, m, method.plan(0)[0])
    kept = batches[0].scratch["x0"].clone()
    assert not batches[0].scratch["x0"].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(kept, method.rollout(m, batches[0], draws(), grad=False), rtol=0, atol=0)
        for p in m.parameters("student"):
            p.add_(0.1)
    _, logs = backward(method, m, method.plan(0)[1], index=1, before=batches)
    keyed = draws(update=1)
    s, eps = method.cfg.fake_times.sample(keyed.each("fake/s")), keyed.each("fake/eps").normal_like(kept)
    with torch.no_grad():
        expected = denoising_loss(m.fake(TABLE.add_noise(kept, eps, s), s, batches[0]["main"].cond), kept, eps).mean()
    torch.testing.assert_close(logs["critic/denoise"].value, expected, rtol=1e-6, atol=0)


def test_critic_halves_are_not_swapped():
    """Denoising reads the sample's half; the judge pushes the sample down and the picture up."""
    method = dmd2(disc_weight=1.0)
    m = unet_roles(method)
    batch = labelled(draws(), method)
    loss = method.critic_loss(m, batch, draws())
    keyed, x0 = draws(), method.rollout(m, batch, draws(), grad=False)
    s, eps = method.cfg.fake_times.sample(keyed.each("fake/s")), keyed.each("fake/eps").normal_like(x0)
    r, real = method.cfg.fake_times.sample(keyed.each("real/s")), batch["real"]
    x_s, x_r = TABLE.add_noise(x0, eps, s), TABLE.add_noise(real.clean, keyed.each("real/eps").normal_like(real.clean), r)
    pred = m.fake(x_s, s, batch["main"].cond, tap=True)
    on_fake, on_real = m.disc(pred.features), m.disc(m.fake(x_r, r, real.cond, tap=True).features)
    denoise = denoising_loss(pred, x0, eps).mean()
    judge = torch.nn.functional.softplus(on_fake).mean() + torch.nn.functional.softplus(-on_real).mean()
    torch.testing.assert_close(loss.log["denoise"], denoise, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.log["judge"], judge, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.value, denoise + judge, rtol=1e-4, atol=1e-6)
    assert bool((s != r).all())                                                                     # times and noise of their own


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_approximate_r1_is_a_third_block_of_the_same_pass(features):
    """Without its weight nothing is asked and nothing changes; with it one pass judges sample, picture and moved picture, noised alike."""
    plain, moved, weighed = (dmd2(features=features, disc_weight=1.0, r1_weight=w, r1_sigma=s) for w, s in ((0, 1), (0, 9), (7, 0.3)))
    m = unet_roles(plain)
    batch, keyed = labelled(draws(), plain), draws()
    without = plain.critic_loss(m, batch, keyed)
    assert torch.equal(without.value, moved.critic_loss(m, batch, keyed).value)
    assert "r1" not in without.log
    with Counted(m.fake.network) as fake, Counted(m.teacher.network) as teacher:
        loss = weighed.critic_loss(m, batch, keyed)
    assert (fake, teacher) == (([3 * COUNT], []) if features == "fake" else ([COUNT], [3 * COUNT]))
    r, noise, x = plain.cfg.fake_times.sample(keyed.each("real/s")), keyed.each("real/eps"), batch["real"].clean
    net = m.fake if features == "fake" else m.teacher.plain
    pictures = (x, x + 0.3 * keyed.each("r1").normal_like(x))
    x_r = [TABLE.add_noise(p, noise.normal_like(p), r) for p in pictures]
    on_real, on_near = (m.disc(net(x, r, batch["real"].cond, tap=True).features) for x in x_r)
    torch.testing.assert_close(loss.log["r1"], (on_real - on_near).square().mean(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(loss.value, without.value + 7 * loss.log["r1"], rtol=1e-4, atol=1e-6)


def test_approximate_r1_flattens_the_discriminator():
    """Where it outweighs the rest, Adam steps of the head on one batch bring it down; its gradient reaches nothing but head and encoder."""
    method = dmd2(disc_weight=1.0, r1_weight=1e6, r1_sigma=0.3)
    m, batch = unet_roles(method), labelled(draws(), method)
    m.train_only(("disc", "fake"))
    optimizer = torch.optim.Adam(m.parameters("disc"), 1e-3)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = method.critic_loss(m, batch, draws())
        loss.value.backward()
        optimizer.step()
        values.append(float(loss.log["r1"].detach()))
    assert values[-1] < 0.2 * values[0]
    assert not grads(m, "teacher")
    assert not grads(m, "student")


def four_steps(**options) -> tuple[DMD2, Roles]:
    method = dmd2(steps=4, gan_weight=0, **options)
    return method, unet_roles(method)


def test_grid_of_the_paper():
    """Four steps of a 1000-step table are indices 999, 749, 499, 249; at 1 the input is pure noise."""
    method = dmd2(steps=4)
    assert method.sampler().times == trailing(4) == (1.0, 0.75, 0.5, 0.25)
    assert [round(t * 1000) - 1 for t in method.sampler().times] == [999, 749, 499, 249]
    assert method.sampler().renoise == 1.0
    assert dmd2(steps=2, times=(1.0, 0.4)).sampler().times == (1.0, 0.4)


def test_rollout_walks_the_path_of_inference():
    """T6, bitwise: with the same keys, the state of training's call n and its x0 are those of the sampler at inference."""
    method, m = four_steps()
    batch = labelled(draws(), method)
    cond, seeds = batch["main"].cond, {int(draws(seed=seed).shared("call").integers(4)): seed for seed in range(40)}
    assert set(seeds) == {0, 1, 2, 3}
    for last, seed in seeds.items():
        keyed = draws(seed=seed)
        x = start(method.process, method.sampler(), keyed.each("start").normal(1, 8, 8))
        with torch.no_grad():
            walk = list(steps(m.student, x, method.sampler(), cond, keyed))
            x0 = method.rollout(m, batch, keyed, grad=False)
        assert torch.equal(x0, walk[last].x0)
        final = sample(m.student, method.sampler(), cond, keyed, (1, 8, 8))
        assert torch.equal(walk[3].x0, final)


@pytest.mark.parametrize("count", [1, 4])
def test_a_bounded_student_is_bounded_in_training_too(count):
    """Teacher, fake and judge see the clamped x0, and what lies beyond the bound feels no pull."""
    method = dmd2(gan_weight=0, steps=count, clip_x0=0.5)
    m = unet_roles(method)
    m.train_only(("student",))
    x0 = method.rollout(m, labelled(draws(), method), draws(), grad=True)
    beyond = x0.detach().abs() == 0.5
    assert x0.detach().abs().max() == 0.5
    assert 0 < int(beyond.sum()) < beyond.numel()
    x0[beyond].sum().backward(retain_graph=True)
    assert not grads(m, "student")
    x0[~beyond].sum().backward()
    assert grads(m, "student")


def test_only_the_last_call_keeps_its_gradient():
    method, m = four_steps()
    m.train_only(("student",))
    for seed in range(4):
        keyed = draws(seed=seed)
        with Counted(m.student.network) as rows:
            x0 = method.rollout(m, labelled(keyed, method), keyed, grad=True)
        assert len(rows) == 1 + int(keyed.shared("call").integers(4))                              # and none after it
        nodes, stack = set(), [x0.grad_fn]
        while stack:
            node = stack.pop()
            if node not in nodes:
                nodes.add(node)
                stack += [n for n, _ in node.next_functions if n is not None]
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in m.student.network.modules())
        assert sum("Convolution" in node.name() for node in nodes) == convolutions                 # one call's worth of graph
    with torch.no_grad():
        assert not method.rollout(m, labelled(draws(), method), draws(), grad=False).requires_grad


def test_the_call_is_the_same_for_every_sample_and_process():
    """Two processes hold different samples of one step; both train the same call."""
    halves = [Draws(0, range(first, first + 2), step) for step in range(20) for first in (0, 2)]
    calls = [int(d.shared("call").integers(4)) for d in halves]
    assert calls[::2] == calls[1::2]
    assert set(calls) == {0, 1, 2, 3}
    method, m = four_steps()
    keyed, batch = draws(seed=3), labelled(draws(seed=3), method)
    with torch.no_grad():
        whole = method.rollout(m, batch, keyed, grad=False)
        for first in (0, 2):
            part = Batch({"main": Sample(batch["main"].cond.slice(slice(first, first + 2)))})
            torch.testing.assert_close(method.rollout(m, part, Draws(3, range(first, first + 2)), grad=False), whole[first : first + 2],
                                       rtol=1e-4, atol=1e-4)


def test_backward_simulation_differs_from_noised_pictures_of_a_wrong_student():
    """T6: the input of call 2 is the student's own noised sample. With a student whose law is N(.2, .9²) that is not the data's."""
    method = dmd2(process=Flow(), shape=(), steps=2, gan_weight=0)
    student, _ = gaussian_student(0.2, 0.9)
    spec, keyed = method.sampler(), Draws(0, range(4000))
    z = keyed.each("start").normal()
    inputs = [step.pred.x_t for step in steps(student, start(Flow(), spec, z), spec, Conditioning(), keyed)]
    assert torch.equal(inputs[0], z)
    moments = float(inputs[1].mean()), float(inputs[1].std())
    assert moments == pytest.approx((0.5 * 0.2, 0.5 * (0.81 + 1) ** 0.5), abs=0.03)
    assert abs(moments[0] - 0.5 * 1.3) > 0.3


def test_data_free_without_the_gan():
    """No picture is asked for: a stream of conditions is enough, and no discriminator is built."""
    method = dmd2(gan_weight=0)
    m = unet_roles(method)
    assert "disc" not in m.names
    assert set(labelled(draws(), method)) == {"main"}
    batches: list[Batch] = []
    for index, update in enumerate(method.plan(0)):
        batches, logs = backward(method, m, update, index=index, before=batches)
        assert all(bool(torch.isfinite(v.total)) for v in logs.values())


def test_works_through_roles_with_an_exact_teacher():
    """The closed-form teacher behind the same seam: the pull of a teacher-initialised student starts at the fake's error, not at zero."""
    teacher = Oracle(GaussianTeacher(Flow(), "flow")).denoiser()
    method = dmd2(process=Flow(), shape=(2,), gan_weight=0)
    torch.manual_seed(0)
    m = toy_roles(method.needs(method.cfg), teacher, Denoiser(Mlp(2, 16), Flow(), "flow", clock="t"))
    m.train_only(("student",))
    loss = method.student_loss(m, Batch({"main": Sample(Conditioning())}), draws())
    loss.value.backward()
    assert float(loss.log["score_gap"]) > 0.1
    assert any(bool(p.grad.any()) for p in m.parameters("student"))


@pytest.mark.parametrize(("options", "message"), [
    ({"fake_updates": 0}, "fake_updates must be at least 1, got 0"),
    ({"gan_weight": -1.0}, "cannot be negative"),
    ({"disc_weight": -1.0}, "cannot be negative"),
    ({"r1_weight": -1.0}, "r1_weight cannot be negative"),
    ({"r1_sigma": 0.0}, "r1_sigma must be positive"),
    ({"fake_times": Uniform(0.1, 1.0)}, "must hold the range of method.times"),
    ({"fake_times": Uniform(0.001, 0.9)}, "must hold the range of method.times"),
    ({"fake_times": Uniform(0.02, 0.98, shift=5.0)}, "must hold the range of method.times"),        # the shifted ends count
])
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMD2Config(**options)


def test_configurations_that_are_not():
    DMD2Config(fake_times=Uniform(0.02, 0.98))
    DMD2Config(times=Uniform(0.3, 0.98, shift=3.0), fake_times=Uniform(0.5, 1.0))                   # .3 shifts to .56
