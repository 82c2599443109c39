"""A folder on disk -> Teacher: denoiser, state shape, conditioner and codec. Class-conditional and unconditional image models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.nn import functional

from stepdistill import worlds
from stepdistill.diffusion.process import Flow, NoiseProcess, TableVP
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser, default_taps, keep_ends_float32
from stepdistill.models.experts import Experts
from stepdistill.models.inputs import ToldDiTTransformer2DModel, ToldUNet2DModel
from stepdistill.models.quantize import QuantizeRecipe, config_of, network_among, requantized
from stepdistill.models.weights import fuse

if TYPE_CHECKING:
    from stepdistill.models.kept import Kept

NOTES = "stepdistill.json"                              # what a diffusers folder cannot say: codec, null class, labels, licence
NETWORKS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (UNet2DModel, DiTTransformer2DModel, ToldUNet2DModel,
                                                                     ToldDiTTransformer2DModel)}
AT_ONCE = 16                                            # pictures that an autoencoder is given
KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class Codec(Protocol):
    """Between pictures in [-1, 1], (B, C, H, W), and the states the network is fed."""

    @property
    def latent(self) -> bool: ...                       # whether states are something else than the pictures' own pixels

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, x0: Tensor) -> Tensor: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SpaceToDepth:
    """Lossless: factor x factor pixels become channels; factor 1 is plain pixels."""

    factor: int = 1
    latent: ClassVar[bool] = False

    def encode(self, images: Tensor) -> Tensor:
        return functional.pixel_unshuffle(images, self.factor)

    def decode(self, x0: Tensor) -> Tensor:
        return functional.pixel_shuffle(x0, self.factor)

    def to_dict(self) -> dict[str, Any]:
        return {"space_to_depth": self.factor}


@dataclass(frozen=True)
class Vae:
    """Latents of an AutoencoderKL, shifted and scaled as its config says; encoding takes the mode."""

    model: AutoencoderKL
    latent: ClassVar[bool] = True

    def encode(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images.to(self.model.dtype)).latent_dist.mode().float()
        return (latents - (self.model.config.shift_factor or 0.0)) * self.model.config.scaling_factor

    def decode(self, x0: Tensor) -> Tensor:
        latents = x0 / self.model.config.scaling_factor + (self.model.config.shift_factor or 0.0)
        return self.model.decode(latents.to(self.model.dtype)).sample.float()

    def to_dict(self) -> dict[str, Any]:
        return {"vae": True}


ROOM = 4                                                # networks in the pipeline of a class-conditional student


@dataclass(frozen=True)
class Teacher:
    """A diffusion model ready to be distilled, and what an export must carry over from it."""

    denoiser: Denoiser
    shape: tuple[int, ...]                              # of one state
    classes: int                                        # 0: unconditional
    null_class: int | None
    codec: Codec
    folder: Path
    scheduler: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.notes.get("labels") or map(str, range(self.classes)))

    @property
    def call(self) -> dict[str, Any]:
        """What a student's own pipeline must be called with besides its steps; guidance, where that pipeline would guide by default."""
        return {}

    @property
    def component(self) -> str:
        """The network's name in its folder."""
        return next((name for name in ("unet", "transformer") if (self.folder / name).is_dir()), "unet")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.network.parameters()).device

    def check_room(self, count: int) -> None:
        """ValueError where the pipeline that a student leaves in has no place for so many networks."""
        if count > ROOM:
            raise ValueError(f"the student is {count} networks, and its pipeline holds {ROOM}: train one with fewer method.phases, or with "
                             "method.experts=false")

    def condition(self, labels: Tensor) -> Conditioning:
        """Labels (B,) int64 to a condition; the null class travels with it where the teacher was trained with one."""
        labels = labels.to(self.device)
        if not self.classes:
            return Conditioning()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"labels must lie in 0..{self.classes - 1}, got {int(labels.min())}..{int(labels.max())}")
        null = None if self.null_class is None else {"class_labels": torch.full_like(labels, self.null_class)}
        return Conditioning({"class_labels": labels}, null)

    def example(self) -> tuple[Tensor, Tensor, Conditioning]:
        """One (x_t, t, cond) of the right shapes."""
        x = torch.zeros(1, *self.shape, device=self.device, dtype=self.denoiser.dtype)
        return x, torch.full((1,), 0.5, dtype=torch.float64, device=self.device), self.condition(torch.zeros(1, dtype=torch.long))

    def pictures(self, x0: Tensor) -> Tensor:
        """States to uint8 pictures, rounded to nearest (evaluation protocol "round")."""
        return ((self.codec.decode(x0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor | None:
        """Latents (N, *shape) of uint8 pictures (N, C, H, W), on the CPU; None of a model of pixels, and of one of videos."""
        if not self.codec.latent or len(self.shape) != 3:
            return None
        return torch.cat([self.codec.encode(part.to(self.device).float() / 127.5 - 1).float().cpu() for part in pictures.split(AT_ONCE)])


def process_of(scheduler: Mapping[str, Any]) -> tuple[NoiseProcess, str, str]:
    """(process, prediction kind, clock) of a diffusers scheduler's config. Raises ValueError where it says nothing we know."""
    name = scheduler.get("_class_name", "")
    if name.startswith("FlowMatch"):
        return Flow(scheduler.get("shift", 1.0)), "flow", "1000sigma"
    kind = KINDS.get(scheduler.get("prediction_type", "epsilon"))
    cls = getattr(diffusers, name, None)
    if cls is None or kind is None or "beta_schedule" not in scheduler:
        raise ValueError(f"scheduler {name or 'without _class_name'} with prediction_type {scheduler.get('prediction_type')!r} is neither "
                         "a DDPM table nor a flow-matching scheduler that this version can read")
    table = diffusers.DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod
    if kind == "eps" and table[-1] == 0:
        raise ValueError("a table that ends in pure noise (zero terminal SNR) needs prediction_type v_prediction or sample: there, epsilon "
                         "says nothing about x0")
    return TableVP(table), kind, "index"


def first_order(scheduler: Any) -> tuple[Any, NoiseProcess, str, str]:
    """(a one-step scheduler in the network's own frame, process, prediction kind, the clock its times count) for a pipeline's scheduler.

    Multistep and ancestral schedulers, and those that rescale their states (Euler on a DDPM table), are samplers: the teacher is the same
    model under DDIM (unclipped) or FlowMatchEuler. Raises ValueError for a scheduler without a known prediction type.
    """
    config = dict(scheduler.config)
    if type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return scheduler, Flow(shift), "flow", "1000alpha" if config.get("invert_sigmas") else "1000sigma"
        plain = FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=shift)
        return plain, Flow(shift), "flow", "1000sigma"
    table, kind = getattr(scheduler, "alphas_cumprod", None), KINDS.get(config.get("prediction_type", "epsilon"))
    if table is None or kind is None:
        raise ValueError(f"scheduler {type(scheduler).__name__} with prediction_type {config.get('prediction_type')!r} is neither "
                         "a DDPM table nor flow matching, so its noise process is unknown")
    cls = CogVideoXDDIMScheduler if isinstance(scheduler, CogVideoXDDIMScheduler | CogVideoXDPMScheduler) else DDIMScheduler
    # linspace is not for DDIM, whose steps would not end where the next begins; a learned variance is not for it either
    spacing = "trailing" if config.get("timestep_spacing") == "linspace" else config.get("timestep_spacing", "leading")
    plain = cls.from_config({**config, "variance_type": "fixed_small"}, clip_sample=False, thresholding=False, timestep_spacing=spacing)
    return plain, TableVP(table), kind, "index"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file where it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def load_network(folder: Path) -> nn.Module:
    """A diffusers network from safetensors, strictly, as float32. Raises FileNotFoundError or ValueError with the remedy."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no network: config.json is missing")
    name = read_json(config).get("_class_name")
    if name not in NETWORKS:
        raise ValueError(f"{config} names the network {name!r}; this version distils UNet2DModel, DiTTransformer2DModel")
    return without_dropout(read_weights(NETWORKS[name], folder).float().eval().requires_grad_(False))


def read_weights(cls: Any, folder: Path) -> Any:
    """A diffusers network of this class from safetensors, strictly, as float32. FileNotFoundError or ValueError with the remedy."""
    weights = sorted(folder.glob("diffusion_pytorch_model*.safetensors*"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no diffusion_pytorch_model*.safetensors; pickled weights are not read: "
                                "save the model again with safe_serialization=True")
    variant = "fp16" if all(".fp16." in w.name for w in weights) else None
    try:
        loaded, report = cls.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False)
    except Exception as error:
        raise ValueError(f"the weights in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    wrong = {k: v for k, v in report.items() if v}
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config: " + "; ".join(f"{k}: {str(v)[:200]}" for k, v in wrong.items()))
    return loaded


def without_dropout(network: nn.Module) -> nn.Module:
    """Distillation trains without dropout: its masks would differ between student and target and come from a stream of random numbers.

    DiT would besides drop a tenth of the labels in train mode, in every block on its own.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network


def is_prompted(folder: Path) -> bool:
    """Whether this is a pipeline that is recorded as a whole: one whose network is none of NETWORKS."""
    configs = [folder / name / "config.json" for name in ("unet", "transformer")]
    known = any(read_json(config).get("_class_name") in NETWORKS for config in configs if config.is_file())
    return (folder / "model_index.json").is_file() and not known


def load_pipeline(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                  trust_remote_code: bool = False, only: Sequence[str] | None = None, loras: Mapping[str, float] | None = None,
                  quantize: QuantizeRecipe | None = None) -> Any:
    """A diffusers pipeline from a folder, safetensors only; of its components `only` these where they are named, None for the others.

    `loras` (file to scale) are merged into it in float32, before its network is quantised. FileNotFoundError or ValueError naming what is
    missing.
    """
    folder = Path(path).expanduser()
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    entries = {name: entry for name, entry in read_json(folder / "model_index.json").items()
               if isinstance(entry, list) and entry[0] is not None and not name.startswith("_")}
    left_out = {name: None for name in entries if only is not None and name not in only}
    lent = {name: part for name, part in worlds.shared(folder).items() if name in entries and name not in left_out}
    for name, entry in entries.items():
        if name not in left_out and name not in lent and not (folder / name).is_dir():
            if worlds.shared(folder):
                told = read_json(folder / NOTES)["command"]
                raise FileNotFoundError(f"this installation has no weights of the teacher in {folder}: train one with `{told}`, and copy "
                                        "what that writes there")
            raise FileNotFoundError(f"{folder} lacks its component {name!r}: model_index.json names {entry[1]}, and there is no {name}/")
    config = config_of(quantize, device) if quantize else None
    packed = {name: config for name in entries if name in (network_among(entries), f"{network_among(entries)}_2")} if config else {}
    options = {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=packed)} if packed and not loras else {}
    made = {name: part.make(torch.float32 if loras else dtype) for name, part in lent.items()}
    # diffusers warns of classes that a pipeline was not written for: those come afterwards
    late = {name: part for name, part in made.items() if entries[name][0] != "diffusers"}
    given = {**left_out, **made, **dict.fromkeys(late)}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                               torch_dtype=torch.float32 if loras else dtype,
                                                               trust_remote_code=trust_remote_code, **given, **options)
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as a diffusers pipeline: {' '.join(str(error).split())[:300]}") from error
    pipeline.register_modules(**late)
    pipeline.set_progress_bar_config(disable=True)
    if loras:
        fuse(pipeline, loras)
        pipeline.to(dtype)
        pipeline.register_modules(**{name: requantized(getattr(pipeline, name), config, dtype) for name in packed})
    return pipeline.to(device)


def load_teacher(path: str | Path, *, device: torch.device | str = "cpu", autocast: torch.dtype | None = None,
                 dtype: torch.dtype = torch.float32, guidance: float = 1.0, taps: tuple[str, ...] = (),
                 prompts: Sequence[str] = (), call: Mapping[str, Any] | None = None, kept: Kept | None = None,
                 loras: Mapping[str, float] | None = None, quantize: QuantizeRecipe | None = None) -> Teacher:
    """Load a teacher (or an exported student) from the name of a shipped world or from a diffusers folder.

    The folder is a pipeline (`model_index.json` with unet/ or transformer/, scheduler/, perhaps vae/) or a bare network beside its
    `scheduler_config.json`. `dtype` is what frozen weights are stored in. A pipeline whose network is none of NETWORKS is recorded, and
    reads `prompts`; `call` are further keywords for it, `loras` files to merge into it, `quantize` packs its network, and `kept` is
    what a cache holds of it.
    """
    folder = worlds.teacher_folder(str(path)) or Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no teacher at {path}: give a diffusers folder or the name of a shipped world's "
                                f"({', '.join(worlds.teachers())})")
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    if is_prompted(folder):
        from stepdistill.models.prompted import load_prompted

        return load_prompted(folder, prompts, call or {}, device=device, autocast=autocast, dtype=dtype, guidance=guidance, taps=taps,
                             notes=notes, kept=kept, loras=loras, quantize=quantize)
    if quantize:
        raise ValueError(f"teacher.quantize is for pipelines with prompts, and {path} is none: leave it out")
    if prompts or call or loras:
        raise ValueError(f"{path} takes no prompts: leave data.prompts, teacher.call and teacher.loras out of the recipe")
    inner = next((folder / n for n in ("unet", "transformer") if (folder / n).is_dir()), folder)
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    scheduler_file = next((p for p in places if p.is_file()), None)
    if scheduler_file is None:
        raise FileNotFoundError(f"{folder} has no scheduler_config.json, so its noise process is unknown")
    scheduler = read_json(scheduler_file)
    process, kind, clock = process_of(scheduler)
    networks = [keep_ends_float32(load_network(path)).to(device) for path in (inner, *sorted(folder.glob("unet_[2-9]")))]
    if dtype != torch.float32:
        for network in networks:
            nn.Module.to(network, dtype)                # diffusers' own logs an empty list of modules it would keep
    network = networks[0]
    config: Any = network.config
    if isinstance(network, UNet2DModel):
        embeds = config.num_class_embeds or 0
        null = notes.get("null_class")
        channels, size = config.in_channels, config.sample_size
    else:
        embeds = config.num_embeds_ada_norm
        null = embeds                                   # DiT keeps one row more for the dropped label
        embeds, channels, size = embeds + 1, config.in_channels, config.sample_size
    if size is None:
        raise ValueError(f"{inner / 'config.json'} has no sample_size: write the height and width of one state there")
    if unknown := sorted(set(taps) - {name for name, _ in network.named_modules()}):
        raise ValueError(f"student.taps names {unknown[0]!r}, which is no module of this {type(network).__name__}")
    shape = (channels, *((size, size) if isinstance(size, int) else tuple(size)))
    codec: Codec = SpaceToDepth(int(notes.get("codec", {}).get("space_to_depth", 1)))
    if (folder / "vae").is_dir():
        if not (folder / "vae" / "config.json").is_file():
            raise FileNotFoundError(f"{folder / 'vae'} holds no VAE: config.json is missing")
        if (named := read_json(folder / "vae" / "config.json").get("_class_name")) != "AutoencoderKL":
            raise ValueError(f"{folder / 'vae'} holds a {named}; this version reads AutoencoderKL")
        codec = Vae(read_weights(AutoencoderKL, folder / "vae").to(device).eval().requires_grad_(False))
    learned_sigma = config.out_channels is not None and config.out_channels == 2 * channels
    whole = network if len(networks) == 1 else Experts(networks, notes.get("sampler", {}).get("boundaries", ()))
    denoiser = Denoiser(whole, process, kind, clock, guidance, autocast, taps or default_taps(network),
                        channels if learned_sigma else None, inputs=tuple(config.get("inputs", ())))
    classes = int(notes.get("classes", embeds - (1 if null is not None and embeds else 0)))
    if guidance != 1 and null is None:
        raise ValueError(f"guidance {guidance} needs a null class and {path} has none: set guidance to 1, or name null_class in {NOTES}")
    return Teacher(denoiser, shape, classes, null, codec, folder, scheduler, notes)
