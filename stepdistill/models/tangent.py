"""The derivative of a network along a direction in state and time, as continuous-time consistency needs it (trajectory S8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import at_least_float32, like
from stepdistill.models.attention import plain
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.precision import exact
from stepdistill.models.sizes import SizedWiring
from stepdistill.models.wiring import FromClock, Wiring, leaves_of

Derivative = Literal["jvp", "difference"]


@torch.no_grad()
def along(net: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, dx: Tensor, dt: Tensor, read: Callable[[Prediction], Tensor],
          derivative: Derivative = "jvp", step: float = 1e-3) -> tuple[Tensor, Tensor]:
    """(value, derivative) of `read` of the prediction, where x_t moves by dx and t by dt >= 0 per unit of a path; no graph is kept.

    x_t and dx are (B, ...), t and dt (B,) float64. "jvp" is forward mode through the network; "difference" its central difference over
    `step` of the path to either side, cut off at the ends of [0, 1], with two calls more. What `read` makes of the raw output is exact in
    both. The network is called bare (no distributed wrapper, nothing checkpointed), without autocast and without TF32, so
    float32 weights are asked in float32. ValueError where it has no forward mode, or where half-precision weights leave nothing of a
    difference.
    """
    x_t, process = at_least_float32(x_t), net.process
    bare = replace(net, wrapped=None, autocast=None)
    ask = lambda x, at: bare(x, at, cond).raw                            # noqa: E731
    with plain(net.network), exact():
        if isinstance(x_t, FakeTensor):                                  # a plan counts bytes with tensors that have no forward mode
            value = read(bare(x_t, t, cond))
            return value, torch.empty_like(value)
        if derivative == "jvp":
            raw, slope = _forward_mode(net, ask, (x_t, t), (dx, dt))
        else:
            if net.dtype in (torch.float16, torch.bfloat16):
                raise ValueError("method.derivative: difference leaves nothing in half precision: use jvp, or teacher.dtype and weights "
                                 "float32")
            back, ahead = (torch.where(dt > 0, room / dt, step).clamp_max(step) for room in (t, 1 - t))
            before, after = (ask(x_t + like(h, x_t) * dx, t + h * dt) for h in (-back, ahead))
            raw, slope = ask(x_t, t), (after - before) / like(back + ahead, x_t)
    says = lambda y, x, at: read(Prediction(y, net.kind, x, process.alpha(at), process.sigma(at)))                # noqa: E731
    value, moved = torch.func.jvp(says, (raw, x_t, t), (slope, dx, dt))[:2]
    return value, moved


def _forward_mode(net: Denoiser, ask: Callable[..., Tensor], at: tuple[Tensor, Tensor], moving: tuple[Tensor, Tensor]) \
        -> tuple[Tensor, Tensor]:
    name, wiring = type(net.network).__name__, net.wiring.any if isinstance(net.wiring, SizedWiring) else net.wiring
    if isinstance(wiring, Wiring) and any(isinstance(leaf, FromClock) and leaf.tail is None for _, leaf in leaves_of(wiring.arguments)):
        raise ValueError(f"{name} takes its time as a Python number, which has no derivative: set method.derivative: difference")
    try:
        with _contiguous(net.network):
            raw, slope = torch.func.jvp(ask, at, moving)[:2]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        ask(*at)                                                         # what fails here as well is not about the derivative
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} has no forward-mode derivative here: set method.derivative: difference ({reason})") from error
    return raw, slope


@contextmanager
def _contiguous(network: nn.Module) -> Iterator[None]:
    """Group norms see values and tangents in plain order: torch 2.10's forward mode of them takes a convolution's tangent for no view."""
    hooks = [part.register_forward_pre_hook(lambda _, seen: (seen[0].clone(memory_format=torch.contiguous_format), *seen[1:]))
             for part in network.modules() if isinstance(part, nn.GroupNorm)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
