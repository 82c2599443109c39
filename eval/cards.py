"""Public protocols as cards: what each of them looks at, and what a user has to bring, because nothing is ever downloaded.

A card is fixed; so is its hash. A `Protocol` is made of it where weights, reference and prompts have been found: their digests belong to
it, and its hash to every result. What a card lacks on this machine `missing` says in words, file by file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepdistill.data.prompts import read_prompts
from stepdistill.eval import alignment, diversity, references, weights
from stepdistill.eval.extractors import EXTRACTORS, TEXT_IMAGE, digest_of, weights_of
from stepdistill.eval.measures import IN_PROMPT, KINDS, LPIPS
from stepdistill.eval.protocol import BATCH, PRECISION, PROTOCOLS, Measure, Protocol, Real, groups_of, hash_of, unknown

CHOSEN, USUAL = "", "dinov2-l14"                        # in a card: the extractor that the user names, and the one where none is named
REFERENCE, PROMPTS = "reference.safetensors", ("prompts.txt", "prompts.jsonl", "prompts.csv")
VARIETY = (200, 8)                                      # most prompts and seeds of each that variety is told from
FEWEST_TURNS = 5                                        # prompts or classes that it needs
FEWEST = 50                                             # pictures of a score
NAMES = {"clip-g14": "vit_g14_laion2b", "clip-l14": "vit_l14_openai", "clip-b32": "vit_b32_openai", diversity.JUDGE: "alex"}

MEASURED = tuple(Measure(kind, CHOSEN) for kind in ("fd", "kd", "precision", "recall", "density", "coverage"))
TAUGHT = tuple(Measure(kind, CHOSEN) for kind in ("fd", "kd", "recall", "coverage", "variety", "vendi"))
ADM = tuple(Measure(kind, "inception-tf") for kind in ("fid", "is", "precision", "recall"))
CLIP_G = Measure("clip", "clip-g14", convention="cos")


@dataclass(frozen=True)
class Card:
    """A public protocol. `reference` and `captions` say in words what a user brings and where it is published; empty: nothing."""

    name: str
    dataset: str
    tag: str                                            # of the reference, in the names of numbers
    count: int
    measures: tuple[Measure, ...]
    reference: str = ""
    reference_count: int = 0                            # real pictures in it; 0: any number
    captions: str = ""
    captioned: int = 0                                  # how many of them; 0: any number
    classes: int = 0
    resolution: int = 0
    crop: str = "none"
    metric_size: int = 0
    set_count: int = 10_000                             # real pictures that kernels and neighbours look at

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "measures": [asdict(measure) for measure in self.measures]}

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, of all but the words."""
        return hash_of({key: value for key, value in self.to_dict().items() if key not in ("reference", "captions")})

    @property
    def place(self) -> Path:
        """The folder in which its reference and prompts are looked for."""
        return weights.root() / "protocols" / self.name


IMAGENET = 1_281_167                                    # training pictures
EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"
COCO14 = "the pictures of COCO 2014 val (http://images.cocodataset.org/zips/val2014.zip)"
CARDS = {card.name: card for card in (
    Card("cifar10-50k", "CIFAR-10 32x32, train", "cifar10train", 50_000, ADM[:2],
         f"{EDM}/cifar10-32x32.npz, or a folder of all training pictures", 50_000, classes=10, resolution=32, set_count=10_000),
    Card("imagenet64-50k", "ImageNet 64x64, train", "imagenet64train", 50_000, ADM,
         f"{EDM}/imagenet-64x64.npz (EDM, DMD2, SiD) or imagenet-64x64-baseline.npz (ADM), which differ; with --set-from "
         "VIRTUAL_imagenet64_labeled.npz of ADM", IMAGENET, classes=1000, resolution=64),
    Card("imagenet256-50k", "ImageNet 256x256, train", "imagenet256train", 50_000, ADM,
         "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
         IMAGENET, classes=1000, resolution=256),
    Card("coco14-30k-256", "COCO 2014 val, 30,000 captions", "coco14val", 30_000, (Measure("fid", "inception-clean"), CLIP_G),
         COCO14, 40_504, "the 30,000 captions of COCO 2014 val that GigaGAN drew and DMD2 and SiD-LSG repeat, in their order", 30_000,
         crop="centre", metric_size=256),
    Card("sdxl-coco10k", "COCO 2014 val, 10,000 captions", "coco14val10k", 10_000,
         (Measure("fid", "inception-clean"), Measure("patchfid", "inception-clean", "patch"), CLIP_G),
         "the pictures of COCO 2014 val that belong to the captions", 10_000,
         "the 10,000 captions of COCO 2014 val that DMD2 draws (its all_prompts.pkl), in their order", 10_000,
         crop="centre", metric_size=512),
    Card("coco17-5k", "COCO 2017 val, first captions", "coco17val", 5_000,
         (Measure("fid", "inception-clean"), Measure("kid", "inception-clean"), Measure("clip", "clip-l14", convention="cos")),
         "the pictures of COCO 2017 val (http://images.cocodataset.org/zips/val2017.zip)", 5_000,
         "the first caption of each picture of COCO 2017 val, in the order of the pictures' names", 5_000, crop="centre", metric_size=256),
    Card("mjhq-30k", "MJHQ-30K", "mjhq", 30_000, (Measure("fid", "inception-clean"), Measure("clip", "clip-l14", convention="cos")),
         "the pictures of MJHQ-30K, in one folder or by categories (https://huggingface.co/datasets/playgroundai/MJHQ-30K)", 30_000,
         "the prompts of MJHQ-30K in the order of the pictures' names", 30_000, crop="centre", metric_size=1024),
    Card("custom", "pictures of your own", "real", 5_000, MEASURED, "a folder of real pictures", captions="prompts of your own"),
    Card("teacher-only", "a teacher's own pictures", "teacher", 5_000, TAUGHT, captions="prompts of your own"),
)}
TEACHER = CARDS["teacher-only"]


@dataclass(frozen=True)
class Exam:
    """A protocol with all that it is held with: real data by `Measure.key`, prompts, and of a world's prompts the groups."""

    protocol: Protocol
    real: Mapping[str, Real]
    prompts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Brought:
    """What a user brings to a card: files of the reference and of prompts, an extractor where the card leaves it open, further measures in
    words (`measure`), and the number of classes of a model whose card has none of its own."""

    reference: Path | None = None
    prompts: Path | None = None
    extractor: str | None = None
    also: tuple[str, ...] = ()
    classes: int = 0


def find(name: str) -> Card | None:
    """The card of that name, None for a shipped world; ValueError naming the nearest one for another name."""
    if name in PROTOCOLS:
        return None
    if name not in CARDS:
        raise unknown(name, [*PROTOCOLS, *CARDS])
    return CARDS[name]


def ready(name: str, count: int | None = None, seed: int = 0, brought: Brought = Brought()) -> Exam:
    """A protocol of that name, of `count` pictures (default: its own number), with everything found that it needs.

    Raises FileNotFoundError for what is missing, saying where it is published and where it is looked for, and ValueError for what does
    not belong to the protocol.
    """
    card = find(name)
    if card is None:
        if brought.reference or brought.prompts or brought.extractor:
            raise ValueError(f"protocol {name!r} brings all that it needs: leave --reference, --prompts and --extractor out")
        world = PROTOCOLS[name]
        protocol = extended(world.protocol(count or world.count, seed), brought.also)
        return Exam(protocol, world.reference(), world.prompts()[: protocol.prompts], world.groups()[: protocol.prompts])
    texts = prompts_of(card, brought)
    drafted = draft(card, count or card.count, seed, brought, texts)
    path = brought.reference or card.place / REFERENCE
    if not path.exists():
        whose = ("its teacher's result with --against RESULT, or the teacher with --against MODEL" if card is TEACHER
                 else f"make it of {card.reference} by `stepdistill reference SOURCE --protocol {name}`, which puts it there, or name it "
                      "with --reference")
        raise FileNotFoundError(f"protocol {name!r} needs a reference, and there is none at {path}: {whose}")
    if path.is_dir() or path.suffix != ".safetensors":
        raise ValueError(f"{path} is no reference: make one by `stepdistill reference {path} --protocol {name} --to FILE.safetensors`")
    found = references.read(path, drafted)
    if card.reference_count not in (0, found.count):
        raise ValueError(f"{path} was made of {found.count:,} pictures, and the reference of {name!r} has {card.reference_count:,}: "
                         f"{card.reference}")
    return Exam(replace(drafted, reference_sha256=found.sha256, set_reference=set_reference(card, drafted, found)), found.real, texts)


def set_reference(card: Card, protocol: Protocol, found: references.Stored) -> str:
    """How many real pictures kernels and neighbours look at, in words: the card's number where the reference kept as many as it could of
    them, or where no measure looks at any; else what it kept."""
    kept = {key: number for key, number in references.kept(found).items() if key in references.set_keys(protocol)}
    if all(number == min(found.count, card.set_count) for number in kept.values()):
        return _evenly(card.set_count)
    if len(set(kept.values())) == 1:
        return _evenly(*set(kept.values()))
    return ", ".join(f"{_evenly(number)} of {key}" for key, number in sorted(kept.items()))


def _evenly(number: int) -> str:
    return f"{number:,} evenly spaced ones"


def extended(protocol: Protocol, also: Sequence[str]) -> Protocol:
    """A protocol with further measures in words, and so with another hash; what is there already is not taken twice. Of a card it is the
    one that `draft` makes of them all, but for the number of real pictures they look at, which `set_reference` tells.

    Raises as `draft`, and ValueError for a distance to real pictures that a world's extractors have not looked at.
    """
    card, plan = find(protocol.name), protocol.plan
    added = [m for m in dict.fromkeys(map(measure, also)) if m not in plan.values()]
    known = any(protocol.variety)
    variety, apart = (protocol.variety, protocol.variety_apart) if known else variety_of(protocol.turns, protocol.count, added)
    for m in added:
        _refuse_unfit(m, protocol.turns, protocol.prompts, protocol.classes)
        if card is None and KINDS[m.kind].real and m.key not in (real := PROTOCOLS[protocol.name].reference()):
            raise ValueError(f"protocol {protocol.name!r} has real pictures as {', '.join(real)} sees them: measure {m.kind} on that, or "
                             "take protocol custom with a reference of your own")
    if not added:
        return protocol
    others = dict.fromkeys(m.extractor for m in added if m.extractor not in protocol.extractors)
    return replace(
        protocol, metrics=(*plan, *(_name(m, card, protocol.count, variety[1]) for m in added)), measures=(*plan.values(), *added),
        further_extractors=(*protocol.further_extractors, *((each, digest_of(each)) for each in others)),
        variety=variety if any(m.kind in IN_PROMPT for m in added) else protocol.variety, variety_apart=apart)


def variety_of(turns: int, count: int, asked: Sequence[Measure]) -> tuple[tuple[int, int], bool]:
    """Prompts or classes, and pictures of each, that variety is told from; and whether these are made after the `count` others, which they
    are where it is asked for and prompts have one picture each."""
    prompts, seeds = min(VARIETY[0], turns), min(VARIETY[1], count // turns)
    apart = seeds < 2 and any(m.kind in IN_PROMPT for m in asked)
    return (prompts, VARIETY[1] if apart else seeds), apart


def _refuse_unfit(m: Measure, turns: int, prompts: int, classes: int) -> None:
    """ValueError for a measure that cannot be taken of so many prompts or classes; FileNotFoundError for missing words."""
    if m.kind in IN_PROMPT and turns < FEWEST_TURNS:
        raise ValueError(f"{m.kind} needs five prompts or classes, got {turns}: give --prompts")
    if m.kind == "clip" and not prompts:
        raise ValueError("a CLIP score needs prompts: give --prompts, or take a protocol that has some")
    if m.kind == "clip":
        weights.tokenizer(m.extractor)                                           # missing words are told before anything is generated
    if m.kind == "accuracy" and not classes:
        raise ValueError("accuracy is of classes, and there are none here: leave it out")


def make_reference(name: str, source: Path, to: Path | None = None, *, set_from: Path | None = None, keep: int | None = None,
                   brought: Brought = Brought(), device: torch.device | str = "cpu") -> tuple[references.Stored, Path]:
    """The reference of a protocol from a folder of pictures or published statistics; returns it, and the file that it is in (by default
    where `ready` looks for it). Raises as `draft` and `references.make`."""
    card = find(name)
    if card is None:
        raise ValueError(f"protocol {name!r} brings its own reference")
    path = to or card.place / REFERENCE
    return references.make(source, bare(card, card.count, brought), path, keep=keep or card.set_count, count=card.reference_count,
                           set_from=set_from, device=device), path


def bare(card: Card, count: int, brought: Brought) -> Protocol:
    """A card's draft with the measures that real pictures are needed for, and no others."""
    alone = replace(brought, also=tuple(words for words in brought.also if KINDS[measure(words).kind].real))
    return draft(replace(card, measures=tuple(m for m in card.measures if KINDS[m.kind].real)), count, 0, alone)


def draft(card: Card, count: int, seed: int, brought: Brought = Brought(), prompts: Sequence[str] = ()) -> Protocol:
    """A card's protocol but for the digest of its reference.

    Raises FileNotFoundError for missing weights, ValueError for a measure that cannot be taken.
    """
    if count < FEWEST:
        raise ValueError(f"protocol {card.name!r} needs at least {FEWEST} pictures, got {count}: raise the count")
    open_to_choice = any(measure.extractor == CHOSEN for measure in card.measures)
    if brought.extractor and not open_to_choice:
        raise ValueError(f"the extractors of protocol {card.name!r} are fixed: leave --extractor out")
    extractor = brought.extractor or USUAL
    if extractor not in EXTRACTORS:
        raise ValueError(f"no extractor {extractor!r}: there are {', '.join(EXTRACTORS)}")
    classes = 0 if prompts else card.classes or brought.classes
    turns = max(1, len(prompts) or classes)
    also = [measure(words) for words in brought.also]
    variety, apart = variety_of(turns, count, also)
    told = turns >= FEWEST_TURNS and variety[1] >= 2
    asked = [replace(m, extractor=extractor, kind=_called(m.kind, extractor)) if m.extractor == CHOSEN else m for m in card.measures]
    asked = [m for m in asked if told or m.kind not in IN_PROMPT]
    asked += [m for m in also if m not in asked]
    for m in asked:
        _refuse_unfit(m, turns, len(prompts), classes)
    names = tuple(_name(m, card, count, variety[1]) for m in asked)
    first, *others = dict.fromkeys(m.extractor for m in asked)
    return Protocol(
        name=card.name, dataset=card.dataset, reference=card.tag, reference_sha256="", count=count, seed=seed, resolution=card.resolution,
        labels=f"prompt i mod {len(prompts)}" if prompts else f"i mod {turns}", classes=classes, extractor=first,
        extractor_sha256=digest_of(first), metrics=names, groups=groups_of(card.name, count, classes), quantise="round", batch_size=BATCH,
        precision=PRECISION, frechet_reference="all its pictures", set_reference=_evenly(card.set_count), neighbours=3,
        recall_sets=5, measures=tuple(asked), further_extractors=tuple((each, digest_of(each)) for each in others), crop=card.crop,
        metric_size=card.metric_size, prompts=len(prompts), prompts_sha256=digest_of_prompts(prompts) if prompts else "",
        variety=variety if any(m.kind in IN_PROMPT for m in asked) else (0, 0), variety_apart=apart)


def measure(words: str) -> Measure:
    """KIND:EXTRACTOR or KIND:EXTRACTOR:CONVENTION as a user writes it: kd:dinov2-l14, clip:clip-l14:100cos, lpips:alexnet:512.

    Raises ValueError for a kind, extractor or convention that there is not, or that do not go together.
    """
    kind, _, rest = words.partition(":")
    extractor, _, convention = rest.partition(":")
    if kind not in KINDS:
        raise ValueError(f"no measure {kind!r} in {words!r}: it is KIND:EXTRACTOR, and the kinds are {', '.join(KINDS)}")
    suited = {"clip": tuple(TEXT_IMAGE), "lpips": (diversity.JUDGE,), "cmmd": tuple(n for n in EXTRACTORS if n.startswith("clip-"))}
    if extractor not in suited.get(kind, tuple(EXTRACTORS)):
        raise ValueError(f"{words!r}: {kind} is measured on {' or '.join(suited.get(kind, tuple(EXTRACTORS)))}")
    if kind == "clip":
        convention = convention or "cos"
    scales = {"clip": tuple(alignment.CONVENTIONS), "lpips": tuple(LPIPS)}.get(kind, ("",))
    if convention not in scales:
        raise ValueError(f"{words!r}: {kind} has " + (f"the conventions {', '.join(s for s in scales if s)}" if len(scales) > 1
                                                      else "no conventions"))
    return Measure(kind, extractor, "patch" if kind == "patchfid" else "whole", convention)


def _called(kind: str, extractor: str) -> str:
    """A distance is called after the extractor it is measured on: fid on Inception, fd on DINOv2, frechet on others."""
    if kind not in ("fd", "kd") or extractor.startswith("dinov2"):
        return kind
    return {"fd": "fid" if extractor.startswith("inception") else "frechet", "kd": "kid"}[kind]


def _name(m: Measure, card: Card | None, count: int, seeds: int) -> str:
    """What the number is, in its name: fid_inception_clean_coco14val_30k_256, clip_vit_g14_laion2b_cos; of a world's protocol
    coverage_fashion."""
    head = f"{m.kind}_{NAMES.get(m.extractor, m.extractor.replace('-', '_'))}"
    if m.kind == "clip" or card is None:
        return "_".join(filter(None, (head, m.convention)))
    if m.kind in IN_PROMPT:
        return f"{head}_m{seeds}" + (f"_{m.convention}" if m.convention else "")
    size = f"_{card.metric_size}" if card.metric_size and m.view == "whole" else ""
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{head}_{card.tag}_{number}{size}" if KINDS[m.kind].real else f"{head}_{number}"


def prompts_of(card: Card, brought: Brought) -> tuple[str, ...]:
    """The prompts named or found; none for a card or a model of classes. Raises as `read_prompts`, and for another number of them."""
    if not card.captions:
        if brought.prompts:
            raise ValueError(f"protocol {card.name!r} has classes and takes no prompts: leave --prompts out")
        return ()
    path = brought.prompts or next((card.place / name for name in PROMPTS if (card.place / name).is_file()), None)
    if path is None:
        if not card.captioned:
            return ()
        raise FileNotFoundError(f"protocol {card.name!r} needs {card.captions}: write them into {card.place / PROMPTS[0]}, one a line, or "
                                "name a file with --prompts")
    texts = read_prompts(path)
    if card.captioned not in (0, len(texts)):
        raise ValueError(f"{path} holds {len(texts):,} prompts, and protocol {card.name!r} has {card.captioned:,}: {card.captions}")
    return texts


def digest_of_prompts(prompts: Sequence[str]) -> str:
    """What a protocol knows them by."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------------------------ the list


def listing() -> list[dict[str, Any]]:
    """A row for each protocol in plain JSON values: name, hash, dataset, count, what it measures, and what is missing here."""
    rows: list[dict[str, Any]] = []
    for name, world in PROTOCOLS.items():
        try:
            protocol = world.protocol(world.count, 0)
        except FileNotFoundError as error:
            rows.append({"name": name, "hash": None, "dataset": "", "count": world.count, "measures": [], "missing": [str(error)],
                         "card": {}})
            continue
        rows.append({"name": name, "hash": protocol.hash, "dataset": protocol.dataset, "count": protocol.count,
                     "measures": list(protocol.metrics), "missing": [], "card": protocol.to_dict()})
    for card in CARDS.values():
        told = [f"{m.kind} on {m.extractor or USUAL}" for m in card.measures]
        rows.append({"name": card.name, "hash": card.hash, "dataset": card.dataset, "count": card.count, "measures": told,
                     "missing": missing(card), "card": card.to_dict()})
    return rows


def missing(card: Card) -> list[str]:
    """What must be brought before the card can be used here, each in a line."""
    out = []
    for name in dict.fromkeys(m.extractor or USUAL for m in card.measures):
        try:
            weights_of(name)
        except FileNotFoundError:
            out.append(f"weights of {name}: `stepdistill weights` says where they are published")
    if card.reference and not (card.place / REFERENCE).is_file():
        out.append(f"a reference at {card.place / REFERENCE}: {card.reference}")
    if card.captioned and not any((card.place / name).is_file() for name in PROMPTS):
        out.append(f"prompts at {card.place / PROMPTS[0]}: {card.captions}")
    return out
