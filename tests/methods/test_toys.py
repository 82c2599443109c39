"""Whole distillations on problems with a known answer: setting R (a ring of eight modes) and setting M (two modes on a line).

Over three seeds the short versions measure SW2 .10-.11 in one step and .12-.13 in four, and an error of .20-.21 on the line. The slow
versions are the settings of the method cards themselves.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import MixtureTeacher, f64
from torch import Tensor, nn
from toys import (
    FastDraws,
    Oracle,
    distil,
    draw_student,
    four,
    modes_covered,
    pretrained,
    ring,
    sliced_wasserstein,
    toy_data,
    toy_roles,
    train,
)

from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.solver import follow
from stepdistill.diffusion.times import trailing
from stepdistill.losses.matching import dmd_scale
from stepdistill.methods import dp_dmd
from stepdistill.methods.base import Batch, Method, Sample, Setup
from stepdistill.methods.consistency import Consistency, ConsistencyConfig
from stepdistill.methods.decoupled_dmd import DecoupledDMD, DecoupledDMDConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.dp_dmd import DPDMD, DPDMDConfig
from stepdistill.methods.imagine_flash import ImagineFlash, ImagineFlashConfig
from stepdistill.methods.pgsb import PGSB, PGSBConfig
from stepdistill.methods.phased_dmd import PhasedDMD, PhasedDMDConfig
from stepdistill.methods.sid import SiD, SiDConfig
from stepdistill.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from stepdistill.methods.swiftbrush_v2 import SwiftBrushV2, SwiftBrushV2Config
from stepdistill.methods.tdm import TDM, TDMConfig
from stepdistill.models.adapters import LoraRecipe
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.recipe import OptimRecipe

RING, FOUR, LINE = ring(), four(), MixtureTeacher(Flow(), "flow")


@pytest.fixture(scope="module")
def ring_start() -> Denoiser:
    return pretrained(RING, 128, 1000, batch=256)


@pytest.fixture(scope="module")
def four_start() -> Denoiser:
    return pretrained(FOUR, 128, 600, batch=256, labels=True)


@pytest.fixture(scope="module")
def line_start() -> Denoiser:
    return pretrained(LINE, 96, 500, batch=256)


def dmd2_on_the_ring(start: Denoiser, students: int, batch: int, steps: int = 1, gan: float = 0.0,
                     seed: int = 0) -> tuple[float, int, float]:
    """(SW2, modes covered, share of samples within 4 std of a mode) of the distilled student."""
    cfg = DMD2Config(fake_updates=5, gan_weight=gan, disc_weight=1e-2)
    return on_the_ring(DMD2(cfg, Setup(Flow(), (2,), SamplerSpec(trailing(steps)))), start, 5 * students, batch, seed)


def on_the_ring(method: Method, start: Denoiser, steps: int, batch: int, seed: int = 0, betas: tuple[float, float] = (0.9, 0.999)) \
        -> tuple[float, int, float]:
    """(SW2, modes covered, share of samples within 4 std of a mode) after `steps` iterations at setting R's rates."""
    optim = {"student": OptimRecipe(5e-4, betas=betas, schedule="linear", decay_from=0.5),
             **{role: OptimRecipe(1e-3, betas=betas) for role in ("fake", "disc")}}
    roles = distil(method, RING, start, optim, steps, batch, seed)
    x = draw_student(roles.student, method, 8192, (2,))
    return sliced_wasserstein(x, RING.data(8192, torch.Generator().manual_seed(5))), *modes_covered(x, RING)


def sid_on_the_ring(start: Denoiser, steps: int, batch: int, **options) -> tuple[float, int, float]:
    """Told the time where noise outweighs the data 5 to 1, as the authors do (sigma 2.5 on data of std .5)."""
    return on_the_ring(SiD(SiDConfig(**options), Setup(Flow(), (2,), SamplerSpec((1 / 1.2,)))), start, steps, batch, betas=(0.0, 0.999))


def dmd2_from_a_network(start: Denoiser, lora: dict[str, LoraRecipe], students: int, batch: int) -> tuple[float, int, float]:
    """As `dmd2_on_the_ring`, with the pretrained network itself as the teacher: copies of it, or adapters on it."""
    method = DMD2(DMD2Config(fake_updates=5, gan_weight=0), Setup(Flow(), (2,), SamplerSpec(trailing(1))))
    roles = Roles.build(method.needs(method.cfg), start.copy(), lambda: (torch.zeros(1, 2), f64([0.5]), Conditioning()), 0, lora)
    rate = 4.0 if lora else 1.0                                      # a product of two factors, one of them zero, moves slower
    optim = {"student": OptimRecipe(5e-4 * rate, schedule="linear", decay_from=0.5), "fake": OptimRecipe(1e-3 * rate)}
    train(method, roles, optim, 5 * students, lambda step, update: FastDraws(0, range(batch), step, update),
          lambda draws: toy_data(method.data(method.cfg), draws))
    x = draw_student(roles.student, method, 8192, (2,))
    return sliced_wasserstein(x, RING.data(8192, torch.Generator().manual_seed(5))), *modes_covered(x, RING)


@pytest.mark.parametrize("lora", [{}, {"student": LoraRecipe(32), "fake": LoraRecipe(32)}], ids=["copies", "adapters"])
def test_adapters_on_one_base_reach_what_copies_reach(ring_start, lora):
    distance, modes, near = dmd2_from_a_network(ring_start, lora, 200, 256)
    assert modes == 8
    assert distance < 0.2
    assert near > 0.5


def test_untrained_student_is_the_mean(ring_start):
    """What distillation starts from: one step of the teacher gives the mean of the ring, SW2 about .97 (setting R)."""
    method = DMD2(DMD2Config(gan_weight=0), Setup(Flow(), (2,)))
    x = draw_student(ring_start, method, 8192, (2,))
    assert sliced_wasserstein(x, RING.data(8192, torch.Generator().manual_seed(5))) == pytest.approx(0.97, abs=0.05)


@pytest.mark.judges("dmd2")
@pytest.mark.parametrize(("steps", "gan", "students"), [(1, 0.0, 200), (1, 3e-3, 200), (4, 0.0, 400)], ids=["one", "GAN", "four"])
def test_dmd2_on_the_ring(ring_start, steps, gan, students):
    """T15 in small (batches of 256 instead of 512, a sixth or a third of the updates): all modes, SW2 below .2.

    Four steps share the updates among four calls, so they need more of them. An untrained student has SW2 .97 in one step.
    """
    distance, modes, near = dmd2_on_the_ring(ring_start, students, 256, steps, gan)
    assert modes == 8
    assert distance < 0.2
    assert near > 0.5


@pytest.mark.judges("sid")
def test_sid_on_the_ring(ring_start):
    """In small (400 updates of 256 instead of 3000 of 512)."""
    distance, modes, near = sid_on_the_ring(ring_start, 400, 256)
    assert modes == 8
    assert distance < 0.2
    assert near > 0.5


def swiftbrush_on_the_ring(start: Denoiser, steps: int, batch: int, **options) -> tuple[float, int, float]:
    return on_the_ring(SwiftBrush(SwiftBrushConfig(**options), Setup(Flow(), (2,))), start, steps, batch)


@pytest.mark.judges("swiftbrush")
def test_swiftbrush_on_the_ring(ring_start):
    """In small: 200 updates of 256 instead of 3000 of 512, with three of the fake score each, which such a short run needs."""
    distance, modes, near = swiftbrush_on_the_ring(ring_start, 600, 256, fake_updates=3)
    assert modes == 8
    assert distance < 0.2
    assert near > 0.5


def guided_on_four(method: Method, start: Denoiser, w: float, steps: int, batch: int,
                   judge: nn.Module | None = None, lines: list[dict[str, float]] | None = None) -> tuple[float, float]:
    """Mean and std, along its own axis, of what the distilled student makes of class 0, the teacher guided by w. Exact: 1.5 and .3.

    `lines` as in `toys.train`.
    """
    roles = toy_roles(method.needs(method.cfg), replace(Oracle(FOUR).denoiser(), guidance=w), start, judge=judge)

    def labelled(draws) -> Batch:
        labels = draws.each("labels").integers(4)
        return Batch({"main": Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 4)}), labels=labels)})

    optim = {"student": OptimRecipe(5e-4, schedule="linear", decay_from=0.5), "fake": OptimRecipe(1e-3)}
    train(method, roles, optim, steps, lambda step, update: FastDraws(0, range(batch), step, update), labelled, lines=lines)
    cond = Conditioning({"class_labels": torch.zeros(4096, dtype=torch.long)})
    x = sample(roles.student, method.sampler(), cond, FastDraws(7, range(4096)), (2,))[:, 0]
    return float(x.mean()), float(x.std())


@pytest.mark.judges("pgsb")
def test_random_guidance_bakes_none_in(four_start):
    """Both scores share each w, so that none of it stays in the student: PG-SB's class is the teacher's plain one."""
    mean, std = guided_on_four(PGSB(PGSBConfig(fake_updates=5), Setup(Flow(), (2,))), four_start, 1.0, 500, 256)
    assert mean == pytest.approx(1.5, abs=0.25)                                                     # guidance 3 moves it to 2.4: below
    assert std == pytest.approx(0.3, abs=0.12)


class Axis(nn.Module):
    """A judge of the four classes: the cosine between a sample and the direction of its class."""

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        return torch.cosine_similarity(pictures, FOUR.means[labels].to(pictures), dim=1)


@pytest.mark.judges("swiftbrush_v2")
def test_a_judge_that_is_soon_satisfied_leaves_the_class_as_it_is(four_start):
    """SwiftBrush v2: 98 % of a class lie within .45 rad of its axis, a cosine of .9."""
    method = SwiftBrushV2(SwiftBrushV2Config(fake_updates=5, align_weight=1.0, align_above=0.9), Setup(Flow(), (2,)))
    mean, std = guided_on_four(method, four_start, 1.0, 500, 256, Axis())
    assert mean == pytest.approx(1.5, abs=0.25)
    assert std == pytest.approx(0.3, abs=0.12)


@pytest.mark.judges("decoupled_dmd")
def test_decoupled_guidance_on_four_classes(four_start):
    """Card 3 in small: at w = 3 the class moves out along its axis and stays bounded."""
    mean, std = guided_on_four(DecoupledDMD(DecoupledDMDConfig(), Setup(Flow(), (2,))), four_start, 3.0, 300, 256)
    assert 1.8 < mean < 3.5
    assert std < 2


def dp_dmd_on_the_ring(start: Denoiser, students: int, batch: int, weight: float, seed: int = 0) -> tuple[float, int, float, float]:
    """The three figures of the ring, and the share of noises that student and teacher's ODE take to the same mode."""
    method = DPDMD(DPDMDConfig(weight=weight), Setup(Flow(), (2,), SamplerSpec(trailing(4))))
    optim = {"student": OptimRecipe(5e-4, schedule="linear", decay_from=0.5), "fake": OptimRecipe(1e-3)}
    roles = distil(method, RING, start, optim, 5 * students, batch, seed)
    x = draw_student(roles.student, method, 8192, (2,))
    z = FastDraws(77, range(8192)).each("start").normal(2).double()
    ode = follow(lambda x_t, t: RING(x_t, t), z, f64(1.0).expand(8192), f64(0.0).expand(8192), 64, Flow(), "heun")
    agree = (torch.cdist(x.double(), RING.means).argmin(1) == torch.cdist(ode, RING.means).argmin(1)).double().mean()
    return sliced_wasserstein(x, RING.data(8192, torch.Generator().manual_seed(5))), *modes_covered(x, RING), float(agree)


@pytest.mark.judges("dp_dmd")
def test_dp_dmd_on_the_ring(ring_start):
    distance, modes, near, agree = dp_dmd_on_the_ring(ring_start, 50, 256, 0.05)
    assert modes == 8
    assert distance < 0.2
    assert near > 0.5
    assert agree > 0.75


def tdm_on_the_ring(start: Denoiser, steps: int, batch: int, target: str) -> tuple[float, float, float, int]:
    """(std of the states at t = .5, their SW2 from the marginal there, SW2 of the samples, modes covered)."""
    method = TDM(TDMConfig(fake_target=target), Setup(Flow(), (2,), SamplerSpec((1.0, 0.9, 0.75, 0.5))))
    optim = {"student": OptimRecipe(5e-4, schedule="linear", decay_from=0.5), "fake": OptimRecipe(1e-3)}
    roles = distil(method, RING, start, optim, steps, batch)
    draws, x0 = FastDraws(77, range(8192)), RING.data(8192, torch.Generator().manual_seed(5))
    with torch.no_grad():
        rung = method.states(roles, Batch({"main": Sample(Conditioning())}), draws)[-1]
    exact = Flow().add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64), f64(0.5))
    x = draw_student(roles.student, method, 8192, (2,))
    return float(rung.std()), sliced_wasserstein(rung, exact), sliced_wasserstein(x, x0), modes_covered(x, RING)[0]


@pytest.mark.judges("tdm")
def test_tdm_on_the_ring(ring_start):
    """In small (350 updates of 256 instead of 3000 of 512); the exact std at t = .5 is .705, from below."""
    std, rung, distance, modes = tdm_on_the_ring(ring_start, 350, 256, "subinterval")
    assert modes == 8
    assert 0.57 < std < 0.73
    assert rung < 0.18
    assert distance < 0.25


def phased_on_the_ring(start: Denoiser, steps: int, batch: int, experts: bool, seed: int = 0) -> tuple[float, float, float, int, float]:
    """(std of the states at t = .75, their SW2 from the marginal there, SW2 of the samples, modes covered, share near a mode)."""
    method = PhasedDMD(PhasedDMDConfig(experts=experts), Setup(Flow(), (2,), SamplerSpec((1.0, 0.9, 0.75, 0.5))))
    fakes = dict.fromkeys(("fake", "fake_1", "fake_2"), OptimRecipe(1e-3))
    optim = {"student": OptimRecipe(5e-4, schedule="linear", decay_from=0.5), **fakes}
    roles = distil(method, RING, start, optim, steps, batch, seed)
    draws, x0 = FastDraws(77, range(8192)), RING.data(8192, torch.Generator().manual_seed(5))
    with torch.no_grad():
        state = method.call(roles, Conditioning(), draws, 1, grad=False).x_next
    exact = Flow().add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64), f64(0.75))
    x = draw_student(roles.student, method, 8192, (2,))
    return float(state.std()), sliced_wasserstein(state, exact), sliced_wasserstein(x, x0), *modes_covered(x, RING)


@pytest.mark.judges("phased_dmd")
@pytest.mark.parametrize(("experts", "steps"), [(True, 500), (False, 300)])
def test_phased_dmd_on_the_ring(ring_start, experts, steps):
    """In small (50 student updates of 256 for each phase, or 30 of a shared student, not 600 of 512); the exact std at t = .75 is .79."""
    std, state, distance, modes, near = phased_on_the_ring(ring_start, steps, 256, experts)
    assert modes == 8
    assert std == pytest.approx(0.79, abs=0.04)
    assert state < 0.1
    assert distance < 0.25
    assert near > 0.5


def flash_on_the_line(start: Denoiser, updates: int, batch: int, steps: int = 3, **options) -> tuple[float, float, float]:
    """(mean error of the samples from the flow map, their std over the exact one, share of the minority mode, exactly .3)."""
    method = ImagineFlash(ImagineFlashConfig(**options), Setup(Flow(), (1,), SamplerSpec(trailing(steps))))
    student = distil(method, LINE, start, {"student": OptimRecipe(1e-3, schedule="cosine")}, updates, batch).student
    x, z = draw_student(student, method, 20_000, (1,))[:, 0].double(), FastDraws(77, range(20_000)).each("start").normal(1)[:, 0].double()
    exact = LINE.flow_map(z, 1.0, 0.0)
    return float((x - exact).abs().mean()), float(x.std() / exact.std()), float((x < -0.5).double().mean())


@pytest.mark.judges("imagine_flash")
def test_imagine_flash_on_the_line(line_start):
    """Setting M in small: with the sample's own noise both modes stay; with fresh noise all collapses to one point."""
    error, spread, minority = flash_on_the_line(line_start, 100, 256)
    assert error < 0.3
    assert 0.85 < spread < 1.25
    assert 0.2 < minority < 0.45
    assert flash_on_the_line(line_start, 100, 256, noise="fresh")[1] < 0.5


def error_on_the_line(student: Denoiser) -> tuple[float, float]:
    """(N(0, 1)-weighted mean, median over z of the same weight) of |student(z) - M(z, 1 -> 0)|."""
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        x0 = student(z.float()[:, None], f64(1.0), Conditioning()).x0[:, 0].double()
    error = (x0 - LINE.flow_map(z, 1.0, 0.0)).abs()
    return float(error.mean()), float(error.median())


def consistency_on_the_line(start: Denoiser, updates: int, batch: int, seed: int = 0, **options) -> tuple[float, float]:
    cfg = ConsistencyConfig(**{"intervals": 40, "solver": "heun", "huber": 0.0, "target_decay": 0.95, **options})
    method = Consistency(cfg, Setup(Flow(), (1,)))
    optim = {"student": OptimRecipe(1e-3, schedule="cosine")}
    return error_on_the_line(distil(method, LINE, start, optim, updates, batch, seed).student)


@pytest.mark.judges("consistency")
def test_consistency_on_the_line(line_start):
    """Setting M in small (800 updates of 256 instead of 3000 of 512)."""
    before = error_on_the_line(line_start)[0]
    assert before > 1.0                                                                             # it outputs the mean
    mean, median = consistency_on_the_line(line_start, 800, 256)
    assert mean < 0.25
    assert median < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "gan", "bound"), [(1, 0.0, 0.10), (1, 3e-3, 0.11), (4, 0.0, 0.13)], ids=["one", "GAN", "four"])
def test_dmd2_at_setting_r(steps, gan, bound):
    """Card 2: SW2 .082 in one step, .085 with the GAN, .10 in four steps; seeds differ by .02."""
    distance, modes, near = dmd2_on_the_ring(pretrained(RING, 128, 3000), 1200, 512, steps, gan)
    assert modes == 8
    assert distance < bound
    assert near > 0.72


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "bound", "within"), [(1.0, 0.08, 0.80), (1.2, 0.12, 0.66)])
def test_sid_at_setting_r(alpha, bound, within):
    """Card 11: SW2 .056 and .058 with 87 % within 4 std at alpha 1, .091 with 74 % at 1.2; seeds differ by .02."""
    distance, modes, near = sid_on_the_ring(pretrained(RING, 128, 3000), 3000, 512, alpha=alpha)
    assert modes == 8
    assert distance < bound
    assert near > within


@pytest.mark.slow
def test_swiftbrush_at_setting_r():
    """Card 8: SW2 .079 and .096 with 78 and 71 % within 4 std; seeds differ by .02 and 5 points."""
    distance, modes, near = swiftbrush_on_the_ring(pretrained(RING, 128, 3000), 3000, 512)
    assert modes == 8
    assert distance < 0.10
    assert near > 0.70


@pytest.mark.slow
def test_decoupled_dmd_at_the_cards_setting():
    """Card 3: at w = 3 mean 2.4 and std 1.1 along the axis; without guidance 1.49 and .30."""
    method, start = DecoupledDMD(DecoupledDMDConfig(), Setup(Flow(), (2,))), pretrained(FOUR, 128, 3000, labels=True)
    mean, std = guided_on_four(method, start, 1.0, 7500, 512, lines=[])
    assert mean == pytest.approx(1.49, abs=0.03)
    assert std == pytest.approx(0.30, abs=0.03)
    mean, std = guided_on_four(method, start, 3.0, 7500, 512, lines=[])
    assert mean == pytest.approx(2.4, abs=0.2)
    assert std == pytest.approx(1.1, abs=0.2)


@pytest.mark.slow
def test_random_guidance_at_the_same_setting():
    """No figure of the card: the fixed point is the teacher's plain class, 1.5 and .30, though w reaches 4."""
    method = PGSB(PGSBConfig(fake_updates=5), Setup(Flow(), (2,)))
    mean, std = guided_on_four(method, pretrained(FOUR, 128, 3000, labels=True), 1.0, 3000, 512, lines=[])
    assert mean == pytest.approx(1.5, abs=0.03)
    assert std == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
def test_dp_dmd_at_setting_r(monkeypatch):
    """Card 6: SW2 .095 and .094, 72 to 74 % within 4 std and agreement .89 and .87 at weight .05; agreement .83 and .78 without the term.

    Here SW2 .048, 92 %, agreement .78 and .94, without .59 and .87: it rises with the term at either seed. With the floor of the normaliser
    that methods use it does not (.77 and .92 against .81): a mean of two numbers is often small, and its inverse is then noise that turns
    modes into one another. The card wants .05 in so few dimensions.
    """
    monkeypatch.setattr(dp_dmd, "dmd_scale", partial(dmd_scale, floor=0.05))
    start = pretrained(RING, 128, 3000)
    with_term, without = ([dp_dmd_on_the_ring(start, 1000, 512, weight, seed) for seed in (0, 1)] for weight in (0.05, 0.0))
    assert all(modes == 8 for _, modes, _, _ in with_term)
    assert all(distance < 0.06 for distance, _, _, _ in with_term)
    assert all(near > 0.9 for _, _, near, _ in with_term)
    assert all(a[3] > b[3] + 0.03 for a, b in zip(with_term, without, strict=True))


@pytest.mark.slow
def test_tdm_at_setting_r():
    """Card 7: `subinterval` gives std .708 to .712 at t = .5 (exact .705), SW2 .032 to .043 there and .13 at the end."""
    std, rung, distance, modes = tdm_on_the_ring(pretrained(RING, 128, 3000), 3000, 512, "subinterval")
    assert modes == 8
    assert std == pytest.approx(0.705, abs=0.012)
    assert rung < 0.05
    assert distance < 0.15


@pytest.mark.slow
def test_the_published_target_of_tdm_spreads_the_trajectory():
    """Card 7: `tdm` makes the states at t = .5 too wide, std .76; here .80. The last step hides it: SW2 .10 to .14 at the end."""
    std, _, distance, modes = tdm_on_the_ring(pretrained(RING, 128, 3000), 3000, 512, "tdm")
    assert modes == 8
    assert std > 0.745
    assert distance < 0.16


@pytest.mark.slow
@pytest.mark.parametrize("experts", [True, False])
def test_phased_dmd_at_setting_r(experts):
    """Card 5: at t = .75 std .80 (exact .79) and SW2 .022 to .026; at the end SW2 .057 to .067, 87 % within 4 std."""
    std, state, distance, modes, near = phased_on_the_ring(pretrained(RING, 128, 3000), 6000, 512, experts)
    assert modes == 8
    assert std == pytest.approx(0.79, abs=0.015)
    assert state < 0.04
    assert distance < 0.08
    assert near > 0.82


@pytest.mark.slow
def test_imagine_flash_at_setting_m():
    """Card 14: own noise err .25 to .26, minority 33 to 35 %; fresh noise one point; without the shift .35 in three steps, .022 in one."""
    start = pretrained(LINE, 96, 3000)
    error, _, minority = flash_on_the_line(start, 3000, 512)
    assert error < 0.27
    assert 0.31 < minority < 0.37
    assert flash_on_the_line(start, 3000, 512, noise="fresh")[1] < 0.03
    whole = {"shifted": False, "teacher_steps": 16, "solver": "heun"}
    assert flash_on_the_line(start, 3000, 512, **whole)[0] == pytest.approx(0.35, abs=0.03)
    assert flash_on_the_line(start, 3000, 512, 1, **whole)[0] < 0.03


@pytest.mark.slow
def test_consistency_at_setting_m():
    """Card 3: err .058, median .037 after 3000 updates; repeats within .005."""
    mean, median = consistency_on_the_line(pretrained(LINE, 96, 3000), 3000, 512)
    assert mean < 0.065
    assert median < 0.045


@pytest.mark.slow
def test_lcm_settings_pay_what_the_card_says():
    """Card 5: N = 50, DDIM, Huber .001 and a target without EMA give .116, twice card 3's error."""
    start = pretrained(LINE, 96, 3000)
    mean, _ = consistency_on_the_line(start, 3000, 512, intervals=50, solver="ddim", huber=1e-3, target="student")
    assert 0.08 < mean < 0.14


def test_the_toys_own_yardsticks():
    """SW2 of two clouds of the teacher is at the floor; a cloud moved by d is |d|/sqrt(2) away; three of eight modes count as three."""
    a, b = (RING.data(8192, torch.Generator().manual_seed(i)) for i in (1, 2))
    assert sliced_wasserstein(a, b) < 0.06
    assert sliced_wasserstein(a, a + torch.tensor([0.6, 0.8])) == pytest.approx(0.5**0.5, abs=0.12)
    three = a[(torch.cdist(a, RING.means).argmin(1) < 3)]
    assert modes_covered(three, RING) == (3, pytest.approx(1.0, abs=0.01))
    assert modes_covered(torch.zeros(100, 2), RING) == (0, 0.0)
