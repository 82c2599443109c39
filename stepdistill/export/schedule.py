"""Which scheduler runs a student in its teacher's own pipeline, called with its number of steps.

A stock one where that is exact, and exactness is proved on the pipeline itself: the pipeline sets the scheduler's times, and the
scheduler's steps from known answers and known noise must end where our sampler ends. Tried in this order:

    DDPM table, re-noised       LCM whose `original_inference_steps` holds the grid: its k training points for equal steps, so that fewer
                                steps take some of them and more steps fail
    DDPM table, partly so       TCD with the share as `eta` at the call, which falls to whole training steps; its table's first step is made
                                clean, where TCD ends
    DDPM table, ODE             DDIM, trailing; TCD with `eta` 0, whose points it chooses as LCM does
    flow                        Euler without dynamic shifting, stochastic where re-noised: at the student's shift, and with that `shift`
                                and `shift_terminal` which put the pipeline's own equal sigmas onto the grid

Where none is exact, `pipelines/few_step_scheduler.py` travels with the weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import NoiseProcess, TableVP
from stepdistill.diffusion.sampler import SamplerSpec, steps
from stepdistill.diffusion.times import lcm_grid, trailing
from stepdistill.models.drive import Driven, drive, grid, parameters_of
from stepdistill.models.load import KINDS
from stepdistill.pipelines.few_step_scheduler import FewStepScheduler

STOCK_TABLES = ("linear", "scaled_linear", "squaredcos_cap_v2")                  # beta schedules that LCM and DDIM know, too
SAME = 1e-5                                                                      # relative, of float32 states after the whole walk


@dataclass(frozen=True)
class Plan:
    """How a student is run by a stock pipeline.

    `scheduler` is exact when the pipeline is told the number of steps and `call` (`eta` of TCD, or nothing); `stock` says that it is a
    class of diffusers. Where it is not, `other` may be one that is exact when the pipeline is called with `keywords` (the grid) instead.
    """

    scheduler: Any
    stock: bool
    call: Mapping[str, float] = field(default_factory=dict)
    other: Any = None
    keywords: Mapping[str, Any] = field(default_factory=dict)


def plan(driven: Driven, inputs: Mapping[str, Any], spec: SamplerSpec) -> Plan:
    """The scheduler for this sampler in this pipeline, which `inputs` are the keywords of, its guidance among them.

    Raises ValueError for a solver that exports do not run, and where the pipeline walks no scheduler as the student was trained: where it
    sets times of its own, or starts from unit noise whatever its scheduler says while the student starts from less.
    """
    if spec.solver != "ddim":
        raise ValueError(f"a student that is sampled with the solver {spec.solver} cannot be exported as a pipeline: only ddim can")
    if driven.door is not None:
        raise ValueError(f"a student of {type(driven.pipeline).__name__} cannot be exported as a pipeline: its scheduler keeps states in "
                         "another frame than its network's, which no few-step scheduler of this version does")
    refused: list[str] = []
    takes = parameters_of(driven.pipeline).keys()
    for candidate, call in (*_tables(driven, spec), *((euler, {}) for euler in _flows(driven, spec))):
        if call.keys() <= takes and _walks(candidate, driven, {**inputs, **call}, spec, refused):
            return Plan(candidate, True, call)
    own = few_steps(driven, spec)
    if not _walks(own, driven, inputs, spec, refused):
        raise ValueError(f"{type(driven.pipeline).__name__} cannot walk the steps that this student was trained for: {refused[-1]}")
    for candidate, keywords in _told(driven, spec):
        if keywords.keys() <= takes and _walks(candidate, driven, {**inputs, **keywords}, spec, refused):
            return Plan(own, False, other=candidate, keywords=keywords)
    return Plan(own, False)


def other_steps(chosen: Plan) -> str:
    """What a pipeline does when asked for another number of steps than its student was trained for."""
    scheduler = chosen.scheduler
    if not chosen.stock:
        return "raises an error"
    if not isinstance(scheduler, LCMScheduler | TCDScheduler):
        alone = " (one alone raises an error)" if scheduler.config.get("shift_terminal") else ""
        return f"is taken without a word, and runs other times than those it was trained for{alone}"
    most = scheduler.config.original_inference_steps
    return f"raises an error above {most}; below, it runs some of {most} equal steps without a word"


def few_steps(driven: Driven, spec: SamplerSpec) -> FewStepScheduler:
    """The scheduler of our own for any grid, start, clip and share of re-noising."""
    process = driven.process
    t = torch.tensor(spec.times, dtype=torch.float64)
    low = (1 - spec.renoise) * t[1:]
    kept = process.sigma(low) * process.alpha(t[1:]) / process.alpha(low)
    told = driven.times(spec.times)
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    return FewStepScheduler(
        [int(n) for n in told] if isinstance(process, TableVP) and all(n.is_integer() for n in told) else told,
        process.alpha(t).tolist(), process.sigma(t).tolist(), kept.tolist(), kinds[driven.kind], spec.clip_x0,
        float(process.prior_std(t[0])), driven.flip, spec.known_noise, driven.scheduler.config.num_train_timesteps)


def scheduler_of(teacher: Mapping[str, Any], spec: SamplerSpec) -> Any:
    """A stock scheduler on the teacher's noise process, as near to this sampler as one comes without a pipeline to prove it on.

    For pipelines that step on their own and ask their scheduler for the process. LCM for re-noising and DDIM (trailing) for the ODE on a
    DDPM table, Euler for flow matching. Tables that LCM and DDIM cannot build stay with DDPMScheduler.
    """
    if teacher["_class_name"].startswith("FlowMatch"):
        return _built(FlowMatchEulerDiscreteScheduler, {**teacher, "stochastic_sampling": spec.renoise == 1})
    whole = spec.times == trailing(len(spec.times))                              # any training step may be called, not every 20th only
    table = _table(teacher, spec)
    if table["trained_betas"] is None and table["beta_schedule"] not in STOCK_TABLES:
        return _built(DDPMScheduler, table)
    if spec.renoise < 1:
        return _built(DDIMScheduler, table)
    return _built(LCMScheduler, {**table, "original_inference_steps": table["num_train_timesteps"] if whole else 50})


# ---- candidates

def _table(teacher: Mapping[str, Any], spec: SamplerSpec) -> dict[str, Any]:
    return {**DDPMScheduler.from_config(dict(teacher)).config, "timestep_spacing": "trailing", "thresholding": False,
            "clip_sample": spec.clip_x0 is not None, "clip_sample_range": spec.clip_x0 or 1.0}


def _lcm(driven: Driven, spec: SamplerSpec, original: int) -> LCMScheduler:
    """`timestep_scaling` makes LCM's boundary term, which mixes the state into x0, too small for float32."""
    scaling = {"original_inference_steps": original, "timestep_scaling": 1e4}
    return _built(LCMScheduler, _table(driven.scheduler.config, spec) | scaling)


def _tcd(driven: Driven, spec: SamplerSpec, original: int) -> TCDScheduler:
    """TCD ends at training step 0: its noise goes into the second beta, so that this step is clean and all others stay."""
    first, second, *others = driven.scheduler.betas.double().tolist()
    betas = [0.0, 1 - (1 - first) * (1 - second), *others]
    return _built(TCDScheduler, _table(driven.scheduler.config, spec) | {"trained_betas": betas, "rescale_betas_zero_snr": False,
                                                                         "original_inference_steps": original})


def _tables(driven: Driven, spec: SamplerSpec) -> Iterator[tuple[Any, dict[str, float]]]:
    if not _is_stock_table(driven):
        return
    wanted, count, table = driven.times(spec.times), len(spec.times), driven.process.steps         # type: ignore[attr-defined]
    again = spec.renoise == 1 or count == 1
    if spec.renoise == 0 and not again:
        yield _built(DDIMScheduler, _table(driven.scheduler.config, spec) | {"set_alpha_to_one": True}), {}
    for original in range(count, table + 1):
        if driven.times(lcm_grid(count, original, table)) == wanted:
            yield (_lcm(driven, spec, original), {}) if again else (_tcd(driven, spec, original), {"eta": spec.renoise})
            return


def _is_stock_table(driven: Driven) -> bool:
    config = driven.scheduler.config
    known = config.get("trained_betas") is not None or config.get("beta_schedule") in STOCK_TABLES
    return isinstance(driven.process, TableVP) and isinstance(driven.scheduler, DDIMScheduler) and known


def _flows(driven: Driven, spec: SamplerSpec) -> Iterator[FlowMatchEulerDiscreteScheduler]:
    if not isinstance(driven.scheduler, FlowMatchEulerDiscreteScheduler) or not (spec.renoise in (0, 1) or len(spec.times) == 1):
        return
    sigmas = driven.process.sigma(torch.tensor(spec.times, dtype=torch.float64)).tolist()
    yield _euler(driven, spec, driven.scheduler.config.shift, None)
    table, count = driven.scheduler.config.num_train_timesteps, len(sigmas)
    # what the pipeline hands over: its own sigmas 1, 1 - 1/k, ..., or nothing, and the scheduler goes from 1 to its own smallest
    for gap in (lambda shift: 1 / count, lambda shift: (1 - shift / (table - 1 + shift)) / max(1, count - 1)):
        if (shift := _shift_onto(sigmas, gap)) is not None:
            yield _euler(driven, spec, shift, sigmas[-1])


def _shift_onto(sigmas: Sequence[float], gap: Callable[[float], float]) -> float | None:
    """The shift m that takes equal steps from 1, `gap(m)` apart, to these sigmas but for a linear stretch of 1 - sigma.

    Step i of them has 1 - sigma = c·i·d/(m - (m-1)·d·i), so that i/(1 - sigma) = A - B·i is a line, and m = 1/(1 - B/(A·d)).
    `shift_terminal` does the stretch. None where two steps ask for a shift that there is not.
    """
    last = len(sigmas) - 1
    if last < 1 or sigmas[0] != 1:
        return None
    first, end = 1 / (1 - sigmas[1]), last / (1 - sigmas[-1])
    b = (first - end) / max(1, last - 1)
    a, m = first + b, 1.0
    for _ in range(50):                                                          # d depends on m, by about m/1000
        if not (denominator := 1 - b / (a * gap(m))) > 0:
            return None
        m = 1 / denominator
    return m


def _euler(driven: Driven, spec: SamplerSpec, shift: float, terminal: float | None) -> FlowMatchEulerDiscreteScheduler:
    plain = {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": terminal, "use_karras_sigmas": False,
             "use_exponential_sigmas": False, "use_beta_sigmas": False}
    return _built(FlowMatchEulerDiscreteScheduler, {**driven.scheduler.config, **plain,
                                                    "stochastic_sampling": spec.renoise == 1 and len(spec.times) > 1})


def _told(driven: Driven, spec: SamplerSpec) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Stock schedulers that are given the grid at the call."""
    told = driven.times(spec.times)
    if spec.times[0] < 1:                                                        # no stock scheduler starts below pure noise
        return
    if _is_stock_table(driven) and all(n.is_integer() for n in told):
        table, times = driven.process.steps, {"timesteps": [int(n) for n in told]}                     # type: ignore[attr-defined]
        yield (_lcm(driven, spec, table), times) if spec.renoise == 1 else (_tcd(driven, spec, table), {**times, "eta": spec.renoise})
    if isinstance(driven.scheduler, FlowMatchEulerDiscreteScheduler) and spec.renoise in (0, 1):
        sigmas = driven.process.sigma(torch.tensor(spec.times, dtype=torch.float64)).tolist()
        yield _euler(driven, spec, 1.0, None), {"sigmas": [round(sigma, 8) for sigma in sigmas]}


def _built(cls: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler of this class from those values it knows; `from_config` would keep the others, and ignore those that were defaults."""
    return cls(**{k: v for k, v in config.items() if k in inspect.signature(cls.__init__).parameters})


# ---- the proof

@dataclass
class _Answers:
    """A network that says what it is told to."""

    process: NoiseProcess
    kind: str
    said: Iterator[Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, *, s: Tensor | None = None, w: float | None = None) -> Prediction:
        return Prediction(next(self.said), self.kind, x_t, self.process.alpha(t), self.process.sigma(t))


def _walks(scheduler: Any, driven: Driven, inputs: Mapping[str, Any], spec: SamplerSpec, refused: list[str]) -> bool:
    """Whether the pipeline with this scheduler walks as our sampler does; the reason why not goes to `refused`."""
    count = len(spec.times)
    try:
        times, sigmas = grid(driven.pipeline, inputs, count, scheduler)
    except (ValueError, AttributeError) as error:                                # takes no such grid, or lacks what the pipeline asks for
        refused.append(str(error))
        return False
    wanted = driven.times(spec.times)
    if len(times) != count or max(abs(a - b) for a, b in zip(times.tolist(), wanted, strict=True)) > 1e-3:
        refused.append(f"it sets the times {[round(t, 3) for t in times.tolist()]}, the student's are {[round(t, 3) for t in wanted]}")
        return False
    walker = copy.deepcopy(scheduler)
    walker.set_timesteps(count)
    walker.timesteps = times
    if sigmas is not None:
        walker.sigmas = sigmas
    theirs, ours = _end_of(walker, driven, inputs, spec), _our_end(driven, spec)
    if not bool((theirs - ours).norm() <= SAME * ours.norm()):
        refused.append(f"{type(scheduler).__name__} steps elsewhere")
        return False
    start, wanted_start = _start_of(scheduler, driven, inputs), float(driven.process.prior_std(torch.tensor(spec.times[0])))
    if abs(start - wanted_start) > SAME:
        refused.append(f"it starts from noise of standard deviation {start:.6g}, the student from {wanted_start:.6g}; train with "
                       "student.times that begin at 1")
        return False
    return True


def _numbers(spec: SamplerSpec, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 4, 4, 4, generator=generator) for _ in (None, *spec.times)]


def _known(spec: SamplerSpec) -> list[Tensor]:
    """The first state and the answers: beyond the bound on x0, so that a scheduler without one shows."""
    return _numbers(spec, 0, 3 * spec.clip_x0 if spec.clip_x0 else 1.0)


def _our_end(driven: Driven, spec: SamplerSpec) -> Tensor:
    (x, *said), noise = _known(spec), _numbers(spec, 1)
    net = _Answers(driven.process, driven.kind, iter(said))
    *_, last = steps(net, x, spec, None, Draws(0, range(2)), noise=lambda i: noise[i])
    return last.x0


def _end_of(scheduler: Any, driven: Driven, inputs: Mapping[str, Any], spec: SamplerSpec) -> Tensor:
    x, *said = _known(spec)
    given = {"generator": torch.Generator().manual_seed(1), "eta": inputs.get("eta", 0.0)}
    options = {k: v for k, v in given.items() if k in inspect.signature(scheduler.step).parameters}
    for t, y in zip(scheduler.timesteps, said, strict=True):
        x = scheduler.step(driven.flip * y, t, x, return_dict=False, **options)[0]
    return x


def _start_of(scheduler: Any, driven: Driven, inputs: Mapping[str, Any]) -> float:
    """The standard deviation of the noise that the pipeline starts from, which not every pipeline asks its scheduler for."""
    told = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if told == 1:
        return 1.0
    unit = copy.deepcopy(scheduler)
    unit.init_noise_sigma = 1.0
    first, plain = (drive(driven.pipeline, inputs, scheduler.timesteps.tolist(), scheduler=s, only=1)[0].state for s in (scheduler, unit))
    return float((first.float() * plain.float()).sum() / plain.float().square().sum())
