"""Schedulers' frames: their own formulas, and ours for the same states."""

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
from zoo import images

from stepdistill.diffusion.prediction import target
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.export.schedule import plan
from stepdistill.models.doors import FRAMES, TrigFlowScheduler, door_of, pin
from stepdistill.models.drive import Driven
from stepdistill.models.wiring import Unrecordable


def numbers(seed):
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times():
    return torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)


def along(values):
    return values[:, None, None, None]


SCHEDULERS = {
    "edm": EDMEulerScheduler(), "edm_v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.3), "trigflow": SCMScheduler(),
    "karras in flow": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}
SCHEDULERS["karras in flow"].register_to_config(sigma_min=0.002, sigma_max=80.0)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_an_answer_survives_the_door(name, frame, kind):
    """What a network of any kind says of known x0 and eps, made into what the scheduler is given and back."""
    door, t, x0, eps = door_of(SCHEDULERS[name]), times(), numbers(0), numbers(1)
    process, own = door.framed(frame), door.process
    said = target(kind, x0, eps, process.alpha(t), process.sigma(t))
    state = door.size * own.add_noise(x0, eps, t)
    given = door.size * target(door.given, x0, eps, own.alpha(t), own.sigma(t))
    torch.testing.assert_close(state / along(door.factor(process, t)), process.add_noise(x0, eps, t), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(door.answer(given, state, process, kind, t), said, rtol=1e-7, atol=1e-8)
    p, q = door.parts(process, kind, t)
    torch.testing.assert_close(along(p) * said + along(q) * state / door.size, given / door.size, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["edm", "edm_v"])
def test_the_raw_output_of_edm_is_v(name):
    scheduler, sigma = SCHEDULERS[name], 0.7
    door, sign = door_of(scheduler), -1 if name == "edm" else 1
    process, x, out = door.framed("vp"), numbers(0), numbers(1)
    t = process.time_of(torch.tensor(-2.0).double() * torch.tensor(sigma / door.size).double().log())
    x0 = scheduler.precondition_outputs(x, out, sigma)
    torch.testing.assert_close(door.answer(x0, x, process, "v", t), sign * out, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x / door.factor(process, t), scheduler.precondition_inputs(x, sigma), rtol=1e-6, atol=1e-7)


def test_trigflow_steps_stay_on_the_curve_of_their_x0_and_noise():
    scheduler, x0, eps = TrigFlowScheduler(), numbers(0), numbers(1)
    scheduler.set_timesteps(3, intermediate_timesteps=None)
    x = torch.cos(scheduler.timesteps[0]) * x0 + torch.sin(scheduler.timesteps[0]) * eps
    for now, after in zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False):
        x, clean = scheduler.step(torch.cos(now) * eps - torch.sin(now) * x0, now, x)
        torch.testing.assert_close(x, torch.cos(after) * x0 + torch.sin(after) * eps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clean, x0, rtol=1e-5, atol=1e-5)


def test_pinned_times_are_the_schedulers_own():
    edm, scm = EDMEulerScheduler(), SCMScheduler()
    edm.set_timesteps(3)
    before = edm.timesteps, edm.sigmas
    pin(edm, edm.timesteps.tolist())
    torch.testing.assert_close((edm.timesteps, edm.sigmas), before, rtol=1e-5, atol=1e-6)
    scm.set_timesteps(2)
    pin(scm, [1.5, 0.7])
    assert scm.timesteps.tolist() == pytest.approx([1.5, 0.7, 0.0])


def test_most_schedulers_have_no_door_and_a_consistency_model_no_entry():
    assert door_of(DDIMScheduler()) is None
    assert door_of(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)) is None
    with pytest.raises(Unrecordable, match="a student already"):
        door_of(CMStochasticIterativeScheduler())


def test_an_export_from_behind_a_door_is_refused():
    exhibit = images.EXHIBITS["sana_sprint"]
    with pytest.raises(ValueError, match="SanaSprintPipeline cannot be exported as a pipeline: its scheduler"):
        plan(Driven(exhibit.build()), exhibit.inputs(["a"]), SamplerSpec((1.0,)))
