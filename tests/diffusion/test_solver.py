"""One step of the probability-flow ODE: exact maps, orders of convergence, and the trajectories of stock schedulers."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from oracles import KINDS, PROCESSES, GaussianTeacher, MixtureTeacher, f64

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.diffusion.solver import dpmpp_2m, heun, jump, jump_or_stay
from stepdistill.diffusion.times import trailing

TRIG, FLOW, KARRAS = PROCESSES["trig"], PROCESSES["flow"], PROCESSES["karras"]
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def walk(net, x, times, solver):
    """Every state after x along `times`."""
    before, states = None, []
    for t, r in itertools.pairwise(times):
        pred = net(x, t)
        x = {"ddim": lambda: jump(pred, net.process, r), "heun": lambda: heun(net, pred, net.process, r),        # noqa: B023
             "dpmpp_2m": lambda: dpmpp_2m(pred, before, net.process, r)}[solver]()                              # noqa: B023
        before = pred
        states.append(x)
    return states


def uniform(start: float, end: float, count: int) -> torch.Tensor:
    return torch.linspace(start, end, count + 1, dtype=torch.float64)


def at(k: float) -> torch.Tensor:
    """The time at which the Karras process has noise level k."""
    return KARRAS.time_of(-2 * f64(k).log())


# ------------------------------------------------------------------------------------------------------------------------------- exact maps


@every_process
@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_to_the_same_time_stays(process, kind):
    """J(x, t->t) = x whatever the network says (trajectory S2)."""
    x_t, raw = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = f64([0.05, 0.3, 0.5, 0.8, 0.99])
    pred = Prediction(raw, kind, x_t, process.alpha(t), process.sigma(t))
    torch.testing.assert_close(jump(pred, process, t), x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_is_euler(kind):
    """For flow x + (r - t)·u, for EDM x + (k_r - k_t)(x - x0)/k_t (trajectory S3)."""
    x_t, raw = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, r = f64([0.2, 0.5, 0.8, 0.99]), f64([0.1, 0.0, 0.75, 0.3])
    flow = Prediction(raw, kind, x_t, FLOW.alpha(t), FLOW.sigma(t))
    torch.testing.assert_close(jump(flow, FLOW, r), x_t + (r - t)[:, None] * flow.velocity, rtol=1e-9, atol=1e-9)
    edm = Prediction(raw, kind, x_t, KARRAS.alpha(t), KARRAS.sigma(t))
    k_t, k_r = KARRAS.sigma(t)[:, None], KARRAS.sigma(r)[:, None]
    torch.testing.assert_close(jump(edm, KARRAS, r), x_t + (k_r - k_t) * (x_t - edm.x0) / k_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("process", "x", "t", "r", "golden"), [
    (TRIG, 0.8, 0.9, 0.05, 1.70359941), (FLOW, 0.8, 0.9, 0.05, 1.68570463), (KARRAS, 5.0, at(10.0), at(0.01), 1.54132177),
], ids=["cosine", "flow", "edm"])
def test_golden_transport_maps(process, x, t, r, golden):
    """Trajectory S9, T2."""
    assert float(MixtureTeacher(process).flow_map(f64([x]), t, r)) == pytest.approx(golden, abs=6e-9)


@every_process
@pytest.mark.parametrize("teacher", [GaussianTeacher, MixtureTeacher])
def test_exact_maps_are_where_the_ode_goes(process, teacher):
    """The oracles' maps against a Heun solve of the oracles' own denoisers, which share no code with them (Richardson extrapolated)."""
    net, x = teacher(process, "v"), f64([-1.6, 0.1, 0.8]) * process.prior_std(f64(0.8))
    start, end = process.log_snr(f64([0.8, 0.2]))
    coarse, fine = (walk(net, x, process.time_of(uniform(float(start), float(end), n)), "heun")[-1] for n in (60, 120))
    torch.testing.assert_close((4 * fine - coarse) / 3, net.flow_map(x, f64(0.8), f64(0.2)), rtol=0, atol=1e-5)


@every_process
def test_exact_maps_compose_and_invert(process):
    x, times = f64([-1.5, 0.3, 2.0]), (0.8, 0.5, 0.1)
    for net in (GaussianTeacher(process), MixtureTeacher(process)):
        halfway = net.flow_map(x, times[0], times[1])
        torch.testing.assert_close(net.flow_map(halfway, times[1], times[2]), net.flow_map(x, times[0], times[2]), rtol=0, atol=1e-9)
        torch.testing.assert_close(net.flow_map(halfway, times[1], times[0]), x, rtol=1e-8, atol=1e-8)


def test_diagonal_gaussian_is_its_coordinates():
    mean, std, x = f64([1.0, -2.0]), f64([0.2, 3.0]), torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = f64([0.1, 0.3, 0.5, 0.7, 0.9])
    both = GaussianTeacher(TRIG, "v", mean, std)
    for k in range(2):
        one = GaussianTeacher(TRIG, "v", mean[k], std[k])
        torch.testing.assert_close(both(x, t).raw[:, k], one(x[:, k], t).raw)
        torch.testing.assert_close(both.flow_map(x, t, f64(0.05))[:, k], one.flow_map(x[:, k], t, f64(0.05)))


def test_a_mixture_of_one_is_a_gaussian_and_a_class_is_its_components():
    mean, std = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    std, x, t = std.abs() + 0.1, torch.randn(4, 3, 2).double(), f64([0.1, 0.4, 0.6, 0.9])
    gauss = GaussianTeacher(FLOW, "flow", mean, std)
    mixture = MixtureTeacher(FLOW, "flow", f64([0.2, 0.8]), torch.stack([mean, mean + 1]), torch.stack([std, std]))
    label = {"class_labels": torch.zeros(4, dtype=torch.long)}
    torch.testing.assert_close(mixture(x, t, label).raw, gauss(x, t).raw)
    null = {"class_labels": torch.full((4,), 2)}
    assert torch.equal(mixture(x, t, null).raw, mixture(x, t, None).raw)
    assert torch.equal(mixture(x, t, {}).raw, mixture(x, t, None).raw)
    assert float((mixture(x, t, label).raw - mixture(x, t, None).raw).abs().max()) > 0.01


# ------------------------------------------------------------------------------------------------------------------------------ convergence

STEPS = (8, 16, 32, 64)


def errors(process, solver: str) -> list[float]:
    """|error| of the T2 mixture from 0.9 to 0.05 at x = 0.8 (trajectory S3)."""
    net, x = MixtureTeacher(process, "x0"), f64([0.8])
    exact = net.flow_map(x, 0.9, 0.05)
    return [float((walk(net, x, uniform(0.9, 0.05, n), solver)[-1] - exact).abs()) for n in STEPS]


@pytest.mark.parametrize(("process", "card"), [(TRIG, (0.064, 0.033, 0.0165, 0.0083)), (FLOW, (0.074, None, None, 0.0095))],
                         ids=["cosine", "flow"])
def test_ddim_is_first_order(process, card):
    found = errors(process, "ddim")
    for ours, theirs in zip(found, card, strict=True):
        assert theirs is None or ours == pytest.approx(theirs, rel=0.015)
    assert all(1.9 < a / b < 2.1 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("process", [TRIG, FLOW], ids=["cosine", "flow"])
def test_heun_is_second_order(process):
    found = errors(process, "heun")
    assert all(3.8 < a / b < 4.9 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(("process", "card"), [(FLOW, (1.2e-2, 3.3e-3, 7.1e-4, 1.5e-4)), (TRIG, (1.1e-3, 1.3e-4, 2e-5, 3e-5))],
                         ids=["flow", "cosine"])
def test_dpmpp_values(process, card):
    """The card's values have one or two digits, so 10 % is their rounding."""
    assert errors(process, "dpmpp_2m") == pytest.approx(card, rel=0.1)


def test_heun_on_the_karras_grid():
    """Trajectory S3: k 80 -> 0.002 from x = 50."""
    net, x = MixtureTeacher(KARRAS), f64([50.0])
    exact = net.flow_map(x, 1.0, 0.0)
    found = [float((walk(net, x, uniform(1, 0, n), "heun")[-1] - exact).abs()) for n in (9, 18, 36, 72)]
    assert found == pytest.approx((0.137, 0.0243, 0.0052, 0.0012), rel=0.015)


@pytest.mark.parametrize(("count", "euler", "second"), [(18, -2.23e-2, 1.35e-2), (36, -2.73e-3, 7.43e-4), (72, -4.79e-4, 6.07e-5),
                                                        (144, -1.00e-4, 6.13e-6)])
def test_golden_gaussian_steps(count, euler, second):
    """Trajectory S9, T1: what one step in the middle of the Karras grid does to the consistency function f(x, k) = M(x, k->0)."""
    net, x = GaussianTeacher(KARRAS), f64([5.0])
    t, r = (1 - f64(count // 2 + step) / (count - 1) for step in (0, 1))
    f = lambda x, t: 1.3 + 0.6 * (x - 1.3) / (0.36 + KARRAS.sigma(t).square()).sqrt()                 # noqa: E731
    pred = net(x, t)
    assert float(f(jump(pred, KARRAS, r), r) - f(x, t)) == pytest.approx(euler, rel=5e-3)
    assert float(f(heun(net, pred, KARRAS, r), r) - f(x, t)) == pytest.approx(second, rel=5e-3)


# -------------------------------------------------------------------------------------------------------------------------- the steps alone


def test_heun_is_edms_algorithm():
    net, x, k, low = MixtureTeacher(KARRAS), f64([-3.0, 0.4, 7.0]), 5.0, 1.7
    d1 = (x - net(x, at(k)).x0) / k
    y = x + (low - k) * d1
    expected = x + (low - k) * (d1 + (y - net(y, at(low)).x0) / low) / 2
    torch.testing.assert_close(heun(net, net(x, at(k)), KARRAS, at(low)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("t", "r", "calls"), [(0.8, 0.3, 2), (0.8, 0.0, 1), (1.0, 0.5, 1)], ids=["inside", "to clean", "from pure noise"])
def test_heun_calls(t, r, calls):
    net, x = GaussianTeacher(FLOW, "flow"), torch.randn(3, 2)
    pred = net(x, f64(t))
    out = heun(net, pred, FLOW, f64(r))
    assert len(net.calls) == calls
    assert bool(out.isfinite().all())
    assert torch.equal(out, jump(pred, FLOW, f64(r))) == (calls == 1)


def test_heun_treats_samples_alone():
    """A sample's step does not depend on whether a neighbour starts in pure noise or ends clean."""
    net, x = MixtureTeacher(FLOW, "flow"), f64([0.5, -0.7, 1.1])
    t, r = f64([0.8, 1.0, 0.6]), f64([0.4, 0.5, 0.0])
    together = heun(net, net(x, t), FLOW, r)
    alone = torch.cat([heun(net, net(x[i:i + 1], t[i:i + 1]), FLOW, r[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_dpmpp_is_its_algorithm():
    """Trajectory S3, written out."""
    t_prev, t, r = f64(0.9), f64(0.6), f64(0.4)
    x, out, out_prev = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pred, before = (Prediction(o, "x0", x, TRIG.alpha(s), TRIG.sigma(s)) for o, s in ((out, t), (out_prev, t_prev)))
    lam_prev, lam_t, lam_r = (TRIG.log_snr(s) / 2 for s in (t_prev, t, r))
    h, q = lam_r - lam_t, (lam_t - lam_prev) / (lam_r - lam_t)
    mixed = (1 + 1 / (2 * q)) * out - out_prev / (2 * q)
    expected = TRIG.sigma(r) / TRIG.sigma(t) * x - TRIG.alpha(r) * ((-h).exp() - 1) * mixed
    torch.testing.assert_close(dpmpp_2m(pred, before, TRIG, r), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dpmpp_2m(pred, None, TRIG, r), jump(pred, TRIG, r), rtol=0, atol=0)
    torch.testing.assert_close(dpmpp_2m(pred, before, TRIG, f64(0.0)), out, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["trig", "flow", "zero_snr_table"])
def test_dpmpp_survives_a_history_of_pure_noise(name):
    net = GaussianTeacher(PROCESSES[name], "v")
    states = walk(net, f64([0.3, -1.0]), f64([1.0, 0.7, 0.4, 0.1]), "dpmpp_2m")
    assert bool(torch.stack(states).isfinite().all())


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_solvers_do_not_care_what_the_network_speaks(solver, kind):
    x, times = f64([-0.4, 0.8]), uniform(0.9, 0.05, 6)
    a, b = (walk(MixtureTeacher(TRIG, k), x, times, solver)[-1] for k in ("x0", kind))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_solvers_keep_the_states_dtype(solver):
    states = walk(MixtureTeacher(TRIG, "v"), torch.randn(3), uniform(0.9, 0.1, 4), solver)
    assert {s.dtype for s in states} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------------------------- schedulers

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def states(count: int = 64) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(2))


def drive(scheduler, net, x, times, frame=lambda x, i: x):
    """The scheduler's own trajectory; `frame` maps its state before step i to ours."""
    seen = []
    for i, (clock, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        out = net(frame(scheduler.scale_model_input(x, clock) if hasattr(scheduler, "scale_model_input") else x, i), f64(t)).raw
        x = scheduler.step(out, clock, x).prev_sample
        seen.append(x)
    return seen


def compare(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("count", [4, 20])
def test_ddim_is_diffusers(count, prediction_type):
    scheduler = DDIMScheduler(**SD, set_alpha_to_one=True, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(count)
    net, x = MixtureTeacher(TableVP(scheduler.alphas_cumprod), TYPES[prediction_type]), states()
    compare(walk(net, x, f64([*trailing(count), 0.0]), "ddim"), drive(scheduler, net, x, trailing(count)))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("count", [4, 20])
def test_ddim_is_eulers_in_the_frame_of_the_network(count, prediction_type):
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type)
    scheduler.set_timesteps(count)
    net, x = MixtureTeacher(TableVP(scheduler.alphas_cumprod), TYPES[prediction_type]), states()
    scale = (scheduler.sigmas.square() + 1).sqrt()
    theirs = drive(scheduler, net, x * scale[0], trailing(count))           # its state is x0 + sigma·eps, its network input ours
    compare(walk(net, x, f64([*trailing(count), 0.0]), "ddim"), [y / s for y, s in zip(theirs, scale[1:], strict=True)])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("count", [4, 20])
def test_ddim_is_flow_matchings_euler(count, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
    net, x = MixtureTeacher(Flow(shift), "flow"), states()                   # the shift in the process, or below in the grid
    compare(walk(net, x, f64([*trailing(count), 0.0]), "ddim"), drive(scheduler, net, x, trailing(count)))
    plain = MixtureTeacher(Flow(), "flow")
    compare(walk(plain, x, f64([*trailing(count, shift), 0.0]), "ddim"), walk(net, x, f64([*trailing(count), 0.0]), "ddim"))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("count", [5, 20])                                   # below 15 steps diffusers lowers the order of the last step
def test_dpmpp_is_diffusers(count, prediction_type):
    scheduler = DPMSolverMultistepScheduler(**SD, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
                                            prediction_type=prediction_type)
    scheduler.set_timesteps(count)
    net, x = MixtureTeacher(TableVP(scheduler.alphas_cumprod), TYPES[prediction_type]), states()
    compare(walk(net, x, f64([*trailing(count), 0.0]), "dpmpp_2m"), drive(scheduler, net, x, trailing(count)))


@pytest.mark.parametrize("count", [5, 20])
def test_dpmpp_is_diffusers_for_flow(count):
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=2,
                                            final_sigmas_type="zero")
    scheduler.set_timesteps(count)
    times = scheduler.sigmas.tolist()
    net, x = MixtureTeacher(Flow(), "flow"), states()
    compare(walk(net, x, f64(times), "dpmpp_2m"), drive(scheduler, net, x, times[:-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_jump_or_stay(kind):
    """The jump, and the very state where there is none to make, clean ones of a network that speaks x0 among them."""
    process = TableVP.scaled_linear()
    r, s = f64([0.0, 0.4, 0.4, 1.0]), f64([0.0, 0.4, 0.1, 0.0])
    x, raw = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pred = Prediction(raw, kind, x, process.alpha(r), process.sigma(r))
    landed = jump_or_stay(pred, process, r, s)
    assert torch.equal(landed[:2], x[:2])
    torch.testing.assert_close(landed[2:], jump(pred, process, s)[2:], rtol=0, atol=0)
    torch.testing.assert_close(landed[3], pred.x0[3])
