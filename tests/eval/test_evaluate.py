"""`stepdistill eval` from end to end: teachers, students, pipelines with prompts, folders of pictures; and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import snapshot, tiny_teacher
from zoo import basics

from stepdistill.cli import run
from stepdistill.eval import cards, diversity, generate, models, protocol, provenance, references, score, tables, weights
from stepdistill.eval.models import open_model
from stepdistill.images import save_png, to_image

PROMPTS = tuple(f"{colour} {thing}" for colour in ("a red", "two blue") for thing in ("apple", "cat", "house on the hill"))
SAMPLED = ["--count", "60", "--steps", "2"]
TAUGHT = ["--protocol", "teacher-only", "--extractor", "tiny", *SAMPLED]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class-conditional teachers, a Stable Diffusion of a few thousand weights, and prompts."""
    base = tmp_path_factory.mktemp("world")
    tiny_teacher(base / "teacher")
    tiny_teacher(base / "student", seed=5)
    basics.stable_diffusion().save_pretrained(base / "sd")
    (base / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return base


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where references are looked for: empty."""
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path / "weights"))
    return tmp_path / "weights"


def ask(*words: str | Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run([str(word) for word in words])


@pytest.fixture(scope="module")
def taught(world: Path) -> Path:
    """The teacher's own result under teacher-only, 60 pictures of 3 classes."""
    assert ask("eval", world / "teacher", *TAUGHT, "--guidance", "1.5", "--to", world / "taught" / "t.json") == 0
    return world / "taught" / "t.json"


@pytest.fixture(scope="module")
def prompted(world: Path) -> Path:
    """The same of the pipeline, 60 pictures of 6 prompts."""
    assert ask("eval", world / "sd", *TAUGHT, "--guidance", "3", "--prompts", world / "p.txt", "--to", world / "prompted" / "t.json") == 0
    return world / "prompted" / "t.json"


def value(path: Path, kind: str) -> dict[str, Any]:
    """The first metric of a kind."""
    metrics = score.read_result(path)["metrics"]
    return metrics[next(name for name in metrics if name.startswith(kind))]


# ------------------------------------------------------------------------------------------------------------ a teacher, and in its light


def test_a_teachers_distance_to_itself_is_the_floor(world: Path, taught: Path) -> None:
    """Its reference are its own pictures of the next seed, and nothing else is left beside its result."""
    assert sorted(path.name for path in taught.parent.iterdir()) == [
        "t.features_tiny.safetensors", "t.json", "t.reference.safetensors", "t.samples.safetensors"]
    opened = open_model(str(world / "teacher"), 2, 1.5)
    other = generate.generate(opened.teacher, opened.spec, 60, 1, quiet=True).images
    told = score.read_result(taught)["protocol"]
    exam = protocol.Protocol.from_dict(told)
    features = load_file(taught.with_name("t.reference.safetensors"))["tiny/features"]
    torch.testing.assert_close(features, score.look(score.Pictures.of(other), exam, {"tiny": score.EXTRACTORS["tiny"]()})["tiny"][0])
    assert told["reference_sha256"]
    assert (told["classes"], told["labels"]) == (3, "i mod 3")


def test_a_student_in_the_light_of_its_teacher(world: Path, taught: Path, tmp_path: Path) -> None:
    to = tmp_path / "s.json"
    assert ask("eval", world / "student", *TAUGHT, "--guidance", "1", "--against", taught, "--to", to) == 0
    result = score.read_result(to)
    assert result["protocol_hash"] == score.read_result(taught)["protocol_hash"]
    assert value(to, "frechet")["ci95"][0] > value(taught, "frechet")["ci95"][1] > 0
    block = result["teacher"]
    assert block["metrics"] == score.read_result(taught)["metrics"]
    assert 0.5 < block["cos"]["value"] < 1
    assert {"brightness", "contrast", "grid", "spread", "clipped", "sharpness"} <= set(block["drift"])
    assert not result["model"]["is_teacher"]
    assert (result["env"]["tf32"], result["env"]["tf32_cudnn"]) == (False, False)
    assert ask("compare", taught, to, "--to", tmp_path / "report") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "In the light of the teacher" in text
    said = json.loads((tmp_path / "report" / "report.json").read_text())["rows"][1]["difference"]
    sets = {"recall_tiny_teacher_60", "coverage_tiny_teacher_60"}
    assert set(said) == {"frechet_tiny_teacher_60", "kid_tiny_teacher_60", *sets}
    assert result["paired"] == {score.read_result(taught)["model"]["sha256"]: {
        name: {key: block[key] for key in ("delta", "corrected", "se", "ci95")} for name, block in said.items()}}
    assert "frechet_tiny_teacher_60 ↓" in text
    compared = json.loads((tmp_path / "report" / "report.json").read_text())["rows"][1]
    assert all(compared["difference"][name]["verdict"] in ("better", "worse", "undecided") for name in sets)
    assert not sets & set(compared["wins"])
    assert "the mean difference over disjoint sets" in text


def test_pairs_are_looked_at_by_lpips_where_it_can_be_had(world: Path, taught: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """And pictures are large enough for it."""
    monkeypatch.setattr(diversity, "spare_lpips", lambda device: lambda a, b: (a - b).square().mean((1, 2, 3)))
    to = tmp_path / "s.json"
    asked = ["eval", world / "student", *TAUGHT, "--guidance", "1", "--against", taught, "--to", to]
    assert ask(*asked) == 0
    assert score.read_result(to)["teacher"]["lpips"] is None
    monkeypatch.setattr(diversity, "LEAST", 8)
    assert ask(*asked) == 0
    mine, its = (load_file(path.with_name(f"{path.stem}.samples.safetensors"))["images"].double() for path in (to, taught))
    each, found = ((mine - its) / 127.5).square().mean((1, 2, 3)), score.read_result(to)["teacher"]["lpips"]
    assert (found["value"], found["se"], found["n"]) == (pytest.approx(float(each.mean()), rel=1e-5),
                                                         pytest.approx(float(each.std()) / 60**0.5, rel=1e-4), 60)
    assert ask("compare", taught, to, "--to", tmp_path / "report") == 0
    assert f"| LPIPS of paired pictures | {tables.number(found['value'], found['se'])} |" in (tmp_path / "report" / "report.md").read_text()


def test_a_model_is_scored_first_where_its_result_is_not_there(world: Path, taught: Path, tmp_path: Path) -> None:
    """Where its own sampler is known, that is."""
    to = tmp_path / "s.json"
    assert ask("eval", world / "teacher", *TAUGHT, "--guidance", "1.5", "--against", world / "teacher", "--to", to) == 2
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    notes = json.loads((tmp_path / "teacher" / "stepdistill.json").read_text())
    sampler = {**open_model(str(world / "teacher"), 2, 1.5).spec.to_dict()}
    (tmp_path / "teacher" / "stepdistill.json").write_text(json.dumps({**notes, "sampler": sampler}))
    assert ask("eval", world / "student", *TAUGHT, "--guidance", "1", "--against", tmp_path / "teacher", "--to", to) == 0
    assert score.read_result(tmp_path / "s.teacher.json")["metrics"] == score.read_result(taught)["metrics"]
    assert score.read_result(to)["teacher"]["result"] == "s.teacher.json"


# ------------------------------------------------------------------------------------------------------------------ prompts and folders


def test_latents_drift_from_the_teachers(world: Path, prompted: Path, tmp_path: Path) -> None:
    """Of a model of latents; those of pixels have none."""
    to = tmp_path / "s.json"
    asked = [*TAUGHT, "--guidance", "1", "--prompts", world / "p.txt", "--against", prompted, "--to", to]
    assert ask("eval", world / "sd", *asked) == 0
    drifts = score.read_result(to)["teacher"]["drift"]
    opened = open_model(str(world / "sd"), 2, 1.0, prompts=(world / "p.txt").read_text().splitlines())
    mine, its = (opened.teacher.latents(load_file(path.with_name(f"{path.stem}.samples.safetensors"))["images"]) for path in (to, prompted))
    assert mine is not None
    assert its is not None
    for c in range(4):
        assert drifts[f"latent_mean_{c}"]["value"] == pytest.approx(float(mine[:, c].double().mean() - its[:, c].double().mean()), abs=1e-6)
        assert drifts[f"latent_std_{c}"]["value"] == pytest.approx(float(mine[:, c].double().std() / its[:, c].double().std()), rel=1e-5)
    assert drifts["latent_std_0"]["value"] != pytest.approx(1, abs=1e-3)


def test_a_pipeline_is_scored_on_prompts(world: Path, prompted: Path) -> None:
    result = score.read_result(prompted)
    assert (result["protocol"]["prompts"], result["protocol"]["labels"], result["protocol"]["classes"]) == (6, "prompt i mod 6", 0)
    assert result["sampler"]["nfe"] == 4
    assert {"frechet_tiny_teacher_60", "variety_tiny_m8", "vendi_tiny_m8"} <= set(result["metrics"])
    kept = load_file(prompted.with_name("t.features_tiny.safetensors"))
    assert kept["features"].shape == (60, 16)
    assert kept["values/variety_tiny_m8"].shape == (6,)
    assert score.prompts_in(kept) == PROMPTS
    assert score.prompts_in(load_file(prompted.with_name("t.samples.safetensors"))) == PROMPTS


def test_a_result_says_how_it_is_made_again(world: Path, prompted: Path, tmp_path: Path) -> None:
    words = shlex.split(provenance.command(score.read_result(prompted), str(tmp_path / "again.json")))
    assert words[:2] == ["stepdistill", "eval"]
    assert ask(*words[1:]) == 0
    assert score.read_result(tmp_path / "again.json")["metrics"] == score.read_result(prompted)["metrics"]


def test_many_prompts_are_encoded_one_by_one_to_the_same_pictures(world: Path, prompted: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "IN_MEMORY", 2)
    to = tmp_path / "t.json"
    asked = [*TAUGHT[:4], "--count", "50", "--steps", "2", "--guidance", "3", "--batch-size", "7"]
    reference = prompted.with_name("t.reference.safetensors")
    assert ask("eval", world / "sd", *asked, "--prompts", world / "p.txt", "--reference", reference, "--to", to) == 0
    mine, its = (load_file(path.with_name("t.samples.safetensors"))["images"].int()[:50] for path in (to, prompted))
    assert (mine - its).abs().max() <= 1
    assert (mine == its).double().mean() > 0.999


def test_a_folder_of_pictures_is_what_its_model_is(world: Path, prompted: Path, tmp_path: Path) -> None:
    """As `sample` writes them, the sheet beside them; against the result of the model that made them."""
    assert ask("sample", world / "sd", "--count", "60", "--steps", "2", "--guidance", "3", "--prompts", world / "p.txt", "--to",
               tmp_path / "pictures") == 0
    asked = ["--protocol", "teacher-only", "--extractor", "tiny", "--count", "60", "--prompts", world / "p.txt", "--against", prompted]
    assert ask("eval", tmp_path / "pictures", *asked, "--to", tmp_path / "p.json") == 0
    mine, its = score.read_result(tmp_path / "p.json"), score.read_result(prompted)
    assert mine["protocol_hash"] == its["protocol_hash"]
    assert mine["metrics"]["frechet_tiny_teacher_60"]["value"] == pytest.approx(value(prompted, "frechet")["value"], rel=1e-2)
    assert mine["teacher"]["ratio"]["variety_tiny_m8"]["value"] == pytest.approx(1, abs=1e-2)
    assert mine["teacher"]["cos"]["value"] == pytest.approx(1, abs=1e-4)
    assert ask("compare", prompted, tmp_path / "p.json", "--to", tmp_path / "report") == 0
    text, page = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "Difference to teacher" in text
    kept = load_file(prompted.with_name("t.features_tiny.safetensors"))["values/variety_tiny_m8"]
    order = [PROMPTS[i] for i in kept.argsort(descending=True)]
    lines = text.partition("## variety_tiny_m8 by prompt")[2].partition("##")[0].splitlines()
    assert sorted(line.split("|")[1].strip() for line in lines if line.startswith(("| a", "| two"))) == sorted(order)
    assert all(f"<caption>{prompt}</caption>" in page for prompt in PROMPTS)


def test_a_world_is_asked_for_more(tmp_path: Path) -> None:
    """Its result says so, and is not held against one that was asked for less."""
    for i, picture in enumerate(torch.randint(0, 256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(0))):
        save_png(to_image(picture.to(torch.uint8)), tmp_path / "pictures" / f"{i:03d}.png")
    asked = ["eval", tmp_path / "pictures", "--count", "60"]
    assert ask(*asked, "--to", tmp_path / "plain.json") == 0
    assert ask(*asked, "--also", "vendi:tiny", "--also", "coverage:fashion", "--to", tmp_path / "more.json") == 0
    plain, more = (score.read_result(tmp_path / f"{name}.json") for name in ("plain", "more"))
    assert list(more["metrics"]) == [*plain["metrics"], "vendi_tiny", "coverage_fashion"]
    assert plain["protocol_hash"] == protocol.get("fashion", 60).hash != more["protocol_hash"]
    assert "--also vendi:tiny --also coverage:fashion" in provenance.command(more, "more.json")
    assert ask("compare", tmp_path / "plain.json", tmp_path / "more.json", "--to", tmp_path / "report") == 2


def test_variety_of_prompts_with_one_picture_each(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    """Made after the others from sample numbers that they do not use, whatever the batch, and not in the reference."""
    monkeypatch.setattr(cards, "VARIETY", (6, 2))
    many, to = tmp_path / "many.txt", tmp_path / "v" / "t.json"
    many.write_text("\n".join((*PROMPTS, *(f"thing {i}" for i in range(44)))))
    asked = [*TAUGHT[:4], "--count", "50", "--prompts", many, "--also", "variety:tiny"]
    assert ask("eval", world / "sd", *asked, "--steps", "2", "--guidance", "3", "--batch-size", "7", "--to", to) == 0
    assert {"variety_tiny_m2", "vendi_tiny_m2"} <= set(score.read_result(to)["metrics"])
    opened = open_model(str(world / "sd"), 2, 3.0, prompts=PROMPTS)
    made = generate._batch(opened.teacher, opened.spec, 0, range(50, 62), torch.arange(12) % 6)[0]
    kept = load_file(to.with_name("t.features_tiny.variety.safetensors"))["features"]
    torch.testing.assert_close(kept, score.EXTRACTORS["tiny"]().features(made)[0], rtol=0, atol=2e-3)
    assert len(load_file(to.with_name("t.samples.safetensors"))["images"]) == 50
    assert int(load_file(to.with_name("t.reference.safetensors"))["tiny/n"]) == 50
    assert ask("eval", world / "student", *TAUGHT, "--guidance", "1", "--also", "vendi:tiny", "--to", tmp_path / "s.json") == 2
    assert "vendi needs five prompts or classes, got 3" in capfd.readouterr().err
    for i, picture in enumerate(made.repeat(5, 1, 1, 1)[:55]):
        save_png(to_image(picture), tmp_path / "few" / f"{i:02d}.png")
    assert ask("eval", tmp_path / "few", *asked, "--against", to, "--to", tmp_path / "f.json") == 2
    assert "after the 50 there must be 12 for variety, of the first 6 prompts in turn" in capfd.readouterr().err


def test_real_pictures_and_memorised_ones(world: Path, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A reference is found where it was put; a model that repeats its training pictures is caught."""
    for name, seed in (("train", 1), ("held", 2)):
        for i, picture in enumerate(torch.randint(0, 256, (120, 3, 8, 8), generator=torch.Generator().manual_seed(seed))):
            save_png(to_image(picture.to(torch.uint8).repeat_interleave(3, 1).repeat_interleave(3, 2)), tmp_path / name / f"{i:03d}.png")
    open_ended = ["--protocol", "custom", "--extractor", "tiny"]
    assert ask("reference", tmp_path / "train", *open_ended) == 0
    assert str(place / "protocols" / "custom" / "reference.safetensors") in capfd.readouterr().out
    assert ask("reference", tmp_path / "held", *open_ended, "--to", tmp_path / "held.safetensors") == 0
    train = ["--train", place / "protocols" / "custom" / "reference.safetensors", "--held-out", tmp_path / "held.safetensors"]
    assert ask("eval", tmp_path / "train", *open_ended, "--count", "60", *train, "--to", tmp_path / "r.json") == 0
    told = {line.split()[0]: line for line in capfd.readouterr().out.splitlines()}
    block = value(tmp_path / "r.json", "frechet")
    assert f" without bias {block['corrected']:.1f}"[:-3] in told["frechet_tiny_real_60"]
    assert "without bias" not in told["precision_tiny_real_60"]
    found = score.read_result(tmp_path / "r.json")["memory"]
    assert found["share"]["value"] == 1
    assert found["held_out"]["value"] < 0.1
    assert len(found["suspects"]) == 20
    assert all(row == neighbour and name == f"{row:03d}.png" for row, neighbour, _, name in found["suspects"])
    assert ask("eval", tmp_path / "held", *open_ended, "--count", "60", *train, "--to", tmp_path / "h.json") == 0
    assert score.read_result(tmp_path / "h.json")["memory"]["share"]["value"] < 0.1
    assert ask("compare", tmp_path / "r.json", tmp_path / "h.json", "--to", tmp_path / "report") == 0
    text, (row, *_) = (tmp_path / "report" / "report.md").read_text(), found["suspects"][0]
    assert "Nearest training pictures" in text
    assert f" | 120 | {row} → {row:03d}.png, " in text


@pytest.mark.parametrize(("protocol_name", "keep", "words"), [
    ("custom", 60, "needs at least 100 training features, got 60"), ("teacher-only", 60, "needs at least 100 training features, got 60"),
    ("custom", 5, "keeps features of 5 pictures, and density_tiny_real_60 needs 6"),
    ("custom", 3, "keeps features of 3 pictures, and precision_tiny_real_60 needs 4")])
def test_too_few_real_pictures_are_refused_before_any_is_made(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                              monkeypatch: pytest.MonkeyPatch, protocol_name: str, keep: int,
                                                              words: str) -> None:
    """With the remedy, and a teacher is not run first either where it is told against itself."""
    for i in range(keep):
        save_png(to_image(torch.full((3, 24, 24), i, dtype=torch.uint8)), tmp_path / "real" / f"{i:03d}.png")
    asked, reference = ["--protocol", protocol_name, "--extractor", "tiny"], tmp_path / "r.safetensors"
    ask("reference", tmp_path / "real", *asked, "--to", reference)
    monkeypatch.setattr(generate, "_batch", lambda *arguments: pytest.fail("a picture was made"))
    assert ask("eval", world / "teacher", *asked, *SAMPLED, "--guidance", "1.5", "--reference", reference, "--train", reference,
               "--held-out", reference, *([] if protocol_name == "custom" else ["--against", world / "teacher"]), "--to",
               tmp_path / "x.json") == 2
    assert words in (said := capfd.readouterr().err)
    assert "with a larger --keep" in said
    assert not (tmp_path / "x.parts").exists()


def test_the_protocol_knows_how_many_real_pictures_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Kernels and neighbours give other numbers against fewer of them, so two such results are no table. Where only moments are read the
    number changes nothing, and all of them are what the default says."""
    for i, picture in enumerate(torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1))):
        save_png(to_image(picture.to(torch.uint8)), tmp_path / "real" / f"{i:02d}.png")
    for name, keep in (("all", []), ("sixty", ["--keep", "60"]), ("twenty", ["--keep", "20"])):
        reference = tmp_path / f"{name}.safetensors"
        assert ask("reference", tmp_path / "real", "--protocol", "custom", "--extractor", "tiny", *keep, "--to", reference) == 0
        assert ask("eval", tmp_path / "real", "--protocol", "custom", "--extractor", "tiny", "--count", "50", "--reference", reference,
                   "--to", tmp_path / f"{name}.json") == 0
    told = {name: score.read_result(tmp_path / f"{name}.json")["protocol"]["set_reference"] for name in ("all", "sixty", "twenty")}
    assert told == {"all": "10,000 evenly spaced ones", "sixty": "10,000 evenly spaced ones", "twenty": "20 evenly spaced ones"}
    capfd.readouterr()
    assert ask("compare", tmp_path / "all.json", tmp_path / "twenty.json", "--to", tmp_path / "report") == 2
    assert "set_reference: '10,000 evenly space... and '20 evenly spaced ones'" in capfd.readouterr().err
    few = references.read(tmp_path / "twenty.safetensors", cards.draft(cards.CARDS["custom"], 50, 0, cards.Brought(extractor="tiny")))
    moments = cards.draft(replace(cards.CARDS["custom"], measures=(protocol.Measure("frechet", "tiny"),)), 50, 0)
    assert cards.set_reference(cards.CARDS["custom"], moments, few) == moments.set_reference


# ----------------------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def bad(world: Path) -> Path:
    """Folders that are not what they should be."""
    base = world / "bad"
    for name in ("jpeg", "sizes", "few", "alpha"):
        for i in range(3 if name == "few" else 60):
            save_png(to_image(torch.full((3, 16, 16), i, dtype=torch.uint8)), base / name / f"{i:02d}.png")
    (base / "empty").mkdir()
    to_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(base / "jpeg" / "07.png", format="JPEG")
    to_image(torch.zeros(3, 16, 20, dtype=torch.uint8)).save(base / "sizes" / "07.png")
    to_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).convert("RGBA").save(base / "alpha" / "07.png")
    return base


@pytest.mark.parametrize(("arguments", "words"), [
    (["{bad}/empty", *TAUGHT[:4], "--count", "60", "--against", "{taught}"], "holds no pictures"),
    (["{bad}/jpeg", *TAUGHT[:4], "--count", "60", "--against", "{taught}"], "07.png is JPEG, and what that loses"),
    (["{bad}/sizes", *TAUGHT[:4], "--count", "60", "--against", "{taught}"], "07.png is 20x16 RGB, 00.png 16x16 RGB"),
    (["{bad}/alpha", *TAUGHT[:4], "--count", "60", "--against", "{taught}"], "mode RGBA"),
    (["{bad}/few", *TAUGHT[:4], "--count", "60", "--against", "{taught}"], "holds 3 pictures and 60 are wanted"),
    (["{bad}/sizes", *TAUGHT[:4], "--count", "60", "--steps", "2", "--against", "{taught}"], "leave --steps out"),
    (["{bad}/sizes", *TAUGHT[:4], "--count", "60"], "say whose teacher's pictures"),
    (["{world}/teacher", *TAUGHT[:4], "--count", "60"], "give --steps and --guidance"),
    (["{world}/teacher", *TAUGHT, "--guidance", "1", "--prompts", "{world}/p.txt"], "takes no prompts"),
    (["{world}/teacher", *TAUGHT, "--guidance", "1", "--against", "{prompted}"], "scored under another protocol (classes: 0 and 3"),
    (["{world}/student", *TAUGHT[:4], "--count", "70", "--steps", "2", "--guidance", "1", "--against", "{taught}"], "count: 60 and 70"),
    (["{world}/student", *TAUGHT, "--guidance", "1", "--against", "{taught}x.json"], "no result file"),
    (["{world}/student", *TAUGHT, "--guidance", "1", "--call", "height=16"], "takes no prompts"),
    (["{world}/student", "--count", "60", "--steps", "2", "--guidance", "1"], "'fashion' has 10 classes, and"),
    (["{world}/sd", *TAUGHT, "--guidance", "1"], "name a file of them with --prompts"),
    (["{world}/sd", *TAUGHT, "--guidance", "1", "--prompts", "{world}/none.txt"], "does not exist"),
    (["{world}/sd", "--count", "60", "--prompts", "{world}/p.txt"], "choose a protocol that has some"),
    (["{world}/teacher", *TAUGHT, "--guidance", "1", "--train", "{world}/r.safetensors"], "--train and --held-out: give both"),
    (["{world}/teacher", "--protocol", "custom", "--extractor", "tiny", *SAMPLED, "--guidance", "1"], "needs a reference, and there is"),
    (["{world}/teacher", "--protocol", "custom", "--extractor", "fashion", *SAMPLED, "--guidance", "1", "--reference",
      "{world}/taught/t.reference.safetensors"], "knows nothing of fashion"),
    (["{world}/teacher", "--protocol", "custom", *SAMPLED, "--guidance", "1"], "stepdistill weights convert dinov2-l14 FILE"),
])
def test_bad_input_is_one_line_and_writes_nothing(world: Path, bad: Path, taught: Path, prompted: Path, tmp_path: Path,
                                                  capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    before = snapshot(world)
    capfd.readouterr()
    filled = [word.format(world=world, bad=bad, taught=taught, prompted=prompted) for word in arguments]
    assert ask("eval", *filled, "--to", tmp_path / "x.json") == 2
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if line.startswith("stepdistill:")]
    assert len(said) == 1
    assert words in said[0]
    assert len(said[0]) < 1000
    assert not out
    assert not [path for path in tmp_path.iterdir() if path.name != "weights"]
    assert snapshot(world) == before


def test_a_damaged_reference_and_damaged_features_are_named(world: Path, taught: Path, tmp_path: Path,
                                                            capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(taught.parent, tmp_path / "t")
    features, reference = (tmp_path / "t" / f"t.{what}.safetensors" for what in ("features_tiny", "reference"))
    for path in (features, reference):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        capfd.readouterr()
        assert ask("eval", world / "student", *TAUGHT, "--guidance", "1", "--against", tmp_path / "t" / "t.json", "--to",
                   tmp_path / "s.json") == 2
        assert f"{path} is damaged" in capfd.readouterr().err
        path.write_bytes(whole)
