"""Each illness is made on purpose and found, by its name and no other's; the healthy toys and stored logs raise no alarm.

Distillations through `toys.train` are held to be healthy wherever they run in this suite.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from confusion import record
from oracles import MixtureTeacher
from tiny import log_lines, snapshot, tiny_recipe
from toys import FastDraws, Mlp, Oracle, distil, draw_student, four, pretrained, ring

from stepdistill import diagnose as physician
from stepdistill import recipe as recipes
from stepdistill.cli import run as command
from stepdistill.diagnose import Case, case_of, examine, judge
from stepdistill.diffusion.process import Flow
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.times import Uniform
from stepdistill.drift import against, drift
from stepdistill.export import export
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch, Loss, Setup
from stepdistill.methods.consistency import Consistency, ConsistencyConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.imagine_flash import ImagineFlash, ImagineFlashConfig
from stepdistill.methods.phased_dmd import PhasedDMD, PhasedDMDConfig
from stepdistill.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.recipe import OptimRecipe
from stepdistill.training import loop, optim

RING = ring()
RATES = {"student": OptimRecipe(5e-4), "fake": OptimRecipe(1e-3), "disc": OptimRecipe(1e-3)}


@pytest.fixture(scope="module")
def start() -> Denoiser:
    return pretrained(RING, 128, 600, batch=256)


def dmd2(cls: type[DMD2] = DMD2, **options) -> DMD2:
    return cls(DMD2Config(**{"fake_updates": 5, "gan_weight": 0, **options}), Setup(Flow(), (2,)))


def illnesses(lines: list[dict]) -> list[str]:
    return [finding.illness for finding in judge(case_of(lines))]


def distilled(method, start: Denoiser, rates=RATES, steps: int = 400, batch: int = 128) -> list[str]:
    """What is found in the log of a distillation on the ring."""
    lines: list[dict] = []
    distil(method, RING, start, rates, steps, batch, lines=lines)
    return illnesses(lines)


# ---- illnesses of curves, made on the ring

def test_a_healthy_run_is_silent(start):
    assert record("", "DMD2", distilled(dmd2(), start)) == []


def test_every_method_has_a_toy_that_is_judged():
    """Each such test is marked, and conftest.py sees to it that it has recorded a run of that method."""
    tests = [path.read_text() for path in (Path(__file__).parent / "methods").glob("test_*.py")]
    assert {name for text in tests for name in re.findall(r'mark\.judges\("(\w+)"\)', text)} == set(METHODS)


def climbing(student_loss):
    """This loss, climbed where it should be descended."""
    def reversed_loss(self, m, batch, draws) -> Loss:
        found = student_loss(self, m, batch, draws)
        return Loss(-found.value, found.log)

    return reversed_loss


class Reversed(DMD2):
    student_loss = climbing(DMD2.student_loss)


def test_a_wrong_sign(start):
    found = distilled(dmd2(Reversed), start, {**RATES, "student": OptimRecipe(1e-4)})
    assert record("wrong sign of the gradient", "DMD2 whose student climbs", found) == ["wrong sign of the gradient"]


def test_a_fake_score_that_lags(start):
    found = distilled(dmd2(), start, {"student": OptimRecipe(2e-3), "fake": OptimRecipe(1e-4)})
    assert record("fake score lagging", "DMD2 with a fake score at a twentieth of the student's rate", found) == ["fake score lagging"]


def test_a_fake_score_that_lags_in_a_phase(start):
    """Phased DMD has a gap and a fake score for each phase: those of one phase rise, and not because the other began."""
    method = PhasedDMD(PhasedDMDConfig(), Setup(Flow(), (2,), SamplerSpec((1.0, 0.75))))
    lines: list[dict] = []
    distil(method, RING, start, {"student": OptimRecipe(2e-3), "fake": OptimRecipe(1e-4)}, 400, 128, lines=lines)
    (found,) = judge(case_of(lines))
    assert record("fake score lagging", "Phased DMD with a fake score at a twentieth of the student's rate", [found.illness]) == [
        "fake score lagging"]
    assert "the gap of the scores of phase 1 rose" in found.evidence


class Jolted(DMD2):
    """In the middle of the run the fake score is thrown off."""

    calls = 0

    def critic_loss(self, m, batch, draws) -> Loss:
        self.calls += 1
        if self.calls == 200:
            with torch.no_grad():
                for i, weight in enumerate(m.fake.network.parameters()):
                    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)), alpha=0.5)
        return super().critic_loss(m, batch, draws)


def test_a_student_that_is_thrown_off(start):
    assert record("instability", "DMD2 whose fake score is thrown off in the middle", distilled(dmd2(Jolted), start)) == ["instability"]


def test_a_saturated_discriminator(start):
    """It sees hardly noised samples of a student that does not move: that one comes no nearer to the teacher is no wrong sign."""
    method = dmd2(gan_weight=1e-6, disc_weight=1.0, times=Uniform(0.02, 0.1), fake_times=Uniform(0.001, 0.1))
    found = distilled(method, start, {**RATES, "student": OptimRecipe(1e-7)})
    assert record("discriminator saturated", "DMD2 + GAN that sees hardly noised samples of a student that does not move", found) == [
        "discriminator saturated"]


def test_a_target_that_collapses():
    """Without a boundary, agreement is reached by saying the same of everything: f is a network that speaks x0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Mlp(2, 128)
        torch.nn.init.normal_(network.leave.weight, std=0.3)
    speaks_x0 = Denoiser(network.eval(), Flow(), "x0", clock="t")
    method = Consistency(ConsistencyConfig(intervals=50, target_decay=0, huber=0), Setup(Flow(), (2,)))
    found = distilled(method, speaks_x0, {"student": OptimRecipe(1e-3)}, 600)
    assert record("consistency target collapse", "consistency without a boundary condition", found) == ["consistency target collapse"]


class Unbounded(SwiftBrush):
    """Climbs, and its steps grow with the distance: no normaliser bounds them."""

    student_loss = climbing(SwiftBrush.student_loss)


def test_a_run_that_diverges(start):
    method = Unbounded(SwiftBrushConfig(fake_updates=2), Setup(Flow(), (2,)))
    found = distilled(method, start, {**RATES, "student": OptimRecipe(1e-3)}, 300)
    assert record("diverging", "SwiftBrush that climbs", found) == ["diverging"]


# ---- illnesses of pictures: points of toys, as two halves of a picture each

def rendered(x: torch.Tensor) -> torch.Tensor:
    """Points (N, 2) as uint8 pictures (N, 1, 16, 16), the halves as bright as the coordinates are large."""
    halves = (127.5 + 40 * x.double()).round().clamp(0, 255).to(torch.uint8)
    return halves[:, None, None, :].repeat_interleave(8, -1).expand(-1, 1, 16, 16).contiguous()


def barred(x: torch.Tensor) -> torch.Tensor:
    """Points (N, 1) as pictures (N, 1, 32, 32) of a bar that lies where they do: all of one contrast."""
    columns = torch.arange(32)
    return (255 * ((columns - 16 - 4 * x.double()).abs() < 3)).to(torch.uint8)[:, None, None, :].expand(-1, 1, 32, 32).contiguous()


def looks(student: torch.Tensor, teacher: torch.Tensor) -> list[str]:
    """What is found when these are the student's pictures and the teacher's."""
    one = torch.zeros(len(student), dtype=torch.long)
    values = against(drift(student, one), drift(teacher, one))
    return illnesses([{"step": step, **{f"look/{name}": value for name, value in values.items()}} for step in (0, 1)])


def test_modes_that_are_lost():
    """Imagine Flash whose students start from fresh noise, not from the sample's own: all collapses to one point."""
    line, found = MixtureTeacher(Flow(), "flow"), {}
    begin, truth = pretrained(line, 96, 500, batch=256), line.data(4096, torch.Generator().manual_seed(1))[:, None]
    for noise in ("own", "fresh"):
        method = ImagineFlash(ImagineFlashConfig() if noise == "own" else ImagineFlashConfig(noise="fresh"),
                              Setup(Flow(), (1,), SamplerSpec((1.0, 2 / 3, 1 / 3))))
        student = distil(method, line, begin, {"student": OptimRecipe(1e-3, schedule="cosine")}, 100, 256, lines=[]).student
        found[noise] = looks(barred(draw_student(student, method, 4096, (1,))), barred(truth))
    record("", "ImagineFlash", found["own"])
    record("mode loss", "Imagine Flash whose students start from fresh noise", found["fresh"])
    assert found == {"own": [], "fresh": ["mode loss"]}


def test_too_much_guidance():
    """Four classes of which w = 1 makes what they are, and w = 4 what is further out than any of them."""
    teacher, labels = Oracle(four()).denoiser(), torch.arange(2048) % 4
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 4)})
    points = {w: sample(teacher, SamplerSpec(tuple((50 - i) / 50 for i in range(50)), renoise=0, guidance=w), cond,
                        FastDraws(0, range(2048)), (2,)) for w in (1.0, 1.25, 4.0)}
    plain, some, much = (rendered(points[w]) for w in (1.0, 1.25, 4.0))
    assert record("", "an exact teacher, guidance 1.25", looks(some, plain)) == []
    assert record("oversaturation", "an exact teacher, guidance 4", looks(much, plain)) == ["oversaturation"]


def test_pictures_of_one_colour():
    """Points that are hardly apart, or one point, make pictures as good as grey; points half as far apart as the teacher's do not."""
    truth = RING.data(1024, torch.Generator().manual_seed(0))
    teacher = rendered(truth)
    assert record("", "pictures of half the contrast", looks(rendered(0.5 * truth), teacher)) == []
    for share in (0.05, 0.0):
        assert record("collapsed student", f"pictures of {share:.0%} of the contrast", looks(rendered(share * truth), teacher)) == [
            "collapsed student"]


def test_a_lattice():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(128 + 30 * torch.randn(64, 1, 4, 4, generator=generator), size=32, mode="bicubic")
    lattice = torch.zeros(32)
    lattice[::4] = 10
    one = torch.zeros(64, dtype=torch.long)
    clean, woven = ((coarse + extra).clamp(0, 255).to(torch.uint8) for extra in (torch.zeros(32), lattice))
    values = against(drift(woven, one), drift(clean, one))
    found = illnesses([{"step": 0, **{f"look/{name}": value for name, value in values.items()}}])
    assert "grid artefacts" in record("grid artefacts", "pictures with every fourth column brighter", found)


# ---- illnesses of exams

def examined(kid: list[float], frechet: list[float] | None = None, raw: bool = False) -> list[dict]:
    """Lines as exams write them, with a standard error of 0.01; `raw` where an average is kept as well."""
    marks = {f"{kind}/{name}": values for kind in ("exam", "exam_raw")[: 1 + raw]
             for name, values in (("frechet_x", frechet or kid), ("kid_x", kid))}
    return [{"step": 100 * i, **{key: values[i] for key, values in marks.items()}, **{f"{key}_se": 0.01 for key in marks}}
            for i in range(len(kid))]


def test_an_exam_that_jumps_up():
    lines = examined([0.5, 0.3, 0.2, 0.21, 0.4])
    assert record("past its best", "an exam 14 standard errors above the best", illnesses(lines)) == ["past its best"]
    (found,) = judge(case_of(lines))
    assert "0.2 in exam 3 of 5 and is 0.4" in found.evidence
    assert "export --best" in found.remedy
    assert "ema_decay" in found.remedy
    (found,) = judge(case_of(examined([0.5, 0.2, 0.4], raw=True)))
    assert "ema_decay" not in found.remedy


def test_exams_that_only_waver():
    """Within what chance explains, or better again in the end; and only the measure that chooses the best checkpoint counts."""
    for kid in ([0.2], [0.5, 0.2, 0.24], [0.5, 0.2, 0.4, 0.19]):
        assert record("", "exams that waver", illnesses(examined(kid))) == []
    lines = examined([0.5, 0.2, 0.21], [0.5, 0.2, 0.4])
    for best, found in (("kid", []), ("frechet", ["past its best"])):
        recipe = recipes.load("fashion/dmd2_datafree", [f"exam={{every: 100, best: {best}}}"])
        names = [finding.illness for finding in judge(case_of(lines, recipe))]
        assert record("".join(found), f"the last exam is worse by frechet; {best} chooses", names) == found


# ---- whole runs

@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


DATA_FREE = {"method__gan_weight": 0}


def test_weights_that_are_rounded_away(base, tmp_path, monkeypatch):
    """Stored in bfloat16 at a rate of 1e-7, past the check that refuses it."""
    monkeypatch.setattr(optim, "check_weights_can_move", lambda *args: None)
    rates = {"student": {"lr": 1e-7}, "fake": {"lr": 1e-7}}
    loop.start(tiny_recipe(base, **DATA_FREE, optim=rates, weights="bfloat16", steps=4), tmp_path / "run")
    found = examine(tmp_path / "run").findings
    names = [finding.illness for finding in found]
    assert record("stuck weights", "DMD2 in bfloat16 at a rate of 1e-7", names) == ["stuck weights"]
    assert "weights: float32" in found[0].remedy


def test_gradients_that_are_not_finite(base, tmp_path, monkeypatch):
    original = DMD2.critic_loss

    def loss(self: DMD2, m, batch: Batch, draws) -> Loss:
        found = original(self, m, batch, draws)
        return Loss(found.value * float("nan"), found.log) if draws.step == 2 else found

    monkeypatch.setattr(DMD2, "critic_loss", loss)
    loop.start(tiny_recipe(base, **DATA_FREE, steps=6, max_skips=3), tmp_path / "run")
    found = examine(tmp_path / "run")
    names = [finding.illness for finding in found.findings]
    assert record("diverging", "DMD2 with a gradient that is not finite", names) == ["diverging"]
    assert "1 updates in 6 steps" in found.findings[0].evidence


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    loop.start(tiny_recipe(base, **DATA_FREE, steps=20, preview_every=10, preview_count=12), run)
    return run


def test_a_sound_run_and_export(trained, tmp_path):
    export(trained, tmp_path / "student")
    found = examine(trained, tmp_path / "student")
    record("", "DMD2", [finding.illness for finding in found.findings])
    assert (found.method, found.step, found.steps, found.findings, found.unseen) == ("dmd2", 20, 20, (), ())
    before = snapshot(trained)
    assert examine(trained).unseen == ("an export: name one with --export",)
    assert snapshot(trained) == before                                                       # a physician touches nothing


@pytest.mark.parametrize("what", ["scheduler", "sampler", "index", "weights"])
def test_an_export_that_is_not_run_as_it_was_trained(trained, tmp_path, what):
    folder = tmp_path / "student"
    export(trained, folder, "raw" if what == "weights" else "ema")
    name = {"scheduler": "scheduler/scheduler_config.json", "sampler": "stepdistill.json", "index": "model_index.json"}.get(what)
    if name:
        values = json.loads((folder / name).read_text())
        if what == "scheduler":
            values["beta_end"] = 0.02
        else:
            values["sampler"]["times"] = [0.7]
        (folder / name).write_text(json.dumps(values))
    found = examine(trained, folder).findings
    names = [finding.illness for finding in found]
    assert record("schedule mismatch at export", f"an export whose {what} is another", names) == ["schedule mismatch at export"]
    told = {"sampler": "times is (0.7,)", "weights": "not their average"}
    assert told.get(what, "its scheduler is not the one that was exported") in found[0].evidence


def test_a_run_that_went_on_since(base, tmp_path):
    loop.start(tiny_recipe(base, **DATA_FREE, steps=4), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "student")
    notes = json.loads((tmp_path / "student" / "stepdistill.json").read_text())
    (tmp_path / "student" / "stepdistill.json").write_text(json.dumps({**notes, "step": 2}))
    assert "it is of step 2, and the run is at 4" in examine(tmp_path / "run", tmp_path / "student").findings[0].evidence


# ---- what is read

def test_short_logs_say_what_was_not_examined(base, tmp_path):
    loop.start(tiny_recipe(base, **DATA_FREE, steps=2), tmp_path / "run")
    found = examine(tmp_path / "run")
    assert found.findings == ()
    assert [what.split(":")[0] for what in found.unseen] == ["the student's pictures beside the teacher's", "the shapes of curves",
                                                             "an export"]


def test_bad_input_is_one_line(tmp_path, trained, capsys):
    def refused(*arguments: str) -> str:
        assert command(["diagnose", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is not a run" in refused(str(tmp_path))
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    assert "has not logged anything yet" in refused(str(damaged))
    (damaged / "log.jsonl").write_text("")
    assert "is empty" in refused(str(damaged))
    (damaged / "log.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    assert "line 2 is damaged" in refused(str(damaged))
    assert "no exported student" in refused(str(trained), "--export", str(tmp_path / "nowhere"))


def test_a_last_line_cut_by_a_kill_is_left_out(trained, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text((trained / "log.jsonl").read_text() + '{"step": 20, "stud')
    assert len(physician.read_log(path)) == len(log_lines(trained))


def test_the_command_prints_for_people_and_for_programs(trained, capsys):
    assert command(["diagnose", str(trained)]) == 0
    assert "dmd2, 20 of 20 steps: no illness seen" in capsys.readouterr().out
    assert command(["diagnose", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


def test_every_finding_reads_well():
    """No number that is not one, and a remedy, in every sentence that a rule can say."""
    falling, rising = [1 / (i + 1) for i in range(32)], [1 + i / 4 for i in range(32)]
    flat = [1.0] * 32
    cases = [{"moved/student": [0.0] * 32}, {"student/score_gap": [*flat[:20], *rising[12:24]]},
             {"grad/fake": flat[:28] + [99.0] * 4}, {"student/score_gap": rising, "critic/denoise": rising},
             {"student/score_gap": flat, "critic/denoise": flat, "student/x0_std": flat}, {"disc/disc_accuracy": [0.99] * 32},
             {"look/contrast": [1.5], "look/clipped": [0.3], "look/saturation": [1.4]}, {"look/spread": [0.2]}, {"look/grid": [4.0]},
             {"look/spread": [0.0], "look/contrast": [0.0]}, {"exam/kid_x": [0.1, 0.5], "exam/kid_x_se": [0.0, 0.0]},
             {"student/distance": [x**4 for x in falling], "student/x0_std": falling}]
    for curves in cases:
        (found,) = judge(Case(curves))
        assert found.remedy
        assert "nan" not in found.evidence
        assert len(found.evidence) > 20
