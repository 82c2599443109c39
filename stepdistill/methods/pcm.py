"""Phased Consistency Models. Wang et al., 2024. https://arxiv.org/abs/2405.18407

    n ~ {1..N},  t = n/N,  r = (n - 1)/N,  s = the lower edge of t's phase,  w ~ [low, high]
    x_t = alpha_t·x0 + sigma_t·eps,   x_r = one DDIM step of the teacher, guided with w, from x_t to r
    p = J(x_t, t -> s),   q = stop J(x_r, r -> s),   J(x, r -> r) = x
    student <- d(p, q) + gan_weight·relu(1 - disc(p_g))
    disc    <- relu(1 - disc(q_g)) + relu(1 + disc(p_g))                                       only with gan_weight
    where      p_g, q_g = p, q noised up from s to g ~ [s, upper edge],  disc reads the teacher's features

The phases are the steps of the student's own sampler: one for each of its times, down to the next or to 0. So the edges of training
are those of inference. The student follows the ODE: it is sampled with renoise 0 whatever the recipe says, in exactly that many steps.

For a student that keeps the teacher's guidance at inference ("normal CFG") train with guidance 1 and a `dropout` of conditions.

Differs from the paper and its code: the discriminator moves after the student on the same p and q, in every step, rather than in every
other one on a batch of its own; it reads p_g and q_g under the condition even where that was dropped; one head (or one for each of
`student.taps`) of this library; conditions are dropped by whole batches; noise is added in quadrature where the code for SD3 adds it
linearly; the lowest interval ends clean, not at training index 0. Approximate R1 (APT, 2501.08316), off by default, moves q.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import neighbours
from stepdistill.losses.adversarial import approximate_r1, hinge_discriminator_loss, hinge_generator_loss
from stepdistill.losses.distance import huber_or_l2
from stepdistill.losses.reported import accuracy, level
from stepdistill.methods.base import Batch, Images, Loss, Method, Setup, Stream, Update
from stepdistill.methods.critic import check_r1, dropped, nearby
from stepdistill.methods.pair import pair
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.guidance import Band
from stepdistill.models.roles import Role, Roles


@dataclass(frozen=True)
class PCMConfig:
    """Defaults are those of the code for SDXL, without its adversarial term, which one or two steps need (0.1)."""

    points: int = 40                                # N, of the whole range; every one of student.times must be among them
    guidance: Band | None = None                    # of the teacher; SD1.5 took 5 to 6, SDXL 7 to 8; none is the recipe's number
    dropout: float = 0.0                            # of conditions, by whole batches: 0.1 for students that keep guidance
    gan_weight: float = 0.0                         # of the student's adversarial term; 0 builds no discriminator
    r1_weight: float = 0.0                          # of approximate R1 beside the discriminator's loss; 0 adds no pass
    r1_sigma: float = 0.05                          # how far it moves q
    huber: float = 1e-3                             # c of pseudo-Huber; 0 is plain l2

    def __post_init__(self) -> None:
        if self.points < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"method.points must be at least 1 and method.dropout in [0, 1), got {self.points} and {self.dropout}")
        if self.gan_weight < 0 or self.huber < 0:
            raise ValueError("method.gan_weight and method.huber cannot be negative")
        check_r1(self.r1_weight, self.r1_sigma)


class PCM(Method[PCMConfig]):
    title, arxiv, family = "Phased Consistency Models", "2405.18407", "consistency"
    Config, on_trajectories = PCMConfig, True

    def __init__(self, cfg: PCMConfig, setup: Setup):
        super().__init__(cfg, setup)
        places = [t * cfg.points for t in setup.sampler.times]
        if any(abs(n - round(n)) > 1e-6 for n in places):
            raise ValueError(f"the phases of pcm are the student's steps: student.times must be multiples of 1/{cfg.points} "
                             f"(method.points), got {setup.sampler.times}")
        self.edges = torch.tensor([0.0, *(round(n) / cfg.points for n in reversed(places))], dtype=torch.float64)

    @classmethod
    def needs(cls, cfg: PCMConfig) -> Mapping[str, Role]:
        disc = {"disc": Role(source="head", of="teacher", trains=True)} if cfg.gan_weight else {}
        return {"teacher": Role(), "student": Role(trains=True), **disc}

    @classmethod
    def data(cls, cfg: PCMConfig) -> Mapping[str, Stream]:
        return {"real": Images()}

    def plan(self, step: int) -> Sequence[Update]:
        student = Update("student", ("student",))
        return (student, Update("disc", ("disc",), reuse=True)) if self.cfg.gan_weight else (student,)

    def without_null(self) -> str | None:
        return "set method.dropout to 0" if self.cfg.dropout else None

    @property
    def built_in(self) -> float:
        return 1.0 if self.cfg.dropout else super().built_in

    def sampler(self) -> SamplerSpec:
        return replace(self.setup.sampler, renoise=0.0)

    def phase(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) edge of the phase of each t (B,) on the grid: lower < t <= upper."""
        edges = self.edges.to(t.device)
        upper = torch.searchsorted(edges, t)
        return edges[upper - 1], edges[upper]

    def student_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        x0, cfg = batch["real"].clean, self.cfg
        cond = dropped(batch["real"].cond, cfg.dropout, draws)
        t, r = neighbours(draws.each("n"), cfg.points)
        s, upper = self.phase(t)
        pred, q = pair(m, self.process, x0, cond, t, r, s, draws, target=m.student, guidance=cfg.guidance)
        p = jump(pred, self.process, s)
        distance = huber_or_l2(p, q, cfg.huber).mean()
        log = {"distance": distance, **level(pred.x0)}
        if not cfg.gan_weight:
            return Loss(distance, log)
        batch.scratch.update(p=p.detach(), q=q, s=s, upper=upper)
        g = s + (upper - s) * draws.each("g").uniform()
        p_g = self.process.travel(p, draws.each("p").normal_like(p), s, g)
        fool = hinge_generator_loss(m.disc(m.teacher.plain(p_g, g, batch["real"].cond, tap=True).features))
        return Loss(distance + cfg.gan_weight * fool, {**log, "fool": fool})

    def disc_loss(self, m: Roles, batch: Batch, draws: Draws) -> Loss:
        cfg = self.cfg
        p, q, s, upper = (batch.scratch[name] for name in ("p", "q", "s", "upper"))
        g, cond = s + (upper - s) * draws.each("g").uniform(), batch["real"].cond
        blocks = [("p", p), ("q", q), *([("q", nearby(q, cfg.r1_sigma, draws))] if cfg.r1_weight else [])]
        x_g = [self.process.travel(x, draws.each(name).normal_like(x), s, g) for name, x in blocks]
        with torch.no_grad():
            conds = reduce(Conditioning.cat, (cond for _ in x_g[1:]), cond)
            features = m.teacher.plain(torch.cat(x_g), torch.cat([g for _ in x_g]), conds, tap=True).features
        on_p, on_q, *on_near = m.disc(features).split(len(p))
        r1 = cfg.r1_weight * approximate_r1(on_q, on_near[0]) if on_near else 0.0
        return Loss(hinge_discriminator_loss(on_q, on_p) + r1, accuracy(on_q, on_p))
