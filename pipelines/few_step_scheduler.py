"""A scheduler for one distilled student and its own grid, which needs torch and diffusers only: it is copied into exports that no stock
scheduler runs exactly, and holds a whole sampler in the numbers of its config.

    at step i:      x0, eps <- model_output, x0 clipped where the student was trained so
    to step i+1:    x <- alpha[i+1]·x0 + kept[i]·eps + sqrt(sigma[i+1]² - kept[i]²)·noise
    at the last:    x <- x0

kept 0 re-noises x0 (consistency and DMD2 students), kept = sigma[i+1] is DDIM (Song et al. 2021, eq. 12; Euler for flow matching). With
`known_noise` the first eps is the state over the standard deviation it started with (Imagine Flash, Kohler et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class FewStepOutput(BaseOutput):
    """`prev_sample` is the next state, `pred_original_sample` this step's x0, both (B, ...)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Walks the grid that a student was trained on, and no other.

    `timesteps` are what the network is told, whole numbers for a network that counts training steps; `alpha`, `sigma` and `kept` are the
    module's. `prediction_type` is epsilon, sample, v_prediction or flow_prediction; `sign` is -1 where the pipeline negates the network's
    output. `init_noise_sigma` is the standard deviation of the noise that the first step starts from. Some pipelines count theirs in
    `num_train_timesteps`.
    """

    order = 1

    @register_to_config
    def __init__(self, timesteps: Sequence[float] = (999,), alpha: Sequence[float] = (0.0,), sigma: Sequence[float] = (1.0,),
                 kept: Sequence[float] = (), prediction_type: str = "epsilon", clip_x0: float | None = None,
                 init_noise_sigma: float = 1.0, sign: float = 1.0, known_noise: bool = False, num_train_timesteps: int = 1000):
        if not len(timesteps) == len(alpha) == len(sigma) == len(kept) + 1:
            raise ValueError(f"{len(timesteps)} timesteps need as many alpha and sigma and one kept less, got {len(alpha)}, {len(sigma)} "
                             f"and {len(kept)}")
        self.init_noise_sigma = init_noise_sigma
        self.set_timesteps(len(timesteps))

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
                      sigmas: Sequence[float] | None = None, timesteps: Sequence[float] | None = None, mu: float | None = None) -> None:
        """Start over. A grid that a pipeline brings along (`sigmas`, `timesteps`, its shift `mu`) only says how many steps it wants.

        Raises ValueError where that is not the number of steps that the student was trained for.
        """
        given = timesteps if timesteps is not None else sigmas
        count, trained = num_inference_steps if given is None else len(given), len(self.config.timesteps)
        if count != trained:
            raise ValueError(f"this student was trained for {trained} steps and cannot be run with {count}: set num_inference_steps to "
                             f"{trained}")
        whole = all(isinstance(t, int) for t in self.config.timesteps)
        self.timesteps = torch.tensor(self.config.timesteps, dtype=torch.long if whole else torch.float32, device=device)
        if self.config.prediction_type == "flow_prediction":                        # some pipelines read them off their scheduler
            self.sigmas = torch.tensor([*self.config.sigma, 0.0])
        self._step = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step to go on from."""
        self._step = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network is fed the state itself."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None = None,
             return_dict: bool = True, per_token_timesteps: Tensor | None = None) -> FewStepOutput | tuple[Tensor, Tensor]:
        """The next state from `sample` (B, ...) and the network's answer to it; the last one is x0. Steps are taken in order.

        A pipeline that hands over a time for every token negates the answer, as FlowMatchEulerDiscreteScheduler expects it to.
        """
        config, i = self.config, self._step
        alpha, sigma = config.alpha[i], config.sigma[i]
        x, y = sample.float(), config.sign * model_output.float() * (1 if per_token_timesteps is None else -1)
        a, b = {"sample": (1.0, 0.0), "epsilon": (0.0, 1.0), "v_prediction": (-sigma, alpha),
                "flow_prediction": (-1.0, 1.0)}[config.prediction_type]             # y = a·x0 + b·eps
        det = alpha * b - sigma * a
        x0 = (b * x - sigma * y) / det
        eps = (alpha * y - a * x) / det
        if config.clip_x0 is not None:
            x0 = x0.clamp(-config.clip_x0, config.clip_x0)
            eps = (x - alpha * x0) / sigma
        if config.known_noise and i == 0:
            eps = x / config.init_noise_sigma
        after = x0
        if i + 1 < len(config.timesteps):
            kept = config.kept[i]
            after = config.alpha[i + 1] * x0 + kept * eps
            if (fresh := math.sqrt(max(config.sigma[i + 1] ** 2 - kept**2, 0.0))) > 0:
                after = after + fresh * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        self._step += 1
        after, x0 = after.to(model_output.dtype), x0.to(model_output.dtype)
        return FewStepOutput(prev_sample=after, pred_original_sample=x0) if return_dict else (after, x0)
