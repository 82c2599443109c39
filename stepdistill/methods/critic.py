"""The critic of distribution matching: a fake score that follows the student, and the discriminator beside it. A part, not a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import approximate_r1, discriminator_loss
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.reported import accuracy
from stepdistill.methods.base import Batch, Loss, Sample, Update
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


def handed_on(batch: Batch, make: Callable[[], Tensor]) -> Tensor:
    """x0 (B, ...) that the student's update left with its batch, or what `make` makes where the critic moves alone; no gradient."""
    with torch.no_grad():
        return batch.scratch["x0"] if "x0" in batch.scratch else make()


def check_critic(fake_updates: int, *, dropout: float = 0.0, gan_weight: float = 0.0, disc_weight: float = 0.0) -> None:
    """ValueError for options of a critic that no method takes."""
    if fake_updates < 1:
        raise ValueError(f"method.fake_updates must be at least 1, got {fake_updates}")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout must lie in [0, 1), got {dropout}")
    if gan_weight < 0 or disc_weight < 0:
        raise ValueError("method.gan_weight and method.disc_weight cannot be negative")


def check_times(times: Uniform, fake_times: Uniform) -> None:
    """ValueError where the fake score would be asked at times that it never learns."""
    if not fake_times.holds(times):
        raise ValueError("method.fake_times must hold the range of method.times: the fake score is asked there")


def check_r1(weight: float, sigma: float) -> None:
    """ValueError for options of approximate R1 that no method takes."""
    if weight < 0 or sigma <= 0:
        raise ValueError(f"method.r1_weight cannot be negative and method.r1_sigma must be positive, got {weight} and {sigma}")


def nearby(x0: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Clean states moved by noise of this size, for approximate R1; whoever noises them uses the noise and times of x0."""
    return x0 + sigma * draws.each("r1").normal_like(x0)


def critic_loss(m: Roles, process: NoiseProcess, x0: Tensor, cond: Conditioning, times: Uniform, draws: Draws, *, w: float = 1.0,
                real: Sample | None = None, features: Judge = "fake", disc_weight: float = 0.0,
                r1_weight: float = 0.0, r1_sigma: float = 0.05,
                distance: Callable[[Prediction, Tensor, Tensor], Tensor] = denoising_loss) -> Loss:
    """fake <- denoise stop(x0), asked with guidance w; with `real` also disc <- real against stop(x0), on the features of `features`.

    x0 (B, ...) and `real` get times and noise of their own. `distance` (B,) is between a prediction and the known x0 and eps. With
    the fake score's features one pass over [x_s; x_r] denoises its first half and judges both, and the discriminator's gradient reaches the
    fake score's encoder (DMD2, sec. 4.3; SiDA, sec. 3). With `r1_weight` that pass has a third block: the pictures moved by `r1_sigma`, at
    the times and noise of the second.
    """
    x0 = x0.detach()
    s, eps = times.sample(draws.each("fake/s")), draws.each("fake/eps").normal_like(x0)
    x_s = process.add_noise(x0, eps, s)
    if real is None:
        denoise = distance(m.fake(x_s, s, cond, w=w), x0, eps).mean()
        return Loss(denoise, {"denoise": denoise})
    r, noise = times.sample(draws.each("real/s")), draws.each("real/eps").normal_like(real.clean)
    clean = (real.clean, nearby(real.clean, r1_sigma, draws)) if r1_weight else (real.clean,)
    x_r = [process.add_noise(x, noise, r) for x in clean]
    every = torch.cat([x_s, *x_r]), torch.cat([s, *(r for _ in clean)]), reduce(Conditioning.cat, (real.cond for _ in clean), cond)
    if features == "fake":
        judged = m.fake(*every, w=w, tap=True)
        pred = judged.rows(slice(len(x0)))
    else:
        pred = m.fake(x_s, s, cond, w=w)
        with torch.no_grad():
            judged = m.teacher.plain(*every, tap=True)
    denoise = distance(pred, x0, eps).mean()
    on_fake, on_real, *on_near = m.disc(judged.features).split(len(x0))
    judge = discriminator_loss(on_real, on_fake)
    log = {"denoise": denoise, "judge": judge}
    if on_near:
        log["r1"] = approximate_r1(on_real, on_near[0])
        judge = judge + r1_weight * log["r1"]
    return Loss(denoise + disc_weight * judge, {**log, **accuracy(on_real, on_fake)})
