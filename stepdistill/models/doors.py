"""Schedulers whose states are in another frame than those their network is fed, and the way through: what is kept beyond the door is
size·(alpha·x0 + sigma·eps) of the scheduler's own process; a teacher, its students and every method live on the network's side.

    EDM            x0 + sigma·eps, the network fed x_t/sqrt(sigma² + sigma_data²) (Karras et al. 2022, table 1)
    Cosmos 2       the same sigmas in a flow-matching scheduler, the network fed x_t/(1 + sigma)
    TrigFlow       sigma_data·(cos·x0 + sin·eps) (Lu & Song 2024), the network of SANA-Sprint fed flow matching's states

Which frame the network is fed and what it predicts is not written here: a recording learns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from stepdistill.diffusion.prediction import COEFFICIENTS, Prediction, combine
from stepdistill.diffusion.process import Framed, Karras, NoiseProcess, Trig, like
from stepdistill.models.wiring import Unrecordable

Frame = Literal["own", "flow", "vp"]
FRAMES: tuple[Frame, ...] = ("own", "flow", "vp")
FEW_STEP = (LCMScheduler, SCMScheduler, TCDScheduler)                    # samplers of students


class TrigFlowScheduler(SCMScheduler):
    """SCM's times and states, walked along the ODE, x <- cos(t - r)·x - sin(t - r)·v, where SCM adds fresh noise."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """The next state and x0 of `sample` (B, ...); the scheduler's steps are taken in order."""
        if self.step_index is None:
            self._init_step_index(timestep)
        now, after = self.timesteps[self.step_index], self.timesteps[self.step_index + 1]
        self._step_index += 1
        x0 = torch.cos(now) * sample - torch.sin(now) * model_output
        return torch.cos(now - after) * sample - torch.sin(now - after) * model_output, x0


@dataclass(frozen=True)
class Door:
    """One scheduler's frame. `process` is its own, it is given `size` times an output of kind `given` there, and its times are `offset`
    beyond the row `clock` of CLOCKS, `ratio` turning them into sigma/alpha."""

    scheduler: Any                                                       # first order and deterministic
    process: NoiseProcess
    size: float
    given: str
    clock: str
    ratio: Callable[[Tensor], Tensor]
    offset: float = 0.0

    def framed(self, frame: Frame) -> NoiseProcess:
        """The process of a network that is fed in this frame."""
        return self.process if frame == "own" else Framed(self.process, frame)

    def factor(self, process: NoiseProcess, t: Tensor) -> Tensor:
        """The scheduler's state over the network's, float64."""
        return self.size * (process.divisor(t) if isinstance(process, Framed) else torch.ones_like(t.double()))

    def answer(self, given: Tensor, state: Tensor, process: NoiseProcess, kind: str, t: Tensor) -> Tensor:
        """The output of this kind that became what the scheduler was given at its state (both in the scheduler's frame)."""
        here = Prediction(given.double() / self.size, self.given, state.double() / self.size, self.process.alpha(t), self.process.sigma(t))
        return combine(*COEFFICIENTS[kind](process.alpha(t), process.sigma(t)), here.x0, here.eps).to(given.dtype)

    def parts(self, process: NoiseProcess, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) in: given/size = p·output + q·state/size, the state being the scheduler's; float64 in t's shape."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        here = COEFFICIENTS[self.given](self.process.alpha(t), self.process.sigma(t))

        def given(output: float, x_t: Tensor) -> Tensor:
            said = Prediction(torch.full_like(alpha, output), kind, x_t, alpha, sigma)
            return combine(*here, said.x0, said.eps)

        return given(1.0, torch.zeros_like(alpha)), given(0.0, self.size / self.factor(process, t))


def door_of(scheduler: Any) -> Door | None:
    """None for a scheduler that keeps its states as its network is fed. Raises Unrecordable for one whose networks are no teachers."""
    config = scheduler.config
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        raise Unrecordable("CMStochasticIterativeScheduler samples a consistency model, whose network answers with the end of a "
                           "trajectory and not with the mean of x0: it is a student already and cannot teach")
    if isinstance(scheduler, SCMScheduler):
        return Door(TrigFlowScheduler.from_config(config), Trig(), config.sigma_data, "v", "angle",
                    lambda angle: angle.clamp(max=math.pi / 2).tan())
    if isinstance(scheduler, EDMEulerScheduler):
        size, own = config.sigma_data, EDMEulerScheduler.from_config(config, final_sigmas_type="sigma_min")
        return Door(own, Karras(config.sigma_min / size, config.sigma_max / size, config.rho), size, "x0", "log_sigma/4",
                    lambda c_noise: (4 * c_noise).exp() / size, math.log(size) / 4)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and config.get("sigma_max", 0.0) > 1:
        return Door(scheduler, Karras(config.sigma_min, config.sigma_max), 1.0, "eps", "1000sigma/alpha", lambda time: time / 1000)
    return None


def asks_twice(scheduler: Any) -> bool:
    """Whether a pipeline may first ask it for x0, hand that back guided, and only then step."""
    return isinstance(scheduler, EDMEulerScheduler)


def lists_end(scheduler: Any) -> bool:
    """Whether its times include the one at which the last step ends."""
    return isinstance(scheduler, SCMScheduler)


def pin(scheduler: Any, times: Sequence[float]) -> None:
    """Make these its times, as if its `set_timesteps` had chosen them."""
    clock = scheduler.timesteps
    whole = not clock.is_floating_point() and all(float(t).is_integer() for t in times)
    listed = [*times, 0.0] if lists_end(scheduler) else list(times)
    scheduler.timesteps = torch.tensor(listed, device=clock.device, dtype=clock.dtype if whole else torch.float32)
    scheduler.num_inference_steps = len(times)
    if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod"):
        if isinstance(scheduler, EDMEulerScheduler):
            scheduler.set_begin_index(0)
            sigmas = (4 * scheduler.timesteps).exp()
        else:
            sigmas = scheduler.timesteps / scheduler.config.get("num_train_timesteps", 1000)
        scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (B, ...) times a float64 factor, in x's dtype."""
    return like(factor, x) * x
