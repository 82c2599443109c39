"""Conditions and latents encoded once: safetensors shards in a folder, filled row by row, taken up again after a kill.

    index.json                                   which encoders, prompts and pictures it belongs to
    learnt.safetensors                           what the recording of the pipeline learnt, so that training runs it no more
    conditions.safetensors  latents.safetensors  the first row of all: what equals it everywhere is stored nowhere else
    conditions-FIRST-STOP.safetensors ...        the other rows, in shards that appear whole or not at all

A latent is a row with the one leaf x0. Every file is read lazily, a row at a time. Where a pipeline pads prompts of unequal length to the
longest of their batch, all are encoded beside the longest and the shortest one, so that any of them can be joined.

Several processes of one launch share the shards out, each a whole one at a time; which rows a shard has does not depend on them, so that
they leave the same files as one process would.

A run with buckets has such a folder for each size, HEIGHTxWIDTH, and beside them buckets.json, which says where each picture is.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import os
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stepdistill import worlds
from stepdistill.data.pictures import Picture, fitted, is_small, nearest, say_enlarged
from stepdistill.models.conditioning import Conditioning, Leaf
from stepdistill.models.kept import Kept, Learnt, pack, unpack
from stepdistill.models.load import Teacher, is_prompted, read_json
from stepdistill.models.prompted import LawCodec, PipelineCodec, open_pipeline
from stepdistill.models.quantize import QuantizeRecipe
from stepdistill.models.recorded import Recording
from stepdistill.models.wiring import Unrecordable, leaves_of, same

INDEX, LEARNT, LOCK, BUCKETS = "index.json", "learnt.safetensors", "lock", "buckets.json"
SHARD_BYTES = 2**28
X0 = "x0"


@dataclass(frozen=True)
class Wanted:
    """What one run reads: conditions of `texts`, the last of which are the captions of `pictures`, for a pipeline under `call`.

    `source` is where the pictures come from; `guidance` matters only to pipelines that embed it before they call their network.
    """

    pipeline: Path
    call: Mapping[str, Any]
    dtype: torch.dtype
    guidance: float
    texts: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    source: Path | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    quantize: QuantizeRecipe | None = None                 # of the network, which encodes nothing


@dataclass(frozen=True)
class Filled:
    """What a cache holds, and how many of its rows were encoded just now. `whole` says why training must load the encoders, if it must."""

    folder: str
    conditions: int
    latents: int
    encoded: int
    shards: int
    bytes: int
    whole: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Unequal(ValueError):
    """A row has another shape than the first."""


@dataclass(frozen=True)
class Rows:
    """`count` rows of one kind. A row is a Conditioning of one sample."""

    folder: Path
    kind: str
    count: int
    files: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        """The file of the first row."""
        return self.folder / f"{self.kind}.safetensors"

    def spans(self) -> list[tuple[int, int, Path]]:
        """(first row, one past the last, file) of the finished shards."""
        names = ((path, re.fullmatch(rf"{self.kind}-(\d+)-(\d+)\.safetensors", path.name)) for path in self.folder.iterdir())
        return sorted((int(found[1]), int(found[2]), path) for path, found in names if found)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of rows in no shard."""
        gaps, row = [], 0
        for first, stop, _ in self.spans():
            if first > row:
                gaps.append((row, first))
            row = max(row, stop)
        return [*gaps, *([(row, self.count)] if row < self.count else [])]

    def shards_of(self, limit: int) -> list[tuple[int, int]]:
        """The missing rows as shards of about `limit` bytes, cut at the same rows whatever is there already."""
        row = sum(v.nbytes for name, value in self.first.items() if name not in self.first.shared
                  for _, v in leaves_of(value) if isinstance(v, Tensor))
        each = max(1, limit // max(1, row))
        return [(max(first, at), min(stop, at + each)) for first, stop in self.missing()
                for at in range(first - first % each, stop, each)]

    def fill(self, encode: Callable[[int], Conditioning], limit: int) -> int:
        """Encode the missing rows into shards of about `limit` bytes, this process its share of them; how many rows all encoded.

        Returns when every process has done its share. Raises Unequal on all of them where a row has another shape than the first.
        """
        team = PartialState()
        if team.is_main_process and not self.path.exists():
            write(self.path, {}, lambda found: pack({"leaves": (first := encode(0)).leaves, "nulls": first.nulls,
                                                     "shared": sorted(first.shared)}, "first", found))
        team.wait_for_everyone()
        shards = self.shards_of(limit)
        team.wait_for_everyone()                                               # every process has looked before one writes
        mine, unequal = shards[team.process_index :: team.num_processes], None
        with tqdm(total=sum(b - a for a, b in mine), desc=f"cache {self.kind}", unit="row", file=sys.stderr, dynamic_ncols=True,
                  disable=not (mine and team.is_main_process)) as bar:
            try:
                for first, stop in mine:
                    self._write(first, [self._fitting(row, encode, bar) for row in range(first, stop)])
            except Unequal as error:
                unequal = str(error)
        for message in filter(None, gather_object([unequal])):
            raise Unequal(message)
        return sum(b - a for a, b in shards)

    def _fitting(self, row: int, encode: Callable[[int], Conditioning], bar: Any) -> Conditioning:
        cond = encode(row).to("cpu")
        if not joined(self.first, cond):
            raise Unequal(f"{self.kind} {row} cannot be put into one batch with the first; leave data.cache out")
        bar.update()
        return cond

    def clear(self) -> None:
        """Delete every file, the first row's last."""
        for path in (*(path for *_, path in self.spans()), self.path):
            path.unlink(missing_ok=True)
        self.__dict__.pop("first", None)

    def _own(self, cond: Conditioning) -> set[str]:
        """The leaves that differ from the first row's."""
        nulls, first = {**(self.first.nulls or {}), **(cond.nulls or {})}, self.first
        return ({f"cond/{name}" for name in first if not same(cond[name], first[name])}
                | {f"null/{name}" for name in nulls if name not in (first.nulls or {}) or not same(cond.null[name], first.null[name])})

    def _write(self, first: int, rows: Sequence[Conditioning]) -> None:
        """A shard with what these rows have of their own: stacked, or one by one where a leaf is a tuple."""
        names = set[str]().union(*map(self._own, rows))
        path = self.folder / f"{self.kind}-{first:08d}-{first + len(rows):08d}.safetensors"
        values = {name: [leaf(cond, name) for cond in rows] for name in sorted(names)}
        write(path, {name: torch.cat(rows) for name, rows in values.items() if isinstance(rows[0], Tensor)},
              lambda found: {name: [pack(v, f"{name}/{i}", found) for i, v in enumerate(rows)]
                             for name, rows in values.items() if not isinstance(rows[0], Tensor)})

    @functools.cached_property
    def first(self) -> Conditioning:
        """The first row, whole."""
        with opened(self.path) as file:
            kept = unpack(json.loads(file.metadata()["plain"]), file.get_tensor)
        return Conditioning(kept["leaves"], kept["nulls"], frozenset(kept["shared"]))

    @functools.cached_property
    def shards(self) -> list[tuple[int, int, Path]]:
        """The spans, once they are all there."""
        return self.spans()

    def slice(self, rows: Tensor) -> Conditioning:
        """The condition of some rows (B,), read from the disk."""
        return Conditioning.stack([self._row(row) for row in rows.tolist()])

    def _row(self, row: int) -> Conditioning:
        start, _, path = self.shards[bisect_right(self.shards, row, key=lambda span: span[0]) - 1]
        if path not in self.files:
            file = opened(path)
            self.files[path] = file, set(file.keys()), json.loads(file.metadata()["plain"])
        file, names, listed = self.files[path]
        at = row - start
        own = {name: file.get_slice(name)[at : at + 1] for name in names if name.count("/") == 1}
        own |= {name: unpack(values[at], file.get_tensor) for name, values in listed.items()}
        part = lambda kind, before: {**before, **{n[5:]: v for n, v in own.items() if n.startswith(kind)}}           # noqa: E731
        nulls = self.first.nulls
        return Conditioning(part("cond/", self.first.leaves), None if nulls is None else part("null/", nulls), self.first.shared)


def leaf(cond: Conditioning, name: str) -> Leaf:
    """The leaf cond/NAME or null/NAME."""
    kind, _, key = name.partition("/")
    return (cond if kind == "cond" else cond.null)[key]


def joined(a: Conditioning, b: Conditioning) -> bool:
    """Whether both fit into one batch, their null conditions too."""
    return a.joins(b) and (a.nulls is None) == (b.nulls is None) and (a.nulls is None or a.null.joins(b.null))


@dataclass(frozen=True)
class Latents:
    """Cached states of pictures and the numbers of their captions."""

    rows: Rows
    labels: Tensor

    def states(self, rows: Tensor, teacher: Teacher) -> Tensor:
        """Some of them, on the teacher's device."""
        x0: Leaf = self.rows.slice(rows)[X0]
        return x0.to(teacher.device)


class Cache:
    """One folder for one run's conditions and latents. Raises ValueError where it was made of something else.

    `limit` is the size of a shard in bytes.
    """

    def __init__(self, folder: Path, wanted: Wanted, limit: int = SHARD_BYTES):
        if not is_prompted(wanted.pipeline):
            raise ValueError(f"data.cache is for pipelines that take prompts, and {wanted.pipeline} takes none: leave it out")
        if not wanted.texts:
            raise ValueError(f"{wanted.pipeline} is a pipeline that takes prompts: name a file of them, one per line, with data.prompts")
        self.folder, self.wanted, self.limit = folder, wanted, limit
        self.conditions = Rows(folder, "conditions", len(wanted.texts))
        self.latents = Rows(folder, "latents", len(wanted.pictures))
        self._files: dict[str, str | None] = {}                                # digests of gigabytes, made once
        self._check()

    def _check(self) -> None:
        """Compare the index with what is wanted. A part whose files are gone is not compared: nothing there can be encoded again."""
        index = read_json(self.folder / INDEX) if (self.folder / INDEX).is_file() else {}
        if not {"network", "baked", "parts"} <= set(index):
            strangers = (p for p in self.folder.glob("*") if p.name[0] != "." and p.name != LOCK)    # what a kill may leave is none
            if self.folder.exists() and (not self.folder.is_dir() or any(strangers)):
                raise ValueError(f"data.cache {self.folder} holds something else: name a new folder")
            return
        now = self._identity(index["network"], index["baked"])
        if differing := [name for name, value in now.items() if value and index["parts"].get(name, value) != value]:
            raise ValueError(f"data.cache {self.folder} was made with another {', '.join(differing)}: name a new folder, or delete this "
                             "one to encode again")

    def _identity(self, network: str, baked: bool) -> dict[str, str | None]:
        """The digest of everything that rows depend on, by name. Of the network only its configuration: its weights encode nothing."""
        wanted, folder = self.wanted, self.wanted.pipeline
        entries = read_json(folder / "model_index.json")
        parts: dict[str, str | None] = {"pipeline": digest(entries.get("_class_name"))}
        for name, entry in entries.items():
            if isinstance(entry, list) and entry[0] is not None and not name.startswith("_"):
                if name not in self._files:
                    kinds = "*.json" if name in (network, f"{network}_2", "scheduler") else "*"
                    with suppress(FileNotFoundError):                          # a package that is gone is not compared either
                        self._files[name] = files_digest(worlds.place_of(folder, name), kinds)
                parts[name] = self._files.get(name)
        parts |= {"call": digest(wanted.call), "dtype": digest(str(wanted.dtype)), "prompts": digest(wanted.texts)}
        parts["loras"] = digest([(scale, file_digest(Path(path))) for path, scale in wanted.loras.items()])
        if baked:
            parts["guidance"] = digest(wanted.guidance)
        if wanted.pictures and wanted.source is not None:
            parts["pictures"] = digest(sizes(wanted.source))
        return parts

    @property
    def complete(self) -> bool:
        """Whether nothing is left to encode."""
        tables = (self.conditions, self.latents) if self.wanted.pictures else (self.conditions,)
        return (self.folder / LEARNT).is_file() and all(t.path.exists() and not t.missing() for t in tables)

    def fill(self, device: torch.device | str) -> Filled:
        """Load the pipeline and encode what is missing; where nothing is, load nothing. What a kill interrupts goes on the next time.

        Every process of a launch must call it, and encodes on its own device.
        """
        team, encoded, complete = PartialState(), 0, self.complete
        team.wait_for_everyone()                                               # every process has looked before one writes
        if not complete:
            with locked(self.folder) if team.is_main_process else nullcontext():
                if team.is_main_process:
                    for partial in self.folder.glob(".*.partial"):
                        partial.unlink()
                    self._check()
                encoded = self._encode(device, team)
            gc.collect()                                                       # modules hold cycles: the encoders leave memory now
        shards = [path for table in (self.conditions, self.latents) for *_, path in table.spans()]
        held = sum(path.stat().st_size for path in self.folder.iterdir())
        return Filled(str(self.folder), self.conditions.count, self.latents.count, encoded, len(shards), held, self._learnt()[1])

    def _encode(self, device: torch.device | str, team: PartialState) -> int:
        wanted = self.wanted
        recording, inputs = open_pipeline(wanted.pipeline, wanted.call, device=device, dtype=wanted.dtype, loras=wanted.loras,
                                          quantize=wanted.quantize)
        codec = PipelineCodec(recording, inputs)
        baked = recording.keyword is not None and recording.offset is None and not recording.wiring.embeds
        index = read_json(self.folder / INDEX) if (self.folder / INDEX).is_file() else {"beside": [], "parts": {}}
        if team.is_main_process:
            parts = {**index["parts"], **self._identity(recording.component, baked)}
            index |= {"network": recording.component, "baked": baked, "parts": parts}
            write_text(self.folder / INDEX, json.dumps(index, indent=1))
            if not (self.folder / LEARNT).is_file():
                _write_learnt(self.folder / LEARNT, recording, codec)

        def one(text: str) -> Conditioning:
            texts = [text, *index["beside"]]
            return recording.encode(inputs(texts), len(texts), wanted.guidance).slice(slice(0, 1))

        conditions = functools.partial(self.conditions.fill, lambda row: one(wanted.texts[row]), self.limit)
        try:
            encoded = conditions()
        except Unequal:
            if index["beside"]:
                raise
            index["beside"] = _ends(one, wanted.texts)
            self.conditions.clear()
            team.wait_for_everyone()                                           # or a late one would clear away what is new
            if team.is_main_process:
                write_text(self.folder / INDEX, json.dumps(index, indent=1))
            encoded = conditions()
        if wanted.pictures:
            channels, height, width = codec.decode(torch.zeros(1, *recording.shape, device=device)).shape[1:]
            small: list[Picture] = []

            @torch.no_grad()
            def latent(row: int) -> Conditioning:
                image = wanted.pictures[row].image(channels)
                small.extend([wanted.pictures[row]] * is_small(image, (height, width)))
                return Conditioning({X0: codec.encode(fitted(image, (height, width))[None].to(device).float() / 127.5 - 1)})

            encoded += self.latents.fill(latent, self.limit)
            say_enlarged(small, len(wanted.pictures), (height, width))
        return encoded

    def _learnt(self) -> tuple[Learnt | None, str | None]:
        """(what training needs instead of the encoders, or None and why it needs them)."""
        with opened(self.folder / LEARNT) as file:
            plain = json.loads(file.metadata()["plain"])
            if "whole" in plain:
                return None, plain["whole"]
            return Learnt(plain, {name: file.get_tensor(name) for name in file.keys()}), None      # noqa: SIM118

    def kept(self) -> Kept:
        """The conditions and what was learnt, for `load_teacher`; a line on standard error where the encoders are needed all the same."""
        learnt, whole = self._learnt()
        if whole:
            tqdm.write(f"{self.wanted.pipeline} is loaded with its encoders, in spite of data.cache: {whole}", file=sys.stderr)
        return Kept(self.conditions, learnt)

    def states(self) -> Latents | None:
        """The latents; None where no pictures are wanted."""
        count = len(self.wanted.pictures)
        return Latents(self.latents, len(self.wanted.texts) - count + torch.arange(count)) if count else None


def fill_all(caches: Sequence[Cache], device: torch.device | str) -> Filled | None:
    """Fill the caches of one run, one for each size of picture, and add up what they hold; None where there are none."""
    filled = [cache.fill(device) for cache in caches]
    sums = {name: sum(getattr(one, name) for one in filled) for name in ("conditions", "latents", "encoded", "shards", "bytes")}
    return replace(filled[0], folder=str(caches[0].folder if len(caches) == 1 else caches[0].folder.parent), **sums) if filled else None


def divided(pictures: Sequence[Picture], buckets: Sequence[tuple[int, int]], source: Path | None, folder: Path | None) -> Sequence[int]:
    """The number of each picture's bucket; kept in `folder`, the cache, if there is one: to learn a picture's size it must be opened."""
    if not pictures or source is None:
        return ()
    made_of = digest([sizes(source), list(map(list, buckets))])
    kept = folder / BUCKETS if folder else None
    if kept and kept.is_file() and (found := read_json(kept)).get("of") == made_of:
        return [int(number) for number in found["buckets"]]
    placed = [nearest(p.size, buckets) for p in tqdm(pictures, desc="measure pictures", unit="picture", file=sys.stderr, dynamic_ncols=True,
                                                     disable=not PartialState().is_main_process)]
    if PartialState().is_main_process:
        counts = Counter(placed)
        tqdm.write("pictures by size: " + ", ".join(f"{h}x{w} {counts[i] or 'none'}" for i, (h, w) in enumerate(buckets)), file=sys.stderr)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps({"of": made_of, "buckets": placed}))
    return placed


def _ends(encode: Callable[[str], Conditioning], texts: Sequence[str]) -> list[str]:
    """The prompt with the longest condition and that with the shortest. A pipeline that pads prompts only beside each other pads every
    prompt to the same length, and masks it the same way, beside these two."""
    def size(text: str) -> int:
        return sum(v.numel() for _, v in leaves_of(encode(text).leaves) if isinstance(v, Tensor))

    found = [size(text) for text in tqdm(texts, desc="measure prompts", unit="prompt", file=sys.stderr, dynamic_ncols=True)]
    return [texts[found.index(max(found))], texts[found.index(min(found))]]


def _write_learnt(path: Path, recording: Recording, codec: PipelineCodec) -> None:
    try:
        learnt = Learnt.of(recording, LawCodec.of(codec).law)
    except Unrecordable as error:
        reason = {"whole": str(error)}
        write(path, {}, lambda found: reason)
    else:
        write(path, learnt.tensors, lambda found: learnt.plain)


def write(path: Path, tensors: Mapping[str, Tensor], plain: Callable[[dict[str, Tensor]], Any]) -> None:
    """A safetensors file in one move; `plain` gives JSON values for its header, and may add tensors."""
    found = dict(tensors)
    header = json.dumps(plain(found))
    partial = path.with_name(f".{path.name}.partial")
    save_file(found, partial, metadata={"plain": header})
    _move(partial, path)


def write_text(path: Path, text: str) -> None:
    """A text file in one move."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _move(partial, path)


def _move(partial: Path, path: Path) -> None:
    _fsync(partial)
    os.replace(partial, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def opened(path: Path, made_by: str = "cache") -> Any:
    """A safetensors file, lazily; ValueError where it is damaged, naming the command that makes it."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"data.{made_by}: {path} is damaged or gone ({error}); delete it and run `stepdistill {made_by}` again") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer, or one launch of them, per folder; the lock ends with its process. ValueError where another one writes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being filled by another process: wait until it is done") from error
        yield


def digest(value: Any) -> str:
    """BLAKE2b of plain JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def files_digest(folder: Path, pattern: str) -> str | None:
    """BLAKE2b of the names and contents of the matching files below a folder; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return digest({str(path.relative_to(folder)): file_digest(path) for path in sorted(p for p in folder.rglob(pattern) if p.is_file())})


def file_digest(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every file below a folder, or of one file: what tells one set of pictures from another without reading it."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)) if path.is_dir() else p.name: p.stat().st_size for p in files}
