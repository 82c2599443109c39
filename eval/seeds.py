"""Results of one model that differ in the seed of their noise alone, as one row: mean, standard deviation, and the least of three.

CIFAR-10 and ImageNet-64 tables print the least of three seeds (Karras et al., 2022, arXiv:2206.00364). It lies 0.85 standard deviations
below the mean whatever the model, so it is told beside the mean and never instead.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepdistill.eval.metrics import Estimate, student_t
from stepdistill.eval.protocol import hash_of

LEAST_OF = 3                                            # seeds of which tables print the least
LEAST = ("fid", "frechet", "fd")                        # kinds of measures that have it

T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824}                # 97.5 % quantiles of Student's t, where `student_t` does not reach

Loaded = tuple[Path, dict[str, Any]]


def without_seed(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a result's protocol but one."""
    return {name: value for name, value in protocol.items() if name != "seed"}


def gathered(loaded: Sequence[Loaded]) -> list[list[Loaded]]:
    """The results of each model and sampler, in the order of their seeds; their protocols are the same but for those.

    Raises ValueError where one model has another seed than the rest, a seed twice, or one alone.
    """
    groups: dict[str, list[Loaded]] = {}
    for path, result in loaded:
        groups.setdefault(json.dumps([result["model"], result["sampler"]], sort_keys=True), []).append((path, result))
    found = [sorted(group, key=_seed) for group in groups.values()]
    for group in found:
        for one, other in pairwise(group):
            if _seed(one) == _seed(other):
                raise ValueError(f"{one[0]} and {other[0]} are of one model and seed {_seed(one)}: name one of them")
        if _listed(group) != _listed(found[0]):
            raise ValueError(f"{found[0][0][0]} has the seeds {_listed(found[0])} and {group[0][0]} has {_listed(group)}: score all models "
                             "with the same seeds")
    if len(found[0]) < 2:
        raise ValueError(f"--seeds is for two seeds or more of every model, and {found[0][0][0]} has one: leave it out, or score it with "
                         "another --seed, too")
    return found


def _seed(one: Loaded) -> int:
    return int(one[1]["protocol"]["seed"])


def _listed(group: Sequence[Loaded]) -> str:
    return ", ".join(str(_seed(one)) for one in group)


def pooled(group: Sequence[Loaded]) -> dict[str, Any]:
    """One result for those of several seeds: each metric's mean, with the standard deviation over seeds as its error and the interval of
    the mean; the hash of the protocol without its seed. What was told of single results alone is left out."""
    (_, first), results = group[0], [result for _, result in group]
    env = {name: " and ".join(dict.fromkeys(str(r["env"].get(name)) for r in results))
           if any(r["env"].get(name) != value for r in results) else value for name, value in first["env"].items()}
    return {**{name: first[name] for name in ("protocol", "model", "sampler", "started", "seconds", "samples")},
            "protocol_hash": hash_of(without_seed(first["protocol"])), "env": env, "teacher": None, "paired": {},
            "metrics": {name: _over([r["metrics"][name] for r in results]).to_dict() for name in first["metrics"]},
            "speed": {**first["speed"], "ms_per_image": statistics.fmean(float(r["speed"]["ms_per_image"]) for r in results)}}


def _over(blocks: Sequence[Mapping[str, Any]]) -> Estimate:
    """Mean and standard deviation of a metric's values, with the 95 % interval of the mean."""
    values = [float(block["value"]) for block in blocks]
    value, deviation, count = statistics.fmean(values), statistics.stdev(values), len(values)
    corrected = statistics.fmean(float(block["corrected"]) for block in blocks)
    half = (T95.get(count - 1) or student_t(count - 1)) * deviation / count**0.5
    return Estimate(value, corrected, deviation, (value - half, value + half), int(blocks[0]["n"]), count)


def mean(found: Sequence[Estimate]) -> Estimate:
    """Of independent estimates."""
    corrected, count = statistics.fmean(each.corrected for each in found), len(found)
    error, groups = sum(each.se**2 for each in found) ** 0.5 / count, sum(each.groups - 1 for each in found) + 1
    half = student_t(groups - 1) * error
    return Estimate(statistics.fmean(each.value for each in found), corrected, error, (corrected - half, corrected + half),
                    sum(each.n for each in found), groups)


def told(group: Sequence[Loaded]) -> dict[str, Any]:
    """Of a row of the report: every seed's value by metric, and of three seeds the least Frechet distance, as fid_min3 and the like."""
    values = {name: [float(result["metrics"][name]["value"]) for _, result in group] for name in group[0][1]["metrics"]}
    least = {name: least_name(name) for name in values if name.split("_")[0] in LEAST and len(group) == LEAST_OF}
    return {"values": values, "least": {called: min(values[name]) for name, called in least.items()}}


def least_name(metric: str) -> str:
    """What the least of three is called: fid_min3_inception_tf_cifar10train_50k."""
    kind, _, rest = metric.partition("_")
    return f"{kind}_min{LEAST_OF}_{rest}"
