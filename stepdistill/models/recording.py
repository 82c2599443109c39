"""The universal adapter: watch a pipeline call its network, and learn how it does it.

The pipeline is driven (`drive`) with states, times and network answers that spell out where each number came from, so that nothing is
guessed: a state whose every element carries its own index shows which elements of which argument are the sample, whatever was packed,
sliced or listed on the way; answers that carry theirs show what became of the output; five times show the clock; two guidance scales, two
batch sizes and prompts of unequal length show what the rest is. What is learnt is a `Wiring`; `record` returns it in a `Denoiser`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from stepdistill.models.denoiser import CLOCKS, Denoiser, default_taps
from stepdistill.models.doors import FEW_STEP, FRAMES, Door
from stepdistill.models.drive import Driven, Turn, parameters_of
from stepdistill.models.guidance import LAWS
from stepdistill.models.load import KINDS
from stepdistill.models.recorded import SCALES, Branch, Inputs, Recording, network_of
from stepdistill.models.watched import CODES, DIGITS, ONE_ANSWER, ONE_STATE, ZEROS, Probe, Watched, decoded
from stepdistill.models.wiring import (
    FromClock,
    FromCondition,
    FromSample,
    FromScale,
    Layout,
    Static,
    Unrecordable,
    Wiring,
    at,
    leaves_of,
    primary,
    same,
)

PROMPTS = ("a red apple", "a cat on a mat in the sun", "snow")           # two, three and others; of unequal length
OTHERS = ("two houses by the sea", "blue")
FIT = 1e-4                                                                # relative; of a law fitted to float32 numbers
HALF = 5e-2                                                               # the same where the pipeline computes in half precision
FIVE = (0.95, 0.75, 0.5, 0.3, 0.1)                                        # where clock and guidance are learnt


class Recorder:
    """Records one pipeline; `inputs(prompts)` makes the keywords of a call, without steps, guidance, noise and output."""

    def __init__(self, pipeline: Any, inputs: Inputs):
        self.driven, self.inputs = Driven(pipeline), inputs
        self.driven.fit_shift(inputs(PROMPTS[:2]), SCALES[0])
        steps = getattr(self.driven.process, "steps", 1000)
        t = lambda part: round(part * steps) / steps                                                             # noqa: E731
        middle = t(0.5)
        first = [Probe(t(0.9), "own", "network"), Probe(t(0.6), "noise", "network"), Probe(middle, "zero", "zero"),
                 Probe(middle, "one", "zero"), Probe(middle, "zero", "one"),
                 *(Probe(middle, f"code{d}", f"code{d}") for d in range(DIGITS))]
        answers = ("noise", "close", "noise", "close", "noise")
        self.probes = [*first, *(Probe(t(part), "noise", answer) for part, answer in zip(FIVE, answers, strict=True))]
        self.first = len(first)
        self.baked = self.coarse = False
        if self.driven.door is not None:
            self._enter(self.driven.door)

    def _enter(self, door: Door) -> None:
        """Learn the frame that the network is fed in, by how much of a state reaches it, and what it predicts, by what came of it."""
        probes = [Probe(t, state, answer) for t in FIVE for state, answer in (("zero", "zero"), ("one", "zero"), ("zero", "one"))]
        run = self._watch(PROMPTS[:2], SCALES[0], [*self.probes[:ZEROS], *probes])
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

    def _watch(self, prompts: Sequence[str], scale: float | None, probes: Sequence[Probe] = ()) -> Watched:
        return Watched(self.driven, self.inputs, prompts, scale, probes or self.probes)

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
        two = self._watch(PROMPTS[:2], SCALES[0])
        if self.driven.fit_frames(two.turns[0].state, two.batch):
            two = self._watch(PROMPTS[:2], SCALES[0])
        three = self._watch(PROMPTS, SCALES[0])
        others, scaled = self._watch(OTHERS, SCALES[0]), self._watch(PROMPTS[:2], SCALES[1])
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

    def _turns(self, run: Watched) -> tuple[list[str], list[float]]:
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
            run = self._watch(PROMPTS[:2], SCALES[0], [*self.probes[:ZEROS], *(Probe(t, "zero", "zero") for t in inner)])
            own = [t for t, turn in zip(inner, run.turns[ZEROS:], strict=True) if turn.calls[0].component == name]
            above, below = min([above, *own]), max([below, *set(inner).difference(own)])
        return (above + below) / 2

    # -- the sample

    def _blocks(self, run: Watched, call: int) -> list[Branch]:
        """The branches inside one call: its rows over the batch."""
        rows = {len(leaf) for leaf in self._sample_leaves(run, call)}
        if len(rows) != 1:
            raise Unrecordable("no argument of the network is the sample" if not rows else "the sample is given in several sizes")
        count = rows.pop()
        if count % run.batch:
            raise Unrecordable(f"the network sees {count} rows for a batch of {run.batch}")
        return [Branch(call, block, count // run.batch) for block in range(count // run.batch)]

    def _sample_leaves(self, run: Watched, call: int) -> list[Any]:
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

    def _one_a_sample(self, run: Watched, zero: Sequence[Any], one: Sequence[Any]) -> bool:
        """A list that is the sample, cut into one tensor for every row."""
        tensors = bool(zero) and all(isinstance(v, Tensor) for v in zero)
        return tensors and len(zero) % run.batch == 0 and not same(zero, one)

    def _from_sample(self, path: str, run: Watched, leaf: Callable[[int], Any], branch: Branch) -> FromSample:
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

    def _output(self, run: Watched) -> tuple[Layout, float]:
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

    def _law(self, run: Watched, scaled: Watched, branches: Sequence[Branch], layout: Layout,
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

    def _explains(self, run: Watched, turn: int, cond: Branch, null: Branch, offset: float, law: str, layout: Layout,
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

    def _walk(self, runs: Sequence[Watched], order: Sequence[Branch]) -> Mapping[str, Any]:
        """The argument list of a call, with the place where each of its values comes from."""
        branch = order[0]
        two, three, others, scaled = runs
        seen = [*(two.values(turn, branch) for turn in (self.first, self.first + 1, ZEROS, ONE_STATE)),
                three.values(self.first, branch), others.values(self.first, branch), scaled.values(self.first, branch)]
        return self._leaf("", seen, two, branch)

    def _leaf(self, path: str, seen: Sequence[Any], run: Watched, branch: Branch) -> Any:
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

    def _clock(self, path: str, run: Watched, branch: Branch) -> FromClock:
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

    def _scale(self, path: str, at_first: Any, at_second: Any, branch: Branch, run: Watched) -> FromScale | None:
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


def record(pipeline: Any, inputs: Inputs | None = None) -> Recording:
    """Record a pipeline. `inputs(prompts)` makes its keywords; by default they are `usual_inputs`."""
    return Recorder(pipeline, inputs or usual_inputs(pipeline)).record()
