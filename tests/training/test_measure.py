"""What an iteration is said to cost is what the algorithm needs, pass by pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import final_tensors, tiny_recipe, tiny_run

from stepdistill.models.adapters import active
from stepdistill.training import loop, measure

B = 4
DATA_FREE = {"method__gan_weight": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


def passes_of(run: Any, step: int) -> list[tuple[str, int, str]]:
    with measure.recorded(run) as passes:
        measure.iterate(run, step, 1)
    return [(p.role, p.rows, p.gradient) for p in passes]


@pytest.mark.parametrize(("plan", "expected"), [
    (lambda step: ("a",), 1), (lambda step: ("a",) if step % 5 else ("a", "b"), 5), (lambda step: (step % 2, step % 3), 6),
    (lambda step: (step,), 1),
])
def test_period(plan: Any, expected: int) -> None:
    assert measure.period(SimpleNamespace(method=SimpleNamespace(plan=plan))) == expected        # type: ignore[arg-type]


def test_period_of_dmd2(base: Path) -> None:
    assert measure.period(tiny_run(base, method__fake_updates=3)) == 3


def test_passes_of_dmd2_with_a_gan(base: Path) -> None:
    """The critic of a student step reuses the student's rollout; its own rollout costs one pass without a gradient otherwise."""
    run = tiny_run(base)
    assert passes_of(run, 0) == [("student", B, "weights"), ("teacher", 2 * B, "none"), ("fake", B, "input"), ("fake", 2 * B, "weights")]
    assert passes_of(run, 1) == [("student", B, "none"), ("fake", 2 * B, "weights")]


def test_passes_of_dmd2_without_a_gan(base: Path) -> None:
    run = tiny_run(base, **DATA_FREE)
    assert passes_of(run, 0) == [("student", B, "weights"), ("teacher", 2 * B, "none"), ("fake", B, "none"), ("fake", B, "weights")]
    assert passes_of(run, 1) == [("student", B, "none"), ("fake", B, "weights")]


def test_passes_of_an_unguided_teacher(base: Path) -> None:
    assert ("teacher", B, "none") in passes_of(tiny_run(base, **DATA_FREE, guidance=1.0), 0)


def test_passes_of_consistency(base: Path) -> None:
    run = tiny_run(base, "consistency")
    assert passes_of(run, 0) == [("teacher", 2 * B, "none"), ("target", B, "none"), ("student", B, "weights")]


def test_passes_with_accumulation(base: Path) -> None:
    assert passes_of(tiny_run(base, **DATA_FREE, accumulate=2), 1) == 2 * [("student", B // 2, "none"), ("fake", B // 2, "weights")]


def test_iterate_is_the_loop(base: Path, tmp_path: Path) -> None:
    """Otherwise the ratio would compare something else with the bare passes."""
    loop.start(tiny_recipe(base, steps=3, checkpoint_every=3), tmp_path / "run")
    run = tiny_run(base, steps=3)
    measure.iterate(run, 0, 3)
    theirs = final_tensors(tmp_path / "run")
    assert all(torch.equal(value, theirs[name]) for name, value in run.tensors().items() if name != "rng")


def test_a_replayed_pass_leaves_nothing_behind(base: Path) -> None:
    run = tiny_run(base)
    with measure.recorded(run) as passes:
        measure.iterate(run, 0, 2)
    before = {name: [p.detach().clone() for p in run.roles.parameters(name)] for name in run.roles.names}
    calls = []
    hooks = [denoiser.network.register_forward_hook(lambda *a, name=name: calls.append(name))
             for name, denoiser in run.roles.denoisers.items()]
    for one in passes:
        measure.replay(run, one)
    assert calls == [p.role for p in passes]
    for name, weights in before.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, run.roles.parameters(name), strict=True))
        assert all(p.grad is None for p in run.roles.parameters(name))
    for hook in hooks:
        hook.remove()


def test_passes_of_adapters_as_experts(base: Path) -> None:
    """They run on the teacher's network and are the student's all the same, once each; replayed, each under its own adapter."""
    run = tiny_run(base, "phased_dmd", method__phases=2, student__steps=2, method__fake_updates=1, lora__student__rank=2)
    run.method.restore({"phase": 1})
    with torch.no_grad():
        for p in run.roles.parameters("student"):
            p.add_(0.3)
    with measure.recorded(run) as passes:
        measure.iterate(run, 0, 1)
    assert [(p.role, p.gradient) for p in passes] == [("student", "none"), ("student", "weights"), ("teacher", "none"), ("fake", "none"),
                                                      ("student", "none"), ("student", "none"), ("fake", "weights")]
    ran: list[str | None] = []
    hook = run.roles.teacher.network.register_forward_hook(lambda network, args, out: ran.append(active(network)))
    for one in passes:
        measure.replay(run, one)
    hook.remove()
    assert ran == ["student_1", "student_2", None, "student_1", "student_2"]
    assert all(p.grad is None for name in run.roles.names for p in run.roles.parameters(name))


@pytest.mark.parametrize("kind", ["weights", "input", "none"])
def test_a_replayed_pass_runs_backward_where_the_loop_did(base: Path, kind: str) -> None:
    run = tiny_run(base)
    with measure.recorded(run) as passes:
        measure.iterate(run, 0, 2)
    one = next(p for p in passes if p.gradient == kind)
    reached: list[str] = []
    first = run.roles.module(one.role).conv_in

    def watch(module: Any, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: reached.append("first layer"))
        if module.weight.requires_grad:
            module.weight.register_hook(lambda g: reached.append("its weights"))

    hook = first.register_forward_hook(watch)
    measure.replay(run, one)
    hook.remove()
    expected = {"weights": (True, True), "input": (True, False), "none": (False, False)}[kind]
    assert ("first layer" in reached, "its weights" in reached) == expected


def test_bench_step(base: Path) -> None:
    run, heard = tiny_run(base), list[int]()
    report = measure.bench_step(run, 2, heard.append)
    assert {"iteration_seconds", "passes_seconds", "ratio", "passes"} <= set(report)
    assert report["iteration_seconds"] > 0
    assert report["ratio"] == pytest.approx(sum(a for a in report["ratio_quartiles"]) / 3, rel=0.5)
    assert (report["steps_per_iteration"], report["repeats"], report["batch_size"]) == (2, 2, B)
    assert len(report["passes"]) == 6
    assert report["passes"][0] == {"role": "student", "rows": B, "gradient": "weights"}
    assert heard == [1, 2]
    before = run.roles.module("student").conv_in.weight.detach().clone()     # and the run can still be trained
    measure.iterate(run, 0, 1)
    assert not torch.equal(run.roles.module("student").conv_in.weight, before)


def test_dry_run(base: Path) -> None:
    run = tiny_run(base, steps=60)
    report = measure.dry_run(run)
    n = sum(p.numel() for p in run.roles.parameters("student"))
    assert report["bytes"]["student"] == {"parameters": n, "weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    assert report["bytes"]["teacher"] == {"parameters": n, "weights": 4 * n, "gradients": 0, "optimizer": 0}
    assert report["bytes"]["ema"]["weights"] == 4 * n
    assert set(report["bytes"]) == {"teacher", "student", "fake", "disc", "ema"}
    held = sum(v.numel() * v.element_size() for k, v in run.optim.tensors().items() if k.startswith("student/") and not k.endswith("/step"))
    assert held == report["bytes"]["student"]["optimizer"]                   # what the optimizer really holds
    assert report["updates_per_iteration"] == {"student": 1, "fake": 2, "disc": 2}
    assert len(report["passes"]) == 6
    assert report["eta_seconds"] == pytest.approx(30 * report["iteration_seconds"])


def test_buffers_are_among_the_bytes_of_weights(base: Path) -> None:
    run = tiny_run(base, **DATA_FREE)
    before = measure.bytes_of(run)
    for network in (run.roles.module("student"), run.ema.network):
        network.register_buffer("table", torch.zeros(10))
    after = measure.bytes_of(run)
    assert {name for name in after if after[name] != before[name]} == {"student", "ema"}
    assert all(after[name]["weights"] == before[name]["weights"] + 40 for name in ("student", "ema"))
    assert after["student"]["gradients"] == before["student"]["gradients"]
