"""A student in the light of its teacher: the same noise and the same prompts, sample by sample.

The distance to the teacher's distribution is a protocol of its own (teacher-only), whose floor is the teacher's distance to itself under
other seeds. What is told here describes: students that match a distribution need not keep the teacher's map from noise to picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval import alignment, diversity, drifts, measures, metrics, score
from stepdistill.eval.measures import KINDS
from stepdistill.eval.protocol import Protocol, told_apart

GROUPS = 10                                             # of the jackknife over the few pictures that are kept


def reference_path(result: Path) -> Path:
    """Where a teacher's result keeps the reference that its students are held against."""
    return result.with_name(f"{result.stem}.reference.safetensors")


def made_beside(result: Path) -> Path:
    """Where the result of a teacher goes that a student's evaluation scores first."""
    return result.with_name(f"{result.stem}.teacher.json")


@dataclass(frozen=True)
class Light:
    """A teacher's result under a protocol, with what was kept beside it, and LPIPS where it can be had here."""

    path: Path
    result: Mapping[str, Any]
    protocol: Protocol
    kept: Mapping[str, Tensor] | None
    pictures: Tensor | None
    distance: diversity.Distance | None = None

    @classmethod
    def of(cls, path: Path, protocol: Protocol, device: torch.device | str = "cpu") -> Light:
        """Raises FileNotFoundError or ValueError where it is no result, or one of another protocol, naming the fields that differ."""
        result = score.read_result(path)
        if result["protocol_hash"] != protocol.hash:
            told = told_apart(result["protocol"], protocol)
            raise ValueError(f"{path} was scored under another protocol ({told}): score both under one")
        return cls(path, result, protocol, score.read_features(path, result), score.read_samples(score.samples_path(path), result),
                   diversity.spare_lpips(device))

    def paired(self, scored: score.Scored) -> dict[str, Any]:
        """The block `paired` of a student's result: by the digest of the teacher's weights, its differences to the teacher, by metric, of
        those that samples of the same noise tell."""
        if self.kept is None:
            return {}
        found = {}
        for name, measure in self.protocol.plan.items():
            mine = measures.unpacked(scored.pairs, name, scored.metrics[name])
            its = measures.unpacked(self.kept, name, measures.estimate(self.result["metrics"][name]))
            if (difference := KINDS[measure.kind].paired(mine, its)) is not None:
                found[name] = {"delta": difference.value, "corrected": difference.corrected, "se": difference.se,
                               "ci95": list(difference.ci95)}
        return {str(self.result["model"].get("sha256")): found}

    def beside(self, scored: score.Scored, first: Tensor, encode: Callable[[Tensor], Tensor | None] | None = None) -> dict[str, Any]:
        """The block `teacher` of a student's result: the teacher's own metrics; `cos`, of paired features; `lpips`, of the first pictures
        (n, C, H, W) of both, pair by pair; `ratio` of what is told per prompt; `drift`, of the same pictures, and of their latents where
        `encode` makes some of uint8 pictures. What cannot be told is None or left out."""
        block: dict[str, Any] = {"result": self.path.name, "name": self.result["model"]["name"], "metrics": self.result["metrics"],
                                 "cos": None, "lpips": None, "ratio": {}, "drift": {}}
        if self.kept is not None:
            block["cos"] = alignment.cos_teacher(scored.features, self.kept["features"]).to_dict()
            for name, measure in self.protocol.plan.items():
                mine, its = scored.pairs.get(f"values/{name}"), self.kept.get(f"values/{name}")
                if KINDS[measure.kind].unit == "prompt" and mine is not None and its is not None:
                    block["ratio"][name] = metrics.bootstrap_ratio(mine, its).to_dict()
        if self.pictures is not None and self.pictures.shape == first.shape and len(first) >= 2 * metrics.FEWEST:
            if self.distance is not None and first.shape[1] in (1, 3) and min(first.shape[2:]) >= diversity.LEAST:
                block["lpips"] = metrics.mean_estimate(diversity.paired_lpips(first, self.pictures, self.distance)).to_dict()
            labels, sets = torch.arange(len(first)) % self.protocol.turns, min(GROUPS, len(first) // 2)
            member = labels % sets if self.protocol.turns >= sets else torch.arange(len(first)) % sets
            found = drifts.drift_estimates(first, self.pictures, labels, member)
            if encode is not None and (latents := encode(first)) is not None and (its := encode(self.pictures)) is not None:
                found |= drifts.latent_drift(latents, its, member)
            block["drift"] = {name: estimate.to_dict() for name, estimate in found.items()}
        return block
