"""Guidance: null + w·(cond - null), linear in every space, and free at w = 1 (T12)."""

import pytest
import torch
from oracles import KINDS, PROCESSES, MixtureTeacher, f64
from toys import Counted, Oracle, tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import TableVP
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.guidance import Band, guide

X = torch.linspace(-3, 3, 6, dtype=torch.float64)
T = f64([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
COND = Conditioning({"class_labels": torch.tensor([0, 1, 0, 1, 0, 1])}, {"class_labels": torch.full((6,), 2)})
SPACES = ("x0", "eps", "v", "flow", "edm")


def unet() -> Denoiser:
    return Denoiser(tiny_unet(), TableVP.scaled_linear(), "eps", taps=("mid_block",))


def call(net: Denoiser, w, tap: bool = False, count: int = 4) -> Prediction:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Conditioning({"class_labels": torch.arange(count) % 3}, {"class_labels": torch.full((count,), 3)})
    return net(x, f64([0.2, 0.4, 0.6, 0.8])[:count], cond, w=w, tap=tap)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_linear_in_every_space(process, kind):
    teacher = MixtureTeacher(process, kind)
    cond, null = teacher(X, T, COND), teacher(X, T, COND.null)
    guided = guide(cond, null, 3.0)
    for space in SPACES:
        expected = null.to(space) + 3.0 * (cond.to(space) - null.to(space))
        torch.testing.assert_close(guided.to(space), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided.x0, teacher(X, T, COND, w=3.0).x0, rtol=1e-9, atol=1e-9)


def test_the_convention():
    """w = 1 is the conditional prediction, 0 the null, and c + g·(c - n) is w = 1 + g."""
    teacher = MixtureTeacher(PROCESSES["flow"], "flow")
    cond, null = teacher(X, T, COND), teacher(X, T, COND.null)
    torch.testing.assert_close(guide(cond, null, 1.0).raw, cond.raw)
    torch.testing.assert_close(guide(cond, null, 0.0).raw, null.raw)
    torch.testing.assert_close(guide(cond, null, 4.0).raw, cond.raw + 3.0 * (cond.raw - null.raw))


def test_one_w_per_sample():
    teacher = MixtureTeacher(PROCESSES["trig"], "v")
    cond, null = teacher(X, T, COND), teacher(X, T, COND.null)
    w = f64([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    got = guide(cond, null, w)
    for i in range(6):
        torch.testing.assert_close(got.x0[i], guide(cond, null, float(w[i])).x0[i])


def test_denoiser_doubles_its_batch_once():
    net = Denoiser(Oracle(MixtureTeacher(PROCESSES["flow"], "flow"), torch.float64), PROCESSES["flow"], "flow", clock="t")
    with Counted(net.network) as rows:
        torch.testing.assert_close(net(X, T, COND, w=3.0).x0, net.network.teacher(X, T, COND, w=3.0).x0)
    assert rows == [12]


@pytest.mark.parametrize(("w", "rows"), [(None, [4]), (1, [4]), (1.0, [4]), (2.0, [8]), (0.0, [4]), (torch.ones(4), [8])])
def test_calls(w, rows):
    """One pass of the plain batch at w = 1 and of its null condition at 0, one of a doubled batch otherwise."""
    net = unet()
    with Counted(net.network) as calls:
        call(net, w)
    assert calls == rows


def test_default_guidance_and_plain():
    net = unet()
    guided = Denoiser(net.network, net.process, "eps", guidance=2.0)
    torch.testing.assert_close(call(guided, None).raw, call(net, 2.0).raw)
    torch.testing.assert_close(call(guided, 1.0).raw, call(net, None).raw)
    torch.testing.assert_close(call(guided.plain, None).raw, call(net, None).raw)
    assert guided.plain.network is net.network
    assert not torch.allclose(call(guided, None).raw, call(net, None).raw)
    assert guided.copy().guidance == 1.0


def test_guided_by_a_network_equals_two_calls():
    net = unet()
    for w in (3.0, torch.tensor([0.0, 1.0, 2.5, 7.0])):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        t, labels, null = f64([0.2, 0.4, 0.6, 0.8]), torch.arange(4) % 3, torch.full((4,), 3)
        cond, uncond = (net(x, t, Conditioning({"class_labels": c})).x0 for c in (labels, null))
        scale = w if isinstance(w, float) else w[:, None, None, None]
        torch.testing.assert_close(call(net, w).x0, uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_features_are_those_of_the_conditional_half():
    net = unet()
    plain, guided = call(net, 1.0, tap=True), call(net, 4.0, tap=True)
    assert [f.shape for f in guided.features] == [(4, 16, 4, 4)]
    torch.testing.assert_close(guided.features, plain.features, rtol=1e-4, atol=1e-5)
    assert call(net, 1.0).features == ()
    assert not net.network.mid_block._forward_hooks


def test_guidance_without_a_null():
    with pytest.raises(ValueError, match="needs a null condition"):
        unet()(torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)}), w=2.0)


def test_band():
    w = Band(4.0, 16.0).sample(Draws(0, range(2000)).each("w"))
    assert w.shape == (2000,)
    assert 4 <= float(w.min()) < 4.1
    assert 15.9 < float(w.max()) <= 16
    assert float(w.mean()) == pytest.approx(10, abs=0.4)
    assert torch.equal(Band(3.0, 3.0).sample(Draws(0, range(2)).each("w")), f64([3.0, 3.0]))
    with pytest.raises(ValueError, match="low <= high"):
        Band(3.0, 2.0)
