"""From pictures to a result file and back."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.eval import extractors, measures, metrics, protocol, report, score
from stepdistill.images import save_png, to_image
from stepdistill.models.load import Teacher
from stepdistill.worlds.fashion import classifier, data

NAMES = ["frechet_fashion", "kid_fashion", "precision_fashion", "recall_fashion", "accuracy_fashion"]


def noise(count: int, seed: int = 0, shape: tuple[int, ...] = (1, 28, 28)) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % 10


@pytest.fixture(scope="module")
def small() -> protocol.Reference:
    """The shipped reference with a tenth of its test features, each class alike: neighbours are quick to find."""
    whole = protocol.fashion_reference()
    rows = torch.cat([(whole.test_labels == c).nonzero()[:100, 0] for c in range(10)])
    return dataclasses.replace(whole, test_features=whole.test_features[rows], test_labels=whole.test_labels[rows])


@pytest.fixture(scope="module")
def real() -> data.Pictures:
    """Test pictures, 50 of each class, label i mod 10."""
    try:
        test = data.load("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rows = torch.stack([(test.labels == c).nonzero()[:50, 0] for c in range(10)], 1).flatten()
    return data.Pictures(test.images[rows], test.labels[rows])


def write(path, scored, count=100):
    return score.write_result(path, protocol.get("fashion", count), scored, model={"name": "runs/a"}, sampler={"nfe": 4},
                              images=noise(count), speed={"ms_per_image": 1.0}, env=score.environment(),
                              started="2026-01-01T00:00:00Z", seconds=1.0)


@pytest.fixture(scope="module")
def scored(small) -> score.Scored:
    return score.score(noise(100), labels(100), protocol.get("fashion", 100), small)


# -------------------------------------------------------------------------------------------------------------------------- the judge


def test_noise_scores_badly(scored):
    assert list(scored.metrics) == NAMES
    assert scored.metrics["frechet_fashion"].value > 1
    assert scored.metrics["kid_fashion"].value > 0.1
    assert scored.metrics["accuracy_fashion"].value < 0.3
    assert scored.metrics["recall_fashion"].value < 0.2
    assert scored.features.shape == (100, 64)
    assert scored.features.dtype == torch.float32
    assert scored.metrics["accuracy_fashion"].value == (scored.predicted == scored.labels).double().mean()


def test_real_pictures_score_well(real, small, scored):
    made = score.score(real.images, real.labels, protocol.get("fashion", 500), small)
    assert made.metrics["accuracy_fashion"].value > 0.9
    assert made.metrics["precision_fashion"].value > 0.9
    assert made.metrics["frechet_fashion"].corrected < 0.2 < scored.metrics["frechet_fashion"].value / 5
    assert abs(made.metrics["kid_fashion"].value) < 0.05


def test_extractor_gives_the_stored_features(real):
    """The first test picture of each class, as kept in fp16; alone or in a batch."""
    judge, reference = extractors.Fashion(), protocol.fashion_reference()
    features, _ = extractors.extract(judge, real.images[:10], 250)
    stored = torch.stack([reference.test_features[reference.test_labels == c][0] for c in range(10)])
    torch.testing.assert_close(features, stored, rtol=1e-3, atol=1e-3)
    alone, _ = extractors.extract(judge, real.images[:10], 1)
    torch.testing.assert_close(alone, features, rtol=1e-4, atol=1e-5)


def test_extraction_is_exact_whatever_surrounds_it():
    """Neither autocast nor training mode of someone else's making reaches the judge, and settings come back."""
    judge = extractors.Fashion()
    plain, _ = extractors.extract(judge, noise(8), 8)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            surrounded, _ = extractors.extract(judge, noise(8), 8)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(plain, surrounded)
    assert surrounded.dtype == torch.float32


def test_classifier_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="dropout"):
        classifier.Architecture.read({**classifier.Architecture().to_dict(), "dropout": 0.1})
    assert sum(p.numel() for p in extractors.Fashion().net.parameters()) < 400_000
    weights = load_file(extractors.fashion_file(classifier.WEIGHTS, ""))
    config = extractors.fashion_file(classifier.CONFIG, "").read_text()
    assert json.loads(config)["test_accuracy"] >= 0.92
    assert json.loads(config)["sha256"] == extractors.Fashion().sha256
    monkeypatch.setattr(extractors.resources, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors is missing.*scripts/train_classifier\.py"):
        extractors.Fashion()
    (tmp_path / classifier.CONFIG).write_text(config)
    save_file({k: v for k, v in weights.items() if k != "head.bias"}, tmp_path / classifier.WEIGHTS)
    with pytest.raises(ValueError, match="does not fit"):
        extractors.Fashion()
    (tmp_path / classifier.WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="damaged"):
        extractors.Fashion()


def test_every_measure_runs_with_the_tiny_extractor(small):
    """64 colour pictures, no weights."""
    tiny = extractors.Tiny()
    ours, theirs = (extractors.extract(tiny, noise(n, seed, (3, 32, 32)), 16)[0] for n, seed in ((64, 0), (80, 1)))
    reference = dataclasses.replace(small, train=metrics.Moments.of(theirs), test_features=theirs)
    p = dataclasses.replace(protocol.get("fashion", 64), extractor="tiny", extractor_sha256=tiny.sha256, metrics=tuple(NAMES[:4]))
    made = score.score(noise(64, 0, (3, 32, 32)), labels(64), p, reference)
    assert list(made.metrics) == NAMES[:4]
    assert made.predicted is None
    assert torch.equal(made.features, ours)
    assert all(torch.tensor([e.value, e.se, *e.ci95]).isfinite().all() for e in made.metrics.values())
    with pytest.raises(ValueError, match="no classifier"):
        score.score(noise(64, 0, (3, 32, 32)), labels(64), dataclasses.replace(p, metrics=tuple(NAMES)), reference)


def test_wrong_input_is_refused():
    p = protocol.get("fashion", 100)
    with pytest.raises(ValueError, match="wants 100 pictures, got 99"):
        score.score(noise(99), labels(99), p)
    with pytest.raises(ValueError, match="i mod 10"):
        score.score(noise(100), torch.zeros(100, dtype=torch.long), p)
    with pytest.raises(ValueError, match="quantise them first"):
        score.score(noise(100).float(), labels(100), p)
    with pytest.raises(ValueError, match="the protocol names"):
        score.score(noise(100), labels(100), dataclasses.replace(p, extractor_sha256="0" * 64))


# ----------------------------------------------------------------------------------------------------------------------- the image chain


def test_quantisation_rounds_and_settles_ties():
    """-1 and 1 are exactly 0 and 255, others go to the nearer level, the tie at 0 to the even one; the range is clipped."""
    levels = torch.tensor([0.0, 0.49, 0.51, 127.5, 254.49, 254.51, 255.0])
    x0 = torch.cat([levels.double() / 127.5 - 1, torch.tensor([-3.0, 3.0]).double()])
    codec = SimpleNamespace(decode=lambda x: x)
    assert Teacher.pictures(SimpleNamespace(codec=codec), x0).tolist() == [0, 0, 1, 128, 254, 255, 255, 0, 255]


def test_grey_survives_saving(tmp_path):
    """No stretching of the contrast on the way to the file."""
    grey = torch.full((1, 28, 28), 93, dtype=torch.uint8)
    grey[0, 0, 0] = 95
    save_png(to_image(grey), tmp_path / "grey.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), grey[0].numpy())


# ---------------------------------------------------------------------------------------------------------------------- the result file


def test_round_trip(tmp_path, scored):
    path = tmp_path / "deep" / "a.json"
    written = write(path, scored)
    result = score.read_result(path)
    assert result == json.loads(json.dumps(written))
    assert result["metrics"]["kid_fashion"] == scored.metrics["kid_fashion"].to_dict()
    assert set(result["metrics"]["kid_fashion"]) == {"value", "corrected", "se", "ci95", "n", "groups"}
    assert set(result["env"]) >= {"python", "torch", "diffusers", "device", "threads", "commit"}
    kept = score.read_features(path, result)
    assert torch.equal(kept["features"], scored.features)
    assert torch.equal(kept["predicted"], scored.predicted)
    assert torch.equal(score.read_samples(path.with_name(result["samples"]), result), noise(100))
    write(path.with_name("b.json"), scored)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        f"{stem}.{kind}" for stem in "ab" for kind in ("features_fashion.safetensors", "json", "samples.safetensors")]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, scored, monkeypatch):
    path = tmp_path / "a.json"
    write(path, scored)
    before = path.read_bytes()
    rename = os.replace

    def stop_at_the_result(source, target):
        if target == path:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(score.os, "replace", stop_at_the_result)
    with pytest.raises(KeyboardInterrupt):
        write(path, dataclasses.replace(scored, metrics={}))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("damage", "words"), [
    (lambda text: text[: len(text) // 2], "damaged"),
    (lambda text: "[1, 2]", "no result file"),
    (lambda text: text.replace('"speed"', '"sped"'), "lacks speed"),
    (lambda text: text.replace('"count": 100', '"count": 200'), "does not have the hash"),
    (lambda text: text.replace('"nfe": 4', '"nfe": "four"'), "damaged"),
    (lambda text: text.replace('"corrected"', '"correct"'), "damaged"),
])
def test_damaged_results_are_refused(tmp_path, scored, damage, words):
    path = tmp_path / "a.json"
    write(path, scored)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=words) as caught:
        score.read_result(path)
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_missing_and_foreign_files(tmp_path, scored):
    with pytest.raises(FileNotFoundError, match="stepdistill eval"):
        score.read_result(tmp_path / "none.json")
    result = write(tmp_path / "a.json", scored)
    features = score.features_path(tmp_path / "a.json", "fashion")
    with pytest.raises(ValueError, match="belongs to protocol"):
        score.read_features(tmp_path / "a.json", {**result, "protocol_hash": "0" * 16})
    features.write_bytes(features.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        score.read_features(tmp_path / "a.json", result)
    assert score.read_features(tmp_path / "none.json", result) is None


@pytest.mark.parametrize(("damage", "words"), [
    (lambda kept: {name: value for name, value in kept.items() if name != "features"}, "it lacks features"),
    (lambda kept: {**kept, "features": kept["features"][:99]}, "99 rows of features in the place of 100"),
    (lambda kept: {**kept, "labels": kept["labels"][:50]}, "50 rows of labels"),
    (lambda kept: {**kept, "predicted": kept["predicted"][:0]}, "it lacks predicted"),
    (lambda kept: {name: value for name, value in kept.items() if name != "left/kid_fashion"}, "it lacks left/kid_fashion"),
    (lambda kept: {**kept, "values/accuracy_fashion": kept["values/accuracy_fashion"][:99]}, "99 rows of values/accuracy_fashion"),
])
def test_features_that_lack_something_are_damaged(tmp_path, scored, damage, words):
    """Though the file can be read and states the right protocol; a report would leave its differences out without a word."""
    path = tmp_path / "a.json"
    result = write(path, scored)
    features = score.features_path(path, "fashion")
    save_file(damage(load_file(features)), features, metadata={"protocol_hash": result["protocol_hash"]})
    with pytest.raises(ValueError, match=f"a.features_fashion.safetensors is damaged \\({words}") as caught:
        score.read_features(path, result)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"damaged \\({words}"):
        report.compare([path, write_other(tmp_path, scored)], tmp_path / "out")


def test_results_from_before_sets_were_kept_are_read(tmp_path, scored):
    """Without a difference in recall, and with every other one."""
    path = tmp_path / "a.json"
    result, features = write(path, scored), score.features_path(path, "fashion")
    kept = {name: value for name, value in load_file(features).items() if name != "values/recall_fashion"}
    save_file(kept, features, metadata={"protocol_hash": result["protocol_hash"]})
    rows = report.compare([path, write_other(tmp_path, scored)], tmp_path / "out")["rows"]
    assert set(result["metrics"]) - set(rows[1]["difference"]) == {"recall_fashion"}


def write_other(folder, scored):
    write(folder / "b.json", scored)
    return folder / "b.json"


def test_damaged_samples_are_named(tmp_path, scored):
    result = write(tmp_path / "a.json", scored)
    samples = score.samples_path(tmp_path / "a.json")
    save_file({"labels": labels(100)}, samples, metadata={"protocol_hash": result["protocol_hash"]})
    with pytest.raises(ValueError, match=r"a\.samples\.safetensors is damaged \(it lacks images\)"):
        score.read_samples(samples, result)


def test_every_kind_leaves_what_it_says(scored):
    """What must lie beside a result is told from its protocol alone."""
    assert measures.rows_kept(protocol.get("fashion", 100)) == {name: len(kept) for name, kept in scored.pairs.items()}
