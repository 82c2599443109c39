"""Attention back ends: which modules switch, what is refused, and nothing changed for the rest of the process."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny import tiny_recipe
from toys import tiny_dit
from zoo import basics, images

from stepdistill.models import attention
from stepdistill.models.attention import switch, unusable
from stepdistill.training import loop
from stepdistill.training.assemble import assemble

CPU = torch.device("cpu")


@pytest.fixture
def usable(monkeypatch):
    """As on a machine where every backend works."""
    monkeypatch.setattr(attention, "unusable", lambda name, device: None)


@pytest.fixture
def flux():
    return images.EXHIBITS["flux-schnell"].build().transformer


def processors(network):
    """Those that ask the dispatcher."""
    return [m.processor for m in network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]


def test_the_dispatcher_is_told_per_module_and_the_process_keeps_its_default(flux, usable):
    before = _AttentionBackendRegistry._active_backend
    assert switch(flux, "xformers", CPU) == len(processors(flux)) > 0
    assert {p._attention_backend for p in processors(flux)} == {"xformers"}
    assert _AttentionBackendRegistry._active_backend is before
    assert {p._attention_backend for p in processors(images.EXHIBITS["flux-schnell"].build().transformer)} == {None}


def test_sdpa_gives_what_auto_gives(flux):
    exhibit = images.EXHIBITS["flux-schnell"]
    pipeline = exhibit.build()
    call = {**exhibit.inputs(["a"]), "num_inference_steps": 1, "output_type": "latent"}
    outputs = []
    for _ in range(2):
        outputs.append(pipeline(**call, generator=torch.Generator().manual_seed(0))[0])
        assert switch(pipeline.transformer, "sdpa", CPU) == len(processors(pipeline.transformer))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_older_modules_swap_their_processor(usable, monkeypatch):
    asked = []
    monkeypatch.setattr(attention.Attention, "set_use_memory_efficient_attention_xformers", lambda self, on: asked.append(on))
    unet = basics.stable_diffusion().unet
    assert switch(unet, "xformers", CPU) == len(asked) > 0
    assert asked == [True] * len(asked)
    switch(unet, "sdpa", CPU)
    assert asked[-1] is False


def test_a_switch_that_reaches_nothing_is_an_error(usable):
    with pytest.raises(ValueError, match="none of the 0 attention modules"):
        switch(torch.nn.Linear(2, 2), "xformers", CPU)
    with pytest.raises(ValueError, match="reaches none of the"):
        switch(tiny_dit(), "flash", CPU)                                        # its modules know xformers and torch alone


@pytest.mark.parametrize("name", ["xformers", "flash"])
def test_what_cannot_run_here_is_refused_in_a_sentence(name, tmp_path):
    assert unusable("sdpa", CPU) is None
    assert unusable(name, CPU) == "it has no kernels for cpu"
    chosen = tiny_recipe(tmp_path, attention=name)
    with pytest.raises(ValueError, match=f"attention: {name} cannot be used here: it has no kernels for cpu. attention: sdpa"):
        assemble(chosen, loop.make_accelerator(chosen, None))
