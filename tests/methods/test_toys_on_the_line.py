"""Trajectory methods on the mixture of two modes on a line (setting M), whose flow map is known: error of each sample from its noise.

The short versions train for 300 updates of 256, the slow ones for the 3000 of 512 of the method cards. A student that outputs the mean of
the data is off by more than 1. SW2 has a floor of about .09: how often either mode was drawn.
"""

import pytest
import torch
from oracles import MixtureTeacher
from toys import Oracle, distil, pretrained, sliced_wasserstein

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec, steps
from stepdistill.diffusion.times import LogNormal, trailing
from stepdistill.methods.base import Method, Setup
from stepdistill.methods.ect import ECT, ECTConfig
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.methods.pcm import PCM, PCMConfig
from stepdistill.methods.progressive import Progressive, ProgressiveConfig
from stepdistill.methods.tcd import TCD, TCDConfig
from stepdistill.methods.tdd import TDD, TDDConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.recipe import OptimRecipe

LINE = MixtureTeacher(Flow(), "flow")


def on_the_line(count: int) -> Setup:
    return Setup(Flow(), (1,), SamplerSpec(trailing(count)))


@pytest.fixture(scope="module")
def short_start() -> Denoiser:
    return pretrained(LINE, 96, 500, batch=256)


@pytest.fixture(scope="module")
def start() -> Denoiser:
    return pretrained(LINE, 96, 3000)


def student_of(method: Method, start: Denoiser, updates: int = 3000, batch: int = 512, schedule: str = "cosine") -> Denoiser:
    return distil(method, LINE, start, {"student": OptimRecipe(1e-3, schedule=schedule)}, updates, batch).student


def short(method: Method, start: Denoiser) -> Denoiser:
    return student_of(method, start, 300, 256)


def measured(student: Denoiser, spec: SamplerSpec) -> tuple[float, float, float]:
    """(mean error against M(z, 1 -> 0), SW2 from the data, standard deviation) of 20,000 samples."""
    z, *fresh = (torch.randn(20_000, 1, generator=torch.Generator().manual_seed(i)) for i in range(3, 4 + len(spec.times)))
    walk = steps(student, z, spec, Conditioning(), Draws(0), noise=lambda i: fresh[i])
    x0 = [step.x0 for step in walk][-1].double()
    error = (x0 - LINE.flow_map(z, 1.0, 0.0)).abs().mean()
    return float(error), sliced_wasserstein(x0, LINE.data(20_000, torch.Generator().manual_seed(2))[:, None]), float(x0.std())


def at(count: int, renoise: float = 0.0) -> SamplerSpec:
    return SamplerSpec(trailing(count), renoise=renoise)


SQUARED = {"huber": 10.0, "times": LogNormal(0.1, 2.0)}              # in one dimension a plain norm would learn medians; data std 1.67


@pytest.mark.parametrize("method", [
    pytest.param(LCM(LCMConfig(), on_the_line(1)), marks=pytest.mark.judges("lcm")),
    pytest.param(PCM(PCMConfig(), on_the_line(4)), marks=pytest.mark.judges("pcm")),
    pytest.param(ECT(ECTConfig(double_every=40, **SQUARED), on_the_line(1)), marks=pytest.mark.judges("ect")),
    pytest.param(Progressive(ProgressiveConfig(start=8), on_the_line(2)), marks=pytest.mark.judges("progressive"))],
    ids=["lcm", "pcm", "ect", "progressive"])
def test_samples_come_closer_to_where_the_flow_takes_their_noise(short_start, method):
    spec = method.sampler()
    assert measured(short(method, short_start), spec)[0] < 2 / 3 * measured(short_start, spec)[0]


@pytest.mark.parametrize("method", [
    pytest.param(TCD(TCDConfig(), on_the_line(4)), marks=pytest.mark.judges("tcd")),
    pytest.param(TDD(TDDConfig(dropout=0), on_the_line(4)), marks=pytest.mark.judges("tdd"))], ids=["tcd", "tdd"])
def test_samples_with_fresh_noise_come_closer_to_the_data(short_start, method):
    spec = method.sampler()
    assert measured(short(method, short_start), spec)[1] < 2 / 3 * measured(short_start, spec)[1]


@pytest.mark.slow
def test_lcm_at_setting_m(start):
    """Card 5: err .116 in one step (seeds .10 and .13), SW2 .21, .16 and .13 in 1, 2 and 4 re-noised ones."""
    student = student_of(LCM(LCMConfig(), on_the_line(1)), start)
    assert measured(student, at(1))[0] < 0.125
    for count, bound in ((1, 0.24), (2, 0.19), (4, 0.16)):
        assert measured(student, at(count, 1.0))[1] < bound


@pytest.mark.slow
def test_tcd_at_setting_m(start):
    """Card 7: err .27, .14, .27, .33 in 1, 2, 4, 8 deterministic steps, too wide by .26 to .31.

    Its SW2 with noise is not found: it says .27 and .38 in 4 and 8 steps at gamma .3, and .17 in 8 at 1. A loop that shares no code with
    the sampler gives .08, .08 and .46 for this very student: a little noise cures the width, all of it makes the samples too narrow.
    """
    student = student_of(TCD(TCDConfig(), on_the_line(4)), start)
    for count, bound in ((1, 0.30), (2, 0.17), (4, 0.30), (8, 0.36)):
        assert measured(student, at(count))[0] < bound
    assert measured(student, at(4, 0.3))[1] < 0.13
    assert measured(student, at(8, 0.3))[1] < 0.13
    assert measured(student, at(8, 1.0))[1] == pytest.approx(0.45, abs=0.06)
    assert measured(student, at(8))[2] - 1.666 == pytest.approx(0.285, abs=0.03)


@pytest.mark.slow
def test_tdd_at_setting_m(start):
    """Card 9: SW2 .07 to .12 in 4 steps with the eta of training; without it err .17 and .26 in 4 and 8, too wide."""
    method = TDD(TDDConfig(dropout=0.0), on_the_line(4))
    student = student_of(method, start)
    assert measured(student, method.sampler())[1] < 0.14
    assert measured(student, at(2))[0] < 0.1
    assert 0.1 < measured(student, at(4))[0] < 0.22


@pytest.mark.slow
def test_pcm_at_setting_m(start):
    """Card 8: N = 40 and 4 phases give err .019 with SW2 at the floor; 8 steps .10, one step the mean.

    One phase is LCM of as many points, bit for bit (test_pcm); seeds are at .09 to .13 with either, the card at .095.
    """
    method = PCM(PCMConfig(), on_the_line(4))
    student = student_of(method, start)
    error, distance, _ = measured(student, method.sampler())
    assert error < 0.025
    assert distance < 0.14
    assert 0.05 < measured(student, at(8))[0] < 0.15
    assert measured(student, at(1))[0] > 0.9
    assert measured(student_of(PCM(PCMConfig(), on_the_line(1)), start), at(1))[0] < 0.125


@pytest.mark.slow
def test_progressive_at_setting_m(start):
    """Card 1, test 10c: 8 steps to 4, 2 and 1 end within the 8-step teacher's own error plus .01."""
    method = Progressive(ProgressiveConfig(start=8), on_the_line(1))
    student = student_of(method, start, 9000)
    assert measured(student, at(1))[0] < measured(Oracle(LINE).denoiser(), at(8))[0] + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("curriculum", ["ect", "ict"])
def test_ect_at_setting_m(start, curriculum):
    """The card has no figure: err .16 and, re-noised in 4 steps, SW2 at the floor (ECT); a denoiser alone is off by 1.5."""
    student = student_of(ECT(ECTConfig(double_every=375, curriculum=curriculum, **SQUARED), on_the_line(1)), start)
    assert measured(student, at(1))[0] < 0.2
    assert measured(student, at(4, 1.0))[1] < 0.12
