"""Every recipe for a published teacher takes two steps on the tiny pipeline of its family, as it stands but for sizes."""

import math

import pytest
import torch
from tiny import final_tensors, log_lines
from zoo import basics, images, videos

from stepdistill import recipe as recipes
from stepdistill import worlds
from stepdistill.models import prompted
from stepdistill.training import loop

FAMILIES = {
    "sd15": basics.EXHIBITS["sd15"], "sdxl": images.EXHIBITS["sdxl"], "sd35_medium": images.EXHIBITS["sd3"],
    "pixart_sigma": images.EXHIBITS["pixart-sigma"], "flux_dev": images.EXHIBITS["flux-dev"], "sana": images.EXHIBITS["sana"],
    "qwen_image": images.EXHIBITS["qwen-image"], "z_image": images.EXHIBITS["z-image"], "wan21": videos.EXHIBITS["wan21"],
    "cogvideox_2b": videos.EXHIBITS["cogvideox"], "ltx": videos.EXHIBITS["ltx"],
}
SHIPPED = [name for name in recipes.names() if name.split("/")[0] not in worlds.WORLDS]
PROMPTS = ("a red apple", "a cat on the mat", "snow", "two blue houses")


def test_every_family_has_a_recipe_and_every_recipe_a_family():
    assert {name.split("/")[0] for name in SHIPPED} == set(FAMILIES)


def encoded(keywords):
    """Embeddings in the precision in which encoders of these recipes give them."""
    return {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_two_steps(name, tmp_path, monkeypatch):
    exhibit = FAMILIES[name.split("/")[0]]
    exhibit.build().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    # most exhibits are given embeddings, and diffusers loads no pipeline whose encoders are missing
    monkeypatch.setattr(prompted, "usual_inputs", lambda pipeline, **call: lambda prompts: encoded(exhibit.inputs(prompts)))
    monkeypatch.setattr(prompted, "load_pipeline", lambda folder, dtype, **options: exhibit.build().to(dtype))
    ranks = (f"lora.{role}.rank=2" for role in recipes.load(name).lora)
    tiny = ("steps=2", "batch_size=2", "accumulate=1", "preview_count=1", "trackers=[]", "log_every=1", *ranks,
            f"teacher.path={tmp_path / 'teacher'}", f"data.prompts={tmp_path / 'prompts.txt'}")
    recipe = recipes.load(name, tiny)
    assert loop.start(recipe, tmp_path / "run").finished
    logged = [line for line in log_lines(tmp_path / "run") if "seconds" in line]
    assert len(logged) == 2
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert logged[-1]["skipped"] == 0
    assert max(line.get("update/student", 0) for line in logged) > 0     # SwiftBrush's first is none: its scores begin alike
    tensors = final_tensors(tmp_path / "run")
    if "student" not in recipe.lora:
        return
    moved = [key for key, value in tensors.items() if key.startswith("role/student/") and "lora_B" in key and bool((value != 0).any())]
    assert moved                                                        # B starts at zero
