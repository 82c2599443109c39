"""One network at several sizes: at each of them called as the pipeline calls it there."""

from pathlib import Path

import pytest
import torch
from zoo import basics, images, videos

from stepdistill.diffusion.process import Flow
from stepdistill.models import prompted
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.parity import TIMES, difference
from stepdistill.models.sizes import for_sizes
from stepdistill.models.wiring import FromSample, Layout, Wiring

FAMILIES = {
    "sd15": basics.EXHIBITS["sd15"], "sdxl": images.EXHIBITS["sdxl"], "sd35_medium": images.EXHIBITS["sd3"],
    "pixart_sigma": images.EXHIBITS["pixart-sigma"], "flux_dev": images.EXHIBITS["flux-dev"], "sana": images.EXHIBITS["sana"],
    "qwen_image": images.EXHIBITS["qwen-image"], "z_image": images.EXHIBITS["z-image"], "wan21": videos.EXHIBITS["wan21"],
    "cogvideox_2b": videos.EXHIBITS["cogvideox"], "ltx": videos.EXHIBITS["ltx"],
}
PROMPTS = ("a red apple", "a cat on the mat")
GUIDANCE = 3.0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_size_is_called_as_the_pipeline_calls_it(name, monkeypatch):
    """Wide, tall and square, at times that no recording was fitted to; packed states of wide and tall have one shape."""
    exhibit = FAMILIES[name]
    monkeypatch.setattr(prompted, "usual_inputs", lambda pipeline, **call: lambda prompts: {**exhibit.inputs(prompts), **call})
    monkeypatch.setattr(prompted, "load_pipeline", lambda folder, **options: exhibit.build())
    given = exhibit.inputs(PROMPTS)
    short, long = given["height"], exhibit.other_shape["width"]
    calls = [{"height": h, "width": w} for h, w in ((short, short), (short, long), (long, short))]
    first = prompted.load_prompted(Path(name), PROMPTS, calls[0], device="cpu", autocast=None, dtype=torch.float32, guidance=GUIDANCE,
                                   taps=(), notes={})
    teachers = [first, *(first.at(call, PROMPTS) for call in calls[1:])]
    denoiser = first.of_sizes(teachers[1:]).denoiser
    rows = torch.arange(2)
    for teacher in teachers:
        driven, number = teacher.recording.driven, GUIDANCE if teacher.recording.keyword else None
        turns = driven.drive(teacher.inputs(PROMPTS), number, TIMES,
                             states=lambda i, turns: torch.randn(turns[0].state.shape, generator=torch.Generator().manual_seed(i)))
        for turn in turns:
            assert turn.state.shape[1:] == teacher.shape
            t = driven.time(turn.time).expand(2)
            with torch.no_grad():
                ours = denoiser(turn.state[:2].float(), t, teacher.condition(rows), w=teacher.recording.w(number)).raw
            assert difference(driven.flip * ours, turn.output[:2]) < 1e-4


def recorded(shift=1.0, law="linear", layout="same"):
    return Denoiser(torch.nn.Identity(), Flow(shift), "flow", "1000sigma", law=law,
                    wiring=Wiring({"x": FromSample(Layout(layout, (0,) if layout == "singles" else ()), False)}, Layout(), 1.0))


@pytest.mark.parametrize(("other", "message"), [
    (recorded(shift=2.0), "shifts its noise with the size of the picture"), (recorded(law="norm"), "calls its network in another way"),
    (recorded(layout="singles"), "calls its network in another way at another size")])
def test_what_differs_between_sizes_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        for_sizes([recorded(), other], [(16, 4), (16, 4)])


def test_a_state_of_no_size_that_was_recorded_names_the_remedy():
    denoiser = for_sizes([recorded(), recorded(layout="singles")], [(4, 8, 8), (4, 8, 12)])
    with pytest.raises(ValueError, match=r"recorded for states of \(4, 8, 8\), \(4, 8, 12\) and called with \(4, 12, 8\)"):
        denoiser.wiring.read(torch.zeros(1, 4, 12, 8), torch.zeros(1, 4, 12, 8))


def test_the_shape_of_the_state_chooses_how_the_network_is_called():
    denoiser = for_sizes([recorded(), recorded(layout="singles")], [(4, 8, 8), (4, 8, 12)])
    for shape in ((4, 8, 8), (4, 8, 12)):
        x = torch.zeros(1, *shape)
        seen = denoiser.wiring.call(x, torch.tensor([0.5]), {}, Flow(), 1.0, torch.float32)["x"]
        assert seen.shape == ((1, 4, 8, 8) if shape == (4, 8, 8) else (1, 1, 4, 8, 12))
