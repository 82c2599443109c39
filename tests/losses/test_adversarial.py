"""Adversarial losses: gradients in closed form, and the optimal discriminator between Gaussians (T13)."""

import pytest
import torch
from oracles import GaussianTeacher, f64

from stepdistill.diffusion.process import Trig
from stepdistill.losses.adversarial import (
    GAMES,
    approximate_r1,
    discriminator_loss,
    feature_r1,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    linear_generator_loss,
)


def test_values():
    zero = torch.zeros(4)
    assert float(generator_loss(zero)) == pytest.approx(0.693147, abs=1e-6)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * 0.693147, abs=1e-6)
    assert float(discriminator_loss(real=torch.full((4,), 50.0), fake=torch.full((4,), -50.0))) == pytest.approx(0, abs=1e-6)
    assert float(discriminator_loss(real=torch.full((4,), -50.0), fake=torch.full((4,), 50.0))) == pytest.approx(100, abs=1e-3)


def test_generator_gradient_is_minus_the_sigmoid():
    """The gradient of softplus(-d) is -sigmoid(-d)·grad d: only the form -d would give the bare log ratio."""
    d = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    generator_loss(d).backward()
    torch.testing.assert_close(d.grad, -torch.sigmoid(-d.detach()) / 11)


def test_discriminator_gradient():
    real, fake = (torch.linspace(-3, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    discriminator_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, -torch.sigmoid(-real.detach()) / 5)
    torch.testing.assert_close(fake.grad, torch.sigmoid(fake.detach()) / 5)


def test_optimal_discriminator_is_the_log_ratio():
    """T13: the loss' minimiser between p_real = N(1.3, .6²) and p_fake = N(.5, 1) noised to t is their log ratio, and its gradient
    in x the difference of their scores. A logit quadratic in x holds the optimum; Newton finds it from samples."""
    process, t = Trig(), f64(0.5)
    real, fake = GaussianTeacher(process), GaussianTeacher(process, mean=f64(0.5), std=f64(1.0))
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    samples = [process.add_noise(p.data(count, generator), torch.randn(count, generator=generator, dtype=torch.float64), t)
               for p in (real, fake)]
    basis = [torch.stack([torch.ones_like(x), x, x * x], dim=1) for x in samples]
    weights = torch.zeros(3, dtype=torch.float64)
    for _ in range(12):
        weights.requires_grad_()
        loss = discriminator_loss(basis[0] @ weights, basis[1] @ weights)
        grad = torch.autograd.grad(loss, weights)[0]
        slopes = [torch.sigmoid(b @ weights.detach()) for b in basis]
        hessian = sum(b.T @ (b * (p * (1 - p))[:, None]) / count for b, p in zip(basis, slopes, strict=True))
        weights = weights.detach() - torch.linalg.solve(hessian, grad)
    assert float(grad.abs().max()) < 1e-10
    x = torch.linspace(-0.5, 2, 21, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    law = lambda p: torch.distributions.Normal(alpha * p.mean, ((alpha * p.std) ** 2 + sigma**2).sqrt())     # noqa: E731
    ratio = law(real).log_prob(x) - law(fake).log_prob(x)
    logit, slope = weights[0] + weights[1] * x + weights[2] * x * x, weights[1] + 2 * weights[2] * x
    scores = (real(x, t).score - fake(x, t).score)
    assert float((logit - ratio).abs().max()) < 0.02 * float(ratio.abs().max())
    assert float((slope - scores).abs().max()) < 0.02 * float(scores.abs().max())


def test_hinge():
    """2 where nothing can be told apart, 0 beyond the margin on both sides; the generator's is flat once the margin is reached."""
    zero, d = torch.zeros(4), torch.tensor([-3.0, -1.0, 0.5, 2.0], requires_grad=True)
    assert float(hinge_discriminator_loss(zero, zero)) == 2
    assert float(hinge_discriminator_loss(real=zero + 1.5, fake=zero - 1.5)) == 0
    assert float(hinge_discriminator_loss(real=zero - 1.5, fake=zero + 1.5)) == 5
    hinge_generator_loss(d).backward()
    torch.testing.assert_close(d.grad, torch.tensor([-0.25, -0.25, -0.25, 0.0]))


def test_linear_generator_pulls_evenly():
    d = torch.tensor([-3.0, 0.5, 4.0], requires_grad=True)
    assert float(linear_generator_loss(torch.full((4,), 2.0))) == -2
    linear_generator_loss(d).backward()
    torch.testing.assert_close(d.grad, torch.full((3,), -1 / 3))


def test_games_pull_apart():
    """Of both: the generator raises the logit of fakes, the discriminator lowers it and raises that of reals."""
    for game in GAMES.values():
        real, fake = (torch.zeros(3, requires_grad=True) for _ in range(2))
        game.discriminator(real, fake).backward()
        assert bool((real.grad < 0).all())
        assert bool((fake.grad > 0).all())
        fake.grad = None
        game.generator(fake).backward()
        assert bool((fake.grad < 0).all())


def test_approximate_r1_is_the_squared_gradient():
    """For d = w·x it is sigma²|w|² in the mean, and its gradient in w is that of the penalty: 2·sigma²·w, neither logit held."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    x, n = (torch.randn(200_000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    value = approximate_r1(x @ w, (x + 0.1 * n) @ w)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.01 * float(w.detach().square().sum()), rel=0.02)
    torch.testing.assert_close(w.grad, 0.02 * w.detach(), rtol=0.03, atol=2e-4)


def test_feature_r1_is_exact():
    """d = a·f² + w·g per sample: mean |(2·a·f, w)|², differentiable in a and w; rows beyond the reals count for nothing."""
    a, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, [1.0, -2.0]))
    f, g = torch.arange(5.0, dtype=torch.float64)[:, None].requires_grad_(), torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    value = feature_r1((a * f[:, 0] ** 2 + g @ w)[2:], [f, g])
    torch.testing.assert_close(value, (4 * a**2 * (4 + 9 + 16) / 3 + w.square().sum()).detach())
    value.backward()
    torch.testing.assert_close(a.grad, 8 * a.detach() * 29 / 3)
    torch.testing.assert_close(w.grad, 2 * w.detach())
