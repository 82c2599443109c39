"""From pictures to states and back, for any pipeline with a VAE: what its tail hands to the VAE is an affine function of the state,
element by element, in some order; it is learnt as a recording learns the rest, and inverted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.models.drive import patched
from stepdistill.models.recorded import Recording
from stepdistill.models.watched import DIGITS, code, decoded
from stepdistill.models.wiring import Unrecordable


class _Seen(Exception):
    pass


@dataclass(frozen=True)
class LatentLaw:
    """z.flatten() = scale · x0.flatten()[index] + shift, one row; z is what the VAE decodes, of shape (B, *row)."""

    vae: Any
    index: Tensor
    scale: Tensor
    shift: Tensor
    row: tuple[int, ...]

    @torch.no_grad()
    def encode(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        """States (B, *shape) of pictures (B, C, H, W) in [-1, 1]: the VAE's mode, in the state's own scale and order.

        Raises ValueError where these pictures have another size than the recorded one.
        """
        pixels = images.to(next(self.vae.parameters()))
        encoded = self.vae.encode(pixels if len(self.row) == 3 else pixels[:, :, None])          # a video VAE: one frame
        z = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent).float()
        if tuple(z.shape[1:]) != self.row:
            raise ValueError(f"pictures of {images.shape[-1]}x{images.shape[-2]} become latents of {tuple(z.shape[1:])}, and this pipeline "
                             f"was recorded with {self.row}: set teacher.call.height and width to the pictures' size")
        rows = (z.flatten(1) - self.shift.to(z)) / self.scale.to(z)
        state = torch.empty_like(rows)
        state[:, self.index.to(z.device)] = rows
        return state.reshape(len(z), *shape)


def learn_latents(recording: Recording, inputs: Mapping[str, Any]) -> LatentLaw:
    """The law of a recorded pipeline, at the size of `inputs` (one prompt). Raises Unrecordable where its VAE sees something else."""
    vae = getattr(recording.driven.pipeline, "vae", None)
    if vae is None:
        raise Unrecordable(f"{type(recording.driven.pipeline).__name__} has no VAE of its own")
    size = torch.Size(recording.shape).numel()

    def seen(state: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def spy(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
                caught.append(z.detach().clone())
                raise _Seen
            return decode

        with patched(vae, "decode", spy):
            try:
                recording.decode(state.reshape(1, *recording.shape), inputs)
            except _Seen:
                return caught[0]
        raise Unrecordable("the pipeline's tail never calls its VAE")

    first = seen(torch.zeros(1, size))
    flat = lambda state: seen(state).float().flatten()                                                            # noqa: E731
    shift = first.float().flatten()
    scale = flat(torch.ones(1, size)) - shift
    index = decoded([(flat(code(1, size, d)) - shift) / scale for d in range(DIGITS)])
    if len(index) != size or not torch.equal(index.sort().values.cpu(), torch.arange(size)):
        raise Unrecordable("what the VAE decodes is not the state's elements, each once")
    check = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    error = (flat(check) - (scale * check.to(scale).flatten()[index] + shift)).abs().max()
    if float(error) > 1e-3 * float(shift.abs().max() + scale.abs().max()):
        raise Unrecordable("what the VAE decodes is no affine function of the state")
    return LatentLaw(vae, index, scale, shift, tuple(first.shape[1:]))
