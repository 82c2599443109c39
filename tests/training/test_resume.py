"""A resumed run is the run that was never interrupted, bit for bit: after a signal, a crash, a kill, and with damaged checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import final_tensors, log_lines, snapshot, tiny_file, tiny_recipe, tiny_run, unequal

from stepdistill.training import checkpoint, loop

DRIVER = Path(__file__).parent / "kills.py"
STEPS = {"keep": 3, "steps": 6, "checkpoint_every": 2}


class Crash(BaseException):
    """Not an Exception: nothing may catch it."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Do something when the loop reaches a step, once."""
    original, waiting = loop.run_update, [True]

    def spy(run: Any, now: int, *args: Any) -> Any:
        if now == step and waiting:
            waiting.clear()
            action()
        return original(run, now, *args)

    monkeypatch.setattr(loop, "run_update", spy)


def crash() -> None:
    raise Crash


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that nothing interrupted, beside their teacher."""
    folder = tmp_path_factory.mktemp("whole")
    for method in ("dmd2", "consistency"):
        assert loop.start(tiny_recipe(folder, method, **STEPS), folder / method).finished
    return folder


def copy(base: Path, tmp_path: Path, upto: int, method: str = "dmd2") -> Path:
    """The run as it was after `upto` steps."""
    out = tmp_path / "run"
    shutil.copytree(base / method, out)
    for path in checkpoint.listed(out / loop.CHECKPOINTS):
        if int(path.name.removeprefix("step-")) > upto:
            shutil.rmtree(path)
    return out


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log_lines(run)]


def test_a_checkpoint_holds_weights_moments_average_and_generator(base: Path) -> None:
    tensors = final_tensors(base / "dmd2")
    student = tiny_run(base, **STEPS).roles.module("student").state_dict()
    roles = {name.split("/")[1] for name in tensors if name.startswith("role/")}
    assert roles == {"student", "fake", "disc"}                              # the teacher does not change and is not stored again
    assert {name.removeprefix("ema/") for name in tensors if name.startswith("ema/")} == set(student)
    moments = [name for name in tensors if name.startswith("optim/student/")]
    assert {name.split("/")[-1] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(moments) == 3 * len(student)
    assert "rng" in tensors
    state = checkpoint.read(checkpoint.listed(base / "dmd2" / loop.CHECKPOINTS)[-1])[1]
    assert state["counts"] == {"student": 3, "fake": 6, "disc": 6}
    assert state["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(("method", "step"), [("dmd2", 3), ("consistency", 5), ("dmd2", 1)])
def test_a_crash_changes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int) -> None:
    """Step 1 lies before the first checkpoint: the run starts again."""
    out = tmp_path / "run"
    at_step(monkeypatch, step, crash)
    with pytest.raises(Crash):
        loop.start(tiny_recipe(base, method, **STEPS), out)
    assert [int(p.name[-8:]) for p in checkpoint.listed(out / loop.CHECKPOINTS)] == [s for s in (2, 4) if s <= step]
    torch.manual_seed(99)                                                    # a new process would not have this generator's state either
    assert loop.resume(out).finished
    assert unequal(final_tensors(out), final_tensors(base / method)) == []
    assert without_seconds(out) == without_seconds(base / method)
    assert not (out / loop.LOCK).exists()


@pytest.mark.parametrize(("method", "number"), [("dmd2", signal.SIGINT), ("consistency", signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                            method: str, number: signal.Signals) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    stopped = loop.start(tiny_recipe(base, method, **STEPS), out)
    assert (stopped.finished, stopped.step, stopped.steps) == (False, 3, 6)
    assert checkpoint.listed(out / loop.CHECKPOINTS)[-1].name == "step-00000003"
    assert f"stopped by {number.name} after step 3" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    kept = checkpoint.read(checkpoint.listed(out / loop.CHECKPOINTS)[-1])[1]["seconds"]      # before this checkpoint was written
    assert 0 < kept <= stopped.seconds
    assert loop.resume(out).finished
    assert unequal(final_tensors(out), final_tensors(base / method)) == []
    assert without_seconds(out) == without_seconds(base / method)
    seconds = [line["seconds"] for line in log_lines(out)]
    assert seconds == sorted(seconds)                                        # of both sittings together
    assert seconds[-1] > kept


def test_a_second_signal_interrupts_at_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 0, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        loop.start(tiny_recipe(base, "consistency", **STEPS), tmp_path / "run")
    assert not (tmp_path / "run" / loop.CHECKPOINTS).exists()


def test_a_finished_run_says_so_and_does_nothing(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(base / "dmd2")
    outcome = loop.resume(base / "dmd2")
    assert outcome.finished
    assert outcome.already
    assert (outcome.step, outcome.steps) == (6, 6)
    assert "is finished: 6 of 6 steps" in capfd.readouterr().err
    assert snapshot(base / "dmd2") == before


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run: it has no recipe\.yaml"):
        loop.resume(tmp_path)


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / checkpoint.TENSORS).read_bytes())
    data[-100] ^= 1
    (path / checkpoint.TENSORS).write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path / checkpoint.TENSORS, (path / checkpoint.TENSORS).stat().st_size // 2)


def alter_a_count(path: Path) -> None:
    text = (path / checkpoint.STATE).read_text()
    assert '"student": 2' in text
    (path / checkpoint.STATE).write_text(text.replace('"student": 2', '"student": 3'))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped byte": flip_a_byte,
    "tensors cut short": cut_short,
    "no tensors": lambda path: (path / checkpoint.TENSORS).unlink(),
    "garbage for state": lambda path: (path / checkpoint.STATE).write_bytes(b"\xff\x00{garbage"),
    "a list for state": lambda path: (path / checkpoint.STATE).write_text("[1]"),
    "an altered count": alter_a_count,
    "no state": lambda path: (path / checkpoint.STATE).unlink(),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    out = copy(base, tmp_path, upto=4)
    DAMAGES[damage](out / loop.CHECKPOINTS / "step-00000004")
    first, *_ = loop.restore(tiny_run(base, **STEPS), out)
    assert first == 2
    assert "step-00000004 is damaged" in capfd.readouterr().err


def test_the_run_after_a_damaged_checkpoint_ends_the_same(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path, upto=4)
    flip_a_byte(out / loop.CHECKPOINTS / "step-00000004")
    assert loop.resume(out).finished
    assert unequal(final_tensors(out), final_tensors(base / "dmd2")) == []
    assert [line["step"] for line in log_lines(out)] == list(range(6))
    for path in checkpoint.listed(out / loop.CHECKPOINTS):                   # the damaged one was written again
        checkpoint.read(path)


def test_nothing_is_made_up_when_every_checkpoint_is_damaged(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path, upto=4)
    for path in checkpoint.listed(out / loop.CHECKPOINTS):
        cut_short(path)
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be read"):
        loop.resume(out)
    assert snapshot(out) == before


def test_another_thread_count_warns(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run, threads = tiny_run(base, **STEPS), torch.get_num_threads()
    loop.restore(run, base / "dmd2")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 6)
    assert loop.restore(run, base / "dmd2")[:2] == (6, 0)
    assert f"saved with {threads} threads and goes on with {threads + 6}" in capfd.readouterr().err


def test_a_torn_log_is_mended(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path, upto=4)
    path = out / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"step": 5, "secon')
    loop.resume(out)
    assert without_seconds(out) == without_seconds(base / "dmd2")


def test_a_log_line_without_its_line_end_is_not_glued_to_the_next(base: Path, tmp_path: Path) -> None:
    out = copy(base, tmp_path, upto=4)
    path = out / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]).rstrip("\n"))
    loop.resume(out)
    assert without_seconds(out) == without_seconds(base / "dmd2")


def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def zombie() -> Iterator[int]:
    """A process that has ended and whose parent has not read its exit status."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield child.pid
    child.wait()


def test_a_lock_of_a_zombie_is_stale(base: Path, tmp_path: Path, zombie: int) -> None:
    out = copy(base, tmp_path, upto=6)
    (out / loop.LOCK).write_text(json.dumps({"pid": zombie, "host": socket.gethostname()}))
    assert loop.resume(out).already


@pytest.mark.parametrize("lock", ["dead", "garbage", "list"])
def test_a_stale_lock_is_taken_over_with_a_word(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], lock: str) -> None:
    out = copy(base, tmp_path, upto=6)
    text = {"dead": json.dumps({"pid": gone(), "host": socket.gethostname()}), "garbage": '{"pid": 1', "list": "[]"}[lock]
    (out / loop.LOCK).write_text(text)
    assert loop.resume(out).already
    assert "taking over a stale lock" in capfd.readouterr().err
    assert not (out / loop.LOCK).exists()


@pytest.mark.parametrize("owner", [{"pid": os.getppid(), "host": socket.gethostname()}, {"pid": 1, "host": "another-host"}])
def test_a_live_lock_is_respected(base: Path, tmp_path: Path, owner: dict[str, Any]) -> None:
    out = copy(base, tmp_path, upto=4)
    (out / loop.LOCK).write_text(json.dumps(owner))
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"in use by process {owner['pid']} on {owner['host']}"):
        loop.resume(out)
    assert snapshot(out) == before


def killed_runs(base: Path, folder: Path, points: list[str]) -> None:
    """Kill a run at each point, resume it, and hold it against the run that was never killed."""
    shutil.copytree(base / "teacher", folder / "teacher")
    shutil.copytree(base / "pictures", folder / "pictures")
    tiny_file(folder, keep=2, checkpoint_every=2, steps=6)
    done = subprocess.run([sys.executable, str(DRIVER), str(folder), *points], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert {point: row["killed"] for point, row in report.items()} == dict.fromkeys(points, -signal.SIGKILL)
    assert {point: row["resumed"] for point, row in report.items()} == dict.fromkeys(points, 0), done.stderr[-3000:]
    whole = final_tensors(folder / "whole")
    for point in points:
        out = folder / point.replace(" ", "-")
        assert unequal(final_tensors(out), whole) == [], point
        assert without_seconds(out) == without_seconds(folder / "whole"), point
        assert set(snapshot(out)) == set(snapshot(folder / "whole")), (point, report[point]["left"])     # nothing more, nothing less


def test_three_kills(base: Path, tmp_path: Path) -> None:
    killed_runs(base, tmp_path, ["recipe before fsync", "between rename and prune", "random-0"])


@pytest.mark.slow
def test_kills_at_every_dangerous_point(base: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(DRIVER.parent))
    from kills import POINTS

    killed_runs(base, tmp_path, list(POINTS))


@pytest.mark.slow
def test_kills_at_ten_random_moments(base: Path, tmp_path: Path) -> None:
    killed_runs(base, tmp_path, [f"random-{i}" for i in range(10)])
