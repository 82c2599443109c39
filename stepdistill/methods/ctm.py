"""Consistency Trajectory Models. Kim et al., 2023. https://arxiv.org/abs/2310.02279

    h ~ {1..H},  n ~ {h..N},  t = n/N,  u = (n - h)/N,  r ~ {0..n - h}/N                                     sec. 3.2
    x_t = alpha_t·x0 + sigma_t·eps,   y = h Heun steps of the guided teacher from x_t to u
    G(x, t -> r) = the jump to r of a student that is told r, whose x0 is g(x, t, r)
    A = G_target(G(x_t, t -> r), r -> 0),   B = stop G_target(G_target(y, u -> r), r -> 0)
    student <- d(A, B) + weight·(denoise x0 with g(x_k, k, k), k ~ times)
    target  <- decay·target + (1 - decay)·student

Both ends are compared clean, so that distances at every r weigh alike; A's gradient passes through the frozen target. In any number of
steps the student is told where each goes. With `gamma` some of each is noise: fall to (1 - gamma)·next, noise up to next (sec. 3.3).

Differs from the paper: without its GAN term, and with it without most of its FID; l2 or pseudo-Huber instead of LPIPS; a fixed weight of
the denoising term instead of the ratio of two gradients, which is no mean over samples; equal steps of t on the teacher's own process
instead of EDM's; gamma is a share of time, where the paper's falls to sqrt(1 - gamma²)·sigma; the network is told t - r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import like
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import follow, jump, jump_or_stay
from stepdistill.diffusion.times import Uniform
from stepdistill.losses.denoising import denoising_loss
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import level
from stepdistill.methods.base import Batch, Images, Loss, Method, Stream, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class CTMConfig:
    """N and H are the paper's for CIFAR-10; it takes 40 and 10 for ImageNet."""

    points: int = 18                                # N
    solver_steps: int = 17                          # H: the most of the teacher's, two calls each; h is drawn for the whole batch
    denoise_weight: float = 1.0                     # 0 leaves the term out
    times: Uniform = Uniform(0.001, 1.0)            # of the denoising term
    target_decay: float = 0.999                     # warms up as (1 + n)/(10 + n)
    huber: float = 0.0                              # c of pseudo-Huber; 0 is plain l2
    gamma: float = 0.0                              # of the sampler

    def __post_init__(self) -> None:
        if not 1 <= self.solver_steps <= self.points:
            raise ValueError(f"method.solver_steps must lie in 1 to method.points, got {self.solver_steps} of {self.points}")
        if not 0 <= self.target_decay < 1 or not 0 <= self.gamma <= 1:
            raise ValueError("method.target_decay must lie in [0, 1) and method.gamma in [0, 1]")
        if self.huber < 0 or self.denoise_weight < 0:
            raise ValueError("method.huber and method.denoise_weight cannot be negative")


class CTM(Method[CTMConfig]):
    title, arxiv, family = "Consistency Trajectory Models", "2310.02279", "consistency"
    Config, on_trajectories = CTMConfig, True

    @classmethod
    def needs(cls, cfg: CTMConfig) -> Mapping[str, Role]:
        return {"teacher": Role(), "student": Role(trains=True, inputs=("s",)), "target": Role(inputs=("s",))}

    @classmethod
    def data(cls, cfg: CTMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

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
            pred, denoise = m.student(x_t, t, cond, s=r), torch.zeros((), device=x0.device)
        else:
            k, eps = cfg.times.sample(draws.each("k")), draws.each("denoise/eps").normal_like(x0)
            both = m.student(torch.cat([x_t, process.add_noise(x0, eps, k)]), torch.cat([t, k]), cond.cat(cond), s=torch.cat([r, k]))
            pred = both.rows(slice(len(x0)))
            denoise = denoising_loss(both.rows(slice(len(x0), None)), x0, eps).mean()
        estimate = self.clean(m, jump(pred, process, r), r, cond)
        distance = huber_or_l2(estimate, target, cfg.huber).mean()
        return Loss(distance + cfg.denoise_weight * denoise,
                    {"distance": distance, "denoise": denoise, **level(pred.x0)})

    def clean(self, m: Roles, x_r: Tensor, r: Tensor, cond: Conditioning) -> Tensor:
        """G_target(x_r, r -> 0), and x_r itself where r is 0: there the target is asked at another time, so that no gradient is 0/0."""
        zero = torch.zeros_like(r)
        landing = jump(m.target(x_r, r.clamp_min(1 / self.cfg.points), cond, s=zero), self.process, zero)
        return torch.where(like(r == 0, x_r).bool(), x_r, landing)

    def after_update(self, m: Roles, update: Update, count: int) -> None:
        m.follow("target", "student", min(self.cfg.target_decay, (1 + count) / (10 + count)))
