"""How a result was made: the command line that makes it again, and where the environments of several results differ."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.diffusion.times import trailing

UNKNOWN = "not told"
TIMING = ("device", "threads", "torch", "batch size", "precision")           # what moves milliseconds and no score


def command(result: Mapping[str, Any], to: str) -> str:
    """The `stepdistill eval` that makes a result again as the file `to`.

    A student brings its own sampler, so only its steps and guidance are named. A teacher's times are told by --steps and --shift; where
    they are others, a remark behind the command says so.
    """
    protocol, sampler, speed = result["protocol"], result["sampler"], result["speed"]
    times, is_teacher = tuple(sampler.get("times", ())), bool(result["model"].get("is_teacher"))
    options: dict[str, Any] = {"protocol": protocol["name"], "count": protocol["count"], "seed": protocol["seed"]}
    options |= {"steps": len(times)} if times else {}
    options |= {key: sampler[key] for key in ("guidance", *(("solver", "renoise") if is_teacher else ())) if key in sampler}
    shift = shift_of(times) if is_teacher else None
    options |= {} if shift is None else {"shift": shift}
    options |= {"batch-size": speed["batch_size"]} if "batch_size" in speed else {}
    options |= {"device": kind} if (kind := result["env"].get("device_type", "cpu")) != "cpu" else {}
    options |= result.get("asked", {})
    told = [(f"--{k}", str(each)) for k, v in options.items() for each in (v if isinstance(v, list) else [v])]
    words = ["stepdistill", "eval", str(result["model"]["name"]), *(word for pair in told for word in pair), "--to", to]
    return shlex.join(words) + ("  # at times that no option names" if is_teacher and times and shift is None else "")


def shift_of(times: Sequence[float]) -> float | None:
    """The shift of `diffusion.times.trailing` that gives these times; None where they are no such grid."""
    if len(times) < 2 or not 0 < times[1] < 1:
        return 1.0 if tuple(times) == (1.0,) else None
    u, t = 1 - 1 / len(times), times[1]
    shift = round(t * (1 - u) / (u * (1 - t)), 6)
    return shift if shift > 0 and all(map(_close, trailing(len(times), shift), times)) else None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-5)


def environments(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What all results have in common, by field, and the fields that differ, with each result's value."""
    told = [{**r["env"], **{key.replace("_", " "): r["speed"].get(key) for key in ("batch_size", "precision")}} for r in results]
    fields = dict.fromkeys(field for one in told for field in one)
    values = {field: [_word(one.get(field)) for one in told] for field in fields}
    same = {field: found[0] for field, found in values.items() if len(set(found)) == 1}
    return same, {field: found for field, found in values.items() if field not in same}


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return UNKNOWN if value is None else str(value)


def origin(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a row is made of: the weights' digest, of a student its method and step, the times of its sampler, and when it was scored."""
    model = result["model"]
    trained = f"{model['method']}, step {model['step']:,}" if {"method", "step"} <= set(model) else None
    return {"weights": model.get("sha256"), "trained": trained, "times": list(result["sampler"].get("times", ())),
            "started": result["started"]}
