"""Result files out of thin air: features of real pictures, moved a little."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.eval import measures, metrics, protocol, report, score, tables

COUNT = 100                                             # fewer than a claim needs: see `small_world`


def small_reference() -> protocol.Reference:
    """Few test features, so that kernels are quick."""
    whole = protocol.fashion_reference()
    return dataclasses.replace(whole, test_features=whole.test_features[:500], test_labels=whole.test_labels[:500])


def small_world(patch: pytest.MonkeyPatch) -> protocol.Reference:
    """What the report holds features against, small; COUNT pictures are enough for a claim in it."""
    small = small_reference()
    patch.setattr(report, "fashion_reference", lambda: small)
    patch.setattr(tables, "ENOUGH", COUNT)
    return small


def make_result(folder: Path, stem: str, name: str, steps: int, shift: float, *, is_teacher: bool = False, guidance: float = 1.0,
                seed: int = 0, with_features: bool = True, times: list[float] | None = None, env: dict[str, Any] | None = None) -> Path:
    """A result of `steps` calls whose features are training features moved by `shift`, with equal noise in all of them."""
    p, reference = protocol.get("fashion", COUNT, seed), small_reference()
    rows = torch.stack([(reference.train_labels == c).nonzero()[: COUNT // 10, 0] for c in range(10)], 1).flatten()
    features, labels = reference.train_features[rows] + shift, torch.arange(COUNT) % 10
    hits = torch.arange(COUNT) >= 40 * shift
    estimates = {
        "frechet_fashion": metrics.frechet_estimate(measures.groups(features, p), reference.train),
        "kid_fashion": metrics.kid_estimate(measures.kernel_sums(features, p, reference)),
        "precision_fashion": metrics.proportion(metrics.inside(reference.test_features, features, p.neighbours)),
        **{f"{kind}_fashion": metrics.proportion(hits) for kind in ("recall", "accuracy")},
    }
    scored = score.Scored(estimates, features, labels, torch.where(hits, labels, (labels + 1) % 10))
    images = torch.full((COUNT, 1, 28, 28), 128, dtype=torch.uint8)
    path = folder / f"{stem}.json"
    sampler = {"nfe": steps * (1 if guidance == 1 else 2), "times": times or [0.5] * steps, "guidance": guidance}
    score.write_result(path, p, scored, model={"name": name, "is_teacher": is_teacher}, sampler=sampler, images=images,
                       speed={"ms_per_image": 2.0 * steps}, env=env or {}, started="", seconds=0.0)
    if not with_features:
        score.features_path(path, "fashion").unlink()
    return path
