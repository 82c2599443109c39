"""Where the weights of the extractors are looked for, and how a public file becomes safetensors. Nothing is ever downloaded.

A public file is a pickle, or an archive with code in it. So its SHA-256 is compared with the published one before it is opened, it is
opened once, and what is kept is safetensors whose metadata name the file and its digest. `stepdistill weights convert` does that. Each
network has a folder in $STEPDISTILL_EVAL_WEIGHTS (else ~/.cache/stepdistill/eval); one that was laid there by hand serves as well:

    model.safetensors       tensors under the names of transformers' published checkpoints; Inception's under torch-fidelity's
    config.json             of a network of transformers
    vocab.json merges.txt   of a CLIP that is to read prompts
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stepdistill.eval.networks import CONFIG, LAYOUTS, WEIGHTS

ENVIRONMENT = "STEPDISTILL_EVAL_WEIGHTS"
VOCABULARY = ("vocab.json", "merges.txt")
PROBE = ("a photo of a cat", (49406, 320, 1125, 539, 320, 2368, 49407))          # in CLIP's own vocabulary


@dataclass(frozen=True)
class Known:
    """Public weights: their name here, the file, its SHA-256 (None: not known for certain), its address, who reads it and what for.

    `layout` is a key of `stepdistill.eval.networks.LAYOUTS`; `begins` are the first digits of the SHA-256 where no more are published.
    """

    name: str
    file: str
    sha256: str | None
    origin: str
    serves: str
    layout: str
    begins: str = ""

    @property
    def described(self) -> str:
        """File, digest and address, each said once."""
        if self.sha256 is None:
            told = f" (SHA-256 {self.begins}...)" if self.begins else " (no SHA-256 is known for certain)"
        else:
            told = "" if self.sha256 in self.origin else f" (SHA-256 {self.sha256})"
        return f"{self.file}{told} from {self.origin}"

    @property
    def vouched(self) -> bool:
        """Whether anything is published that a file can be compared with."""
        return self.sha256 is not None or bool(self.begins)

    def is_file(self, found: str) -> bool:
        """Whether a digest is the published file's."""
        return found == self.sha256 or bool(self.begins and found.startswith(self.begins))


def _openai(name: str, file: str, sha256: str, serves: str) -> Known:
    return Known(name, file, sha256, f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}", serves, "openai")


def _dinov2(name: str, network: str, sha256: str, serves: str) -> Known:
    file = f"{network}_pretrain.pth"
    return Known(name, file, sha256, f"https://dl.fbaipublicfiles.com/dinov2/{network}/{file}", serves, "dinov2")


# OpenAI's digests stand in its addresses, the beginning of Inception's in its file name. The rest of that one, and DINOv2's, are what
# several independent projects recorded of the published files.
KNOWN = {entry.name: entry for entry in (
    Known("inception-2015-12-05", "weights-inception-2015-12-05-6726825d.pth",
          "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
          "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
          "inception-tf, inception-clean: Frechet and kernel distance, inception score", "inception"),
    _dinov2("dinov2-l14", "dinov2_vitl14", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
            "dinov2-l14: Frechet and kernel distance, variety"),
    _dinov2("dinov2-s14", "dinov2_vits14", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
            "dinov2-s14: the same at a tenth of the cost, beside no paper's table"),
    _openai("clip-b32", "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "clip-b32: CLIP score"),
    _openai("clip-l14", "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "clip-l14: CLIP score"),
    _openai("clip-l14-336", "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "clip-l14-336: CMMD"),
    Known("clip-g14", "open_clip_pytorch_model.bin", None, "https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
          "clip-g14: CLIP score beside DMD2's tables", "open_clip"),
    Known("alexnet", "alexnet-owt-7be5be79.pth", None, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
          "alexnet: LPIPS, variety within prompts", "alexnet", "7be5be79"),
)}


def known(name: str) -> Known:
    """The entry of that name; ValueError naming the nearest one."""
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
        raise ValueError(f"no weights {name!r}: did you mean {near!r}? There are {', '.join(KNOWN)}")
    return KNOWN[name]


def root() -> Path:
    """The folder that weights are looked for in."""
    named = os.environ.get(ENVIRONMENT)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "stepdistill" / "eval"


def find(name: str) -> Path:
    """The folder of converted weights; FileNotFoundError saying what to get, from where, how to convert it and where it is looked for."""
    entry, folder = known(name), root() / name
    if not all((folder / file).is_file() for file in LAYOUTS[entry.layout].files):
        raise FileNotFoundError(f"no weights in {folder}: get {entry.described} and run `stepdistill weights convert {name} FILE`; "
                                f"{ENVIRONMENT} names another folder than {folder.parent}")
    return folder


def network(name: str) -> tuple[Any, str]:
    """The network (an nn.Module, frozen, float32, in evaluation mode, on the CPU) and the fingerprint of its weights.

    FileNotFoundError for missing weights, ValueError for damaged ones, with the remedy.
    """
    folder = find(name)
    return _built(known(name), folder), fingerprint(folder / WEIGHTS)


def tokenizer(name: str) -> Any:
    """transformers' CLIPTokenizer of a CLIP. FileNotFoundError where its vocabulary is missing, ValueError where it is not CLIP's own."""
    from transformers import CLIPTokenizer

    folder = find(name)
    remedy = f"copy {' and '.join(VOCABULARY)} there from the tokenizer folder of any Stable Diffusion pipeline"
    if not all((folder / file).is_file() for file in VOCABULARY):
        raise FileNotFoundError(f"{folder} has no vocabulary, without which no prompt can be read: {remedy}")
    made = CLIPTokenizer(*(str(folder / file) for file in VOCABULARY))
    text, tokens = PROBE
    if tuple(made(text).input_ids) != tokens:
        raise ValueError(f"the vocabulary in {folder} is not CLIP's: {remedy}")
    return made


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fingerprint(file: Path) -> str:
    """SHA-256 over names, shapes and float32 values of the floating-point tensors of a safetensors file, in the order of their names.

    Every weight that differs changes it; the precision they are stored in, and how they came into the file, does not.
    """
    total = hashlib.sha256()
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point():
                total.update(f"{name} {tuple(tensor.shape)}\n".encode())
                total.update(tensor.float().flatten().numpy())
    return total.hexdigest()


def listing() -> list[dict[str, Any]]:
    """A row for each known network, in plain JSON values: the fields of `Known`, its folder, and its state.

    "checked" weights were converted from the public file of the known digest; for "unchecked" ones nobody but the user vouches.
    """
    rows: list[dict[str, Any]] = []
    for entry in KNOWN.values():
        try:
            folder = find(entry.name)
        except FileNotFoundError:
            state = "missing"
        else:
            state = "checked" if entry.is_file(_source(folder) or "") else "unchecked"
        rows.append({"name": entry.name, "state": state, "folder": str(root() / entry.name), "file": entry.file, "sha256": entry.sha256,
                     "origin": entry.origin, "serves": entry.serves})
    return rows


def _source(folder: Path) -> str | None:
    """The digest of the public file, as the metadata state it."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            return (opened.metadata() or {}).get("source_sha256")
    except SafetensorError:
        return None


def convert(name: str, source: Path, to: Path | None = None, *, vocabulary: Path | None = None, unchecked: bool = False) -> Path:
    """Turn a public file into the folder NAME in `to` (default: where weights are looked for), in one move; returns that folder.

    `vocabulary` is a folder with vocab.json and merges.txt, which a CLIP needs to read prompts. `unchecked` accepts a file whose SHA-256
    is not known for certain; where it is known, no other file is opened. Raises FileNotFoundError or ValueError with the remedy.
    """
    from stepdistill.export import in_one_move

    entry, target = known(name), (root() if to is None else to.expanduser()) / name
    layout = LAYOUTS[entry.layout]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: delete it to convert again")
    if vocabulary is not None and not layout.reads_prompts:
        raise ValueError(f"{name} reads no prompts: leave the vocabulary out")
    if vocabulary is not None and (lacks := [file for file in VOCABULARY if not (vocabulary / file).is_file()]):
        raise FileNotFoundError(f"{vocabulary} has no {lacks[0]}: name the tokenizer folder of a Stable Diffusion pipeline")
    found = _checked(entry, source, unchecked)
    try:
        tensors, config = layout.translate(layout.read(source))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source} does not hold what {entry.file} does ({_line(error)}): get {entry.described}") from error
    with in_one_move(target) as folder:
        save_file({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}, folder / WEIGHTS,
                  metadata={"format": "pt", "source": entry.file, "source_sha256": found})
        del tensors
        if config is not None:
            (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        if vocabulary is not None:
            for file in VOCABULARY:
                shutil.copyfile(vocabulary / file, folder / file)
        _built(entry, folder)                           # what does not load never takes its place
    return target


def _checked(entry: Known, source: Path, unchecked: bool) -> str:
    """The digest of a file that may be opened."""
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}: get {entry.described}")
    found = digest(source)
    if not entry.vouched and not unchecked:
        raise ValueError(f"no SHA-256 of {entry.file} is known for certain, so nothing vouches for {source} (it has {found}): add "
                         "--unchecked if you trust where it came from")
    if entry.vouched and unchecked:
        raise ValueError(f"the SHA-256 of {entry.file} is known and always compared: leave --unchecked out")
    if entry.vouched and not entry.is_file(found):
        raise ValueError(f"{source} is another file (its SHA-256 begins with {found[:16]}) and was not opened: get {entry.described}")
    return found


def _built(entry: Known, folder: Path) -> Any:
    try:
        net = LAYOUTS[entry.layout].build(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded ({_line(error)}): delete that folder, get {entry.described} and run "
                         f"`stepdistill weights convert {entry.name} FILE`") from error
    return net.requires_grad_(False).eval()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
