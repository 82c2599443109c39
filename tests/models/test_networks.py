"""Networks from their configs alone: the published sizes, the arguments of a call, and what a folder without weights says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_teacher
from torch import nn
from zoo import basics

from stepdistill.models import networks


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("name", "parameters", "shape"), [                  # the figures of the published checkpoints
    ("sd15", 859_520_964, (4, 64, 64)), ("sdxl", 2_567_463_684, (4, 128, 128)), ("sd35-medium", 2_243_171_520, (16, 128, 128)),
    ("flux-dev", 11_901_408_320, (4096, 64))])
def test_shipped_networks_have_their_published_size(name: str, parameters: int, shape: tuple[int, ...]) -> None:
    spec = networks.find(name)
    began = time.perf_counter()
    network = spec.build()
    assert time.perf_counter() - began < 10
    assert size(network) == parameters
    assert all(p.device.type == "meta" for p in network.parameters())
    assert spec.shape == shape


def test_sd35_is_two_and_a_half_billion_only_with_its_table_of_positions() -> None:
    network = networks.find("sd35-medium").build()
    assert size(network) + sum(b.numel() for b in network.buffers()) == 2_469_663_936


def test_every_shipped_network_is_found() -> None:
    assert networks.names() == ["flux-dev", "sd15", "sd35-medium", "sdxl"]


def test_the_size_of_the_picture_sets_the_state() -> None:
    spec = networks.find("flux-dev").at({"height": 512, "width": 768, "max_sequence_length": 7})
    assert spec.shape == (32 * 48, 64)
    assert spec.condition(3, guided=True)["encoder_hidden_states"].shape == (3, 512, 4096)


def test_a_null_travels_only_where_guidance_is_a_second_call() -> None:
    sd, flux = networks.find("sd15"), networks.find("flux-dev")
    assert sd.condition(2, guided=True).null["encoder_hidden_states"].shape == (2, 77, 768)
    assert sd.condition(2, guided=False).nulls is None
    assert flux.condition(2, guided=True).nulls is None


def test_a_bare_folder_needs_no_weights(tmp_path: Path) -> None:
    tiny_teacher(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    spec = networks.of_folder(tmp_path)
    assert (spec.shape, spec.arguments) == ((4, 8, 8), {"sample": "state", "timestep": "time", "class_labels": "label"})
    assert spec.condition(3, guided=True).null["class_labels"].shape == (3,)
    assert not spec.prompted


def test_a_pipeline_folder_needs_no_weights(tmp_path: Path) -> None:
    pipeline = basics.stable_diffusion()
    pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    spec = networks.of_folder(tmp_path)
    assert size(spec.build()) == size(pipeline.unet)
    assert spec.shape == (4, 8, 8)
    assert spec.frozen == {"text_encoder": size(pipeline.text_encoder), "vae": size(pipeline.vae)}
    assert spec.prompted


def test_a_config_is_called_as_the_shipped_network_most_like_it(tmp_path: Path) -> None:
    sdxl = networks.find("sdxl")
    (tmp_path / "config.json").write_text(json.dumps({**sdxl.config, "sample_size": 64}))
    spec = networks.find(str(tmp_path / "config.json"))
    assert spec.arguments == sdxl.arguments
    assert spec.shape == (4, 64, 64)
    (tmp_path / "other.json").write_text(json.dumps({**networks.find("sd15").config, "cross_attention_dim": 1024, "sample_size": 96}))
    other = networks.find(str(tmp_path / "other.json"))
    assert other.arguments == networks.find("sd15").arguments
    assert other.shape == (4, 96, 96)
    assert other.condition(1, guided=False)["encoder_hidden_states"].shape == (1, 77, 1024)


def test_a_network_without_embedded_guidance_is_given_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**networks.find("flux-dev").config, "guidance_embeds": False}))
    assert "guidance" not in networks.find(str(tmp_path / "config.json")).arguments


@pytest.mark.parametrize(("content", "message"), [
    ({"_class_name": "WanTransformer3DModel"}, "how a WanTransformer3DModel is called is not known"),
    ({"_class_name": "UNet2DModel"}, "has no sample_size"),
    ({"config": {}}, "must hold config, sizes"),
    ({"config": {"_class_name": "X"}, "sizes": {"height": 8, "width": 8, "cell": 1}, "state": "depth rows", "arguments": {}}, "'depth'"),
    ({"config": {}, "sizes": {"height": 8, "width": 8, "cell": 1}, "state": "4 rows", "arguments": {}}, "lacks _class_name")])
def test_a_bad_file_names_the_remedy(tmp_path: Path, content: dict[str, object], message: str) -> None:
    (tmp_path / "network.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        networks.find(str(tmp_path / "network.json"))


def test_what_cannot_be_built_or_found(tmp_path: Path) -> None:
    spec = networks.find("sd15")
    with pytest.raises(ValueError, match="has no Nothing"):
        replace(spec, config={"_class_name": "Nothing"}).build()
    with pytest.raises(ValueError, match="cannot be built"):
        replace(spec, config={**spec.config, "down_block_types": ["Nothing"]}).build()
    with pytest.raises(FileNotFoundError, match="sd15"):
        networks.find("sd16")
    with pytest.raises(FileNotFoundError, match="--network"):
        networks.of_folder(tmp_path)
