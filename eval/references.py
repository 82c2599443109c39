"""Real pictures made into statistics once: moments of all of them, and features of those that kernels and neighbours look at.

A file holds them for each extractor and view of a protocol, and tells in its metadata which pictures they came from (a digest over the
files), which weights looked at them, and how they were cropped and resized. Published statistics (.npz with `mu` and `sigma`) are taken
over as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.eval.extractors import EXTRACTORS
from stepdistill.eval.measures import KINDS, fewest_real
from stepdistill.eval.metrics import Moments
from stepdistill.eval.pictures import Pictures, digest_of, files_in, real
from stepdistill.eval.protocol import Protocol
from stepdistill.eval.score import look
from stepdistill.eval.weights import digest

BLOCK = 2_000                                           # pictures whose features are held at a time
OF_MOMENTS = ("frechet", "fid", "fd", "patchfid")       # kinds of measures that read nothing else of real pictures


@dataclass(frozen=True)
class Statistics:
    """What an extractor saw: moments of all pictures, features (M, d) of some, and what those are called where they have names."""

    train: Moments
    test_features: Tensor
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A reference: statistics by `Measure.key`, the digest and number of the pictures that they came from."""

    real: Mapping[str, Statistics]
    sha256: str
    count: int


def keys_of(protocol: Protocol) -> tuple[str, ...]:
    """What a protocol looks at real pictures by: its first extractor, and all that a distance is measured on."""
    needed = (measure.key for measure in protocol.plan.values() if KINDS[measure.kind].real)
    return tuple(dict.fromkeys((protocol.extractor, *needed)))


def set_keys(protocol: Protocol) -> frozenset[str]:
    """Those of which a measure reads features of real pictures, and not their moments alone."""
    return frozenset(measure.key for measure in protocol.plan.values() if KINDS[measure.kind].real and measure.kind not in OF_MOMENTS)


def gather(seen: Pictures, protocol: Protocol, keep: int, device: torch.device | str = "cpu",
           names: Sequence[str] = ()) -> dict[str, Statistics]:
    """Statistics of pictures, by `keys_of`; features, and the names of whose they are, are kept of `keep` of them, evenly spaced."""
    keys = keys_of(protocol)
    judges: dict[str, Any] = {name: EXTRACTORS[name]() for name in dict.fromkeys(key.partition(".")[0] for key in keys)}
    judges = {name: judge.to(device) for name, judge in judges.items()}
    rows = spaced(seen.count, keep)
    moments: dict[str, Moments] = {}
    kept: dict[str, list[Tensor]] = {key: [] for key in keys}
    for start, block in _blocks(seen):
        answers = look(block, protocol, judges)
        mine = rows[(rows >= start) & (rows < start + block.count)] - start
        for key in keys:
            features = answers[key][0]
            moments[key] = moments[key] + Moments.of(features) if key in moments else Moments.of(features)
            kept[key].append(features[mine])
    named = tuple(names[row] for row in rows.tolist()) if names else ()
    return {key: Statistics(moments[key], torch.cat(kept[key]), named) for key in keys}


def spaced(count: int, keep: int) -> Tensor:
    """Rows of `keep` of `count` pictures, evenly spaced, (n,)."""
    keep = min(count, keep)
    return torch.arange(keep) * count // keep


def _blocks(seen: Pictures) -> Iterator[tuple[int, Pictures]]:
    for start in range(0, seen.count, BLOCK):
        yield start, seen.part(start, min(start + BLOCK, seen.count))


def make(source: Path, protocol: Protocol, to: Path, *, keep: int, count: int = 0, set_from: Path | None = None,
         device: torch.device | str = "cpu") -> Stored:
    """Write the reference of a protocol from a folder of real pictures (`files_in`, nested), or from published statistics, of `count`
    pictures, and read it.

    `set_from` is another source for the features that kernels and neighbours look at. Raises FileNotFoundError or ValueError where a source
    or `to` is unfit.
    """
    if to.suffix != ".safetensors" or to.is_dir():
        raise ValueError(f"{to} must name a .safetensors file")
    found, sha256, number = _of(source, protocol, keep, count, device)
    if set_from is not None:
        others, other, _ = _of(set_from, protocol, keep, count, device)
        found = {key: replace(others[key], train=statistics.train) if key in others else statistics for key, statistics in found.items()}
        sha256 = f"{sha256}+{other}"
    write(to, found, protocol, sha256, number)
    return read(to, protocol)


def _of(source: Path, protocol: Protocol, keep: int, count: int, device: torch.device | str) -> tuple[dict[str, Statistics], str, int]:
    if source.suffix == ".npz":
        return _published(source, protocol, keep, count, device)
    files = files_in(source, nested=True)
    names = [path.relative_to(source).as_posix() for path in files]
    return gather(real(files), protocol, keep, device, names), digest_of(files), len(files)


def _published(file: Path, protocol: Protocol, keep: int, count: int,
               device: torch.device | str) -> tuple[dict[str, Statistics], str, int]:
    """Of the first extractor, from `mu` and `sigma`; with features of the pictures `arr_0` (N, H, W, 3) where they are there, too."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: name published statistics, .npz, or a folder of pictures")
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays = {name: torch.from_numpy(opened[name]) for name in ("mu", "sigma", "arr_0") if name in opened}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): get it again") from error
    if not {"mu", "sigma"} <= set(arrays) or arrays["mu"].shape != (EXTRACTORS[protocol.extractor]().dim,):
        raise ValueError(f"{file} holds no mu and sigma of {protocol.extractor}: name statistics of that network, or a folder of pictures")
    number = count or len(arrays.get("arr_0", ()))
    found = Statistics(Moments.from_statistics(max(2, number), arrays["mu"], arrays["sigma"]), torch.zeros(0, len(arrays["mu"])))
    if "arr_0" in arrays:
        pictures = Pictures.of(arrays["arr_0"].movedim(-1, 1))
        names = [f"{file.name}[{i}]" for i in range(pictures.count)]
        found = replace(gather(pictures, protocol, keep, device, names)[protocol.extractor], train=found.train)
    return {protocol.extractor: found}, digest(file), number


def write(to: Path, found: Mapping[str, Statistics], protocol: Protocol, sha256: str, count: int, maker: str = "") -> None:
    """A reference file, in one move. `maker` is a digest of the model that made its pictures, if one did, and of how it was run."""
    tensors = {f"{key}/{name}": value for key, statistics in found.items() for name, value in (
        ("n", torch.tensor(statistics.train.n)), ("mean", statistics.train.mean), ("cov", statistics.train.cov),
        ("features", statistics.test_features), *(("names", _bytes(statistics.names)) for _ in statistics.names[:1]))}
    metadata = {"sha256": sha256, "count": str(count), "chain": _chain(protocol), "maker": maker,
                "extractors": json.dumps({key: protocol.extractors[key.partition(".")[0]] for key in found})}
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
    os.replace(temporary, to)


def _bytes(names: Sequence[str]) -> Tensor:
    """File names in one tensor: a safetensors header would not hold a million of them."""
    return torch.frombuffer(bytearray("\0".join(names).encode("utf-8", "surrogateescape")), dtype=torch.uint8)


def _names(kept: Tensor | None) -> tuple[str, ...]:
    """The inverse; none where a reference has none."""
    return () if kept is None else tuple(kept.numpy().tobytes().decode("utf-8", "replace").split("\0"))


def _chain(protocol: Protocol) -> str:
    return json.dumps([protocol.crop, protocol.metric_size, protocol.filter])


def kept(stored: Stored) -> dict[str, int]:
    """How many pictures each key keeps features of."""
    return {key: len(statistics.test_features) for key, statistics in stored.real.items()}


def maker_of(path: Path) -> str | None:
    """The digest that `write` was given; None where there is no such file that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("maker")
    except (OSError, SafetensorError):
        return None


def read(path: Path, protocol: Protocol) -> Stored:
    """A reference file. Raises FileNotFoundError where it is missing, and ValueError where it is damaged, was seen by other extractors or
    through another crop or filter, or lacks what the protocol looks at, or features of as many pictures as a measure needs."""
    again = f"make it again by `stepdistill reference SOURCE --protocol {protocol.name}`"
    if not path.is_file():
        raise FileNotFoundError(f"no reference {path}: {again}")
    try:
        with safe_open(path, "pt") as file:
            told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}                # noqa: SIM118
        extractors, chain, sha256, count = json.loads(told["extractors"]), told["chain"], told["sha256"], int(told["count"])
        found = {key: Statistics(Moments.from_statistics(int(tensors[f"{key}/n"]), tensors[f"{key}/mean"], tensors[f"{key}/cov"]),
                                 tensors[f"{key}/features"], _names(tensors.get(f"{key}/names"))) for key in extractors}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no reference ({error}): {again}") from error
    if chain != _chain(protocol):
        raise ValueError(f"{path} was made of pictures cropped and resized in another way ({chain}, the protocol has {_chain(protocol)}): "
                         f"{again}")
    for key, measures in ((key, [n for n, m in protocol.plan.items() if m.key == key and KINDS[m.kind].real]) for key in keys_of(protocol)):
        if key not in extractors and measures:
            raise ValueError(f"{path} knows nothing of {key}, which {measures[0]} is measured on: {again}")
        if key in extractors and extractors[key] != protocol.extractors[key.partition(".")[0]]:
            raise ValueError(f"{path} was made with other weights of the extractor {key} than those here: {again}")
        if key in extractors and not len(found[key].test_features) and (neighbours := _of_sets(protocol, measures)):
            raise ValueError(f"{path} holds moments alone, and {neighbours} looks at features: name pictures with --set-from")
        for name in measures if key in extractors else ():
            if (there := len(found[key].test_features)) < (least := fewest_real(protocol, protocol.plan[name].kind)):
                raise ValueError(f"{path} keeps features of {there} pictures, and {name} needs {least}: make it of more pictures, or "
                                 "with a larger --keep")
    return Stored(found, sha256, count)


def _of_sets(protocol: Protocol, measures: list[str]) -> str | None:
    """The first of some metrics that reads features of real pictures and not their moments."""
    return next((name for name in measures if protocol.plan[name].kind not in OF_MOMENTS), None)
