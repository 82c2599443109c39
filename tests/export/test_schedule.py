"""Finding a scheduler for pipelines of other kinds than Stable Diffusion's, and the scheduler of our own by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import images, videos

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, steps
from stepdistill.diffusion.times import trailing
from stepdistill.export.schedule import plan
from stepdistill.models.drive import Driven, watch
from stepdistill.models.recording import record
from stepdistill.pipelines.few_step_scheduler import FewStepScheduler

EULER, OWN = "FlowMatchEulerDiscreteScheduler", "FewStepScheduler"


@pytest.mark.parametrize(("name", "spec", "scheduler"), [
    ("omnigen", SamplerSpec(trailing(4)), OWN),                                  # counts towards the data, where Euler re-noises wrongly
    ("omnigen", SamplerSpec(trailing(4), renoise=0), EULER),
    ("sana", SamplerSpec(trailing(4)), EULER),                                   # its teacher's scheduler is a multistep solver
    ("cogview3", SamplerSpec(trailing(2)), OWN),                                 # a table that neither LCM nor DDIM can build
    ("qwen-image", SamplerSpec(trailing(3)), EULER),                             # dynamic shifting: the pipeline hands its own sigmas over
    ("hidream", SamplerSpec((1.0, 0.5, 0.4, 0.1), renoise=0.5), OWN),
    ("sana", SamplerSpec(trailing(4), clip_x0=50.0), OWN),                       # a bound that is rarely met is one
])
def test_every_kind_of_pipeline_finds_one(name: str, spec: SamplerSpec, scheduler: str) -> None:
    """`plan` proves what it returns."""
    exhibit = images.EXHIBITS[name]
    inputs = exhibit.inputs(["a red apple"])
    driven = Driven(exhibit.build())
    driven.fit_shift(inputs, 3.0)
    chosen = plan(driven, inputs, spec)
    assert (type(chosen.scheduler).__name__, chosen.stock) == (scheduler, scheduler != OWN)


def test_a_pipeline_that_negates_its_answers_walks_as_our_sampler_does() -> None:
    """LTX with conditions hands over a time for every token besides; the whole pipeline runs, with its real network."""
    exhibit, spec = videos.EXHIBITS["ltx-condition"], SamplerSpec((1.0, 0.6, 0.3), renoise=0)
    recording, inputs = record(exhibit.build(), exhibit.inputs), exhibit.inputs(["a red apple"])
    inputs = {**inputs, "guidance_scale": 1.0}
    chosen = plan(recording.driven, inputs, spec)
    assert not chosen.stock
    walked = watch(recording.driven.pipeline, inputs, 3, scheduler=chosen.scheduler)
    with torch.no_grad():
        *_, last = steps(recording.denoiser, walked[0][1], spec, recording.encode(inputs, 1), Draws(0, range(1)))
    torch.testing.assert_close(last.x0, walked[-1][2], rtol=1e-4, atol=1e-4)


def scheduler() -> FewStepScheduler:
    return FewStepScheduler([999, 499], [0.1, 0.8], [0.9, 0.6], [0.2], "v_prediction", 1.0)


def test_our_scheduler_survives_saving_and_counts_its_steps(tmp_path: Path) -> None:
    scheduler().save_pretrained(tmp_path)
    loaded = FewStepScheduler.from_pretrained(tmp_path)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    outputs = []
    for made in (scheduler(), loaded):
        made.set_timesteps(2)
        assert made.timesteps.tolist() == [999, 499]
        outputs.append([made.step(y, t, x, generator=torch.Generator().manual_seed(0)) for t in made.timesteps])
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first.prev_sample, second.prev_sample)
        assert first.pred_original_sample.abs().max() <= 1
    assert torch.equal(outputs[0][1].prev_sample, outputs[0][1].pred_original_sample)
    loaded.set_begin_index(1)
    assert torch.equal(loaded.step(y, 499, x, return_dict=False)[0], outputs[0][1].prev_sample)


def test_our_scheduler_refuses_another_grid() -> None:
    for arguments in ({"num_inference_steps": 3}, {"sigmas": [1.0]}, {"num_inference_steps": 2, "timesteps": [9, 8, 7]}):
        with pytest.raises(ValueError, match="trained for 2 steps"):
            scheduler().set_timesteps(**arguments)
    scheduler().set_timesteps(sigmas=[1.0, 0.5], mu=1.2)
    with pytest.raises(ValueError, match="one kept less"):
        FewStepScheduler([999, 499], [0.1, 0.8], [0.9, 0.6])
