"""The universal adapter: watch a pipeline call its network, and learn how it does it.

The pipeline is driven (`drive`) with states, times and network answers that spell out where each number came from, so that nothing is
guessed: a state whose every element carries its own index shows which elements of which argument are the sample, whatever was packed,
sliced or listed on the way; answers that carry theirs show what became of the output; five times show the clock; two guidance scales, two
batch sizes and prompts of unequal length show what the rest is. What is learnt is a `Wiring`; `record` returns it in a `Denoiser`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import CLOCKS, Denoiser, default_taps
from stepdistill.models.doors import FEW_STEP, FRAMES, Door
from stepdistill.models.drive import Driven, Turn, parameters_of
from stepdistill.models.experts import Experts
from stepdistill.models.guidance import LAWS
from stepdistill.models.load import KINDS
from stepdistill.models.wiring import (
    FromClock,
    FromCondition,
    FromSample,
    FromScale,
    Layout,
    Static,
    Unrecordable,
    Wiring,
    answered,
    at,
    leaves_of,
    primary,
    same,
)

Inputs = Callable[[Sequence[str]], Mapping[str, Any]]
PROMPTS = ("a red apple", "a cat on a mat in the sun", "snow")           # two, three and others; of unequal length
OTHERS = ("two houses by the sea", "blue")
SCALES = (3.0, 5.0)
BASE = 256                                                                # digits below it are exact in bfloat16
FIT = 1e-4                                                                # relative; of a law fitted to float32 numbers
HALF = 5e-2                                                               # the same where the pipeline computes in half precision
DIGITS = 4                                                                # enough for states of four thousand million elements
ZEROS, ONE_STATE, ONE_ANSWER, CODES = 2, 3, 4, 5                          # the turns of a run before those at five times
FIVE = (0.95, 0.75, 0.5, 0.3, 0.1)                                        # where clock and guidance are learnt


@dataclass(frozen=True)
class Branch:
    """One half of the guidance: which call of a turn, and which of the `of` blocks of its rows."""

    call: int
    block: int
    of: int


@dataclass(frozen=True)
class Recording:
    """What was learnt of a pipeline: a Denoiser, and how its condition is made.

    `component` is the network's name, and `shape` that of one state as the scheduler sees it. The pipeline's guidance `keyword` is None
    where it has none; its number plus `offset` is our w (None where the network, or the pipeline before it, embeds the number).
    """

    driven: Driven
    denoiser: Denoiser
    component: str
    shape: tuple[int, ...]
    keyword: str | None
    offset: float | None
    notes: tuple[str, ...]
    branches: tuple[Branch, ...]                                          # conditional first
    template: Any = field(repr=False)                                     # an output of the network
    row: tuple[int, ...] = ()                                             # the shape of one row of its sample, at the recorded size
    others: tuple[str, ...] = ()                                          # the components that answer later, where several take turns

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all networks, in the order in which a sampler meets them."""
        return (self.component, *self.others)

    @property
    def wiring(self) -> Wiring:
        wiring = self.denoiser.wiring
        assert isinstance(wiring, Wiring)
        return wiring

    def w(self, number: float | None) -> float:
        """Our guidance for the pipeline's number; 1 where it has none or embeds it itself."""
        return 1.0 if number is None or (self.offset is None and not self.wiring.embeds) else number + (self.offset or 0.0)

    def encode(self, inputs: Mapping[str, Any], batch: int, number: float = SCALES[0]) -> Conditioning:
        """The condition of these pipeline keywords, with its null where the pipeline guides: the same run, stopped at the first step.

        The pipeline's guidance number matters only where it is embedded before the network is called.
        """
        def answers(turn: int, call: int, component: str, arguments: Mapping[str, Any]) -> Any:
            return None if component not in self.components else self._stub(arguments)

        number = number if self.offset is None else SCALES[0]             # any that makes the pipeline guide
        turn = self.driven.drive(inputs, number if self.keyword else None, (0.9, 0.5), only=1, answers=answers)[0]
        calls = [call for call in turn.calls if call.component in self.components]
        cond, *null = (self.wiring.condition(calls[b.call].arguments, b.block, b.of, batch) for b in self.branches)
        return Conditioning(cond, {k: v for k, v in null[0].items() if not same(v, cond[k])} if null else None, self.wiring.shared)

    def decode(self, x0: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Pictures (B, H, W, C) or videos (B, F, H, W, C) in [0, 1], as the pipeline's own tail makes them of clean states."""
        def answers(turn: int, call: int, component: str, arguments: Mapping[str, Any]) -> Any:
            return None if component not in self.components else self._stub(arguments)

        return self.driven.decode(x0, inputs, answers)

    def _stub(self, arguments: Mapping[str, Any]) -> Any:
        """An answer of zeros; at another size than the recorded one the network itself must say what shape its answer has."""
        sample = next(at(arguments, path) for path, leaf in leaves_of(self.wiring.arguments) if isinstance(leaf, FromSample))
        return _blank(self.template, len(sample)) if tuple(sample[0].shape) == self.row else None


def _blank(template: Any, rows: int) -> Any:
    first = primary(template)
    blank = torch.zeros(rows, *first[0].shape, dtype=first[0].dtype, device=first[0].device)
    return answered(template, list(blank.unbind()) if isinstance(first, list | tuple) else blank)


# ---- the probes

@dataclass(frozen=True)
class _Probe:
    """One turn of a run: our time, and which numbers the state and the network's answer hold."""

    t: float
    state: str                                                            # own, zero, one, code0.., noise
    answer: str                                                           # network, zero, one, code0.., noise, close


def code(rows: int, size: int, digit: int) -> Tensor:
    """The digit of every element's own number, 1 .. rows·size, one row each."""
    return (torch.arange(1, rows * size + 1).reshape(rows, size) // BASE**digit % BASE).float()


def decoded(digits: Sequence[Tensor]) -> Tensor:
    """Element numbers, from 0, of what `_code` wrote."""
    return torch.stack([digit.round().long() * BASE**d for d, digit in enumerate(digits)]).sum(0) - 1


def _noise(rows: int, size: int, tag: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(tag))


def _filled(kind: str, rows: int, size: int, tag: int) -> Tensor:
    if kind.startswith("code"):
        return code(rows, size, int(kind[4:]))
    return {"zero": torch.zeros, "one": torch.ones}[kind](rows, size) if kind != "noise" else _noise(rows, size, tag)


class _Watched:
    """One driven run: what was asked, and what the pipeline made of it."""

    def __init__(self, recorder: Recorder, prompts: Sequence[str], scale: float | None, probes: Sequence[_Probe] = ()):
        self.prompts, self.scale, self.probes = prompts, scale, probes or recorder.probes
        self.templates: list[Any] = []
        times = [probe.t for probe in self.probes]
        self.turns = recorder.driven.drive(recorder.inputs(prompts), scale, times, states=self._state, answers=self._answer)

    @property
    def batch(self) -> int:
        return len(self.prompts)

    def _state(self, i: int, turns: Sequence[Turn]) -> Tensor:
        previous = turns[-1].state
        if len(previous) % self.batch:
            raise Unrecordable(f"the state {tuple(previous.shape)} has no batch of {self.batch} in its first axis")
        if i == ZEROS:
            self.templates = [call.output for call in turns[1].calls]
            if not self.templates:
                raise Unrecordable("the pipeline calls no network between two steps of its scheduler")
        values = _filled(self.probes[i].state, len(previous), previous[0].numel(), 7)
        return values.reshape(previous.shape).to(previous)

    def _answer(self, turn: int, call: int, component: str, arguments: Mapping[str, Any]) -> Any:
        if self.probes[turn].answer == "network":
            return None
        if call >= len(self.templates):
            raise Unrecordable(f"the pipeline calls its network {call + 1} times at one step and {len(self.templates)} times at another")
        return answered(self.templates[call], self.rows(call, self.probes[turn].answer, self.templates[call]))

    def rows(self, call: int, kind: str, template: Any) -> Any:
        """What a call is answered: every sample's rows hold the same numbers in every branch, unless they are noise."""
        first = primary(template)
        count, shape = len(first), tuple(first[0].shape)
        size = first[0].numel()
        repeat = max(1, count // self.batch)
        if kind in ("noise", "close"):
            values = _noise(count, size, 100 + call)
            if kind == "close":                                           # nearly alike and of another length: guidance makes it shorter
                number = torch.arange(count) // self.batch + call
                values = _noise(self.batch, size, 99).repeat(repeat, 1) * (1 + number * 0.2)[:, None] + 0.05 * values
        else:
            values = _filled(kind, self.batch, size, 0).repeat(repeat, 1)
        values = values.reshape(count, *shape).to(first[0])
        return list(values.unbind()) if isinstance(first, list | tuple) else values

    def values(self, turn: int, branch: Branch) -> Mapping[str, Any]:
        """The arguments of a branch's call."""
        return self.turns[turn].calls[branch.call].arguments


# ---- the recorder

class Recorder:
    """Records one pipeline; `inputs(prompts)` makes the keywords of a call, without steps, guidance, noise and output."""

    def __init__(self, pipeline: Any, inputs: Inputs):
        self.driven, self.inputs = Driven(pipeline), inputs
        self.driven.fit_shift(inputs(PROMPTS[:2]), SCALES[0])
        steps = getattr(self.driven.process, "steps", 1000)
        t = lambda part: round(part * steps) / steps                                                             # noqa: E731
        middle = t(0.5)
        first = [_Probe(t(0.9), "own", "network"), _Probe(t(0.6), "noise", "network"), _Probe(middle, "zero", "zero"),
                 _Probe(middle, "one", "zero"), _Probe(middle, "zero", "one"),
                 *(_Probe(middle, f"code{d}", f"code{d}") for d in range(DIGITS))]
        answers = ("noise", "close", "noise", "close", "noise")
        self.probes = [*first, *(_Probe(t(part), "noise", answer) for part, answer in zip(FIVE, answers, strict=True))]
        self.first = len(first)
        self.baked = self.coarse = False
        if self.driven.door is not None:
            self._enter(self.driven.door)

    def _enter(self, door: Door) -> None:
        """Learn the frame that the network is fed in, by how much of a state reaches it, and what it predicts, by what came of it."""
        probes = [_Probe(t, state, answer) for t in FIVE for state, answer in (("zero", "zero"), ("one", "zero"), ("zero", "one"))]
        run = _Watched(self, PROMPTS[:2], SCALES[0], [*self.probes[:ZEROS], *probes])
        turns = run.turns[ZEROS:]
        out = lambda i: turns[i].output[:1].double().flatten()                                                   # noqa: E731
        fed, p, q = (torch.stack(rows) for rows in zip(*(
            (_reached(turns[i], turns[i + 1]), out(i + 2) - out(i), out(i + 1) - out(i)) for i in range(0, len(turns), 3)), strict=True))
        if bool((p - p[:, :1]).abs().max() > FIT * p.abs().max()):
            raise Unrecordable("the network's answer reaches a part of the state only: the rest is a picture that the pipeline is given")
        self.coarse = primary(run.templates[0])[0].dtype in (torch.bfloat16, torch.float16)
        near = lambda a, b, size: bool(((a - b).abs() <= (HALF if self.coarse else FIT) * size).all())           # noqa: E731
        t = torch.tensor(FIVE, dtype=torch.float64, device=p.device)
        p, q = p[:, 0], q[:, 0]
        frames = [frame for frame in FRAMES if near(fed * door.factor(door.framed(frame), t) / door.size, torch.ones_like(t), 1)]
        if not frames:
            raise Unrecordable(f"the network is fed its state times {[round(v, 6) for v in fed.tolist()]}, which is in none of the frames "
                               f"{', '.join(FRAMES)}")
        for kind in KINDS.values():
            expected = door.parts(door.framed(frames[0]), kind, t)
            if any(near(sign * expected[0], p, p.abs() + q.abs()) for sign in (1, -1)) and near(expected[1], q, p.abs() + q.abs()):
                self.driven.enter(frames[0], kind)
                return
        raise Unrecordable(f"what the scheduler is given is {[round(v, 6) for v in p.tolist()]} times the network's answer and "
                           f"{[round(v, 6) for v in q.tolist()]} times the state, which fits none of {', '.join(KINDS.values())}")

    def record(self) -> Recording:
        """Raises Unrecordable, or ValueError from the pipeline's own checks."""
        for keyword in self.driven.keywords:                              # the first that guides: true guidance before an embedded number
            self.driven.keyword = keyword
            try:
                recording = self._record()
            except Unrecordable as error:
                if not self.coarse:
                    raise
                raise Unrecordable("its scheduler keeps states in another frame than its network's, and half precision is too coarse to "
                                   f"look through it ({error}): load it with dtype float32") from error
            if recording.keyword is not None:
                break
        return recording

    def _record(self) -> Recording:
        two = _Watched(self, PROMPTS[:2], SCALES[0])
        if self.driven.fit_frames(two.turns[0].state, two.batch):
            two = _Watched(self, PROMPTS[:2], SCALES[0])
        three = _Watched(self, PROMPTS, SCALES[0])
        others, scaled = _Watched(self, OTHERS, SCALES[0]), _Watched(self, PROMPTS[:2], SCALES[1])
        calls = two.turns[self.first].calls
        if any(len(turn.calls) != len(calls) for turn in two.turns[ZEROS:]):
            raise Unrecordable("the number of network calls changes from step to step")
        (component, *rest), boundaries = self._turns(two)
        notes = ["its guider is replaced by plain guidance"] if self.driven.guiders else []
        if rest:
            notes.append(f"{component} and {' and '.join(rest)} take turns, the next from t = "
                         f"{', '.join(f'{t:.4g}' for t in boundaries)} on down, all under one guidance")
        if isinstance(scheduler := self.driven.pipeline.scheduler, FEW_STEP):
            notes.append(f"{type(scheduler).__name__} samples few-step students, whose x0 is the end of a trajectory, not a mean")
        if self.driven.frame != "own":
            notes.append(f"its network is fed states in another frame ({self.driven.frame}) than its scheduler keeps: students can be "
                         "trained, and not yet exported as a pipeline")
        branches = [b for i, _ in enumerate(calls) for b in self._blocks(two, i)]
        layout, sign = self._output(two)
        order, offset, law = self._law(two, scaled, branches, layout, sign)
        self.baked = False
        skeleton = self._walk([two, three, others, scaled], order)
        state = two.turns[self.first].state
        wiring = Wiring(skeleton, layout, sign * self.driven.flip)
        if law != "linear":
            notes.append(f"guidance is not linear: {law}")
        network = network_of(self.driven.pipeline, (component, *rest), boundaries)
        taps: tuple[str, ...] = ()
        try:
            taps = default_taps(getattr(self.driven.pipeline, component))
        except ValueError as error:
            notes.append(str(error))
        if self.baked:
            notes.append("guidance is embedded before the network is called: it is part of the condition")
        denoiser = Denoiser(network, self.driven.process, self.driven.kind, self.driven.clock, taps=taps, wiring=wiring, law=law)
        keyword = self.driven.keyword if offset is not None or wiring.embeds or self.baked else None
        row = tuple(self._sample_leaves(two, order[0].call)[0][0].shape)
        return Recording(self.driven, denoiser, component, tuple(state.shape[1:]), keyword, offset, tuple(notes), tuple(order),
                         two.templates[order[0].call], row, tuple(rest))

    # -- the networks

    def _turns(self, run: _Watched) -> tuple[list[str], list[float]]:
        """(the components that answer, from noise on down; the times between them). Unrecordable where time alone does not choose."""
        said = [(probe.t, {call.component for call in turn.calls}) for probe, turn in zip(self.probes, run.turns, strict=True)][ZEROS:]
        answers = [(t, names.pop()) for t, names in sorted(said, key=lambda pair: pair[0], reverse=True) if len(names) == 1]
        runs = [(name, [t for t, _ in part]) for name, part in groupby(answers, key=lambda pair: pair[1])]
        names = [name for name, _ in runs]
        classes = {type(getattr(self.driven.pipeline, name)) for name in names}
        if len(answers) < len(said) or len(set(names)) < len(names) or len(classes) > 1:
            several = sorted({call.component for turn in run.turns[ZEROS:] for call in turn.calls})
            raise Unrecordable(f"several networks take part ({', '.join(several)}), and they are not of one class, or time alone does not "
                               "choose between them")
        if len(names) > 1 and self.inputs(PROMPTS[:2]).get(other := f"{self.driven.keyword}_2") is not None:
            raise Unrecordable(f"{other} guides the second network by a number of its own, and a teacher has one: leave it out, and "
                               f"{self.driven.keyword} is that of both")
        return names, [self._between(min(above), max(below), name) for (name, above), (_, below) in pairwise(runs)]

    def _between(self, above: float, below: float, name: str) -> float:
        """Where `name`, which answers at `above`, hands over: to a millionth, or halfway between two steps of a table."""
        steps = getattr(self.driven.process, "steps", None)
        while above - below > (1e-6 if steps is None else 1.5 / steps):
            inner = [below + (above - below) * i / 9 for i in range(8, 0, -1)]
            inner = inner if steps is None else sorted({round(t * steps) / steps for t in inner} - {above, below}, reverse=True)
            run = _Watched(self, PROMPTS[:2], SCALES[0], [*self.probes[:ZEROS], *(_Probe(t, "zero", "zero") for t in inner)])
            own = [t for t, turn in zip(inner, run.turns[ZEROS:], strict=True) if turn.calls[0].component == name]
            above, below = min([above, *own]), max([below, *set(inner).difference(own)])
        return (above + below) / 2

    # -- the sample

    def _blocks(self, run: _Watched, call: int) -> list[Branch]:
        """The branches inside one call: its rows over the batch."""
        rows = {len(leaf) for leaf in self._sample_leaves(run, call)}
        if len(rows) != 1:
            raise Unrecordable("no argument of the network is the sample" if not rows else "the sample is given in several sizes")
        count = rows.pop()
        if count % run.batch:
            raise Unrecordable(f"the network sees {count} rows for a batch of {run.batch}")
        return [Branch(call, block, count // run.batch) for block in range(count // run.batch)]

    def _sample_leaves(self, run: _Watched, call: int) -> list[Any]:
        found: list[Any] = []

        def look(zero: Any, one: Any) -> None:
            if isinstance(zero, Mapping):
                for key in zero:
                    look(zero[key], one.get(key))
            elif isinstance(zero, list | tuple) and len(zero) == len(one) and not self._one_a_sample(run, zero, one):
                for a, b in zip(zero, one, strict=True):
                    look(a, b)
            elif not same(zero, one):
                found.append(zero)

        look(run.turns[ZEROS].calls[call].arguments, run.turns[ONE_STATE].calls[call].arguments)
        return found

    def _one_a_sample(self, run: _Watched, zero: Sequence[Any], one: Sequence[Any]) -> bool:
        """A list that is the sample, cut into one tensor for every row."""
        tensors = bool(zero) and all(isinstance(v, Tensor) for v in zero)
        return tensors and len(zero) % run.batch == 0 and not same(zero, one)

    def _from_sample(self, path: str, run: _Watched, leaf: Callable[[int], Any], branch: Branch) -> FromSample:
        """Which element of the state each element of an argument is."""
        listed = isinstance(leaf(ZEROS), list | tuple)
        rows = lambda turn: torch.stack(list(leaf(turn))).float().flatten(1) if listed else leaf(turn).float().flatten(1)   # noqa: E731
        zero, span = rows(ZEROS), rows(ONE_STATE) - rows(ZEROS)
        part = span != 0
        if bool(((span - 1).abs() > FIT)[part].any()):
            raise Unrecordable(f"the pipeline scales the state by {float(span[part].flatten()[0]):.6g} before its network sees it")
        size = run.turns[ZEROS].state[0].numel()
        codes = decoded([rows(CODES + d) - zero for d in range(DIGITS)])
        owner, index = codes // size, codes % size
        if not bool(part.all()):
            owner, index = torch.where(part, owner, owner.amax(1, keepdim=True)), torch.where(part, index, -1)
        expected = torch.arange(run.batch).repeat(branch.of)[:, None]
        if bool((owner.cpu() != expected).any()) or bool((index != index[:1]).any()):
            raise Unrecordable("the samples of a batch are not one after the other in the network's argument")
        layout = Layout.of(index[0].cpu(), tuple(run.turns[ZEROS].state.shape[1:]), tuple(leaf(ZEROS)[0].shape))
        if layout.how == "cat" and listed:
            raise Unrecordable("the sample is a part of each tensor of a list")
        return FromSample(layout, listed, path if layout.how == "cat" else "")

    # -- the output

    def _output(self, run: _Watched) -> tuple[Layout, float]:
        """(where the elements of the network's output go, their sign)."""
        out = lambda turn: run.turns[turn].output[: run.batch].float().flatten(1)                                # noqa: E731
        if run.turns[ZEROS].output.shape != run.turns[ZEROS].state.shape:
            raise Unrecordable(f"the output {tuple(run.turns[ZEROS].output.shape)} has not the shape of the state")
        if bool((out(ZEROS).abs() > FIT).any()) or bool((out(ONE_STATE).abs() > FIT).any()):
            raise Unrecordable("what the scheduler is given depends on the state itself, not on the network's answer alone")
        ones = out(ONE_ANSWER)
        sign = round(float(ones[0, 0]))
        if abs(sign) != 1 or bool((ones - sign).abs().max() > FIT):
            raise Unrecordable("the network's answer is scaled before the scheduler sees it")
        first = primary(run.templates[0])
        size, shape = first[0].numel(), tuple(first[0].shape)
        codes = decoded([sign * out(CODES + d) for d in range(DIGITS)])
        index = codes % size
        if bool((codes // size != torch.arange(run.batch)[:, None].to(codes.device)).any()) or bool((index != index[:1]).any()):
            raise Unrecordable("the network's answers reach the scheduler in another order of samples")
        return Layout.of(index[0].cpu(), shape, tuple(run.turns[ZEROS].state.shape[1:])), float(sign)

    # -- guidance

    def _law(self, run: _Watched, scaled: _Watched, branches: Sequence[Branch], layout: Layout,
             sign: float) -> tuple[list[Branch], float | None, str]:
        """(the branches, conditional first; w minus the pipeline's number; the row of guidance.LAWS)."""
        if len(branches) == 1:
            return list(branches), None, "linear"
        if len(branches) > 2:
            raise Unrecordable(f"the pipeline asks its network {len(branches)} times a step: more than guidance needs")
        for cond, null in (tuple(branches), tuple(reversed(branches))):
            for offset in (0.0, 1.0):
                for law in LAWS:
                    if all(self._explains(r, turn, cond, null, offset, law, layout, sign)
                           for r in (run, scaled) for turn in range(self.first, len(self.probes))):
                        return [cond, null], offset, law
        raise Unrecordable("how the pipeline mixes its conditional and unconditional answers is in no row of guidance.LAWS, or changes "
                           "from step to step")

    def _explains(self, run: _Watched, turn: int, cond: Branch, null: Branch, offset: float, law: str, layout: Layout,
                  sign: float) -> bool:
        seen = run.turns[turn].output[: run.batch].float()

        def answer(branch: Branch) -> Tensor:
            rows = run.rows(branch.call, self.probes[turn].answer, run.templates[branch.call])
            rows = torch.stack(list(rows)) if isinstance(rows, list) else rows
            rows = rows[branch.block * run.batch : (branch.block + 1) * run.batch].float()
            return layout(rows, seen.shape[1:])

        c, n = answer(cond), answer(null)
        w = float(run.scale or 0) + offset
        guided = LAWS[law](c, n + w * (c - n))
        half = primary(run.templates[cond.call])[0].dtype in (torch.bfloat16, torch.float16)
        return bool((sign * guided - seen).abs().max() <= (HALF if half else 10 * FIT) * seen.abs().max())

    # -- the arguments

    def _walk(self, runs: Sequence[_Watched], order: Sequence[Branch]) -> Mapping[str, Any]:
        """The argument list of a call, with the place where each of its values comes from."""
        branch = order[0]
        two, three, others, scaled = runs
        seen = [*(two.values(turn, branch) for turn in (self.first, self.first + 1, ZEROS, ONE_STATE)),
                three.values(self.first, branch), others.values(self.first, branch), scaled.values(self.first, branch)]
        return self._leaf("", seen, two, branch)

    def _leaf(self, path: str, seen: Sequence[Any], run: _Watched, branch: Branch) -> Any:
        a, later, zero, one, three, _, scaled = seen
        below = lambda key: f"{path}.{key}" if path else str(key)                                                # noqa: E731
        if isinstance(a, Mapping):
            keys = list(dict.fromkeys(k for value in seen for k in (value or {})))
            return {key: self._leaf(below(key), [(value or {}).get(key) for value in seen], run, branch) for key in keys}
        listed = isinstance(a, list | tuple)
        if listed and all(isinstance(v, list | tuple) and len(v) == len(a) for v in seen):
            return type(a)(self._leaf(below(i), [value[i] for value in seen], run, branch) for i in range(len(a)))
        if not same(zero, one):
            return self._from_sample(path, run, lambda turn: at(run.values(turn, branch), path), branch)
        if not same(a, later):
            return self._clock(path, run, branch)
        if not same(a, scaled) and (number := self._scale(path, a, scaled, branch, run)):
            return number
        self.baked |= not same(a, scaled)
        if listed:
            return FromCondition(path)
        if (axis := _batch_axis(a, three)) is not None:
            rows = a.shape[axis] // (run.batch * branch.of)
            return FromCondition(path, axis, rows)
        fixed = all(v is None or isinstance(v, bool | str) for v in seen) and all(same(a, v) for v in seen)
        return Static(a) if fixed else FromCondition(path, shared=True)

    def _clock(self, path: str, run: _Watched, branch: Branch) -> FromClock:
        values = [at(run.values(turn, branch), path) for turn in range(self.first, len(self.probes))]
        numbers = []
        for value in values:
            flat = value.flatten().double() if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)
            if bool((flat != flat[0]).any()):
                raise Unrecordable(f"the time {path} differs within a batch")
            numbers.append(float(flat[0]))
        t = torch.tensor([p.t for p in self.probes[self.first :]], dtype=torch.float64)
        y = torch.tensor(numbers, dtype=torch.float64)
        tolerance = FIT if not isinstance(values[0], Tensor) or values[0].dtype in (torch.float32, torch.float64, torch.int64) else 1e-2
        for basis in dict.fromkeys([self.driven.clock, *CLOCKS]):
            if basis == "index" and self.driven.clock != "index":
                continue
            x = CLOCKS[basis](self.driven.process, t)
            design = torch.stack([x, torch.ones_like(x)], 1)
            size = float(y.abs().max())
            fitted = torch.linalg.lstsq(design, y).solution.tolist()
            a, b = _rounded(fitted[0], size / float(x.abs().max())), _rounded(fitted[1], size)
            if float((a * x + b - y).abs().max()) <= tolerance * size:
                return FromClock(basis, a, b, _tail(values[0], run.batch * branch.of), path)
        following = torch.tensor(self.driven.times(t[1:].tolist()), dtype=torch.float64)
        if float((y[:-1] - following).abs().max()) <= tolerance * size:
            raise Unrecordable(f"{path} is the time of the next step: the network answers for pairs of times, a teacher for one")
        raise Unrecordable(f"the network's time {path} is linear in none of {', '.join(CLOCKS)}: {[round(v, 4) for v in numbers]}")

    def _scale(self, path: str, at_first: Any, at_second: Any, branch: Branch, run: _Watched) -> FromScale | None:
        """Guidance as one number a sample; None where it comes as an embedding, which is then a leaf of the condition."""
        if not all(isinstance(v, Tensor | int | float) for v in (at_first, at_second)):
            raise Unrecordable(f"the argument {path} is a {type(at_first).__name__} that is made anew for every call")
        ends = [v.double().flatten() if isinstance(v, Tensor) else torch.tensor([v], dtype=torch.float64) for v in (at_first, at_second)]
        if any(bool((v != v[0]).any()) for v in ends):
            return None
        ys = [float(v[0]) for v in ends]
        a = (ys[1] - ys[0]) / (SCALES[1] - SCALES[0])
        return FromScale(_rounded(a, abs(a)), _rounded(ys[0] - a * SCALES[0], abs(ys[0])), _tail(at_first, run.batch * branch.of))


def _reached(zero: Turn, one: Turn) -> Tensor:
    """What became of a state of ones on the way to the network."""
    first, second = zero.calls[0].arguments, one.calls[0].arguments
    for path, value in leaves_of(first):
        if not same(value, at(second, path)):
            span = (at(second, path).double() - value.double()).flatten()
            return span[span.abs().argmax()]
    raise Unrecordable("no argument of the network is the sample")


def _tail(value: Any, rows: int) -> tuple[int, ...] | None:
    """The axes after the batch; None for one Python number. A network that takes one tensor for all takes one per sample, too."""
    if not isinstance(value, Tensor):
        return None
    if value.ndim and len(value) not in (rows, 1):
        raise Unrecordable(f"a number of shape {tuple(value.shape)} for {rows} samples")
    return tuple(value.shape[1:])


def _rounded(value: float, size: float) -> float:
    """A fitted number without the noise of the fit: 1000.0003 is 1000, and 1e-8 of what matters is 0."""
    near = float(f"{value:.4g}")
    if abs(value) <= FIT * size:
        return 0.0
    return near if abs(near - value) <= FIT * size else value


def _batch_axis(two: Any, three: Any) -> int | None:
    if not isinstance(two, Tensor) or not isinstance(three, Tensor) or two.ndim != three.ndim:
        return None
    differing = [i for i, (m, n) in enumerate(zip(two.shape, three.shape, strict=True)) if m != n]
    if not differing:
        return None
    if len(differing) > 1 or two.shape[differing[0]] * 3 != three.shape[differing[0]] * 2:
        raise Unrecordable(f"an argument of shape {tuple(two.shape)} for a batch of two is {tuple(three.shape)} for three")
    return differing[0]


def usual_inputs(pipeline: Any, **extra: Any) -> Inputs:
    """What prompts are to a pipeline: text, class labels, or only their number. `extra` keywords (height, width, num_frames) go along.

    Pipelines with a true guidance scale that is on by default get empty negative prompts, without which they do not guide.
    """
    takes = parameters_of(pipeline)
    if unknown := sorted(set(extra) - set(takes)):
        near = difflib.get_close_matches(unknown[0], takes, 1)
        raise ValueError(f"{type(pipeline).__name__} takes no {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    true_guidance = takes.get("true_cfg_scale")

    def inputs(prompts: Sequence[str]) -> Mapping[str, Any]:
        if "prompt" in takes:
            given: dict[str, Any] = {"prompt": list(prompts)}
            if "negative_prompt" in takes and true_guidance is not None and (true_guidance.default or 0) > 1:
                given["negative_prompt"] = [" "] * len(prompts)
        elif "class_labels" in takes:
            given = {"class_labels": [len(prompt) % 10 for prompt in prompts]}
        elif "batch_size" in takes:
            given = {"batch_size": len(prompts)}
        else:
            raise Unrecordable(f"{type(pipeline).__name__} takes neither prompts nor class labels nor a batch size")
        if "intermediate_timesteps" in takes:                             # SANA-Sprint's default is for two steps only
            given["intermediate_timesteps"] = None
        return {**given, **extra}

    return inputs


def network_of(pipeline: Any, components: Sequence[str], boundaries: Sequence[float]) -> nn.Module:
    """The network of these components of a pipeline: several take turns at the boundaries."""
    networks = [getattr(pipeline, name) for name in components]
    return Experts(networks, boundaries) if boundaries else networks[0]


def record(pipeline: Any, inputs: Inputs | None = None) -> Recording:
    """Record a pipeline. `inputs(prompts)` makes its keywords; by default they are `usual_inputs`."""
    return Recorder(pipeline, inputs or usual_inputs(pipeline)).record()
