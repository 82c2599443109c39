"""PG-SB: SwiftBrush under random guidance (SNOOPI). Nguyen et al., 2024. https://arxiv.org/abs/2412.02687

    every k-th step   student  <- alpha_s·sigma_s·(fake^w(x_s) - teacher^w(x_s)),   w uniform, of each sample, one for both scores
    every step        fake     <- alpha_s²·|eps of fake(x_s) - eps|² at stop(x0); the null condition in a share `dropout` of the steps
    where             x0 = student(noise),   x_s = alpha_s·x0 + sigma_s·eps

One fixed w suits one backbone and breaks another. Both scores share each sample's w, so that a student with the teacher's own unguided law
is a fixed point at every w; it is not told w. The recipe's `guidance` is not read. The paper's second half, NASA, subtracts a negative
prompt's features in the attention, in training and at inference, and is not here.

Differs from the paper: w is drawn per sample (it does not say); no CLIP loss, which it takes from SwiftBrush v2 with the merging of two
students (`stepdistill export --merge`); s is continuous; several steps are allowed (call n of its sampler, n drawn once for all).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, one_call
from stepdistill.diffusion.times import Uniform
from stepdistill.methods.base import Batch, Loss, Method, Update
from stepdistill.methods.critic import alternating, check_critic, check_times, handed_on
from stepdistill.methods.vsd import fake_loss, vsd_loss
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class PGSBConfig:
    """Defaults are the paper's for Stable Diffusion 1.5 and 2.1; PixArt-alpha took guidance up to 3."""

    guidance_low: float = 0.5                       # w is uniform between these two, in null + w·(cond - null)
    guidance_high: float = 4.0
    fake_updates: int = 1                           # fake-score updates per student update
    dropout: float = 0.1                            # of conditions in the fake score's updates, by whole batches
    times: Uniform = Uniform(0.02, 0.98)            # s of the student's update
    fake_times: Uniform = Uniform(0.001, 1.0)       # s of the fake score's update

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_low < self.guidance_high:
            raise ValueError(f"method.guidance_low must lie in [0, method.guidance_high), got {self.guidance_low} and "
                             f"{self.guidance_high}; swiftbrush is this method at one guidance")
        check_critic(self.fake_updates, dropout=self.dropout)
        check_times(self.times, self.fake_times)


class PGSB(Method[PGSBConfig]):
    title, arxiv, family = "SwiftBrush under random guidance (SNOOPI)", "2412.02687", "variational score distillation"
    Config = PGSBConfig

    @classmethod
    def needs(cls, cfg: PGSBConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}

    def plan(self, step: int) -> Sequence[Update]:
        return alternating(step, self.cfg.fake_updates)

    def without_null(self) -> str | None:
        return "it guides by a number of its own for each sample; take swiftbrush"

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond, cfg = batch["main"].cond, self.cfg
        x0 = one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=True).x0
        batch.scratch["x0"] = x0.detach()
        w = draws.each("w").uniform(cfg.guidance_low, cfg.guidance_high)
        return vsd_loss(m, self.process, x0, cond, cfg.times, draws, w)

    def critic_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cond = batch["main"].cond
        x0 = handed_on(batch, lambda: one_call(m.student, self.sampler(), cond, draws, self.setup.shape, grad=False).x0)
        return fake_loss(m, self.process, x0, cond, self.cfg.fake_times, draws, self.cfg.dropout)
