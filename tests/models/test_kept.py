"""A recording survives a file: the network is called as before, and pictures are made without the pipeline's encoders."""

from __future__ import annotations

import json

import pytest
import torch
from zoo import basics, images, videos

from stepdistill.models.kept import Learnt, pack, unpack
from stepdistill.models.prompted import LawCodec, PipelineCodec
from stepdistill.models.recording import record
from stepdistill.models.wiring import FromSample, Layout, Unrecordable, same

EXHIBITS = {**basics.EXHIBITS, **images.EXHIBITS, **{f"{name}-video": exhibit for name, exhibit in videos.EXHIBITS.items()}}
PROMPTS = ["a red apple", "a red house"]


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl", "sd3", "lumina2", "flux-dev", "cogview4", "z-image", "deepfloyd_if",
                                  "krea2", "wan21-video", "wan22-video", "sdxl-edm", "sana_sprint"])
def test_a_restored_recording_calls_its_network_as_before(name):
    """Packed, listed, shifted, embedded and doubled: every way of calling that a wiring knows, and pixels, latents and videos."""
    exhibit = EXHIBITS[name]
    pipeline = exhibit.build()
    recording = record(pipeline, exhibit.inputs)
    codec = PipelineCodec(recording, exhibit.inputs)
    alone = LawCodec.of(codec)
    learnt = Learnt.of(recording, alone.law)
    learnt = Learnt(json.loads(json.dumps(learnt.plain)), learnt.tensors)
    cond = recording.encode(exhibit.inputs(PROMPTS), 2)
    x_t = torch.randn(2, *recording.shape, generator=torch.Generator().manual_seed(0))
    t, expected = torch.tensor([0.6, 0.6]), codec.decode(x_t[:1])
    recording.denoiser.guidance = 3.0 if cond.nulls is not None or recording.wiring.embeds else 1.0
    before = recording.denoiser(x_t, t, cond)
    for part in set(pipeline.components) - {*recording.components, "vae", "scheduler"}:
        setattr(pipeline, part, None)
    again = learnt.restored(pipeline)
    again.denoiser.guidance = recording.denoiser.guidance
    after = again.denoiser(x_t, t, cond)
    assert torch.equal(before.raw, after.raw)
    assert torch.equal(before.x0, after.x0)
    assert (again.shape, again.keyword, again.offset, again.branches) == (
        recording.shape, recording.keyword, recording.offset, recording.branches)
    made = LawCodec(learnt.law(pipeline), again.shape, "").decode(x_t[:1])
    assert float((made - expected).abs().max()) < 1e-4


def test_frames_that_are_rows_of_the_scheduler_are_so_again():
    exhibit = videos.EXHIBITS["text-to-video"]
    recording = record(exhibit.build(), exhibit.inputs)
    assert Learnt.of(recording, None).restored(recording.driven.pipeline).driven.frames == 3


def test_a_decoder_that_is_more_than_a_vae_is_found_out():
    exhibit = images.EXHIBITS["kandinsky2_2"]
    with pytest.raises(Unrecordable, match="a VAE alone does not make the pictures"):
        LawCodec.of(PipelineCodec(record(exhibit.build(), exhibit.inputs), exhibit.inputs))


def test_a_vae_that_does_more_in_the_pipeline_is_found_out(monkeypatch):
    """Brightened behind the VAE: its law is none the worse, its pictures are."""
    exhibit = basics.EXHIBITS["sd15"]
    codec = PipelineCodec(record(exhibit.build(), exhibit.inputs), exhibit.inputs)
    real = codec.recording.driven.decode
    monkeypatch.setattr(codec.recording.driven, "decode", lambda *args: (real(*args) + 0.01).clamp(0, 1))
    with pytest.raises(Unrecordable, match="a VAE alone does not make the pictures"):
        LawCodec.of(codec)


def test_nestings_keep_their_types():
    value = {"a": [1, 2.5, (None, "x", True)], "b": FromSample(Layout("gather", (), torch.tensor([1, 0]), (2,), (2,)), False), "c": {}}
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(pack(value, "v", tensors)))
    again = unpack(plain, tensors.__getitem__)
    assert same({k: again[k] for k in "ac"}, {k: value[k] for k in "ac"})
    assert (again["b"].layout.how, again["b"].layout.source, again["b"].layout.index.tolist()) == ("gather", (2,), [1, 0])
    with pytest.raises(Unrecordable, match=r"v\.0 is a object, which cannot be kept"):
        pack([object()], "v", {})
