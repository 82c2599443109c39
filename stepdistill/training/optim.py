"""Optimizers and schedules, one per role, each counting its own role's updates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.models.roles import Roles
from stepdistill.recipe import OptimRecipe


def rate(recipe: OptimRecipe, count: int, horizon: int) -> float:
    """Learning rate of update `count` (from 0) of `horizon`."""
    warm = min(1.0, (count + 1) / (recipe.warmup + 1))
    begin = recipe.decay_from * horizon
    share = min(1.0, max(0.0, (count - begin) / max(1.0, horizon - begin)))
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[recipe.schedule]
    return recipe.lr * warm * fall


def make(parameters: list[torch.nn.Parameter], recipe: OptimRecipe) -> torch.optim.Optimizer:
    """An optimizer; ValueError where the 8-bit one is asked for and its library is not installed."""
    options: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if recipe.name == "radam":
        return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optim.name adamw8bit needs bitsandbytes: pip install 'stepdistill[adam8bit]'") from error
    return AdamW8bit(parameters, **options)


def check_weights_can_move(roles: Roles, name: str, lr: float) -> None:
    """Refuse half-precision storage whose rounding swallows the updates: ValueError with the reason.

    Adam moves a weight by about lr; a half-precision weight w keeps no change below |w|·eps/2 (eps 2^-7 for bfloat16).
    """
    half = [p for p in roles.parameters(name) if p.dtype in (torch.bfloat16, torch.float16)]
    if not half:
        return
    typical = torch.cat([p.detach().flatten().float().abs() for p in half]).median().item()
    smallest = typical * torch.finfo(half[0].dtype).eps / 2
    if lr < smallest:
        kind = str(half[0].dtype).removeprefix("torch.")
        raise ValueError(f"{name} is stored in {kind}, where a typical weight ({typical:.1e}) keeps no change below {smallest:.1e}: "
                         f"at lr {lr:.1e} it would never move. Set weights: float32 (precision: bf16 stays as fast)")


def some_of(parameters: Sequence[Tensor], each: int = 256) -> list[Tensor]:
    """Copies of about `each` numbers of every parameter, evenly spread."""
    return [p.detach().flatten()[:: max(1, p.numel() // each)].clone() for p in parameters]


def change(before: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[float, float]:
    """(share of the weights that are stored differently now, size of the change over theirs), from what `some_of` kept of each tensor.

    The share is near 0 while the rate is not: updates are rounded away, the commonest silent failure of half-precision storage.
    """
    sums = []
    for a, b, p in zip(before, some_of(parameters), parameters, strict=True):
        parts = torch.stack([(a != b).float(), (b.float() - a.float()).square(), a.float().square()])
        sums.append(parts.mean(1) * p.numel())
    differ, moved, size = torch.stack(sums).sum(0).tolist()
    return differ / sum(p.numel() for p in parameters), math.sqrt(moved / max(size, 1e-30))


class Optimizers:
    """Steps, clipping, learning rates and counts of every trained role."""

    def __init__(self, roles: Roles, recipes: Mapping[str, OptimRecipe], horizons: Mapping[str, int],
                 restarts: Mapping[str, Sequence[int]] | None = None):
        """`horizons` are the updates of each role; at those of `restarts` its schedule starts afresh and ends at the next."""
        self.roles, self.recipes, self.horizons, self.restarts = roles, recipes, horizons, restarts or {}
        for name in roles.trains:
            check_weights_can_move(roles, name, recipes[name].lr)
        self.counts = dict.fromkeys(roles.trains, 0)
        self._optimizers = {name: make(roles.parameters(name), recipes[name]) for name in roles.trains}

    def reset(self, name: str) -> None:
        """Forget a role's moments; its count goes on, and `restarts` say what becomes of its schedule."""
        self._optimizers[name] = make(self.roles.parameters(name), self.recipes[name])

    def step(self, names: Sequence[str], watched: Collection[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
        """Clip, step and clear these roles: (their gradient norms, `change` of each `watched` one as moved/NAME and update/NAME).

        A non-finite norm moves none of them.
        """
        norms = {}
        for name in names:
            limit = self.recipes[name].clip
            norms[name] = torch.nn.utils.clip_grad_norm_(self.roles.parameters(name), limit or math.inf).item()
        before = {name: some_of(self.roles.parameters(name)) for name in names if name in watched}
        if all(math.isfinite(n) for n in norms.values()):
            for name in names:
                for group in self._optimizers[name].param_groups:
                    group["lr"] = self._rate(name)
                self._optimizers[name].step()
                self.counts[name] += 1
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        changes = {name: change(kept, self.roles.parameters(name)) for name, kept in before.items()}
        return norms, {f"{what}/{name}": value for name, found in changes.items()
                       for what, value in zip(("moved", "update"), found, strict=True)}

    def rates(self) -> dict[str, float]:
        """The learning rate of each role's next update."""
        return {name: self._rate(name) for name in self.counts}

    def _rate(self, name: str) -> float:
        count, begin = self.counts[name], self._began(name, self.counts[name])
        marks = (*self.restarts.get(name, ()), self.horizons[name])
        return rate(self.recipes[name], count - begin, min((mark for mark in marks if mark > begin), default=begin) - begin)

    def _began(self, name: str, update: int) -> int:
        """The update (from 0) with which the schedule of this one started."""
        return max(mark for mark in (0, *self.restarts.get(name, ())) if mark <= update)

    def age(self, name: str) -> int:
        """Updates of a role since its schedule last started."""
        return self.counts[name] - self._began(name, max(0, self.counts[name] - 1))

    def tensors(self) -> dict[str, Tensor]:
        """Every moment, flat. Whole numbers (8-bit Adam's own count) become integer tensors and come back from them."""
        states = {name: optimizer.state_dict()["state"] for name, optimizer in self._optimizers.items()}
        return {f"{name}/{i}/{field}": torch.as_tensor(value) for name, state in states.items()
                for i, fields in state.items() for field, value in fields.items() if isinstance(value, int | Tensor)}

    def load(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Inverse of `tensors` and `counts`."""
        self.counts = {name: int(counts[name]) for name in self.counts}
        for name, optimizer in self._optimizers.items():
            state: dict[int, dict[str, Tensor | int]] = {}
            for path, value in tensors.items():
                role, index, field = path.split("/")
                if role == name:
                    state.setdefault(int(index), {})[field] = int(value) if value.dtype == torch.int64 and not value.ndim else value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def bytes(self, name: str) -> int:
        """Bytes of moments once the role has stepped: two numbers a weight, or two bytes for 8-bit Adam."""
        parameters = self.roles.parameters(name)
        each = (lambda p: 2) if self.recipes[name].name == "adamw8bit" else (lambda p: 2 * p.element_size())
        return sum(p.numel() * each(p) for p in parameters)
