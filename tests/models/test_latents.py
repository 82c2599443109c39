"""Pictures to states: the law that a pipeline's tail follows is learnt, and inverted."""

from types import SimpleNamespace

import pytest
import torch
from zoo import basics, images, videos

from stepdistill.models.latents import learn_latents
from stepdistill.models.recording import record
from stepdistill.models.wiring import Unrecordable

ZOO = {**videos.EXHIBITS, **images.EXHIBITS, **basics.EXHIBITS}
LAWS = ("sd15", "sd3", "sana", "flux-dev", "flux2", "qwen-image", "z-image", "dit", "wan21", "ltx")


@pytest.mark.parametrize("name", LAWS)
def test_what_the_vae_decodes_comes_back_as_the_state(name, monkeypatch):
    """Scaled, shifted, normalised per channel, packed: a VAE that returns what it was given to decode must give the state back."""
    exhibit = ZOO[name]
    recording = record(exhibit.build(), exhibit.inputs)
    law = learn_latents(recording, exhibit.inputs(["a"]))
    state = torch.randn(2, *recording.shape)
    rows = torch.stack([(law.scale * row.flatten()[law.index] + law.shift).reshape(law.row) for row in state])
    monkeypatch.setattr(law.vae, "encode", lambda pixels: SimpleNamespace(latent=rows))
    assert torch.allclose(law.encode(torch.zeros(2, 3, 16, 16), recording.shape), state, atol=1e-4)


def test_the_law_of_stable_diffusion_is_its_scaling_factor():
    exhibit = ZOO["sd15"]
    recording = record(exhibit.build(), exhibit.inputs)
    law = learn_latents(recording, exhibit.inputs(["a"]))
    vae = recording.driven.pipeline.vae
    assert torch.allclose(law.scale, torch.full_like(law.scale, 1 / vae.config.scaling_factor), rtol=1e-5)
    assert law.row == (4, 8, 8)
    assert float(law.shift.abs().max()) == 0
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    expected = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(law.encode(pictures, recording.shape), expected, atol=1e-5)


def test_pictures_of_another_size_name_the_remedy():
    exhibit = ZOO["sd15"]
    recording = record(exhibit.build(), exhibit.inputs)
    law = learn_latents(recording, exhibit.inputs(["a"]))
    with pytest.raises(ValueError, match=r"teacher\.call\.height"):
        law.encode(torch.zeros(1, 3, 32, 16), recording.shape)


def test_a_pipeline_without_a_vae_has_no_law():
    exhibit = ZOO["ddpm"]
    with pytest.raises(Unrecordable, match="no VAE"):
        learn_latents(record(exhibit.build(), exhibit.inputs), exhibit.inputs(["a"]))
