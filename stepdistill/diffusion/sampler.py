"""The few-step sampler. Rollouts in training, previews, evaluation and the exported scheduler are this one generator of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction, from_x0
from stepdistill.diffusion.process import NoiseProcess, like
from stepdistill.diffusion.solver import dpmpp_2m, heun, jump
from stepdistill.diffusion.times import check_boundaries, trailing

Solver = Literal["ddim", "heun", "dpmpp_2m"]


class Net(Protocol):
    """What the sampler needs of a denoiser."""

    @property
    def process(self) -> NoiseProcess: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, *, s: Tensor | None = None, w: float | None = None) -> Prediction:
        """`s` (B,) is given to a student that is told it, and to no other."""
        ...


INPUTS = ((), ("s",), ("w",), ("s", "w"))               # what a student may be told besides its time


def check_inputs(inputs: tuple[str, ...]) -> None:
    """ValueError unless it is a row of INPUTS."""
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be s (the time that a step goes to), w (its guidance) or both in this order, got {inputs}")


@dataclass(frozen=True)
class SamplerSpec:
    """How a model must be run.

    `times` descend from the start; the sample is the x0 of the last one. `renoise` (eta, gamma): 1 re-noises x0 with fresh noise, as
    students trained for the endpoint need; 0 follows the ODE with `solver`; between, the step falls to (1 - renoise)·next and is
    noised up again (trajectory S6). `clip_x0` clamps x0 after each call. `guidance` is w in null + w·(cond - null); 1 is none.
    `known_noise`: the first step along the ODE takes its noise from the state, which is nothing else, and only x0 from the network
    (Imagine Flash, Kohler et al. 2024). It changes nothing where alpha is 0 at the start. `boundaries` are the times at which a student
    of several experts changes from one to the next, which serves them and what lies below (Phased DMD). `inputs` say what the student is
    told besides its time: "s", where each step goes before it is noised up again (0 at the last), and "w", guidance, then in one call.
    `grids` are the times of other counts of steps that it was trained for; `free` says that it is right at every time along the ODE, as a
    teacher is, so that any equal steps and any solver will do. `built_in` is the teacher's guidance that a student has learnt with all
    else; guidance of its own would come on top.
    """

    times: tuple[float, ...]
    renoise: float = 1.0
    solver: Solver = "ddim"
    clip_x0: float | None = None
    guidance: float = 1.0
    known_noise: bool = False
    boundaries: tuple[float, ...] = ()
    inputs: tuple[str, ...] = ()
    grids: tuple[tuple[float, ...], ...] = ()
    free: bool = False
    built_in: float = 1.0

    def __post_init__(self) -> None:
        if not self.times or not all(0 < b < a <= 1 for a, b in zip(self.times, (*self.times[1:], 0.5 * self.times[-1]), strict=True)):
            raise ValueError(f"sampler times must fall strictly within (0, 1], got {self.times}")
        if not 0 <= self.renoise <= 1:
            raise ValueError(f"renoise must lie in [0, 1], got {self.renoise}")
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}")
        if self.renoise > 0 and self.solver != "ddim":
            raise ValueError(f"solver {self.solver!r} follows the ODE: it needs renoise 0, got {self.renoise}")
        if self.clip_x0 is not None and not self.clip_x0 > 0:
            raise ValueError(f"clip_x0 is the largest absolute value of x0 and must be positive, got {self.clip_x0}")
        if self.known_noise and (self.renoise > 0 or self.solver != "ddim"):
            raise ValueError(f"known_noise is a step of ddim: it needs that solver and renoise 0, got {self.solver} and {self.renoise}")
        check_boundaries(self.boundaries)
        check_inputs(self.inputs)
        if "s" in self.inputs and self.solver != "ddim":
            raise ValueError(f"a student that is told where its step goes makes it in one jump: it needs solver ddim, got {self.solver}")

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, both halves of guidance counted where it is not told.

        heun makes one less where its first state has alpha 0.
        """
        calls = 2 * len(self.times) - 1 if self.solver == "heun" else len(self.times)
        return calls * (1 if self.guidance == 1 or "w" in self.inputs else 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `SamplerSpec.from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplerSpec:
        """Strict: an unknown key raises TypeError."""
        return cls(**{**values, **{key: tuple(values.get(key, ())) for key in ("times", "boundaries", "inputs")},
                      "grids": tuple(map(tuple, values.get("grids", ())))})

    def at(self, count: int) -> SamplerSpec:
        """The same sampler with another count of steps: one of `grids`, or equal ones from the same start.

        The latter raise ValueError unless its own are equal, and it re-noises, is `free` or its student is told where each step goes.
        """
        if count == len(self.times):
            return self
        if grid := next((times for times in self.grids if len(times) == count), None):
            return replace(self, times=grid)
        even = lambda n: tuple(self.times[0] * t for t in trailing(n))                                      # noqa: E731
        equal = all(abs(a - b) <= 1e-9 for a, b in zip(self.times, even(len(self.times)), strict=True))
        if not equal or not (self.renoise == 1 or self.free or "s" in self.inputs):
            others = f" or in {', '.join(str(len(times)) for times in self.grids)}" if self.grids else ""
            raise ValueError(f"this model is sampled in {len(self.times)} steps at its own times {self.times}{others}, not in {count}")
        return replace(self, times=even(count))

    def guided(self, w: float) -> SamplerSpec:
        """The same sampler at another guidance; ValueError where guidance is built in, and would be doubled."""
        if self.built_in != 1 and w != self.guidance:
            raise ValueError(f"guidance {self.built_in:g} of its teacher is part of this student, and guided again it would overdo it: "
                             f"leave guidance at {self.guidance:g}")
        return replace(self, guidance=w)


@dataclass(frozen=True)
class Step:
    """One network call of a trajectory: `x0` is its (clipped) endpoint, `x_next` the state handed on (None after the last)."""

    index: int
    t: Tensor
    pred: Prediction
    x0: Tensor
    x_next: Tensor | None


def start(process: NoiseProcess, spec: SamplerSpec, z: Tensor) -> Tensor:
    """Pure noise z (B, ...) scaled to the first time: never `add_noise` of something."""
    return like(process.prior_std(torch.tensor(spec.times[0], dtype=torch.float64)), z) * z


def call(net: Net, spec: SamplerSpec, x_t: Tensor, t: Tensor, cond: Any, s: Tensor | None = None) -> Prediction:
    """The sampler's prediction at states x_t (B, ...) and times t (B,), guided and clipped as `spec` says; s (B,) where it is told."""
    pred = net(x_t, t, cond, s=s, w=spec.guidance) if "s" in spec.inputs else net(x_t, t, cond, w=spec.guidance)
    if spec.clip_x0 is None:
        return pred
    return from_x0(pred.x0.clamp(-spec.clip_x0, spec.clip_x0), pred.x_t, pred.alpha, pred.sigma)


def steps(net: Net, x: Tensor, spec: SamplerSpec, cond: Any, draws: Draws, *, grad: Callable[[int], bool] | None = None,
          noise: Callable[[int], Tensor] | None = None) -> Iterator[Step]:
    """Walk the trajectory from state x at spec.times[0]. Lazy: stop iterating and no further call is made.

    `grad(i)` says which calls keep their gradient (none by default; the state handed on is then detached). `noise(i)` overrides the
    fresh noise of re-noising after call i, which is otherwise draws.each("renoise/i").
    """
    process, before = net.process, None
    fresh = noise or (lambda i: draws.each(f"renoise/{i}").normal_like(x))
    for i, (now, later) in enumerate(zip(spec.times, (*spec.times[1:], None), strict=True)):
        t = torch.tensor(now, dtype=torch.float64, device=x.device).expand(len(x))
        keep = bool(grad and grad(i))
        x = x if keep else x.detach()                                    # or whatever is read of pred later would differentiate x_t alone
        r = torch.tensor(later or 0.0, dtype=torch.float64, device=x.device)
        low = r * (1 - spec.renoise)
        with torch.set_grad_enabled(keep):
            pred = call(net, spec, x, t, cond, low.expand(len(x)))
            x0, x_next = pred.x0, None
            if later is not None:
                if spec.renoise == 1:
                    x_next = process.add_noise(x0, fresh(i), r)
                elif spec.renoise > 0:
                    x_next = process.travel(jump(pred, process, low), fresh(i), low, r)
                elif spec.known_noise and i == 0:
                    x_next = process.add_noise(x0, x / like(process.prior_std(t), x), r)
                elif spec.solver == "heun":
                    x_next = heun(lambda x_r, at: net(x_r, at.expand(len(x_r)), cond, w=spec.guidance), pred, process, r)
                else:
                    x_next = dpmpp_2m(pred, before if spec.solver == "dpmpp_2m" else None, process, r)
        yield Step(i, t, pred, x0, x_next)
        if x_next is not None:
            x, before = x_next, pred


def one_call(net: Net, spec: SamplerSpec, cond: Any, draws: Draws, shape: tuple[int, ...], *, grad: bool) -> Step:
    """One call of the sampler, drawn once for all samples and reached from noise through the calls before it.

    This is backward simulation (DMD2, sec. 4.5). That call alone keeps its gradient, if any does.
    """
    last = int(draws.shared("call").integers(len(spec.times)))
    x = start(net.process, spec, draws.each("start").normal(*shape))
    return next(step for step in steps(net, x, spec, cond, draws, grad=lambda i: grad and i == last) if step.index == last)


def data_call(net: Net, spec: SamplerSpec, x0: Tensor, cond: Any, draws: Draws, odds: Sequence[float]) -> Prediction:
    """One call of the sampler at noised data x0 (B, ...), its place in `spec.times` drawn for each sample in proportion to `odds`.

    The first call starts where the sampler does, from pure noise; the states of the others are what a perfect student would have come by
    (ADD, Sauer et al. 2023, sec. 3.2, whose first time has alpha 0).
    """
    ends = torch.tensor(odds, dtype=torch.float64, device=x0.device).cumsum(0)
    place = torch.searchsorted(ends, draws.each("call").uniform() * ends[-1], right=True).clamp_max(len(odds) - 1)
    t = torch.tensor(spec.times, dtype=torch.float64, device=x0.device)[place]
    eps = draws.each("start").normal_like(x0)
    x_t = torch.where(like(place == 0, x0).bool(), start(net.process, spec, eps), net.process.add_noise(x0, eps, t))
    return call(net, spec, x_t, t, cond)


@torch.no_grad()
def sample(net: Net, spec: SamplerSpec, cond: Any, draws: Draws, shape: tuple[int, ...]) -> Tensor:
    """x0 (B, *shape) for the samples of `draws`: sample i depends on (seed, i) and its condition alone."""
    x = start(net.process, spec, draws.each("start").normal(*shape))
    for step in steps(net, x, spec, cond, draws):
        x0 = step.x0
    return x0
