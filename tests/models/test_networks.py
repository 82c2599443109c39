"""Networks from their configs alone: the published sizes, the arguments of a call, and what a folder without weights says."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tiny import tiny_teacher
from torch import nn
from zoo import basics

from stepdistill import recipe as recipes
from stepdistill import worlds
from stepdistill.models import networks
from stepdistill.training.live import rehearsal
from stepdistill.training.plan import RESERVE

ROOT = Path(__file__).parents[2]
RECIPES = [name for name in recipes.names() if name.split("/")[0] not in worlds.WORLDS]
SHALLOW = {**dict.fromkeys(("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "layers_per_block",
                            "transformer_layers_per_block"), 1), "dual_attention_layers": [0]}
T5 = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("name", "parameters", "shape"), [                  # the figures of the published checkpoints
    ("sd15", 859_520_964, (4, 64, 64)), ("sdxl", 2_567_463_684, (4, 128, 128)), ("sd35-medium", 2_243_171_520, (16, 128, 128)),
    ("flux-dev", 11_901_408_320, (4096, 64)), ("pixart-sigma", 610_856_096, (4, 64, 64)), ("sana-600m", 591_747_872, (32, 16, 16)),
    ("qwen-image", 20_430_401_088, (4096, 64)), ("z-image", 6_154_908_736, (16, 1, 128, 128)),
    ("wan21-1.3b", 1_418_996_800, (16, 21, 60, 104)), ("cogvideox-2b", 1_693_783_872, (13, 16, 60, 90)),
    ("ltx", 1_923_385_472, (13 * 15 * 22, 128))])
def test_shipped_networks_have_their_published_size(name: str, parameters: int, shape: tuple[int, ...]) -> None:
    spec = networks.find(name)
    began = time.process_time()
    network = spec.build()
    assert time.process_time() - began < 10
    assert size(network) == parameters
    assert all(p.device.type == "meta" for p in network.parameters())
    assert spec.shape == shape


def test_sd35_is_two_and_a_half_billion_only_with_its_table_of_positions() -> None:
    network = networks.find("sd35-medium").build()
    assert size(network) + sum(b.numel() for b in network.buffers()) == 2_469_663_936


@pytest.mark.parametrize(("name", "part", "make"), [
    ("pixart-sigma", "text_encoder", lambda: transformers.T5EncoderModel(transformers.T5Config(**T5))),
    ("wan21-1.3b", "text_encoder", lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5 | {"vocab_size": 256384}))),
    ("sana-600m", "text_encoder", lambda: transformers.Gemma2Model(transformers.Gemma2Config())),
    ("wan21-1.3b", "vae", diffusers.AutoencoderKLWan), ("qwen-image", "vae", diffusers.AutoencoderKLQwenImage),
    ("cogvideox-2b", "vae", lambda: diffusers.AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512)))])
def test_the_rest_of_a_pipeline_is_counted_by_its_classes(name: str, part: str, make: Callable[[], nn.Module]) -> None:
    with networks.META:
        assert networks.find(name).frozen[part] == size(make())


def test_every_shipped_network_is_found() -> None:
    assert networks.names() == ["cogvideox-2b", "flux-dev", "ltx", "pixart-sigma", "qwen-image", "sana-600m", "sd15", "sd35-medium", "sdxl",
                                "wan21-1.3b", "z-image"]


def test_the_size_of_the_picture_sets_the_state() -> None:
    spec = networks.find("flux-dev").at({"height": 512, "width": 768, "max_sequence_length": 7, "num_frames": 9})
    assert spec.shape == (32 * 48, 64)
    assert spec.condition(3, guided=True)["encoder_hidden_states"].shape == (3, 512, 4096)


@pytest.mark.parametrize(("name", "frames", "shape"), [
    ("wan21-1.3b", 33, (16, 9, 60, 104)), ("wan21-1.3b", 1, (16, 1, 60, 104)), ("cogvideox-2b", 9, (3, 16, 60, 90)),
    ("ltx", 25, (4 * 15 * 22, 128))])
def test_the_first_frame_of_a_video_is_alone_in_its_cell(name: str, frames: int, shape: tuple[int, ...]) -> None:
    assert networks.find(name).at({"num_frames": frames}).shape == shape


def test_numbers_and_lists_of_a_call() -> None:
    """LTX is told the sizes of its packed video, Qwen-Image in nested lists; Z-Image takes one tensor a sample."""
    for name, expected in (("ltx", {"num_frames": 4, "height": 15, "width": 22}), ("qwen-image", {"img_shapes": [[[1, 32, 48]]]})):
        spec = networks.find(name).at({"height": 512, "width": 768} if name == "qwen-image" else {"num_frames": 25})
        call = called(spec, 2)
        assert {key: call[key] for key in expected} == expected
    call = called(networks.find("z-image"), 2)
    assert [tuple(x.shape) for x in call["x"]] == 2 * [(16, 1, 128, 128)]
    assert [tuple(c.shape) for c in call["cap_feats"]] == 2 * [(512, 2560)]


def called(spec: networks.NetworkSpec, batch: int) -> dict[str, Any]:
    """The keywords of one call."""
    denoiser = shallow(spec).denoiser(dtype=torch.float32, guidance=1.0, autocast=None)
    assert denoiser.wiring is not None
    return denoiser.wiring.call(torch.zeros(batch, *spec.shape), torch.full((batch,), 0.5), spec.condition(batch, guided=False),
                                denoiser.process, 1.0, torch.float32)


def shallow(spec: networks.NetworkSpec) -> networks.NetworkSpec:
    """As wide as it is, and one layer deep."""
    return replace(spec, config={**spec.config, **{key: value for key, value in SHALLOW.items() if key in spec.config}})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_was_counted_to_need(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    said = re.search(rf"^# Expected: about (\d+) GiB of one card's (\d+) \((stepdistill plan --config {name} --network [\w.-]+)\), "
                     r"counted, never measured\.$", text, re.MULTILINE)
    assert said is not None
    row = {row["recipe"]: row for row in json.loads((ROOT / "docs" / "bytes.json").read_text())["recipes"]}[name]
    assert (said[1], said[2], said[3]) == (f"{row['peak'] / 2**30:.0f}", str(row["card"]), row["command"])
    assert row["peak"] + RESERVE <= int(said[2]) * 2**30
    recipe = recipes.load(name)
    assert row["micro_batch"] == recipe.batch_size // recipe.accumulate


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_network_that_can_be_called(name: str) -> None:
    """At the recipe's size, guided as the teacher is, in the precision of a plan."""
    named = re.search(rf"--config {name} --network ([\w.-]+)", (ROOT / "configs" / f"{name}.yaml").read_text())
    assert named is not None
    recipe = recipes.load(name)
    spec = shallow(networks.find(named[1]).at(recipe.teacher.call))
    denoiser = spec.denoiser(dtype=torch.bfloat16, guidance=recipe.guidance, autocast=torch.bfloat16)
    with torch.no_grad(), rehearsal(card=True) as blank:
        blank(denoiser.network)
        x_t = torch.zeros(1, *spec.shape)
        assert denoiser(x_t, torch.full((1,), 0.5), spec.condition(1, guided=True)).x0.shape == x_t.shape


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
    ({"_class_name": "MochiTransformer3DModel"}, "how a MochiTransformer3DModel is called is not known"),
    ({"_class_name": "UNet2DModel"}, "has no sample_size"),
    ({"config": {}}, "must hold config, sizes"),
    ({"config": {"_class_name": "X"}, "sizes": {"height": 8, "width": 8, "cell": 1}, "state": "depth rows", "arguments": {}}, "'depth'"),
    ({"config": {"_class_name": "X"}, "sizes": {"height": 8, "width": 8, "cell": 1}, "state": "4 rows", "arguments": {"n": "number 4 4"}},
     "must be one number"),
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
