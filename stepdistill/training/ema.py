"""Exponential moving average of the student, moved after student updates only."""

from __future__ import annotations

import copy

from torch import nn

from stepdistill.models.roles import follow


class Ema:
    """`network` is the average. The decay warms up as (1 + n)/(10 + n), so early averages forget the teacher's weights."""

    def __init__(self, student: nn.Module, decay: float):
        self.network, self.decay = copy.deepcopy(student).requires_grad_(False).eval(), decay

    def after(self, student: nn.Module, count: int) -> None:
        """Move, after `count` student updates."""
        follow(self.network, student, min(self.decay, (1 + count) / (10 + count)))
