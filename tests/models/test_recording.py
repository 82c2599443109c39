"""Recorded adapters against the pipelines themselves: tiny networks of the real classes, parity to 1e-4."""

from dataclasses import replace

import pytest
import torch
from diffusers import EDMEulerScheduler
from zoo import basics, images, videos

from stepdistill.models import parity
from stepdistill.models.parity import forced, loop, prove
from stepdistill.models.recording import record, usual_inputs
from stepdistill.models.wiring import FromClock, FromCondition, FromSample, FromScale, Unrecordable, leaves_of

BOUND = 1e-4
ZOO = {**basics.EXHIBITS, **images.EXHIBITS, **{k: v for k, v in videos.EXHIBITS.items() if k != "kandinsky5"}}
NAMED = ("ddpm", "ddim", "dit", "sd15", "sd21-v", "sdxl", "sd3", "pixart-alpha", "pixart-sigma", "hunyuandit", "sana", "lumina2",
         "auraflow", "chroma", "cogview4", "flux-dev", "flux-schnell", "flux2", "qwen-image", "z-image", "kandinsky3",
         "wan21", "wan22", "cogvideox", "ltx", "hunyuan-video", "mochi", "latte", "animatediff",
         "sdxl-edm", "sana_sprint", "cosmos", "cosmos2-image", "text-to-video", "ltx-condition")
REFUSED = {
    "glm_image": "made anew for every call", "qwen-image21": "made anew for every call",
    "cosmos2-video": "a picture that the pipeline is given", "consistency_models": "a student already",
    "stable_cascade": "neither a DDPM table nor flow matching",
    "anyflow": "neither a DDPM table nor flow matching", "hunyuan_image-distilled": "timestep_r is the time of the next step"}


def recorded(name):
    exhibit = ZOO[name]
    return record(exhibit.build(), exhibit.inputs), exhibit


def leaves(recording, kind):
    return {path: leaf for path, leaf in leaves_of(recording.wiring.arguments) if isinstance(leaf, kind)}


@pytest.mark.parametrize("name", NAMED)
def test_parity(name):
    recording, exhibit = recorded(name)
    proof = prove(recording, exhibit.inputs, exhibit.other_shape or None)
    assert proof.worst < BOUND, proof


UNFIT = {"omnigen", "stable_cascade-prior", "ltx2", "skyreels-v2-forcing",
         "anyflow-far"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NAMED) - set(REFUSED) - UNFIT))
def test_parity_of_the_others(name):
    recording, exhibit = recorded(name)
    proof = prove(recording, exhibit.inputs, exhibit.other_shape or None)
    assert proof.worst < BOUND, proof


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_recorded_says_why(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        recorded(name)


@pytest.mark.parametrize(("name", "offset", "law"), [
    ("sd15", 0.0, "linear"), ("z-image", 1.0, "linear"), ("kandinsky3", 1.0, "linear"), ("qwen-image", 0.0, "norm kept"),
    ("lumina", 0.0, "three channels"), ("longcat_image", 0.0, "norm capped"), ("joyimage", 0.0, "norm kept, axis 2")])
def test_guidance_laws_are_told_apart(name, offset, law):
    recording, _ = recorded(name)
    assert (recording.offset, recording.denoiser.law) == (offset, law)


def test_embedded_guidance_is_an_input():
    recording, exhibit = recorded("flux2")
    assert recording.offset is None
    assert recording.keyword == "guidance_scale"
    assert leaves(recording, FromScale)["guidance"].a == 1.0
    cond = recording.encode(exhibit.inputs(["a"]), 1)
    x_t, t = torch.randn(1, *recording.shape), torch.tensor([0.5])
    low, high = (recording.denoiser(x_t, t, cond, w=w).raw for w in (1.0, 4.0))
    assert not torch.allclose(low, high)
    assert cond.nulls is None


def test_a_guidance_embedding_made_by_the_pipeline_is_part_of_the_condition():
    recording, exhibit = recorded("latent_consistency")
    weak, strong = (recording.encode(exhibit.inputs(["a"]), 1, number) for number in (2.0, 8.0))
    assert not torch.equal(weak["timestep_cond"], strong["timestep_cond"])
    assert any("part of the condition" in note for note in recording.notes)


@pytest.mark.parametrize(("name", "basis", "a", "b"), [
    ("sd15", "index", 1.0, 0.0), ("sd3", "1000sigma", 1.0, 0.0), ("flux-dev", "1000sigma", 0.001, 0.0),
    ("lumina2", "1000sigma", -0.001, 1.0),
    ("cogview4", "1000t", 1.0, 0.0), ("mochi", "1000alpha", 1.0, 0.0)])
def test_clocks(name, basis, a, b):
    recording, _ = recorded(name)
    (clock,) = leaves(recording, FromClock).values()
    assert (clock.basis, clock.a, clock.b) == (basis, pytest.approx(a, rel=1e-5), b)


@pytest.mark.parametrize(("name", "frame", "kind", "sign"), [
    ("cosmos2-image", "flow", "flow", 1), ("cosmos", "vp", "v", -1), ("sdxl-edm", "vp", "v", 1), ("sana_sprint", "flow", "flow", 1)])
def test_frames_and_what_is_predicted_in_them(name, frame, kind, sign):
    """Cosmos 2 and SANA-Sprint are flow matching behind their doors, and EDM's raw output is v, or minus v."""
    recording, _ = recorded(name)
    assert (recording.driven.frame, recording.denoiser.kind, recording.wiring.sign) == (frame, kind, sign)


def test_a_frame_that_no_network_is_known_to_be_fed_in_is_refused(monkeypatch):
    real = EDMEulerScheduler.precondition_inputs
    monkeypatch.setattr(EDMEulerScheduler, "precondition_inputs", lambda self, x, sigma: 2 * real(self, x, sigma))
    with pytest.raises(Unrecordable, match="none of the frames own, flow, vp"):
        recorded("sdxl-edm")


def test_an_output_law_that_is_no_prediction_is_refused(monkeypatch):
    real = EDMEulerScheduler.precondition_outputs
    monkeypatch.setattr(EDMEulerScheduler, "precondition_outputs", lambda self, x, out, sigma: real(self, x, out, sigma) + 0.1 * x)
    with pytest.raises(Unrecordable, match="fits none of eps, x0, v, flow"):
        recorded("sdxl-edm")


def test_half_precision_behind_a_door_names_the_remedy():
    exhibit = ZOO["sdxl-edm"]
    with pytest.raises(Unrecordable, match=r"half precision is too coarse .* load it with dtype float32"):
        record(exhibit.build().to(torch.bfloat16), exhibit.inputs)


def test_a_distilled_model_says_that_it_is_one():
    assert any("the end of a trajectory, not a mean" in note for note in recorded("sana_sprint")[0].notes)


def test_lists_slices_and_packed_states():
    listed, _ = recorded("z-image")
    (sample,) = leaves(listed, FromSample).values()
    assert sample.listed
    assert sample.layout.how == "singles"
    assert listed.wiring.layout.how == "squeezed"
    learned_sigma, _ = recorded("dit")
    assert learned_sigma.wiring.layout.how == "slice"
    assert learned_sigma.shape == (4, 8, 8)
    packed, _ = recorded("qwen-image")
    assert packed.shape == (16, 16)


def test_a_mask_that_only_one_half_has_splits_the_guided_call():
    """Qwen-Image hands over no mask where all prompts are full."""
    recording, exhibit = recorded("qwen-image")
    cond = recording.encode(exhibit.inputs(["an old ship in a storm", "a very large blue circle"]), 2)
    assert cond["encoder_hidden_states_mask"] is None
    assert cond.nulls["encoder_hidden_states_mask"] is not None
    assert not cond.joins(cond.null)


def test_a_condition_can_be_sliced_and_joined_whatever_its_leaves_are():
    recording, exhibit = recorded("z-image")
    whole = recording.encode(exhibit.inputs(["a red apple", "x"]), 2)
    parts = [whole.slice(slice(i, i + 1)) for i in range(2)]
    x_t, t = torch.randn(2, *recording.shape), torch.tensor([0.3, 0.8])
    for cond in (parts[0].cat(parts[1]), whole.slice(torch.tensor([0, 1]))):
        assert torch.allclose(recording.denoiser(x_t, t, cond, w=3.0).raw, recording.denoiser(x_t, t, whole, w=3.0).raw, atol=1e-4)


def test_frames_that_the_scheduler_sees_as_rows_are_an_axis_of_the_state():
    recording, exhibit = recorded("text-to-video")
    assert recording.shape == (4, 3, 8, 8)
    assert recording.driven.frames == 3
    assert recording.decode(torch.randn(2, *recording.shape), exhibit.inputs(["a", "b"])).shape[:2] == (2, 3)


@pytest.mark.parametrize("name", ["dit", "latte", "animatediff"])
def test_a_doubled_state_and_frames_folded_behind_the_scheduler_are_no_rows(name):
    assert recorded(name)[0].driven.frames == 1


def test_prompts_of_a_pipeline_whose_default_grid_is_for_two_steps():
    pipeline = images.EXHIBITS["sana_sprint"].build()
    inputs = usual_inputs(pipeline)(["a"])
    assert inputs == {"prompt": ["a"], "intermediate_timesteps": None}


def test_two_networks_that_take_turns(monkeypatch):
    """Wan 2.2: parity on both sides of the boundary and right beside it; a boundary elsewhere shows."""
    recording, exhibit = recorded("wan22")
    pipeline, network = recording.driven.pipeline, recording.denoiser.network
    assert recording.components == ("transformer", "transformer_2")
    assert list(network.experts) == [pipeline.transformer, pipeline.transformer_2]
    (boundary,) = network.boundaries
    assert float(recording.driven.process.sigma(torch.tensor(boundary, dtype=torch.float64))) == pytest.approx(0.875, abs=2e-6)
    assert any("take turns, the next from t = 0.7 on down, all under one guidance" in note for note in recording.notes)
    monkeypatch.setattr(parity, "TIMES", (boundary + 1e-4, boundary - 1e-4))
    assert forced(recording, exhibit.inputs) < BOUND
    network.boundaries = (boundary - 2e-4,)
    assert forced(recording, exhibit.inputs) > 10 * BOUND
    network.boundaries = (0.5,)
    assert loop(recording, exhibit.inputs) > 10 * BOUND


def test_a_guidance_of_its_own_for_the_second_network_is_refused():
    exhibit = ZOO["wan22"]
    with pytest.raises(Unrecordable, match="guidance_scale_2 guides the second network by a number of its own"):
        record(exhibit.build(), lambda prompts: {**exhibit.inputs(prompts), "guidance_scale_2": 3.0})


def test_networks_that_take_no_turns_are_refused():
    """Time may choose between networks of one class only."""
    exhibit = ZOO["wan22"]
    pipeline = exhibit.build()
    other = type("Other", (type(pipeline.transformer_2),), {})
    pipeline.transformer_2.__class__ = other
    with pytest.raises(Unrecordable, match=r"several networks take part \(transformer, transformer_2\)"):
        record(pipeline, exhibit.inputs)


def test_position_ids_and_rotary_tables_follow_the_size_of_the_state():
    recording, exhibit = recorded("flux-schnell")
    small, large = (recording.encode({**exhibit.inputs(["a"]), **other}, 1) for other in ({}, exhibit.other_shape))
    assert leaves(recording, FromCondition)["img_ids"].shared
    assert small["img_ids"].shape != large["img_ids"].shape


def test_the_recorded_network_is_differentiable_in_state_and_weights():
    recording, exhibit = recorded("sd15")
    cond = recording.encode(exhibit.inputs(["a"]), 1)
    x_t = torch.randn(1, *recording.shape, requires_grad=True)
    recording.denoiser.network.requires_grad_(True)
    recording.denoiser(x_t, torch.tensor([0.5]), cond, w=3.0).x0.square().sum().backward()
    assert bool(x_t.grad.abs().sum() > 0)
    assert all(p.grad is not None for p in recording.denoiser.network.parameters())


@pytest.mark.parametrize("name", ["sd15", "flux-dev"])
@pytest.mark.parametrize("fault", ["sign", "clock", "law"])
def test_the_proof_fails_on_a_wrong_recording(name, fault):
    recording, exhibit = recorded(name)
    wiring, denoiser = recording.wiring, recording.denoiser
    if fault == "sign":
        denoiser = replace(denoiser, wiring=replace(wiring, sign=-wiring.sign))
    elif fault == "law":
        denoiser = replace(denoiser, law="norm capped")
    else:
        bent = {k: replace(v, a=v.a * 1.05) if isinstance(v, FromClock) else v for k, v in wiring.arguments.items()}
        denoiser = replace(denoiser, wiring=replace(wiring, arguments=bent))
    wrong = replace(recording, denoiser=denoiser)
    assert forced(wrong, exhibit.inputs) > 10 * BOUND
    assert loop(wrong, exhibit.inputs) > 10 * BOUND


def test_a_recording_in_bfloat16_learns_the_same():
    exhibit = ZOO["sd3"]
    full, half = record(exhibit.build(), exhibit.inputs), record(exhibit.build().to(torch.bfloat16), exhibit.inputs)
    assert half.wiring.layout == full.wiring.layout
    assert half.wiring.sign == full.wiring.sign
    assert {k: (v.basis, v.a, v.b) for k, v in leaves(half, FromClock).items()} == {
        k: (v.basis, v.a, v.b) for k, v in leaves(full, FromClock).items()}
