"""Students of several networks as folders: a process without stepdistill changes networks where our sampler does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from export.test_export import distance, noises, ours, run_of, write_teacher
from foreign import WITHOUT_US
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_prompt_export import PROMPTS, shaken
from torch import Tensor
from zoo import basics, videos

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, start, steps
from stepdistill.diffusion.times import trailing
from stepdistill.eval.models import Opened
from stepdistill.export import export, load_student, shares_of
from stepdistill.models.experts import Experts
from stepdistill.models.load import load_teacher
from stepdistill.training import checkpoint
from stepdistill.training.assemble import assemble

PHASED = {"method": {"name": "phased_dmd", "fake_updates": 1}, "optim": {"student": {"lr": 1e-2}, "fake": {"lr": 1e-2}}, "steps": 4,
          "student": {"steps": 4}}
WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}
ODD = (1.0, 0.85, 0.6, 0.2)
GRIDS = {"wan-stock": SamplerSpec(trailing(4), renoise=0.0, boundaries=(0.5,)),
         "wan-own": SamplerSpec(ODD, renoise=0.0, boundaries=(ODD[2],))}

FOREIGN = WITHOUT_US + """
import json, sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
for job in json.load(open("jobs.json")):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=job["trust"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise, called = load_file(job["noise"])["noise"], []
    for name, part in pipe.components.items():
        if name.startswith(("unet", "transformer")) and part is not None:
            part.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    given = {"latents": noise} if "call" in job else {"noise": [noise]}
    x0 = pipe(**given, output_type="latent", **job.get("call", {"class_labels": [2, 0, 1]}))[0]
    save_file({"x0": x0.contiguous()}, job["folder"] + ".out", metadata={"called": " ".join(called), "class": type(pipe).__name__})
"""


def wan(folder: Path, build: Callable[[], DiffusionPipeline] = videos.wan21) -> Path:
    tokenizer, text = videos._anyflow_text()
    pipeline = build()
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=text)
    pipeline.save_pretrained(folder)
    return folder


def as_if_trained(teacher: Path, out: Path, spec: SamplerSpec, weights: Mapping[str, Tensor], call: Mapping[str, int],
                  said: Mapping[str, float], **changes: Any) -> Path:
    """A run whose newest checkpoint holds these weights of the student."""
    recipe = recipes.parse({**PHASED, "teacher": {"path": str(teacher), "call": dict(call)}, "guidance": 3.0, "ema_decay": 0,
                            "student": {"steps": len(spec.times)}, "data": {"prompts": "prompts.txt"}, **changes})
    (out / "checkpoints").mkdir(parents=True)
    (out / "recipe.yaml").write_text(recipes.dump(recipe))
    checkpoint.save(out / "checkpoints", 4, {f"role/student/{k}": v.clone() for k, v in weights.items()},
                    {"sampler": spec.to_dict(), "call": said}, keep=1)
    return out


class Videos:
    """A Wan 2.1 teacher, and a student of two experts."""

    def __init__(self, root: Path):
        self.teacher = wan(root / "teacher")
        self.model = load_teacher(self.teacher, prompts=PROMPTS, call=WAN, guidance=3.0)
        self.student = self.model.denoiser.divided((0.5,))
        self.weights = shaken(self.student.network.state_dict(), 0.2)
        self.student.network.load_state_dict(self.weights)
        self.noise = torch.randn(2, *self.model.shape, generator=torch.Generator().manual_seed(0))

    def ours(self, spec: SamplerSpec) -> Tensor:
        self.student.network.boundaries = spec.boundaries
        process = self.student.process
        with torch.no_grad():
            walk = steps(self.student, start(process, spec, self.noise), spec, self.model.condition(torch.arange(2)), Draws(0))
            return list(walk)[-1].x0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def classes(root: Path) -> Path:
    export(run_of(write_teacher(root / "eps", "eps"), root / "run", **PHASED), root / "student")
    return root / "student"


@pytest.fixture(scope="module")
def shown(root: Path) -> Videos:
    return Videos(root / "wan")


@pytest.fixture(scope="module")
def foreign(root: Path, classes: Path, shown: Videos) -> Path:
    jobs = [{"folder": str(classes), "trust": True}]
    noise = {str(classes): noises(load_student(classes)[1], 3)[0]}
    for name, spec in GRIDS.items():
        to = root / name
        export(as_if_trained(shown.teacher, root / f"run-{name}", spec, shown.weights, WAN, shown.model.call), to)
        call = {"prompt": PROMPTS, **json.loads((to / "stepdistill.json").read_text())["call"]}
        jobs.append({"folder": str(to), "trust": name == "wan-own", "call": call})
        noise[str(to)] = shown.noise
    for job in jobs:
        job["noise"] = f"{job['folder']}.noise"
        save_file({"noise": noise[job["folder"]]}, job["noise"])
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", FOREIGN], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def facts(folder: Path) -> dict[str, str]:
    with safe_open(f"{folder}.out", "pt") as file:
        return dict(file.metadata())


def test_a_class_conditional_folder_changes_networks(foreign: Path, classes: Path) -> None:
    model, spec = load_student(classes)
    assert isinstance(model.denoiser.network, Experts)
    assert spec.boundaries == model.denoiser.network.boundaries == (0.5,)
    assert facts(classes)["called"] == "unet unet unet_2 unet_2"
    theirs = load_file(f"{classes}.out")["x0"]
    assert distance(theirs, ours(model, spec, [2, 0, 1], noises(spec, 3))) < 1e-4
    model.denoiser.network.boundaries = (0.3,)                                   # or one call later
    assert distance(theirs, ours(model, spec, [2, 0, 1], noises(spec, 3))) > 1e-3
    card = (classes / "README.md").read_text()
    assert "2 networks, which take turns: the next one answers from 0.5\non down" in card
    notes = json.loads((classes / "stepdistill.json").read_text())
    assert Opened("x", model, spec, is_teacher=False, trained=4).describe()["sha256"] == notes["unet_sha256"]


def test_adapters_leave_as_networks(root: Path, classes: Path) -> None:
    """Two adapters on one teacher are trained, and each is merged into a network of its own."""
    run, to = run_of(root / "eps", root / "adapters", **{**PHASED, "lora": {"student": {"rank": 2, "alpha": 4}}}), root / "merged"
    export(run, to)
    model, _ = load_student(to)
    assert isinstance(model.denoiser.network, Experts)
    roles = assemble(recipes.load(run / "recipe.yaml"), Accelerator(cpu=True)).roles
    held = {k.removeprefix("ema/"): v for k, v in checkpoint.read(checkpoint.listed(run / "checkpoints")[-1])[0].items() if "ema/" in k}
    roles.module("student").load_state_dict(held)
    assert all(bool(v.any()) for k, v in held.items() if k.endswith("lora_B"))
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3], dtype=torch.float64)
    cond = model.condition(torch.arange(2))
    with torch.no_grad():
        theirs, mine = model.denoiser(x, t, cond).raw, roles.student(x, t, cond).raw
        assert distance(theirs, mine) < 1e-5
        assert all(a > 1e-3 for a in (theirs - roles.teacher(x, t, cond).raw).abs().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("part", ["unet", "unet_2"])
def test_every_network_is_checked(classes: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(classes, tmp_path / "mine")
    path = tmp_path / "mine" / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ValueError, match="damaged or was replaced"):
        load_student(tmp_path / "mine")


def test_more_networks_than_the_pipeline_holds(root: Path, classes: Path, tmp_path: Path) -> None:
    tensors, state = checkpoint.read(checkpoint.listed(root / "run" / "checkpoints")[-1])
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "recipe.yaml").write_text((root / "run" / "recipe.yaml").read_text())
    five = {**state["sampler"], "boundaries": [0.8, 0.6, 0.4, 0.2]}
    checkpoint.save(out / "checkpoints", 4, tensors, {**state, "sampler": five}, keep=1)
    with pytest.raises(ValueError, match="5 networks, and its pipeline holds 4"):
        export(out, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", GRIDS)
def test_a_plain_wan_pipeline_changes_networks(foreign: Path, shown: Videos, name: str) -> None:
    folder, spec = foreign / name, GRIDS[name]
    assert facts(folder) == {"class": "WanPipeline", "called": "transformer transformer transformer_2 transformer_2"}
    theirs = load_file(f"{folder}.out")["x0"]
    assert distance(theirs, shown.ours(spec)) < 1e-4
    late = SamplerSpec(spec.times, renoise=0.0, boundaries=(spec.times[3],))
    assert distance(theirs, shown.ours(late)) > 1e-3
    index = json.loads((folder / "model_index.json").read_text())
    above, below = shown.student.process.sigma(torch.tensor(spec.times[1:3], dtype=torch.float64)).tolist()
    assert index["boundary_ratio"] == pytest.approx((above + below) / 2)


def test_a_wan_student_comes_back(foreign: Path, shown: Videos) -> None:
    """Recorded again, from the pipeline it left as: the same two networks, changing between the same two calls."""
    spec = GRIDS["wan-stock"]
    model, back = load_student(foreign / "wan-stock", prompts=PROMPTS)
    assert back == spec
    assert isinstance(model.denoiser.network, Experts)
    assert spec.times[2] < model.denoiser.network.boundaries[0] < spec.times[1]
    with torch.no_grad():
        walk = steps(model.denoiser, start(model.denoiser.process, spec, shown.noise), spec, model.condition(torch.arange(2)), Draws(0))
        assert distance(list(walk)[-1].x0, load_file(foreign / "wan-stock.out")["x0"]) < 1e-4


@pytest.mark.parametrize("adapter", [False, True], ids=["copy", "adapter"])
def test_a_student_of_a_teacher_of_two(tmp_path: Path, adapter: bool) -> None:
    """Its networks take the places of the teacher's, and the boundary stays."""
    wan(tmp_path / "teacher", videos.wan22)
    model = load_teacher(tmp_path / "teacher", prompts=PROMPTS, call=WAN, guidance=3.0)
    network = model.denoiser.network
    weights = shaken(network.state_dict())
    if adapter:
        generator = torch.Generator().manual_seed(0)
        weights = {f"experts/{i}/blocks/0/attn1/to_q/lora_{part}": torch.randn(shape, generator=generator)
                   for i in (0, 1) for part, shape in (("A", (2, 24)), ("B", (24, 2)))}
    changes = {"method": {"name": "dmd2", "gan_weight": 0}, **({"lora": {"student": {"rank": 2}}} if adapter else {})}
    spec = SamplerSpec(trailing(2))
    run = as_if_trained(tmp_path / "teacher", tmp_path / "run", spec, weights, WAN, model.call, **changes)
    export(run, tmp_path / "to")
    assert json.loads((tmp_path / "to" / "model_index.json").read_text())["boundary_ratio"] == 0.875
    student = load_student(tmp_path / "to", prompts=PROMPTS)[0].denoiser.network
    assert isinstance(student, Experts)
    for i, expert in enumerate(student.experts):
        query, before = (dict(n.named_parameters())["blocks.0.attn1.to_q.weight"] for n in (expert, network.experts[i]))
        made = f"experts/{i}/blocks/0/attn1/to_q/lora_"
        expected = before + weights[f"{made}B"] @ weights[f"{made}A"] if adapter else weights[f"experts.{i}.blocks.0.attn1.to_q.weight"]
        torch.testing.assert_close(query, expected)
    if not adapter:
        with pytest.raises(ValueError, match="2 networks, and an adapter is of one: leave --lora-rank out"):
            export(run, tmp_path / "factored", lora_rank=2)


def test_other_pipelines_have_no_place_for_two(shown: Videos, tmp_path: Path) -> None:
    teacher = basics.stable_diffusion()
    teacher.save_pretrained(tmp_path / "teacher")
    weights = {f"experts.{i}.{k}": v for i in (0, 1) for k, v in teacher.unet.state_dict().items()}
    run = as_if_trained(tmp_path / "teacher", tmp_path / "run", SamplerSpec((1.0, 0.5), 0.0, boundaries=(0.5,)), weights, {}, {})
    with pytest.raises(ValueError, match="2 networks cannot be exported as a StableDiffusionPipeline"):
        export(run, tmp_path / "to")
    three = {**shown.weights, **{k.replace("experts.0", "experts.2"): v for k, v in shown.weights.items() if k.startswith("experts.0")}}
    run = as_if_trained(shown.teacher, tmp_path / "three", GRIDS["wan-own"], three, WAN, {})
    with pytest.raises(ValueError, match="3 networks cannot be exported as a WanPipeline"):
        export(run, tmp_path / "to")


def test_shares() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert shares_of({"experts.0.a.b": one, "experts.1.a.b": two}) == [{"a.b": one}, {"a.b": two}]
    assert shares_of({"experts/1/a/lora_A": two, "experts/0/a/lora_A": one}) == [{"a/lora_A": one}, {"a/lora_A": two}]
    assert shares_of({"a.experts.0": one}) == [{"a.experts.0": one}]
