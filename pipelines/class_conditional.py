"""A few-step, class-conditional image pipeline that needs torch and diffusers only: it is copied beside the weights of a student.

    x = sigma(t_1)·z                                                 (over sigma(1) on a variance-preserving process)
    at each t:      x0, eps <- unet(x, clock(t), label), guided and clipped where the sampler says so
    to the next r:  q = (1 - renoise)·r,   b = sigma_q·alpha_r/alpha_q                                 (some are told q or guidance)
                    x <- alpha_r·x0 + b·eps + sqrt(sigma_r² - b²)·noise

renoise 1 re-noises x0, renoise 0 is DDIM (Song et al. 2021, eq. 12; Euler for flow matching), between is the gamma sampler of CTM (Kim et
al. 2024). With `known_noise` the first eps is the state over the size of its noise. The steps are computed here and not by
`scheduler.step`, because no stock scheduler takes the noise of a step, and each holds this sampler in part only: LCMScheduler adds a
boundary term to x0, DDIMScheduler counts its way to the next index instead of reading it, and neither can stand between two training steps.
The scheduler says which process the student was trained on.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

Label = int | str | None
COEFFICIENTS: dict[str, Callable[[float, float], tuple[float, float]]] = {       # an output means a·x0 + b·eps
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
}


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples a distilled student with the steps it was trained for.

    `sampler` holds times (1 = pure noise, falling), steps, renoise, clip_x0, guidance (w in null + w·(cond - null); 1 is none), solver
    ("ddim") and `inputs`, what the student is told besides its time: "s", where a step goes, and "w", its guidance, then in one call.
    `labels` name the classes; an unconditional student has none. `space_to_depth` pixels a side were folded into channels.
    """

    model_cpu_offload_seq = "unet->unet_2->unet_3->unet_4->vae"
    _optional_components = ["vae", "unet_2", "unet_3", "unet_4"]                  # noqa: RUF012  diffusers reads a list

    def __init__(self, unet: UNet2DModel | DiTTransformer2DModel, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None,
                 space_to_depth: int = 1, null_class: int | None = None, labels: list[str] | None = None,
                 sampler: dict[str, Any] | None = None, unet_2: UNet2DModel | DiTTransformer2DModel | None = None,
                 unet_3: UNet2DModel | DiTTransformer2DModel | None = None, unet_4: UNet2DModel | DiTTransformer2DModel | None = None):
        super().__init__()
        sampler = {"times": [1.0], "renoise": 1.0, "solver": "ddim", "clip_x0": None, "guidance": 1.0, "known_noise": False, "inputs": [],
                   "boundaries": [], "steps": 1, **(sampler or {})}
        if sampler["solver"] != "ddim" or sampler["steps"] != len(sampler["times"]):
            raise ValueError(f"this pipeline runs the solver ddim with one call for each time, got {sampler}")
        if (experts := 1 + sum(other is not None for other in (unet_2, unet_3, unet_4))) != len(sampler["boundaries"]) + 1:
            raise ValueError(f"{experts} networks cannot take turns at the boundaries {sampler['boundaries']}: load the folder whole")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, unet_2=unet_2, unet_3=unet_3, unet_4=unet_4)
        self.register_to_config(space_to_depth=space_to_depth, null_class=null_class, labels=list(labels or ()), sampler=sampler)

    @torch.no_grad()
    def __call__(self, class_labels: Label | Sequence[Label] | Tensor = None, num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
                 noise: Sequence[Tensor] | None = None, output_type: str = "pil", return_dict: bool = True) -> Any:
        """One picture for each label (a class by number or name; None for an unconditional student).

        `generator`: with one for each picture, a picture does not depend on the others. `noise` replaces it: standard normal tensors of
        the states' shape, the start and then one for each re-noising. `output_type`: "pil"; "pt" (B, C, H, W) and "np" (B, H, W, C),
        both in [0, 1]; "latent", the network's x0 (B, C, h, w). Raises ValueError for an unknown label, a number of steps the student
        cannot take, or a wrong number of noises.
        """
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ValueError(f"output_type must be pil, pt, np or latent, got {output_type!r}")
        numbers = [self._number(label) for label in _each(class_labels)]
        times = self._times(num_inference_steps)
        x0 = self._sample(numbers, times, self._guidance(guidance_scale), self._noises(len(numbers), len(times), generator, noise))
        images = x0 if output_type == "latent" else self._pictures(x0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(self, numbers: list[int], times: Sequence[float], w: float, noises: Iterator[Tensor]) -> Tensor:
        """x0 (B, C, h, w) of the last call."""
        sampler, kind, curves = self.config.sampler, self._kind(), self._curves()
        start = curves(times[0])[1] / curves(1.0)[1]
        x = next(noises) * start
        for t, r in zip(times, (*times[1:], None), strict=True):
            alpha, sigma, clock = curves(t)
            q = (1 - sampler["renoise"]) * (r or 0.0)
            told = [{"s": t - q, "w": w - 1}[name] for name in sampler["inputs"]]
            unet = (self.unet, self.unet_2, self.unet_3, self.unet_4)[sum(t <= boundary for boundary in sampler["boundaries"])]
            y = self._output(unet, x, clock, numbers, 1.0 if "w" in sampler["inputs"] else w, told)
            x0, eps = _solve(kind, alpha, sigma, x, y)
            if sampler["clip_x0"] is not None:
                x0 = x0.clamp(-sampler["clip_x0"], sampler["clip_x0"])
                eps = _solve("sample", alpha, sigma, x, x0)[1]
            if r is not None:
                (alpha_r, sigma_r, _), (alpha_q, sigma_q, _) = curves(r), curves(q)
                b = sigma_q * alpha_r / alpha_q
                if sampler["known_noise"] and t == times[0]:
                    eps = x / start
                x = alpha_r * x0 + b * eps
                if sampler["renoise"] > 0:
                    x = x + math.sqrt(max(sigma_r**2 - b**2, 0.0)) * next(noises)
        return x0

    def _output(self, unet: Any, x: Tensor, clock: float, numbers: list[int], w: float, told: list[float]) -> Tensor:
        """A network's guided output in float32, without a learned variance."""
        rows = numbers if w == 1 else numbers + [self.config.null_class] * len(numbers)
        labels = {"class_labels": torch.tensor(rows, device=x.device)} if self.config.labels else {}
        x = x if w == 1 else torch.cat([x, x])
        inputs = {"told": torch.tensor([told] * len(x), device=x.device)} if told else {}
        y = unet(x.to(unet.dtype), torch.full((len(x),), clock, device=x.device), return_dict=False, **labels, **inputs)[0]
        y = y[:, : x.shape[1]].float()
        if w == 1:
            return y
        cond, null = y.chunk(2)
        return null + w * (cond - null)

    @property
    def _is_flow(self) -> bool:
        return type(self.scheduler).__name__.startswith("FlowMatch")

    def _kind(self) -> str:
        return "flow_prediction" if self._is_flow else self.scheduler.config.get("prediction_type", "epsilon")

    def _curves(self) -> Callable[[float], tuple[float, float, float]]:
        """t in [0, 1] to (alpha, sigma, what the network is told of t).

        Training step n of a table of N sits at t = (n+1)/N and t = 0 is clean; between them the angle atan2(sigma, alpha) is a monotone
        cubic (Fritsch-Carlson).
        """
        if self._is_flow:
            m = self.scheduler.config.shift
            return lambda t: ((1 - t) / (1 + (m - 1) * t), m * t / (1 + (m - 1) * t), 1000 * m * t / (1 + (m - 1) * t))
        table = self.scheduler.alphas_cumprod.double().cpu()
        count = len(table)
        angle = [0.0, *torch.atan2((1 - table).sqrt(), table.sqrt()).tolist()]
        rise = [b - a for a, b in itertools.pairwise(angle)]

        def slope(n: int) -> float:
            if 0 < n < count:
                return 2 * rise[n - 1] * rise[n] / (rise[n - 1] + rise[n])
            end, inner = (rise[0], rise[1]) if n == 0 else (rise[-1], rise[-2])
            return min(max((3 * end - inner) / 2, 0.0), 3 * end)

        def at(t: float) -> tuple[float, float, float]:
            n = min(int(t * count), count - 1)
            u, d0, d1 = t * count - n, slope(n), slope(n + 1)
            theta = angle[n] + u * (d0 + u * (3 * rise[n] - 2 * d0 - d1 + u * (d0 + d1 - 2 * rise[n])))
            return math.cos(theta), math.sin(theta), max(t * count - 1, 0.0)

        return at

    def _times(self, steps: int | None) -> Sequence[float]:
        """The trained grid, or another count of the same grid where the sampler is one that can be lengthened."""
        times, trained = self.config.sampler["times"], self.config.sampler["steps"]
        if steps is None or steps == trained:
            return times
        trailing = lambda k: [times[0] * (1 - i / k) for i in range(k)]             # noqa: E731
        same = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(times, trailing(trained), strict=True))
        free = self.config.sampler["renoise"] == 1 or "s" in self.config.sampler["inputs"]
        if steps < 1 or not free or not same:
            raise ValueError(f"this student was trained for {trained} steps and cannot be run with {steps}: "
                             f"leave num_inference_steps out, or set it to {trained}")
        logger.warning("this student was trained for %d steps and is run with %d, on the same kind of grid", trained, steps)
        return trailing(steps)

    def _guidance(self, scale: float | None) -> float:
        trained = self.config.sampler["guidance"]
        if scale is None or scale == trained:
            return trained
        if "w" in self.config.sampler["inputs"]:
            return scale
        if scale != 1 and (self.config.null_class is None or not self.config.labels):
            raise ValueError(f"guidance_scale {scale} needs a null class and this student has none: leave it out")
        if scale != 1 and trained == 1:
            logger.warning("guidance_scale %s is applied to a student that has its guidance built in: it is guided twice", scale)
        return scale

    def _number(self, label: Label) -> int:
        """A class by number, name (in any case) or number written as text."""
        names = self.config.labels
        if label is None or not names:
            if label is None and not names:
                return 0
            raise ValueError("this student is unconditional: its labels are None" if not names else
                             f"this student needs class_labels: {_listed(names)}")
        if isinstance(label, str):
            lowered = [name.lower() for name in names]
            if label.lower() in lowered:
                return lowered.index(label.lower())
            if not label.isdigit():
                near = difflib.get_close_matches(label.lower(), lowered, 1)
                hint = f"did you mean {names[lowered.index(near[0])]!r}?" if near else f"there are {_listed(names)}"
                raise ValueError(f"unknown class label {label!r}; {hint}")
        number = int(label) if isinstance(label, str) else operator.index(label)
        if not 0 <= number < len(names):
            raise ValueError(f"class labels lie in 0..{len(names) - 1}, got {number}")
        return number

    def _noises(self, batch: int, calls: int, generator: Any, noise: Sequence[Tensor] | None) -> Iterator[Tensor]:
        """The start noise, then one for each re-noising, float32 on the network's device."""
        device, size, channels = self._execution_device, self.unet.config.sample_size, self.unet.config.in_channels
        shape = (batch, channels, *((size, size) if isinstance(size, int) else size))
        if noise is None:
            if isinstance(generator, list) and len(generator) != batch:
                raise ValueError(f"a list of generators must hold one for each of the {batch} pictures, got {len(generator)}")
            return (randn_tensor(shape, generator=generator, device=device, dtype=torch.float32) for _ in range(calls))
        needed = calls if self.config.sampler["renoise"] > 0 else 1
        if len(noise) != needed or any(tuple(n.shape) != shape for n in noise):
            raise ValueError(f"noise must hold {needed} tensors of shape {shape}, got {[tuple(n.shape) for n in noise]}")
        return iter([n.to(device, torch.float32) for n in noise])

    def _pictures(self, x0: Tensor, output_type: str) -> Any:
        """States to pictures; "pil" rounds to nearest."""
        if self.vae is not None:
            latents = x0 / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            x = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        else:
            x = functional.pixel_shuffle(x0, self.config.space_to_depth)
        x = x.clamp(-1, 1) + 1
        if output_type == "pt":
            return x / 2
        if output_type == "np":
            return (x / 2).permute(0, 2, 3, 1).cpu().numpy()
        arrays = (x * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]


def _solve(kind: str, alpha: float, sigma: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) from x = alpha·x0 + sigma·eps and y = a·x0 + b·eps."""
    a, b = COEFFICIENTS[kind](alpha, sigma)
    det = alpha * b - sigma * a
    x0, eps = (b / det) * x - (sigma / det) * y, (alpha / det) * y - (a / det) * x
    return (y, eps) if kind == "sample" else (x0, y) if kind == "epsilon" else (x0, eps)


def _each(labels: Label | Sequence[Label] | Tensor) -> Sequence[Label]:
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    return [labels] if labels is None or isinstance(labels, int | str) else labels


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
