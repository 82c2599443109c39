"""Teachers with a closed form: data that is Gaussian or a mixture of Gaussians, whose denoiser, score and flow map are known exactly.

They answer like a real denoiser, `net(x_t, t, cond, *, w=None, tap=False) -> Prediction`, in any process and any prediction space, so every
conversion, solver, sampler and loss has a known answer on CPU in milliseconds. Arithmetic is float64; the answer has the state's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, target
from stepdistill.diffusion.process import Flow, Karras, LinearVP, NoiseProcess, TableVP, Trig, at_least_float32, like

Cond = Mapping[str, Tensor] | None
KINDS = ("x0", "eps", "v", "flow", "edm")


def zero_terminal(table: Tensor) -> Tensor:
    """alphas_cumprod rescaled to end at exactly zero (Lin et al. 2023, algorithm 1)."""
    root = table.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


PROCESSES: dict[str, NoiseProcess] = {
    "trig": Trig(),
    "linear_vp": LinearVP(),
    "flow": Flow(),
    "flow_shift3": Flow(3.0),
    "karras": Karras(),
    "sd_table": TableVP.scaled_linear(),
    "zero_snr_table": TableVP(zero_terminal((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double().square()).cumprod(0))),
    "linear_table": TableVP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
}


def f64(value: float | Tensor) -> Tensor:
    """A float64 time or coefficient."""
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianTeacher:
    """Data N(mean, diag(std²)) (trajectory S9, T1). `mean` and `std` broadcast over one sample's shape; conditions change nothing.

    `calls` counts evaluations: it holds one entry, the time, per call.
    """

    process: NoiseProcess
    kind: str = "eps"
    mean: Tensor = field(default_factory=lambda: f64(1.3))
    std: Tensor = field(default_factory=lambda: f64(0.6))
    guidance: float = 1.0
    calls: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def plain(self) -> GaussianTeacher:
        """The unguided teacher: itself."""
        return replace(self, guidance=1.0)

    def _moments(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = like(self.process.alpha(t), x), like(self.process.sigma(t), x)
        return alpha * self.mean, sigma, ((alpha * self.std).square() + sigma.square()).sqrt()     # mean, noise and total std of x_t

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None, *, w: float | Tensor | None = None, tap: bool = False) -> Prediction:
        self.calls.append(t)
        x_t = at_least_float32(x_t)
        x, alpha, sigma = x_t.double(), self.process.alpha(t), self.process.sigma(t)
        centre, noise, total = self._moments(x, t)
        whitened = (x - centre) / total
        x0 = self.mean + like(alpha, x) * self.std.square() / total * whitened
        raw = target(self.kind, x0, noise / total * whitened, alpha, sigma)
        return Prediction(raw.to(x_t.dtype), self.kind, x_t, alpha, sigma, (x_t,) if tap else ())

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x from t to r: M(x, t->r), exact, float64."""
        x = x.double()
        (start, _, wide), (end, _, narrow) = self._moments(x, f64(t)), self._moments(x, f64(r))
        return end + narrow / wide * (x - start)

    def data(self, count: int, generator: torch.Generator, *shape: int) -> Tensor:
        """Clean samples (count, *shape), float64."""
        return self.mean + self.std * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class MixtureTeacher:
    """Data sum_k weights_k N(means_k, diag(stds_k²)) in any dimension; one dimension has the exact transport map (trajectory S9, T2).

    `means` is (K, *shape of one sample), `stds` the same or (K,). `cond["class_labels"]` (B,) selects the components listed in
    `classes` (one class per component by default); a label past the last class is the null label, as are None and an empty condition.
    """

    process: NoiseProcess
    kind: str = "eps"
    weights: Tensor = field(default_factory=lambda: f64([0.3, 0.7]))
    means: Tensor = field(default_factory=lambda: f64([-2.0, 1.5]))
    stds: Tensor = field(default_factory=lambda: f64([0.3, 0.5]))
    guidance: float = 1.0
    classes: Sequence[Sequence[int]] | None = None
    calls: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def plain(self) -> MixtureTeacher:
        """The same teacher, unguided."""
        return replace(self, guidance=1.0)

    def _log_weights(self, count: int, cond: Cond) -> Tensor:
        """(B, K) log prior of every component up to a constant, -inf outside the class."""
        prior = (self.weights / self.weights.sum()).log().expand(count, -1)
        if cond is None or not len(cond):
            return prior
        groups = self.classes if self.classes is not None else [[k] for k in range(len(self.weights))]
        member = torch.ones(len(groups) + 1, len(self.weights), dtype=torch.bool)                  # the last row is the null label
        for row, group in zip(member, groups, strict=False):
            row[:] = torch.tensor([k in group for k in range(len(self.weights))])
        inside = member[cond["class_labels"].cpu().clamp(0, len(groups))]
        return torch.where(inside, prior, -math.inf)

    def _split(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(x0, eps) of one half of the guidance at x (B, ...), float64: posterior means over components."""
        flat = x.reshape(len(x), 1, -1)                                                             # (B, 1, D)
        means = self.means.reshape(1, len(self.weights), -1)                                        # (1, K, D)
        stds = self.stds.reshape(1, len(self.weights), -1)
        alpha, sigma = like(self.process.alpha(t), flat), like(self.process.sigma(t), flat)
        total = ((alpha * stds).square() + sigma.square()).sqrt().expand(-1, -1, flat.shape[-1])
        whitened = (flat - alpha * means) / total
        weight = (self._log_weights(len(x), cond) - 0.5 * whitened.square().sum(-1) - total.log().sum(-1)).softmax(1)[..., None]
        x0 = (weight * (means + alpha * stds.square() / total * whitened)).sum(1)
        return x0.reshape(x.shape), (weight * sigma / total * whitened).sum(1).reshape(x.shape)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None, *, w: float | Tensor | None = None, tap: bool = False) -> Prediction:
        self.calls.append(t)
        x_t = at_least_float32(x_t)
        x, scale = x_t.double(), f64(self.guidance if w is None else w)
        x0, eps = self._split(x, t, cond)
        if cond is not None and len(cond) and bool((scale != 1).any()):
            null_x0, null_eps = self._split(x, t, None)
            x0, eps = null_x0 + like(scale, x) * (x0 - null_x0), null_eps + like(scale, x) * (eps - null_eps)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        raw = target(self.kind, x0, eps, alpha, sigma)
        return Prediction(raw.to(x_t.dtype), self.kind, x_t, alpha, sigma, (x_t,) if tap else ())

    def cdf(self, x: Tensor, t: float | Tensor) -> Tensor:
        """P(x_t <= x) of the unconditional mixture in one dimension, float64."""
        return self._tails(x.double(), f64(t))[0]

    def _tails(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(CDF, 1 - CDF) at x, each with full relative precision."""
        if self.means.numel() != len(self.weights):
            raise ValueError("only a mixture in one dimension has a CDF")
        alpha, sigma = (like(c(t), x)[..., None] for c in (self.process.alpha, self.process.sigma))
        prior, means, stds = self.weights / self.weights.sum(), self.means.flatten(), self.stds.flatten()
        z = (x[..., None] - alpha * means) / ((alpha * stds).square() + sigma.square()).sqrt()
        return (prior * torch.special.ndtr(z)).sum(-1), (prior * torch.special.ndtr(-z)).sum(-1)

    def flow_map(self, x: Tensor, t: float | Tensor, r: float | Tensor) -> Tensor:
        """Where the probability-flow ODE takes x from t to r: quantiles are preserved, F_r^-1(F_t(x)), by bisection in float64."""
        x, t, r = x.double(), f64(t), f64(r)
        below, above = self._tails(x, t)
        alpha, sigma = like(self.process.alpha(r), x), like(self.process.sigma(r), x)
        reach = self.means.abs().max() * alpha + 40 * (self.stds.max() * alpha + sigma)
        low, high = -reach.expand(x.shape), reach.expand(x.shape)
        for _ in range(64):
            middle = (low + high) / 2
            left, right = self._tails(middle, r)
            short = torch.where(below < 0.5, left < below, right > above)                          # compare the smaller tail
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """Clean samples (count, *shape of means[0]), float64."""
        pick = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        stds = self.stds.reshape(self.stds.shape + (1,) * (self.means.ndim - self.stds.ndim))
        return self.means[pick] + stds[pick] * torch.randn(count, *self.means.shape[1:], generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class MapStudent:
    """A student that knows the teacher's exact flow map from t to `to[t]`: to 0 (None) it is the consistency function.

    Its x0 and eps are those whose straight line, the jump, lands on M(x, t -> to[t]), so with the next grid time it is a trajectory map.
    """

    teacher: GaussianTeacher | MixtureTeacher
    to: Mapping[float, float] | None = None                                                         # time -> next time; None is always 0
    kind: str = "x0"
    guidance: float = 1.0

    @property
    def process(self) -> NoiseProcess:
        """The teacher's."""
        return self.teacher.process

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None, *, w: float | Tensor | None = None, tap: bool = False) -> Prediction:
        now = float(t.flatten()[0])
        if bool((t != now).any()):
            raise ValueError("a map student is asked at one time per call")
        r = f64(0.0 if self.to is None else self.to[now])
        x_t, t = at_least_float32(x_t), f64(now)
        landing, x = self.teacher.flow_map(x_t, t, r), x_t.double()
        alpha, sigma, alpha_r, sigma_r = self.process.alpha(t), self.process.sigma(t), self.process.alpha(r), self.process.sigma(r)
        det = alpha * sigma_r - sigma * alpha_r                                                 # x = a·x0 + s·e, landing = a_r·x0 + s_r·e
        x0, eps = (sigma_r * x - sigma * landing) / det, (alpha * landing - alpha_r * x) / det
        return Prediction(target(self.kind, x0, eps, alpha, sigma).to(x_t.dtype), self.kind, x_t, alpha, sigma, (x_t,) if tap else ())


@dataclass(frozen=True)
class MapOfTimes:
    """Like MapStudent, row by row: asked at times t (B,), its jump to below(t) lands on M(x, t -> below(t)), 0 by default.

    Where below(t) is t it says what the teacher says. `bend` spoils the landing, `calls` holds the times asked for.
    """

    teacher: GaussianTeacher | MixtureTeacher
    below: Callable[[Tensor], Tensor] = torch.zeros_like
    kind: str = "x0"
    bend: float = 0.0
    calls: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def process(self) -> NoiseProcess:
        """The teacher's."""
        return self.teacher.process

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None, *, w: float | Tensor | None = None, tap: bool = False) -> Prediction:
        self.calls.append(t)
        x, t = at_least_float32(x_t).double(), f64(t).expand(len(x_t))
        r, process = self.below(t), self.process
        landing = self.teacher.flow_map(x, t, r) + self.bend * torch.sin(3 * x)
        alpha, sigma, alpha_r, sigma_r = process.alpha(t), process.sigma(t), process.alpha(r), process.sigma(r)
        det, stays = alpha * sigma_r - sigma * alpha_r, like((r == t).double(), x).bool()
        told = self.teacher(x, t, cond)
        x0 = torch.where(stays, told.x0, (like(sigma_r, x) * x - like(sigma, x) * landing) / like(det, x))
        eps = torch.where(stays, torch.nan_to_num(told.eps), (like(alpha, x) * landing - like(alpha_r, x) * x) / like(det, x))
        return Prediction(target(self.kind, x0, eps, alpha, sigma), self.kind, x, alpha, sigma, (x,) if tap else ())


def ks(samples: Tensor, cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance of samples (N,) from a law whose CDF at those samples is `cdf`."""
    ranked = cdf[samples.argsort()]
    steps = torch.arange(len(samples) + 1, dtype=torch.float64) / len(samples)
    return float(torch.maximum((ranked - steps[:-1]).abs().max(), (ranked - steps[1:]).abs().max()))
