"""Exports: the folder loads where stepdistill cannot be imported and makes the same pictures; nothing is ever half-written."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from foreign import WITHOUT_US
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import TableVP
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import lcm_grid, trailing
from stepdistill.export import add_results, export, load_student, scheduler_of, sha256
from stepdistill.models.load import Teacher
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.training import checkpoint
from stepdistill.training.loop import start as train

LABELS = ["Sock", "Hat", "Glove"]
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SCHEDULERS: dict[str, Any] = {
    "eps": lambda: DDPMScheduler(**TABLE),
    "v": lambda: DDPMScheduler(**TABLE, prediction_type="v_prediction"),
    "v-zero-snr": lambda: DDPMScheduler(**TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "x0": lambda: DDPMScheduler(beta_schedule="linear", prediction_type="sample", clip_sample=False),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def write_teacher(folder: Path, kind: str) -> Path:
    """A tiny U-Net over 16x16 grey pictures, folded to 4x8x8, with three classes and a null class."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4)
        for weight in unet.class_embedding.parameters():
            weight.data.mul_(3)                                                  # so that labels are seen in the output
    unet.save_pretrained(folder)
    SCHEDULERS[kind]().save_pretrained(folder)
    notes = {"codec": {"space_to_depth": 2}, "classes": 3, "null_class": 3, "labels": LABELS, "licence": "MIT; made up"}
    (folder / "stepdistill.json").write_text(json.dumps(notes))
    return folder


def run_of(teacher: Path, out: Path, **changes: Any) -> Path:
    """Two steps of data-free DMD2."""
    adam = {"lr": 1e-2}
    train(recipes.parse({"teacher": {"path": str(teacher)}, "method": {"name": "dmd2", "gan_weight": 0, "fake_updates": 1},
                         "optim": {"student": adam, "fake": adam}, "steps": 2, "batch_size": 4, "precision": "fp32", "ema_decay": 0.9,
                         "preview_count": 1, "trackers": [], **changes}), out)
    return out


def with_sampler(run: Path, out: Path, sampler: dict[str, Any]) -> Path:
    """The same run, had its method asked for this sampler."""
    tensors, state = checkpoint.read(checkpoint.listed(run / "checkpoints")[-1])
    checkpoint.save(out / "checkpoints", state["step"], tensors, {**state, "sampler": sampler}, keep=1)
    shutil.copy(run / "recipe.yaml", out)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: run_of(write_teacher(root / f"teacher-{kind}", kind), root / kind) for kind in SCHEDULERS}


@pytest.fixture(scope="module")
def folder(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step student, just as trained."""
    to = tmp_path_factory.mktemp("exports") / "student"
    export(runs["eps"], to)
    return to


def pipeline(folder: Path, **changes: Any) -> ClassConditionalPipeline:
    """The pipeline of an exported folder, without diffusers' copy of its code."""
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    config = {k: index[k] for k in ("space_to_depth", "null_class", "labels", "sampler")}
    return ClassConditionalPipeline(unet=UNet2DModel.from_pretrained(folder / "unet"), scheduler=scheduler, **{**config, **changes})


def ours(model: Teacher, spec: SamplerSpec, labels: list[int], noise: list[Tensor]) -> Tensor:
    """x0 of the library's own sampler on the same noise."""
    walk = steps(model.denoiser, start(model.denoiser.process, spec, noise[0]), spec, model.condition(torch.tensor(labels)), Draws(0),
                 noise=lambda i: noise[i + 1])
    with torch.no_grad():
        return list(walk)[-1].x0


def noises(spec: SamplerSpec, batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(len(spec.times) if spec.renoise else 1)]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- the folder, where stepdistill cannot be imported

@dataclass(frozen=True)
class Case:
    kind: str
    spec: SamplerSpec

    @property
    def name(self) -> str:
        s = self.spec
        return f"{self.kind}-{len(s.times)}-renoise{s.renoise}-w{s.guidance}" + (f"-clip{s.clip_x0}" if s.clip_x0 else "")


CASES = [
    *(Case(kind, SamplerSpec(trailing(n), renoise=renoise, guidance=w)) for kind in ("eps", "v", "x0", "flow")
      for n, renoise, w in [(1, 1.0, 2.0), (4, 1.0, 1.0), (2, 0.0, 2.0), (4, 0.0, 1.0)]),
    *(Case(kind, SamplerSpec(trailing(3), renoise=0.4)) for kind in ("eps", "flow")),
    *(Case("eps", SamplerSpec(trailing(n), renoise=renoise, guidance=w)) for n, renoise, w in [(1, 0.0, 1.0), (2, 1.0, 1.5)]),
    Case("eps", SamplerSpec(lcm_grid(3), clip_x0=0.5)),
    *(Case(kind, SamplerSpec((0.8, 0.3))) for kind in ("flow", "eps")),          # starts below pure noise
    Case("eps", SamplerSpec(trailing(3), renoise=0, clip_x0=0.5)),
    Case("v-zero-snr", SamplerSpec(trailing(4))),
    Case("v-zero-snr", SamplerSpec(trailing(4), renoise=0)),
]

FOREIGN = WITHOUT_US + """
import io, json, os, sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
for job in json.load(open("jobs.json")):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True, local_files_only=True)
    noise = list(load_file(job["noise"]).values())
    images = {form: pipe(job["labels"], noise=noise, output_type=form).images for form in ("latent", "pt")}
    save_file({k: v.contiguous() for k, v in images.items()}, job["out"])
exec(open("snippet.py").read())
"""


@pytest.fixture(scope="module")
def foreign(runs: dict[str, Path], folder: Path, dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case sampled by one process that has no stepdistill, and the snippet of the one-step student's card executed there."""
    root = tmp_path_factory.mktemp("foreign")
    jobs = []
    for case in CASES:
        to = root / case.name
        export(with_sampler(runs[case.kind], root / "runs" / case.name, case.spec.to_dict()), to)
        jobs.append((to, noises(case.spec, 3)))
    jobs.append((dit, [torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]))
    listed = []
    for to, noise in jobs:
        files = {k: str(root / f"{to.name}.{k}.safetensors") for k in ("noise", "out")}
        save_file({f"{i:02d}": n for i, n in enumerate(noise)}, files["noise"])
        listed.append({"folder": str(to), "labels": [2, 0, 1], **files})
    (root / "jobs.json").write_text(json.dumps(listed))
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (root / "snippet.py").write_text(snippet)
    (root / folder.name).symlink_to(folder)
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", FOREIGN], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stderr.txt").write_text(done.stderr)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_folder_samples_as_we_do(foreign: Path, runs: dict[str, Path], case: Case) -> None:
    model, spec = load_student(foreign / case.name)
    assert spec == case.spec
    x0 = ours(model, spec, [2, 0, 1], noises(spec, 3))
    theirs = load_file(foreign / f"{case.name}.out.safetensors")
    assert distance(theirs["latent"], x0) < 1e-4
    assert torch.equal((theirs["pt"] * 255).round().byte(), model.pictures(theirs["latent"]))
    assert distance(theirs["latent"], ours(model, spec, [0, 0, 1], noises(spec, 3))) > 1e-3, "labels must matter, or this proves little"


def test_loading_says_nothing_alarming(foreign: Path) -> None:
    said = [line for line in (foreign / "stderr.txt").read_text().splitlines() if "Expected types" in line or "not expected" in line]
    assert not said


def test_the_card_snippet_runs(foreign: Path) -> None:
    with Image.open(foreign / "sample.png") as picture:
        assert picture.size == (16, 16)
        assert picture.mode == "L"


def test_times_between_training_steps_follow_our_curve(folder: Path) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=20, trained_betas=torch.linspace(0.001, 0.3, 20).tolist())   # coarse: others would show
    pipe = pipeline(folder)
    pipe.register_modules(scheduler=scheduler)
    at, process = pipe._curves(), TableVP(scheduler.alphas_cumprod)
    for t in torch.linspace(0, 1, 173, dtype=torch.float64):
        alpha, sigma, clock = at(float(t))
        assert alpha == pytest.approx(float(process.alpha(t)), abs=1e-12)
        assert sigma == pytest.approx(float(process.sigma(t)), abs=1e-12)
        assert clock == pytest.approx(max(20 * float(t) - 1, 0))


# ---- the stock scheduler in the folder

@pytest.mark.parametrize("case", [c for c in CASES if len(c.spec.times) == 4 and c.spec.guidance == 1 and c.kind != "v-zero-snr"],
                         ids=lambda case: case.name)
def test_the_stock_scheduler_agrees_where_it_can(foreign: Path, case: Case) -> None:
    folder = foreign / case.name
    model, spec = load_student(folder)
    name = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    assert name == ("FlowMatchEulerDiscreteScheduler" if case.kind == "flow" else "LCMScheduler" if spec.renoise else "DDIMScheduler")
    scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(**({"sigmas": [1.0, 0.75, 0.5, 0.25]} if case.kind == "flow" else {"num_inference_steps": 4}))
    seeded = torch.Generator().manual_seed(5)
    noise = [torch.randn(3, 4, 8, 8, generator=seeded) for _ in range(4)]
    x, generator, labels = noise[0], torch.Generator().manual_seed(5), torch.tensor([2, 0, 1])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)                                                     # the flow scheduler knows no generator
        for stream in (generator, torch.default_generator):
            torch.randn(3, 4, 8, 8, generator=stream)
        for t in scheduler.timesteps:
            out = model.denoiser.network(x, t, class_labels=labels).sample
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 900, 750, 500] if case.kind == "flow" else [999, 749, 499, 249])
    assert distance(x, ours(model, spec, [2, 0, 1], noise)) < 1e-3


@pytest.mark.parametrize("renoise", [0.0, 1.0])
@pytest.mark.parametrize("teacher", [
    {"_class_name": "DDPMScheduler", "beta_schedule": "linear"},                                       # all else by DDPM's defaults
    {"_class_name": "EulerDiscreteScheduler", **TABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "num_train_timesteps": 40},
])
def test_the_scheduler_keeps_the_teachers_table(teacher: dict[str, Any], renoise: float, tmp_path: Path) -> None:
    spec = SamplerSpec(trailing(2), renoise=renoise, clip_x0=2.0)
    scheduler_of(teacher, spec).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    assert torch.equal(scheduler.alphas_cumprod, DDPMScheduler.from_config(teacher).alphas_cumprod)
    assert (config["prediction_type"], config["clip_sample"], config["clip_sample_range"]) == (
        teacher.get("prediction_type", "epsilon"), True, 2.0)


# ---- calling the pipeline

def test_labels_by_name_number_and_text_are_the_same(folder: Path) -> None:
    pipe, noise = pipeline(folder), [torch.randn(1, 4, 8, 8)]
    for labels in ("Hat", "hat", 1, "1", ["Hat"], torch.tensor([1])):
        assert torch.equal(pipe(labels, noise=noise, output_type="latent").images, pipe([1], noise=noise, output_type="latent").images)


@pytest.mark.parametrize(("labels", "said"), [
    ("Glov", "did you mean 'Glove'"), ("zebra", "Sock, Hat, Glove"), (3, r"0\.\.2"), (-1, r"0\.\.2"), ("7", r"0\.\.2"),
    (None, "needs class_labels")])
def test_an_unknown_label_is_refused(folder: Path, labels: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline(folder)(labels)


def test_output_types(folder: Path) -> None:
    pipe, noise = pipeline(folder), [torch.randn(2, 4, 8, 8)]
    out = {form: pipe([0, 1], noise=noise, output_type=form).images for form in ("pil", "pt", "np", "latent")}
    pixels = load_student(folder)[0].pictures(out["latent"])
    assert np.array_equal(np.stack([np.asarray(p) for p in out["pil"]]), pixels[:, 0].numpy())
    assert out["pt"].shape == (2, 1, 16, 16)
    assert out["np"].shape == (2, 16, 16, 1)
    assert np.allclose(out["np"][..., 0], out["pt"][:, 0])
    assert len(set(pixels.flatten().tolist())) > 10, "a flat picture would pass anything"
    assert isinstance(pipe(0, noise=[noise[0][:1]], return_dict=False), tuple)
    with pytest.raises(ValueError, match="output_type"):
        pipe(0, output_type="jpeg")


def test_a_generator_for_each_picture_makes_it_independent_of_the_others(foreign: Path) -> None:
    pipe = pipeline(foreign / "eps-4-renoise1.0-w1.0")
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    three = pipe([0, 1, 2], generator=seeds(7, 8, 9), output_type="latent").images
    one = pipe([1], generator=seeds(8), output_type="latent").images
    assert distance(one, three[1:2]) < 1e-5
    assert distance(pipe([1], generator=seeds(9), output_type="latent").images, one) > 1e-2
    with pytest.raises(ValueError, match="one for each of the 3"):
        pipe([0, 1, 2], generator=seeds(7))


def test_a_number_of_steps_it_was_not_trained_for(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, spec = load_student(foreign / "eps-4-renoise1.0-w1.0")
    pipe = pipeline(foreign / "eps-4-renoise1.0-w1.0")
    pipe(0, num_inference_steps=4)
    assert not caplog.records
    noise = noises(spec.at(3), 3)
    with caplog.at_level(logging.WARNING):
        x0 = pipe([2, 0, 1], 3, noise=noise, output_type="latent").images
    assert "trained for 4 steps and is run with 3" in caplog.text
    assert distance(x0, ours(model, spec.at(3), [2, 0, 1], noise)) < 1e-4
    for name, trained in (("eps-4-renoise0.0-w1.0", 4), ("eps-3-renoise1.0-w1.0-clip0.5", 3)):   # the ODE; a grid that is not trailing
        with pytest.raises(ValueError, match=f"trained for {trained} steps"):
            pipeline(foreign / name)(0, num_inference_steps=2)
    with pytest.raises(ValueError, match="trained for 4 steps"):
        pipe(0, num_inference_steps=0)


def test_guidance_at_the_call(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, spec = load_student(folder)
    pipe, noise = pipeline(folder), noises(spec, 3)
    with caplog.at_level(logging.WARNING):
        x0 = pipe([2, 0, 1], guidance_scale=3.0, noise=noise, output_type="latent").images
        assert "guided twice" in caplog.text
        caplog.clear()
        pipe(0, guidance_scale=1.0)
        assert not caplog.records
    assert distance(x0, ours(model, spec.guided(3.0), [2, 0, 1], noise)) < 1e-4
    with pytest.raises(ValueError, match="null class"):
        pipeline(folder, null_class=None)(0, guidance_scale=3.0)


@pytest.mark.parametrize("noise", [[], [torch.zeros(2, 4, 8, 8)], [torch.zeros(1, 4, 8, 8)] * 2])
def test_noise_of_the_wrong_number_or_shape_is_refused(folder: Path, noise: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="noise must hold 1 tensors"):
        pipeline(folder)(0, noise=noise)


def test_a_solver_it_does_not_run_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="solver ddim"):
        pipeline(folder, sampler={**SamplerSpec((1.0,), renoise=0, solver="heun").to_dict(), "steps": 1})


# ---- what is exported

def test_weights_are_the_average_unless_raw_ones_are_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    (path,) = runs["eps"].glob("checkpoints/*/tensors.safetensors")
    tensors = load_file(path)
    for weights, prefix in (("ema", "ema/"), ("raw", "role/student/")):
        done = export(runs["eps"], tmp_path / weights, weights)                  # type: ignore[arg-type]
        written = load_file(tmp_path / weights / "unet/diffusion_pytorch_model.safetensors")
        assert set(written) == {k.removeprefix(prefix) for k in tensors if k.startswith(prefix)}
        assert all(torch.equal(v, tensors[prefix + k]) for k, v in written.items())
        assert (done.ema, done.step, done.steps) == (weights == "ema", 2, 2)
    assert any(not torch.equal(tensors[k], tensors[k.replace("ema/", "role/student/")]) for k in tensors if k.startswith("ema/"))


def test_a_run_without_an_average_exports_its_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    run = run_of(runs["eps"].parent / "teacher-eps", tmp_path / "run", ema_decay=0)
    assert export(run, tmp_path / "to").ema is False
    assert "as trained, no average" in (tmp_path / "to" / "README.md").read_text()


def test_half_precision_on_request(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["eps"], tmp_path / "to", dtype="bfloat16")
    assert {v.dtype for v in load_file(tmp_path / "to/unet/diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}
    model, spec = load_student(tmp_path / "to")
    assert torch.isfinite(ours(model, spec, [0], noises(spec, 1))).all()


def test_notes_and_recipe(folder: Path, runs: dict[str, Path]) -> None:
    notes = json.loads((folder / "stepdistill.json").read_text())
    assert notes["unet_sha256"] == sha256(folder / "unet/diffusion_pytorch_model.safetensors")
    wanted = {"codec": {"space_to_depth": 2}, "null_class": 3, "classes": 3, "labels": LABELS, "licence": "MIT; made up",
              "method": "dmd2", "step": 2, "ema": True, "picture": [1, 16, 16]}
    assert {k: notes[k] for k in wanted} == wanted
    assert recipes.load(folder / "recipe.yaml") == recipes.load(runs["eps"] / "recipe.yaml")
    model, spec = load_student(folder)
    assert (model.labels, model.null_class, spec) == (tuple(LABELS), 3, SamplerSpec((1.0,)))


def test_only_the_record_names_the_teachers_path(folder: Path, runs: dict[str, Path]) -> None:
    place = str(runs["eps"].parent)
    assert {p.name for p in folder.rglob("*") if p.is_file() and place.encode() in p.read_bytes()} == {"recipe.yaml", "stepdistill.json"}


# ---- a transformer with a learned variance, and a VAE

@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dit")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
                                        sample_size=8, patch_size=2, num_embeds_ada_norm=3)
        for weight in network.parameters():
            weight.data.add_(0.1 * torch.randn_like(weight))                     # adaLN starts at zero, where labels have no effect
        vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
                            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16)
    network.save_pretrained(root / "teacher/transformer")
    vae.save_pretrained(root / "teacher/vae")
    DDPMScheduler(beta_schedule="linear").save_pretrained(root / "teacher/scheduler")
    export(run_of(root / "teacher", root / "run", student={"steps": 2}), root / "dit-student")
    return root / "dit-student"


def test_a_transformer_with_a_vae(dit: Path, foreign: Path) -> None:
    model, spec = load_student(dit)
    noise = [torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    theirs = load_file(foreign / f"{dit.name}.out.safetensors")
    assert (model.classes, model.null_class, len(spec.times)) == (3, 3, 2)
    assert distance(theirs["latent"], ours(model, spec, [2, 0, 1], noise)) < 1e-4
    assert distance(theirs["latent"], ours(model, spec, [0, 0, 1], noise)) > 1e-3
    assert theirs["pt"].shape == (3, 3, 16, 16)
    with torch.no_grad():
        pixels = model.pictures(theirs["latent"])
    assert ((theirs["pt"] * 255).round() - pixels).abs().max() <= 1


# ---- the card

def result(path: Path, value: float, *, protocol: str = "0123abcd", times: tuple[float, ...] = (1.0,), w: float = 1.0,
           **model: Any) -> Path:
    """A result file, as the evaluation writes it."""
    path.write_text(json.dumps({
        "protocol": {"name": f"fashion-{protocol}", "count": 100}, "protocol_hash": protocol, "model": model,
        "sampler": SamplerSpec(times, guidance=w).to_dict(),
        "metrics": {"fd_judge": {"value": value, "se": 0.25}, **({} if model.get("is_teacher") else {"kd": {"value": 0.5, "se": None}})}}))
    return path


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def test_the_card_says_what_it_is(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["library_name"] == "diffusers"
    assert {"dmd2", "class-conditional"} <= set(front["tags"])
    for words in ("2405.14867", "1-step", "teacher-eps", "Sock, Hat, Glove", "16x16", "has not been evaluated", "MIT; made up"):
        assert words in text
    assert "Unfinished" not in text
    assert "{{" not in text
    assert "{%" not in text


def test_a_licence_the_hub_does_not_know_is_named(folder: Path, mine: Path) -> None:
    notes = json.loads((mine / "stepdistill.json").read_text())
    (mine / "stepdistill.json").write_text(json.dumps({**notes, "licence": "House: rules"}))
    add_results(mine, [])
    front = yaml.safe_load((mine / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "House: rules")


def test_the_card_says_what_steps_and_guidance_may_be_turned(runs: dict[str, Path], tmp_path: Path) -> None:
    spec = SamplerSpec(trailing(2), renoise=0.3, grids=((1.0, 0.7, 0.3),))
    for built_in, said in ((1.0, "multiplies the 1.5 of its training"), (1.5, "guidance 1.5 is built in and cannot be turned")):
        run = with_sampler(runs["eps"], tmp_path / f"run{built_in}", replace(spec, built_in=built_in).to_dict())
        recipe = recipes.load(run / "recipe.yaml")
        (run / "recipe.yaml").write_text(recipes.dump(replace(recipe, guidance=1.5)))
        export(run, tmp_path / f"{built_in}")
        text = (tmp_path / f"{built_in}" / "README.md").read_text()
        assert "trained for 2 steps, and for 3 (`stepdistill sample --steps`)" in text
        assert said in text
        assert load_student(tmp_path / f"{built_in}")[1].at(3).times == (1.0, 0.7, 0.3)


def test_an_unfinished_run_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["eps"], tmp_path / "run"))
    recipe = recipes.load(run / "recipe.yaml")
    (run / "recipe.yaml").write_text(recipes.dump(replace(recipe, steps=7)))
    done = export(run, tmp_path / "to")
    assert (done.step, done.steps) == (2, 7)
    assert "**Unfinished:** exported after step 2 of 7" in (tmp_path / "to/README.md").read_text()


def test_figures_in_the_card(mine: Path, tmp_path: Path) -> None:
    sha = json.loads((mine / "stepdistill.json").read_text())["unet_sha256"]
    add_results(mine, [
        result(tmp_path / "a.json", 12.344, name="exports/mine", sha256=sha),
        result(tmp_path / "b.json", 40, name="exports/rival", sha256="another"),
        result(tmp_path / "c.json", 3, name="teacher:fashion", is_teacher=True, times=(1.0, 0.5), w=1.5),
        result(tmp_path / "d.json", 99, name="exports/mine", sha256=sha, protocol="ffff")])
    text = (mine / "README.md").read_text()
    first, second = re.findall(r"((?:^\|.*\n)+)", text.split("## Figures")[1].split("## How it was made")[0], re.M)
    assert first.splitlines() == [
        "| model | sampler | fd_judge | kd |", "|---|---|---|---|",
        "| teacher | 2 steps, guidance 1.5 | 3 ± 0.25 | - |",
        "| this student | 1 step | 12.34 ± 0.25 | 0.5 |",
        "| rival | 1 step | 40 ± 0.25 | 0.5 |"]
    assert "99 ± 0.25" in second
    assert "99" not in first
    assert "has not been evaluated" not in text
    add_results(mine, [])
    assert "has not been evaluated" in (mine / "README.md").read_text()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"protocol_hash": "a", "protocol": {"name": "b"}, "metrics": {"fd": 3}}'])
def test_a_file_that_is_no_result_leaves_the_card_alone(mine: Path, tmp_path: Path, text: str) -> None:
    before = (mine / "README.md").read_text()
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json"):
        add_results(mine, [tmp_path / "r.json"])
    with pytest.raises(FileNotFoundError, match="no result file"):
        add_results(mine, [tmp_path / "none.json"])
    assert (mine / "README.md").read_text() == before


# ---- what goes wrong

def one_line(caught: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(caught.value)


def test_a_folder_that_holds_something_is_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for to in (tmp_path / "full", tmp_path / "full/mine.txt"):
        with pytest.raises(ValueError, match="not empty"):
            export(runs["eps"], to)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export(runs["eps"], tmp_path / "empty")
    assert (tmp_path / "empty/model_index.json").is_file()


@pytest.mark.parametrize("broken", ["stepdistill.export.card", "stepdistill.export.sha256", "stepdistill.export.os.replace",
                                    "diffusers.UNet2DModel.save_pretrained"])
def test_a_failure_leaves_nothing_behind(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="no space left"):
            export(runs["eps"], tmp_path / "to")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".to.partial").mkdir()                                           # what a killed export leaves does no harm
    (tmp_path / ".to.partial/old").write_text("")
    export(runs["eps"], tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["to"]
    assert not (tmp_path / "to/old").exists()


def test_runs_that_cannot_be_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run"):
        export(tmp_path, tmp_path / "to")
    run = with_sampler(runs["eps"], tmp_path / "run", {"times": []})
    with pytest.raises(ValueError, match="sampler") as caught:
        export(run, tmp_path / "to")
    assert one_line(caught)
    (state,) = run.glob("checkpoints/*/state.json")
    state.write_text("{")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        export(run, tmp_path / "to")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="nothing trained yet"):
        export(run, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_teacher_that_was_replaced_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["eps"], tmp_path / "run"))
    other = write_teacher(tmp_path / "other", "eps")
    UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4).save_pretrained(other)
    recipe = recipes.load(run / "recipe.yaml")
    (run / "recipe.yaml").write_text(recipes.dump(replace(recipe, teacher=replace(recipe.teacher, path=str(other)))))
    with pytest.raises(ValueError, match="was the teacher replaced") as caught:
        export(run, tmp_path / "to")
    assert one_line(caught)


def test_damaged_exports_are_noticed(folder: Path, mine: Path, tmp_path: Path) -> None:
    weights, notes = mine / "unet/diffusion_pytorch_model.safetensors", mine / "stepdistill.json"
    whole, text = weights.read_bytes(), notes.read_text()
    for damaged in (whole[:-4], whole[:-4] + b"abcd"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or was replaced") as caught:
            load_student(mine)
        assert one_line(caught)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no unet"):
        load_student(mine)
    weights.write_bytes(whole)
    for changes in ({"sampler": {"times": [0.1, 1.0]}}, {"sampler": 3}, {"sampler": {}}):
        notes.write_text(json.dumps({**json.loads(text), **changes}))
        with pytest.raises(ValueError, match="damaged") as caught:
            load_student(mine)
        assert one_line(caught)
    notes.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "unet_sha256"}))
    with pytest.raises(ValueError, match="lacks unet_sha256"):
        load_student(mine)
    notes.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_student(mine)
    notes.unlink()
    with pytest.raises(FileNotFoundError, match="not an exported student"):
        load_student(mine)
    with pytest.raises(FileNotFoundError, match="no exported student"):
        load_student(tmp_path / "nowhere")
    load_student(folder)
