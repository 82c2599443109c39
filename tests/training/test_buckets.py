"""Several sizes of picture in one run: each batch has one, by its key alone, with the conditions that the pipeline makes at that size."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import final_tensors, log_lines, unequal
from zoo import basics, images

from stepdistill import cli
from stepdistill import recipe as recipes
from stepdistill.data.pictures import Picture, fitted, nearest, read_pictures
from stepdistill.data.streams import Buckets
from stepdistill.diffusion.draws import Draws
from stepdistill.images import save_png, to_image
from stepdistill.training import loop
from stepdistill.training.assemble import Run, assemble
from stepdistill.training.measure import iterate, recorded

BUCKETS = ((16, 16), (16, 24), (24, 16))
SIZES = ((20, 20), (18, 30), (40, 24), (17, 17), (30, 20))                # of the pictures; those of bucket 0, 1, 2, 0, 2
PROMPTS = ("a red apple", "a cat on the mat", "snow", "two blue houses", "snow again")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion and SDXL, prompts, captioned pictures."""
    folder = tmp_path_factory.mktemp("buckets")
    basics.stable_diffusion().save_pretrained(folder / "sd")
    images.EXHIBITS["sdxl"].build().save_pretrained(folder / "sdxl")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for i, (height, width) in enumerate(SIZES):
        noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(i))
        save_png(to_image(noise.to(torch.uint8)), folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    return folder


def tree(base: Path, method: str = "dmd2", teacher: str = "sd", **data: Any) -> dict[str, Any]:
    """Data-free DMD2, or consistency with pictures; `cache=NAME` keeps what is encoded."""
    reads = method == "consistency"
    source = {"folder": str(base / "pictures")} if reads else {"prompts": str(base / "prompts.txt")}
    return {"teacher": {"path": str(base / teacher), "call": {"height": 16, "width": 16}}, "student": {"steps": 2},
            "method": {"name": method, **({"intervals": 10} if reads else {"fake_updates": 1, "gan_weight": 0})},
            "optim": {name: {"lr": 1e-3} for name in ("student", "fake")[: 1 if reads else 2]},
            "data": {**source, "buckets": [list(bucket) for bucket in BUCKETS], **data}, "guidance": 3.0, "steps": 4, "batch_size": 2,
            "precision": "fp32", "ema_decay": 0.9, "checkpoint_every": 2, "log_every": 1, "preview_count": 2, "trackers": []}


def assembled(values: dict[str, Any]) -> Run:
    recipe = recipes.parse(values)
    return assemble(recipe, loop.make_accelerator(recipe, None))


# ---- batches

def test_pictures_come_at_their_own_size_as_often_as_there_are_some(base: Path) -> None:
    run = assembled(tree(base, "consistency"))
    assert isinstance(run.source, Buckets)
    pictures, vae = read_pictures(base / "pictures"), run.teacher.recording.driven.pipeline.vae
    states = []
    for picture in pictures:
        size = BUCKETS[nearest(picture.size, BUCKETS)]
        with torch.no_grad():
            latents = vae.encode(fitted(picture.image(3), size)[None].float() / 127.5 - 1).latent_dist.mode()[0]
        states.append(latents * vae.config.scaling_factor)
    seen: Counter[int] = Counter()
    for step in range(60):
        batch = run.batch(run.draws(step, 0, 0))
        assert batch["real"].clean.shape[1:] == batch.shape
        for x0 in batch["real"].clean:
            near = [i for i, own in enumerate(states) if own.shape == x0.shape and torch.allclose(own, x0, atol=1e-4)]
            assert len(near) == 1
            seen.update(near)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert max(seen.values()) < 3 * min(seen.values())                     # 24 each but for chance: sizes weigh as much as they have


def test_all_micro_batches_and_processes_have_one_size(base: Path) -> None:
    run = assembled({**tree(base), "accumulate": 2})
    shapes = {step: {run.batch(replace(run.draws(step, 0, micro), indices=rows)).shape
                     for micro in (0, 1) for rows in (range(1), range(7, 9))} for step in range(12)}
    assert all(len(found) == 1 for found in shapes.values())
    assert {shape for found in shapes.values() for shape in found} == {(4, 8, 8), (4, 8, 12), (4, 12, 8)}
    again = run.source.batch(run.streams, Draws(0, range(2), 5))
    assert {again.shape} == shapes[5]


def test_size_ids_are_those_of_the_batch(base: Path) -> None:
    run = assembled(tree(base, teacher="sdxl"))
    seen = set()
    for step in range(12):
        batch = run.batch(run.draws(step, 0, 0))
        height, width = (2 * n for n in batch.shape[1:])
        seen.add((height, width))
        ids = batch["main"].cond["added_cond_kwargs.time_ids"]
        assert ids.tolist() == [[height, width, 0, 0, height, width]] * 2
    assert seen == set(BUCKETS)


def test_a_method_that_draws_noise_draws_it_at_the_size_of_its_batch(base: Path) -> None:
    run = assembled(tree(base))
    seen = set()
    for step in range(8):
        with recorded(run) as passes:
            iterate(run, step, 1)
        shape = run.batch(run.draws(step, 0, 0)).shape
        assert {tuple(one.kwargs[one.sample].shape[1:]) for one in passes} == {shape}
        seen.add(shape)
    assert len(seen) == 3


# ---- runs

def test_a_run_learns_at_every_size_and_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Uncached, from a cache without encoders, and resumed from its middle."""
    assert loop.start(recipes.parse(tree(base)), tmp_path / "plain").finished
    expected = final_tensors(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "half")
    shutil.rmtree(sorted((tmp_path / "half" / loop.CHECKPOINTS).iterdir())[-1])
    assert loop.resume(tmp_path / "half").finished
    assert not unequal(final_tensors(tmp_path / "half"), expected)
    world = Path(shutil.copytree(base, tmp_path / "world"))
    cached = tree(world, cache=str(world / "cache"))
    assembled(cached)
    assert sorted(path.name for path in (world / "cache").iterdir()) == ["16x16", "16x24", "24x16"]
    for gone in ("text_encoder", "tokenizer"):
        shutil.rmtree(world / "sd" / gone)
    assert loop.start(recipes.parse(cached), tmp_path / "cached").finished
    assert not unequal(final_tensors(tmp_path / "cached"), expected)
    assert all(line["skipped"] == 0 for line in log_lines(tmp_path / "plain"))


def test_the_command_fills_every_size_and_keeps_which_picture_is_where(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    file, values = tmp_path / "recipe.yaml", tree(base, "consistency", cache=str(tmp_path / "cache"))
    file.write_text(yaml.safe_dump(values))
    assert cli.run(["cache", "--config", str(file), "--json"]) == 0
    spoken = capsys.readouterr()
    assert json.loads(spoken.out).items() >= {"folder": str(tmp_path / "cache"), "conditions": 5, "latents": 5, "encoded": 10,
                                              "shards": 6}.items()
    assert "pictures by size: 16x16 2, 16x24 1, 24x16 2" in spoken.err
    assert json.loads((tmp_path / "cache" / "buckets.json").read_text())["buckets"] == [0, 1, 2, 0, 2]
    plain = assembled(tree(base, "consistency"))
    monkeypatch.setattr(Picture, "size", property(lambda self: pytest.fail("measured again")))
    cached = assembled(values)
    for step in range(4):
        a, b = (run.batch(run.draws(step, 0, 0))["real"] for run in (plain, cached))
        assert torch.allclose(a.clean, b.clean, atol=1e-5)
        assert torch.equal(a.cond["encoder_hidden_states"], b.cond["encoder_hidden_states"])


# ---- bad input

@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"buckets": [[16, 24]]}}, "must hold the height and width of teacher.call"),
    ({"data": {"buckets": [[16, 16], [16, 16]]}}, "each pair once"),
    ({"data": {"buckets": [[16, 16], [0, 16]]}}, "heights and widths"),
    ({"data": {"buckets": [[16, 16], [16, 24], [24, 16], [16, 32], [32, 16], [16, 48]]}}, "6 sizes and 5 prompts"),
    ({"method": {"gan_weight": 0.1}, "optim": {"disc": {"lr": 1e-3}}, "data": {"folder": "pictures"}}, "discriminator of a U-Net"),
    ({"teacher": {"call": {"height": 16, "width": 160}}, "data": {"folder": "pictures", "buckets": [[16, 160], [16, 16]]},
      "method": {"gan_weight": 0.1}, "optim": {"disc": {"lr": 1e-3}}}, "no picture is nearest to 16x160")])
def test_what_cannot_be_is_said_in_one_line(base: Path, changes: dict[str, Any], message: str) -> None:
    values = tree(base)
    for group, keys in changes.items():
        values[group].update({key: str(base / value) if key == "folder" else value for key, value in keys.items()})
    with pytest.raises(ValueError, match=message) as caught:
        assembled(values)
    assert "\n" not in str(caught.value)
