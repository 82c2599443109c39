"""Exports of students that are told where a step goes, or their guidance: the folders sample as we do where stepdistill is missing."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from foreign import WITHOUT_US
from safetensors.torch import load_file, save_file
from tiny import tiny_teacher
from torch import Tensor
from toys import tiny_dit
from zoo import basics, images

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import trailing
from stepdistill.eval.models import Opened, open_model
from stepdistill.export import export, load_student
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.inputs import add_inputs
from stepdistill.models.load import Teacher, load_teacher
from stepdistill.training import checkpoint

PROMPTS = ("a red apple", "a cat on a mat")
SIZE = {"height": 16, "width": 16}
OTHER = 3.5                                                                      # guidance asked for at the call


@dataclass(frozen=True)
class Case:
    teacher: str
    spec: SamplerSpec

    @property
    def prompted(self) -> bool:
        return self.teacher.startswith("sd")

    @property
    def name(self) -> str:
        return f"{self.teacher}-{''.join(self.spec.inputs)}-{len(self.spec.times)}-{self.spec.renoise:g}-w{self.spec.guidance:g}"


W, S = ("w",), ("s",)
CASES = [
    Case("unet", SamplerSpec(trailing(3), renoise=0.0, guidance=2.0, inputs=W)),
    Case("unet", SamplerSpec(trailing(3), renoise=0.4, inputs=S)), Case("unet", SamplerSpec((0.8, 0.3), guidance=2.0, inputs=S)),
    Case("unet", SamplerSpec(trailing(2), renoise=0.0, guidance=2.0, clip_x0=1.0, inputs=("s", "w"))),
    Case("dit", SamplerSpec(trailing(2), renoise=0.0, guidance=2.0, inputs=("s", "w"))),
    Case("sd", SamplerSpec(trailing(2), guidance=7.5, inputs=W)),
    Case("sdxl", SamplerSpec((0.9, 0.3), guidance=2.0, inputs=W)),
]

FOREIGN = WITHOUT_US + """
import json, sys
import torch
import diffusers.utils.torch_utils as drawn
queue, original = [], drawn.randn_tensor
drawn.randn_tensor = lambda shape, **options: queue.pop(0) if queue else original(shape, **options)
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
logging.disable_progress_bar()
for job in json.load(open("jobs.json")):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=job["trust"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise, made = list(load_file(job["noise"]).values()), {}
    for name, scale in job["scales"].items():
        if "prompts" in job:
            queue[:] = noise[1:]
            call = {**job["call"], **({} if scale is None else {"guidance_scale": scale})}
            made[name] = pipe(prompt=job["prompts"], latents=noise[0], output_type="latent", **call)[0]
        else:
            made[name] = pipe([2, 0, 1], noise=noise, guidance_scale=scale, output_type="latent").images
    save_file({name: x0.contiguous() for name, x0 in made.items()}, job["out"])
"""


@functools.cache
def opened(teacher: Path, prompted: bool) -> Teacher:
    return load_teacher(teacher, prompts=PROMPTS, call=SIZE, guidance=2.0) if prompted else load_teacher(teacher)


def trained(case: Case, teacher: Path, out: Path) -> tuple[Path, Denoiser]:
    """A run as if trained, and its student."""
    recipe: dict[str, Any] = {"teacher": {"path": str(teacher)}, "optim": {"student": {"lr": 1e-4}}, "guidance": 2.0, "ema_decay": 0,
                              "method": {"name": "guided", "guidance": {"low": 1.0, "high": 8.0}}, "steps": 5}
    if case.prompted:
        recipe |= {"teacher": {"path": str(teacher), "call": SIZE}, "data": {"prompts": "prompts.txt"}}
    model = opened(teacher, case.prompted)
    student = replace(model.denoiser.copy(), inputs=case.spec.inputs)
    network, generator = add_inputs(student.network, case.spec.inputs), torch.Generator().manual_seed(3)
    for embedder in network.embedders:
        torch.nn.init.normal_(embedder.cond_proj.weight, std=0.3, generator=generator)
    (out / "checkpoints").mkdir(parents=True)
    (out / "recipe.yaml").write_text(recipes.dump(recipes.parse(recipe)))
    checkpoint.save(out / "checkpoints", 5, {f"role/student/{k}": v for k, v in network.state_dict().items()},
                    {"sampler": case.spec.to_dict(), "call": model.call}, keep=1)
    return out, student


def noises(case: Case, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 if case.prompted else 3, *shape, generator=generator)
            for _ in range(len(case.spec.times) if case.spec.renoise else 1)]


def ours(net: Denoiser, spec: SamplerSpec, cond: Conditioning, noise: list[Tensor]) -> Tensor:
    walk = steps(net, start(net.process, spec, noise[0]), spec, cond, Draws(0), noise=lambda i: noise[i + 1])
    with torch.no_grad():
        return list(walk)[-1].x0


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    tiny_teacher(root / "unet")
    network = tiny_dit(2)
    network.save_pretrained(root / "dit")
    DDPMScheduler(beta_schedule="linear").save_pretrained(root / "dit")
    basics.stable_diffusion().save_pretrained(root / "sd")
    images.sdxl().save_pretrained(root / "sdxl")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def students(teachers: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Denoiser]]:
    root, found = tmp_path_factory.mktemp("students"), {}
    for case in CASES:
        run, student = trained(case, teachers[case.teacher], root / "runs" / case.name)
        export(run, root / case.name)
        found[case.name] = root / case.name, student
    return found


@pytest.fixture(scope="module")
def foreign(students: Mapping[str, tuple[Path, Denoiser]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, at its own guidance and at another where it is told that, by one process that has no stepdistill."""
    root, jobs = tmp_path_factory.mktemp("foreign"), []
    for case in CASES:
        folder, student = students[case.name]
        files = {k: str(root / f"{case.name}.{k}.safetensors") for k in ("noise", "out")}
        channels = student.network.config.in_channels
        save_file({f"{i:02d}": n for i, n in enumerate(noises(case, (channels, 8, 8)))}, files["noise"])
        asked = {"prompts": PROMPTS, "call": notes(folder)["call"]} if case.prompted else {}
        scales = {"own": None, **({"other": OTHER} if "w" in case.spec.inputs else {})}
        trust = not case.prompted or json.loads((folder / "model_index.json").read_text())["scheduler"][0] != "diffusers"
        jobs.append({"folder": str(folder), "scales": scales, "trust": trust, **asked, **files})
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", FOREIGN], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stderr.txt").write_text(done.stderr)
    return root


def notes(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stepdistill.json").read_text()))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_folder_samples_as_we_do(case: Case, students: Mapping[str, tuple[Path, Denoiser]], foreign: Path) -> None:
    """As the trained network itself, and as it is loaded again; at any guidance that it is told."""
    folder, student = students[case.name]
    model, spec = load_student(folder, prompts=PROMPTS if case.prompted else ())
    assert spec == case.spec
    assert model.denoiser.inputs == case.spec.inputs
    assert torch.equal(model.denoiser.network.embedders[0].cond_proj.weight, student.network.embedders[0].cond_proj.weight)
    theirs = load_file(foreign / f"{case.name}.out.safetensors")
    noise, cond = noises(case, model.shape), model.condition(torch.tensor([0, 1] if case.prompted else [2, 0, 1]))
    for name, x0 in theirs.items():
        asked = spec if name == "own" else spec.guided(OTHER)
        assert distance(x0, ours(model.denoiser, asked, cond, noise)) < 1e-4
        assert distance(x0, ours(student, asked, cond, noise)) < 1e-4
    if "other" in theirs:
        assert distance(theirs["other"], theirs["own"]) > 1e-3, "guidance must matter, or this proves little"


def test_loading_says_nothing_alarming(foreign: Path) -> None:
    said = [line for line in (foreign / "stderr.txt").read_text().splitlines()
            if any(word in line for word in ("Expected types", "not expected", "not used", "newly initialized"))]
    assert not said


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=lambda case: case.name)
def test_guidance_on_the_command_line(case: Case, students: Mapping[str, tuple[Path, Denoiser]]) -> None:
    """Any number, in one call a step; unguided is told so, too."""
    folder, _ = students[case.name]
    for w in (None, 1.0, OTHER):
        opened = open_model(str(folder), guidance=w, prompts=PROMPTS if case.prompted else ())
        assert isinstance(opened, Opened)
        assert opened.spec.guidance == (case.spec.guidance if w is None else w)
        assert opened.spec.nfe == len(case.spec.times)


def test_only_students_that_are_right_everywhere_take_a_solver(students: Mapping[str, tuple[Path, Denoiser]], tmp_path: Path) -> None:
    folder = shutil.copytree(students[CASES[0].name][0], tmp_path / "student")
    with pytest.raises(ValueError, match="--solver, --renoise and --shift are for teachers"):
        open_model(str(folder), solver="dpmpp_2m")
    found = notes(folder)
    found["sampler"]["free"] = True
    (folder / "stepdistill.json").write_text(json.dumps(found))
    assert open_model(str(folder), 8, solver="dpmpp_2m").spec == replace(CASES[0].spec, times=trailing(8), solver="dpmpp_2m", free=True)


def test_the_cards_say_that_guidance_is_told(students: Mapping[str, tuple[Path, Denoiser]]) -> None:
    for case in (CASES[0], CASES[5]):
        text = (students[case.name][0] / "README.md").read_text()
        assert "trained with (1 to 8)" in text, case.name
        assert "built in" not in text
    assert notes(students[CASES[5].name][0])["call"]["guidance_scale"] == 7.5


def test_pipelines_that_cannot_tell_refuse(teachers: Mapping[str, Path], tmp_path: Path) -> None:
    run, _ = trained(Case("sd", SamplerSpec(trailing(2), renoise=0.0, inputs=S)), teachers["sd"], tmp_path / "run")
    with pytest.raises(ValueError, match="StableDiffusionPipeline cannot tell its network s: ") as refused:
        export(run, tmp_path / "student")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "student").exists()
