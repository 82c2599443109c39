"""A plain training loop for the networks that worlds ship: AdamW, a moving average, checkpoints, a log. It distils nothing."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


def rate(update: int, updates: int, peak: float, warmup: int = 200) -> float:
    """Warm-up, constant, then linear to zero over the last quarter."""
    return peak * min(1.0, (update + 1) / warmup, 4 * (updates - update) / updates)


def fit(net: nn.Module, loss: Callable[[int], Mapping[str, Tensor]], out: Path, updates: int, learning_rate: float, *,
        ema_decay: float = 0.999, weight_decay: float = 0.01, clip: float = 1.0, every: int = 250) -> nn.Module:
    """Descend the sum of `loss(update)` over the parameters of `net`, and return their moving average, with buffers as they were last.

    Whatever `loss` draws must be keyed by the update. A run goes on from `out`/checkpoint.safetensors by itself, and is then the one that
    was not interrupted. `log.jsonl` has a line for every 25 updates.
    """
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.safetensors"
    start = _restore(path, net, ema, optimizer) if path.is_file() else 0
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, update {start} of {updates}", file=sys.stderr)
    began, means = time.time(), dict[str, float]()
    with (out / "log.jsonl").open("a") as log:
        for update in (bar := tqdm(range(start, updates), initial=start, total=updates, mininterval=5, file=sys.stderr)):
            parts = loss(update)
            torch.stack(list(parts.values())).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.param_groups[0]["lr"] = rate(update, updates, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(ema_decay, (1 + update) / (10 + update))
            with torch.no_grad():                                             # or the average would become part of a graph that grows
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
                for mine, current in zip(ema.buffers(), net.buffers(), strict=True):
                    mine.copy_(current)                                       # statistics of batch norms, averages already
            for name, value in parts.items():
                means[name] = 0.98 * means.get(name, float(value.detach())) + 0.02 * float(value.detach())
            if update % 25 == 0:
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                log.write(json.dumps({"update": update, **means, "grad": float(norm), "seconds": time.time() - began}) + "\n")
                log.flush()
            if (update + 1) % every == 0 or update + 1 == updates:
                _save(path, update + 1, net, ema, optimizer)
    return ema


def _save(path: Path, update: int, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One safetensors file, renamed into place."""
    moments = {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()} | moments
    temporary = path.with_name(f".{path.name}.partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"update": str(update)})
    os.replace(temporary, path)


def _restore(path: Path, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Inverse of `_save`; returns the update it was written after."""
    with safe_open(path, "pt") as file:
        update = int(file.metadata()["update"])
    tensors = load_file(path)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    net.load_state_dict(part("net."))
    ema.load_state_dict(part("ema."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("adam.").items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return update
