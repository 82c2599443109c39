"""Drive a pipeline one turn at a time: its own `__call__`, with times, states and network answers of our choosing.

A pipeline knows how its network is called: packing, ids, clocks, guidance. We never copy that knowledge; we run the pipeline's own loop and
watch. `set_timesteps` is pinned to the times we ask about, `scheduler.step` hands back the state that we want next, and the network may be
replaced by answers that we choose. A turn is one pass of that loop. The run ends inside the last `step`, so nothing is decoded.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor, nn

from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.models.denoiser import CLOCKS
from stepdistill.models.doors import Frame, asks_twice, door_of, lists_end, pin, scaled
from stepdistill.models.load import first_order
from stepdistill.models.wiring import Unrecordable

GUIDER = "guider.guidance_scale"                                          # where guidance lives in an object and not in the call
GUIDANCE_KEYWORDS = ("true_cfg_scale", "guidance_scale", "decoder_guidance_scale")

_driven: ContextVar[bool] = ContextVar("driven", default=False)


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Answers = Callable[[int, int, str, Mapping[str, Any]], Any]              # (turn, call, component, arguments) -> output, or None


@dataclass(frozen=True)
class Call:
    """One call of a network: the component's name, the arguments that were given, by name, and what it answered."""

    component: str
    arguments: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Turn:
    """One pass of the pipeline's loop: the scheduler's time, the state it stepped from, the output it was given, the calls made for it."""

    time: Tensor
    state: Tensor
    output: Tensor
    calls: tuple[Call, ...] = field(repr=False)


class _Done(Exception):
    pass


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The keywords that the pipeline's `__call__` takes."""
    return inspect.signature(type(pipeline).__call__).parameters


def drive(pipeline: Any, inputs: Mapping[str, Any], times: Sequence[float], *,
          states: Callable[[int, Sequence[Turn]], Tensor] | None = None,
          answers: Answers | None = None, scheduler: Any = None, seed: int = 0,
          only: int | None = None, grad: bool = False) -> list[Turn]:
    """Run `pipeline(**inputs)` for these scheduler times and return its turns.

    `states(i, turns)` is the state of turn i >= 1 after those turns (turn 0 has the pipeline's own noise; without it states stay).
    `answers(turn, call, component, arguments)` may answer for a network; None lets the network run. `scheduler` stands in for the
    pipeline's own. `only` ends the run after so many turns. Raises Unrecordable where the pipeline never reaches `scheduler.step`.
    """
    chosen = copy.deepcopy(scheduler or pipeline.scheduler)
    turns: list[Turn] = []
    pending: list[Call] = []
    twice, wanted = asks_twice(chosen), only or len(times)

    def pinned(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            _known(original)(*args, **kwargs)
            pin(chosen, [*times, times[-1]] if twice else times)          # such a run ends at the network call after the last turn
        return set_timesteps

    def stepping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            again = kwargs.get("pred_original_sample") is not None
            if kwargs.get("per_token_timesteps") is not None:             # FlowMatchEuler then counts its velocity towards the data
                model_output = -model_output
            if twice and not again:
                model_output = chosen.precondition_outputs(sample, model_output, chosen.sigmas[chosen.step_index])
            calls = turns.pop().calls if again else tuple(pending)
            turns.append(Turn(_first(timestep), _kept(sample), _kept(model_output), calls))
            pending.clear()
            if len(turns) == wanted and not twice:
                raise _Done
            after = sample if states is None or len(turns) == wanted else states(len(turns), turns)
            if twice:
                chosen._step_index += 1
            x0 = model_output if twice else after
            return _Stepped(prev_sample=after, pred_original_sample=x0) if return_dict else (after, x0)
        return step

    def seen(name: str, arguments: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        if len(turns) == wanted:
            raise _Done
        kept = _kept(arguments)                                           # a pipeline may write into its state in place
        output = answers(len(turns), len(pending), name, kept) if answers else None
        output = run() if output is None else output
        pending.append(Call(name, kept, output))
        return output

    with _under(pipeline, chosen, stepping, pinned, _spying(seen)):
        _call(pipeline, inputs, len(times), seed, grad)
    if len(turns) < wanted:
        raise Unrecordable(f"{type(pipeline).__name__} made {len(turns)} calls of scheduler.step for {len(times)} times")
    return turns


def _known(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, deaf to keywords that only another scheduler takes."""
    takes = inspect.signature(function).parameters

    @functools.wraps(function)
    def deaf(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k in takes})
    return deaf


def grid(pipeline: Any, inputs: Mapping[str, Any], steps: int, scheduler: Any) -> tuple[Tensor, Tensor | None]:
    """(times, sigmas) that the pipeline sets its scheduler to, for this many steps; sigmas only where the scheduler keeps them."""
    chosen = copy.deepcopy(scheduler)

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            _known(original)(*args, **kwargs)
            raise _Done
        return set_timesteps

    with _under(pipeline, chosen, _known, stopping):
        _call(pipeline, inputs, steps, 0, False)
    return chosen.timesteps, getattr(chosen, "sigmas", None)


def watch(pipeline: Any, inputs: Mapping[str, Any], steps: int, *, scheduler: Any = None,
          seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(time, state, next state) of every step of `pipeline(**inputs)` with this scheduler, which does its own work."""
    chosen = copy.deepcopy(scheduler or pipeline.scheduler)
    walked: list[tuple[Tensor, Tensor, Tensor]] = []

    def stepping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            state = _kept(sample)
            result = original(model_output, timestep, sample, *args, **{k: v for k, v in kwargs.items() if v is not None})
            if kwargs.get("pred_original_sample") is not None:
                walked.pop()
            walked.append((_first(timestep), state, _kept(result[0])))
            if len(walked) == len(chosen.timesteps) and not asks_twice(chosen):
                raise _Done
            return result
        return step

    undecoded = {"output_type": "latent"} if asks_twice(chosen) or lists_end(chosen) else {}                  # it runs to its end
    with _under(pipeline, chosen, stepping):
        _call(pipeline, {**inputs, **undecoded}, steps, seed, False)
    return walked


def _first(timestep: Any) -> Tensor:
    """A scheduler's time, which some pipelines repeat for every sample."""
    return torch.as_tensor(timestep).flatten()[0]


def _call(pipeline: Any, inputs: Mapping[str, Any], steps: int, seed: int, grad: bool) -> Any:
    takes = parameters_of(pipeline)
    given = dict(inputs)
    if "num_inference_steps" in takes:
        given["num_inference_steps"] = steps
    if "generator" in takes and "generator" not in given:
        given["generator"] = torch.Generator().manual_seed(seed)
    call = type(pipeline).__call__
    before = _driven.set(True)
    try:
        with nullcontext() if grad else torch.no_grad(), suppress(_Done):
            return (inspect.unwrap(call) if grad else call)(pipeline, **given)
    finally:
        _driven.reset(before)
    return None


def driven() -> bool:
    """Whether a pipeline is run here now: what its networks are asked meanwhile is its doing, and often answered without them."""
    return _driven.get()


def finish(pipeline: Any, inputs: Mapping[str, Any], x0: Tensor, scheduler: Any, answers: Answers) -> Any:
    """The pipeline's output, had its last step ended at x0: what its tail makes of it, as arrays in [0, 1] (B, ..., C)."""
    chosen = copy.deepcopy(scheduler)

    def stepping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            after = x0.to(sample).repeat(len(sample) // len(x0), *(1,) * (x0.ndim - 1))              # a doubled state: both halves
            return _Stepped(prev_sample=after, pred_original_sample=after) if return_dict else (after, after)
        return step

    def seen(name: str, arguments: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        output = answers(0, 0, name, arguments)
        return run() if output is None else output

    with _under(pipeline, chosen, stepping, _known, _spying(seen)):
        return _call(pipeline, {**inputs, "output_type": "np"}, 2, 0, False)


class _Stepped(dict[str, Tensor]):
    """What a scheduler's step returns: read by attribute, key or index."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def _spying(see: Callable[[str, Mapping[str, Any], Callable[[], Any]], Any]) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """A wrapper of a component's forward that lets `see(component, arguments by name, run)` answer."""
    def spied(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return see(name, _by_name(signature, args, kwargs), lambda: original(*args, **kwargs))
        return forward
    return spied


def _by_name(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.requires_grad else value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items()}
    return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value


@contextmanager
def patched(owner: Any, name: str, wrap: Wrap) -> Iterator[None]:
    """An instance attribute that stands before the class's method, and is gone afterwards."""
    before = owner.__dict__.get(name)
    object.__setattr__(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


@contextmanager
def _under(pipeline: Any, scheduler: Any, step: Wrap, set_timesteps: Wrap = _known,
           forward: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None) -> Iterator[None]:
    """The pipeline with this scheduler and these wrappers of its methods and of every network's forward; afterwards as it was."""
    before = pipeline.scheduler
    with ExitStack() as stack:
        stack.callback(setattr, pipeline, "scheduler", before)
        pipeline.scheduler = scheduler
        stack.enter_context(patched(scheduler, "set_timesteps", set_timesteps))
        stack.enter_context(patched(scheduler, "step", step))
        for name, module in pipeline.components.items():
            if forward is not None and isinstance(module, nn.Module):
                stack.enter_context(patched(module, "forward", functools.partial(forward, name)))
        yield


class Driven:
    """A pipeline under a one-step scheduler, driven at our times: with its process, its prediction kind and its guidance keyword.

    States and outputs are the network's: scaled where the scheduler stands behind a door, with frames as an axis where it sees them as
    rows. `flip` is -1 where the scheduler counts its velocity towards the data. A stateful guider is replaced by plain guidance while
    driven.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.door = door_of(pipeline.scheduler)
        self.frame: Frame = "own"
        self.frames = 1                                                   # of one sample, where the scheduler sees each as a row
        self.scheduler, self.process, self.kind, self.clock = (
            (self.door.scheduler, self.door.process, self.door.given, self.door.clock) if self.door else first_order(pipeline.scheduler))
        self.flip = -1.0 if self.clock == "1000alpha" else 1.0
        self.guiders = [name for name in ("guider", "ocr_guider") if pipeline.components.get(name) is not None]
        takes = parameters_of(pipeline)
        self.keywords: list[str | None] = [GUIDER] if self.guiders else [k for k in GUIDANCE_KEYWORDS if k in takes] or [None]
        self.keyword = self.keywords[0]

    @contextmanager
    def guided(self, number: float | None) -> Iterator[Mapping[str, Any]]:
        """The keywords that ask for this guidance number."""
        before = {name: self.pipeline.components[name] for name in self.guiders}
        for name in before:
            setattr(self.pipeline, name, ClassifierFreeGuidance(guidance_scale=1.0 if number is None else number))
        try:
            yield {} if number is None or self.keyword in (None, GUIDER) else {str(self.keyword): number}
        finally:
            for name, guider in before.items():
                setattr(self.pipeline, name, guider)

    def fit_shift(self, inputs: Mapping[str, Any], number: float) -> None:
        """Take the shift that the pipeline chooses for this size; and where it tells the network the unshifted time, count that."""
        if self.clock != "1000sigma":
            return
        with self.guided(number) as scale:
            times, sigmas = grid(self.pipeline, {**inputs, **scale}, 8, self.scheduler)
        if sigmas is None:
            return
        u, s = times.double() / self.scheduler.config.num_train_timesteps, sigmas[: len(times)].double()
        inner = (u > 0) & (u < 1) & (s > 0) & (s < 1)
        if bool(((u - s).abs() <= 1e-3).all()) or not bool(inner.any()):
            return
        shifts = (s / (1 - s) * (1 - u) / u)[inner]
        if float((shifts - shifts[0]).abs().max()) > 0.02 * float(shifts[0]):
            raise Unrecordable("the scheduler's times and its sigmas are not one shift apart")
        self.process, self.clock = Flow(float(shifts.mean())), "1000t"

    def enter(self, frame: Frame, kind: str) -> None:
        """From here on states and outputs are those of the network, which is fed in this frame and predicts this kind."""
        assert self.door is not None
        self.frame, self.kind, self.process = frame, kind, self.door.framed(frame)

    def fit_frames(self, state: Tensor, batch: int) -> bool:
        """Whether a pipeline's own start for so many samples, (B·F, C, H, W), shows that it folds frames into rows; from here on they are
        unfolded. A state that is only doubled for guidance does not show it."""
        rows = len(state) // batch
        if rows == 1 or state.ndim != 4 or torch.equal(state, state[:batch].repeat(rows, 1, 1, 1)):
            return False
        self.frames = rows
        return True

    def _folded(self, x: Tensor) -> Tensor:
        return x if self.frames == 1 else x.transpose(1, 2).flatten(0, 1)

    def _unfolded(self, x: Tensor) -> Tensor:
        return x if self.frames == 1 else x.unflatten(0, (-1, self.frames)).transpose(1, 2)

    def times(self, ours: Sequence[float]) -> list[float]:
        """Our times as the scheduler counts them."""
        offset = self.door.offset if self.door else 0.0
        return [float(round(v + offset, 6)) for v in CLOCKS[self.clock](self.process, torch.tensor(ours, dtype=torch.float64)).tolist()]

    def time(self, theirs: Tensor) -> Tensor:
        """The scheduler's time as ours, float64."""
        if isinstance(self.process, TableVP):
            return (theirs.double() + 1) / self.process.steps
        if self.door:
            return self.process.time_of(-2 * self.door.ratio(theirs.double()).log())
        part = theirs.double() / self.scheduler.config.num_train_timesteps
        if self.clock == "1000t":
            return part
        sigma = part if self.clock == "1000sigma" else 1 - part
        return self.process.time_of(2 * ((1 - sigma).log() - sigma.log()))

    @property
    def end(self) -> Tensor:
        """Where the scheduler ends: clean, or at the first step of a table that ends there."""
        stops = isinstance(self.process, TableVP) and not self.scheduler.config.set_alpha_to_one
        return torch.tensor(1 / self.process.steps if stops else 0.0, dtype=torch.float64)     # type: ignore[attr-defined]

    def drive(self, inputs: Mapping[str, Any], number: float | None, times: Sequence[float], *,
              states: Callable[[int, Sequence[Turn]], Tensor] | None = None, **options: Any) -> list[Turn]:
        """`drive` at our times, in our frame, and at the pipeline's guidance number."""
        theirs = self.times(times)
        factors = None if self.door is None else self.door.factor(self.process, self.time(torch.tensor(theirs, dtype=torch.float64)))
        entered: list[Turn] = []

        def state(i: int, turns: Sequence[Turn]) -> Tensor:
            assert states is not None
            entered[i - 1 :] = [self._entered(turns[-1])]
            x = self._folded(states(i, entered))
            return x if factors is None else scaled(x, factors[i])

        with self.guided(number) as scale:
            turns = drive(self.pipeline, {**inputs, **scale}, theirs, scheduler=self.scheduler, states=states and state, **options)
        return [self._entered(turn) for turn in turns]

    def _entered(self, turn: Turn) -> Turn:
        turn = replace(turn, state=self._unfolded(turn.state), output=self._unfolded(turn.output))
        if self.door is None:
            return turn
        t = self.time(turn.time)
        return replace(turn, state=scaled(turn.state, 1 / self.door.factor(self.process, t)),
                       output=self.door.answer(turn.output, turn.state[: len(turn.output)], self.process, self.kind, t))

    def decode(self, x0: Tensor, inputs: Mapping[str, Any], answers: Answers) -> Tensor:
        """Pictures of clean states, in [0, 1], channels last."""
        with self.guided(None):
            output = finish(self.pipeline, inputs, self._folded(x0 * self.door.size if self.door else x0), self.scheduler, answers)
        pictures = next(iter(output.values()))
        return torch.as_tensor(pictures).float().reshape(len(x0), *pictures.shape[1:])

    def watch(self, inputs: Mapping[str, Any], number: float | None, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`watch` with the one-step scheduler, in our frame."""
        with self.guided(number) as scale:
            walked = watch(self.pipeline, {**inputs, **scale}, steps, scheduler=self.scheduler)
        walked = [(time, self._unfolded(state), self._unfolded(after)) for time, state, after in walked]
        if self.door is None:
            return walked
        t = torch.stack([*(self.time(time).cpu() for time, _, _ in walked), self.end])
        over = 1 / self.door.factor(self.process, t)
        return [(time, scaled(state, over[i]), scaled(after, over[i + 1])) for i, (time, state, after) in enumerate(walked)]
