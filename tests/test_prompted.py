"""A whole pipeline with prompts: trained without pictures, exported as a pipeline of its own class, loaded by plain diffusers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from tiny import final_tensors, png_size, unequal
from zoo import basics, images

from stepdistill import cli, pairs
from stepdistill import recipe as recipes
from stepdistill.data.pictures import read_pictures
from stepdistill.data.prompts import read_prompts
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.export import export
from stepdistill.images import save_png, to_image
from stepdistill.methods import METHODS
from stepdistill.methods.base import Images, Pairs
from stepdistill.models.load import load_teacher
from stepdistill.recipe import build
from stepdistill.training import loop, measure
from stepdistill.training.assemble import assemble
from stepdistill.training.measure import dry_run

PROMPTS = ("a red apple", "a cat on the mat", "snow", "two blue houses")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved Stable Diffusion of a few thousand weights and a file of prompts."""
    folder = tmp_path_factory.mktemp("sd")
    basics.stable_diffusion().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def tree(world, **changes):
    return {"teacher": {"path": str(world / "teacher"), "call": {"height": 16, "width": 16}},
            "student": {"steps": 2}, "method": {"name": "dmd2", "fake_updates": 2, "gan_weight": 0},
            "optim": {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}}, "data": {"prompts": str(world / "prompts.txt")},
            "guidance": 3.0, "steps": 2, "batch_size": 4, "precision": "fp32", "ema_decay": 0.9, "preview_count": 2,
            "trackers": [], **changes}


@pytest.fixture(scope="module")
def run(world):
    out = world / "run"
    assert loop.start(recipes.parse(tree(world)), out).finished
    return out


@pytest.fixture(scope="module")
def student(run):
    export(run, run.parent / "student")
    return run.parent / "student"


def teacher_of(world, **options):
    return load_teacher(world / "teacher", prompts=PROMPTS, call={"height": 16, "width": 16}, **options)


def test_prompts_take_the_place_of_classes(world):
    teacher = teacher_of(world, guidance=3.0)
    assert (teacher.classes, teacher.labels, teacher.shape) == (4, PROMPTS, (4, 8, 8))
    cond = teacher.condition(torch.tensor([2, 0]))
    alone = teacher.recording.encode(teacher.inputs(["snow"]), 1)
    assert torch.equal(cond["encoder_hidden_states"][:1], alone["encoder_hidden_states"])
    assert torch.equal(cond.null["encoder_hidden_states"][0], cond.null["encoder_hidden_states"][1])


def test_autocast_rounds_neither_what_goes_in_nor_what_comes_out(world):
    teacher = teacher_of(world, autocast=torch.bfloat16)
    x, seen = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0)), []
    network = teacher.denoiser.network
    with network.conv_in.register_forward_hook(lambda module, args, out: seen.append((args[0], out.dtype))), torch.no_grad():
        raw = teacher.denoiser(x, torch.full((2,), 0.5), teacher.condition(torch.arange(2))).raw
    given, out = seen[0]
    assert given.dtype == torch.float32
    assert out == torch.bfloat16
    assert type(network.conv_in) is not torch.nn.Conv2d                          # which would round it
    assert not torch.equal(raw, raw.bfloat16().float())


def test_pictures_are_what_the_pipelines_own_decoder_makes(world):
    teacher = teacher_of(world)
    x0 = torch.randn(2, 4, 8, 8)
    pipeline = teacher.recording.driven.pipeline
    with torch.no_grad():
        expected = (pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(teacher.pictures(x0), (expected * 255).round().to(torch.uint8))


def test_training_moves_the_student_and_leaves_a_preview(world, run):
    tensors = final_tensors(run)
    student = {k.removeprefix("role/student/"): v for k, v in tensors.items() if k.startswith("role/student/")}
    teacher = teacher_of(world).denoiser.network.state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(v, teacher[k]) for k, v in student.items())
    assert png_size(run / "previews" / "00000002.png") == (2 * 16 + 2, 16) or png_size(run / "previews" / "00000002.png")[1] >= 16


def test_the_export_is_a_pipeline_of_the_teachers_class(student):
    pipeline = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    notes = json.loads((student / "stepdistill.json").read_text())
    assert notes["call"] == {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
    assert recipes.load(student / "recipe.yaml").guidance == 3.0
    card = (student / "README.md").read_text()
    assert "num_inference_steps=2" in card
    assert "guidance_scale=1.0" in card


def test_built_in_guidance_is_not_doubled(student, tmp_path, capsys):
    assert "guidance of its teacher (3.0) is built in" in (student / "README.md").read_text()
    asked = ["sample", str(student), "--prompt", "snow", "--count", "1", "--to", str(tmp_path / "to")]
    assert cli.run([*asked, "--guidance", "5"]) == 2
    assert "guidance 3 of its teacher is part of this student" in capsys.readouterr().err
    assert cli.run([*asked, "--guidance", "1"]) == 0


def test_the_export_loads_and_runs_where_stepdistill_cannot_be_imported(student):
    code = ("import sys; sys.modules['stepdistill'] = None\n"
            "from diffusers import DiffusionPipeline\n"
            f"pipe = DiffusionPipeline.from_pretrained({str(student)!r})\n"
            "image = pipe('a red apple', height=16, width=16, num_inference_steps=2, guidance_scale=1.0)[0][0]\n"
            "print(image.size)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("(16, 16)")


def test_one_step_of_the_exported_pipeline_equals_our_sampler(world, run):
    """From the same noise: the LCM scheduler's boundary terms are below 1e-6 at the first step."""
    teacher, spec = teacher_of(world), SamplerSpec((1.0,))
    weights = {k.removeprefix("ema/"): v for k, v in final_tensors(run).items() if k.startswith("ema/")}
    teacher.denoiser.network.load_state_dict(weights)
    draws = Draws(7, range(2))
    ours = sample(teacher.denoiser, spec, teacher.condition(torch.tensor([0, 1])), draws, teacher.shape)
    pipeline = DiffusionPipeline.from_pretrained(run.parent / "student") if (run.parent / "student").exists() else None
    if pipeline is None:
        export(run, run.parent / "student")
        pipeline = DiffusionPipeline.from_pretrained(run.parent / "student")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(list(PROMPTS[:2]), height=16, width=16, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
                      latents=draws.each("start").normal(*teacher.shape))[0]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("lora", [{}, {"student": {"rank": 2}, "fake": {"rank": 2}}])
def test_a_dry_run_counts_every_role_and_pass(world, lora):
    chosen = recipes.parse(tree(world, lora=lora))
    report = dry_run(assemble(chosen, loop.make_accelerator(chosen, None)))
    assert {p["role"] for p in report["passes"]} == {"teacher", "student", "fake"}
    assert [p["gradient"] for p in report["passes"] if p["role"] == "student"].count("weights") == 1
    parameters = {name: row["parameters"] for name, row in report["bytes"].items()}
    assert parameters["student"] < parameters["teacher"] / 2 if lora else parameters["student"] == parameters["teacher"]


@pytest.fixture(scope="module")
def adapted_run(world):
    out = world / "lora_run"
    recipe = tree(world, lora={"student": {"rank": 4, "alpha": 8}, "fake": {"rank": 2}}, gradient_checkpointing=True)
    recipe["optim"]["student"]["lr"] = 0.05
    assert loop.start(recipes.parse(recipe), out).finished
    export(out, world / "lora_student")
    return out


def latents(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return pipeline(list(PROMPTS[:2]), height=16, width=16, num_inference_steps=1, guidance_scale=1.0, output_type="latent", latents=noise,
                    **options)[0]


def test_adapters_hold_one_base_and_small_checkpoints(adapted_run, run):
    adapted, full = final_tensors(adapted_run), final_tensors(run)
    size = lambda tensors: sum(v.numel() for k, v in tensors.items() if k.startswith(("role/", "ema/", "optim/")))   # noqa: E731
    assert size(adapted) < size(full) / 2
    assert all("lora_" in k for k in adapted if k.startswith(("role/", "ema/")))


def test_a_merged_adapter_and_the_adapter_alone_give_the_same_pictures(world, adapted_run):
    merged = latents(DiffusionPipeline.from_pretrained(world / "lora_student"))
    pipeline = DiffusionPipeline.from_pretrained(world / "teacher")
    pipeline.scheduler = DiffusionPipeline.from_pretrained(world / "lora_student").scheduler
    before = latents(pipeline)
    pipeline.load_lora_weights(world / "lora_student" / "lora")
    alone = latents(pipeline)
    assert float((merged - before).abs().max() / before.abs().max()) > 1e-3                 # it learnt something
    assert float((merged - alone).abs().max() / merged.abs().max()) < 1e-4


def test_a_resumed_adapter_run_equals_an_uninterrupted_one(world, tmp_path):
    whole, halves = (tree(world, lora={"student": {"rank": 2}, "fake": {"rank": 2}}, steps=4, checkpoint_every=2) for _ in range(2))
    loop.start(recipes.parse(whole), tmp_path / "whole")
    loop.start(recipes.parse(halves), tmp_path / "halves")
    newest = sorted((tmp_path / "halves" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert loop.resume(tmp_path / "halves").finished
    assert not unequal(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "halves"))


def test_a_guidance_embedding_stays_an_input_of_the_student(tmp_path):
    """FLUX-like: the student keeps the number it was made with, and its export asks for it."""
    exhibit = images.EXHIBITS["flux2"]
    from stepdistill.models.prompted import PipelineCodec, PromptTeacher
    from stepdistill.models.recording import record

    recording = record(exhibit.build(), exhibit.inputs)
    recording.denoiser.guidance = 3.5
    teacher = PromptTeacher(recording.denoiser, recording.shape, 1, None, PipelineCodec(recording, exhibit.inputs), tmp_path, {}, {},
                            recording=recording, inputs=exhibit.inputs, prompts=("a",), bank=None)
    student = recording.denoiser.copy()
    cond = recording.encode(exhibit.inputs(["a"]), 1)
    x_t, t = torch.randn(1, *teacher.shape), torch.tensor([0.5])
    assert torch.equal(student(x_t, t, cond, w=1.0).raw, recording.denoiser(x_t, t, cond).raw)
    assert teacher.call == {"guidance_scale": 3.5}


@pytest.fixture(scope="module")
def captioned(world):
    """Eight pictures, captions beside them."""
    folder = world / "pictures"
    for i in range(8):
        noise = torch.randint(0, 256, (3, 20, 16), generator=torch.Generator().manual_seed(i))
        save_png(to_image(noise.to(torch.uint8)), folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % 4])
    return folder


CHEAP = {"progressive": {"start": 8}, "dp_dmd": {"teacher_steps": 4, "anchor_steps": 1}, "imagine_flash": {"teacher_steps": 2},
         "ctm": {"points": 6, "solver_steps": 1}, "swiftbrush_v2": {"align_weight": 0.0}, "dmd2": {"fake_updates": 2},
         "phased_dmd": {"experts": False}}


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def teacher(request, world):
    """What a recipe says of its teacher: a U-Net that predicts eps, or a transformer that flows."""
    if request.param == "sd15":
        return tree(world)["teacher"]
    images.EXHIBITS["sd3"].build().save_pretrained(world / "sd3")
    return {"path": str(world / "sd3"), "call": {"height": 16, "width": 16, "max_sequence_length": 24}}


def test_experts_without_a_place_in_the_pipeline_are_refused_before_they_are_trained(world):
    chosen = recipes.parse(tree(world, method={"name": "phased_dmd"}))
    with pytest.raises(ValueError, match="2 networks cannot be exported as a StableDiffusionPipeline"):
        assemble(chosen, loop.make_accelerator(chosen, None))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.finishes and name != "add"])
def test_every_method_trains_on_prompts(world, captioned, tmp_path, teacher, name):
    """Two steps from whatever it reads: prompts, captioned pictures, pairs made of prompts. add refuses pipelines with prompts."""
    method = METHODS[name]
    config = build(method.Config, CHEAP.get(name, {}), "method")
    streams = method.data(config).values()
    folder = {"folder": str(captioned)} if any(isinstance(stream, Images) for stream in streams) else {}
    trained = {role for role, made in method.needs(config).items() if made.trains}
    chosen = recipes.parse(tree(
        world, teacher=teacher, method={"name": name, **CHEAP.get(name, {})}, optim={role: {"lr": 1e-4} for role in trained},
        student={"steps": 1 if method.one_step else 2}, data={**tree(world)["data"], **folder}))
    if any(isinstance(stream, Pairs) for stream in streams):
        pairs.make(chosen, tmp_path / "pairs", count=6, steps=2)
        chosen = replace(chosen, data=replace(chosen.data, pairs=tmp_path / "pairs"))
    run = assemble(chosen, loop.make_accelerator(chosen, None))
    before = {role: [p.clone() for p in run.roles.parameters(role)] for role in run.roles.trains}
    sample = next(iter(run.batch(run.draws(0, 0, 0)).values()))
    assert sample.x0 is None or sample.x0.shape == (4, 4, 8, 8)
    measure.iterate(run, 0, 2)
    for role, held in before.items():
        now = list(run.roles.parameters(role))
        assert all(bool(torch.isfinite(p).all()) for p in now)
        assert any(not torch.equal(a, b) for a, b in zip(held, now, strict=True)), role


def test_captions_stand_for_their_pictures(world, captioned, tmp_path):
    changes = {"method": {"name": "consistency", "intervals": 10}, "optim": {"student": {"lr": 1e-4}}, "data": {"folder": str(captioned)}}
    chosen = recipes.parse(tree(world, **changes))
    assert assemble(chosen, loop.make_accelerator(chosen, None)).teacher.labels == tuple(PROMPTS[i % 4] for i in range(8))
    assert loop.start(chosen, tmp_path / "run").finished


def test_captions_from_a_table(captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "p")
    for i in range(8):
        (tmp_path / "p" / f"{i}.txt").unlink()
    with pytest.raises(ValueError, match="has no caption"):
        read_pictures(tmp_path / "p")
    (tmp_path / "p" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n{"file_name": "0.png", "text": "none"}\n')
    assert [(Path(p.where).name, p.caption) for p in read_pictures(tmp_path / "p")] == [("1.png", "one"), ("0.png", "none")]
    (tmp_path / "p" / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "one"}\n')
    with pytest.raises(ValueError, match="not in"):
        read_pictures(tmp_path / "p")


@pytest.mark.parametrize(("content", "name", "message"), [
    ("a\n\nb\n", "p.txt", "line 2: the prompt is empty"), ("", "p.txt", "is empty"), ("a", "p.md", "must end in"),
    ('{"prompt": "a"}\n{"x": 1}\n', "p.jsonl", "line 2: no text"), ('{"prompt"', "p.jsonl", "line 1: not a JSON"),
    ("prompt,x\n,1\n", "p.csv", "line 2: the prompt is empty"), ("a,b\n1,2\n", "p.csv", "no column prompt")])
def test_a_bad_file_of_prompts_names_the_line(tmp_path, content, name, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(("content", "name"), [("a\nb c\n", "p.txt"), ('{"prompt": "a"}\n{"caption": "b c"}\n', "p.jsonl"),
                                               ("x,caption\n1,a\n2,b c\n", "p.csv")])
def test_prompts_are_read_from_three_kinds_of_file(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ("a", "b c")


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {}}, "data.prompts"), ({"data": {"prompts": "/nowhere.txt"}}, "does not exist"),
    ({"method": {"name": "dmd2", "gan_weight": 0.1}, "optim": {k: {"lr": 1e-4} for k in ("student", "fake", "disc")}}, "data.folder")])
def test_what_a_recipe_lacks_is_one_line(world, tmp_path, capsys, changes, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(world, **changes)))
    assert cli.run(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


class TestProbe:
    def test_a_pipeline_that_fits(self, world, capsys):
        assert cli.run(["probe", str(world / "teacher"), "height=16", "width=16", "--other", "width=24", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["fits"]
        assert max(report["parity"].values()) < 1e-4
        assert report["guidance"] == {"law": "linear", "keyword": "guidance_scale", "w": "g", "embedded_in": []}
        assert report["clock"] == {"timestep": "index"}
        assert report["prediction"] == "eps"
        assert report["state"] == [4, 8, 8]

    def test_it_tells_a_person(self, world, capsys):
        assert cli.run(["probe", str(world / "teacher"), "height=16", "width=16"]) == 0
        out = capsys.readouterr().out
        assert "fits: it can be distilled as it is" in out
        assert "guidance_scale g is our w = g" in out

    @pytest.mark.parametrize(("arguments", "message"), [
        (["hight=16"], "did you mean 'height'"), (["height"], "must read key=value"), (["--dtype", "int8"], "dtype must be")])
    def test_bad_keywords(self, world, capsys, arguments, message):
        assert cli.run(["probe", str(world / "teacher"), *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_a_folder_that_is_no_pipeline(self, tmp_path, capsys):
        assert cli.run(["probe", str(tmp_path)]) == 2
        assert "model_index.json" in capsys.readouterr().err

    def test_a_missing_component(self, world, tmp_path, capsys):
        shutil.copytree(world / "teacher", tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken" / "text_encoder")
        assert cli.run(["probe", str(tmp_path / "broken")]) == 2
        assert "lacks its component 'text_encoder'" in capsys.readouterr().err
