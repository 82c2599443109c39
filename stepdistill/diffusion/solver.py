"""One step of the probability-flow ODE between any two times, for any process and any prediction (trajectory S2, S3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess, like

Predict = Callable[[Tensor, Tensor], Prediction]                         # (x_t, t) -> prediction, condition and guidance bound


def jump(pred: Prediction, process: NoiseProcess, r: Tensor) -> Tensor:
    """DDIM: alpha_r·x0 + sigma_r·eps. Equals Euler for flow matching and for EDM; J(x, t->t) = x whatever the network says.

    Song et al. 2021 (DDIM), eq. 12 with eta = 0.
    """
    return like(process.alpha(r), pred.x_t) * pred.x0 + like(process.sigma(r), pred.x_t) * pred.eps


def jump_or_stay(pred: Prediction, process: NoiseProcess, r: Tensor, s: Tensor) -> Tensor:
    """The jump of a prediction made at time r to s, and the state itself where s is r.

    `jump` says so, too, but where the network speaks x0 and r is clean: eps is then 0/0. r and s are (B,).
    """
    return torch.where(like(s == r, pred.x_t).bool(), pred.x_t, jump(pred, process, s))


def heun(predict: Predict, pred: Prediction, process: NoiseProcess, r: Tensor) -> Tensor:
    """Second-order step from pred.x_t to time r in the frame y = x/alpha, dy/d kappa = eps, kappa = sigma/alpha (EDM, algorithm 1).

    One more network call, except where sigma_r is 0: there the Euler step already lands on x0 and the correction is left out. Where
    alpha is 0 (zero terminal SNR) kappa is infinite and the step is first order. Both are decided sample by sample.
    """
    euler = jump(pred, process, r)
    alpha_r, sigma_r = process.alpha(r), process.sigma(r)
    first_order = (sigma_r == 0) | (pred.alpha < 1e-8)
    if bool(first_order.all()):
        return euler
    mean = (pred.eps + predict(euler, r).eps) / 2
    rise = alpha_r * (sigma_r / alpha_r - pred.sigma / pred.alpha)
    second = like(alpha_r / pred.alpha, pred.x_t) * pred.x_t + like(rise, pred.x_t) * mean
    return torch.where(like(first_order, euler).bool(), euler, second)


def dpmpp_2m(pred: Prediction, before: Prediction | None, process: NoiseProcess, r: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order at one call a step, from the last two x0 along one chain.

    `before` is the prediction of the previous step (None on the first, which is then DDIM). lam = ln(alpha/sigma).
    """
    alpha_r, sigma_r = process.alpha(r), process.sigma(r)
    if before is None or bool((sigma_r == 0).all()):
        return jump(pred, process, r)
    lam = lambda alpha, sigma: (alpha / sigma).log()                     # noqa: E731
    lam_t = lam(pred.alpha, pred.sigma)
    h, h_before = lam(alpha_r, sigma_r) - lam_t, lam_t - lam(before.alpha, before.sigma)
    slope = like(h / (2 * h_before), pred.x_t)
    x0 = (1 + slope) * pred.x0 - slope * before.x0
    return like(sigma_r / pred.sigma, pred.x_t) * pred.x_t - like(alpha_r * torch.expm1(-h), pred.x_t) * x0


def follow(predict: Predict, x: Tensor, t: Tensor, r: Tensor, count: int, process: NoiseProcess,
           solver: Literal["ddim", "heun"] = "ddim") -> Tensor:
    """Where `count` equal steps of t take x (B, ...) from times t to r, both (B,) or scalar; heun calls twice a step.

    At r = 0 the last state is x0 on a process that is clean there, and x0 with its smallest noise (sigma .002) on Karras.
    """
    for i in range(count):
        pred, later = predict(x, t + (r - t) * (i / count)), t + (r - t) * ((i + 1) / count)
        x = heun(predict, pred, process, later) if solver == "heun" else jump(pred, process, later)
    return x
