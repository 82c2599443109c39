"""A physician for runs: which of the known illnesses its log and its looks show, by what evidence, and what helps.

A rule compares a curve with itself, in medians over eighths of the run, or the student's pictures with the teacher's: levels differ from
model to model, shapes hardly do. The thresholds stand in `Limits`, with what healthy runs of ours reach.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepdistill import recipe as recipes
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.export import read_notes, scheduler_digest
from stepdistill.recipe import Recipe
from stepdistill.training import checkpoint
from stepdistill.training.loop import BEST, CHECKPOINTS, RECIPE

EIGHTHS, LEAST = 8, 16                                   # lines of a curve below which nothing is said about its shape
BEFORE = 8                                               # lines that a jump is held against


@dataclass(frozen=True)
class Limits:
    """Where an alarm begins."""

    moved: float = 0.01                                  # share of weights changed by an update
    skipped: float = 0.02                                # share of updates without a finite gradient
    gradient: float = 10.0                               # last eighth over the run's median; healthy ones fall
    jump: float = 2.0                                    # of the gap, over the median of the lines before it; healthy: 1.45
    gap: float = 1.3                                     # last eighth over the smallest of the second half; healthy: 1.1
    denoise: float = 1.15                                # the same; healthy: 1.08
    kept: float = 0.8                                    # last eighth of the gap over the first two; healthy from the teacher on: 0.6
    wide: float = 0.8                                    # last eighth of the gap over that of x0_std; healthy: 0.6, climbing: 2.4
    accuracy: float = 0.95                               # of the discriminator, through the second half
    contrast: float = 1.2                                # of the student's pictures over the teacher's
    saturation: float = 1.2
    clipped: float = 0.1                                 # more values at black or white than the teacher's
    spread: float = 0.6                                  # variety within a class or prompt, over the teacher's
    sharpness: float = 0.5
    grid: float = 1.5                                    # ln of power at a patch's or stride's period, more than the teacher's
    distance: float = 0.02                               # last eighth over the largest
    flat: float = 0.3                                    # contrast and spread, both, of pictures that show nothing; healthy: 0.7
    exam: float = 4.0                                    # standard errors of the difference, from the best exam to the last
    travelled: float = 0.01                              # sizes of all updates together, over that of the weights: hardly moved


LIMITS = Limits()


@dataclass(frozen=True)
class Finding:
    """One illness: its name, what in the run says so, and what helps."""

    illness: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a run, and what could not be examined."""

    folder: str
    method: str
    step: int
    steps: int
    findings: tuple[Finding, ...]
    unseen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What a rule reads: curves by name, each a value for every line of the log that has it, and the recipe."""

    curves: Mapping[str, Sequence[float]]
    recipe: Recipe | None = None
    skipped: int = 0
    updates: int = 0
    limits: Limits = LIMITS
    phase: str = ""                                      # " of phase 2", where these are its curves

    def phases(self) -> Sequence[Case]:
        """Itself; or of a method that has scores for each phase one case a phase, to which `score_gap_2` is the gap of the scores."""
        apart = [(name, found) for name in self.curves if (found := re.fullmatch(r"(.+/(?:score_gap|denoise))_(\d+)", name))]
        numbers = sorted({int(found[2]) for _, found in apart})
        return [replace(self, phase=f" of phase {number}",
                        curves={**self.curves, **{found[1]: self.curves[name] for name, found in apart if int(found[2]) == number}})
                for number in numbers] or [self]

    def eighths(self, name: str) -> list[float] | None:
        """Medians over eighths of a curve; None where it is missing or short."""
        values = self.curves.get(name, ())
        if len(values) < LEAST:
            return None
        edges = [len(values) * i // EIGHTHS for i in range(EIGHTHS + 1)]
        return [statistics.median(values[a:b]) for a, b in pairwise(edges)]

    def last(self, name: str) -> float | None:
        """The mean of the last two values: of a look, which there are few of."""
        values = self.curves.get(name, ())
        return statistics.fmean(values[-2:]) if values else None

    def travelled(self) -> float:
        """How far the student's weights have come at most, over their size; inf where the log has no sizes of updates."""
        sizes = self.curves.get("update/student")
        return self.updates * statistics.fmean(sizes) if sizes else math.inf

    def guidance(self) -> str:
        return "" if self.recipe is None else f" (it is {self.recipe.guidance:g})"


def examine(run: Path, export: Path | None = None) -> Diagnosis:
    """Diagnose a run folder, and whether an export of it is sampled as it was trained.

    Raises FileNotFoundError or ValueError for a folder that is no run, or a log that cannot be read.
    """
    if not (run / RECIPE).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {RECIPE}")
    recipe, rows = recipes.load(run / RECIPE), read_log(run / "log.jsonl")
    case = case_of(rows, recipe)
    findings, unseen = judge(case), []
    if not any(name.startswith("look/") for name in case.curves):
        unseen.append("the student's pictures beside the teacher's: train with preview_every")
    if all(case.eighths(name) is None for name in case.curves if name.startswith("grad/")):
        unseen.append(f"the shapes of curves: the log has fewer than {LEAST} lines")
    if export is None:
        unseen.append("an export: name one with --export")
    else:
        findings += mismatch(run, export)
    step = max((row["step"] for row in rows), default=-1) + 1
    return Diagnosis(str(run), recipe.method["name"], step, recipe.steps, tuple(findings), tuple(unseen))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; ValueError naming the one that is damaged (a last line cut off by a kill is left out)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run has not logged anything yet")
    lines, rows = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged: delete it") from error
    if not rows:
        raise ValueError(f"{path} is empty: the run has not logged anything yet")
    return rows


def case_of(rows: Sequence[Mapping[str, Any]], recipe: Recipe | None = None) -> Case:
    """Curves out of the lines of a log."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if not (name.startswith("moved/") and row.get(f"lr/{name[6:]}") == 0):               # a schedule's end moves nothing, rightly
                curves.setdefault(name, []).append(float(value))
    return Case(curves, recipe, skipped=int(max(curves.get("skipped", [0]))), updates=int(max(curves.get("step", [0]))) + 1)


def judge(case: Case) -> list[Finding]:
    """Every illness that a rule sees, the gravest first; where a run diverges, what follows from that is left out."""
    if (worst := diverging(case)) is not None:
        return [worst]
    phases = case.phases()
    return [finding for rule in RULES if (finding := next(filter(None, map(rule, phases)), None)) is not None]


# ---------------------------------------------------------------------------------------------------------------------------------- rules


def stuck(case: Case) -> Finding | None:
    """Updates that are rounded away."""
    for role in ("student", "fake"):
        moved = case.curves.get(f"moved/{role}")
        if moved and (share := statistics.median(moved)) < case.limits.moved:
            return Finding("stuck weights", f"an update changes {share:.2%} of the stored weights of {role} (median)",
                           "store them in float32 (weights: float32; precision: bf16 stays as fast), or raise the rate")
    return None


def diverging(case: Case) -> Finding | None:
    """Gradients that grow or are not finite."""
    if case.skipped > case.limits.skipped * case.updates:
        return Finding("diverging", f"{case.skipped} updates in {case.updates} steps had no finite gradient",
                       "lower the rates, add warmup, or precision: fp32; go on from a checkpoint before it began")
    for name in sorted(case.curves):
        found = case.eighths(name) if name.startswith("grad/") else None
        if found and found[-1] > case.limits.gradient * statistics.median(found):
            return Finding("diverging", f"{name} ended at {found[-1]:.3g}, {found[-1] / statistics.median(found):.0f} times its median",
                           "lower the rates or optim.*.clip, add warmup; go on from a checkpoint before it began")
    return None


def wrong_sign(case: Case) -> Finding | None:
    """The student comes no nearer to the teacher, though the fake score knows it well."""
    gap, denoise, std = (case.eighths(name) for name in ("student/score_gap", "critic/denoise", "student/x0_std"))
    if not gap or not denoise or not std or _risen(denoise) > case.limits.denoise or case.travelled() < case.limits.travelled:
        return None
    if gap[-1] > case.limits.kept * max(gap[:2]) and gap[-1] > case.limits.wide * std[-1]:
        return Finding("wrong sign of the gradient", f"the gap of the scores{case.phase} was {gap[0]:.3g} and is {gap[-1]:.3g}, "
                       f"{gap[-1] / std[-1]:.1f} times the deviation of the samples, while the fake score followed them (its loss "
                       f"{denoise[0]:.3g}, now {denoise[-1]:.3g})",
                       "a student of distribution matching descends fake - teacher: check the sign in a loss of your own, and that "
                       "teacher and fake are not exchanged; with the signs right, its rate is too low")
    return None


def lagging(case: Case) -> Finding | None:
    """The fake score does not follow the student."""
    both = case.eighths("student/score_gap"), case.eighths("critic/denoise")
    gap, denoise = (found and _risen(found[EIGHTHS // 2 :]) for found in both)                    # at first both rise: samples get variety
    if gap and denoise and gap > case.limits.gap and denoise > case.limits.denoise:
        now = "" if case.recipe is None else f" (it is {case.recipe.method.get('fake_updates', 1)})"
        return Finding("fake score lagging", f"in the second half the gap of the scores{case.phase} rose {gap:.1f}-fold from its smallest, "
                       f"the loss of the fake score {denoise:.2f}-fold", f"raise method.fake_updates{now} or the fake score's rate, lower "
                       "the student's")
    return None


def unstable(case: Case) -> Finding | None:
    """The scores come apart at once: one of them was thrown off."""
    if any(map(lagging, case.phases())):
        return None                                                           # so they do, and go on to
    gap = case.curves.get("student/score_gap", ())
    for i in range(BEFORE, len(gap) - 1):
        usual, now = statistics.median(gap[i - BEFORE : i]), min(gap[i : i + 2])               # two lines, not one odd batch
        if now > case.limits.jump * usual:
            return Finding("instability", f"the gap of the scores{case.phase} was {usual:.3g} and jumped to {max(gap[i:]):.3g}, "
                           f"after {i / len(gap):.0%} of its lines", "lower the rates, the fake score's first (an adapter bears less), "
                           "or optim.*.clip; train again from before the jump: variety that is lost in one seldom comes back")
    return None


def saturated_discriminator(case: Case) -> Finding | None:
    """A discriminator that is always right teaches nothing."""
    for loss in ("critic", "disc"):
        found = case.eighths(f"{loss}/disc_accuracy")
        if found and min(found[EIGHTHS // 2 :]) > case.limits.accuracy:
            return Finding("discriminator saturated", f"it was right in {min(found[EIGHTHS // 2 :]):.1%} or more of the cases through the "
                           "second half", "lower method.gan_weight and the discriminator's rate, or add method.r1_weight")
    return None


def oversaturated(case: Case) -> Finding | None:
    """Contrast or colour beyond the teacher's."""
    contrast, colour, clipped = (case.last(f"look/{name}") for name in ("contrast", "saturation", "clipped"))
    limits, help_ = case.limits, f"lower guidance{case.guidance()}, or set student.clip_x0 where states are pixels"
    if contrast is not None and max(contrast / limits.contrast, (colour or 0) / limits.saturation) > 1:
        seen = [f"{contrast:.2f} times the contrast of the teacher's"]
        seen += [f"{colour:.2f} times the saturation"] if colour is not None else []
        seen += [f"{clipped:.0%} more of their values at black or white"] if clipped is not None and clipped > limits.clipped else []
        return Finding("oversaturation", f"the student's pictures have {', '.join(seen)}", help_)
    return None


def mode_loss(case: Case) -> Finding | None:
    """Pictures of one condition that are too much alike."""
    spread, contrast = case.last("look/spread"), case.last("look/contrast")
    if spread is not None and spread < case.limits.spread and (contrast is None or contrast > 0.7):
        return Finding("mode loss", f"within a class or prompt the student's pictures vary {spread:.2f} times as much as the teacher's",
                       "raise method.gan_weight, lower guidance" + case.guidance() + ", train longer, or take a method that holds variety "
                       "(dp_dmd, dmd with pairs)")
    return None


def collapsed(case: Case) -> Finding | None:
    """Student and target agree on nothing but each other."""
    distance, sharp, contrast = case.eighths("student/distance"), case.last("look/sharpness"), case.last("look/contrast")
    std = case.eighths("student/x0_std")
    if not distance or distance[-1] > case.limits.distance * max(distance):
        return None
    blurred = (sharp is not None and sharp < case.limits.sharpness) or (contrast is not None and contrast < 0.7)
    flat = f"their x0_std fell from {max(std):.3g} to {std[-1]:.3g}" if std and std[-1] < 0.5 * max(std) else None
    if blurred:
        flat = f"they have {sharp or 0:.2f} of the sharpness and {contrast or 0:.2f} of the contrast of the teacher's"
    if flat is None:
        return None
    return Finding("consistency target collapse", f"the distance to the target fell from {max(distance):.3g} to {distance[-1]:.3g}, "
                   f"and the pictures went flat: {flat}", "check the boundary (f(x, 0) = x), keep the target behind the student "
                   "(target_decay), and begin at the teacher's weights")


def flat(case: Case) -> Finding | None:
    """Pictures of one colour, whatever is asked for."""
    contrast, spread = case.last("look/contrast"), case.last("look/spread")
    if contrast is None or spread is None or max(contrast, spread) > case.limits.flat or stuck(case) or collapsed(case):
        return None
    return Finding("collapsed student", f"its pictures have {contrast:.2f} of the contrast of the teacher's and vary {spread:.2f} times as "
                   "much within a class or prompt", "lower the student's rate and go on from a checkpoint before it began; in distribution "
                   "matching raise method.fake_updates; where pictures were never more than that, train longer or with more steps")


def gridded(case: Case) -> Finding | None:
    """Power at the period of patches or strides."""
    grid = case.last("look/grid")
    if grid is not None and grid > case.limits.grid:
        return Finding("grid artefacts", f"power at the period of patches or strides stands {grid:.1f} (ln) further out than in the "
                       "teacher's pictures", "lower method.gan_weight, train longer at a lower rate, or end with `polish`")
    return None


def past_its_best(case: Case) -> Finding | None:
    """A last exam that is worse than the best one, by more than chance allows; in the measure that chooses the best checkpoint."""
    chosen = "" if case.recipe is None else case.recipe.exam.best
    for name in sorted(name for name in case.curves if name.startswith(f"exam/{chosen}") and f"{name}_se" in case.curves):
        marks, errors = case.curves[name], case.curves[f"{name}_se"]
        best = min(range(len(marks)), key=marks.__getitem__)
        worse, error = marks[-1] - marks[best], math.hypot(errors[best], errors[-1])
        if worse > case.limits.exam * error:
            average = "" if f"exam_raw/{name[5:]}" in case.curves else " and keep an average of the weights (ema_decay), which jumps less"
            return Finding("past its best", f"{name} was {marks[best]:.3g} in exam {best + 1} of {len(marks)} and is {marks[-1]:.3g} in "
                           f"the last, {worse / max(error, 1e-12):.0f} standard errors more", "export the best checkpoint, with "
                           f"`stepdistill export --best`; to train on, lower the rates{average}")
    return None


RULES: tuple[Callable[[Case], Finding | None], ...] = (stuck, wrong_sign, lagging, unstable, saturated_discriminator, collapsed,
                                                       flat, oversaturated, mode_loss, gridded, past_its_best)


def _risen(found: Sequence[float]) -> float:
    """How many times its smallest value a curve has at its end."""
    return found[-1] / max(min(found), 1e-12)


# --------------------------------------------------------------------------------------------------------------------------------- export


def mismatch(run: Path, export: Path) -> list[Finding]:
    """Whether an exported folder is run as its student was trained, with the weights that the run would export now.

    FileNotFoundError or ValueError where the folder is no export, or damaged.
    """
    notes = read_notes(export)
    found = checkpoint.newest(run / (BEST if notes.get("best") else CHECKPOINTS), lambda line: None)
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: an export cannot be held against it")
    trained = SamplerSpec.from_dict(found[1]["sampler"]).to_dict()
    told = SamplerSpec.from_dict(notes["sampler"]).to_dict()
    odd = [f"{name} is {told[name]!r} and was trained as {value!r}" for name, value in trained.items() if told[name] != value]
    if "scheduler_sha256" in notes and scheduler_digest(export) != notes["scheduler_sha256"]:
        odd.append("its scheduler is not the one that was exported")
    if int(notes["step"]) != int(found[1]["step"]):
        odd.append(f"it is of step {notes['step']}, and the run is at {found[1]['step']}")
    if not notes["ema"] and any(name.startswith("ema/") for name in found[0]):
        odd.append("it holds the last weights, not their average")
    return [Finding("schedule mismatch at export", "; ".join(odd), f"export again: stepdistill export {run} --to FOLDER")] if odd else []


def shown(found: Diagnosis) -> str:
    """For a person."""
    head = f"{found.method}, {found.step} of {found.steps} steps: "
    lines = [head + ("no illness seen" if not found.findings else f"{len(found.findings)} found")]
    for one in found.findings:
        lines += ["", one.illness, f"  evidence  {one.evidence}", f"  remedy    {one.remedy}"]
    if found.unseen:
        lines += ["", "not examined:", *(f"  {what}" for what in found.unseen)]
    return "\n".join(lines)
