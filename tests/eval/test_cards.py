"""Public protocols: fixed cards, what they ask for, and every measure on a random extractor, without weights or a network."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judges import TinyClip
from torch import Tensor

from stepdistill.cli import run
from stepdistill.data.prompts import read_prompts
from stepdistill.eval import cards, diversity, extractors, measures, protocol, references, score, weights
from stepdistill.eval.cards import CARDS, Brought, draft
from stepdistill.eval.extractors import Tiny
from stepdistill.eval.pictures import Pictures
from stepdistill.worlds import stored_results

PROMPTS = tuple(f"a picture of thing {i}" for i in range(8))


class TinyClassifier(Tiny):
    """Ten random classes."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        seen = super().features(images)[0]
        return seen, seen[:, :10] * 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights, references and prompts are looked for: empty; and nothing asks the network."""
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path / "weights"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "weights"


@pytest.fixture
def tiny(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random extractors under the names of the public ones."""
    for name in extractors.EXTRACTORS:
        made = TinyClip if name in extractors.TEXT_IMAGE else TinyClassifier if name.startswith("inception") else Tiny
        monkeypatch.setitem(extractors.EXTRACTORS, name, made)
    monkeypatch.setattr(weights, "tokenizer", lambda name: None)
    monkeypatch.setattr(diversity, "load_lpips", lambda *device: lambda a, b: (a - b).square().mean((1, 2, 3)))
    monkeypatch.setattr(weights, "network", lambda name: (None, f"digest of {name}"))
    return place


def noise(count: int, side: int, seed: int = 0) -> Tensor:
    """Pictures that differ in brightness, so that sets of them differ."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(40, 200, (count, 3, 1, 1), generator=generator)
    return (level + torch.randint(0, 50, (count, 3, side, side), generator=generator)).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------------------------ the cards


def test_cards_are_what_they_were() -> None:
    """A card that changes is another protocol and wants another name."""
    assert {name: card.hash for name, card in CARDS.items()} == {
        "cifar10-50k": "0e109410579991aa", "imagenet64-50k": "22d288a886cd8b7e", "imagenet256-50k": "0036759f868cde40",
        "coco14-30k-256": "7500e0bfb8cfdb6a", "sdxl-coco10k": "222c8eceef7ee692", "coco17-5k": "55d36d32ef9158fd",
        "mjhq-30k": "e254a361b75370da", "custom": "cf17b5b5e7096c15", "teacher-only": "e0d6af633369b440"}


def test_protocols_of_before_there_were_cards_are_the_same() -> None:
    """Of every stored result: the dictionary, the hash, and there and back."""
    for path in stored_results("fashion"):
        stored = json.loads(path.read_text())
        now = protocol.get("fashion", stored["protocol"]["count"], stored["protocol"]["seed"])
        assert now.to_dict() == stored["protocol"]
        assert now.hash == stored["protocol_hash"]
        assert protocol.Protocol.from_dict(stored["protocol"]) == now


@pytest.mark.parametrize(("name", "prompts", "names"), [
    ("cifar10-50k", (), ("fid_inception_tf_cifar10train_50k", "is_inception_tf_50k")),
    ("imagenet64-50k", (), ("fid_inception_tf_imagenet64train_50k", "is_inception_tf_50k", "precision_inception_tf_imagenet64train_50k",
                            "recall_inception_tf_imagenet64train_50k")),
    ("coco14-30k-256", PROMPTS, ("fid_inception_clean_coco14val_30k_256", "clip_vit_g14_laion2b_cos")),
    ("sdxl-coco10k", PROMPTS, ("fid_inception_clean_coco14val10k_10k_512", "patchfid_inception_clean_coco14val10k_10k",
                               "clip_vit_g14_laion2b_cos")),
    ("teacher-only", PROMPTS, ("fd_dinov2_l14_teacher_5k", "kd_dinov2_l14_teacher_5k", "recall_dinov2_l14_teacher_5k",
                               "coverage_dinov2_l14_teacher_5k", "variety_dinov2_l14_m8", "vendi_dinov2_l14_m8")),
])
def test_numbers_say_in_their_names_what_they_are(tiny: Path, name: str, prompts: tuple[str, ...], names: tuple[str, ...]) -> None:
    drafted = draft(CARDS[name], CARDS[name].count, 0, prompts=prompts)
    assert drafted.metrics == names
    assert protocol.Protocol.from_dict(json.loads(json.dumps(drafted.to_dict()))) == drafted


def test_another_extractor_has_another_name(tiny: Path) -> None:
    named = {extractor: draft(CARDS["custom"], 500, 0, Brought(extractor=extractor)).metrics[0]
             for extractor in ("tiny", "inception-clean", "dinov2-s14")}
    assert named == {"tiny": "frechet_tiny_real_500", "inception-clean": "fid_inception_clean_real_500",
                     "dinov2-s14": "fd_dinov2_s14_real_500"}


def test_variety_is_told_where_prompts_have_several_pictures(tiny: Path) -> None:
    kinds = lambda count, prompts: {m.kind for m in draft(CARDS["teacher-only"], count, 0, prompts=prompts).measures}      # noqa: E731
    assert {"variety", "vendi"} <= kinds(64, PROMPTS)
    assert not {"variety", "vendi"} & (kinds(64, tuple(map(str, range(60)))) | kinds(64, PROMPTS[:4]) | kinds(64, ()))


@pytest.mark.parametrize(("name", "plain"), [
    ("coco14-30k-256", ("fid_inception_clean_coco14val_30k_256", "clip_vit_g14_laion2b_cos")),
    ("teacher-only", ("fd_dinov2_l14_teacher_5k", "kd_dinov2_l14_teacher_5k", "recall_dinov2_l14_teacher_5k",
                      "coverage_dinov2_l14_teacher_5k")),
])
def test_variety_has_pictures_of_its_own_where_prompts_have_one(tiny: Path, name: str, plain: tuple[str, ...]) -> None:
    """Only where it is asked for: the protocol without it is what it was."""
    card, prompts = CARDS[name], tuple(f"prompt {i}" for i in range(CARDS[name].count))
    asked = draft(card, card.count, 0, Brought(also=("lpips:alexnet:512", "variety:dinov2-l14")), prompts)
    assert (asked.variety, asked.variety_apart, asked.total) == ((200, 8), True, card.count + 1600)
    assert {"lpips_alex_m8_512", "variety_dinov2_l14_m8"} <= set(asked.metrics)
    assert [asked.label(i) for i in (0, card.count - 1, card.count, card.count + 199, card.count + 200)] == [0, card.count - 1, 0, 199, 0]
    assert protocol.Protocol.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    without = draft(card, card.count, 0, prompts=prompts)
    assert (without.metrics, without.variety, without.total) == (plain, (0, 0), card.count)
    assert not {"variety", "variety_apart"} & set(without.to_dict())
    assert without.hash != asked.hash
    assert not draft(CARDS["custom"], 64, 0, Brought(also=("vendi:tiny",), extractor="tiny"), PROMPTS).variety_apart


# ----------------------------------------------------------------------------------------------------------------------- every measure


def test_every_measure_runs_on_64_pictures(tiny: Path) -> None:
    """All kinds in one protocol: large enough for a patch, in classes for accuracy, in prompts for the others."""
    card = replace(CARDS["custom"], measures=(), crop="centre", metric_size=48)
    distances = tuple(f"{kind}:dinov2-s14" for kind in ("fd", "kd", "precision", "recall", "density", "coverage"))
    others = ("fid:inception-clean", "patchfid:inception-clean", "is:inception-tf", "cmmd:clip-l14-336", "clip:clip-l14:100cos",
              "clip:clip-g14", "variety:dinov2-l14", "vendi:dinov2-l14", "lpips:alexnet", "lpips:alexnet:01", "kid:tiny", "frechet:tiny")
    exam = draft(card, 64, 0, Brought(also=(*distances, *others)), PROMPTS)
    assert {m.kind for m in exam.measures} == set(measures.KINDS) - {"accuracy"}
    real, made = (Pictures.of(noise(64, 160, seed)) for seed in (1, 2))
    statistics = references.gather(real, exam, 40)
    assert set(statistics) == {"dinov2-s14", "inception-clean", "inception-clean.patch", "clip-l14-336", "tiny"}
    labels = torch.arange(64) % len(PROMPTS)
    scored = score.score(made, labels, exam, statistics, prompts=PROMPTS)
    assert tuple(scored.metrics) == exam.metrics
    assert all(torch.tensor([e.value, e.se, *e.ci95]).isfinite().all() for e in scored.metrics.values())
    assert measures.rows_kept(exam) == {name: len(kept) for name, kept in scored.pairs.items()}
    moved = Pictures.of(noise(64, 160, 2).unflatten(0, (-1, len(PROMPTS))).roll(1, 1).flatten(0, 1))        # each told the next prompt
    told = score.score(moved, labels, exam, statistics, prompts=PROMPTS)
    assert set(scored.shuffled) == {name for name, measure in exam.plan.items() if measure.kind == "clip"}
    assert all(told.metrics[name].value == pytest.approx(found.value, abs=1e-5) for name, found in scored.shuffled.items())
    again = score.score(real, labels, exam, statistics, prompts=PROMPTS)
    for name, measure in exam.plan.items():
        if measure.kind in ("fd", "fid", "patchfid", "frechet"):
            assert abs(again.metrics[name].value) < 1e-4 < scored.metrics[name].value                         # a set and itself
    assert scored.metrics["lpips_alex_m8"].value == pytest.approx(4 * scored.metrics["lpips_alex_m8_01"].value)
    assert scored.metrics["clip_vit_l14_openai_100cos"].value == pytest.approx(100 * scored.metrics["clip_vit_g14_laion2b_cos"].value)


def test_variety_apart_is_told_from_its_own_pictures(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures 60 and on, prompt by prompt in turn; every other measure is of the first 60, and finds what it finds without them."""
    monkeypatch.setattr(cards, "VARIETY", (6, 3))
    prompts, also = tuple(f"prompt {i}" for i in range(40)), ("variety:dinov2-s14", "lpips:alexnet")
    card = replace(CARDS["coco14-30k-256"], metric_size=0)
    plain, exam = (draft(card, 60, 0, Brought(also=words), prompts) for words in ((), also))
    images, real = noise(78, 32), references.gather(Pictures.of(noise(60, 32, 1)), plain, 60)
    labels = torch.tensor([exam.label(i) for i in range(78)])
    assert labels[60:].tolist() == [0, 1, 2, 3, 4, 5] * 3
    found = score.score(images, labels, exam, real, prompts=prompts)
    alone = score.score(images[:60], labels[:60], plain, real, prompts=prompts)
    assert found.metrics.items() >= alone.metrics.items()
    assert torch.equal(found.features, alone.features)
    features = extractors.extract(Tiny(), images[60:], 250)[0]
    assert torch.equal(found.further["dinov2-s14.variety"], features)
    assert "dinov2-s14" not in found.further
    expected = diversity.mean_distance(torch.stack([features[[p, p + 6, p + 12]] for p in range(6)]))
    torch.testing.assert_close(found.pairs["values/variety_dinov2_s14_m3"], expected)
    x = images[60:].float() / 127.5 - 1
    pairs = [torch.stack([(x[p + a] - x[p + b]).square().mean() for a, b in ((0, 6), (0, 12), (6, 12))]).mean() for p in range(6)]
    torch.testing.assert_close(found.pairs["values/lpips_alex_m3"], torch.stack(pairs).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="wants 78 pictures, got 60"):
        score.score(images[:60], labels[:60], exam, real, prompts=prompts)


@pytest.mark.parametrize(("convention", "shape", "low"), [
    ("", (520, 650), -1.0), ("01", (520, 650), 0.0), ("512", (512, 640), -1.0), ("512_01", (512, 640), 0.0)])
def test_lpips_is_fed_what_its_convention_says(tiny: Path, convention: str, shape: tuple[int, int], low: float) -> None:
    asked = "lpips:alexnet" + f":{convention}" * bool(convention)
    exam = draft(CARDS["custom"], 50, 0, Brought(also=(asked,), extractor="tiny"), PROMPTS[:5])
    name = next(name for name in exam.metrics if name.startswith("lpips"))
    assert name == f"lpips_alex_m8_{convention}".rstrip("_")
    dark, fed = torch.zeros(3, 520, 650, dtype=torch.uint8), []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        fed.append((tuple(a.shape[2:]), float(b.max())))
        return (a - b).square().mean((1, 2, 3))

    seen = measures.Seen(exam, exam.plan[name], torch.arange(50) % 5, pictures=Pictures(50, lambda rows: [dark] * len(rows)),
                         distance=distance)
    assert measures.KINDS["lpips"].find(seen).estimate.value == 0
    assert set(fed) == {(shape, low)}


def test_accuracy_is_of_classes(tiny: Path) -> None:
    exam = draft(CARDS["custom"], 64, 0, Brought(also=("accuracy:inception-tf",), extractor="tiny", classes=4))
    images = noise(64, 32)
    scored = score.score(images, torch.arange(64) % 4, exam, references.gather(Pictures.of(images), exam, 64))
    logits = extractors.extract(TinyClassifier(), images, 64)[1]
    assert logits is not None
    assert scored.metrics["accuracy_inception_tf_64"].value == (logits.argmax(1) == torch.arange(64) % 4).double().mean()


def test_what_pairs_results_is_what_the_measures_found(tiny: Path) -> None:
    """The difference of two results told from what they kept equals that of the formulas on both sets of features."""
    from stepdistill.eval import metrics

    exam = draft(CARDS["custom"], 64, 0, Brought(extractor="tiny", also=("variety:tiny",)), PROMPTS)
    real = references.gather(Pictures.of(noise(64, 32, 3)), exam, 64)
    a, b = (score.score(noise(64, 32, seed), torch.arange(64) % 8, exam, real, prompts=PROMPTS) for seed in (1, 2))
    difference = {}
    for name, measure in exam.plan.items():
        sides = (measures.unpacked(dict(s.pairs), name, s.metrics[name]) for s in (a, b))
        difference[measure.kind] = measures.KINDS[measure.kind].paired(*sides)
    groups = [measures.groups(s.features, exam) for s in (a, b)]
    assert difference["frechet"] == metrics.paired_frechet(*groups, real["tiny"].train)
    sums = [measures.kernel_sums(s.features, exam, real["tiny"]) for s in (a, b)]
    assert difference["kid"] == metrics.paired_kid(*sums)
    for kind, k in (("recall", exam.neighbours), ("coverage", exam.cover_neighbours)):
        formula = getattr(metrics, f"{kind}_of_sets")
        one, other = (formula(s.features, real["tiny"].test_features, k, measures.members(exam, 5))[1] for s in (a, b))
        assert difference[kind] == metrics.paired_sets(one, other)
        assert difference[kind].value == pytest.approx(float((one - other).mean()))
    for kind in ("precision", "density", "variety"):
        name = next(name for name, measure in exam.plan.items() if measure.kind == kind)
        assert difference[kind].value == pytest.approx(a.metrics[name].value - b.metrics[name].value)


# --------------------------------------------------------------------------------------------------------------------- what is missing


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    assert err.count("\n") == 1, err
    assert len(err) < 700
    assert not out
    return err


def test_what_a_card_lacks_is_said_one_thing_at_a_time(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions, then weights, then the words of CLIP, then the reference: what, from where, and where to."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(b"")
    asked = ["eval", str(tmp_path / "pictures"), "--protocol", "coco14-30k-256", "--to", str(tmp_path / "r.json")]
    assert run(asked) == 2
    assert str(place / "protocols" / "coco14-30k-256" / "prompts.txt") in (said := one_line(capfd))
    assert "GigaGAN" in said
    (place / "protocols" / "coco14-30k-256").mkdir(parents=True)
    (place / "protocols" / "coco14-30k-256" / "prompts.txt").write_text("a cat\n" * 29_999)
    assert run(asked) == 2
    assert "holds 29,999 prompts, and protocol 'coco14-30k-256' has 30,000" in one_line(capfd)
    (place / "protocols" / "coco14-30k-256" / "prompts.txt").write_text("a cat\n" * 30_000)
    assert run(asked) == 2
    assert "weights convert" in (said := one_line(capfd))
    assert "github.com/toshas/torch-fidelity" in said or "laion" in said
    for name in extractors.EXTRACTORS:
        monkeypatch.setitem(extractors.EXTRACTORS, name, Tiny)
    (place / "clip-g14").mkdir()
    monkeypatch.setattr(weights, "find", lambda name: place / name)
    assert run(asked) == 2
    assert "tokenizer folder of any Stable Diffusion pipeline" in one_line(capfd)
    monkeypatch.setattr(weights, "tokenizer", lambda name: None)
    assert run(asked) == 2
    assert "images.cocodataset.org" in (said := one_line(capfd))
    assert f"there is none at {place / 'protocols' / 'coco14-30k-256' / 'reference.safetensors'}" in said
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(("also", "words"), [
    ("beauty:tiny", "no measure 'beauty'"), ("fid:vgg", "fid is measured on fashion or emoji or emoji-captions or tiny"),
    ("clip:tiny", "clip is measured on clip-b32"),
    ("clip:clip-l14:1000cos", "the conventions cos, 100cos, 2.5cos"), ("fid:tiny:cos", "fid has no conventions"),
    ("cmmd:tiny", "cmmd is measured on clip-"), ("lpips:tiny", "lpips is measured on alexnet"), ("vendi:tiny", "needs five prompts"),
    ("accuracy:tiny", "there are none here"), ("clip:clip-l14", "give --prompts"),
])
def test_measures_that_cannot_be_taken_are_refused(tiny: Path, also: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        draft(CARDS["custom"], 64, 0, Brought(extractor="tiny", also=(also,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "brought", "words"), [
    ("fashion", Brought(prompts=Path("p.txt")), "brings all that it needs"), ("fashion", Brought(extractor="tiny"), "leave"),
    ("fashion", Brought(also=("fd:tiny",)), "has real pictures as fashion sees them"),
    ("fashion", Brought(also=("clip:clip-l14",)), "take a protocol that has some"),
    ("cifar10-50k", Brought(prompts=Path("p.txt")), "takes no prompts"), ("cifar10-50k", Brought(extractor="tiny"), "are fixed"),
    ("custom", Brought(extractor="resnet"), "no extractor 'resnet'"), ("coco14", Brought(), "did you mean 'coco1"),
    ("imagenet64-50k", Brought(), "needs at least 5000 pictures"), ("custom", Brought(reference=Path(".")), "is no reference"),
])
def test_what_does_not_belong_to_a_protocol_is_refused(tiny: Path, name: str, brought: Brought, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        cards.ready(name, 64, 0, brought)
    assert "\n" not in str(caught.value)


def test_a_world_takes_further_measures() -> None:
    """With another hash, and the same one for the same; what is there already is not taken twice."""
    plain = cards.ready("fashion", 100)
    assert plain.protocol.hash == cards.ready("fashion", 100, brought=Brought(also=())).protocol.hash
    also = ("coverage:fashion", "vendi:tiny", "frechet:fashion", "vendi:tiny")
    exam = cards.ready("fashion", 100, brought=Brought(also=also))
    assert exam.protocol.metrics == (*plain.protocol.metrics, "coverage_fashion", "vendi_tiny")
    assert (exam.protocol.variety, plain.protocol.variety) == ((10, 8), (0, 0))
    assert list(exam.protocol.extractors) == ["fashion", "tiny"]
    assert exam.protocol.hash not in (plain.protocol.hash, cards.ready("fashion", 100, brought=Brought(also=also[:1])).protocol.hash)
    assert protocol.Protocol.from_dict(exam.protocol.to_dict()) == exam.protocol
    pictures, labels = torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8), torch.arange(100) % 10
    further, usual = (score.score(pictures, labels, each.protocol, each.real).metrics for each in (exam, plain))
    assert {name: further[name] for name in usual} == usual
    assert 1 < further["vendi_tiny"].value < 8


def test_the_list_says_what_is_missing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["protocols", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert list(rows) == ["fashion", "emoji", "emoji-held-out", *CARDS]
    assert rows["fashion"]["missing"] == []
    assert rows["coco14-30k-256"]["hash"] == CARDS["coco14-30k-256"].hash
    assert len(rows["coco14-30k-256"]["missing"]) == 4
    assert run(["protocols"]) == 0
    assert "missing: weights of dinov2-l14" in capfd.readouterr().out


def test_prompts_are_part_of_the_protocol(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    texts = read_prompts(tmp_path / "p.txt")
    hashes = {draft(CARDS["custom"], 64, 0, Brought(extractor="tiny"), prompts).hash for prompts in (texts, texts[::-1], texts[:7], ())}
    assert len(hashes) == 4
