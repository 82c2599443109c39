"""Exams while training: now and then the student is scored on a few pictures, and its best checkpoint is kept.

Their noise is not the final score's, or the winner would be chosen on its own exam. In a world with a protocol the scores are that
protocol's on fewer pictures. Elsewhere, and where the recipe names an extractor, they are distances to the teacher's own pictures, of the
same conditions and other noise, in its features; by default the random ones of `tiny`, which rank the checkpoints of one run and say
nothing beyond it. Both distances are of few samples: the kernel distance is unbiased, the Frechet distance is too large by about c/N, for
all checkpoints alike.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.eval import metrics, protocol, score
from stepdistill.eval.extractors import EXTRACTORS, Extractor, Tiny, extract
from stepdistill.eval.generate import generate
from stepdistill.eval.metrics import Estimate, Moments
from stepdistill.eval.models import most_at_once
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.prompted import PromptTeacher
from stepdistill.training.assemble import Run
from stepdistill.training.look import teacher_sampler
from stepdistill.training.loop import BEST, State

FOLDER, TEACHER = "exam", "teacher.safetensors"
DISTANCES = ("kid", "frechet")
GROUPS = 25                                             # of the jackknife, where each can hold every class


def examine(done: int, state: State) -> None:
    """A hook of the loop: after every `exam.every` steps and after the last, scores of the student's average and of its raw weights.

    The log has them as exam/NAME and exam_raw/NAME, with standard errors as NAME_se; where no average is kept, exam/NAME is of the raw
    weights. The checkpoint with the smallest exam/NAME of the measure `exam.best` goes to RUN/best. Random numbers and modes are left as
    they were. The main process works alone.
    """
    run, chosen = state.run, state.run.recipe.exam
    if not chosen.every or (done % chosen.every and not state.last) or not run.accelerator.is_main_process:
        return
    device = run.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = {"exam": marks(run, run.ema.network if run.ema else None, state.out)}
        if run.ema:
            found["exam_raw"] = marks(run, None, state.out)
    if device.type == "cuda":
        torch.cuda.empty_cache()                        # training has its own shapes
    state.log({f"{kind}/{name}{suffix}": value for kind, estimates in found.items() for name, estimate in estimates.items()
               for suffix, value in (("", estimate.value), ("_se", estimate.se))})
    name = next(name for name in found["exam"] if name.startswith(chosen.best))
    value, best = found["exam"][name].value, state.notes.get("exam")
    if best is None or value < best["value"]:
        state.notes["exam"] = {"step": done, "measure": name, "value": value}
        state.keep(state.out / BEST)


def marks(run: Run, average: nn.Module | None, out: Path) -> dict[str, Estimate]:
    """Distances of the student's pictures by name; with this average of its weights where one is given."""
    chosen, world = run.recipe.exam, run.recipe.teacher.path.removeprefix("teacher:")
    with run.roles.averaged(average) as student:
        images = pictures(run, student, run.method.sampler(), chosen.seed)
    # prompts are the run's, not the exam's
    if chosen.extractor is None and world in protocol.PROTOCOLS and not isinstance(run.teacher, PromptTeacher):
        exam = protocol.get(world, chosen.count, chosen.seed).only(DISTANCES)
        return score.score(images, torch.arange(chosen.count) % exam.turns, exam).metrics
    judge = judge_of(chosen.extractor, run.accelerator.device)
    return to_teacher(images, teacher_features(run, out / FOLDER / TEACHER, judge), run.teacher.classes, judge)


def judge_of(name: str | None, device: torch.device | str = "cpu") -> Any:
    """The extractor of that name, by default `tiny`. Raises ValueError for an unknown name, FileNotFoundError for missing weights."""
    if name is not None and name not in EXTRACTORS:
        raise ValueError(f"exam.extractor: there is no {name!r}; there are {', '.join(EXTRACTORS)}")
    judge: Any = EXTRACTORS[name or Tiny.name]()
    return judge.to(device)


def pictures(run: Run, net: Denoiser, spec: SamplerSpec, seed: int) -> Tensor:
    """uint8 pictures (N, C, H, W) of the exam, their classes or prompts in turn, made without autocast as the final score's are."""
    model = replace(run.teacher, denoiser=replace(net, autocast=None))
    return generate(model, spec, run.recipe.exam.count, seed, batch_size=min(run.rows, most_at_once(model)), quiet=True).images


def teacher_features(run: Run, path: Path, judge: Extractor) -> Tensor:
    """Features (N, d) of the teacher's own pictures, from the seed after the exam's; made once a run and kept there.

    Features and not pictures, which would take gigabytes at the size of a pipeline's.
    """
    if not path.is_file():
        images = pictures(run, run.teacher.denoiser, teacher_sampler(run), run.recipe.exam.seed + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        save_file({"features": extract(judge, images, protocol.BATCH)[0]}, temporary)
        os.replace(temporary, path)
    return load_file(path)["features"]


def to_teacher(images: Tensor, reference: Tensor, classes: int, judge: Extractor) -> dict[str, Estimate]:
    """Distances of uint8 pictures (N, C, H, W), N >= 50, their classes in turn, to a teacher's features (M, d) of this judge.

    The jackknife's groups hold every class equally often where five such groups can be made, and whatever comes where not.
    """
    features, _ = extract(judge, images, protocol.BATCH)
    turns = classes if 0 < 5 * classes <= len(images) else 1
    groups = min(GROUPS, len(images) // max(turns, 2))
    member = metrics.members(len(images), groups, turns)
    parts = [Moments.of(features[member == j]) for j in range(groups)]
    whose = f"{judge.name.replace('-', '_')}_teacher"
    return {f"frechet_{whose}": metrics.frechet_estimate(parts, Moments.of(reference)),
            f"kid_{whose}": metrics.kid_estimate(metrics.kernel_sums(features, reference, member))}
