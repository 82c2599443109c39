"""The forward process: curves, rates, inverses, and agreement with the schedulers that other people train with."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from oracles import PROCESSES, f64

from stepdistill.diffusion.process import Flow, Framed, Karras, LinearVP, TableVP, Trig, at_least_float32, like

TABLES = [name for name, process in PROCESSES.items() if isinstance(process, TableVP)]
VP = ["trig", "linear_vp", *TABLES]
FRAMED = {f"{name} in the {frame} frame": Framed(PROCESSES[name], frame) for name, frame in (
    ("karras", "flow"), ("karras", "vp"), ("trig", "flow"), ("flow_shift3", "vp"))}
every_process = pytest.mark.parametrize("process", [*PROCESSES.values(), *FRAMED.values()], ids=[*PROCESSES, *FRAMED])


def grid(low: float = 0.0, high: float = 1.0, count: int = 613) -> torch.Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


@every_process
def test_rates_are_the_derivatives(process):
    t = grid(1e-3, 1 - 1e-3).requires_grad_()                             # d sigma/dt of the linear VP is infinite at 0
    for curve, rate in zip((process.alpha, process.sigma), process.rates(t), strict=True):
        value = curve(t)
        expected = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(rate, expected, rtol=1e-8, atol=1e-12)


@every_process
def test_rates_agree_with_differences(process):
    t, h = grid(0.01, 0.99, 97) + 1e-4 / 3, 1e-6                          # away from a table's knots, where the second derivative jumps
    for curve, rate in zip((process.alpha, process.sigma), process.rates(t), strict=True):
        torch.testing.assert_close((curve(t + h) - curve(t - h)) / (2 * h), rate, rtol=1e-5, atol=1e-6)


@every_process
def test_time_of_inverts_log_snr(process):
    t = grid(0.0, 1.0)
    torch.testing.assert_close(process.time_of(process.log_snr(t)), t, rtol=0, atol=1e-9)


@every_process
def test_time_of_stays_in_range(process):
    for log_snr, end in ((math.inf, 0.0), (-math.inf, 1.0), (200.0, 0.0), (-200.0, 1.0)):
        assert float(process.time_of(f64(log_snr))) == pytest.approx(end, abs=1e-12)


@every_process
def test_snr_falls(process):
    t = grid()
    assert bool((process.log_snr(t).diff() < 0).all())
    assert bool((process.alpha(t).diff() <= 0).all())
    assert bool((process.sigma(t).diff() > 0).all())


@every_process
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_curves_are_float64_of_any_shape(process, shape):
    t = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for value in (process.alpha(t), process.sigma(t), *process.rates(t), process.log_snr(t), process.time_of(t), process.prior_std(t)):
        assert value.dtype == torch.float64
        assert value.shape == shape


@pytest.mark.parametrize("name", VP)
def test_variance_is_preserved(name):
    process, t = PROCESSES[name], grid()
    torch.testing.assert_close(process.alpha(t).square() + process.sigma(t).square(), torch.ones_like(t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["trig", "linear_vp", "flow", "flow_shift3", *TABLES])
def test_time_zero_is_exactly_clean(name):
    process, zero = PROCESSES[name], f64(0.0)
    assert (float(process.alpha(zero)), float(process.sigma(zero))) == (1.0, 0.0)
    assert float(process.log_snr(zero)) == math.inf


@pytest.mark.parametrize("name", ["flow", "flow_shift3"])
def test_flow_ends_in_pure_noise(name):
    process, one = PROCESSES[name], f64(1.0)
    assert (float(process.alpha(one)), float(process.sigma(one))) == (0.0, 1.0)


def test_shift_is_sd3s():
    t = grid()
    torch.testing.assert_close(Flow(3.0).sigma(t), 3 * t / (1 + 2 * t))
    torch.testing.assert_close(Flow(3.0).alpha(t), 1 - 3 * t / (1 + 2 * t), rtol=1e-12, atol=1e-15)


def test_karras_is_edms_grid():
    ends = Karras().sigma(f64([0.0, 1.0]))
    torch.testing.assert_close(ends, f64([0.002, 80.0]), rtol=1e-13, atol=0)
    i, count = torch.arange(18, dtype=torch.float64), 18
    edm = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7                # EDM, eq. 5
    torch.testing.assert_close(Karras().sigma(1 - i / (count - 1)), edm, rtol=1e-12, atol=0)


def test_linear_vp_integrates_beta():
    process, t = LinearVP(0.1, 20.0), grid(0.0, 1.0, 20001)
    beta = 0.1 + t * 19.9
    integral = torch.cat([beta.new_zeros(1), torch.cumulative_trapezoid(beta, t)])
    torch.testing.assert_close(process.alpha(t), (-0.5 * integral).exp(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_exact_at_every_training_step(name):
    process = PROCESSES[name]
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    angle = process.angle[1:]
    torch.testing.assert_close(process.alpha(t), angle.cos(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(process.sigma(t), angle.sin(), rtol=1e-12, atol=0)


def test_sd_table_values():
    table = PROCESSES["sd_table"].alpha(f64([0.001, 1.0])).square()       # trajectory S9
    torch.testing.assert_close(table, f64([0.99915, 0.0046601]), rtol=0, atol=5e-8)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    every = PROCESSES["sd_table"].alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square()
    torch.testing.assert_close(every, (1 - betas).cumprod(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_smooth_and_monotone_between_steps(name):
    process = PROCESSES[name]
    t = grid(0.0, 1.0, 40_001)
    angle = torch.atan2(process.sigma(t), process.alpha(t))
    assert bool((angle.diff() > 0).all())
    knots = torch.arange(1, 1000, dtype=torch.float64) / 1000
    left, right = process.rates(knots - 1e-12)[1], process.rates(knots + 1e-12)[1]
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)         # the derivative does not jump


def test_zero_terminal_snr_is_finite():
    process, one = PROCESSES["zero_snr_table"], f64(1.0)
    assert float(process.alpha(one)) == pytest.approx(0, abs=1e-15)
    assert float(process.sigma(one)) == 1.0
    values = torch.stack([*process.rates(one), process.log_snr(one), process.alpha(one), process.sigma(one)])
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("table", [torch.ones(3), torch.tensor([0.9, 0.95]), torch.tensor([0.9]), torch.tensor([1.2, 0.5]),
                                   torch.rand(2, 3)], ids=["flat", "rising", "one", "above one", "matrix"])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match="strictly decreasing"):
        TableVP(table)


@pytest.mark.parametrize(("build", "word"), [(lambda: Flow(0.0), "shift"), (lambda: LinearVP(1.0, 0.5), "beta_min"),
                                             (lambda: Karras(1.0, 0.5), "sigma_min"), (lambda: Karras(rho=0), "rho")])
def test_bad_parameters_are_refused(build, word):
    with pytest.raises(ValueError, match=word):
        build()


@pytest.mark.parametrize("name", PROCESSES)
def test_prior_is_what_pipelines_start_from_and_in_proportion_below(name):
    process = PROCESSES[name]
    full = 1.0 if name in VP else float(process.sigma(f64(1.0)))
    assert float(process.prior_std(f64(1.0))) == full
    assert float(process.prior_std(f64(0.4))) == pytest.approx(full * float(process.sigma(f64(0.4)) / process.sigma(f64(1.0))), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------------------- states


@every_process
@pytest.mark.parametrize("t", [0.7, [0.2, 0.5, 1.0]], ids=["scalar", "per sample"])
def test_add_noise_is_its_formula(process, t):
    x0, eps = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = process.alpha(f64(t)), process.sigma(f64(t))
    expected = alpha.reshape(-1, 1, 1) * x0 + sigma.reshape(-1, 1, 1) * eps
    torch.testing.assert_close(process.add_noise(x0, eps, f64(t)), expected, rtol=1e-14, atol=1e-14)


@every_process
@pytest.mark.parametrize(("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                                 (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_state_dtypes(process, given, returned):
    x, eps = torch.randn(2, 3, 4).to(given)
    for t in (f64([0.2, 0.5, 0.9]), f64(0.5), torch.tensor(0.5)):
        assert process.add_noise(x, eps, t).dtype == returned
        assert process.add_noise(x, eps.double(), t).dtype == returned
        assert process.travel(x, eps, t / 2, t).dtype == returned


def test_like_and_at_least_float32():
    x = torch.zeros(2, 3, 4)
    assert like(f64([1.0, 2.0]), x).shape == (2, 1, 1)
    assert like(f64(1.0), x).shape == ()
    assert like(f64([1.0, 2.0]), x).dtype == torch.float32
    assert at_least_float32(x) is x


def test_travel_adds_variances():
    """Trajectory S6: 0.331 at r = 0.3, t = 0.6 of the flow; a public script's linear sum gives 0.184."""
    added = Flow().travel(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), f64(0.3), f64(0.6))
    assert float(added.square()) == pytest.approx(0.331, abs=5e-4)
    assert float(added.square()) == pytest.approx(0.36 - (4 / 7) ** 2 * 0.09, abs=1e-14)


@every_process
def test_travel_reaches_the_marginal(process):
    r, t = f64([0.0, 0.1, 0.3, 0.5, 0.98]), f64([0.4, 0.1, 0.6, 0.99, 1.0])
    zero, one = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    signal, noise = process.travel(one, zero, r, t), process.travel(zero, one, r, t)
    torch.testing.assert_close(signal * process.alpha(r), process.alpha(t), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(noise.square() + (signal * process.sigma(r)).square(), process.sigma(t).square(), rtol=1e-12, atol=0)
    assert float(noise[1]) == 0.0                                          # staying adds nothing


@pytest.mark.parametrize("name", ["trig", "flow", "linear_vp", *TABLES])
def test_travel_from_clean_is_add_noise(name):
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = f64([0.1, 0.5, 0.9])
    process = PROCESSES[name]
    torch.testing.assert_close(process.travel(x0, eps, f64(0.0), t), process.add_noise(x0, eps, t), rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------------------------- schedulers

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {"sd": SD, "zero_snr": {**SD, "rescale_betas_zero_snr": True}, "linear": {}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}


def states(count: int) -> torch.Tensor:
    return torch.randn(2, count, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_add_noise_is_ddpms(scheduler, config):
    theirs = scheduler(**config)
    n, (x0, eps) = torch.arange(1000), states(1000)
    ours = TableVP(theirs.alphas_cumprod).add_noise(x0, eps, (n + 1).double() / 1000)
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, n), rtol=0, atol=1e-6)


def test_scaled_linear_is_stable_diffusions():
    table = PROCESSES["sd_table"].alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square()
    torch.testing.assert_close(table, DDPMScheduler(**SD).alphas_cumprod.double(), rtol=0, atol=1e-6)


def test_add_noise_is_eulers_in_the_frame_of_the_network():
    theirs = EulerDiscreteScheduler(**SD)
    x0, eps = states(1000)
    ours = TableVP(theirs.alphas_cumprod).add_noise(x0, eps, (theirs.timesteps.double() + 1) / 1000)
    scale = (theirs.sigmas[:-1].double().square() + 1).sqrt()              # scale_model_input
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, theirs.timesteps) / scale[:, None, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_add_noise_is_flow_matchings(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps = states(1000)
    ours = Flow(shift).add_noise(x0, eps, torch.arange(1000, 0, -1).double() / 1000)
    torch.testing.assert_close(ours, theirs.scale_noise(x0, theirs.timesteps, eps), rtol=0, atol=1e-6)


def test_add_noise_is_edms():
    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    theirs.set_timesteps(64)
    x0, eps = states(64)
    ours = Karras().add_noise(x0, eps, 1 - torch.arange(64).double() / 63)
    torch.testing.assert_close(ours, theirs.add_noise(x0, eps, theirs.timesteps), rtol=1e-6, atol=1e-6)


def test_add_noise_is_edms_in_the_frame_of_the_network():
    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    theirs.set_timesteps(64)
    x0, eps = states(64)
    ours = Framed(Karras(0.004, 160.0), "vp").add_noise(x0 / 0.5, eps, 1 - torch.arange(64).double() / 63)
    fed = torch.stack([theirs.precondition_inputs(0.5 * x, sigma) for x, sigma in zip(
        (x0 / 0.5 + theirs.sigmas[:64, None, None] / 0.5 * eps), theirs.sigmas, strict=False)])
    torch.testing.assert_close(ours, fed, rtol=1e-5, atol=1e-6)


def test_a_frame_keeps_times_and_starts_from_the_noise_it_holds():
    t = grid(0.01, 1.0, 50)
    for process in FRAMED.values():
        torch.testing.assert_close(process.log_snr(t), process.inner.log_snr(t), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(process.prior_std(t), process.inner.prior_std(t) / process.divisor(t), rtol=1e-12, atol=0)
    flow, vp = FRAMED["karras in the flow frame"], FRAMED["karras in the vp frame"]
    torch.testing.assert_close(flow.alpha(t) + flow.sigma(t), torch.ones_like(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(vp.alpha(t).square() + vp.sigma(t).square(), torch.ones_like(t), rtol=1e-12, atol=0)
    assert float(flow.prior_std(f64(1.0))) == pytest.approx(80 / 81)


def test_trig_is_the_cosine_process():
    t = grid()
    torch.testing.assert_close(Trig().alpha(t), torch.cos(math.pi * t / 2))
    torch.testing.assert_close(Trig().sigma(t), torch.sin(math.pi * t / 2))
