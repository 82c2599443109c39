"""What a recording learnt of a pipeline, and the proof that it holds, before an hour of training is spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.models.parity import Parity, prove
from stepdistill.models.recorded import Inputs, Recording
from stepdistill.models.recording import record, usual_inputs
from stepdistill.models.wiring import FromClock, FromCondition, FromSample, FromScale, Unrecordable, leaves_of

BOUND = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}      # of parity, by the weights' precision


def probe(pipeline: Any, inputs: Inputs | None = None, other: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Record and prove; plain JSON values. `fits` says whether the pipeline can be distilled as it is, `reason` why not."""
    name = type(pipeline).__name__
    inputs = inputs or usual_inputs(pipeline)
    try:
        recording = record(pipeline, inputs)
    except Unrecordable as error:
        return {"pipeline": name, "fits": False, "reason": str(error)}
    parity = prove(recording, inputs, other)
    bound = BOUND[recording.denoiser.dtype]
    return {"pipeline": name, **describe(recording, inputs), "parity": parity.to_dict(), "bound": bound, "fits": parity.worst <= bound,
            **({} if parity.worst <= bound else {"reason": _reason(parity, bound)})}


def _reason(parity: Parity, bound: float) -> str:
    if parity.mixed > bound >= max(parity.forced, parity.loop):
        return "the samples of a batch depend on each other, so they cannot have times of their own"
    return f"our prediction differs from the pipeline's own by {parity.worst:.2g} of its size"


def describe(recording: Recording, inputs: Inputs) -> dict[str, Any]:
    """What was learnt, as plain JSON values."""
    denoiser, wiring = recording.denoiser, recording.wiring
    leaves = dict(leaves_of(wiring.arguments))
    law = "embedded" if wiring.embeds else denoiser.law if recording.offset is not None else "baked in" if recording.keyword else "none"
    return {
        "component": recording.component, "network": type(denoiser.network).__name__,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "state": list(recording.shape), "process": type(denoiser.process).__name__, "prediction": denoiser.kind,
        "sample": {path: _layout(leaf) for path, leaf in leaves.items() if isinstance(leaf, FromSample)},
        "clock": {path: _affine(leaf.a, leaf.basis, leaf.b) for path, leaf in leaves.items() if isinstance(leaf, FromClock)},
        "output": {"layout": wiring.layout.how, "sign": int(wiring.sign)},
        "guidance": {"law": law, "keyword": recording.keyword, "w": None if recording.offset is None else _affine(1, "g", recording.offset),
                     "embedded_in": [path for path, leaf in leaves.items() if isinstance(leaf, FromScale)]},
        "condition": {path: "shared" if leaf.shared else "per sample" for path, leaf in leaves.items() if isinstance(leaf, FromCondition)},
        "features": list(denoiser.taps), "notes": list(recording.notes)}


def _layout(leaf: FromSample) -> str:
    return leaf.layout.how + (", one tensor a sample" if leaf.listed else "")


def _affine(a: float, name: str, b: float) -> str:
    scaled = name if a == 1 else f"-{name}" if a == -1 else f"{a:g}·{name}"
    return scaled if b == 0 else f"{scaled} {'+' if b > 0 else '-'} {abs(b):g}"


def show(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    if "network" not in report:
        return f"{report['pipeline']} cannot be recorded: {report['reason']}"
    g, parity = report["guidance"], report["parity"]
    lines = {
        "network": f"{report['network']} ({report['component']}), {report['parameters']:,} parameters",
        "state": f"{'x'.join(map(str, report['state']))}, given as {', '.join(f'{k} ({v})' for k, v in report['sample'].items())}",
        "process": f"{report['process']}, predicts {report['prediction']}",
        "clock": ", ".join(f"{k} = {v}" for k, v in report["clock"].items()) or "none",
        "output": f"{report['output']['layout']}, sign {report['output']['sign']:+d}",
        "guidance": g["law"] + (f", {g['keyword']} g is our w = {g['w']}" if g["w"] else f", by {g['keyword']}" if g["keyword"] else ""),
        "condition": ", ".join(f"{k} ({v})" for k, v in report["condition"].items()) or "none",
        "features": ", ".join(report["features"]) or "none found: name student.taps",
        **({"note": "; ".join(report["notes"])} if report["notes"] else {}),
        "parity": ", ".join(f"{k} {v:.1e}" for k, v in parity.items() if v is not None) + f" (bound {report['bound']:g})",
    }
    verdict = "fits: it can be distilled as it is" if report["fits"] else f"does not fit: {report['reason']}"
    return "\n".join([report["pipeline"], *(f"  {k:<10}{v}" for k, v in lines.items()), verdict])
