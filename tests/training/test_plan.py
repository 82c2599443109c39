"""A plan's bytes are those of the run: held against real iterations, against the optimizer's own state, and against counts by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import snapshot, tiny_recipe, tiny_run, tiny_teacher, tiny_tree
from torch import nn
from torch.nn import functional
from zoo.sized import SIZED

from stepdistill import cli
from stepdistill.methods import METHODS
from stepdistill.models import networks
from stepdistill.models.attention import attention
from stepdistill.training import loop, plan
from stepdistill.training.live import Live, alive, rehearsal
from stepdistill.training.measure import bytes_of

LORA = {"student": {"rank": 8}, "fake": {"rank": 8}}
DATA_FREE = {"method__gan_weight": 0}
ALL = [(family, lora) for family in SIZED for lora in ({}, LORA)]
OTHERS = ("progressive", "scm", "phased_dmd", "add")                             # stages, forward mode, experts, a judge; the rest is slow
FEW = (0, 7)                                                                 # a U-Net in full and a transformer with LoRA; the rest is slow
WIDE = {"block_out_channels": (32, 64), "attention_head_dim": 8, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
BOUND = 0.05                                                                 # 0.15 was asked for; below 0.005 was found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of a few thousand weights."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of half a million, with attention."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_teacher(folder / "teacher", **WIDE)
    return folder


# ---- against real iterations

@pytest.mark.parametrize(("family", "lora"), [
    pytest.param(*case, id=f"{case[0]}-{'lora' if case[1] else 'full'}", marks=[] if i in FEW else pytest.mark.slow)
    for i, case in enumerate(ALL)])
def test_the_planned_peak_is_the_measured_one(tmp_path: Path, family: str, lora: dict[str, Any]) -> None:
    network = SIZED[family].save(tmp_path)
    recipe = SIZED[family].recipe(tmp_path, lora=lora)
    real = plan.measured(recipe, loop.make_accelerator(recipe, None))
    found = plan.plan(recipe, network, card=False)
    assert found.peak == pytest.approx(real, rel=BOUND)
    assert found.peak > 1.3 * found.resident                                 # activations weigh something in it


@pytest.mark.parametrize(("method", "changes"), [
    ("dmd2", {}),
    ("dmd2", {**DATA_FREE, "accumulate": 2}),
    ("dmd2", {**DATA_FREE, "lora": LORA, "gradient_checkpointing": True, "batch_size": 16}),
    ("dmd2", {**DATA_FREE, "lora": LORA, "precision": "bf16", "teacher__dtype": "bfloat16"}),
    ("consistency", {}),
    ("consistency", {"method__solver": "heun"}),
], ids=["gan", "accumulate", "checkpointing", "bf16", "consistency", "heun"])
def test_so_it_is_with_every_switch(base: Path, wide: Path, method: str, changes: dict[str, Any]) -> None:
    recipe = tiny_recipe(wide if "lora" in changes else base, method, **changes)
    real = plan.measured(recipe, loop.make_accelerator(recipe, None))
    assert plan.plan(recipe, card=False).peak == pytest.approx(real, rel=BOUND)


@pytest.mark.parametrize("lora", [{}, {"fake": {"rank": 8}}], ids=["full", "mixed"])
def test_what_the_roles_hold_is_what_a_run_holds(base: Path, lora: dict[str, Any]) -> None:
    found = plan.plan(tiny_recipe(base, lora=lora))
    for name, row in bytes_of(tiny_run(base, lora=lora)).items():
        if name == "ema":
            assert found.ema == row["weights"]
        else:
            assert {key: getattr(found.roles[name], key) for key in row} == row


@pytest.mark.parametrize("method", [pytest.param(name, marks=[] if name in OTHERS else pytest.mark.slow) for name in METHODS])
def test_every_method_can_be_planned(base: Path, method: str) -> None:
    found = plan.plan(tiny_recipe(base, method))
    assert set(found.roles) == set(METHODS[method].needs(tiny_recipe(base, method).method_config))
    assert all(role.activations > 0 for name, role in found.roles.items() if name != "previous")                 # later stages ask that
    assert found.peak > found.resident


# ---- the follower of storages

def test_live_counts_storages_and_not_views() -> None:
    held = torch.zeros(1000)
    with Live([held]) as live:
        held.view(10, 100).add_(1)
        live.label = "a"
        a = torch.zeros(256)
        b = a[:10]
        live.label = "b"
        c = torch.zeros(64)
        assert (live.bytes, live.now["a"], live.now["b"]) == (1280, 1024, 256)
        live.relabel(c, "c")
        del a
        assert live.bytes == 1280                                            # the view keeps it
        del b
        assert (live.bytes, live.now["a"], live.now["b"], live.now["c"]) == (256, 0, 0, 256)
    assert live.peak == 1280
    assert live.most == {"a": 1024, "b": 256, "c": 256}


def test_alive_finds_a_storage_once() -> None:
    before = {id(tensor.untyped_storage()) for tensor in alive()}
    kept = [torch.zeros(77)]
    kept.append(kept[0][3:])
    torch.func.jvp(lambda x: kept.append(x) or x * 2, (torch.ones(2),), (torch.ones(2),))   # wraps 8 bytes, has none
    assert sorted(t.untyped_storage().nbytes() for t in alive() if id(t.untyped_storage()) not in before) == [8, 308]


def saved(card: bool, autocast: bool, work: Any, *shapes: tuple[int, ...]) -> int:
    """Bytes kept for a backward pass beside the inputs and the weights."""
    with torch.device("meta"):
        norm = nn.LayerNorm(32)
    with rehearsal(card=card) as blank:
        blank(norm)
        inputs = [torch.zeros(*shape, requires_grad=True) for shape in shapes]
        with Live([*inputs, *norm.parameters()]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = work(norm, *inputs)
            kept = live.bytes
            torch.autograd.backward(out.float().sum())
            assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
        return kept


def test_a_card_keeps_no_matrix_of_attention() -> None:
    heads = 3 * [(2, 4, 100, 8)]
    attend = lambda norm, q, k, v: functional.scaled_dot_product_attention(q, k, v)                                # noqa: E731
    assert saved(True, False, attend, *heads) == 4 * (2 * 4 * 100 * 8 + 2 * 4 * 100)                              # its output, its sums
    assert saved(True, True, attend, *heads) == 2 * 4 * (2 * 4 * 100 * 8) + 4 * (2 * 4 * 100)                     # and halves of q, k, v
    with attention(torch.device("cpu")):
        assert saved(False, False, attend, *heads) >= 4 * 2 * 4 * 100 * 100


def test_a_card_normalises_in_float32_under_autocast() -> None:
    work = lambda norm, x: norm(x @ x.mT)                                                                          # noqa: E731
    shape = (1, 32, 32)
    assert saved(True, True, work, shape) - saved(False, True, work, shape) >= 2 * 32 * 32
    assert saved(True, False, work, shape) == saved(False, False, work, shape)


def test_a_checkpointed_block_meets_the_same_attention_again(wide: Path) -> None:
    """In its backward pass it is recomputed, and would not fit its forward pass with another."""
    found = {on: plan.plan(tiny_recipe(wide, **DATA_FREE, precision="bf16", gradient_checkpointing=on)) for on in (False, True)}
    assert found[True].roles["student"].activations < found[False].roles["student"].activations


# ---- switches

def test_a_card_that_is_large_enough_needs_none(base: Path) -> None:
    found = plan.plan(tiny_recipe(base), gpu=2**40)
    assert (found.fits, found.fits_with_switches, found.switches, found.cards) == (True, True, (), None)
    assert plan.plan(tiny_recipe(base)).fits is None


def test_switches_come_cheapest_first_and_stop_where_it_fits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RANK", 1)                                     # 64 saves nothing on layers of 16
    recipe = tiny_recipe(base, **DATA_FREE, precision="bf16", batch_size=4)
    found = plan.plan(recipe, gpu=1)
    assert [switch.keys for switch in found.switches] == [
        ("teacher.dtype=bfloat16",), ("gradient_checkpointing=true",), ("accumulate=4",),
        ("optim.student.name=adamw8bit", "optim.fake.name=adamw8bit"), ("lora.fake.rank=1",), ("lora.student.rank=1",), ("ema_decay=0",)]
    assert (found.fits, found.fits_with_switches, found.cards) == (False, False, None)
    peaks = [found.peak, *(switch.peak for switch in found.switches)]
    together = tuple(key for switch in found.switches for key in switch.keys)
    assert peaks[-1] == plan.plan(plan.changed(recipe, together)).peak
    assert peaks == sorted(peaks, reverse=True)
    enough = plan.plan(recipe, gpu=peaks[2] + plan.RESERVE)
    assert enough.switches == found.switches[:2]
    assert (enough.fits, enough.fits_with_switches) == (False, True)


def test_micro_batches_are_no_smaller_than_they_must_be(base: Path) -> None:
    recipe = tiny_recipe(base, **DATA_FREE, batch_size=16, gradient_checkpointing=True)
    peaks = {n: plan.plan(plan.changed(recipe, (f"accumulate={n}",))).peak for n in (2, 4)}
    found = plan.plan(recipe, gpu=(peaks[2] + peaks[4]) // 2 + plan.RESERVE)
    assert [switch.keys for switch in found.switches] == [("accumulate=4",)]
    assert found.fits_with_switches


def test_a_switch_that_saves_nothing_is_left_off(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples in two micro-batches the first one's gradients are alive in the second one's forward pass."""
    monkeypatch.setattr(plan, "_ladder", lambda recipe, found: [(plan.ACCUMULATE, "")])
    recipe = tiny_recipe(base, **DATA_FREE, batch_size=2, gradient_checkpointing=True)
    assert plan.plan(plan.changed(recipe, ("accumulate=2",))).peak > plan.plan(recipe).peak
    assert plan.plan(recipe, gpu=1).switches == ()


def test_dividing_the_weights_among_cards(base: Path) -> None:
    recipe = tiny_recipe(base, **DATA_FREE, batch_size=1, precision="fp32", lora=LORA, gradient_checkpointing=True, ema_decay=0)
    whole = plan.plan(recipe)
    work = sum(role.activations for role in whole.roles.values())
    divided = sum(role.weights + role.gradients + role.optimizer for role in whole.roles.values())
    found = plan.plan(recipe, gpu=plan.RESERVE + work + divided // 3)
    assert (found.switches, found.fits_with_switches, found.cards) == ((), False, 4)
    assert plan.plan(recipe, gpu=plan.RESERVE + work).cards is None


def test_a_cache_frees_the_card_of_its_encoders(tmp_path: Path) -> None:
    sized = SIZED["sd15"]
    network = sized.save(tmp_path)
    encoder = 4 * network.frozen["text_encoder"]
    cached = plan.plan(sized.recipe(tmp_path, data={"prompts": "prompts.txt", "cache": "cache"}), network)
    found = plan.plan(sized.recipe(tmp_path), network, gpu=cached.peak + plan.RESERVE)
    assert (set(found.encoders), set(cached.encoders)) == ({"text_encoder", "vae"}, {"vae"})
    assert found.peak - cached.peak == found.encoders["text_encoder"] == encoder
    assert [(switch.keys, switch.peak) for switch in found.switches] == [(("data.cache=cache",), cached.peak)]


@pytest.mark.parametrize(("text", "size"), [
    ("24GB", 24 * 2**30), ("24GiB", 24 * 2**30), ("80g", 80 * 2**30), ("1.5 GB", 3 * 2**29), ("512MiB", 2**29)])
def test_a_card_is_named_as_it_is_sold(text: str, size: int) -> None:
    assert plan.bytes_of_card(text) == size


# ---- the command

@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(base, **DATA_FREE)))
    return path


def test_the_command_needs_no_weights_and_writes_nothing(base: Path, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text((base / "teacher" / "config.json").read_text())
    before = snapshot(tmp_path)
    assert cli.run(["plan", "--config", str(file), "teacher.path=/nowhere", "--network", str(config), "--gpu", "24GB", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert snapshot(tmp_path) == before
    expected = plan.plan(tiny_recipe(base, **DATA_FREE))
    assert {k: value[k] for k in ("fits", "peak", "resident", "gpu")} == {
        "fits": True, "peak": expected.peak, "resident": expected.resident, "gpu": 24 * 2**30}
    assert value["roles"]["student"]["gradients"] == expected.roles["student"].gradients


def test_the_command_tells_a_person(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--config", str(file)]) == 0
    out = capfd.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["role", "teacher", "student", "fake", "ema", "held"]


def test_what_a_person_is_told_of_a_card() -> None:
    demand, gib = plan.Demand(10, 2**30, 2**30, 2**31, 2**30), 2**30
    switch = plan.Switch(("gradient_checkpointing=true",), "about a third slower", 7 * gib)
    found = plan.Plan("x", 1, {"student": demand}, 0, {"vae": gib}, {"student": 9 * gib}, 8 * gib, (switch,))
    told = plan.shown(found)
    assert "saves 2.00, peak 7.00; price: about a third slower" in told
    assert told.endswith("fits with these")
    assert plan.shown(replace(found, gpu=10 * gib, switches=())).endswith("fits on 10.00 GiB with 1.00 kept for what is no tensor")
    assert "among 3 such cards (FSDP) might, which has not been run here" in plan.shown(replace(found, gpu=4 * gib, cards=3))
    assert plan.shown(replace(found, gpu=gib)).endswith("activations and encoders alone are too much")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpu", "24"], "no size of memory"), (["--network", "sd16"], "sd15"), (["teacher.path=/nowhere"], "--network"),
    (["--network", "sd15", "lora={teacher: {}}"], "no such copy"), (["stepz=1"], "did you mean")])
def test_bad_input_is_one_line(file: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.run(["plan", "--config", str(file), *arguments]) == 2
    error = capfd.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_network_called_with_the_wrong_arguments(base: Path, tmp_path: Path) -> None:
    spec = networks.of_folder(base / "teacher")
    content = {"config": dict(spec.config), "sizes": spec.sizes, "state": spec.state, "arguments": {**spec.arguments, "words": "7 3"}}
    (tmp_path / "network.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--network FILE"):
        plan.plan(tiny_recipe(base), networks.find(str(tmp_path / "network.json")))
