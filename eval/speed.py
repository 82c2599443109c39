"""How fast a model is: milliseconds of its network, text encoders and decoder, floating-point operations, and memory on a GPU.

Models take turns in one process, A B A B, so that heat and other work meet all of them alike. What a run reads lies on the device before it
begins. Papers differ in what they call a model's time, so three spans are told, each with those before it:

    denoiser        every call of the network that the sampler makes, both halves of guidance, and the sampler's own arithmetic
    with_text       the pipeline's text encoders, called as the pipeline calls them for these prompts; its tokenizer is not timed
    with_decoder    the way from the last state to pictures in [-1, 1]: the VAE, or what stands in its place

On a GPU spans lie between CUDA events, read after one synchronisation. That side was written without a GPU and has not been run on one yet.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import start, steps
from stepdistill.eval.models import Opened, open_model
from stepdistill.eval.score import environment
from stepdistill.eval.timings import SPANS
from stepdistill.models.attention import attention
from stepdistill.models.load import Codec, Vae
from stepdistill.models.prompted import LawCodec, PipelineCodec, PromptTeacher
from stepdistill.models.wiring import Unrecordable

PARTS = ("denoiser", "text", "decoder")
WARM, WARM_COMPILED, RUNS = 3, 10, 30                   # runs of a model before the clock starts, and the fewest that are timed
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}       # of the denoiser; encoders and decoder stay as they are stored

Work = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A model, and what makes pictures of its states: None for a pipeline whose pictures are more than its VAE's."""

    opened: Opened
    codec: Codec | None

    @classmethod
    def of(cls, opened: Opened) -> Subject:
        """With a pipeline's decoder apart from its tail, which would encode prompts again."""
        codec = opened.teacher.codec
        if not isinstance(codec, PipelineCodec):
            return cls(opened, codec)
        try:
            return cls(opened, LawCodec.of(codec))
        except Unrecordable:
            return cls(opened, None)

    @property
    def decoder(self) -> nn.Module | None:
        """The network that decodes, if one does."""
        vae = self.codec.model if isinstance(self.codec, Vae) else None
        if isinstance(self.codec, LawCodec) and self.codec.law is not None:
            vae = self.codec.law.vae
        return None if vae is None else vae.decoder

    def compile(self) -> None:
        """torch.compile of denoiser and decoder, every shape for itself."""
        for network in (self.opened.teacher.denoiser.network, self.decoder):
            if network is not None:
                network.compile(dynamic=False)


@dataclass(frozen=True)
class Timing:
    """A model at one batch size: milliseconds of each part in every timed run and of the whole first run; bytes on a GPU."""

    batch: int
    times: Sequence[Mapping[str, float]]
    cold: float
    memory: Mapping[str, int] | None

    @property
    def spans(self) -> dict[str, list[float]]:
        """Milliseconds of every run by span, without the spans whose own part the model lacks."""
        return {span: [sum(one.get(part, 0.0) for part in PARTS[: i + 1]) for one in self.times]
                for i, span in enumerate(SPANS) if PARTS[i] in self.times[0]}

    def to_dict(self, against: Timing | None = None) -> dict[str, Any]:
        """Plain JSON values; `faster` is, by span, the median over the rounds of the other's time over this one's."""
        found, other = self.spans, against.spans if against else {}
        whole = summary([sum(one.values()) for one in self.times])
        faster = {span: summary([b / a for a, b in zip(found[span], other[span], strict=True)])["median"]
                  for span in SPANS if span in found and span in other}
        return {"batch": self.batch, "cold_ms": self.cold, "ms": {span: summary(found[span]) if span in found else None for span in SPANS},
                "pictures_per_second": 1000 * self.batch / whole["median"], "faster": faster or None,
                "memory": None if self.memory is None else dict(self.memory)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    places = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(places).tolist()
    return {"median": middle, "p10": low, "p90": high}


class _Reached(Exception):
    """The pipeline has come to its network."""


def encoder_calls(teacher: PromptTeacher, prompts: Sequence[str], guidance: float) -> list[tuple[nn.Module, Mapping[str, Any]]]:
    """What a pipeline asks its encoders for these prompts at guidance w, before it first calls its network: modules with their arguments.

    At w = 1 most pipelines encode no negative prompt. Encoders that are asked in another way than by calling the module are not seen.
    """
    recording, calls = teacher.recording, list[tuple[nn.Module, Mapping[str, Any]]]()
    number = None
    if recording.keyword is not None:
        number = teacher.denoiser.guidance if recording.offset is None else guidance - recording.offset

    def note(turn: int, call: int, component: str, arguments: Mapping[str, Any]) -> None:
        if component in recording.components:
            raise _Reached
        calls.append((getattr(recording.driven.pipeline, component), arguments))

    with suppress(_Reached):
        recording.driven.drive(teacher.inputs(prompts), number, (0.9, 0.5), only=1, answers=note)
    return calls


def works_of(subject: Subject, batch: int) -> dict[str, Work]:
    """A model's parts, in the order they run, as calls without arguments; those that it lacks are left out.

    The decoder is given noise, which takes as long as a picture: no network runs here, or it would be compiled before the cold run.
    """
    teacher, spec, codec = subject.opened.teacher, subject.opened.spec, subject.codec
    labels, draws = torch.arange(batch) % max(1, teacher.classes), Draws(0, range(batch), device=teacher.device)
    z, cond = draws.each("start").normal(*teacher.shape), teacher.condition(labels)
    x = start(teacher.denoiser.process, spec, z)

    def denoise() -> Tensor:
        for step in steps(teacher.denoiser, x, spec, cond, draws, noise=lambda i: z):
            x0 = step.x0
        return x0

    works: dict[str, Work] = {}
    if isinstance(teacher, PromptTeacher):
        calls = encoder_calls(teacher, [teacher.prompts[i] for i in labels.tolist()], spec.guidance)
        if calls:
            works["text"] = lambda: [module(**arguments) for module, arguments in calls]
    works["denoiser"] = denoise
    if codec is not None:
        works["decoder"] = lambda: codec.decode(z)
    return works


def timed(works: Mapping[str, Work], device: torch.device) -> dict[str, float]:
    """Milliseconds of each part, run one after another."""
    if device.type == "cuda":
        stream, marks = torch.cuda.current_stream(device), [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        marks[0].record(stream)
        for work, mark in zip(works.values(), marks[1:], strict=True):
            work()
            mark.record(stream)
        torch.cuda.synchronize(device)
        return {name: a.elapsed_time(b) for name, (a, b) in zip(works, pairwise(marks), strict=True)}
    clock = [time.perf_counter()]
    for work in works.values():
        work()
        clock.append(time.perf_counter())
    return {name: 1000 * (b - a) for name, (a, b) in zip(works, pairwise(clock), strict=True)}


def peak(works: Mapping[str, Work], device: torch.device) -> dict[str, int] | None:
    """Bytes that torch's allocator held during a run, and those that all models held before it; None where no allocator counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    timed(works, device)
    return {"resident": resident, "allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}


def flops(work: Work, device: torch.device) -> int:
    """Floating-point operations of a call's matrix products, convolutions and attention, a multiply-add being two.

    The counter does not know the fused attention of a CPU, so plain mathematics takes its place there.
    """
    with torch.no_grad(), attention(device), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(subjects: Sequence[Subject], batches: Sequence[int], *, runs: int = RUNS, warm: int = WARM,
            tick: Callable[[], object] = lambda: None) -> list[list[Timing]]:
    """For each model its timings at each batch size: `warm` rounds and then `runs` timed ones, in each of which every model has its turn.

    The first of the warm runs is the cold one. `tick` is called after every run.
    """
    device, table = subjects[0].opened.teacher.device, list[list[Timing]]()

    def once(works: Mapping[str, Work]) -> dict[str, float]:
        found = timed(works, device)
        tick()
        return found

    with torch.inference_mode():
        for batch in batches:
            each = [works_of(subject, batch) for subject in subjects]
            rounds = [[once(works) for works in each] for _ in range(warm + runs)]
            table.append([Timing(batch, [row[i] for row in rounds[warm:]], sum(rounds[0][i].values()), peak(works, device))
                          for i, works in enumerate(each)])
    return [[row[i] for row in table] for i in range(len(subjects))]


def facts(subject: Subject) -> dict[str, Any]:
    """What no clock says: the model and its sampler, shapes, bytes of its network, operations of each part for one picture."""
    opened, works = subject.opened, works_of(subject, 1)
    network = opened.teacher.denoiser.network
    return {"model": opened.describe(), "sampler": {**opened.spec.to_dict(), "nfe": opened.spec.nfe}, "state": list(opened.teacher.shape),
            "picture": list(works["decoder"]().shape[1:]) if "decoder" in works else None,
            "weights_bytes": sum(v.nbytes for v in (*network.parameters(), *network.buffers())),
            "flops": {name: flops(work, opened.teacher.device) for name, work in works.items()}}


def bench(names: Sequence[str], *, against: str | None = None, steps: int | None = None, batches: Sequence[int] = (1, 8), runs: int = RUNS,
          compiled: bool = False, precision: str = "fp32", prompt: str | None = None, device: torch.device | str = "cpu",
          quiet: bool = False) -> dict[str, Any]:
    """Time these models in this many `steps`, and `against` in its own, with which they are compared; returns plain JSON values.

    Memory on a GPU is that of every model of the call: name one alone for its own peak. Raises ValueError or FileNotFoundError before
    anything is timed, where a model cannot be opened or sampled so.
    """
    if not names:
        raise ValueError("name at least one model to time: an exported folder, or teacher:fashion")
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise ValueError(f"batch sizes are different numbers of at least 1, got {', '.join(map(str, batches)) or 'none'}")
    if runs < 1:
        raise ValueError(f"at least one run must be timed, got {runs}")
    if precision not in AUTOCAST:
        raise ValueError(f"precision must be {' or '.join(AUTOCAST)}, got {precision!r}")
    started, began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    asked = [(name, steps) for name in names] + ([] if against is None else [(against, None)])
    prompts = () if prompt is None else (prompt,)
    subjects = [Subject.of(open_model(name, count, device=device, autocast=AUTOCAST[precision], prompts=prompts)) for name, count in asked]
    described, warm = [facts(subject) for subject in subjects], WARM_COMPILED if compiled else WARM
    if compiled:
        for subject in subjects:
            subject.compile()
    with tqdm(total=len(subjects) * len(batches) * (warm + runs), disable=quiet, file=sys.stderr, unit="run", desc="bench speed",
              dynamic_ncols=True) as bar:
        table = measure(subjects, batches, runs=runs, warm=warm, tick=bar.update)
    others: Sequence[Timing | None] = [None] * len(batches) if against is None else table[-1]
    rows = [{**fact, "batches": [timing.to_dict(None if other is timing else other) for timing, other in zip(timings, others, strict=True)]}
            for fact, timings in zip(described, table, strict=True)]
    return {"rows": rows, "against": against, "prompt": prompt, "runs": runs, "warm_up": warm,
            "env": {**environment(device), "precision": precision, "compiled": compiled, **kernels(torch.device(device))},
            "started": started, "seconds": round(time.monotonic() - began, 1)}


def kernels(device: torch.device) -> dict[str, str | None]:
    """What computes attention; of a GPU its driver and power limit, where nvidia-smi tells them."""
    if device.type != "cuda":
        return {"attention": "math", "driver": None, "power_limit": None}
    query = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", "--query-gpu=driver_version,power.limit",
             "--format=csv,noheader"]
    try:
        driver, power = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip().split(", ")
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"attention": "chosen by torch", "driver": None, "power_limit": None}
    return {"attention": "chosen by torch", "driver": driver, "power_limit": power}


def shown(report: Mapping[str, Any]) -> str:
    """For a person: a line for each model and batch size."""
    rows = [(row, timing) for row in report["rows"] for timing in row["batches"]]
    width, env = max(len(row["model"]["name"]) for row, _ in rows) + 2, report["env"]
    lines = [f"{'model':<{width}}{'batch':>5}{'NFE':>5}{'GFLOP':>9}" + "".join(f"{span.replace('_', ' '):>26}" for span in SPANS)
             + f"{'pictures/s':>12}{'cold':>9}{'' if report['against'] is None else 'faster':>9}".rstrip()]
    for row, timing in rows:
        cells = [f"{ms['median']:.2f} ({ms['p10']:.2f}-{ms['p90']:.2f})" if (ms := timing["ms"][span]) else "-" for span in SPANS]
        faster = f"{list(timing['faster'].values())[-1]:.2f}x" if timing["faster"] else ""
        lines += [f"{row['model']['name']:<{width}}{timing['batch']:>5}{row['sampler']['nfe']:>5}{row['flops']['denoiser'] / 1e9:>9.3g}"
                  + "".join(f"{cell:>26}" for cell in cells)
                  + f"{timing['pictures_per_second']:>12.1f}{timing['cold_ms']:>9.0f}{faster:>9}".rstrip()]
        if memory := timing["memory"]:
            mib = {name: f"{count / 2**20:.0f} MiB" for name, count in memory.items()}
            lines += [f"{'':<{width}}peak {mib['allocated']}, {mib['reserved']} reserved; {mib['resident']} of all models before"]
    what = env["device"] + (f", {env['threads']} threads" if env["device_type"] == "cpu" else "")
    how = f"{env['precision']}{', compiled' if env['compiled'] else ''}, on {what}"
    lines += [f"Milliseconds, median (p10-p90) of {report['runs']} runs in turn after {report['warm_up']} to warm up; {how}. Cold is the "
              "first run. GFLOP: of the denoiser for one picture, a multiply-add being two. NFE counts both halves of guidance."]
    if report["against"] is not None:
        lines += [f"Faster: the time of {report['against']} over this, in the widest span that both have."]
    return "\n".join(lines)
