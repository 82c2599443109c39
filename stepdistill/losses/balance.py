"""Terms of one loss, weighed by what each asks of the network's last layer (VQGAN, Esser et al. 2021, eq. 7; CTM, Kim et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = 1e-4                                            # of the norm that is divided by


def ratio(main: Tensor, other: Tensor) -> float:
    """|main| / (|other| + 1e-4) of two gradients of one layer: the weight with which `other` asks for as large a step as `main`."""
    return float(main.norm() / (other.norm() + FLOOR))


def weighed(raw: Tensor, last: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum of weights·terms, gradient of each term, unweighed, at the weight `last`); no gradients where the network does not train.

    `raw` (B, ...) is the network's output, `last` the weight of its last layer, and each term a scalar that reaches the network through
    `raw` alone. What comes after `raw` is differentiated here, once for each term, and is not kept: the sum has its terms' value, and its
    graph is that of `raw` with the weighed slopes there. So a term costs one more pass through the last layer, and nothing else.
    """
    value = torch.stack([weights[name] * term.detach() for name, term in terms.items()]).sum()
    if not raw.requires_grad:
        return value, {}
    slopes = {name: torch.autograd.grad(term, raw, retain_graph=i < len(terms))[0] for i, (name, term) in enumerate(terms.items(), 1)}
    carried = (raw * torch.stack([weights[name] * slope for name, slope in slopes.items()]).sum(0)).sum()
    at_last = {name: torch.autograd.grad(raw, last, slope, retain_graph=True)[0] for name, slope in slopes.items()}
    return value + (carried - carried.detach()).to(value), at_last
