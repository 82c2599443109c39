"""What a metric's paired differences are made of, for models of one seed and of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepdistill.eval import breakdown, seeds
from stepdistill.eval.measures import Found, Kind
from stepdistill.eval.metrics import Estimate


@dataclass(frozen=True)
class Pairing:
    """What each row left (None for one without features), and how two are subtracted."""

    kind: Kind
    made: Sequence[Found | None]

    def difference(self, row: int, other: int) -> Estimate | None:
        """Row minus other; None where one has nothing to subtract."""
        a, b = self.made[row], self.made[other]
        return None if a is None or b is None else self.kind.paired(a, b)

    def wins(self, row: int, other: int) -> breakdown.Wins | None:
        """On samples that are right or wrong, or on prompts that have a value; None where the metric knows neither, or only sets."""
        a, b = (None if found is None else found.values for found in (self.made[row], self.made[other]))
        if a is None or b is None or (a.dtype != torch.bool and self.kind.unit != "prompt"):
            return None
        return breakdown.wins(a > b, a < b)


@dataclass(frozen=True)
class OverSeeds:
    """The same of several seeds, whose samples are independent of each other's: the mean of their differences. Prompts are the same under
    all seeds, so of what is told per prompt the mean over seeds comes first."""

    each: Sequence[Pairing]

    def difference(self, row: int, other: int) -> Estimate | None:
        """Row minus other; None where a seed has nothing to subtract."""
        if self.each[0].kind.unit == "prompt":
            return self._joined(row, other).difference(0, 1)
        found = [difference for pairing in self.each if (difference := pairing.difference(row, other)) is not None]
        return seeds.mean(found) if len(found) == len(self.each) else None

    def wins(self, row: int, other: int) -> breakdown.Wins | None:
        """On the samples of all seeds, or on prompts."""
        return self._joined(row, other).wins(0, 1)

    def _joined(self, *rows: int) -> Pairing:
        """Of some rows, with the values of all seeds together."""
        return Pairing(self.each[0].kind, [self._of(row) for row in rows])

    def _of(self, row: int) -> Found | None:
        found = [pairing.made[row] for pairing in self.each]
        values = [one.values for one in found if one is not None and one.values is not None]
        if found[0] is None or len(values) < len(found):
            return None
        prompts = self.each[0].kind.unit == "prompt"
        return Found(found[0].estimate, values=torch.stack(values).double().mean(0) if prompts else torch.cat(values))
