"""Distances and the denoising loss: limits, precision, and the weights between spaces (distribution matching S.2)."""

import pytest
import torch
from oracles import KINDS, PROCESSES, f64

from stepdistill.diffusion import weighting
from stepdistill.diffusion.prediction import from_x0, target
from stepdistill.diffusion.process import Flow, LinearVP, Trig
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.distance import l2, pseudo_huber, pseudo_huber_norm

T = f64([0.05, 0.3, 0.5, 0.8, 0.97])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(process):
    """(prediction that is off by d in x0, x0, eps, |d|² per sample)."""
    x0, eps, d = randn(5, 3, 4), randn(5, 3, 4, seed=1), 0.1 * randn(5, 3, 4, seed=2)
    pred = from_x0(x0 + d, process.add_noise(x0, eps, T), process.alpha(T), process.sigma(T))
    return pred, x0, eps, d.square().mean(dim=(1, 2))


def test_l2():
    torch.testing.assert_close(l2(f64([[1.0, 2.0], [0.0, 0.0]]), f64([[0.0, 0.0], [3.0, 0.0]])), f64([2.5, 4.5]))


def test_pseudo_huber_limits():
    a, b = randn(6, 4, 2), randn(6, 4, 2, seed=1)
    torch.testing.assert_close(pseudo_huber(a, b, 1e4) * 2e4, l2(a, b), rtol=1e-6, atol=0)          # large c: l2/(2c)
    torch.testing.assert_close(pseudo_huber(a, b, 1e-9), (a - b).abs().mean(dim=(1, 2)), rtol=1e-6, atol=1e-8)       # small c: l1
    torch.testing.assert_close(pseudo_huber(f64([[3e-3]]), f64([[0.0]])), f64([(9 + 1) ** 0.5 - 1]) * 1e-3)
    assert not pseudo_huber(a, a).any()


def test_pseudo_huber_norm_limits():
    a, b = randn(6, 4, 2), randn(6, 4, 2, seed=1)
    squares = (a - b).square().sum(dim=(1, 2))
    torch.testing.assert_close(pseudo_huber_norm(a, b, 0.0), squares.sqrt())                        # ECT's c = 0: the norm itself
    torch.testing.assert_close(pseudo_huber_norm(a, b, 1e4) * 2e4, squares, rtol=1e-6, atol=0)
    c = 0.00054 * 8**0.5
    torch.testing.assert_close(pseudo_huber_norm(a, b), (squares + c * c).sqrt() - c)


@pytest.mark.parametrize("distance", [l2, pseudo_huber, pseudo_huber_norm])
def test_distances_are_formed_in_float32(distance):
    """The difference of two nearly equal predictions is the signal."""
    a = torch.full((2, 3), 1.0, dtype=torch.bfloat16)
    value = distance(a, torch.full((2, 3), 1 + 2**-10))
    assert value.dtype == torch.float32
    assert value.shape == (2,)
    assert bool((value > 0).all())
    assert distance(a.double(), a.double()).dtype == torch.float64


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_weights_between_spaces(process):
    """eps-MSE = SNR |d|², flow-MSE = ((alpha + sigma)/sigma)² |d|², v-MSE = ((alpha² + sigma²)/sigma)² |d|², EDM = its loss weight |d|²."""
    pred, x0, eps, error = problem(process)
    alpha, sigma, log_snr = pred.alpha, pred.sigma, process.log_snr(T)
    torch.testing.assert_close(denoising_loss(pred, x0, eps), error)                                # its own space, x0
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "x0"), error)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "eps"), weighting.snr(log_snr) * error)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "flow"), ((alpha + sigma) / sigma).square() * error)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "v"), ((alpha.square() + sigma.square()) / sigma).square() * error)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "edm"), weighting.edm(log_snr) * error)


@pytest.mark.parametrize("process", [Trig(), LinearVP()], ids=["trig", "linear_vp"])
def test_v_weight_of_variance_preserving_processes(process):
    pred, x0, eps, error = problem(process)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "v"), weighting.v_weight(process.log_snr(T)) * error)
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "v"), error / pred.sigma.square())


def test_flow_weight_is_one_over_t_squared():
    pred, x0, eps, error = problem(Flow())
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "flow"), error / T.square())


@pytest.mark.parametrize("kind", KINDS)
def test_default_space_is_the_networks(kind):
    process = Trig()
    pred, x0, eps, _ = problem(process)
    spoken = type(pred)(pred.to(kind), kind, pred.x_t, pred.alpha, pred.sigma)
    truth = target(kind, x0, eps, pred.alpha, pred.sigma)
    torch.testing.assert_close(denoising_loss(spoken, x0, eps), (spoken.raw - truth).square().mean(dim=(1, 2)))
    perfect = type(pred)(truth, kind, pred.x_t, pred.alpha, pred.sigma)
    assert float(denoising_loss(perfect, x0, eps).max()) < 1e-20


def test_the_plain_norm_has_a_gradient_where_nothing_differs():
    """A student that is its own target meets d = 0, where the derivative of a root is not a number."""
    a = randn(6, 4, 2).requires_grad_()
    pseudo_huber_norm(a, a.detach(), 0.0).sum().backward()
    assert float(a.grad.abs().max()) == 0
