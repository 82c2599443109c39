"""The exams of the emoji world: names that its teachers were trained on, and held-out ones, which show what they make of new words.

    frechet, kid, precision, recall    the judge's features against OpenMoji's own pictures, one for each name
    clip                               the judge's cosine of a picture and its name: alignment
    variety                            1 - cosine of the features of the pictures of one name

The few names that are never held out come first, and so into every grid of pictures; the others come in the order of their hashes, so the
first ones are a fair choice. Every name has two pictures at least, which are in one group of the jackknife, as they are not independent. A
student that was trained against the judge must not be scored with it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from functools import cache

from stepdistill.diffusion.draws import key
from stepdistill.eval.extractors import Emoji, EmojiCaptions, extract
from stepdistill.eval.metrics import Moments
from stepdistill.eval.protocol import BATCH, PRECISION, Measure, Protocol
from stepdistill.eval.references import Statistics
from stepdistill.worlds.emoji import data

SEEDS, FEWEST = 2, 20                                   # pictures of each name, and names, at least
MEASURES = {
    "frechet_emoji": Measure("frechet", Emoji.name), "kid_emoji": Measure("kid", Emoji.name),
    "precision_emoji": Measure("precision", Emoji.name), "recall_emoji": Measure("recall", Emoji.name),
    "clip_emoji_cos": Measure("clip", EmojiCaptions.name, convention="cos"), "variety_emoji": Measure("variety", Emoji.name),
}


@cache
def shown(held_out: bool) -> tuple[data.Emoji, ...]:
    """The emojis of an exam, one for each name. Raises FileNotFoundError where the packages of the world are not installed."""
    return tuple(sorted(data.plain(data.split(held_out)), key=lambda e: (e.name not in data.NEVER_HELD_OUT, key("emoji exam", e.name))))


def protocol(held_out: bool, count: int, seed: int) -> Protocol:
    """Of `count` pictures. Raises ValueError for fewer than 40, FileNotFoundError where judge or packages are missing."""
    name = "emoji-held-out" if held_out else "emoji"
    names = min(len(shown(held_out)), count // SEEDS)
    if names < FEWEST:
        raise ValueError(f"protocol {name!r} needs at least {FEWEST * SEEDS} pictures for its error bars, got {count}: raise the count")
    groups = 25 if names >= 500 else 10
    names -= names % groups                             # so that the pictures of a name, `names` apart, share a group
    side = "held out" if held_out else "trained on"
    return Protocol(
        name=name, dataset="OpenMoji 64x64", reference=f"{len(shown(held_out))} pictures, one for each name that was {side}",
        reference_sha256=_digest(held_out), count=count, seed=seed, resolution=data.SIZE, labels=f"name i mod {names}", classes=0,
        extractor=Emoji.name, extractor_sha256=Emoji().sha256, metrics=tuple(MEASURES), groups=groups, quantise="round", batch_size=BATCH,
        precision=PRECISION, frechet_reference="all of them", set_reference="all of them", neighbours=3, recall_sets=5,
        measures=tuple(MEASURES.values()), further_extractors=((EmojiCaptions.name, EmojiCaptions().sha256),), prompts=names,
        prompts_sha256=hashlib.sha256("\n".join(prompts(held_out)[:names]).encode()).hexdigest(), variety=(names, count // names))


def prompts(held_out: bool) -> tuple[str, ...]:
    """The names; a protocol takes the first ones."""
    return tuple(e.name for e in shown(held_out))


def groups(held_out: bool) -> tuple[str, ...]:
    """The group of each name: faces, animals, food, flags, ..."""
    return tuple(e.group for e in shown(held_out))


@cache
def reference(held_out: bool) -> Mapping[str, Statistics]:
    """What the judge sees of OpenMoji's pictures, drawn for it."""
    features, _ = extract(Emoji(), data.pictures(shown(held_out)), BATCH)
    return {Emoji.name: Statistics(Moments.of(features), features)}


@cache
def _digest(held_out: bool) -> str:
    """Of the files that the pictures are drawn from, and of what draws them."""
    total = hashlib.sha256(f"resvg-py {importlib.metadata.version('resvg-py')}, {data.SIZE}".encode())
    for e in shown(held_out):
        total.update(hashlib.sha256((data.svg_folder() / f"{e.code}.svg").read_bytes()).digest())
    return total.hexdigest()
