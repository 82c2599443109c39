"""Continuous-time consistency (sCM, Lu & Song 2024, 2410.11081) on any process.

TrigFlow walks x = cos·x0 + sd·sin·eps along the angle theta, tan(theta) = sigma/(sd·alpha), sd the standard deviation of the data. Every
process is that curve at another speed and scale, so the angle and F are read off a prediction, and a derivative in theta is one in t.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.prediction import Prediction, combine
from stepdistill.diffusion.process import NoiseProcess, like


def trig(alpha: Tensor, sigma: Tensor, sd: float) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle, float64 of the shape of alpha and sigma."""
    hypotenuse = ((sd * alpha).square() + sigma.square()).sqrt()
    return sd * alpha / hypotenuse, sigma / hypotenuse


def trig_output(pred: Prediction, sd: float) -> Tensor:
    """F (B, ...), what a TrigFlow network would have said: sd·F = cos·sd·eps - sin·x0, the velocity dx/dtheta."""
    cos, sin = trig(pred.alpha, pred.sigma, sd)
    return combine(-sin / sd, cos, pred.x0, pred.eps)


def direction(process: NoiseProcess, t: Tensor, x0: Tensor, eps: Tensor, sd: float) -> tuple[Tensor, Tensor]:
    """cos times (dx_t/dtheta, dt/dtheta), shaped as x_t and t: along the ODE that x0 and eps (B, ...) predict, in the process's own frame.

    sCM (sec. 4.1) scales its tangents by cos·sin, which keeps them bounded; float32 needs only the cos.
    """
    alpha, sigma, (alpha_rate, sigma_rate) = process.alpha(t), process.sigma(t), process.rates(t)
    cos, _ = trig(alpha, sigma, sd)
    dt = cos * ((sd * alpha).square() + sigma.square()) / (sd * (sigma_rate * alpha - sigma * alpha_rate))
    return combine(alpha_rate * dt, sigma_rate * dt, x0, eps), dt


def scm_tangent(x: Tensor, f: Tensor, slope: Tensor, velocity: Tensor, cos: Tensor, sin: Tensor, sd: float, share: float = 1.0) -> Tensor:
    """g = -cos²·(sd·F - velocity) - share·sin·(cos·x + sd·slope), (B, ...) without a gradient (sCM, sec. 4.1).

    x is the state in TrigFlow's frame, `f` the student's F there, `slope` cos times its derivative along the trajectory, `velocity` the
    teacher's dx/dtheta; cos and sin are (B,). At share 1 g is cos·d/dtheta of the consistency function cos·x - sin·sd·F.
    """
    return (-like(cos.square(), x) * (sd * f - velocity) - share * like(sin, x) * (like(cos, x) * x + sd * slope)).detach()


def normalised(g: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """(g / (|g| + c), |g|): |g| (B,) is the root mean square of a sample, which does not depend on its size (sCM takes the plain norm)."""
    norm = g.flatten(1).square().mean(1).sqrt()
    return g / like(norm + c, g), norm


def moved_by(f: Tensor, g: Tensor) -> Tensor:
    """mean |f - stop(f) - g|² of each sample, (B,): its gradient at f (B, ...) is -2·g/numel, its value that of g."""
    return (f - (f.detach() + g)).flatten(1).square().mean(1)
