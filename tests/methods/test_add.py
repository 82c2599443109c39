"""ADD: the distillation target of the student's own sample, the signs of the game, the penalty on features, and who stays frozen."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from oracles import GaussianTeacher, f64
from small import COUNT, TABLE, AffineStudent, keyed, labelled, student_gradient, unet_roles
from tiny import tiny_recipe, tiny_run
from toys import Counted, distil, draw_student, modes_covered, pretrained, ring, run_of, sliced_wasserstein, train

from stepdistill.diffusion.process import Flow, like
from stepdistill.diffusion.sampler import SamplerSpec, data_call
from stepdistill.diffusion.times import trailing
from stepdistill.losses.adversarial import hinge_discriminator_loss
from stepdistill.methods.add import ADD, ADDConfig
from stepdistill.methods.base import Setup, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.recipe import OptimRecipe
from stepdistill.training.assemble import run_update

ON_PICTURES = (1, 8, 8)


def add(steps: int = 1, process=TABLE, shape=ON_PICTURES, decode=lambda x0: x0, **options) -> ADD:
    return ADD(ADDConfig(**options), Setup(process, shape, SamplerSpec(trailing(steps)), decode))


def exact(method: ADD, law: tuple[float, float], mean: float = 1.3, std: float = 0.6) -> SimpleNamespace:
    """An affine student, an exact Gaussian teacher, and a judge that likes nothing more than anything else."""
    teacher = GaussianTeacher(method.process, "flow", f64(mean), f64(std))
    return SimpleNamespace(student=AffineStudent(method.process, *law), teacher=teacher,
                           features=lambda pictures: (pictures,), disc=lambda features: 0 * features[0].flatten(1).sum(1))


def test_the_target_is_the_teacher_at_the_renoised_sample():
    """alpha_t·|x0 - T(alpha_t·x0 + sigma_t·eps)|², the target held: its gradient at x0 is 2·weight·alpha_t·(x0 - T)/numel."""
    method = add(process=Flow(), shape=(3,))
    m, batch = exact(method, (0.2, 0.9)), labelled(keyed(), method)
    loss = method.student_loss(m, batch, keyed())
    (found,) = torch.autograd.grad(loss.value, m.student.weights)
    z, t = keyed().each("start").normal(3).double(), method.cfg.times.sample(keyed().each("t"))
    x0 = 0.2 + 0.9 * z
    x_t = Flow().add_noise(x0, keyed().each("eps").normal_like(x0), t)
    assert torch.equal(m.teacher.calls[0], t)
    gap = x0 - m.teacher(x_t, t).x0
    torch.testing.assert_close(loss.log["distill"].detach(), (Flow().alpha(t) * gap.square().mean(1)).mean())
    g = 2 * 2.5 * like(Flow().alpha(t), gap) * gap / gap.numel()
    torch.testing.assert_close(found, torch.stack([g.sum(), (g * z).sum()]))


@pytest.mark.parametrize("mean", [1.3, -0.4])
def test_no_pull_at_a_fixed_point_of_the_teacher(mean):
    """A teacher of one picture leaves it as it is, at every t; a student elsewhere is pulled towards it."""
    method = add(process=Flow(), shape=(3,))
    for weight, rests in (((mean, 0.0), True), ((mean + 0.5, 0.0), False)):
        m = exact(method, weight, mean, 0.0)
        (found,) = torch.autograd.grad(method.student_loss(m, labelled(keyed(), method), keyed()).value, m.student.weights)
        assert (float(found.abs().max()) < 1e-12) == rests
        assert rests or float(found[0]) > 0.1


def test_the_guided_teacher_is_asked_once_and_the_student_called_on_its_grid():
    method = add(steps=4)
    m, batch = unet_roles(method, guidance=3.0), labelled(keyed(), method)
    with Counted(m.student.network) as student, Counted(m.teacher.network) as teacher:
        loss = method.student_loss(m, batch, keyed())
        assert (student, teacher) == ([COUNT], [2 * COUNT])
        method.disc_loss(m, batch, keyed(update=1))
        assert (student, teacher) == ([COUNT], [2 * COUNT])
    with torch.no_grad():
        x0 = data_call(m.student, method.sampler(), batch["real"].clean, batch["real"].cond, keyed(), (1.0,) * 4).x0
        torch.testing.assert_close(batch.scratch["x0"], x0)
        t = method.cfg.times.sample(keyed().each("t"))
        target = m.teacher(TABLE.add_noise(x0, keyed().each("eps").normal_like(x0), t), t, batch["real"].cond, w=3.0).x0
        expected = (TABLE.alpha(t) * (x0 - target).square().flatten(1).mean(1)).mean()
        torch.testing.assert_close(loss.log["distill"].double(), expected, rtol=1e-3, atol=1e-5)
        fool = -m.disc(m.features(x0)).mean()
    torch.testing.assert_close(loss.value.detach(), fool + 2.5 * loss.log["distill"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("r1", [0.0, 0.3])
def test_the_discriminators_loss_by_hand(r1):
    """Real up, fake down by hinge, and the squared gradient of the real logits by the features, which are leaves."""
    method = add(r1_weight=r1)
    m, batch = unet_roles(method), labelled(keyed(), method)
    batch.scratch["x0"] = 0.5 * torch.randn(COUNT, *ON_PICTURES, generator=torch.Generator().manual_seed(1))
    m.train_only(("disc",))
    loss = method.disc_loss(m, batch, keyed())
    fake, real = (m.features(x) for x in (batch.scratch["x0"], batch["real"].clean))
    leaves = [f.requires_grad_() for f in real]
    on_real, on_fake = m.disc(leaves), m.disc(fake)
    slopes = torch.autograd.grad(on_real.sum(), leaves, create_graph=True)
    penalty = sum(slope.square().sum() for slope in slopes) / COUNT
    expected = hinge_discriminator_loss(on_real, on_fake) + r1 * penalty
    torch.testing.assert_close(loss.value, expected, rtol=1e-3, atol=1e-5)
    assert ("r1" in loss.log) == bool(r1)
    found, wanted = (torch.autograd.grad(v, m.parameters("disc"), allow_unused=True) for v in (loss.value, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * float(b.abs().max()) + 1e-6)


def test_roles_streams_and_plan():
    assert set(ADD.needs(ADDConfig())) == {"teacher", "student", "features", "disc"}
    assert set(ADD.needs(ADDConfig(distill_weight=0))) == {"student", "features", "disc"}
    assert ADD.needs(ADDConfig())["features"].of == "fashion"
    assert add().plan(3) == (Update("student", ("student",)), Update("disc", ("disc",), reuse=True))
    assert add(4).sampler().renoise == 1


def test_the_network_over_pictures_is_frozen_and_never_trains():
    """Through a real run: no gradient, no train mode, not one bit, its running statistics included; student and head move."""
    method = add()
    m = unet_roles(method)
    modes = []
    m.features.network.register_forward_pre_hook(lambda module, args: modes.append(any(part.training for part in module.modules())))
    before = {name: [v.clone() for v in m.module(name).state_dict().values()] for name in m.names}
    train(method, m, {name: OptimRecipe(1e-3) for name in m.trains}, 3, keyed, partial(labelled, method=method))
    assert modes == [False] * 6
    for name in m.names:
        same = all(torch.equal(a, b) for a, b in zip(before[name], m.module(name).state_dict().values(), strict=True))
        assert same == (name in ("teacher", "features"))
    assert all(p.grad is None for p in m.parameters("features"))
    run, batches = run_of(method, m, keyed, partial(labelled, method=method)), []
    for index, update in enumerate(method.plan(0)):
        batches, _ = run_update(run, 0, index, update, batches)
        moved = {name for name in m.names if any(p.grad is not None and bool(p.grad.any()) for p in m.parameters(name))}
        assert moved == set(update.trains)
        for name in m.names:
            m.module(name).zero_grad(set_to_none=True)


def test_pictures_are_decoded_with_their_gradient():
    """States of four channels are judged as pictures twice as large: another decoder, another gradient."""
    found = []
    for gain in (1.0, 0.3):
        method = add(shape=(1, 8, 8), decode=lambda x0, gain=gain: torch.nn.functional.pixel_shuffle(gain * x0.repeat(1, 4, 1, 1), 2),
                     distill_weight=0)
        m = unet_roles(method)
        with Counted(m.features) as rows:
            found.append(student_gradient(method, m, keyed()))
        assert rows == [COUNT]
    assert float(found[0].norm()) > 0
    assert not torch.allclose(found[0], found[1], rtol=0.1)


def test_pipelines_with_prompts_are_refused():
    with pytest.raises(ValueError, match=r"no gradient passes through the decoder.*take ladd"):
        add(decode=None)


def test_a_run_of_a_folded_teacher(tmp_path):
    """Its codec is the decoder; a checkpoint holds neither the teacher nor the network over pictures; a path becomes absolute."""
    run = tiny_run(tmp_path, "add")
    x0 = torch.randn(2, *run.teacher.shape)
    torch.testing.assert_close(run.method.decode(x0), run.teacher.codec.decode(x0))
    assert run.roles.features(run.method.decode(x0))[0].shape == (2, 16, 28, 28)
    assert {name.split("/")[1] for name in run.tensors() if name.startswith("role/")} == {"student", "disc"}
    assert ADDConfig(features="dino").features == str((tmp_path.cwd() / "dino").absolute())
    assert tiny_recipe(tmp_path, "add").method["features"] == "fashion"


@pytest.mark.parametrize("options", [{"distill_weight": -1.0}, {"r1_weight": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ADDConfig(**options)


class Seen(torch.nn.Module):
    """The last hidden layer of a network that was taught a velocity, at points (B, D) that are hardly noised: one token each."""

    def __init__(self, taught: Denoiser):
        super().__init__()
        self.network, self.taught = taught.network, taught

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.taught(x, f64([0.1]).expand(len(x)), Conditioning(), tap=True).features


@pytest.mark.judges("add")
def test_on_the_ring():
    """No card gives a figure: 200 updates reach SW2 .10, 72 % near a mode. Untrained: .97."""
    teacher = ring()
    begin = pretrained(teacher, 128, 600, batch=256)
    method = add(process=Flow(), shape=(2,))
    optim = {"student": OptimRecipe(5e-4, betas=(0.0, 0.99), schedule="linear", decay_from=0.5),
             "disc": OptimRecipe(1e-3, betas=(0.0, 0.99))}
    x = draw_student(distil(method, teacher, begin, optim, 200, 256, judge=Seen(begin.copy())).student, method, 8192, (2,))
    modes, near = modes_covered(x, teacher)
    assert modes == 8
    assert near > 0.5
    assert sliced_wasserstein(x, teacher.data(8192, torch.Generator().manual_seed(5))) < 0.2
