"""Timings of models: whose turn it is, what is timed, what is counted, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_recipe, tiny_teacher
from torch import nn
from zoo import basics

from stepdistill import recipe as recipes
from stepdistill.cli import run as command
from stepdistill.diffusion.draws import Noise
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.eval import speed, timings
from stepdistill.eval.models import Opened, open_model
from stepdistill.eval.speed import Subject, Timing
from stepdistill.export import export
from stepdistill.models.load import load_teacher
from stepdistill.models.prompted import LawCodec
from stepdistill.training import loop

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional export of two calls."""
    base = tmp_path_factory.mktemp("student")
    loop.start(tiny_recipe(base, method__gan_weight=0, steps=1, student={"steps": 2}), base / "run")
    export(base / "run", base / "export")
    return base / "export"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of one call."""
    folder = tmp_path_factory.mktemp("sd")
    basics.stable_diffusion().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red apple\nsnow\n")
    tree = {"teacher": {"path": str(folder / "teacher"), "call": {"height": 16, "width": 16}},
            "method": {"name": "dmd2", "fake_updates": 1, "gan_weight": 0}, "optim": {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}},
            "data": {"prompts": str(folder / "prompts.txt")}, "guidance": 3.0, "steps": 1, "batch_size": 2, "precision": "fp32",
            "preview_count": 1, "trackers": []}
    loop.start(recipes.parse(tree), folder / "run")
    export(folder / "run", folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


def subject(teacher: Any, spec: SamplerSpec) -> Subject:
    return Subject.of(Opened("tiny", teacher, spec, True, len(spec.times)))


# ---- the clock

def test_models_take_turns_and_the_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    models: Any = [SimpleNamespace(name=name, opened=SimpleNamespace(teacher=SimpleNamespace(device=CPU))) for name in "AB"]
    monkeypatch.setattr(speed, "works_of", lambda one, batch: {"denoiser": lambda: order.append((one.name, batch))})
    monkeypatch.setattr(speed, "timed", lambda works, device: (works["denoiser"](), {"denoiser": float(len(order))})[1])
    ticks: list[int] = []
    table = speed.measure(models, (1, 8), runs=3, warm=2, tick=lambda: ticks.append(1))
    assert order == [(name, batch) for batch in (1, 8) for _ in range(5) for name in "AB"]
    assert len(ticks) == len(order)
    assert [[one["denoiser"] for one in timing.times] for timing in table[1]] == [[6, 8, 10], [16, 18, 20]]
    assert [[timing.cold for timing in row] for row in table] == [[1, 11], [2, 12]]
    assert [[timing.batch for timing in row] for row in table] == [[1, 8]] * 2


def test_every_part_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> Any:
        return lambda: now.append(now.pop() + seconds)

    found = speed.timed({"text": work(0.25), "denoiser": work(0.5), "decoder": work(0.125)}, CPU)
    assert found == {"text": 250, "denoiser": 500, "decoder": 125}


def test_on_a_gpu_events_are_read_after_one_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended device, whose queue is a list: no GPU has run this."""
    queue: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream"
            queue.append(self)

        def elapsed_time(self, end: Any) -> float:
            assert queue[-1] == "synchronised"
            return float(queue.index(end) - queue.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("synchronised"))
    works: dict[str, Any] = {"denoiser": lambda: queue.extend([0, 0, 0]), "decoder": lambda: queue.append(0)}
    assert speed.timed(works, torch.device("cuda")) == {"denoiser": 4.0, "decoder": 2.0}
    assert queue.count("synchronised") == 1


def test_spans_are_sums_run_by_run() -> None:
    """The median of sums, not the sum of medians: the text encoder's slow run is the denoiser's fast one."""
    whole = Timing(4, [{"text": 1, "denoiser": 30, "decoder": 5}, {"text": 100, "denoiser": 10, "decoder": 5},
                       {"text": 2, "denoiser": 20, "decoder": 5}], 999.0, None)
    found = whole.to_dict()
    assert {span: found["ms"][span]["median"] for span in speed.SPANS} == {"denoiser": 20, "with_text": 31, "with_decoder": 36}
    assert found["ms"]["denoiser"]["p10"] == pytest.approx(12)
    assert found["ms"]["denoiser"]["p90"] == pytest.approx(28)
    assert found["pictures_per_second"] == pytest.approx(4000 / 36)
    assert (found["cold_ms"], found["faster"], found["memory"]) == (999, None, None)
    times = [{"denoiser": 10, "decoder": 2}, {"denoiser": 20, "decoder": 4}, {"denoiser": 40, "decoder": 8}]
    plain = Timing(1, times, 1.0, None).to_dict(whole)
    assert plain["ms"]["with_text"] is None
    assert plain["ms"]["with_decoder"]["median"] == 24
    assert plain["faster"] == {"denoiser": 0.5, "with_decoder": 3.0}                                  # medians of 30/10, 10/20, 20/40
    bare = Timing(1, [{"denoiser": 10}], 1.0, None).to_dict(Timing(4, whole.times[:1], 1.0, None))
    assert bare["faster"] == {"denoiser": 3.0}
    assert bare["ms"]["with_decoder"] is None


def test_nothing_is_drawn_or_encoded_while_the_clock_runs(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of the start and of re-noising, and the condition, lie ready."""
    works = speed.works_of(subject(teacher, SamplerSpec(trailing(3), guidance=1.5)), 4)
    assert list(works) == ["denoiser", "decoder"]

    def never(*args: Any) -> None:
        raise AssertionError("made within a run")

    monkeypatch.setattr(Noise, "_draw", never)
    monkeypatch.setattr(type(teacher), "condition", never)
    assert works["denoiser"]().shape == (4, 4, 8, 8)
    assert works["decoder"]().shape == (4, 1, 16, 16)


# ---- what is counted

def test_operations_are_those_of_the_formulas() -> None:
    linear, conv, q = nn.Linear(7, 5), nn.Conv2d(3, 4, 3, padding=1), torch.zeros(1, 2, 5, 8)
    assert speed.flops(lambda: linear(torch.zeros(11, 7)), CPU) == 2 * 11 * 7 * 5
    assert speed.flops(lambda: conv(torch.zeros(2, 3, 6, 6)), CPU) == 2 * 2 * 6 * 6 * 4 * 3 * 9
    assert speed.flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q), CPU) == 2 * 2 * (2 * 5 * 5 * 8)


def test_operations_count_both_halves_of_guidance_and_every_step(teacher: Any) -> None:
    one, guided, steps = (speed.facts(subject(teacher, spec)) for spec in (
        SamplerSpec((1.0,)), SamplerSpec((1.0,), guidance=1.5), SamplerSpec(trailing(3), guidance=1.5)))
    assert one["flops"]["denoiser"] > 1e5
    assert guided["flops"]["denoiser"] == 2 * one["flops"]["denoiser"]
    assert steps["flops"]["denoiser"] == 6 * one["flops"]["denoiser"]
    assert [fact["sampler"]["nfe"] for fact in (one, guided, steps)] == [1, 2, 6]
    assert one["flops"]["decoder"] == 0                                                               # space to depth only moves pixels
    assert one["weights_bytes"] == sum(4 * p.numel() for p in teacher.denoiser.network.parameters())


def test_memory_is_not_claimed_on_a_cpu(teacher: Any) -> None:
    assert speed.peak(speed.works_of(subject(teacher, SamplerSpec((1.0,))), 1), CPU) is None


# ---- pipelines with prompts

def test_text_encoders_are_called_as_the_pipeline_calls_them(prompted: Path) -> None:
    """Their answer is the condition; without guidance no negative prompt is encoded, with it one."""
    opened = open_model(str(prompted), prompts=("a red apple",))
    one = Subject.of(opened)
    model: Any = opened.teacher
    works = speed.works_of(one, 3)
    assert list(works) == ["text", "denoiser", "decoder"]
    (answer,) = works["text"]()
    torch.testing.assert_close(answer[0], model.condition(torch.zeros(3, dtype=torch.long))["encoder_hidden_states"])
    (_, arguments), = speed.encoder_calls(model, ["a red apple"] * 3, 1.0)
    assert arguments["input_ids"].shape == (3, 24)
    assert len(speed.encoder_calls(model, ["a red apple"], 3.0)) == 2
    x0 = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    assert isinstance(one.codec, LawCodec)
    torch.testing.assert_close(one.codec.decode(x0), model.codec.decode(x0), rtol=0, atol=1e-3)
    assert works["decoder"]().shape == (3, 3, 16, 16)


def test_the_command_on_a_pipeline(prompted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "speed", str(prompted), "--prompt", "a red apple", "--batches", "2", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    spans = [row["batches"][0]["ms"][span]["median"] for span in speed.SPANS]
    assert 0 < spans[0] < spans[1] < spans[2]
    assert set(row["flops"]) == {"text", "denoiser", "decoder"}
    assert min(row["flops"].values()) > 1000
    assert row["picture"] == [3, 16, 16]
    assert len(row["model"]["sha256"]) == 64


# ---- torch.compile

def test_denoiser_and_decoder_are_compiled_and_the_answer_stays(prompted: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    whole = nn.Module.compile

    def compile(module: nn.Module, **options: Any) -> None:
        assert options == {"dynamic": False}
        compiled.append(module)
        whole(module, backend="eager", **options)                                                    # the code generator takes a minute

    monkeypatch.setattr(nn.Module, "compile", compile)
    one = Subject.of(open_model(str(prompted), prompts=("a red apple",)))
    works = speed.works_of(one, 1)
    before = works["denoiser"](), works["decoder"]()
    one.compile()
    assert isinstance(one.codec, LawCodec)
    assert one.codec.law is not None
    assert compiled == [one.opened.teacher.denoiser.network, one.codec.law.vae.decoder]
    torch.testing.assert_close((works["denoiser"](), works["decoder"]()), before)
    compiled.clear()
    report = speed.bench([str(student)], batches=(1,), runs=1, compiled=True, quiet=True)
    assert len(compiled) == 1
    assert (report["warm_up"], report["env"]["compiled"]) == (10, True)
    timing = report["rows"][0]["batches"][0]
    assert timing["cold_ms"] > 3 * timing["ms"]["with_decoder"]["median"]


# ---- the command

def test_the_command_compares_times_and_writes_a_file(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["bench", "speed", str(student), "--steps", "1", "--against", str(student), "--batches", "1,3"]
    assert command([*common, "--json", "--to", str(tmp_path / "deep" / "speed.json")]) == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    assert json.loads((tmp_path / "deep" / "speed.json").read_text()) == report
    assert "132/132" in captured.err                                                                  # two models, two sizes, 33 runs
    one, two = report["rows"]
    assert (one["sampler"]["nfe"], two["sampler"]["nfe"]) == (1, 2)
    assert [timing["batch"] for timing in one["batches"]] == [1, 3]
    assert all(set(timing["faster"]) == {"denoiser", "with_decoder"} for timing in one["batches"])
    assert all(timing["faster"]["denoiser"] > 1.2 for timing in one["batches"])                       # half the calls
    assert all(timing["faster"] is None for timing in two["batches"])
    assert {(timing["memory"], timing["ms"]["with_text"]) for row in report["rows"] for timing in row["batches"]} == {(None, None)}
    assert (report["runs"], report["warm_up"], report["against"]) == (30, 3, str(student))
    assert report["env"]["threads"] == torch.get_num_threads()
    assert {"torch", "device", "commit", "precision", "attention"} <= set(report["env"])
    read = timings.read(tmp_path / "deep" / "speed.json")
    found = read.of({"model": one["model"], "sampler": {"nfe": 1}})
    assert read.batch == 1
    assert found == {span: ms and ms["median"] for span, ms in one["batches"][0]["ms"].items()}
    assert read.of({"model": one["model"], "sampler": {"nfe": 4}}) is None
    assert one["picture"] == [1, 16, 16]
    text = speed.shown(report).splitlines()
    assert len(text) == 1 + 4 + 2
    assert text[0].split()[:4] == ["model", "batch", "NFE", "GFLOP"]
    assert text[1].endswith("x")
    assert not text[3].endswith("x")


@pytest.mark.parametrize(("arguments", "said"), [
    (["{student}", "--batches", "1;8"], "--batches is one number or several"),
    (["{student}", "--batches", ""], "--batches is one number or several"),
    (["{student}", "--batches", "0"], "different numbers of at least 1, got 0"),
    (["{student}", "--batches", "8,8"], "different numbers"),
    (["{student}", "--runs", "5"], "--runs"),
    (["{student}", "--precision", "fp8"], "precision must be fp32 or bf16, got 'fp8'"),
    (["{student}", "--prompt", "a sock"], "takes no prompts"),
    (["{student}", "--steps", "0"], "--steps"),
    (["{student}", "--against", "{tmp}/nowhere"], "no exported student"),
    (["{student}", "--to", "{tmp}/speed.txt"], "must name a .json file"),
    (["{student}", "--device", "tpu9"], "cannot be used here"),
    (["{tmp}/nowhere"], "no exported student"),
    ([], "Missing argument"),
])
def test_mistakes_are_one_line_and_write_nothing(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str],
                                                 said: str) -> None:
    assert command(["bench", "speed", *(a.format(student=student, tmp=tmp_path) for a in arguments)]) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_pipeline_wants_a_prompt(prompted: Path) -> None:
    with pytest.raises(ValueError, match="makes pictures of prompts: give --prompt"):
        speed.bench([str(prompted)], quiet=True)


def test_bf16_is_the_denoisers_autocast(student: Path) -> None:
    report = speed.bench([str(student)], batches=(1,), runs=1, precision="bf16", quiet=True)
    assert report["env"]["precision"] == "bf16"
    opened = open_model(str(student), autocast=speed.AUTOCAST["bf16"])
    inside: list[torch.dtype] = []
    network: Any = opened.teacher.denoiser.network
    network.mid_block.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    speed.works_of(Subject.of(opened), 1)["denoiser"]()
    assert set(inside) == {torch.bfloat16}
