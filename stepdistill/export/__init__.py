"""A trained student as a diffusers folder that loads where stepdistill is not installed, with its model card; and back again.

Class-conditional and unconditional students bring their pipeline along:

    model_index.json  pipeline.py     the self-contained pipeline and its settings
    unet/  scheduler/  vae/           weights in safetensors (and `inputs.py`, where the network is told more than its time); a stock
    unet_2/ ...                       scheduler set up as the student needs it; the teacher's VAE if any; the student's other experts

Students of a whole pipeline are one of its class, with a scheduler that runs them when told their number of steps (`export.schedule`):

    model_index.json  unet/ ...       everything of the teacher's, with the student's network
    scheduler/  stock_scheduler/      the scheduler; where it is of our own, a stock one that is told the grid at the call, if there is one
    lora/  lora_kohya/                the student as an adapter, where it was trained as one or a rank was asked for (`export.lora`)
    LICENSE*                          the teacher's

Both hold

    recipe.yaml  stepdistill.json     how it was made; what a diffusers folder cannot say (codec, labels, sampler, digest, ...)
    recipe_merged.yaml                in a merge of two students the recipe of the other
    README.md                         the model card
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from torch import Tensor

import stepdistill
from stepdistill import recipe as recipes
from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.export import lora as loras
from stepdistill.export import schedule, students
from stepdistill.export.cards import card, pipeline_card
from stepdistill.export.schedule import Plan, scheduler_of
from stepdistill.export.students import Student, shares_of
from stepdistill.models import inputs as told
from stepdistill.models.adapters import LoraRecipe, is_adapter, layers_of, merged
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.drive import Driven
from stepdistill.models.experts import parts_of
from stepdistill.models.load import NOTES, Teacher, Vae, is_prompted, load_pipeline, load_teacher, read_json
from stepdistill.models.prompted import check_room
from stepdistill.models.recorded import SCALES
from stepdistill.models.recording import usual_inputs
from stepdistill.models.wiring import Static, Wiring
from stepdistill.training import checkpoint
from stepdistill.training.loop import RECIPE

__all__ = ["Exported", "add_results", "card", "export", "in_one_move", "load_student", "pipeline_card", "read_notes",
           "scheduler_digest", "scheduler_of", "sha256", "shares_of"]

CARD, PIPELINE, INDEX = "README.md", "pipeline.py", "model_index.json"
OTHER_RECIPE = "recipe_merged.yaml"                                              # of the student that was averaged in
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
OWN_SCHEDULER, STOCK_SCHEDULER = "few_step_scheduler", "stock_scheduler"
SHARED_NOTES = {"sampler", "method", "teacher", "step", "ema"}


@dataclass(frozen=True)
class Exported:
    """What was written. `ema` is False for a run that keeps no average, or where the raw weights were asked for.

    `fit` says how well the adapter of a given rank holds a fully trained student, `merged` which other student is in the weights; None
    where none was asked for.
    """

    folder: str
    step: int
    steps: int
    ema: bool
    unet_sha256: str
    fit: loras.Fit | None = None
    merged: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(run: Path, to: Path, weights: Literal["ema", "raw"] = "ema", *, dtype: Literal["float32", "bfloat16", "float16"] = "float32",
           results: Sequence[Path] = (), lora_rank: int | None = None, best: bool = False, merge: Path | None = None,
           share: float | None = None) -> Exported:
    """Write the newest readable checkpoint of a run, finished or not, or its `best`, into the new or empty folder `to`, in one move.

    "ema" takes the average where the run keeps one. `results` are result files of the evaluation, for the card. `lora_rank` factors a
    fully trained student of a pipeline into an adapter of this rank beside its weights. Adapters are merged and saved in float32,
    whatever `dtype` the weights are stored in. `merge` is another run of the same teacher: the weights are `share` (0.5) times those of
    `run` plus 1 - share times those of `merge` (the best of each with `best`), adapters merged first; 1 and 0 are one of the two, bit for
    bit. Raises FileNotFoundError or ValueError where `run` or `merge` is not a run, has trained nothing yet or is damaged, where the two
    cannot be merged, where `to` holds anything, and where the student can be no pipeline or no adapter of what it was trained from.
    """
    to = Path(to).expanduser().resolve()
    student = students.read(run, weights, best)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not empty: choose another folder to export into")
    if merge is not None:
        student = students.merging(student, students.read(merge, weights, best), 0.5 if share is None else share)
    elif share is not None:
        raise ValueError("share is the run's part of a merge: name the other run with --merge")
    recipe, spec = student.recipe, student.spec
    if is_prompted(recipe.teacher.folder):
        return _export_pipeline(student, to, getattr(torch, dtype), lora_rank, results)
    if lora_rank is not None:
        raise ValueError(f"--lora-rank is for students of a pipeline that diffusers loads adapters into; {recipe.teacher.path} is none")
    teacher = load_teacher(recipe.teacher.path)
    network = _filled(teacher, student)
    if student.merge:
        theirs = _filled(load_teacher(recipe.teacher.path), student.merge.other)
        network.load_state_dict(students.averaged(network.state_dict(), theirs.state_dict(), student.merge.share))
    torch.nn.Module.to(network, getattr(torch, dtype))
    with in_one_move(to) as folder:
        _pipeline(teacher, network, spec).save_pretrained(folder, safe_serialization=True, max_shard_size="1000GB")
        for inner in folder.glob("*/config.json"):
            _edit(inner, {"_name_or_path": None})                                # a path of the machine it was made on
        _edit(folder / INDEX, {"_class_name": [Path(PIPELINE).stem, "ClassConditionalPipeline"], "_name_or_path": None})
        (folder / PIPELINE).write_bytes(_code("class_conditional"))
        if spec.inputs:
            code = Path(told.__file__)
            _edit(folder / INDEX, {"unet": [code.stem, type(network).__name__]})
            (folder / "unet" / code.name).write_bytes(code.read_bytes())
        notes = _notes(student, teacher) | {"unet_sha256": digest(*sorted(folder.glob("unet*"))),
                                            "scheduler_sha256": scheduler_digest(folder)}
        _record(folder, student, notes)
        (folder / CARD).write_text(card(to.name, notes, recipe, results))
    return _exported(to, student, notes["unet_sha256"])


def _trained(student: Student) -> dict[str, Any]:
    """What the notes say of the weights."""
    return {"step": student.step, "ema": student.ema, "best": student.best, "merged": student.merge.to_dict() if student.merge else None}


def _record(folder: Path, student: Student, notes: Mapping[str, Any]) -> None:
    """Write the notes and the recipe, or both recipes of a merge."""
    (folder / RECIPE).write_text(recipes.dump(student.recipe))
    if student.merge:
        (folder / OTHER_RECIPE).write_text(recipes.dump(student.merge.other.recipe))
    (folder / NOTES).write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n")


def _exported(to: Path, student: Student, sha: str, fit: loras.Fit | None = None) -> Exported:
    return Exported(str(to), student.step, student.recipe.steps, student.ema, sha, fit, _trained(student)["merged"])


def _export_pipeline(student: Student, to: Path, dtype: torch.dtype, rank: int | None, results: Sequence[Path]) -> Exported:
    """The teacher's own pipeline with the student's weights and a scheduler that runs them."""
    recipe, spec, merge = student.recipe, student.spec, student.merge
    source = recipe.teacher.folder
    pipeline = load_pipeline(source, loras=recipe.teacher.loras)
    adapter, fit, factors = student.adapter, None, None
    shares = shares_of(student.weights)
    names = {name for name in shares[0] if not (spec.inputs and name.endswith(".cond_proj.weight"))}
    fits = (lambda part: layers_of(shares[0]) <= dict(part.named_modules()).keys()) if adapter else (
        lambda part: part.state_dict().keys() == names)
    component = next((n for n, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module) and fits(part)), None)
    if component is None or is_adapter(student.weights) != bool(adapter):
        raise ValueError(f"the checkpoint of {student.run} fits no network of the pipeline at {source}; was the teacher replaced?")
    if rank is not None and adapter and not merge:
        raise ValueError(f"the student of {student.run} is an adapter of rank {adapter.rank} already: leave --lora-rank out")
    if rank is not None and not loras.saves(pipeline, component):
        raise ValueError(f"{type(pipeline).__name__} loads no adapters: leave --lora-rank out")
    if rank is not None and len(shares) > 1:
        raise ValueError(f"the student of {student.run} is {len(shares)} networks, and an adapter is of one: leave --lora-rank out")
    components = [component, *_seconds(pipeline, component, len(shares))]
    if merge:                                                                    # from here on a student with weights of its own
        networks = [getattr(pipeline, name) for name in components]
        each = zip(students.whole(student, networks), students.whole(merge.other, networks), strict=True)
        shares, adapter = [students.averaged(mine, theirs, merge.share) for mine, theirs in each], None
    call = dict(student.call)
    if spec.inputs:
        pipeline.register_modules(**{component: _told_guidance(pipeline, getattr(pipeline, component), spec)})
        call = {keyword: number + spec.guidance - 1 for keyword, number in call.items()}       # it was the number of no guidance
    driven = Driven(pipeline)
    inputs = {**usual_inputs(pipeline, **recipe.teacher.call)(["a red apple"]), **call}
    driven.fit_shift(inputs, SCALES[0])
    chosen = schedule.plan(driven, inputs, spec)
    if adapter and len(shares) == 1 and loras.saves(pipeline, component):
        factors = loras.of_adapter(shares[0], adapter)
    elif rank is not None:
        factors, fit = loras.of_difference(getattr(pipeline, component), shares[0], rank)
    for name, weights in zip(components, shares, strict=True):
        torch.nn.Module.to(_with_weights(getattr(pipeline, name), weights, adapter), dtype)
    if spec.boundaries:
        pipeline.register_to_config(boundary_ratio=_ratio(driven, spec))
    notes = {"pipeline": type(pipeline).__name__, "component": component, "components": components, "sampler": spec.to_dict(),
             "method": recipe.method["name"], "teacher": recipe.teacher.name,
             "call": {**recipe.teacher.call, "num_inference_steps": len(spec.times), **chosen.call, **call},
             "video": hasattr(pipeline, "video_processor"), **_walk(driven, chosen, spec, call),
             "teacher_scheduler": {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config},
             "licence": licence_of(source), **_trained(student), "versions": _versions()}
    pipeline.scheduler = chosen.scheduler
    with in_one_move(to) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for inner in (*folder.glob("*/config.json"), folder / INDEX):
            _edit(inner, {"_name_or_path": None})
        if not chosen.stock:
            _edit(folder / INDEX, {"scheduler": [OWN_SCHEDULER, type(chosen.scheduler).__name__]})
            (folder / "scheduler" / f"{OWN_SCHEDULER}.py").write_bytes(_code(OWN_SCHEDULER))
        if chosen.other is not None:
            chosen.other.save_pretrained(folder / STOCK_SCHEDULER)
        files = loras.save(pipeline, component, factors, folder, to.name) if factors else ()
        held = len(next(iter(factors.values()))[0]) if factors else None
        notes |= {"weights_sha256": digest(*(folder / name for name in components)), "scheduler_sha256": scheduler_digest(folder),
                  "lora": {"files": files, "rank": held, "fit": fit.to_dict() if fit else None} if files else None}
        for legal in sorted(source.glob("LICENSE*")):
            shutil.copy(legal, folder)
        _record(folder, student, notes)
        (folder / CARD).write_text(pipeline_card(to.name, notes, recipe, results))
    return _exported(to, student, notes["weights_sha256"], fit)


def _with_weights(network: torch.nn.Module, weights: Mapping[str, Tensor], adapter: LoraRecipe | None) -> torch.nn.Module:
    """A network that holds its teacher's weights with those of a student, or with its adapter merged in; changed in place."""
    if adapter is None:
        network.load_state_dict(weights)
        return network
    return merged(network, weights, adapter)


def _seconds(pipeline: Any, component: str, count: int) -> list[str]:
    """The name of the second of two networks, made where the pipeline has one only; ValueError where it has no place for so many."""
    check_room(pipeline, component, count)
    if count == 1:
        return []
    second = f"{component}_2"
    if getattr(pipeline, second) is None:
        pipeline.register_modules(**{second: copy.deepcopy(getattr(pipeline, component))})
    return [second]


def _ratio(driven: Driven, spec: SamplerSpec) -> float:
    """Of two experts, the share of the clock from which on the first one answers: halfway between its last call and the other's first."""
    told = driven.times(spec.times)
    last, first = (pick(n for n, t in zip(told, spec.times, strict=True) if (t > spec.boundaries[0]) == above)
                   for pick, above in ((min, True), (max, False)))
    return (last + first) / 2 / float(driven.scheduler.config.num_train_timesteps)


def _told_guidance(pipeline: Any, network: Any, spec: SamplerSpec) -> torch.nn.Module:
    """A network like this one that its pipeline tells its guidance, with weights to be filled in; ValueError where no pipeline would."""
    if spec.inputs != ("w",) or "time_cond_proj_dim" not in network.config or not hasattr(pipeline, "get_guidance_scale_embedding"):
        raise ValueError(f"a {type(pipeline).__name__} cannot tell its network {' and '.join(spec.inputs)}: of students that are told more "
                         "than their time, those of Stable Diffusion that are told w can be exported, and class-conditional ones")
    return type(network).from_config({**network.config, "time_cond_proj_dim": told.WIDTH})


def _walk(driven: Driven, chosen: Plan, spec: SamplerSpec, call: Mapping[str, Any]) -> dict[str, Any]:
    """How the student is run, for programs that are no diffusers: the grid as the network is told it and as noise levels.

    `dmd2_config` is the block of model_index.json that vLLM-Omni's DMD2 pipelines read: on a flow without shift, whole timesteps
    1000·sigma, "sde" for re-noising and "ode" for none. It is given for flow students on such a grid, and kept out of model_index.json
    because diffusers warns of keys it does not know.
    """
    t = torch.tensor(spec.times, dtype=torch.float64)
    told, guidance = driven.times(spec.times), next(iter(call.values()), None)
    whole = [round(1000 * sigma) for sigma in driven.process.sigma(t).tolist()]
    flow = isinstance(driven.process, Flow)
    exact = flow and spec.renoise in (0, 1) and all(abs(a - b) < 1e-3 for a, b in zip(whole, told, strict=True))
    return {"schedule": {"scheduler": type(chosen.scheduler).__name__, "stock": chosen.stock, "other_steps": schedule.other_steps(chosen),
                         "timesteps": told, "alphas": driven.process.alpha(t).tolist(), "sigmas": driven.process.sigma(t).tolist(),
                         "shift": driven.process.shift if isinstance(driven.process, Flow) else None, "renoise": spec.renoise,
                         "guidance": guidance,
                         "stock_call": {"scheduler": type(chosen.other).__name__, **chosen.keywords} if chosen.other else None},
            "dmd2_config": {"num_inference_steps": len(whole), "denoising_timesteps": whole, "solver": "sde" if spec.renoise else "ode",
                            "guidance_scale": 1.0 if guidance is None else guidance} if exact else None}


def licence_of(source: Path) -> str | None:
    """The licence of a teacher's folder: of our notes, or of its model card's front matter, or its LICENSE file's name."""
    notes = read_json(source / NOTES) if (source / NOTES).is_file() else {}
    if notes.get("licence"):
        return str(notes["licence"])
    if (source / CARD).is_file() and (parts := (source / CARD).read_text(errors="replace").split("---\n", 2))[0] == "" and len(parts) == 3:
        try:
            front = yaml.safe_load(parts[1])
        except yaml.YAMLError as error:
            raise ValueError(f"the front matter of {source / CARD} is not YAML: correct it, or name a licence in {NOTES}") from error
        named = front.get("license") if isinstance(front, dict) else None
        if named == "other":
            named = front.get("license_name", named)
        if named:
            return str(named)
    return next((f"{path.name} in this folder" for path in sorted(source.glob("LICENSE*"))), None)


def load_student(folder: Path, *, prompts: Sequence[str] = (), device: torch.device | str = "cpu", autocast: torch.dtype | None = None,
                 dtype: torch.dtype = torch.float32) -> tuple[Teacher, SamplerSpec]:
    """An exported student as a model of this package, and how it must be run. FileNotFoundError or ValueError where it is damaged.

    A student of a pipeline with prompts is recorded again, under its teacher's scheduler, and takes these `prompts`. No code in its folder
    is run.
    """
    folder = Path(folder).expanduser().resolve()
    notes = read_notes(folder)
    if is_prompted(folder):
        return _load_prompted(folder, notes, prompts, device=device, autocast=autocast, dtype=dtype)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}: export the student again")
    if digest(*sorted(folder.glob("unet*"))) != notes["unet_sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is damaged or was replaced: it does not match the digest in {NOTES}; export it again")
    return load_teacher(folder, device=device, autocast=autocast, dtype=dtype), students.spec_of(notes["sampler"], folder)


def _load_prompted(folder: Path, notes: Mapping[str, Any], prompts: Sequence[str], **options: Any) -> tuple[Teacher, SamplerSpec]:
    component, *others = (folder / name for name in notes["components"])
    if not any(component.glob("*.safetensors")):
        raise FileNotFoundError(f"{component} holds no weights: export the student again")
    if digest(component, *others) != notes["weights_sha256"]:
        raise ValueError(f"the weights in {component} are damaged or were replaced: they do not match the digest in {NOTES}; export again")
    recipe, spec = recipes.load(folder / RECIPE), students.spec_of(notes["sampler"], folder)
    with _as_taught(folder, notes["teacher_scheduler"]) as taught:
        model = load_teacher(taught, prompts=prompts, call=recipe.teacher.call, guidance=1.0 if spec.inputs else recipe.guidance, **options)
    denoiser = _untold(model.denoiser) if spec.inputs else model.denoiser
    return replace(model, folder=folder, denoiser=denoiser.shared(None)), spec


def _untold(recorded: Denoiser) -> Denoiser:
    """A network that its pipeline tells its guidance, recorded with that in its condition, told by us instead."""
    network: Any = recorded.network
    weight, network.time_embedding.cond_proj = network.time_embedding.cond_proj.weight, None
    told.add_inputs(network, ("w",))
    network.time_embedding.cond_proj.weight = weight
    assert isinstance(recorded.wiring, Wiring)
    wiring = replace(recorded.wiring, arguments={**recorded.wiring.arguments, "timestep_cond": Static(None)})
    return replace(recorded, wiring=wiring, inputs=("w",))


@contextmanager
def _as_taught(folder: Path, scheduler: Mapping[str, Any]) -> Iterator[Path]:
    """A view of an exported pipeline with its teacher's scheduler, whose process and clock the sampler's times are counted in."""
    with tempfile.TemporaryDirectory() as made:
        view = Path(made)
        for path in folder.iterdir():
            if path.name not in ("scheduler", INDEX):
                (view / path.name).symlink_to(path)
        (view / "scheduler").mkdir()
        (view / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        (view / INDEX).write_text(json.dumps({**read_json(folder / INDEX), "scheduler": ["diffusers", scheduler["_class_name"]]}))
        yield view


def add_results(folder: Path, results: Sequence[Path]) -> None:
    """Write the model card again with these figures instead of those it had."""
    folder = Path(folder).expanduser().resolve()
    notes = read_notes(folder)
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} has no {RECIPE}: export the student again")
    made = pipeline_card if is_prompted(folder) else card
    checkpoint.write_atomically(folder / CARD, made(folder.name, notes, recipes.load(folder / RECIPE), results))


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*folders: Path) -> str:
    """SHA-256 of the weights of a network, or of several: of its one file, or of all files' digests in the order of their names."""
    each = [sha256(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def scheduler_digest(folder: Path) -> str:
    """SHA-256 of how an export is run: of its scheduler's files, and of the sampler that a class-conditional one keeps in its index."""
    files = {path.name: path.read_text() for path in sorted((folder / "scheduler").iterdir()) if path.is_file()}
    kept = json.dumps([files, read_json(folder / INDEX).get("sampler")], sort_keys=True)
    return hashlib.sha256(kept.encode()).hexdigest()


@contextmanager
def in_one_move(to: Path) -> Iterator[Path]:
    """A hidden sibling to fill, which takes the place of the new or empty folder `to` at the end, or leaves nothing."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            checkpoint.fsync(path)
        os.replace(partial, to)
        checkpoint.fsync(to.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _code(name: str) -> bytes:
    """A file of `pipelines/`, which leaves with the weights."""
    return resources.files("stepdistill.pipelines").joinpath(f"{name}.py").read_bytes()


def _filled(teacher: Teacher, student: Student) -> torch.nn.Module:
    """The teacher's network with the weights of a student."""
    network, spec, run = teacher.denoiser.network, student.spec, student.run
    if spec.inputs:
        told.add_inputs(network, spec.inputs)
    teacher.check_room(len(spec.boundaries) + 1)
    if spec.boundaries:
        network = teacher.denoiser.divided(spec.boundaries).network
    try:
        return _with_weights(network, student.weights, student.adapter)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the checkpoint of {run} does not fit the teacher at {teacher.folder}; was the teacher replaced? "
                         f"{' '.join(str(error).split())[:300]}") from error


def _pipeline(teacher: Teacher, network: torch.nn.Module, spec: SamplerSpec) -> Any:
    from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

    vae = teacher.codec.model if isinstance(teacher.codec, Vae) else None
    first, *others = parts_of(network)
    return ClassConditionalPipeline(
        unet=first, **{f"unet_{i}": other for i, other in enumerate(others, 2)}, scheduler=scheduler_of(teacher.scheduler, spec), vae=vae,
        space_to_depth=teacher.codec.to_dict().get("space_to_depth", 1), null_class=teacher.null_class, labels=list(teacher.labels),
        sampler={**spec.to_dict(), "steps": len(spec.times)})


def _notes(student: Student, teacher: Teacher) -> dict[str, Any]:
    """What a diffusers folder cannot say. The first five are a teacher's notes, so an export is loaded as a teacher is."""
    picture = teacher.pictures(torch.zeros(1, *teacher.shape)).shape[1:]
    return {"codec": teacher.codec.to_dict(), "classes": teacher.classes, "null_class": teacher.null_class, "labels": list(teacher.labels),
            "licence": teacher.notes.get("licence"), "picture": list(picture), "sampler": student.spec.to_dict(),
            "method": student.recipe.method["name"], "teacher": student.recipe.teacher.path, **_trained(student), "versions": _versions()}


def _versions() -> dict[str, str]:
    return {"stepdistill": stepdistill.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def read_notes(folder: Path) -> dict[str, Any]:
    """What an export says of itself; FileNotFoundError or ValueError where it is none or damaged."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no exported student at {folder}")
    if not (folder / NOTES).is_file() or "sampler" not in (notes := read_json(folder / NOTES)):
        raise FileNotFoundError(f"{folder} is not an exported student: it has no {NOTES} with a sampler")
    own = {"component", "components", "schedule", "teacher_scheduler", "weights_sha256"} if is_prompted(folder) else {
        "codec", "classes", "labels", "picture", "unet_sha256"}
    if missing := sorted((SHARED_NOTES | own) - set(notes)):
        raise ValueError(f"{folder / NOTES} is damaged: it lacks {', '.join(missing)}; export the student again")
    return notes


def _edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file, or drop those set to None."""
    values = {k: v for k, v in {**read_json(path), **changes}.items() if v is not None or k not in changes}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
