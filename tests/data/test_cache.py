"""Conditions and latents on disk: the same batches, no encoders, whole shards or none, and never another run's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny import final_tensors, log_lines, snapshot, tiny_recipe, unequal
from zoo import basics, images

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.data import cache as caches
from stepdistill.data.cache import Cache, Rows
from stepdistill.images import save_png, to_image
from stepdistill.models import prompted
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.load import read_json
from stepdistill.models.wiring import Unrecordable, same
from stepdistill.training import loop
from stepdistill.training.assemble import Run, assemble, cache_of, texts_of

PROMPTS = ("a red apple", "a cat on the mat", "snow", "two blue houses", "snow again")
CAPTIONS = ("one", "two", "three")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion, prompts and captioned pictures, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    basics.stable_diffusion().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for i, caption in enumerate(CAPTIONS):
        noise = torch.randint(0, 256, (3, 20, 16), generator=torch.Generator().manual_seed(i))
        save_png(to_image(noise.to(torch.uint8)), folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def world(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "world"))


@pytest.fixture(scope="module")
def cached(saved, tmp_path_factory) -> Path:
    """The same with a whole cache of prompts, captions and pictures."""
    world = Path(shutil.copytree(saved, tmp_path_factory.mktemp("cached") / "world"))
    assert cache(recipe_of(world, gan=True)).fill("cpu").encoded == 11
    return world


@pytest.fixture
def filled(cached, tmp_path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "world"))


def tree(world: Path, gan: bool = False, **data: Any) -> dict[str, Any]:
    trained = ("student", "fake", "disc") if gan else ("student", "fake")
    folder = {"folder": str(world / "pictures")} if gan else {}
    return {"teacher": {"path": str(world / "teacher"), "call": {"height": 16, "width": 16}}, "student": {"steps": 2},
            "method": {"name": "dmd2", "fake_updates": 2, "gan_weight": 0.1 * gan}, "optim": {name: {"lr": 1e-4} for name in trained},
            "data": {"prompts": str(world / "prompts.txt"), "cache": str(world / "cache"), **folder, **data}, "guidance": 3.0, "steps": 3,
            "batch_size": 4, "precision": "fp32", "ema_decay": 0.9, "log_every": 1, "preview_count": 2, "trackers": []}


def recipe_of(world: Path, gan: bool = False, **data: Any) -> recipes.Recipe:
    return recipes.parse(tree(world, gan, **data))


def assembled(chosen: recipes.Recipe) -> Run:
    return assemble(chosen, loop.make_accelerator(chosen, None))


def cache(chosen: recipes.Recipe, limit: int = 2**28) -> Cache:
    made = cache_of(chosen, *texts_of(chosen))
    made.limit = limit
    return made


def equal(a: Conditioning, b: Conditioning) -> bool:
    """The same leaves, and the same in their null conditions."""
    nulls = (a.nulls is None) == (b.nulls is None) and (a.nulls is None or same(dict(a.null), dict(b.null)))
    return a.shared == b.shared and same(dict(a), dict(b)) and nulls


# ---- training

def test_training_needs_no_encoders_and_is_the_same_to_the_last_bit(world):
    """Uncached; filling the cache; and from the cache, with the folders of text encoder and tokenizer deleted."""
    for name, data in {"plain": {"cache": None}, "filling": {}}.items():
        assert loop.start(recipe_of(world, **data), world / name).finished
    for gone in ("text_encoder", "tokenizer"):
        shutil.rmtree(world / "teacher" / gone)
    before = snapshot(world / "cache")
    assert loop.start(recipe_of(world), world / "cached").finished
    assert snapshot(world / "cache") == before
    losses = [[{k: v for k, v in line.items() if k != "seconds"} for line in log_lines(world / name)]
              for name in ("plain", "filling", "cached")]
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 3
    tensors = [final_tensors(world / name) for name in ("plain", "filling", "cached")]
    assert not unequal(tensors[0], tensors[1])
    assert not unequal(tensors[0], tensors[2])
    previews = [(world / name / "previews" / "00000003.png").read_bytes() for name in ("plain", "cached")]
    assert previews[0] == previews[1]


def test_latents_are_those_that_a_batch_would_encode(filled):
    plain, cached = assembled(recipe_of(filled, gan=True, cache=None)), assembled(recipe_of(filled, gan=True))
    assert cached.teacher.recording.driven.pipeline.text_encoder is None
    a, b = (run.batch(run.draws(1, 0, 0))["real"] for run in (plain, cached))
    assert equal(a.cond, b.cond)
    assert torch.allclose(a.clean, b.clean, atol=1e-5)                       # one picture at a time, or a batch of them
    assert a.clean.std() > 0.05


@pytest.mark.parametrize("use", [None, "cache"])
def test_prompts_and_captions_stay_apart(filled, use):
    """Streams without pictures draw from the file of prompts, each picture comes with its own caption."""
    run = assembled(recipe_of(filled, gan=True, cache=use and str(filled / use)))
    assert run.teacher.labels == PROMPTS + CAPTIONS
    at = lambda rows: run.teacher.condition(torch.tensor(rows))["encoder_hidden_states"]                         # noqa: E731
    for step in range(6):
        batch = run.batch(run.draws(step, 0, 0))
        main = batch["main"].cond["encoder_hidden_states"]
        assert all(any(torch.equal(row, own) for own in at([0, 1, 2, 3, 4])) for row in main)
        for row, x0 in zip(batch["real"].cond["encoder_hidden_states"], batch["real"].clean, strict=True):
            number = next(i for i in range(3) if torch.equal(row, at([5 + i])[0]))
            assert torch.allclose(x0, run.source.pictures.states(torch.tensor([number]), run.teacher)[0], atol=1e-5)


def test_captions_alone_are_prompts_and_pictures(world):
    run = assembled(recipe_of(world, gan=True, prompts=None))
    assert run.teacher.labels == CAPTIONS
    assert run.batch(run.draws(0, 0, 0))["main"].cond["encoder_hidden_states"].shape[0] == 4
    assert run.source.pictures.labels.tolist() == [0, 1, 2]


def test_a_pipeline_that_cannot_be_run_without_its_encoders_says_so(world, monkeypatch, capsys):
    def refuse(codec: Any) -> Any:
        raise Unrecordable("its tail is a riddle")

    monkeypatch.setattr(prompted.LawCodec, "of", refuse)
    run = assembled(recipe_of(world))
    assert run.teacher.recording.driven.pipeline.text_encoder is not None
    assert "is loaded with its encoders, in spite of data.cache: its tail is a riddle" in capsys.readouterr().err
    monkeypatch.setattr(run.teacher.recording.driven, "drive", None)         # conditions come from the cache all the same
    assert len(run.batch(run.draws(0, 0, 0))["main"].cond["encoder_hidden_states"]) == 4


def test_a_teacher_with_classes_has_nothing_to_cache(tmp_path):
    chosen = tiny_recipe(tmp_path, method__gan_weight=0, data__cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"data\.cache is for pipelines that take prompts"):
        assembled(chosen)
    assert not (tmp_path / "cache").exists()


def test_prompts_of_unequal_length(tmp_path):
    """Bria's FIBO pads to the longest prompt of a batch: all are cached as if beside the longest and the shortest."""
    exhibit = images.EXHIBITS["bria_fibo"]
    exhibit.build().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\nsnow on a hill\nx\nsnow\n")
    made = tree(tmp_path)
    made["teacher"]["call"] = {"height": 128, "width": 128}
    made["steps"] = 1
    plain = assembled(recipes.parse({**made, "data": {"prompts": str(tmp_path / "prompts.txt")}})).teacher
    assert plain.bank is None
    chosen = recipes.parse(made)
    assert cache(chosen, 1).fill("cpu").to_dict().items() >= {"conditions": 4, "whole": None}.items()
    assert read_json(tmp_path / "cache" / "index.json")["beside"] == ["snow on a hill", "x"]
    assert cache(chosen).fill("cpu").encoded == 0
    shutil.rmtree(tmp_path / "teacher" / "text_encoder")
    rows = torch.tensor([3, 2, 0])
    ours, x_t, t = cache(chosen).kept().bank.slice(rows), torch.randn(3, *plain.shape), torch.full((3,), 0.5)
    theirs = plain.condition(torch.tensor([3, 2, 0, 1])).slice(slice(0, 3))
    assert torch.allclose(*(plain.denoiser(x_t, t, cond, w=3.0).raw for cond in (ours, theirs)), atol=1e-4)
    assert loop.start(chosen, tmp_path / "run").finished


# ---- the folder

def test_what_all_prompts_share_is_stored_once(filled):
    shard, = (filled / "cache").glob("conditions-*.safetensors")
    with safe_open(shard, "pt") as file:
        assert list(file.keys()) == ["cond/encoder_hidden_states"]           # the null condition is in conditions.safetensors alone
        assert file.get_slice("cond/encoder_hidden_states").get_shape()[0] == len(PROMPTS + CAPTIONS)


def test_shards_of_one_row_give_the_same_conditions(world):
    plain, (small, large) = assembled(recipe_of(world, cache=None)), (recipe_of(world, cache=str(world / n)) for n in ("s", "l"))
    filled = cache(small, 1).fill("cpu"), cache(large).fill("cpu")
    assert [f.shards for f in filled] == [5, 1]
    rows = torch.tensor([4, 0, 2, 2, 1])
    assert all(equal(plain.teacher.condition(rows), cache(chosen).kept().bank.slice(rows)) for chosen in (small, large))


def test_an_interrupted_cache_goes_on_where_it_stopped(world, monkeypatch):
    """Killed before a shard is moved into its place: those before it stay as they are, what is left over is cleared away."""
    whole, broken = recipe_of(world, cache=str(world / "whole")), recipe_of(world)
    assert cache(whole, 1).fill("cpu").shards == 5
    real = os.replace

    def kill(a: Path, b: Path) -> None:
        if b.name == "conditions-00000003-00000004.safetensors":
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(caches.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        cache(broken, 1).fill("cpu")
    monkeypatch.undo()
    half = cache(broken, 1)
    assert not half.complete
    assert half.conditions.missing() == [(3, 5)]
    assert list((world / "cache").glob(".*.partial"))
    (world / "cache" / ".conditions-00000001-00000009.safetensors.partial").write_bytes(b"of shards of another size")
    made = {path: path.stat().st_mtime_ns for *_, path in half.conditions.spans()}
    assert half.fill("cpu").encoded == 2
    assert half.complete
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert snapshot(world / "cache") == snapshot(world / "whole")


def test_a_lost_shard_is_made_again(filled):
    before = snapshot(filled / "cache")
    next((filled / "cache").glob("latents-*")).unlink()
    again = cache(recipe_of(filled, gan=True))
    assert again.latents.missing() == [(0, 3)]
    assert again.fill("cpu").encoded == 3
    assert snapshot(filled / "cache") == before


def test_pictures_come_into_a_cache_of_prompts(world):
    """The first rows are not encoded twice, as long as the texts are the same."""
    (world / "prompts.txt").write_text("\n".join(CAPTIONS))
    for chosen, latents in ((recipe_of(world), 0), (recipe_of(world, gan=True, prompts=None), 3)):
        done = cache(chosen).fill("cpu")
        assert (done.conditions, done.latents, done.encoded) == (3, latents, 3)


def edited(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


CHANGES = {
    "text_encoder": lambda world, made: edited(world / "teacher/text_encoder/model.safetensors"),
    "tokenizer": lambda world, made: edited(next((world / "teacher/tokenizer").glob("*.json"))),
    "vae": lambda world, made: edited(world / "teacher/vae/diffusion_pytorch_model.safetensors"),
    "prompts": lambda world, made: (world / "prompts.txt").write_text("another\n"),
    "pictures": lambda world, made: shutil.copy(world / "pictures/0.txt", world / "pictures/notes.txt"),
    "call": lambda world, made: made["teacher"]["call"].update(negative_prompt="bad"),
    "dtype": lambda world, made: made["teacher"].update(dtype="bfloat16")}


@pytest.mark.parametrize("part", CHANGES)
def test_a_cache_of_something_else_names_it(filled, part):
    made = tree(filled, gan=True)
    assert cache(recipes.parse(made)).complete
    CHANGES[part](filled, made)
    chosen = recipes.parse(made)
    with pytest.raises(ValueError, match=rf"cache was made with another {part}: name a new folder, or delete this one"):
        cache(chosen)


def test_another_network_of_the_same_kind_keeps_the_cache(filled):
    """Its weights encode nothing; neither does guidance, unless it is embedded beforehand."""
    edited(filled / "teacher/unet/diffusion_pytorch_model.safetensors")
    assert cache(recipes.parse({**tree(filled, gan=True), "guidance": 5.0})).fill("cpu").encoded == 0


def test_guidance_that_a_pipeline_embeds_is_part_of_the_condition(tmp_path):
    images.EXHIBITS["latent_consistency"].build().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("snow\n")
    assert cache(recipes.parse(tree(tmp_path))).fill("cpu").encoded == 1
    with pytest.raises(ValueError, match="was made with another guidance"):
        cache(recipes.parse({**tree(tmp_path), "guidance": 5.0}))


def test_one_process_fills_at_a_time(world):
    with caches.locked(Path(world)), pytest.raises(ValueError, match="is being filled by another process"), caches.locked(world):
        pass
    with caches.locked(world):
        pass


@pytest.mark.parametrize("kind", ["conditions.safetensors", "conditions-00000000-00000008.safetensors", "learnt.safetensors"])
def test_a_damaged_file_is_named(filled, kind):
    chosen = recipe_of(filled, gan=True)
    path = filled / "cache" / kind
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{kind} is damaged or gone"):
        assembled(chosen).source.teacher.condition(torch.tensor([1]))


def test_a_folder_of_something_else_is_left_alone(world):
    with pytest.raises(ValueError, match="pictures holds something else: name a new folder"):
        cache(recipe_of(world, cache=str(world / "pictures")))


# ---- rows

def test_rows_of_every_kind_of_leaf(tmp_path):
    """Stacked, listed, absent and shared leaves; a null that differs from row to row, and one that is sometimes the condition's own."""
    def row(i: int) -> Conditioning:
        leaves = {"text": torch.full((1, 2), float(i), dtype=torch.bfloat16), "listed": ((torch.arange(i + 1), "x"),), "absent": None,
                  "ids": torch.arange(3), "size": (4, 4), "mask": torch.full((1, 2), i != 2)}
        nulls = {"text": torch.full((1, 2), -float(i), dtype=torch.bfloat16), "listed": ((torch.arange(9), "y"),)}
        masks = {2: {"mask": torch.full((1, 2), True)}, 3: {"mask": torch.full((1, 2), False)}}      # row 2's null has row 0's mask
        return Conditioning(leaves, nulls | masks.get(i, {}), frozenset({"ids", "size"}))

    rows, whole = Rows(tmp_path, "conditions", 5), Conditioning.stack([row(i) for i in range(5)])
    assert rows.fill(row, 30) == 5
    assert len(rows.spans()) > 1
    chosen = torch.tensor([3, 0, 4, 1, 2, 1])
    assert equal(rows.slice(chosen), whole.slice(chosen))
    assert not equal(rows.slice(chosen), whole.slice(chosen.flip(0)))
    first, stop, path = rows.spans()[1]
    path.unlink()
    again = Rows(tmp_path, "conditions", 5)
    assert again.missing() == [(first, stop)]
    assert again.fill(row, 30) == stop - first
    assert equal(again.slice(chosen), whole.slice(chosen))


def test_rows_of_unequal_shapes_are_refused(tmp_path):
    rows = Rows(tmp_path, "conditions", 2)
    with pytest.raises(ValueError, match=r"conditions 1 cannot be put into one batch with the first; leave data\.cache out"):
        rows.fill(lambda i: Conditioning({"text": torch.zeros(1, i + 1)}), 1)


# ---- the command

def test_the_command(world, capsys):
    file = world / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(world, gan=True)))
    assert cli.run(["cache", "--config", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {k: report[k] for k in ("conditions", "latents", "encoded", "shards", "whole")} == {
        "conditions": 8, "latents": 3, "encoded": 11, "shards": 2, "whole": None}
    assert report["bytes"] == sum(path.stat().st_size for path in (world / "cache").iterdir())
    assert cli.run(["cache", "--config", str(file)]) == 0
    assert "8 conditions and 3 latents in" in capsys.readouterr().out
    CHANGES["text_encoder"](world, {})
    for command in (["cache"], ["train", "--out", str(world / "run")]):
        assert cli.run([*command, "--config", str(file)]) == 2
        error = capsys.readouterr().err.strip()
        assert "was made with another text_encoder" in error
        assert "\n" not in error


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.cache=null"], "name a folder for the cache with data.cache"), (["data.prompts=null"], "data.prompts"),
    (["data.prompts=/nowhere.txt"], "data.prompts /nowhere.txt does not exist")])
def test_what_a_recipe_lacks(world, capsys, overrides, message):
    file = world / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(world)))
    assert cli.run(["cache", "--config", str(file), *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (world / "cache").exists()


def test_an_empty_line_among_the_prompts_is_exit_code_2(world, capsys):
    (world / "prompts.txt").write_text("a\n\nb\n")
    file = world / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(world)))
    assert cli.run(["train", "--config", str(file), "--out", str(world / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("prompts.txt, line 2: the prompt is empty; delete it or write one")
    assert "\n" not in error
    assert not (world / "run").exists()
    assert not (world / "cache").exists()
