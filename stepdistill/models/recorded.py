"""What was learnt of a pipeline: its network as a Denoiser, and how its conditions and pictures are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.drive import Driven
from stepdistill.models.experts import Experts
from stepdistill.models.wiring import FromSample, Wiring, answered, at, leaves_of, primary, same

Inputs = Callable[[Sequence[str]], Mapping[str, Any]]                     # the pipeline's keywords for these prompts
SCALES = (3.0, 5.0)                                                       # guidance at which pipelines are asked, in their own number


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


def network_of(pipeline: Any, components: Sequence[str], boundaries: Sequence[float]) -> nn.Module:
    """The network of these components of a pipeline: several take turns at the boundaries."""
    networks = [getattr(pipeline, name) for name in components]
    return Experts(networks, boundaries) if boundaries else networks[0]
