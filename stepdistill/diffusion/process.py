"""The forward process: x_t = alpha(t)·x0 + sigma(t)·eps, with t in [0, 1] and SNR falling in t.

DDPM tables, VP, EDM/VE, flow matching and TrigFlow differ in two curves and in nothing else, so this is the only place that knows
which of them a teacher was trained with. All curves are float64 whatever the state's precision; `add_noise` casts them to the state's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a per-sample coefficient (B,) or scalar so that it multiplies x (B, ...), in x's dtype and on its device."""
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision states become float32; float32 and float64 pass untouched."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class NoiseProcess(ABC):
    """Two curves over t in [0, 1]. `t` may have any shape; results are float64 of that shape."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient."""

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt)."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [0, 1]."""

    def log_snr(self, t: Tensor) -> Tensor:
        """2·ln(alpha/sigma): +inf where sigma is 0, -inf where alpha is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def prior_std(self, t: Tensor) -> Tensor:
        """Standard deviation of the pure noise a sampler starts from at time t.

        At t = 1 it is diffusers' `init_noise_sigma`; below, the noise that x_t holds: a network that is told t takes what exceeds it for
        texture of the picture and keeps it.
        """
        return self.sigma(t) / self.sigma(_f64(1.0))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from clean x0 (B, ...) and standard normal eps of the same shape, at times t (B,) or a scalar."""
        x0 = at_least_float32(x0)
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * eps.to(x0.dtype)

    def travel(self, x_r: Tensor, eps: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Noise a state from r up to t >= r: variances add, so x_t has the marginal of t (trajectory S6)."""
        x_r = at_least_float32(x_r)
        ratio = self.alpha(t) / self.alpha(r)
        std = (self.sigma(t).square() - (ratio * self.sigma(r)).square()).clamp_min(0).sqrt()
        return like(ratio, x_r) * x_r + like(std, x_r) * eps.to(x_r.dtype)


def _f64(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t.double()


class Trig(NoiseProcess):
    """alpha = cos(pi t/2), sigma = sin(pi t/2): TrigFlow (sCM, Lu & Song 2024) and the cosine VP process are this one curve."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(_f64(t) * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(_f64(t) * (math.pi / 2))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.sigma(t) * (math.pi / 2), self.alpha(t) * (math.pi / 2)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-_f64(log_snr) / 2)) * (2 / math.pi)


class LinearVP(NoiseProcess):
    """The VP SDE with linear beta (Song et al. 2021, eq. 33): ln alpha = -t²(beta_max - beta_min)/4 - t·beta_min/2."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"LinearVP needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = _f64(t)
        return -(t.square()) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta_min + _f64(t) * (self.beta_max - self.beta_min)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return -0.5 * beta * alpha, 0.5 * beta * alpha.square() / sigma

    def time_of(self, log_snr: Tensor) -> Tensor:
        # softplus(-log_snr) = -2 ln alpha = t²·(b - a)/2 + t·a; the root is written so that it keeps its digits near t = 0, and the
        # target stops at its value for t = 1 so that -inf (pure noise on another process) is 1 and not inf/inf.
        spread = self.beta_max - self.beta_min
        target = torch.nn.functional.softplus(-_f64(log_snr)).clamp_max(spread / 2 + self.beta_min)
        return (2 * target / (self.beta_min + (self.beta_min**2 + 2 * spread * target).sqrt())).clamp_max(1)


class Flow(NoiseProcess):
    """Rectified flow / flow matching with timestep shift m: u = m·t/(1 + (m-1)·t), alpha = 1 - u, sigma = u (SD3, sec. 5.3.2)."""

    def __init__(self, shift: float = 1.0):
        if shift <= 0:
            raise ValueError(f"Flow shift must be positive, got {shift}")
        self.shift = shift

    def sigma(self, t: Tensor) -> Tensor:
        t = _f64(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        t = _f64(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.shift / (1 + (self.shift - 1) * _f64(t)).square()
        return -rate, rate

    def time_of(self, log_snr: Tensor) -> Tensor:
        u = torch.sigmoid(-_f64(log_snr) / 2)
        return u / (self.shift - (self.shift - 1) * u)


class Karras(NoiseProcess):
    """EDM/VE: alpha = 1, sigma = (min^(1/rho) + t·(max^(1/rho) - min^(1/rho)))^rho (Karras et al. 2022, eq. 5, t reversed).

    t = 0 is sigma_min, not exactly clean: solvers that must end clean say so themselves.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise ValueError(f"Karras needs 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}")
        self.low, self.high, self.rho = sigma_min ** (1 / rho), sigma_max ** (1 / rho), rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_f64(t))

    def sigma(self, t: Tensor) -> Tensor:
        return (self.low + _f64(t) * (self.high - self.low)) ** self.rho

    def prior_std(self, t: Tensor) -> Tensor:
        return self.sigma(t)                                                        # its noise is not of unit size at t = 1

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        base = self.low + _f64(t) * (self.high - self.low)
        return torch.zeros_like(base), self.rho * (self.high - self.low) * base ** (self.rho - 1)

    def time_of(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(-_f64(log_snr) / (2 * self.rho))
        return ((root - self.low) / (self.high - self.low)).clamp(0, 1)


class Framed(NoiseProcess):
    """Another process whose states are divided by alpha + sigma ("flow": the two then add up to 1) or by sqrt(alpha² + sigma²) ("vp").

    Times and SNR stay. A network may be fed in such a frame while its scheduler keeps x0 + sigma·eps (EDM's c_in, Cosmos 2) or TrigFlow.
    """

    def __init__(self, inner: NoiseProcess, frame: Literal["flow", "vp"]):
        self.inner, self.frame = inner, frame

    def divisor(self, t: Tensor) -> Tensor:
        """The inner process's state over ours, float64."""
        alpha, sigma = self.inner.alpha(t), self.inner.sigma(t)
        return alpha + sigma if self.frame == "flow" else (alpha.square() + sigma.square()).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return self.inner.alpha(t) / self.divisor(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.inner.sigma(t) / self.divisor(t)

    def prior_std(self, t: Tensor) -> Tensor:
        return self.inner.prior_std(t) / self.divisor(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, n = self.alpha(t), self.sigma(t), self.divisor(t)
        rises = self.inner.rates(t)
        grows = rises[0] + rises[1] if self.frame == "flow" else alpha * rises[0] + sigma * rises[1]                # d divisor/dt
        return (rises[0] - alpha * grows) / n, (rises[1] - sigma * grows) / n

    def time_of(self, log_snr: Tensor) -> Tensor:
        return self.inner.time_of(log_snr)


class TableVP(NoiseProcess):
    """A DDPM table made continuous: the angle atan2(sigma, alpha) is a monotone cubic (Fritsch-Carlson) through the training steps.

    Training index n of N sits at t = (n+1)/N and t = 0 is exactly clean. Exact at every training step, smooth between them (so
    continuous-time methods work on Stable Diffusion), finite at zero terminal SNR. `alphas_cumprod`: (N,) in [0, 1], decreasing.
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() >= 0).any()):
            raise ValueError("a DDPM table must be a one-dimensional, strictly decreasing alphas_cumprod in [0, 1]")
        self.steps = len(table)
        angle = torch.atan2((1 - table).sqrt(), table.sqrt())
        self.angle = torch.cat([angle.new_zeros(1), angle])
        secant = self.angle.diff() * self.steps
        inner = 2 * secant[1:] * secant[:-1] / (secant[1:] + secant[:-1])          # harmonic mean: monotone on a uniform grid
        ends = ((3 * secant[:2] - secant[[1, 0]]) / 2)[[0]], ((3 * secant[-1] - secant[-2]) / 2).reshape(1)
        self.slope = torch.cat([_limit(ends[0], secant[:1]), inner, _limit(ends[1], secant[-1:])])
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {torch.device("cpu"): (self.angle, self.slope)}

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> TableVP:
        """Stable Diffusion's table: betas linear in their square root."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(0))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._placed:
            self._placed[device] = self.angle.to(device), self.slope.to(device)
        return self._placed[device]

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The angle and its derivative in t: cubic Hermite on the cell that holds t."""
        t = _f64(t).clamp(0, 1)
        angle, slope = self._tables(t.device)
        cell = (t.detach() * self.steps).floor().long().clamp(0, self.steps - 1)
        h = 1 / self.steps
        u = t * self.steps - cell
        y0, y1, d0, d1 = angle[cell], angle[cell + 1], slope[cell] * h, slope[cell + 1] * h
        c2, c3 = 3 * (y1 - y0) - 2 * d0 - d1, 2 * (y0 - y1) + d0 + d1
        return y0 + u * (d0 + u * (c2 + u * c3)), (d0 + u * (2 * c2 + 3 * u * c3)) / h

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(t)[0])

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle, slope = self._angle(t)
        return -torch.sin(angle) * slope, torch.cos(angle) * slope

    def time_of(self, log_snr: Tensor) -> Tensor:
        target = torch.atan(torch.exp(-_f64(log_snr) / 2))
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(54):                                                         # bisection to float64 resolution
            middle = (low + high) / 2
            below = self._angle(middle)[0] < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def _limit(end: Tensor, secant: Tensor) -> Tensor:
    """Keep an end slope of a monotone cubic between 0 and three secants."""
    return torch.minimum(torch.maximum(end, torch.zeros_like(end)), 3 * secant)
