"""The surrogate of score-difference gradients, against the reverse KL between Gaussians (distribution matching S.5, T2, T3)."""

import pytest
import torch
from oracles import PROCESSES, GaussianTeacher, f64

from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.process import like
from stepdistill.losses.matching import dmd_scale, matching_loss


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, x)[0]


def test_gradient_is_g_over_numel():
    x0, real, fake = randn(4, 3, 2).requires_grad_(), randn(4, 3, 2, seed=1), randn(4, 3, 2, seed=2)
    scale = f64([0.5, 2.0, 0.0, 7.0])
    g = like(scale, x0) * (fake - real)
    loss = matching_loss(x0, toward=real, away_from=fake, scale=scale)
    torch.testing.assert_close(gradient(loss, x0), g / x0.numel(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, 0.5 * g.square().mean())


def test_default_scale_is_that_of_dmd():
    x0, real, fake = randn(4, 3, 2).requires_grad_(), randn(4, 3, 2, seed=1), randn(4, 3, 2, seed=2)
    scale = 1 / (x0.detach() - real).abs().mean(dim=(1, 2))
    torch.testing.assert_close(dmd_scale(x0, real), scale)
    expected = like(scale, x0) * (fake - real) / x0.numel()
    torch.testing.assert_close(gradient(matching_loss(x0, real, fake), x0), expected, rtol=1e-12, atol=1e-14)


def test_normaliser_is_per_sample():
    """Scaling one sample's problem changes neither its own step's size nor any other sample."""
    x0, real, fake = randn(4, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
    factor = f64([1.0, 100.0, 1.0, 1.0])[:, None]
    grads = []
    for by in (torch.ones_like(factor), factor):
        x = (by * x0).requires_grad_()
        grads.append(gradient(matching_loss(x, by * real, by * fake), x))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_normaliser_is_floored():
    x0 = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    scale = dmd_scale(x0.detach(), torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(scale, f64([1e5, 1e5]))
    loss = matching_loss(x0, toward=torch.zeros_like(x0), away_from=torch.zeros_like(x0))         # T3: equal scores on top of x0
    assert float(loss.detach()) == 0
    assert not gradient(loss, x0).any()
    torch.testing.assert_close(dmd_scale(x0.detach(), torch.full_like(x0, 0.01), floor=0.05), f64([20.0, 20.0]))


def test_nothing_flows_into_the_scores():
    x0, real, fake = (randn(2, 3, seed=i).requires_grad_() for i in range(3))
    matching_loss(x0, toward=real, away_from=fake).backward()
    assert x0.grad is not None
    assert real.grad is None
    assert fake.grad is None


def test_half_precision_differences_are_refused():
    x0, real = torch.zeros(2, 3), torch.ones(2, 3)
    for toward, away in ((real.bfloat16(), real.bfloat16()), (real.half(), real.half()), (real, real.bfloat16()), (real, real.double())):
        with pytest.raises(ValueError, match="float32"):
            matching_loss(x0, toward, away)
    half = x0.bfloat16().requires_grad_()                                                          # a half x0 is lifted, gradients and all
    loss = matching_loss(half, real, 3 * real)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(gradient(loss, half), torch.full_like(half, 2 / 6))


def test_expectation_is_the_gradient_of_the_kl():
    """T2's golden values at alpha .6, sigma .8: teacher N(0, 1); a student N(.5, 1) has dKL/dmu .18, a student N(0, .5²) has -.0666."""
    process, count = PROCESSES["trig"], 400_000
    t = process.time_of(2 * f64(0.6 / 0.8).log())
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close((alpha, sigma), (f64(0.6), f64(0.8)))
    teacher = GaussianTeacher(process, "eps", f64(0.0), f64(1.0))
    z, eps = randn(count, 1, seed=3), randn(count, 1, seed=4)
    z, eps = (torch.cat([v, -v]) for v in (z, eps))                                                # antithetic: odd moments vanish
    for mean, std, which, golden in ((0.5, 1.0, "mean", 0.18), (0.0, 0.5, "std", -0.0666)):
        mu, sd = f64(mean).requires_grad_(), f64(std).requires_grad_()
        fake = GaussianTeacher(process, "v", f64(mean), f64(std))
        x0 = mu + sd * z
        x_t = process.add_noise(x0.detach(), eps, t)
        loss = matching_loss(x0, teacher(x_t, t).x0, fake(x_t, t).x0, scale=(alpha / sigma).square().expand(len(x0)))
        by_mean, by_std = torch.autograd.grad(loss, (mu, sd))
        got = by_mean if which == "mean" else by_std
        variance_t, variance_s = alpha**2 + sigma**2, (alpha * std) ** 2 + sigma**2
        exact = alpha**2 * mean / variance_t if which == "mean" else alpha**2 * std * (1 / variance_t - 1 / variance_s)
        assert float(exact) == pytest.approx(golden, abs=1e-4)
        assert float(got) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0", "edm"])
def test_fixed_point_is_still(process, kind):
    """T3: a fake score that agrees with the teacher moves nothing, in any process, though each speaks its own space."""
    x0, t = randn(5, 3).requires_grad_(), f64([0.02, 0.3, 0.5, 0.8, 0.98])
    x_t = process.add_noise(x0.detach(), randn(5, 3, seed=1), t)
    real, fake = (GaussianTeacher(process, k)(x_t, t).x0 for k in ("v", kind))
    grad = gradient(matching_loss(x0, real, fake), x0)
    assert float(grad.abs().max()) < 1e-8
    on_top = from_x0(real, x_t, process.alpha(t), process.sigma(t)).x0.detach().requires_grad_()   # the floor's worst case: x0 is real
    assert torch.isfinite(gradient(matching_loss(on_top, real, fake), on_top)).all()
