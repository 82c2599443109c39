"""One 2x2 system for every prediction space, and the loss weights that translate an error in one into an error in another."""

import pytest
import torch
from oracles import KINDS, PROCESSES, GaussianTeacher, MixtureTeacher, f64

from stepdistill.diffusion import weighting
from stepdistill.diffusion.prediction import COEFFICIENTS, Prediction, combine, from_x0, solve, target
from stepdistill.diffusion.process import Trig

TIMES = f64([0.02, 0.3, 0.5, 0.8, 0.98])
SPACES = {"x0": lambda p: p.x0, "eps": lambda p: p.eps, "v": lambda p: p.v, "flow": lambda p: p.velocity, "edm": lambda p: p.to("edm")}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_kind = pytest.mark.parametrize("kind", KINDS)


def states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, len(TIMES), 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def predict(process, kind, t=TIMES, dtype=torch.float64) -> tuple[Prediction, torch.Tensor, torch.Tensor]:
    """A prediction that knows the truth, with the x0 and eps it knows."""
    x0, eps = states(dtype)
    alpha, sigma = process.alpha(t), process.sigma(t)
    return Prediction(target(kind, x0, eps, alpha, sigma), kind, process.add_noise(x0, eps, t), alpha, sigma), x0, eps


def test_kinds_are_those_of_the_library():
    assert set(KINDS) == set(COEFFICIENTS)


@every_process
@every_kind
def test_round_trip(process, kind):
    pred, x0, eps = predict(process, kind)
    for name, read in SPACES.items():
        expected = target(name, x0, eps, pred.alpha, pred.sigma)
        torch.testing.assert_close(read(pred), expected, rtol=1e-10, atol=1e-10)
        back = Prediction(read(pred), name, pred.x_t, pred.alpha, pred.sigma)                        # native -> other -> native
        torch.testing.assert_close(back.to(kind), pred.raw, rtol=1e-10, atol=1e-10)


@every_process
def test_score_is_one_function(process):
    """The score of a Gaussian is -(x_t - alpha·m)/(alpha²q² + sigma²), whatever the network speaks."""
    x_t, _ = states()
    t = TIMES
    alpha, sigma = process.alpha(t)[:, None, None], process.sigma(t)[:, None, None]
    expected = -(x_t - alpha * 1.3) / (alpha.square() * 0.36 + sigma.square())
    for kind in KINDS:
        torch.testing.assert_close(GaussianTeacher(process, kind)(x_t, t).score, expected, rtol=1e-10, atol=1e-10)


def test_score_is_the_gradient_of_the_log_density():
    process, t = Trig(), f64(0.6)
    teacher = MixtureTeacher(process, "v")
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    alpha, sigma = process.alpha(t), process.sigma(t)
    std = ((alpha * teacher.stds).square() + sigma.square()).sqrt()
    density = (teacher.weights * torch.distributions.Normal(alpha * teacher.means, std).log_prob(x[:, None]).exp()).sum(1)
    torch.testing.assert_close(teacher(x.detach(), t).score, torch.autograd.grad(density.log().sum(), x)[0], rtol=1e-10, atol=1e-10)


@every_kind
def test_raw_is_returned_untouched(kind):
    pred, *_ = predict(Trig(), kind)
    assert SPACES[kind](pred) is pred.raw
    assert pred.to(kind) is pred.raw


@every_process
def test_x0_network_does_not_divide_where_there_is_no_noise(process):
    x0 = torch.randn(2, 3)
    pred = Prediction(x0, "x0", x0, f64([1.0, 1.0]), f64([0.0, 0.0]))
    assert pred.x0 is x0


@pytest.mark.parametrize("name", ["trig", "flow", "zero_snr_table"])
@pytest.mark.parametrize("kind", ["x0", "v", "flow", "edm"])
def test_pure_noise_is_readable(name, kind):
    """At alpha = 0 all but an eps network still know x0."""
    pred, x0, eps = predict(PROCESSES[name], kind, torch.ones(len(TIMES), dtype=torch.float64))
    torch.testing.assert_close(pred.x0, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "edm"])
def test_clean_states_are_readable(kind):
    """At sigma = 0 all but an x0 network still know eps."""
    pred, x0, eps = predict(Trig(), kind, torch.zeros(len(TIMES), dtype=torch.float64))
    torch.testing.assert_close(pred.x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [0.002, 0.5, 80.0])
def test_edm_coefficients_are_table_1(k):
    """x0 = c_skip·y + c_out·F at y = x0 + k·eps, sigma_data 0.5."""
    y, raw = states()
    t = PROCESSES["karras"].time_of(-2 * f64(k).log())
    pred = Prediction(raw, "edm", y, PROCESSES["karras"].alpha(t), PROCESSES["karras"].sigma(t))
    c_skip, c_out = 0.25 / (k**2 + 0.25), k * 0.5 / (k**2 + 0.25) ** 0.5
    torch.testing.assert_close(pred.x0, c_skip * y + c_out * raw, rtol=1e-10, atol=1e-10)


def test_trigflow_bridge():
    """Trajectory S1: a flow teacher's velocity as TrigFlow's F, which for unit data is our v at the same SNR."""
    trig, flow = PROCESSES["trig"], PROCESSES["flow"]
    angle = TIMES * torch.pi / 2
    x_trig, u = states()
    t_rf = angle.sin() / (angle.sin() + angle.cos())
    torch.testing.assert_close(flow.time_of(trig.log_snr(TIMES)), t_rf, rtol=1e-12, atol=0)
    t = t_rf[:, None, None]
    x_rf = x_trig / (angle.sin() + angle.cos())[:, None, None]
    pred = Prediction(u, "flow", x_rf, flow.alpha(t_rf), flow.sigma(t_rf))
    card = ((1 - 2 * t) * x_rf + (1 - 2 * t + 2 * t**2) * u) / (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(combine(-trig.sigma(TIMES), trig.alpha(TIMES), pred.x0, pred.eps), card, rtol=1e-12, atol=1e-12)


def test_from_x0_recomputes_eps():
    pred, x0, _ = predict(Trig(), "eps")
    clipped = from_x0(pred.x0.clamp(-0.5, 0.5), pred.x_t, pred.alpha, pred.sigma)
    alpha, sigma = pred.alpha[:, None, None], pred.sigma[:, None, None]
    torch.testing.assert_close(clipped.eps, (pred.x_t - alpha * x0.clamp(-0.5, 0.5)) / sigma, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alpha * clipped.x0 + sigma * clipped.eps, pred.x_t, rtol=1e-12, atol=1e-12)
    assert float((clipped.eps - pred.eps).abs().max()) > 0.1


@every_kind
def test_guidance_commutes_with_conversion(kind):
    """distribution_matching T12: null + w·(cond - null) is the same in every space."""
    process, (x_t, _) = Trig(), states()
    labels = {"class_labels": torch.tensor([0, 1, 0, 1, 0])}
    shape = {"means": torch.stack([torch.full((3, 2), -1.0).double(), torch.full((3, 2), 0.5).double()]), "stds": f64([0.3, 0.5])}
    reference, teacher = MixtureTeacher(process, "x0", **shape), MixtureTeacher(process, kind, **shape)
    cond, null = (reference(x_t, TIMES, c) for c in (labels, None))
    guided = teacher(x_t, TIMES, labels, w=3.0)
    torch.testing.assert_close(guided.x0, null.x0 + 3 * (cond.x0 - null.x0), rtol=1e-9, atol=1e-9)
    raw_null, raw_cond = (teacher(x_t, TIMES, c).raw for c in (None, labels))
    torch.testing.assert_close(guided.raw, raw_null + 3 * (raw_cond - raw_null), rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------------------------- precision


@every_kind
@pytest.mark.parametrize("raw", [torch.float32, torch.bfloat16])
def test_conversions_stay_float32_under_autocast(kind, raw):
    pred, *_ = predict(Trig(), kind, dtype=torch.float32)
    plain = {name: read(pred) for name, read in SPACES.items()} | {"score": pred.score}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = Prediction(pred.raw.to(raw), kind, pred.x_t, pred.alpha, pred.sigma)
        cast = {name: read(again) for name, read in SPACES.items()} | {"score": again.score}
    for name, value in cast.items():
        if name != kind:
            assert value.dtype == torch.float32
        if raw == torch.float32:
            assert torch.equal(value, plain[name])


@every_kind
def test_float64_coefficients_leave_float32_states_alone(kind):
    pred, *_ = predict(Trig(), kind, dtype=torch.float32)
    assert {read(pred).dtype for read in SPACES.values()} == {torch.float32}


def test_target_lifts_half_precision():
    x0, eps = states(torch.bfloat16)
    assert target("v", x0, eps, Trig().alpha(TIMES), Trig().sigma(TIMES)).dtype == torch.float32


def test_precision_at_the_end_of_a_ddpm_table():
    """distribution_matching T18: at SD's last step x0 = (x - 0.9977·eps)/0.0683 multiplies rounding by 14.6, so bfloat16 loses it."""
    process, t = PROCESSES["sd_table"], torch.ones(len(TIMES), dtype=torch.float64)
    pred, x0, _ = predict(process, "eps", t, torch.float32)
    assert pred.x0.dtype == torch.float32
    assert float((pred.x0 - x0).abs().max()) < 3e-5
    half = (pred.x_t.bfloat16() - pred.sigma[0].bfloat16() * pred.raw.bfloat16()) / pred.alpha[0].bfloat16()
    assert float((half.float() - x0).abs().max()) > 0.1


def test_solve_is_the_inverse_of_a_2x2():
    a, b, alpha, sigma = (f64([v]) for v in (0.3, -1.7, 0.8, 0.6))
    x0, eps = states()[:, :1]
    back = solve(a, b, alpha, sigma, 0.8 * x0 + 0.6 * eps, 0.3 * x0 - 1.7 * eps)
    torch.testing.assert_close(torch.stack(back), torch.stack([x0, eps]), rtol=1e-13, atol=1e-13)


@every_kind
def test_conversions_carry_gradients(kind):
    pred, *_ = predict(Trig(), kind)
    raw = pred.raw.clone().requires_grad_()
    Prediction(raw, kind, pred.x_t, pred.alpha, pred.sigma).x0.sum().backward()
    a, b = COEFFICIENTS[kind](pred.alpha, pred.sigma)
    slope = torch.ones_like(a) if kind == "x0" else -pred.sigma / (pred.alpha * b - pred.sigma * a)   # d x0 / d raw at fixed x_t
    torch.testing.assert_close(raw.grad, slope[:, None, None].expand_as(raw), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------------------- weights

ERRORS = {                                                                # |error|² in a space over |x0 error|² (distribution_matching S.2)
    "x0": lambda a, s: torch.ones_like(a),
    "eps": lambda a, s: (a / s) ** 2,
    "v": lambda a, s: ((a**2 + s**2) / s) ** 2,
    "flow": lambda a, s: ((a + s) / s) ** 2,
    "edm": lambda a, s: ((s / a) ** 2 + 0.25) / (0.25 * (s / a) ** 2),
}


@every_process
@every_kind
def test_errors_in_two_spaces_differ_by_a_weight(process, kind):
    pred, x0, _ = predict(process, "x0")
    other = from_x0(x0 + 0.1, pred.x_t, pred.alpha, pred.sigma)
    ratio = (other.to(kind) - pred.to(kind)).square().mean((1, 2)) / 0.01
    torch.testing.assert_close(ratio, ERRORS[kind](pred.alpha, pred.sigma), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["trig", "sd_table", "flow", "karras"])
def test_weights_are_those_ratios(name):
    process = PROCESSES[name]
    alpha, sigma, log_snr = process.alpha(TIMES), process.sigma(TIMES), process.log_snr(TIMES)
    torch.testing.assert_close(weighting.snr(log_snr), ERRORS["eps"](alpha, sigma), rtol=1e-12, atol=0)
    torch.testing.assert_close(weighting.edm(log_snr), ERRORS["edm"](alpha, sigma), rtol=1e-12, atol=0)
    if name in ("trig", "sd_table"):
        torch.testing.assert_close(weighting.v_weight(log_snr), ERRORS["v"](alpha, sigma), rtol=1e-12, atol=0)


def test_clamped_weights():
    log_snr = f64([0.01, 1.0, 4.0, 100.0]).log()
    torch.testing.assert_close(weighting.truncated_snr(log_snr), f64([1.0, 1.0, 4.0, 100.0]))
    torch.testing.assert_close(weighting.truncated_snr(log_snr, 3.0), f64([3.0, 3.0, 4.0, 100.0]))
    torch.testing.assert_close(weighting.min_snr(log_snr), f64([0.01, 1.0, 4.0, 5.0]))
    torch.testing.assert_close(weighting.min_snr(log_snr, 2.0), f64([0.01, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(weighting.edm(log_snr, 1.0), f64([1.01, 2.0, 5.0, 101.0]))
    assert weighting.edm(log_snr).dtype == torch.float64
