"""What every method must obey, over the table of methods. A new method is tested by adding its line to METHODS."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from oracles import f64
from toys import run_of, tiny_unet, train

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import TableVP
from stepdistill.diffusion.sampler import SamplerSpec, sample
from stepdistill.diffusion.times import trailing
from stepdistill.losses.reported import Mean
from stepdistill.methods import METHODS, find
from stepdistill.methods.base import Batch, Conditions, Images, Loss, Method, Pairs, Sample, Setup, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser, default_taps
from stepdistill.models.load import process_of
from stepdistill.models.roles import Roles
from stepdistill.recipe import OptimRecipe, build
from stepdistill.training.assemble import run_update, updates_of
from stepdistill.worlds.fashion.data import CLASSES

SCHEDULERS = {
    "eps": DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "v": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
VARIANTS: dict[str, list[dict]] = {                       # other configurations of a method that must obey too
    "add": [{"distill_weight": 0.0, "r1_weight": 0.0}],
    "ladd": [{"disc_updates": 2, "game": "hinge", "warmup": 0, "r1_weight": 0.1}],
    "dmd2": [{"gan_weight": 0.0}, {"features": "teacher"}, {"fake_updates": 2}, {"r1_weight": 10.0}],
    "sid": [{"split": True, "alpha": 1.2}, {"gan_weight": 0.1, "fake_guidance": -1.0, "r1_weight": 5.0},
            {"fake_guidance": 2.0, "fake_updates": 2}],
    "consistency": [{"target": "student", "solver": "heun", "huber": 0.0}],
    "lcm": [{"target": "ema", "guidance": {"low": 1.0, "high": 3.0}, "points": 1000, "skip": 20, "huber": 0.0},
            {"target": "ema", "guidance": {"low": 1.0, "high": 3.0}, "embed": True}],
    "ctm": [{"points": 6, "solver_steps": 2, "huber": 0.1, "gamma": 0.5}, {"solver_steps": 1, "denoise_weight": 0.0},
            {"points": 6, "solver_steps": 1, "gan_weight": 1.0, "gan_from": 0.0, "adaptive_denoise": True}],
    "tcd": [{"target": "ema", "guidance": {"low": 1.0, "high": 3.0}, "huber": 0.0}],
    "tdd": [{"dropout": 0.0, "eta": 0.0, "huber": 0.0}],
    "pcm": [{"gan_weight": 0.1, "r1_weight": 5.0, "guidance": {"low": 1.0, "high": 3.0}, "dropout": 0.1, "points": 20}],
    "ect": [{"curriculum": "ict", "huber": None}, {"q": 4.0, "double_every": 1, "huber": 0.1}],
    "progressive": [{"start": 8}, {"guidance": {"low": 1.0, "high": 3.0}}],
    "rcm": [{"warmup": 0, "fake_updates": 1, "calls": 1, "derivative": "difference"}],
    "scm": [{"warmup": 0, "velocity": "data", "weight": "even"}, {"derivative": "difference", "data_std": 1.0},
            {"adaptive_weight": True, "warmup": 2}],
    "swiftbrush": [{"fake_updates": 2, "dropout": 0.5}],
    "swiftbrush_v2": [{"align_weight": 0.0, "fake_updates": 2}, {"align_weight": 5.0, "align_above": 1.0}],
    "pgsb": [{"fake_updates": 2, "guidance_low": 1.0}],
    "decoupled_dmd": [{"fake_updates": 1, "ca_times": {"low": 0.02, "high": 0.98, "shift": 3.0}}],
    "dmd": [{"match_pairs": False, "huber": 0.1}, {"reg_weight": 0.0}],
    "dp_dmd": [{"fake_updates": 2, "teacher_steps": 4, "anchor_steps": 1}],
    "f_distill": [{"divergence": "forward_kl", "gan_weight": 0.0, "fake_updates": 2}],
    "tdm": [{"fake_target": "tdm", "huber": 0.0, "fake_updates": 2}],
    "imagine_flash": [{"noise": "fresh", "noise_correction": False, "teacher_steps": 2},
                      {"shifted": False, "solver": "heun", "teacher_steps": 2}],
    "phased_dmd": [{"phases": 1, "fake_updates": 1}, {"experts": False}],
}
LEAST = {"phased_dmd": 2}                                   # steps of a student below which a method has nothing to do
CASES = [pytest.param(name, options, id=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
         for name in METHODS for options in ({}, *VARIANTS.get(name, []))]
every_case = pytest.mark.parametrize(("name", "options"), CASES)
every_kind = pytest.mark.parametrize("kind", SCHEDULERS)


def calls(name: str, steps: int) -> int:
    """Of a student asked for in so many steps."""
    return 1 if find(name).one_step else max(steps, LEAST.get(name, 1))


def fields_of(method: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(method.Config)]


def make(name: str, options: Mapping, kind: str = "eps", steps: int = 1, guidance: float = 2.0) -> tuple[Method, Roles]:
    """A method and its roles over a tiny U-Net, the teacher guided."""
    scheduler = SCHEDULERS[kind]
    process, spoken, clock = process_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    assert spoken == kind
    cls = find(name)
    cfg = build(cls.Config, dict(options), "method")
    network = tiny_unet().requires_grad_(False)
    teacher = Denoiser(network, process, kind, clock, guidance, taps=default_taps(network))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    method = cls(cfg, Setup(process, (1, 8, 8), SamplerSpec(trailing(calls(name, steps)))))
    roles = Roles.build(cls.needs(cfg), teacher, lambda: example, boundaries=method.sampler().boundaries, labels=CLASSES)
    with torch.no_grad():                                 # start away from every fixed point
        for role in roles.names:
            if role != "teacher":
                generator = torch.Generator().manual_seed(len(role))
                for p in roles.parameters(role):
                    p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return method, roles


class Watched(dict):
    """A batch's streams, remembering which were read."""

    def __init__(self, streams: Mapping[str, Sample], read: set[str]):
        super().__init__(streams)
        self.read = read

    def __getitem__(self, name: str) -> Sample:
        self.read.add(name)
        return super().__getitem__(name)


def data(method: Method, read: set[str] | None = None):
    def batch(draws: Draws) -> Batch:
        made = {}
        for name, stream in method.data(method.cfg).items():
            labels = draws.each(f"{name}/labels").integers(3)
            cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)})
            x0, z = (draws.each(f"{name}/{part}").normal(1, 8, 8) for part in ("x0", "z"))
            made[name] = Sample(cond, None if isinstance(stream, Conditions) else x0, z if isinstance(stream, Pairs) else None, labels)
        return Batch(Watched(made, set() if read is None else read))

    return batch


def draws(step: int, update: int) -> Draws:
    return Draws(0, range(4), step, update)


def one_period(method: Method) -> list[tuple[int, int, object]]:
    """(step, index, update) of enough steps to see every kind of update."""
    return [(step, index, update) for step in (0, 1) for index, update in enumerate(method.plan(step))]


def snapshot(roles: Roles) -> dict[str, list[torch.Tensor]]:
    return {name: [v.clone() for v in roles.module(name).state_dict().values()] for name in roles.names}


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def optim(roles: Roles) -> dict[str, OptimRecipe]:
    return {name: OptimRecipe(1e-3) for name in roles.trains}


@every_case
def test_declarations(name, options):
    """The student trains; trained roles move in some plan, and plans move trained roles only; roles and losses exist."""
    method, _ = make(name, options)
    needs = method.needs(method.cfg)
    assert needs["student"].trains
    counts = updates_of(method, 200)
    assert set(counts) == {role for role, declared in needs.items() if declared.trains}
    assert all(counts.values())
    for _, _, update in one_period(method):
        assert callable(getattr(method, f"{update.loss}_loss"))
    assert method.plan(0)[0].reuse is False, "nothing came before the first update"
    assert sum(stage.steps for stage in method.stages(37)) == 37
    assert all(isinstance(stream, Conditions | Images | Pairs) for stream in method.data(method.cfg).values())


@pytest.mark.parametrize("name", METHODS)
def test_is_one_short_file(name):
    cls = METHODS[name]
    path = Path(inspect.getfile(cls))
    assert path.stem == name
    assert len(path.read_text().splitlines()) < 200
    assert cls.__bases__ == (Method,), "inheritance stops at Method"
    assert cls.title
    assert cls.family
    assert f"https://arxiv.org/abs/{cls.arxiv}" in (inspect.getmodule(cls).__doc__ or "")
    source = path.read_text()
    assert not any(re.search(rf"(import |methods\.){other}\b", source) for other in METHODS if other != name)
    assert "accelerate" not in source
    assert "stepdistill.training" not in source


@every_case
@every_kind
def test_gradients_reach_only_the_trained_roles(name, options, kind):
    """Every update leaves a finite gradient on each role it trains and none on any other."""
    method, roles = make(name, options, kind)
    run, before = run_of(method, roles, draws, data(method)), []
    for step, index, update in one_period(method):
        before, logs = run_update(run, step, index, update, before)
        sums = [value for part in logs.values() for value in (part.total, part.count)]
        assert all(bool(torch.isfinite(v)) and not v.requires_grad for v in sums)
        for role in roles.names:
            grads = [p.grad for p in roles.parameters(role) if p.grad is not None]
            if role in update.trains:
                assert grads
                assert all(bool(torch.isfinite(g).all()) for g in grads)
                assert any(bool(g.any()) for g in grads), f"{update.loss} leaves {role} where it is"
            else:
                assert not grads, f"{update.loss} leaves a gradient on {role}"
            roles.module(role).zero_grad(set_to_none=True)


@every_case
def test_losses_are_scalars_with_plain_logs(name, options):
    method, roles = make(name, options)
    for step, index, update in one_period(method):
        if not update.reuse:
            roles.train_only(update.trains)
            loss = method.loss(update, roles, data(method)(draws(step, index)), draws(step, index))
            assert isinstance(loss, Loss)
            assert loss.value.shape == ()
            assert loss.value.dtype == torch.float32
            assert all(isinstance(v, Mean) or torch.as_tensor(v).numel() == 1 for v in loss.log.values())


@every_case
def test_frozen_roles_stay_bit_identical(name, options):
    """A real run moves every trained role, none of them in the others' updates, and the teacher by not one bit."""
    method, roles = make(name, options)
    first, before, batch = snapshot(roles), {}, data(method)

    def batch_of(keys: Draws) -> Batch:
        before.update(snapshot(roles))
        return batch(keys)

    def watch(step: int, update: Update) -> None:
        after = snapshot(roles)
        for role in set(roles.trains) - set(update.trains):
            assert same(before[role], after[role]), f"{update.loss} moved {role}"
        before.update(after)

    train(method, roles, optim(roles), 3, draws, batch_of, watch)
    last = snapshot(roles)
    assert same(first.get("teacher", []), last.get("teacher", []))                                   # not every method asks one
    for role in roles.trains:
        assert not same(first[role], last[role]), role
    assert not any(roles.module(role).training for role in roles.names if role not in roles.trains)


@every_case
@every_kind
def test_three_steps_of_a_real_network(name, options, kind):
    """eps, v at zero terminal SNR, and flow teachers: finite all the way (train stops at a gradient that is not), in one and four steps."""
    for steps in (1, 4):
        method, roles = make(name, options, kind, steps)
        counts = train(method, roles, optim(roles), 3, draws, data(method))
        assert counts == updates_of(method, 3)
        cond = Conditioning({"class_labels": torch.arange(3)})
        x0 = sample(roles.student, method.sampler(), cond, Draws(0, range(3)), (1, 8, 8))
        assert x0.shape == (3, 1, 8, 8)
        assert bool(torch.isfinite(x0).all())


@every_case
def test_every_declared_stream_is_read_and_no_other(name, options):
    method, roles = make(name, options)
    read: set[str] = set()
    run, before = run_of(method, roles, draws, data(method, read)), []
    for step, index, update in one_period(method):
        before, _ = run_update(run, step, index, update, before)
    assert read == set(method.data(method.cfg))


@every_case
def test_same_keys_give_the_same_loss(name, options):
    """No hidden randomness: a loss repeats bitwise, leaves the global generator alone, and changes with the key."""
    method, roles = make(name, options)
    for step, index, update in one_period(method):
        if update.reuse:
            continue
        values = []
        for keyed in (draws(step, index), draws(step, index), draws(step + 10, index)):
            roles.train_only(update.trains)
            state = torch.get_rng_state()
            values.append(float(method.loss(update, roles, data(method)(keyed), keyed).value.detach()))
            assert torch.equal(torch.get_rng_state(), state)
        assert values[0] == values[1] != values[2]


@every_case
def test_loss_of_a_batch_is_the_mean_over_its_parts(name, options):
    """So that accumulation and several processes change nothing: gradients of two halves average to that of the whole."""
    method, roles = make(name, options)

    def gradients(indices, update, step, index):
        keyed = Draws(0, indices, step, index)
        roles.train_only(update.trains)
        method.loss(update, roles, data(method)(keyed), keyed).value.backward()
        found = [p.grad.clone() for role in update.trains for p in roles.parameters(role) if p.grad is not None]
        for role in update.trains:
            roles.module(role).zero_grad(set_to_none=True)
        return found

    for step, index, update in one_period(method):
        if not update.reuse:
            whole, first, second = (gradients(r, update, step, index) for r in (range(4), range(2), range(2, 4)))
            norm = torch.stack([g.norm() for g in whole]).norm()
            off = torch.stack([(w - (a + b) / 2).norm() for w, a, b in zip(whole, first, second, strict=True)]).norm()
            assert float(off) < 1e-4 * float(norm)


@every_case
def test_state_survives(name, options):
    """state() is plain JSON; restored into a fresh method it gives the same plan, loss and state; foreign state is refused."""
    method, roles = make(name, options)
    train(method, roles, optim(roles), 3, draws, data(method))
    state = json.loads(json.dumps(method.state()))
    fresh = make(name, options)[0]
    fresh.restore(state)
    assert fresh.state() == method.state()
    for step in range(6):
        assert fresh.plan(step) == method.plan(step)
    update, keyed = method.plan(0)[0], draws(0, 0)
    values = [float(m.loss(update, roles, data(m)(keyed), keyed).value.detach()) for m in (method, fresh)]
    assert values[0] == values[1]
    with pytest.raises((ValueError, KeyError)):
        fresh.restore({"nothing a method would keep": 1})


@every_case
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampler(name, options, steps):
    """As many calls as asked for, from pure noise, unguided, and the same after a trip through JSON."""
    method, _ = make(name, options, steps=steps)
    spec = method.sampler()
    assert len(spec.times) == spec.nfe == calls(name, steps)
    assert spec.times[0] == 1.0
    assert SamplerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    cls = find(name)
    times = (0.4,) if cls.one_step else (1.0, 0.4)
    own = cls(method.cfg, Setup(method.process, (1, 8, 8), SamplerSpec(times, clip_x0=2.0))).sampler()
    assert own.times == times
    assert own.clip_x0 == 2.0


def test_unknown_method():
    with pytest.raises(ValueError, match="did you mean 'dmd2'"):
        find("dmd_2")
    with pytest.raises(ValueError, match="known: " + ", ".join(sorted(METHODS))):
        find("zzz")


@pytest.mark.parametrize("name", METHODS)
def test_configuration_is_checked(name):
    with pytest.raises(ValueError, match=r"unknown recipe key 'method\.no_such_key'"):
        build(METHODS[name].Config, {"no_such_key": 1}, "method")


def test_which_students_have_the_teachers_guidance_in_them():
    """All but those of no teacher or an unguided one, those that are told it, and those that learn both halves of it."""
    def built_in(name: str, **options) -> float:
        method, setup = find(name), Setup(TableVP.scaled_linear(), (1, 8, 8), SamplerSpec(trailing(calls(name, 4))), guidance=3.0)
        return method(build(method.Config, options, "method"), setup).built_in

    without = {name for name in METHODS if built_in(name) == 1}
    assert without == {"ect", "ladd", "guided", "tdd"}
    assert all(built_in(name) == 3 for name in set(METHODS) - without)
    assert built_in("tdd", dropout=0.0) == built_in("pcm") == built_in("lcm", guidance={"low": 1.0, "high": 4.0}) == 3
    assert built_in("pcm", dropout=0.1) == built_in("lcm", guidance={"low": 1.0, "high": 4.0}, embed=True) == 1
    assert built_in("scm", velocity="data") == 1


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if {"times", "fake_times"} <= set(fields_of(method))])
def test_the_fake_score_learns_wherever_it_is_asked(name):
    for low, high, factor in ((0.1, 1.0, 1.0), (0.001, 0.9, 1.0), (0.02, 0.98, 5.0)):                # the shifted ends count
        with pytest.raises(ValueError, match=r"method\.fake_times must hold the range of method\.times"):
            build(METHODS[name].Config, {"fake_times": {"low": low, "high": high, "shift": factor}}, "method")
