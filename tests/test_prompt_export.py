"""Exports of pipelines with prompts: where stepdistill cannot be imported, stock classes walk the steps that our sampler walks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from foreign import WITHOUT_US
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import basics, images

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import lcm_grid, trailing
from stepdistill.eval.models import Opened
from stepdistill.export import add_results, export, load_student
from stepdistill.export.lora import kohya_flux, of_difference
from stepdistill.models.adapters import target_names
from stepdistill.models.load import load_teacher
from stepdistill.models.prompted import PromptTeacher
from stepdistill.training import checkpoint

PROMPTS = ("a red apple", "a cat on a mat")
SIZE = {"height": 16, "width": 16}
T5 = {**SIZE, "max_sequence_length": 24}


def flux() -> DiffusionPipeline:
    """FLUX.1-dev with its text encoders."""
    pipe, clip, t5 = images.flux(), images.clip_tokenizer(), images.t5_tokenizer()
    pipe.register_modules(text_encoder=images.clip_text(clip), tokenizer=clip, text_encoder_2=images.t5_text(t5), tokenizer_2=t5)
    return pipe


@dataclass(frozen=True)
class Family:
    build: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any] = field(default_factory=lambda: SIZE)
    component: str = "transformer"


FAMILIES = {
    "sd": Family(basics.stable_diffusion, component="unet"),
    "sd2-v": Family(lambda: basics.stable_diffusion("v_prediction"), component="unet"),
    "sdxl": Family(images.sdxl, component="unet"),
    "sd3": Family(images.sd3, T5),
    "flux": Family(flux, T5),
    "pixart": Family(images.pixart, {**T5, "use_resolution_binning": False, "clean_caption": False}),
}


def shaken(weights: Mapping[str, Tensor], by: float = 0.05) -> dict[str, Tensor]:
    """What training might have made of them."""
    generator = torch.Generator().manual_seed(4)
    return {k: v + by * v.std() * torch.randn(v.shape, generator=generator) if v.is_floating_point() and v.numel() > 1 else v
            for k, v in weights.items()}


class Taught:
    """A teacher on disk, the same recorded, and the weights of its student."""

    def __init__(self, name: str, folder: Path):
        self.family, self.folder, self.component = FAMILIES[name], folder, FAMILIES[name].component
        pipeline = self.family.build()
        pipeline.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: openrail++\ntags: [tiny]\n---\n\n# A teacher\n")
        self.weights = shaken(getattr(pipeline, self.component).state_dict())
        model = load_teacher(folder, prompts=PROMPTS, call=self.family.call, guidance=3.0)
        assert isinstance(model, PromptTeacher)
        self.model, self.student = model, model.denoiser.copy()
        self.student.network.load_state_dict(self.weights)

    def run(self, out: Path, spec: SamplerSpec, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
        """A run folder, as if trained: its newest checkpoint holds these tensors of the student."""
        (out / "checkpoints").mkdir(parents=True)
        adam = {"lr": 1e-4}
        recipe = recipes.parse({"teacher": {"path": str(self.folder), "call": dict(self.family.call)}, "guidance": 3.0, "ema_decay": 0,
                                "method": {"name": "dmd2", "gan_weight": 0}, "optim": {"student": adam, "fake": adam}, "steps": 5,
                                "data": {"prompts": "prompts.txt"}, **changes})
        (out / "recipe.yaml").write_text(recipes.dump(recipe))
        checkpoint.save(out / "checkpoints", 5, {f"role/student/{k}": v for k, v in (tensors or self.weights).items()},
                        {"sampler": spec.to_dict(), "call": self.model.call}, keep=1)
        return out

    def ours(self, spec: SamplerSpec, noise: list[Tensor]) -> Tensor:
        """x0 of our sampler from this noise."""
        walk = steps(self.student, start(self.student.process, spec, noise[0]), spec, self.model.condition(torch.arange(2)), Draws(0),
                     noise=lambda i: noise[i + 1])
        with torch.no_grad():
            return list(walk)[-1].x0

    def noise(self, spec: SamplerSpec) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, *self.model.shape, generator=generator) for _ in spec.times]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Taught]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: Taught(name, root / name) for name in FAMILIES}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- the folder, where stepdistill cannot be imported

@dataclass(frozen=True)
class Case:
    family: str
    scheduler: str
    spec: SamplerSpec

    @property
    def name(self) -> str:
        clip = "-clip" if self.spec.clip_x0 else ""
        return f"{self.family}-{'_'.join(f'{t:.2g}' for t in self.spec.times)}-{self.spec.renoise:g}{clip}"


LCM, TCD, DDIM, EULER, OWN = "LCMScheduler", "TCDScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "FewStepScheduler"
ODD = (1.0, 0.6, 0.25, 0.03)
CASES = [
    *(Case(family, EULER if family in ("sd3", "flux") else LCM, SamplerSpec(trailing(n))) for family in FAMILIES for n in (1, 2, 4)),
    *(Case(family, DDIM, SamplerSpec(trailing(4), renoise=0)) for family in ("sd", "sd2-v")),
    *(Case(family, EULER, SamplerSpec(trailing(4), renoise=0)) for family in ("sd3", "flux")),
    Case("sd", LCM, SamplerSpec(lcm_grid(4))),
    Case("sdxl", TCD, SamplerSpec(trailing(4), renoise=0.3)),
    Case("sd2-v", TCD, SamplerSpec((1.0, 0.667, 0.334), renoise=0)),             # DDIM would go from 666 to 332
    Case("sd", OWN, SamplerSpec(ODD, renoise=0)),
    Case("sd3", EULER, SamplerSpec((1.0, 0.6, 0.2))),                            # no equal steps, and yet two of Euler's numbers hold them
    *(Case(family, OWN, SamplerSpec(ODD)) for family in ("sd", "sd3", "flux")),
    Case("sd2-v", OWN, SamplerSpec(trailing(3), clip_x0=1.5)),                   # between two training steps
    Case("pixart", OWN, SamplerSpec((0.4,))),                                    # starts below pure noise
    Case("sdxl", OWN, SamplerSpec((0.8, 0.3), renoise=0.4)),
    Case("sd", OWN, SamplerSpec(trailing(2), renoise=0, clip_x0=1.0)),
]

FOREIGN = WITHOUT_US + """
import json, sys
import torch
import diffusers.utils.torch_utils as drawn
queue, original = [], drawn.randn_tensor
def randn_tensor(shape, **options):
    noise = queue.pop(0) if queue else original(shape, **options)
    assert noise.shape == torch.Size(shape)
    return noise
drawn.randn_tensor = randn_tensor                                                # before schedulers and pipelines take it
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
logging.disable_progress_bar()
for job in json.load(open("jobs.json")):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=job["trust"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if job["lora"]:
        pipe.scheduler = DiffusionPipeline.from_pretrained(job["scheduler"], local_files_only=True).scheduler
        pipe.load_lora_weights(job["lora"][0], weight_name=job["lora"][1], local_files_only=True)
    first, *queue[:] = load_file(job["noise"]).values()
    x0 = pipe(prompt=job["prompts"], latents=first, output_type="latent", **job["call"])[0]
    error = ""
    queue.clear()
    try:
        if job["wrong"]:
            pipe(prompt="snow", output_type="latent", **{**job["call"], "num_inference_steps": job["wrong"]})
    except ValueError as raised:
        error = str(raised)
    save_file({"x0": x0.contiguous()}, job["out"], metadata={"error": error, "scheduler": type(pipe.scheduler).__name__})
queue.clear()
drawn.randn_tensor = original
for snippet in json.load(open("snippets.json")):
    exec(snippet)
"""


def job(root: Path, name: str, folder: Path, noise: list[Tensor], call: Mapping[str, Any], trust: bool = False, wrong: int = 0,
        lora: tuple[str, str] | None = None, scheduler: Path | None = None) -> dict[str, Any]:
    files = {k: str(root / f"{name}.{k}.safetensors") for k in ("noise", "out")}
    save_file({f"{i:02d}": n for i, n in enumerate(noise)}, files["noise"])
    return {"folder": str(folder), "prompts": PROMPTS, "call": dict(call), "trust": trust, "wrong": wrong, "lora": lora,
            "scheduler": str(scheduler), **files}


def notes(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stepdistill.json").read_text()))


def snippet(folder: Path, picture: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return str(found).replace("sample.png", picture)


def adapter(taught: Taught, rank: int) -> dict[str, Tensor]:
    """Weights of a trained adapter over every layer that one goes to by default."""
    generator, found = torch.Generator().manual_seed(5), {}
    layers = dict(taught.student.network.named_modules())
    for name in target_names(taught.student.network, ()):
        shape = layers[name].weight.shape
        found[f"{name.replace('.', '/')}/lora_A"] = 0.2 * torch.randn(rank, *shape[1:], generator=generator)
        found[f"{name.replace('.', '/')}/lora_B"] = 0.2 * torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
    return found


LORAS = ("sd", "sdxl", "sd3", "flux")
TWO = SamplerSpec(trailing(2))


@pytest.fixture(scope="module")
def foreign(taught: Mapping[str, Taught], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, adapter and card, run by one process that has no stepdistill."""
    root, jobs = tmp_path_factory.mktemp("foreign"), []
    for case in CASES:
        family, to = taught[case.family], root / case.name
        export(family.run(root / "runs" / case.name, case.spec), to)
        jobs.append(job(root, to.name, to, family.noise(case.spec), notes(to)["call"], case.scheduler == OWN, len(case.spec.times) + 1))
    for name in LORAS:
        family, to = taught[name], root / f"lora-{name}"
        adapted = family.run(root / "runs" / to.name, TWO, adapter(family, 3), lora={"student": {"rank": 3, "alpha": 6.0}})
        export(adapted, to)
        call, noise = notes(to)["call"], family.noise(TWO)
        jobs.append(job(root, f"{name}-merged", to, noise, call))
        jobs.append(job(root, f"{name}-lora", family.folder, noise, call, lora=(str(to / "lora"), "pytorch_lora_weights.safetensors"),
                        scheduler=to))
        if family.component == "unet":
            jobs.append(job(root, f"{name}-kohya", family.folder, noise, call, lora=(str(to / "lora_kohya"), f"{to.name}.safetensors"),
                            scheduler=to))
    for case in CASES:
        if (root / case.name / "stock_scheduler").is_dir():                      # as the card says
            to = root / f"stock-{case.name}"
            shutil.copytree(root / case.name, to)
            shutil.rmtree(to / "scheduler")
            (to / "stock_scheduler").rename(to / "scheduler")
            index, (kind, *keywords) = json.loads((to / "model_index.json").read_text()), notes(to)["schedule"]["stock_call"].items()
            (to / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind[1]]}))
            call = {k: v for k, v in notes(to)["call"].items() if k != "num_inference_steps"}
            jobs.append(job(root, to.name, to, taught[case.family].noise(case.spec), {**call, **dict(keywords)}))
    (root / "jobs.json").write_text(json.dumps(jobs))
    cards = [root / CASES[2].name, root / next(c.name for c in CASES if c.scheduler == OWN)]
    (root / "snippets.json").write_text(json.dumps([snippet(folder, f"card{i}.png") for i, folder in enumerate(cards)]))
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", FOREIGN], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stderr.txt").write_text(done.stderr)
    return root


def theirs(foreign: Path, name: str) -> Tensor:
    return load_file(foreign / f"{name}.out.safetensors")["x0"]


def said(foreign: Path, name: str) -> dict[str, str]:
    with (foreign / f"{name}.out.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header["__metadata__"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_folder_samples_as_we_do(foreign: Path, taught: Mapping[str, Taught], case: Case) -> None:
    family = taught[case.family]
    x0 = family.ours(case.spec, family.noise(case.spec))
    assert said(foreign, case.name)["scheduler"] == case.scheduler
    assert distance(theirs(foreign, case.name), x0) < 1e-4
    assert distance(x0[[1, 0]], x0) > 1e-2, "prompts must matter, or this proves little"


def test_the_stock_way_that_a_card_names_is_the_same(foreign: Path, taught: Mapping[str, Taught]) -> None:
    cases = [case for case in CASES if (foreign / f"stock-{case.name}").is_dir()]
    assert {case.family for case in cases} == {"sd", "sd3", "flux"}
    for case in cases:
        assert notes(foreign / case.name)["schedule"]["stock_call"]["scheduler"] == said(foreign, f"stock-{case.name}")["scheduler"] != OWN
        assert distance(theirs(foreign, f"stock-{case.name}"), theirs(foreign, case.name)) < 1e-4


def test_loading_says_nothing_alarming(foreign: Path) -> None:
    lines = (foreign / "stderr.txt").read_text().splitlines()
    assert not [line for line in lines if "not expected" in line or "Expected types" in line]


def test_a_wrong_number_of_steps(foreign: Path) -> None:
    """LCM at its own points and the scheduler of our own refuse more steps; DDIM and Euler cannot, and the card says so."""
    for case in CASES:
        error, card = said(foreign, case.name)["error"], (foreign / case.name / "README.md").read_text()
        if case.scheduler == OWN:
            assert error.startswith(f"this student was trained for {len(case.spec.times)} steps")
        elif case.scheduler in (LCM, TCD) and case.spec.times == trailing(len(case.spec.times)):
            assert "num_inference_steps" in error
            assert f"raises an error above {len(case.spec.times)}" in card
        else:
            assert not error
            assert "without a word" in card


def test_the_cards_snippets_make_pictures(foreign: Path) -> None:
    for name in ("card0.png", "card1.png"):
        with Image.open(foreign / name) as picture:
            assert picture.size == (16, 16)
            assert len(set(np.asarray(picture).flatten().tolist())) > 10
    assert "trust_remote_code" not in snippet(foreign / CASES[2].name, "x")


def test_a_student_that_starts_below_pure_noise_needs_a_pipeline_that_asks(taught: Mapping[str, Taught], tmp_path: Path) -> None:
    run = taught["sd3"].run(tmp_path / "run", SamplerSpec((0.4,)))
    with pytest.raises(ValueError, match=r"starts from noise of standard deviation 1, the student from 0\.66666"):
        export(run, tmp_path / "to")
    with pytest.raises(ValueError, match="solver heun"):
        export(taught["sd"].run(tmp_path / "heun", SamplerSpec((1.0,), renoise=0, solver="heun")), tmp_path / "to")
    assert not (tmp_path / "to").exists()


# ---- what the folder says

def test_the_metadata(foreign: Path) -> None:
    flow = notes(foreign / next(c.name for c in CASES if c.family == "flux" and len(c.spec.times) == 4))
    assert flow["schedule"]["timesteps"] == pytest.approx([1000, 900, 750, 500])
    assert flow["schedule"]["sigmas"] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert (flow["schedule"]["shift"], flow["schedule"]["renoise"], flow["schedule"]["guidance"]) == (3.0, 1.0, 3.0)
    assert flow["dmd2_config"] == {"num_inference_steps": 4, "denoising_timesteps": [1000, 900, 750, 500], "solver": "sde",
                                   "guidance_scale": 3.0}
    table = notes(foreign / CASES[2].name)
    assert table["schedule"]["timesteps"] == [999, 749, 499, 249]
    assert table["call"] == {**SIZE, "num_inference_steps": 4, "guidance_scale": 1.0}
    assert table["dmd2_config"] is None


def test_the_licence_is_the_teachers(foreign: Path, taught: Mapping[str, Taught], tmp_path: Path) -> None:
    assert notes(foreign / CASES[0].name)["licence"] == "openrail++"
    assert "license: openrail++\n" in (foreign / CASES[0].name / "README.md").read_text()
    family = taught["sd"]
    teacher = tmp_path / "teacher"
    shutil.copytree(family.folder, teacher)
    (teacher / "README.md").unlink()
    (teacher / "LICENSE.md").write_text("Do as you please.")
    run = family.run(tmp_path / "run", TWO)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(family.folder), str(teacher)))
    export(run, tmp_path / "to")
    assert (tmp_path / "to" / "LICENSE.md").read_text() == "Do as you please."
    assert "license: other\nlicense_name: LICENSE.md in this folder" in (tmp_path / "to" / "README.md").read_text()


# ---- adapters

@pytest.mark.parametrize("name", LORAS)
def test_an_adapter_is_the_merged_student(foreign: Path, taught: Mapping[str, Taught], name: str) -> None:
    merged, family = theirs(foreign, f"{name}-merged"), taught[name]
    assert distance(theirs(foreign, f"{name}-lora"), merged) < 1e-4
    assert distance(family.ours(TWO, family.noise(TWO)), merged) > 1e-2
    if family.component == "unet":
        assert distance(theirs(foreign, f"{name}-kohya"), merged) < 1e-4
        kohya = load_file(foreign / f"lora-{name}" / "lora_kohya" / f"lora-{name}.safetensors")
        assert {key.split(".", 1)[1] for key in kohya} == {"lora_down.weight", "lora_up.weight", "alpha"}
        assert all(key.startswith("lora_unet_") for key in kohya)
        assert {float(v) for k, v in kohya.items() if k.endswith("alpha")} == {3.0}


def test_kohyas_flux_is_read_back_as_it_was() -> None:
    """At the widths of FLUX.1, which diffusers' reader takes for granted."""
    network = FluxTransformer2DModel(in_channels=4, num_layers=2, num_single_layers=1, num_attention_heads=1, attention_head_dim=8,
                                     joint_attention_dim=4, pooled_projection_dim=4, axes_dims_rope=(2, 2, 4))
    generator, factors = torch.Generator().manual_seed(0), {}
    for name in target_names(network, ()):
        out = {"to_q": 3072, "to_k": 3072, "to_v": 3072, "proj_mlp": 12288}.get(name.split(".")[-1], 5) if name.startswith("single") else 6
        factors[name] = torch.randn(2, 3, generator=generator), torch.randn(out, 2, generator=generator)
    kohya = kohya_flux(factors)
    assert kohya is not None
    assert kohya["lora_unet_double_blocks_1_txt_attn_qkv.lora_up.weight"].shape == (18, 6)
    back = FluxPipeline.lora_state_dict(dict(kohya))
    assert back.keys() == {f"transformer.{name}.{part}.weight" for name in factors for part in ("lora_A", "lora_B")}
    for name, (down, up) in factors.items():
        delta = back[f"transformer.{name}.lora_B.weight"] @ back[f"transformer.{name}.lora_A.weight"]
        assert distance(delta, up @ down) < 1e-6, name
    assert kohya_flux({k: v for k, v in factors.items() if not k.endswith("to_k")}) is None
    assert kohya_flux({**factors, "x_embedder": factors["single_transformer_blocks.0.proj_out"]}) is None


def test_a_style_on_top_of_the_student(foreign: Path, taught: Mapping[str, Taught], tmp_path: Path) -> None:
    """Two adapters at scales 1 and 0.7 are both differences added."""
    generator, folder = torch.Generator().manual_seed(8), taught["sd"].folder
    style = {f"down_blocks.1.attentions.0.transformer_blocks.0.attn{i}.to_q.{part}.weight": torch.randn(shape, generator=generator)
             for i in (1, 2) for part, shape in (("lora_A", (2, 16)), ("lora_B", (16, 2)))}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=style)

    def sampled(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return pipe("snow", **SIZE, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="latent")[0]

    by_hand = StableDiffusionPipeline.from_pretrained(foreign / "lora-sd")       # its weights hold the student already
    scheduler, student = by_hand.scheduler, sampled(by_hand)
    for i in (1, 2):
        name = f"down_blocks.1.attentions.0.transformer_blocks.0.attn{i}.to_q"
        by_hand.unet.get_submodule(name).weight.data += 0.7 * style[f"{name}.lora_B.weight"] @ style[f"{name}.lora_A.weight"]
    stacked = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
    stacked.load_lora_weights(foreign / "lora-sd" / "lora", adapter_name="student")
    stacked.load_lora_weights(tmp_path, adapter_name="style")
    stacked.set_adapters(["student", "style"], [1.0, 0.7])
    assert distance(sampled(stacked), sampled(by_hand)) < 1e-4
    assert distance(sampled(by_hand), student) > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_difference_of_low_rank_is_found(taught: Mapping[str, Taught], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           name: str) -> None:
    family, generator = taught[name], torch.Generator().manual_seed(6)
    weights = dict(family.model.denoiser.network.state_dict())
    layers = {n: m for n, m in family.student.network.named_modules()
              if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and m.weight.numel()}
    for layer in layers:
        value = weights[f"{layer}.weight"]
        flat = 0.1 * torch.randn(len(value), 2, generator=generator) @ torch.randn(2, value[0].numel(), generator=generator)
        weights[f"{layer}.weight"] = value + flat.reshape(value.shape)
    assert cli.run(["export", str(family.run(tmp_path / "run", TWO, weights)), "--to", str(tmp_path / "to"), "--lora-rank", "2"]) == 0
    assert "adapter of rank 2: relative error" in capsys.readouterr().out
    fit = notes(tmp_path / "to")["lora"]["fit"]
    assert (fit["rank"], fit["layers"], fit["beyond"]) == (2, len(layers), pytest.approx(0, abs=1e-9))
    assert fit["error"] <= fit["worst_error"] < 1e-4
    whole = DiffusionPipeline.from_pretrained(tmp_path / "to")

    def sampled(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)                                                     # Euler's steps are handed no generator
        return pipe(list(PROMPTS), output_type="latent", generator=torch.Generator().manual_seed(0), **notes(tmp_path / "to")["call"])[0]

    for place, file in [("lora", "pytorch_lora_weights"), ("lora_kohya", "to")][: 1 + (family.component == "unet")]:
        pipe = DiffusionPipeline.from_pretrained(family.folder, scheduler=whole.scheduler)
        before = sampled(pipe)
        pipe.load_lora_weights(tmp_path / "to" / place, weight_name=f"{file}.safetensors")
        assert distance(sampled(pipe), sampled(whole)) < 1e-4, place
        assert distance(before, sampled(whole)) > 1e-2


def test_what_an_adapter_leaves_out() -> None:
    """The tail of the singular values, and the biases."""
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    student = {k: v.clone() for k, v in network.state_dict().items()}
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (5, 6))
    student["0.weight"] += u[:, :3] @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ v[:3]
    student["0.bias"] += torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0])
    factors, fit = of_difference(network, student, 1)
    assert fit.error == pytest.approx((5 / 21) ** 0.5, rel=1e-4)
    assert (fit.worst, fit.beyond) == ("0", pytest.approx(9 / 30))
    assert [tuple(f.shape) for f in factors["0"]] == [(1, 6), (5, 1)]
    assert of_difference(network, student, 9)[1].error < 1e-5
    with pytest.raises(ValueError, match="differs from its teacher"):
        of_difference(network, network.state_dict(), 1)
    with pytest.raises(ValueError, match="rank of at least 1"):
        of_difference(network, student, 0)


def test_a_wide_matrix_is_factored_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(60, 50, bias=False)
    low = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("stepdistill.export.lora.EXACT", 8)
    before = torch.get_rng_state()
    assert of_difference(torch.nn.Sequential(network), {"0.weight": network.weight.detach() + low}, 3)[1].error < 1e-4
    assert torch.equal(before, torch.get_rng_state())


def test_a_rank_is_refused_where_it_says_nothing(taught: Mapping[str, Taught], tmp_path: Path) -> None:
    family = taught["sd"]
    adapted = family.run(tmp_path / "adapted", TWO, adapter(family, 2), lora={"student": {"rank": 2}})
    with pytest.raises(ValueError, match="adapter of rank 2 already"):
        export(adapted, tmp_path / "to", lora_rank=4)
    with pytest.raises(ValueError, match="loads no adapters"):
        export(taught["pixart"].run(tmp_path / "pixart", TWO), tmp_path / "to", lora_rank=4)


# ---- back again

@pytest.fixture(scope="module")
def student(taught: Mapping[str, Taught], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with the scheduler of our own."""
    root = tmp_path_factory.mktemp("student")
    export(taught["sd3"].run(root / "run", SamplerSpec(ODD)), root / "student")
    return root / "student"


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_an_export_comes_back(foreign: Path, taught: Mapping[str, Taught], name: str) -> None:
    family, case = taught[name], next(c for c in CASES if c.family == name and c.spec.times == ODD)
    model, spec = load_student(foreign / case.name, prompts=PROMPTS)
    assert spec == case.spec
    noise = family.noise(spec)
    walk = steps(model.denoiser, start(model.denoiser.process, spec, noise[0]), spec, model.condition(torch.arange(2)), Draws(0),
                 noise=lambda i: noise[i + 1])
    with torch.no_grad():
        assert distance(list(walk)[-1].x0, theirs(foreign, case.name)) < 1e-4


def pixels(folder: Path, i: int) -> np.ndarray[Any, Any]:
    with Image.open(folder / f"{i:06d}.png") as picture:
        return np.asarray(picture).astype(int)


def test_sample_with_prompts(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Picture i is the same in any batch and any count, but for the last bit."""
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "snow"]) + "\n")
    sample = lambda *options: cli.run(["sample", str(student), *map(str, options)])                              # noqa: E731
    assert sample("--to", tmp_path / "a", "--prompts", tmp_path / "prompts.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 3
    assert (tmp_path / "a" / "prompts.txt").read_text().splitlines() == [*PROMPTS, "snow"]
    assert sample("--to", tmp_path / "b", "--prompts", tmp_path / "prompts.txt", "--count", 4, "--batch-size", 1) == 0
    assert (tmp_path / "b" / "prompts.txt").read_text().splitlines() == [*PROMPTS, "snow", PROMPTS[0]]
    for i in range(3):
        assert abs(pixels(tmp_path / "a", i) - pixels(tmp_path / "b", i)).max() <= 1
    assert abs(pixels(tmp_path / "b", 0) - pixels(tmp_path / "b", 3)).max() > 1
    assert sample("--to", tmp_path / "c", "--prompt", PROMPTS[1], "--count", 2) == 0
    assert abs(pixels(tmp_path / "c", 1) - pixels(tmp_path / "a", 1)).max() <= 1
    assert abs(pixels(tmp_path / "c", 0) - pixels(tmp_path / "a", 0)).max() > 1


def test_sample_with_other_steps_warns(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(foreign / CASES[1].name), "--prompt", "snow", "--count", "1", "--to"]
    assert cli.run([*arguments, str(tmp_path / "a"), "--steps", "2"]) == 0
    assert "was made for" not in capsys.readouterr().err
    assert cli.run([*arguments, str(tmp_path / "b"), "--steps", "3"]) == 0
    assert "was made for 2 steps and is run with 3" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["sample", "{student}", "--to", "{tmp}/x"], "give --prompt or --prompts"),
    (["sample", "{student}", "--to", "{tmp}/x", "--prompt", "a", "--prompts", "b.txt"], "not both"),
    (["sample", "{student}", "--to", "{tmp}/x", "--prompt", "a", "--label", "b"], "leave --label out"),
    (["sample", "{student}", "--to", "{tmp}/x", "--prompt", "a", "--steps", "2"], "sampled in 4 steps at its own times"),
    (["sample", "{student}", "--to", "{tmp}/x", "--prompts", "{tmp}/none.txt"], "does not exist"),
    (["eval", "{student}", "--to", "{tmp}/x.json"], "choose a protocol that has some"),
])
def test_what_cannot_be_asked_of_a_prompted_student(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                    arguments: list[str], message: str) -> None:
    assert cli.run([a.format(student=student, tmp=tmp_path) for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_padded_together_are_sampled_alone(taught: Mapping[str, Taught]) -> None:
    model = taught["sd"].model
    assert Opened("x", model, TWO, False, 2).most_at_once > 1000
    assert Opened("x", replace(model, bank=None), TWO, False, 2).most_at_once == 1


def test_figures_in_the_card(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "s"))
    assert "has not been evaluated" in (copy / "README.md").read_text()
    sampler = {**notes(copy)["sampler"], "times": [1.0]}
    (tmp_path / "r.json").write_text(json.dumps({
        "protocol": {"name": "emoji"}, "protocol_hash": "0123abcd", "model": {"name": "s", "sha256": notes(copy)["weights_sha256"]},
        "sampler": sampler, "metrics": {"clip_emoji_cos": {"value": 0.61, "se": 0.02}}}))
    add_results(copy, [tmp_path / "r.json"])
    text = (copy / "README.md").read_text()
    assert "| this student | 1 step | 0.61 ± 0.02 |" in text
    assert "has not been evaluated" not in text


def test_a_damaged_export_is_named(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "s")
    weights = tmp_path / "s" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="damaged or were replaced"):
        load_student(tmp_path / "s", prompts=PROMPTS)
    (tmp_path / "s" / "stepdistill.json").write_text(json.dumps({k: v for k, v in notes(tmp_path / "s").items() if k != "schedule"}))
    with pytest.raises(ValueError, match="it lacks schedule"):
        load_student(tmp_path / "s", prompts=PROMPTS)
