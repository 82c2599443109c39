"""Adversarial losses: gradients in closed form, and the optimal discriminator between Gaussians (T13)."""

import pytest
import torch
from oracles import GaussianTeacher, f64

from stepdistill.diffusion.process import Trig
from stepdistill.losses.adversarial import discriminator_loss, generator_loss, hinge_discriminator_loss, hinge_generator_loss


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
