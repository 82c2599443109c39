"""Driving a pipeline: its own loop, our times, states and answers; and nothing of it left behind."""

import itertools

import pytest
import torch
from zoo import basics, videos

from stepdistill.models.drive import Driven, drive, grid, watch
from stepdistill.models.load import first_order
from stepdistill.models.recording import record
from stepdistill.models.wiring import answered, primary


@pytest.fixture(scope="module")
def pipeline():
    return basics.stable_diffusion()


@pytest.fixture(scope="module")
def inputs():
    return {"prompt": ["a cat", "two dogs"], "height": 16, "width": 16, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def scheduler(pipeline):
    return first_order(pipeline.scheduler)[0]


def test_the_loop_runs_at_the_times_that_were_asked_for(pipeline, inputs, scheduler):
    turns = drive(pipeline, inputs, [900, 417.5, 3], scheduler=scheduler)
    assert [float(turn.time) for turn in turns] == [900, 417.5, 3]
    assert [float(turn.calls[-1].arguments["timestep"]) for turn in turns] == [900, 417.5, 3]


def test_states_are_ours_from_the_second_turn_on(pipeline, inputs, scheduler):
    given = torch.arange(2 * 4 * 8 * 8.0).reshape(2, 4, 8, 8)
    turns = drive(pipeline, inputs, [900, 500], scheduler=scheduler, states=lambda i, turns: given * i)
    assert torch.equal(turns[1].state, given)
    assert torch.equal(turns[1].calls[0].arguments["sample"], torch.cat([given, given]))           # both halves of the guidance


def test_answers_stand_in_for_the_network(pipeline, inputs, scheduler):
    seen = []

    def answers(turn, call, component, arguments):
        seen.append((turn, call, component))
        return (torch.ones(4, 4, 8, 8) * (turn + 1),) if component == "unet" else None

    turns = drive(pipeline, inputs, [900, 500], scheduler=scheduler, answers=answers)
    assert [float(turn.output.unique()) for turn in turns] == [1.0, 2.0]                          # guidance of equal halves changes nothing
    assert (1, 0, "unet") in seen


def test_a_run_can_end_early(pipeline, inputs, scheduler):
    assert len(drive(pipeline, inputs, [900, 500, 100], scheduler=scheduler, only=1)) == 1


def test_nothing_is_left_on_the_pipeline_even_after_an_error(pipeline, inputs, scheduler):
    before = pipeline.scheduler

    def answers(turn, call, component, arguments):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        drive(pipeline, inputs, [900], scheduler=scheduler, answers=answers)
    assert pipeline.scheduler is before
    assert "forward" not in pipeline.unet.__dict__
    assert "forward" not in pipeline.text_encoder.__dict__
    assert "step" not in before.__dict__
    assert "set_timesteps" not in before.__dict__


def test_with_grad_the_driven_loop_is_differentiable(pipeline, inputs, scheduler):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    turn = drive(pipeline, inputs, [900, 500], scheduler=scheduler, states=lambda i, turns: x, grad=True)[1]
    assert turn.output.sum().backward() is None
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_watching_lets_the_scheduler_work(pipeline, inputs, scheduler):
    walked = watch(pipeline, inputs, 3, scheduler=scheduler)
    assert len(walked) == 3
    for (_, _, after), (_, state, _) in itertools.pairwise(walked):
        assert torch.equal(after, state)


def test_the_grid_is_the_pipelines_own(pipeline, inputs):
    times, _ = grid(pipeline, inputs, 5, pipeline.scheduler)
    pipeline.scheduler.set_timesteps(5)
    assert torch.equal(times, pipeline.scheduler.timesteps)


def test_a_velocity_towards_the_data_is_turned_round():
    """LTX with conditions tells its scheduler a time for every token and hands over the negated velocity."""
    exhibit = videos.EXHIBITS["ltx-condition"]
    driven = Driven(exhibit.build())
    turn, = driven.drive(exhibit.inputs(["a"]), 1.0, [0.7, 0.2], only=1)
    assert torch.equal(turn.output, turn.calls[-1].output[0])


@pytest.mark.parametrize("name", ["cosmos", "text-to-video"])
def test_states_are_given_and_returned_as_the_network_sees_them(name):
    exhibit = videos.EXHIBITS[name]
    driven = record(exhibit.build(), exhibit.inputs).driven
    inputs = exhibit.inputs(["a", "b"])
    shape = (2, 16, 2, 4, 4) if name == "cosmos" else (2, 4, 3, 8, 8)

    def states(i, turns):
        return torch.randn(shape, generator=torch.Generator().manual_seed(i))

    turns = driven.drive(inputs, 3.0, [0.9, 0.6, 0.3], states=states)
    for i, turn in enumerate(turns[1:], 1):
        torch.testing.assert_close(turn.state, states(i, turns), rtol=1e-5, atol=1e-5)
        fed = turn.calls[0].arguments["hidden_states" if name == "cosmos" else "sample"]
        torch.testing.assert_close(fed[:2], turn.state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only", [1, 2, 3])
def test_a_pipeline_that_asks_its_scheduler_for_x0_first_is_stopped_after_as_many_turns(only):
    """Cosmos 1 calls step twice: a turn is the second call, guided."""
    exhibit = videos.EXHIBITS["cosmos"]
    driven = Driven(exhibit.build())
    turns = driven.drive(exhibit.inputs(["a", "b"]), 4.0, [0.9, 0.6, 0.3], only=only)
    assert len(turns) == only
    assert {len(turn.output) for turn in turns} == {2}
    assert {len(turn.calls) for turn in turns} == {2}


def test_calls_say_which_network_was_asked():
    exhibit = videos.EXHIBITS["wan22"]
    driven = Driven(exhibit.build())
    turns = driven.drive(exhibit.inputs(["a", "b"]), 3.0, [0.95, 0.3])
    assert {call.component for turn in turns for call in turn.calls} >= {"transformer", "transformer_2"}


@pytest.mark.parametrize("template", [(torch.zeros(2, 3), "rest"), [torch.zeros(2, 3)]])
def test_an_answer_keeps_the_structure_of_the_output(template):
    value = torch.ones(2, 3)
    changed = answered(template, value)
    assert type(changed) is type(template)
    assert primary(changed) is value
    assert list(changed[1:]) == list(template[1:])
