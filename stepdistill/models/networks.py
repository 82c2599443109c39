"""Networks known by their config alone: built without weights, called without a pipeline. It is all that a plan of memory needs of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from stepdistill import worlds
from stepdistill.diffusion.process import Flow
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser, default_taps, keep_ends_float32
from stepdistill.models.load import NETWORKS, NOTES, SpaceToDepth, read_json, without_dropout
from stepdistill.models.wiring import FromClock, FromCondition, FromSample, FromScale, Layout, Static, Wiring, leaves_of

SHIPPED = worlds.FOLDER / "networks"
META = torch.device("meta")
INPUTS = ("state", "listed state", "time", "guidance")
FORMS = ("listed", "shared", "number")


@dataclass(frozen=True)
class NetworkSpec:
    """A diffusers network's config, and the arguments of one call of it.

    `arguments` nests as the call does. Its leaves are "state", "time", "guidance" (a number that the network embeds), "label" (a class),
    or the shape of one row of a condition, "tokens 768". "listed" before a state or a shape makes it a list with one tensor a sample,
    "shared" something without a batch axis (position ids), and "number" one length, given as it is. `state` is such a shape too.

    A length is a number or a name: a key of the config or of `sizes`, or `rows`, `columns`, `frames` and `cells` = frames · rows · columns
    of sizes `height` x `width` (pixels), one cell being `cell` pixels wide, and of `num_frames`, the first of which is alone in its cell
    and the others `frame_cell` in one; without them there is one frame. `frozen` counts the parameters of what else the pipeline holds:
    text encoders, a VAE. `codec` is how a network without a VAE sees pictures.
    """

    name: str
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    state: str
    arguments: Mapping[str, Any]
    frozen: Mapping[str, int] = field(default_factory=dict)
    codec: SpaceToDepth = field(default_factory=SpaceToDepth)

    @property
    def prompted(self) -> bool:
        """Whether its pipeline is recorded as a whole."""
        return self.config["_class_name"] not in NETWORKS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state."""
        return self.lengths(self.state)

    def at(self, call: Mapping[str, Any]) -> NetworkSpec:
        """The same network at the `height`, `width` (pixels) and `num_frames` among a pipeline's keywords."""
        given = {key: int(call[key]) for key in ("height", "width", "num_frames") if key in call and key in self.sizes}
        return replace(self, sizes={**self.sizes, **given})

    def lengths(self, shape: str) -> tuple[int, ...]:
        """Numbers for names; ValueError for a name that stands for none."""
        rows, columns = (self.sizes[side] // self.sizes["cell"] for side in ("height", "width"))
        frames = (self.sizes.get("num_frames", 1) - 1) // self.sizes.get("frame_cell", 1) + 1
        known = {**self.config, **self.sizes, "rows": rows, "columns": columns, "frames": frames, "cells": frames * rows * columns}
        form, lengths = _form(shape)
        words = lengths.split()
        if form == "number" and len(words) != 1:
            raise ValueError(f"network {self.name}: {shape!r} must be one number: write several as a list")
        if unknown := [word for word in words if not word.isdigit() and not isinstance(known.get(word), int)]:
            raise ValueError(f"network {self.name}: {unknown[0]!r} in the shape {shape!r} is no whole number of its config or its sizes")
        return tuple(int(word) if word.isdigit() else known[word] for word in words)

    def build(self) -> nn.Module:
        """The network on the meta device, frozen: shapes and no numbers. ValueError where diffusers cannot make it from its config."""
        cls = getattr(diffusers, self.config["_class_name"], None)
        if cls is None:
            raise ValueError(f"network {self.name}: diffusers {diffusers.__version__} has no {self.config['_class_name']}")
        try:
            with META:
                network: nn.Module = cls.from_config(dict(self.config))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"network {self.name} cannot be built from its config: {' '.join(str(error).split())[:200]}") from error
        return without_dropout(network).eval().requires_grad_(False)

    def denoiser(self, *, dtype: torch.dtype, guidance: float, autocast: torch.dtype | None, taps: tuple[str, ...] = ()) -> Denoiser:
        """The network on the meta device, called as `arguments` say. Its process is flow matching: that changes numbers, not bytes."""
        network = keep_ends_float32(nn.Module.to(self.build(), dtype))
        learned_variance = self.config.get("out_channels") == 2 * self.config.get("in_channels", 0)
        wiring = Wiring(self._wired(self.arguments), Layout("slice", (0,)) if learned_variance else Layout(), 1.0)
        return Denoiser(network, Flow(), "flow", guidance=guidance, autocast=autocast, taps=taps or default_taps(network), wiring=wiring)

    def _wired(self, tree: Any, path: str = "") -> Any:
        if isinstance(tree, Mapping):
            return {key: self._wired(value, f"{path}.{key}" if path else key) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self._wired(value, f"{path}.{i}") for i, value in enumerate(tree)]
        match _form(tree):
            case form, "state":
                return FromSample(Layout(), listed=form == "listed")
            case _, "time":
                return FromClock("1000sigma", 1.0, 0.0, ())
            case _, "guidance":
                return FromScale(1.0, 0.0, ())
            case "shared", _:
                return Static(torch.zeros(self.lengths(tree)))
            case "number", _:
                return Static(*self.lengths(tree))
        return FromCondition(path)

    def condition(self, batch: int, guided: bool) -> Conditioning:
        """A blank condition of `batch` samples; `guided` adds a null of the same shapes, unless the network embeds its guidance."""
        leaves = dict(leaves_of(self.arguments))
        kinds = {path: kind for path, kind in leaves.items() if kind not in INPUTS and _form(kind)[0] in ("", "listed")}

        def made() -> dict[str, Any]:
            return {path: self._blank(kind, batch) for path, kind in kinds.items()}

        return Conditioning(made(), made() if guided and kinds and "guidance" not in leaves.values() else None)

    def _blank(self, kind: str, batch: int) -> Tensor | tuple[Tensor, ...]:
        if kind == "label":
            return torch.zeros(batch, dtype=torch.long)
        rows = torch.zeros(batch, *self.lengths(kind))
        return rows.unbind() if _form(kind)[0] == "listed" else rows


def _form(kind: str) -> tuple[str, str]:
    """One of FORMS or nothing, and the rest."""
    form, _, rest = kind.partition(" ")
    return (form, rest) if form in FORMS else ("", kind)


def names() -> list[str]:
    """Short names of the networks whose configs are shipped."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def find(source: str) -> NetworkSpec:
    """A shipped network by its short name, or one from a JSON file.

    The file holds the fields of NetworkSpec, or is a diffusers config.json, whose arguments are then those of the shipped network that
    resembles it most. FileNotFoundError or ValueError with the remedy.
    """
    path = SHIPPED / f"{source}.json" if source in names() else Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no network {source!r}: give one of {', '.join(names())}, or the config.json of a diffusers network")
    tree = read_json(path)
    if "_class_name" in tree:
        return of_config(str(path), tree)
    try:
        spec = NetworkSpec(path.stem, **tree)
        kinds = [kind for _, kind in leaves_of({"state": spec.state, **spec.arguments})]
        for shape in (kind for kind in kinds if kind not in (*INPUTS, "label")):
            spec.lengths(shape)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} must hold config, sizes (height, width, cell), state and arguments, as {SHIPPED.name}/sd15.json does "
                         f"({error})") from error
    if "_class_name" not in spec.config:
        raise ValueError(f"{path}: its config lacks _class_name, the network's class in diffusers")
    return spec


def of_config(name: str, config: Mapping[str, Any], frozen: Mapping[str, int] | None = None) -> NetworkSpec:
    """A network of a diffusers config.json. ValueError for a class of which nothing is known."""
    cls, side = config["_class_name"], config.get("sample_size")
    if cls in NETWORKS:
        if side is None:
            raise ValueError(f"{name} has no sample_size: write the height and width of one state there")
        height, width = (side, side) if isinstance(side, int) else side
        labels = {"class_labels": "label"} if cls == "DiTTransformer2DModel" or config.get("num_class_embeds") else {}
        arguments = {"sample" if cls == "UNet2DModel" else "hidden_states": "state", "timestep": "time", **labels}
        sizes = {"height": height, "width": width, "cell": 1}
        return NetworkSpec(name, config, sizes, "in_channels rows columns", arguments, frozen or {})
    alike = [spec for spec in map(find, names()) if spec.config["_class_name"] == cls]
    if not alike:
        raise ValueError(f"{name}: how a {cls} is called is not known here. Give --network a JSON file with its config and arguments, as "
                         f"{SHIPPED.name}/sd15.json has them")
    nearest = max(alike, key=lambda spec: sum(config.get(key) == value for key, value in spec.config.items()))
    pixels = dict.fromkeys(("height", "width"), side * nearest.sizes["cell"]) if isinstance(side, int) else {}
    arguments = {key: kind for key, kind in nearest.arguments.items() if kind != "guidance" or config.get("guidance_embeds")}
    return replace(nearest, name=name, config=config, sizes={**nearest.sizes, **pixels}, arguments=arguments, frozen=frozen or {})


def of_folder(folder: Path) -> NetworkSpec:
    """The network of a diffusers folder, whose weights may be missing. FileNotFoundError or ValueError with the remedy."""
    inner = next((folder / part for part in ("unet", "transformer") if (folder / part / "config.json").is_file()), folder)
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no network's config: name one with --network ({', '.join(names())}, or its config.json)")
    index = folder / "model_index.json"
    parts = read_json(index) if index.is_file() else {"vae": ["diffusers", "AutoencoderKL"]}
    frozen = {part: count for part, entry in parts.items() if part != inner.name and isinstance(entry, list)
              and (count := _parameters(worlds.place_of(folder, part), *entry))}
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    codec = SpaceToDepth(int(notes.get("codec", {}).get("space_to_depth", 1)))
    return replace(of_config(str(folder), read_json(inner / "config.json"), frozen), codec=codec)


def _parameters(folder: Path, library: str | None, name: str | None) -> int:
    """Of a pipeline's component, from its config; 0 for one that is no network."""
    place = {"diffusers": diffusers, "transformers": transformers}.get(library or "") or getattr(diffusers.pipelines, library or "", None)
    cls: Any = getattr(place, name or "", None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and (folder / "config.json").is_file()):
        return 0
    make: Any = cls
    with META:
        ours = issubclass(cls, diffusers.ModelMixin)
        network = make.from_config(read_json(folder / "config.json")) if ours else make(make.config_class.from_pretrained(folder))
    return sum(parameter.numel() for parameter in network.parameters())
