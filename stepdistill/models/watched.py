"""A pipeline driven once with states and answers that spell out where each number came from: what a recording is read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.models.drive import Driven, Turn
from stepdistill.models.recorded import Branch, Inputs
from stepdistill.models.wiring import Unrecordable, answered, primary

BASE = 256                                                                # digits below it are exact in bfloat16
DIGITS = 4                                                                # enough for states of four thousand million elements
ZEROS, ONE_STATE, ONE_ANSWER, CODES = 2, 3, 4, 5                          # the turns of a run before those at five times


@dataclass(frozen=True)
class Probe:
    """One turn of a run: our time, and which numbers the state and the network's answer hold."""

    t: float
    state: str                                                            # own, zero, one, code0.., noise
    answer: str                                                           # network, zero, one, code0.., noise, close


def code(rows: int, size: int, digit: int) -> Tensor:
    """The digit of every element's own number, 1 .. rows·size, one row each."""
    return (torch.arange(1, rows * size + 1).reshape(rows, size) // BASE**digit % BASE).float()


def decoded(digits: Sequence[Tensor]) -> Tensor:
    """Element numbers, from 0, of what `code` wrote."""
    return torch.stack([digit.round().long() * BASE**d for d, digit in enumerate(digits)]).sum(0) - 1


def _noise(rows: int, size: int, tag: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(tag))


def _filled(kind: str, rows: int, size: int, tag: int) -> Tensor:
    if kind.startswith("code"):
        return code(rows, size, int(kind[4:]))
    return {"zero": torch.zeros, "one": torch.ones}[kind](rows, size) if kind != "noise" else _noise(rows, size, tag)


class Watched:
    """One driven run: what was asked, and what the pipeline made of it."""

    def __init__(self, driven: Driven, inputs: Inputs, prompts: Sequence[str], scale: float | None, probes: Sequence[Probe]):
        self.prompts, self.scale, self.probes = prompts, scale, probes
        self.templates: list[Any] = []
        self.turns = driven.drive(inputs(prompts), scale, [probe.t for probe in probes], states=self._state, answers=self._answer)

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
