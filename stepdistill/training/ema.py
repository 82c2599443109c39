"""Exponential moving average of the student, moved after student updates only."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stepdistill.models.experts import parts_of
from stepdistill.models.roles import follow


class Ema:
    """`network` is the average. The decay warms up as (1 + n)/(10 + n), so early averages forget the weights of the beginning.

    It is kept in float32 where the student is stored in less: a share of 1e-3 of a small difference is lost in half precision.
    """

    def __init__(self, student: nn.Module, decay: float):
        self.network, self.decay = copy.deepcopy(student).requires_grad_(False).eval(), decay
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.network.parameters()):
            self.network.float()

    @torch.no_grad()
    def distance(self, student: nn.Module) -> float:
        """Norm of the difference between the student's weights and their average, over the average's norm."""
        sums = [torch.stack([(mine - theirs.to(mine.dtype)).square().sum(), mine.square().sum()])
                for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True)]
        apart, size = torch.stack(sums).sum(0).sqrt().tolist()
        return float(apart / max(size, 1e-30))

    def after(self, student: nn.Module, count: int) -> None:
        """Move, after `count` student updates. Of several experts those that are frozen keep the average they had when they last moved."""
        for mine, theirs in zip(parts_of(self.network), parts_of(student), strict=True):
            if mine is self.network or any(p.requires_grad for p in theirs.parameters()):
                follow(mine, theirs, min(self.decay, (1 + count) / (10 + count)))
