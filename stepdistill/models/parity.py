"""Two proofs that a recording calls its network as the pipeline does, both against the pipeline itself.

Teacher-forced: at times, batch sizes, guidance and sizes that were not used for fitting, the pipeline's own loop is driven with its real
network, and what it hands its scheduler is compared with our prediction. Closed loop: the pipeline samples with a first-order scheduler
made from its own config, our sampler walks the same times from the same noise, and the last states are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.process import like
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.drive import Turn
from stepdistill.models.recorded import Inputs, Recording

PROMPTS = ("an old ship in a storm", "a blue circle")
TIMES = (0.83, 0.41, 0.17)
GUIDANCE = (2.3, 6.5)


@dataclass(frozen=True)
class Parity:
    """Largest differences over the largest value of the pipeline's own numbers: `forced` one call, `forced_other` at another size of the
    state, `mixed` one call with a time of its own for every sample against one call each, `loop` the whole sampling."""

    forced: float
    mixed: float
    loop: float
    forced_other: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @property
    def worst(self) -> float:
        return max(value for value in (self.forced, self.mixed, self.loop, self.forced_other) if value is not None)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def prove(recording: Recording, inputs: Inputs, other: Mapping[str, Any] | None = None) -> Parity:
    """Both proofs; `other` overrides keywords of the call for another size of the state."""
    bent = (lambda prompts: {**inputs(prompts), **(other or {})}) if other else None
    return Parity(forced(recording, inputs), mixed(recording, inputs), loop(recording, inputs), forced(recording, bent) if bent else None)


def forced(recording: Recording, inputs: Inputs) -> float:
    """The teacher-forced proof, for one and two prompts and two guidance numbers."""
    worst = 0.0
    for prompts in (PROMPTS[:1], PROMPTS):
        given = inputs(prompts)
        for number in GUIDANCE if recording.keyword else (None,):
            cond = recording.encode(given, len(prompts), *_number(number))
            turns = recording.driven.drive(given, number, TIMES, states=_noise)
            for turn in turns:
                t = recording.driven.time(turn.time)
                ours = predict(recording, turn.state[: len(prompts)], t.expand(len(prompts)), cond, number)
                worst = max(worst, difference(recording.driven.flip * ours, turn.output[: len(prompts)]))
    return worst


def _noise(i: int, turns: Sequence[Turn]) -> Tensor:
    return torch.randn(turns[0].state.shape, generator=torch.Generator().manual_seed(i)).to(turns[0].state)


def mixed(recording: Recording, inputs: Inputs) -> float:
    """A batch whose samples have different times against the samples one by one: what training needs and no pipeline does."""
    number = GUIDANCE[0] if recording.keyword else None
    cond = recording.encode(inputs(PROMPTS), len(PROMPTS), *_number(number))
    x_t = torch.randn(len(PROMPTS), *recording.shape, generator=torch.Generator().manual_seed(5))
    t = torch.tensor(TIMES[: len(PROMPTS)], dtype=torch.float64)
    together = predict(recording, x_t, t, cond, number)
    singly = [predict(recording, x_t[i : i + 1], t[i : i + 1], cond.slice(slice(i, i + 1)), number) for i in range(len(PROMPTS))]
    return difference(together, torch.cat(singly))


@torch.no_grad()
def loop(recording: Recording, inputs: Inputs, steps: int = 4) -> float:
    """The closed loop, over the scheduler's own grid for this number of steps."""
    given, number = inputs(PROMPTS), GUIDANCE[0] if recording.keyword else None
    cond = recording.encode(given, len(PROMPTS), *_number(number))
    walked = recording.driven.watch(given, number, steps)
    x_t = walked[0][1][: len(PROMPTS)].float()
    for (time, _, _), (after, _, _) in zip(walked, [*walked[1:], (None, None, None)], strict=True):
        t = recording.driven.time(time).expand(len(PROMPTS))
        s = recording.driven.end if after is None else recording.driven.time(after)
        prediction = recording.denoiser(x_t, t, cond, w=recording.w(number))
        process = recording.denoiser.process
        x_t = like(process.alpha(s), x_t) * prediction.x0 + like(process.sigma(s), x_t) * prediction.eps
    return difference(x_t, walked[-1][2][: len(PROMPTS)])


def predict(recording: Recording, x_t: Tensor, t: Tensor, cond: Conditioning, number: float | None) -> Tensor:
    """Our guided prediction in the network's own space."""
    with torch.no_grad():
        return recording.denoiser(x_t.float(), t, cond, w=recording.w(number)).raw


def _number(number: float | None) -> tuple[float, ...]:
    return () if number is None else (number,)
