"""Forward mode through real diffusers networks against central differences, and what may stand in its way."""

from dataclasses import replace

import pytest
import torch
from oracles import f64
from toys import tiny_dit, tiny_unet
from zoo import basics, images, videos

from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.models.adapters import LoraRecipe, checkpoint_activations, inject
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.recording import record
from stepdistill.models.tangent import along
from stepdistill.models.wiring import FromClock, FromSample, Layout, Wiring

ZOO = {**basics.EXHIBITS, **images.EXHIBITS, **videos.EXHIBITS}
T, DT = f64([0.3213, 0.7117]), f64([0.5, 0.8])
LABELS = Conditioning({"class_labels": torch.tensor([0, 2])})


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet(dtype: torch.dtype = torch.float32, **options) -> Denoiser:
    return Denoiser(tiny_unet().to(dtype), TableVP.scaled_linear(), "eps", **options)


def relative(net: Denoiser, shape, cond, read=lambda pred: pred.raw, dx: float = 1.0, dt: float = 1.0, step: float = 1e-4) -> float:
    """How far forward mode and `difference` are from a central difference of what is read, over this step."""
    x, ways = noise(*shape), (dx * noise(*shape, seed=1), dt * DT)
    with torch.no_grad():
        here, before, after = (read(net(x + h * ways[0], T + h * ways[1], cond)) for h in (0, -step, step))
    true, off = (after - before) / (2 * step), 0.0
    assert float(true.norm()) > 1
    for derivative in ("jvp", "difference"):
        value, slope = along(net, x, T, cond, *ways, read, derivative, step)
        torch.testing.assert_close(value, here)
        off = max(off, float((slope - true).norm() / true.norm()))
    return off


@pytest.mark.parametrize("read", [lambda pred: pred.raw, lambda pred: pred.x0], ids=["raw", "x0"])
def test_unet_and_dit(read):
    """On clocks that tell t and its training step. The latter's embedding is rounded to float32, and turns by a radian a step."""
    dit = Denoiser(tiny_dit().double(), TableVP.scaled_linear(), "eps", channels=2)
    for net, shape in ((unet(torch.float64), (1, 8, 8)), (dit, (2, 8, 8))):
        assert relative(net, shape, LABELS, read, dt=0) < 1e-6
        assert relative(net, shape, LABELS, read) < 5e-3
        assert relative(replace(net, clock="t"), shape, LABELS, read, step=1e-3) < 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "wan21", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("sd15", "sdxl", "pixart-sigma", "sana"))])
def test_networks_of_recorded_pipelines(name):
    """Some of their norms and embeddings stay in float32 whatever the weights are, and what rounds there is divided by the step."""
    recording = record(ZOO[name].build(), ZOO[name].inputs)
    cond = recording.encode(ZOO[name].inputs(["a red apple", "a cat on a mat"]), 2)
    cond = cond._map(lambda _, leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf)
    recording.denoiser.network.double()
    assert relative(recording.denoiser, recording.shape, cond, dt=0) < 2e-3
    assert relative(recording.denoiser, recording.shape, cond, dx=0) < 5e-3


def test_in_float32_within_a_thousandth():
    """Card 12's bound, for a network that is as smooth in its clock as trained ones are."""
    net = replace(unet(), process=Flow(), kind="flow", clock="t")
    way = noise(1, 8, 8, dtype=torch.float32), T, LABELS, noise(1, 8, 8, seed=1, dtype=torch.float32), DT, lambda pred: pred.x0
    slope, other = along(net, *way)[1], along(net, *way, "difference")[1]
    assert slope.dtype == torch.float32
    assert float((slope - other).norm() / other.norm()) < 1e-3


def test_a_difference_stays_within_the_times():
    """At both ends one side is cut off: exact for what is linear in t, whatever is asked beyond."""
    class Linear(torch.nn.Linear):
        def forward(self, x, time, return_dict=True):
            assert 0 <= float(time.min()) <= float(time.max()) <= 1
            return (3 * time[:, None] + super().forward(x),)

    net = Denoiser(Linear(2, 2, dtype=torch.float64), Flow(), "flow", clock="t")
    at, dx = f64([0.0, 1.0]), noise(2, seed=1)
    got = along(net, noise(2), at, Conditioning(), dx, f64([1.0, 2.0]), lambda pred: pred.raw, "difference")[1]
    torch.testing.assert_close(got, 3 * f64([[1.0], [2.0]]) + dx @ net.network.weight.T)


def slope_of(net: Denoiser, **options) -> torch.Tensor:
    x, dx = (noise(1, 8, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    return along(net, x, T, LABELS, dx, DT, lambda pred: pred.raw, **options)[1]


def test_neither_autocast_nor_checkpointing_nor_compilation_nor_a_wrapper_is_met():
    """float32 weights are asked in float32, on the bare network, and gradients around change nothing."""
    plain, net = slope_of(unet()), unet(autocast=torch.bfloat16)
    net.wrapped = torch.nn.Identity()
    checkpoint_activations(net.network)
    net.network.compile(backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        slope = slope_of(net)
    assert torch.equal(slope, plain)
    assert not slope.requires_grad


def test_the_roles_own_adapter_is_differentiated():
    base = unet()
    inject(base.network, "student", LoraRecipe(2), seed=0)
    student = base.shared("student")
    before = slope_of(base)
    assert torch.equal(slope_of(student), before)
    with torch.no_grad():
        for name, p in base.network.named_parameters():
            if ".lora_" in name:
                p.add_(0.1)
    assert torch.equal(slope_of(base), before)
    assert float((slope_of(student) - before).norm()) > 0.01 * float(before.norm())


def test_attention_is_plain_whatever_the_recipe_chose():
    """No other kernel has a forward mode; the choice is back afterwards, after an error, too."""
    recording = record(ZOO["flux-dev"].build(), ZOO["flux-dev"].inputs)
    cond = recording.encode(ZOO["flux-dev"].inputs(["a", "b"]), 2)
    net, x = recording.denoiser, noise(*recording.shape, dtype=torch.float32)
    way = x, T, cond, noise(*recording.shape, seed=1, dtype=torch.float32), DT, lambda pred: pred.raw
    slope, processors = along(net, *way)[1], {m.processor for m in net.network.modules() if hasattr(m, "processor")}
    for processor in processors:
        processor._attention_backend = "flash"
    assert torch.equal(along(net, *way)[1], slope)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        along(net, x[:, :1, :1], *way[1:3], way[3][:, :1, :1], *way[4:])
    assert processors
    assert {processor._attention_backend for processor in processors} == {"flash"}


class OneWay(torch.autograd.Function):
    """Says how to go backwards only, like fused kernels."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_network_without_forward_mode_says_what_to_set():
    class Fused(torch.nn.Linear):
        def forward(self, x, time, return_dict=True):
            return (OneWay.apply(super().forward(x)),)

    net = Denoiser(Fused(2, 2), Flow(), "flow", clock="t")
    x, dx = noise(2, dtype=torch.float32), noise(2, seed=1, dtype=torch.float32)
    way = x, T, Conditioning(), dx, DT, lambda pred: pred.raw
    with pytest.raises(ValueError, match=r"^Fused has no forward-mode derivative here: set method\.derivative: difference \([^\n]*\)$"):
        along(net, *way)
    with torch.no_grad():
        torch.testing.assert_close(along(net, *way, "difference")[1], 2 * dx @ net.network.weight.T, rtol=1e-3, atol=1e-3)


def test_a_time_that_is_a_python_number_is_not_differentiated_in_silence():
    """It would lose its tangent; a difference of one sample has it."""
    class Scaled(torch.nn.Linear):
        def forward(self, x, time):
            return (3 * time * super().forward(x),)

    wiring = Wiring({"x": FromSample(Layout(), False), "time": FromClock("t", 1.0, 0.0, None)}, Layout(), 1.0)
    net = Denoiser(Scaled(2, 2, dtype=torch.float64), Flow(), "flow", wiring=wiring)
    way = noise(2)[:1], T[:1], Conditioning(), 0 * noise(2)[:1], DT[:1], lambda pred: pred.raw
    with pytest.raises(ValueError, match=r"Python number.*set method\.derivative: difference$"):
        along(net, *way)
    value, slope = along(net, *way, "difference")
    torch.testing.assert_close(slope, value * DT[:1] / T[:1])


def test_a_difference_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="difference leaves nothing in half precision: use jvp"):
        slope_of(unet(torch.bfloat16), derivative="difference")
    assert bool(torch.isfinite(slope_of(unet(torch.bfloat16))).all())


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_no_tf32(derivative):
    """cuDNN would round convolutions to ten bits, which over a step of a thousandth is all of the difference."""
    net, seen, flags = unet(), [], torch.backends.cudnn
    net.network.register_forward_pre_hook(lambda module, args: seen.append((flags.allow_tf32, torch.backends.cuda.matmul.allow_tf32)))
    before = flags.allow_tf32
    along(net, noise(1, 8, 8, dtype=torch.float32), T, LABELS, noise(1, 8, 8, dtype=torch.float32), DT, lambda pred: pred.x0, derivative)
    assert set(seen) == {(False, False)}
    assert flags.allow_tf32 == before
