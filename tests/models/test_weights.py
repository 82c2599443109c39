"""The user's own LoRA in the teacher, and students that begin as published few-step models and LoRAs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import basics

from stepdistill.models.adapters import LoraRecipe
from stepdistill.models.load import load_pipeline, load_teacher
from stepdistill.models.roles import Role, Roles
from stepdistill.models.weights import begin_as

NEEDS = {"teacher": Role(), "student": Role(trains=True)}
LAYERS = ("to_q", "to_v")
CALL = {"height": 16, "width": 16}


def lora_file(pipeline, folder: Path, name: str, rank: int = 2, alpha: float = 6.0, seed: int = 0) -> Path:
    """A random LoRA of the UNet's to_q and to_v, saved by diffusers itself, with alpha / rank = 3."""
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LAYERS), init_lora_weights="gaussian"), adapter_name="style")
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    unet.save_lora_adapter(folder, adapter_name="style", weight_name=name, safe_serialization=True)
    return folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    pipeline = basics.stable_diffusion()
    pipeline.save_pretrained(folder / "teacher")
    unet = lora_file(pipeline, folder, "unet.safetensors")
    with safe_open(unet, "pt") as file:
        metadata = file.metadata()
    tensors = {f"unet.{key}": value for key, value in load_file(unet).items()}                  # as a pipeline's loader has it
    config = {f"unet.{key}": value for key, value in json.loads(metadata["lora_adapter_metadata"]).items()}
    save_file(tensors, folder / "style.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return folder


def by_hand(world, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The teacher's UNet with scale·(alpha/rank)·up·down added to the layers of the file."""
    weights = dict(load_pipeline(world / "teacher").unet.state_dict())
    tensors = load_file(world / "style.safetensors")
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 3.0 * scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return weights


def furthest(network, weights) -> float:
    return max(float((value - weights[key]).abs().max()) for key, value in network.state_dict().items())


def teacher_of(world, **options):
    return load_teacher(world / "teacher", prompts=("snow",), call=CALL, **options)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_users_lora_is_merged_into_the_teacher(world, scale):
    pipeline = load_pipeline(world / "teacher", loras={str(world / "style.safetensors"): scale})
    assert furthest(pipeline.unet, by_hand(world, scale)) < 1e-6
    assert furthest(pipeline.unet, by_hand(world, 0.0)) > 0.1


def test_a_teacher_with_a_lora_is_what_is_recorded(world):
    teacher = teacher_of(world, loras={str(world / "style.safetensors"): 1.0})
    assert furthest(teacher.denoiser.network, by_hand(world)) < 1e-6


def test_half_precision_teachers_are_merged_before_they_are_rounded(world):
    pipeline = load_pipeline(world / "teacher", dtype=torch.bfloat16, loras={str(world / "style.safetensors"): 1.0})
    exact = by_hand(world)
    assert all(torch.equal(value, exact[key].bfloat16()) for key, value in pipeline.unet.state_dict().items())


def student_of(world, lora=None):
    teacher = teacher_of(world)
    return Roles.build(NEEDS, teacher.denoiser, teacher.example, 0, lora or {}), teacher


def test_a_full_student_begins_as_a_lora(world):
    m, teacher = student_of(world)
    begin_as(m.denoisers["student"], world / "style.safetensors", teacher.component)
    assert furthest(m.module("student"), by_hand(world)) < 1e-6
    assert furthest(m.module("teacher"), by_hand(world, 0.0)) == 0
    assert not any(p.requires_grad for p in m.parameters("student"))


def test_a_full_student_begins_as_a_published_pipeline(world):
    pipeline = load_pipeline(world / "teacher", loras={str(world / "style.safetensors"): 1.0})
    pipeline.save_pretrained(world / "turbo")
    for source in (world / "turbo", world / "turbo" / "unet"):
        m, teacher = student_of(world)
        begin_as(m.denoisers["student"], source, teacher.component)
        assert furthest(m.module("student"), by_hand(world)) < 1e-6


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_an_adapter_begins_as_a_lora_whatever_its_own_alpha(world, alpha):
    m, teacher = student_of(world, {"student": LoraRecipe(2, alpha, targets=LAYERS)})
    begin_as(m.denoisers["student"], world / "style.safetensors", teacher.component)
    full, _ = student_of(world)
    full.denoisers["student"].network.load_state_dict(by_hand(world))
    x, t, cond = torch.randn(1, *teacher.shape), torch.tensor([0.5], dtype=torch.float64), teacher.condition(torch.tensor([0]))
    torch.testing.assert_close(m.student(x, t, cond).raw, full.student(x, t, cond).raw, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(m.student(x, t, cond).raw, m.teacher(x, t, cond).raw, rtol=1e-2)


@pytest.mark.parametrize(("lora", "source", "words"), [
    ({}, "nothing.safetensors", "does not exist"),
    ({}, "prompts.safetensors", "does not fit this UNet2DConditionModel"),
    ({}, "teacher/vae", "does not fit this UNet2DConditionModel"),
    ({"student": LoraRecipe(2, targets=LAYERS)}, "teacher", "leave lora.student out"),
    ({"student": LoraRecipe(3, targets=LAYERS)}, "style.safetensors", "has rank 2 there, and lora.student.rank is 3"),
    ({"student": LoraRecipe(2, targets=("to_q",))}, "style.safetensors", "put it among lora.student.targets"),
    ({"student": LoraRecipe(2, targets=LAYERS)}, "unet.safetensors", "names no layer unet.*"),
])
def test_what_does_not_fit_is_one_line(world, lora, source, words):
    (world / "prompts.safetensors").write_text("no safetensors")
    m, teacher = student_of(world, lora)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        begin_as(m.denoisers["student"], world / source, teacher.component)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("missing.safetensors", "which does not exist"), ("text.safetensors", "cannot be loaded")])
def test_a_lora_that_the_teacher_cannot_take_is_one_line(world, name, words):
    (world / "text.safetensors").write_text("no safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_pipeline(world / "teacher", loras={str(world / name): 1.0})
