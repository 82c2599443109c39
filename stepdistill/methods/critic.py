"""The critic of distribution matching: a fake score that follows the student, and the discriminator beside it. A part, not a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import discriminator_loss
from stepdistill.losses.denoising import denoising_loss
from stepdistill.methods.base import Loss, Sample, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Roles

Judge = Literal["fake", "teacher"]


def alternating(step: int, fake_updates: int, trains: tuple[str, ...] = ("fake",)) -> Sequence[Update]:
    """The critic at every step; at each `fake_updates`-th the student before it, whose batch and sample the critic takes over."""
    if step % fake_updates:
        return (Update("critic", trains),)
    return Update("student", ("student",)), Update("critic", trains, reuse=True)


def dropped(cond: Conditioning, share: float, draws: Draws) -> Conditioning:
    """`cond`, or its null condition for the whole batch, in this share of the updates: a fake score asked with guidance must know both."""
    return cond.null if float(draws.shared("drop").uniform()) < share else cond


def critic_loss(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, times: Uniform, draws: Draws, *, w: float = 1.0,
                real: Sample | None = None, features: Judge = "fake", disc_weight: float = 0.0,
                distance: Callable[[Prediction, Tensor, Tensor], Tensor] = denoising_loss) -> Loss:
    """fake <- denoise stop(x0), asked with guidance w; with `real` also disc <- real against stop(x0), on the features of `features`.

    x0 (B, ...) and `real` get times and noise of their own. `distance` (B,) is between a prediction and the known x0 and eps. With
    the fake score's features one pass over [x_s; x_r] denoises its first half and judges both, and the discriminator's gradient reaches the
    fake score's encoder (DMD2, sec. 4.3; SiDA, sec. 3).
    """
    x0 = x0.detach()
    s, eps = times.sample(draws.each("fake/s")), draws.each("fake/eps").normal_like(x0)
    x_s = process.add_noise(x0, eps, s)
    if real is None:
        denoise = distance(m.fake(x_s, s, cond, w=w), x0, eps).mean()
        return Loss(denoise, {"denoise": denoise})
    r = times.sample(draws.each("real/s"))
    x_r = process.add_noise(real.clean, draws.each("real/eps").normal_like(real.clean), r)
    both = torch.cat([x_s, x_r]), torch.cat([s, r]), cond.cat(real.cond)
    if features == "fake":
        judged = m.fake(*both, w=w, tap=True)
        pred = judged.rows(slice(len(x0)))
    else:
        pred = m.fake(x_s, s, cond, w=w)
        with torch.no_grad():
            judged = m.teacher.plain(*both, tap=True)
    denoise = distance(pred, x0, eps).mean()
    on_fake, on_real = m.disc(judged.features).chunk(2)
    judge = discriminator_loss(on_real, on_fake)
    right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
    return Loss(denoise + disc_weight * judge, {"denoise": denoise, "judge": judge, "disc_accuracy": right})
