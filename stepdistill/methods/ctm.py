"""Consistency Trajectory Models. Kim et al., 2023. https://arxiv.org/abs/2310.02279

    h ~ {1..H},  n ~ {h..N},  t = n/N,  u = (n - h)/N,  r ~ {0..n - h}/N                                     sec. 3.2
    x_t = alpha_t·x0 + sigma_t·eps,   y = h Heun steps of the guided teacher from x_t to u
    G(x, t -> r) = the jump to r of a student that is told r, whose x0 is g(x, t, r)
    A = G_target(G(x_t, t -> r), r -> 0),   B = stop G_target(G_target(y, u -> r), r -> 0)
    student <- d(A, B) + weight·(denoise x0 with g(x_k, k, k), k ~ times) + weight·(-disc(A))
    disc    <- relu(1 - disc(x0)) + relu(1 + disc(A))                                                      only with gan_weight
    target  <- decay·target + (1 - decay)·student

Both ends are compared clean, so that distances at every r weigh alike; A's gradient passes through the frozen target. In any number of
steps the student is told where each goes. With `gamma` some of each is noise: fall to (1 - gamma)·next, noise up to next (sec. 3.3).

A weight by gradients is its number in the recipe times |d distance/d W| / (|d term/d W| + 1e-4), W the student's last layer. A ratio of
norms is no mean over samples: it is measured on the whole batch of an update, over micro-batches and processes, and counts from the
next one on; until it is measured it is 1 for the denoising term and 0 for the GAN term, whose ratio is clipped to [0.01, 10].

Differs from the paper: both terms are weighed by gradients there, here the denoising term only with `adaptive_denoise`, and the ratio
is that of the update before; the GAN term, which owns most of its FID, is off by default, and its discriminator reads A and x0 by the
features of the frozen teacher, both noised alike, instead of clean by those of two picture networks, and moves after the student on the
same A; l2 or pseudo-Huber instead of LPIPS; equal steps of t on the teacher's own process instead of EDM's; gamma is a share of time,
where the paper's falls to sqrt(1 - gamma²)·sigma; the network is told t - r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import follow, jump, jump_or_stay
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.adversarial import hinge_discriminator_loss, linear_generator_loss
from stepdistill.losses.balance import ratio, weighed
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import accuracy, level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stage, Stream, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import last_layer
from stepdistill.models.roles import Role, Roles

LEAST, MOST = 0.01, 10.0                            # of the GAN term's ratio


@dataclass(frozen=True)
class CTMConfig:
    """N and H are the paper's for CIFAR-10; it takes 40 and 10 for ImageNet."""

    points: int = 18                                # N
    solver_steps: int = 17                          # H: the most of the teacher's, two calls each; h is drawn for the whole batch
    denoise_weight: float = 1.0                     # 0 leaves the term out
    adaptive_denoise: bool = False                  # weigh it by gradients, as the paper does
    gan_weight: float = 0.0                         # of the GAN term, by gradients; 0 builds no discriminator, the paper takes 1
    gan_from: float = 0.5                           # share of the run after which the student hears the discriminator, which learns before
    gan_times: Uniform = Uniform(0.02, 0.98)        # at which the teacher's features are read
    times: Uniform = Uniform(0.001, 1.0)            # of the denoising term
    target_decay: float = 0.999                     # warms up as (1 + n)/(10 + n)
    huber: float = 0.0                              # c of pseudo-Huber; 0 is plain l2
    gamma: float = 0.0                              # of the sampler

    def __post_init__(self) -> None:
        if not 1 <= self.solver_steps <= self.points:
            raise ValueError(f"method.solver_steps must lie in 1 to method.points, got {self.solver_steps} of {self.points}")
        if not 0 <= self.target_decay < 1 or not 0 <= self.gamma <= 1:
            raise ValueError("method.target_decay must lie in [0, 1) and method.gamma in [0, 1]")
        if self.huber < 0 or self.denoise_weight < 0 or self.gan_weight < 0:
            raise ValueError("method.huber, method.denoise_weight and method.gan_weight cannot be negative")
        if not 0 <= self.gan_from <= 1:
            raise ValueError(f"method.gan_from must lie in [0, 1], got {self.gan_from}")


class CTM(Method[CTMConfig]):
    title, arxiv, family = "Consistency Trajectory Models", "2310.02279", "consistency"
    Config, on_trajectories = CTMConfig, True

    def __init__(self, cfg: CTMConfig, setup: Setup):
        super().__init__(cfg, setup)
        self.gan_at = 0                             # the step that gan_from is, once the run has asked for its stages
        self.ratios = {**({"denoise": 1.0} if cfg.adaptive_denoise and cfg.denoise_weight else {}),
                       **({"fool": 0.0} if cfg.gan_weight else {})}

    @classmethod
    def needs(cls, cfg: CTMConfig) -> Mapping[str, Role]:
        disc = {"disc": Role(source="head", of="teacher", trains=True)} if cfg.gan_weight else {}
        return {"teacher": Role(), "student": Role(trains=True, inputs=("s",)), "target": Role(inputs=("s",)), **disc}

    @classmethod
    def data(cls, cfg: CTMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def stages(self, steps: int) -> Sequence[Stage]:
        self.gan_at = int(self.cfg.gan_from * steps)
        return super().stages(steps)

    def plan(self, step: int) -> Sequence[Update]:
        student = Update("student", ("student",))
        return (student, Update("disc", ("disc",), reuse=True)) if self.cfg.gan_weight else (student,)

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=self.cfg.gamma, inputs=("s",))

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cond, cfg, process = batch["real"].clean, batch["real"].cond, self.cfg, self.process
        h = 1 + int(draws.shared("h").integers(cfg.solver_steps))
        n = h + draws.each("n").integers(cfg.points - h + 1)
        t, u = n.double() / cfg.points, (n - h).double() / cfg.points
        r = (draws.each("r").uniform() * (n - h + 1)).floor() / cfg.points
        x_t = process.add_noise(x0, draws.each("eps").normal_like(x0), t)
        with torch.no_grad():
            y = follow(lambda x, at: m.teacher(x, at, cond), x_t, t, u, h, process, "heun")
            y = jump_or_stay(m.target(y, u.clamp_min(1 / cfg.points), cond, s=r), process, u, r)
            target = self.clean(m, y, r, cond)
        if not cfg.denoise_weight:
            both = pred = m.student(x_t, t, cond, s=r)
            denoise = torch.zeros((), device=x0.device)
        else:
            k, eps = cfg.times.sample(draws.each("k")), draws.each("denoise/eps").normal_like(x0)
            both = m.student(torch.cat([x_t, process.add_noise(x0, eps, k)]), torch.cat([t, k]), cond.cat(cond), s=torch.cat([r, k]))
            pred = both.rows(slice(len(x0)))
            denoise = denoising_loss(both.rows(slice(len(x0), None)), x0, eps).mean()
        estimate = self.clean(m, jump(pred, process, r), r, cond)
        distance = huber_or_l2(estimate, target, cfg.huber).mean()
        log = {"distance": distance, "denoise": denoise, **level(pred.x0)}
        if not self.ratios:
            return Loss(distance + cfg.denoise_weight * denoise, log)
        terms, weights = {"distance": distance}, {"distance": 1.0}
        if cfg.denoise_weight:
            terms["denoise"], weights["denoise"] = denoise, cfg.denoise_weight * self.ratios.get("denoise", 1.0)
        if cfg.gan_weight:
            batch.scratch["x0"] = estimate.detach()
        if cfg.gan_weight and draws.step >= self.gan_at:
            terms["fool"] = linear_generator_loss(*self.judged(m, [estimate], cond, draws))
            weights["fool"] = cfg.gan_weight * self.ratios["fool"]
        value, gradients = weighed(both.raw, last_layer(m.student.network), terms, weights)
        shown = {f"{name}_weight": weight for name, weight in weights.items() if name in self.ratios}
        return Loss(value, {**log, **terms, **shown}, gradients)

    def judged(self, m: Roles, states: Sequence[Tensor], cond: Conditioning, draws: Draws) -> Sequence[Tensor]:
        """Logits (B,) of each of these clean states (B, ...), all noised alike, in one pass of the teacher."""
        t, eps = self.cfg.gan_times.sample(draws.each("gan/t")), draws.each("gan/eps").normal_like(states[0])
        x_t = torch.cat([self.process.add_noise(x, eps, t) for x in states])
        conds = reduce(Conditioning.cat, (cond for _ in states[1:]), cond)
        features = m.teacher.plain(x_t, torch.cat([t for _ in states]), conds, tap=True).features
        return m.disc(features).chunk(len(states))

    def disc_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        real = batch["real"]
        on_fake, on_real = self.judged(m, [batch.scratch["x0"], real.clean], real.cond, draws)
        return Loss(hinge_discriminator_loss(on_real, on_fake), accuracy(on_real, on_fake))

    def clean(self, m: Roles, x_r: Tensor, r: Tensor, cond: Conditioning) -> Tensor:
        """G_target(x_r, r -> 0), and x_r itself where r is 0: there the target is asked at another time, so that no gradient is 0/0."""
        zero = torch.zeros_like(r)
        landing = jump(m.target(x_r, r.clamp_min(1 / self.cfg.points), cond, s=zero), self.process, zero)
        return torch.where(like(r == 0, x_r).bool(), x_r, landing)

    def learn(self, measured: Mapping[str, Tensor]) -> None:
        for name in self.ratios.keys() & measured.keys():
            found = ratio(measured["distance"], measured[name])
            if math.isfinite(found):
                self.ratios[name] = min(max(found, LEAST), MOST) if name == "fool" else found

    def state(self) -> dict[str, Any]:
        return dict(self.ratios)

    def restore(self, state: dict[str, Any]) -> None:
        if state.keys() != self.ratios.keys():
            raise ValueError(f"this configuration of ctm keeps {sorted(self.ratios)}, but the checkpoint holds {sorted(state)}")
        self.ratios = {name: float(value) for name, value in state.items()}

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        m.follow("target", "student", min(self.cfg.target_decay, (1 + count) / (10 + count)))
