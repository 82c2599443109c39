"""Adversarial Diffusion Distillation (ADD). Sauer et al., 2023. https://arxiv.org/abs/2311.17042

    every step   student  <- -disc(F(x0)) + distill_weight·alpha_t·|x0 - stop teacher(x_t, t)|²                  sec. 3.3, 3.4
                 disc     <- relu(1 - disc(F(real))) + relu(1 + disc(F(stop x0))) + r1_weight·|d disc/d F(real)|²
    where        x0 = the student's call at a time of its sampler, from noised data there (pure noise at the first),    sec. 3.2
                 x_t = stop(alpha_t·x0 + sigma_t·eps), F = features of the pictures that x0 decodes to, frozen

The distillation term asks the guided teacher what it would make of the student's own sample, re-noised; its gradient is zero where the
teacher would leave it as it is. `features` names F: a folder with a vision transformer (DINOv2 ViT-S in the paper), or "fashion", the
second classifier of that world: not the one whose features its evaluation reads, which a student must not be trained against.

Differs from the paper: means over elements where it sums; the discriminator knows neither prompt nor picture embedding (one head on each of
the blocks read; their logits are averaged); tokens are judged one by one, by an MLP; `real` is what the decoder makes of the
stored state, so a VAE's reconstruction for latent teachers, whose decoder passes gradients. No decoder does for recorded pipelines
with prompts: those are refused. F runs in float32 and its pictures are not augmented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, data_call
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import feature_r1, hinge_discriminator_loss, linear_generator_loss
from stepdistill.losses.distance import l2
from stepdistill.losses.reported import accuracy, level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stream, Update
from stepdistill.models.features import WORLD
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class ADDConfig:
    """Weights are the paper's; its teacher is told the whole range of times."""

    features: str = WORLD                           # a world, or a folder with a vision transformer of transformers
    distill_weight: float = 2.5                     # of the distillation term; 0 asks no teacher
    r1_weight: float = 1e-5                         # of the gradient of each logit by the features that its heads read
    times: Uniform = Uniform(0.001, 1.0)            # t of the distillation term

    def __post_init__(self) -> None:
        if self.distill_weight < 0 or self.r1_weight < 0:
            raise ValueError("method.distill_weight and method.r1_weight cannot be negative")
        if self.features != WORLD:                  # absolute, so that a run folder can be used from anywhere
            object.__setattr__(self, "features", str(Path(self.features).expanduser().absolute()))


class ADD(Method[ADDConfig]):
    title, arxiv, family = "Adversarial Diffusion Distillation", "2311.17042", "adversarial"
    Config = ADDConfig

    def __init__(self, cfg: ADDConfig, setup: Setup):
        super().__init__(cfg, setup)
        if setup.decode is None:
            raise ValueError("add judges pictures, and no gradient passes through the decoder of a pipeline with prompts: take ladd, which "
                             "judges its latents")
        self.decode = setup.decode

    @classmethod
    def needs(cls, cfg: ADDConfig) -> Mapping[str, Role]:
        teacher = {"teacher": Role()} if cfg.distill_weight else {}
        return {**teacher, "student": Role(trains=True), "features": Role(source="features", of=cfg.features),
                "disc": Role(source="head", of="features", trains=True)}

    @classmethod
    def data(cls, cfg: ADDConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        return Update("student", ("student",)), Update("disc", ("disc",), reuse=True)

    def sampler(self) -> SamplerSpec:
        return self.setup.sampler

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg, real = self.cfg, batch["real"]
        x0 = data_call(m.student, self.sampler(), real.clean, real.cond, draws, (1.0,) * len(self.sampler().times)).x0
        batch.scratch["x0"] = x0.detach()
        fool = linear_generator_loss(m.disc(m.features(self.decode(x0))))
        log = {"fool": fool, **level(x0)}
        if not cfg.distill_weight:
            return Loss(fool, log)
        t = cfg.times.sample(draws.each("t"))
        with torch.no_grad():
            x_t = self.process.add_noise(x0, draws.each("eps").normal_like(x0), t)
            target = m.teacher(x_t, t, real.cond).x0
        distance = l2(x0, target)
        distill = (self.process.alpha(t).to(distance) * distance).mean()
        return Loss(fool + cfg.distill_weight * distill, {**log, "distill": distill})

    def disc_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        states = torch.cat([batch.scratch["x0"], batch["real"].clean])
        with torch.no_grad():
            seen: Sequence[Tensor] = m.features(self.decode(states))
        features = [f.detach().requires_grad_(self.cfg.r1_weight > 0) for f in seen]
        on_fake, on_real = m.disc(features).chunk(2)
        judge = hinge_discriminator_loss(on_real, on_fake)
        log = {"judge": judge, **accuracy(on_real, on_fake)}
        if not self.cfg.r1_weight:
            return Loss(judge, log)
        r1 = feature_r1(on_real, features)
        return Loss(judge + self.cfg.r1_weight * r1, {**log, "r1": r1})
