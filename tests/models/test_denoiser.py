"""Denoiser over real, tiny networks of diffusers: clocks, precision, taps, learned variances."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from oracles import f64
from torch import nn
from toys import Counted, tiny_dit, tiny_unet

from stepdistill.diffusion.process import Flow, Karras, TableVP, Trig
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import CLOCKS, PLAIN, Denoiser, default_taps, keep_ends_float32, tapped
from stepdistill.models.experts import Experts
from stepdistill.models.load import load_teacher

TABLE = TableVP.scaled_linear()


def dit() -> Denoiser:
    return Denoiser(tiny_dit(), TABLE, "eps", channels=2)


def unet(**options) -> Denoiser:
    return Denoiser(tiny_unet(), TABLE, "eps", **options)


NETS = pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])


def problem(net: Denoiser, count: int = 3):
    channels = net.network.config.in_channels
    x = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.1, 0.9, count, dtype=torch.float64), Conditioning({"class_labels": torch.arange(count)})


@NETS
def test_output_is_the_networks(make):
    net = make()
    x, t, cond = problem(net)
    pred = net(x, t, cond)
    with torch.no_grad():
        expected = net.network(x, timestep=(t * 1000 - 1).float(), class_labels=cond["class_labels"]).sample[:, : x.shape[1]]
    torch.testing.assert_close(pred.raw, expected)
    assert pred.raw.shape == x.shape                                                                # DiT's learned variance is dropped
    assert pred.kind == "eps"
    torch.testing.assert_close(pred.x0, (x - pred.sigma.float()[:, None, None, None] * pred.eps) / pred.alpha.float()[:, None, None, None],
                               rtol=1e-4, atol=1e-4)


@NETS
def test_scalar_times_are_for_the_whole_batch(make):
    net = make()
    x, _, cond = problem(net)
    torch.testing.assert_close(net(x, f64(0.4), cond).raw, net(x, f64([0.4] * 3), cond).raw)


@NETS
def test_samples_do_not_mix(make):
    net = make()
    x, t, cond = problem(net)
    for i in range(3):
        torch.testing.assert_close(net(x, t, cond).raw[i : i + 1], net(x[i : i + 1], t[i : i + 1], cond.slice(slice(i, i + 1))).raw,
                                   rtol=1e-4, atol=1e-5)


def test_clocks():
    t = f64([0.001, 0.5, 1.0])
    assert CLOCKS["index"](TABLE, t).tolist() == pytest.approx([0, 499, 999])
    assert CLOCKS["index"](TABLE, f64(0.0)).item() == 0                                             # t = 0 is before the first index
    torch.testing.assert_close(CLOCKS["t"](Flow(3.0), t), t)
    torch.testing.assert_close(CLOCKS["sigma"](Flow(), t), t)
    torch.testing.assert_close(CLOCKS["1000sigma"](Flow(3.0), f64(0.5)), f64(750.0))
    torch.testing.assert_close(CLOCKS["log_sigma/4"](Karras(), f64(1.0)), f64(80.0).log() / 4)
    torch.testing.assert_close(CLOCKS["angle"](Trig(), f64(0.5)), f64(torch.pi / 4))
    with pytest.raises(ValueError, match="Flow has none"):
        CLOCKS["index"](Flow(), t)


def test_differentiable_in_state_and_time():
    net = unet()
    net.network.double()
    x, t, cond = problem(net)
    x, t = x.double().requires_grad_(), t.requires_grad_()
    net.raw(x, t, cond).sum().backward()
    assert bool((x.grad != 0).any())
    assert bool((t.grad != 0).all())
    with torch.no_grad():
        slope = (net.raw(x, t + 1e-4, cond).sum() - net.raw(x, t - 1e-4, cond).sum()) / 2e-4
    torch.testing.assert_close(slope, t.grad.sum(), rtol=5e-3, atol=0)                              # diffusers embeds the index in float32


@NETS
@pytest.mark.parametrize(("stored", "autocast", "out"), [
    (torch.float32, None, torch.float32), (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, None, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32), (torch.float64, None, torch.float64)])
def test_precision(make, stored, autocast, out):
    """Predictions are float32 under every storage and autocast, float64 for a float64 network, and close to the exact ones."""
    net = make()
    x, t, cond = problem(net)
    with torch.no_grad():
        exact = net(x, t, cond)
    net.network.to(stored)
    net.autocast = autocast
    with torch.no_grad():
        pred = net(x.to(stored), t, cond)
    assert pred.raw.dtype == pred.x0.dtype == out
    assert pred.alpha.dtype == torch.float64
    tolerance = 0.1 if torch.bfloat16 in (stored, autocast) else 1e-4
    assert float((pred.raw - exact.raw).abs().max()) < tolerance * float(exact.raw.abs().max())


def through(net: Denoiser, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer is given and gives in one call under autocast, the ends kept in float32."""
    seen = []
    net.autocast = torch.bfloat16
    keep_ends_float32(net.network)
    with layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out))), torch.no_grad():
        net(*problem(net))
    return seen[0]


@NETS
def test_last_layer_runs_in_float32(make):
    """T18: under autocast the output loses no bits to bfloat16 in the last layer, whose input it is computed from exactly."""
    net = make()
    last = net.network.conv_out if isinstance(net.network, UNet2DModel) else net.network.proj_out_2
    given, out = through(net, last)
    assert out.dtype == torch.float32
    call = nn.functional.conv2d if isinstance(last, nn.Conv2d) else nn.functional.linear
    expected = call(given.float(), last.weight, last.bias, **({"padding": 1} if isinstance(last, nn.Conv2d) else {}))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(out, out.bfloat16().float())


@NETS
def test_first_layer_reads_the_state_itself(make):
    """Under autocast the state is not rounded to bfloat16 before the first layer, whose result is."""
    net = make()
    first = net.network.conv_in if isinstance(net.network, UNet2DModel) else net.network.pos_embed.proj
    given, out = through(net, first)
    assert out.dtype == torch.bfloat16
    expected = nn.functional.conv2d(given, first.weight, first.bias, first.stride, first.padding)
    rounded = nn.functional.conv2d(given.bfloat16(), first.weight.bfloat16(), first.bias.bfloat16(), first.stride, first.padding)
    assert torch.equal(out, expected.bfloat16())
    assert not torch.equal(out, rounded)


def test_a_careful_first_layer_halves_the_rounding_at_small_times():
    """The fashion teacher at t = 0.1: 0.0031 of its output instead of 0.0061. Methods on trajectories compare neighbours there."""
    teacher = load_teacher("fashion")
    net = teacher.denoiser
    noise = torch.randn(8, *teacher.shape, generator=torch.Generator().manual_seed(0))
    x = net.process.add_noise(torch.full_like(noise, -1.0), noise, f64(0.1))
    cond, off = Conditioning({"class_labels": torch.arange(8)}), {}
    for kind in (type(net.network.conv_in), nn.Conv2d):
        net.network.conv_in.__class__ = kind
        with torch.no_grad():
            exact = replace(net, autocast=None)(x, f64(0.1), cond).raw
            off[kind] = float((replace(net, autocast=torch.bfloat16)(x, f64(0.1), cond).raw - exact).square().mean().sqrt())
    careful, plain = off.values()
    assert careful < 0.7 * plain


def test_a_network_of_experts_and_one_without_known_ends():
    first, other = unet().network, unet().network
    keep_ends_float32(Experts([first, other], [0.5]))
    assert all(type(layer) not in PLAIN for network in (first, other) for layer in (network.conv_in, network.conv_out))
    plain = nn.Sequential(nn.Linear(2, 2))
    assert keep_ends_float32(plain) is plain
    assert type(plain[0]) is nn.Linear


def test_inner_layers_still_run_in_half_precision():
    net = unet(autocast=torch.bfloat16)
    keep_ends_float32(net.network)
    seen = []
    block = net.network.down_blocks[0].resnets[0].conv1
    with block.register_forward_hook(lambda module, args, out: seen.append(out.dtype)), torch.no_grad():
        net(*problem(net))
    assert seen == [torch.bfloat16]


def test_autocast_is_left_as_it_was():
    net = unet(autocast=torch.bfloat16)
    keep_ends_float32(net.network)
    with torch.no_grad():
        net(*problem(net))
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", torch.float16):
            net(*problem(net))
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.float16


def test_autocast_is_left_as_it_was_when_the_last_layer_raises():
    net = unet(autocast=torch.bfloat16)
    last = keep_ends_float32(net.network).conv_out

    def fail(*args):
        raise RuntimeError("out of memory, say")

    original, last._conv_forward = last._conv_forward, fail
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            x, t, cond = problem(net)
            with pytest.raises(RuntimeError, match="out of memory"):
                net.network(x, (t * 1000).float(), **cond)
            assert torch.is_autocast_enabled("cpu")
            assert torch.autocast_increment_nesting() == 2                          # or cast weights would be cached for ever
            torch.autocast_decrement_nesting()
        assert not torch.is_autocast_enabled("cpu")
    last._conv_forward = original
    with torch.no_grad():
        assert net(*problem(net)).raw.dtype == torch.float32


@NETS
def test_copies_stand_alone(make):
    """A deep copy gives the same output, keeps its float32 last layer, and shares no weight."""
    net = make()
    keep_ends_float32(net.network)
    net.autocast, net.wrapped = torch.bfloat16, nn.Identity()
    with torch.no_grad():
        twin = net.copy()
        assert twin.wrapped is None
        torch.testing.assert_close(twin(*problem(net)).raw, net(*problem(net)).raw, rtol=0, atol=0)
        again = copy.deepcopy(twin.network)
        for p in twin.network.parameters():
            p.add_(1.0)
        assert not torch.equal(twin(*problem(net)).raw, net(*problem(net)).raw)
        torch.testing.assert_close(Denoiser(again, TABLE, "eps", autocast=torch.bfloat16, channels=net.channels)(*problem(net)).raw,
                                   net(*problem(net)).raw, rtol=0, atol=0)
    for network in (twin.network, again):
        last = network.conv_out if isinstance(network, UNet2DModel) else network.proj_out_2
        assert type(last) not in (nn.Conv2d, nn.Linear)


def test_half_precision_storage_of_the_last_layer():
    net = unet(autocast=torch.bfloat16)
    keep_ends_float32(net.network).to(torch.bfloat16)
    with torch.no_grad():
        assert net(*problem(net)).raw.dtype == torch.float32


def test_wrapper_only_where_gradients_are_on():
    net = unet()
    wrapper = nn.Sequential()                                                                       # never runs: would lack the arguments
    wrapper.forward = lambda *args, **kwargs: net.network(*args, **kwargs)
    net.wrapped = wrapper
    with Counted(wrapper) as through, Counted(net.network) as all_calls:
        net(*problem(net))
        with torch.no_grad():
            net(*problem(net))
    assert through == [3]
    assert all_calls == [3, 3]


def test_default_taps():
    assert default_taps(tiny_unet()) == ("mid_block",)
    assert default_taps(tiny_dit(blocks=3)) == ("transformer_blocks.1",)
    assert default_taps(tiny_dit(blocks=4)) == ("transformer_blocks.1",)
    assert default_taps(tiny_dit(blocks=1)) == ("transformer_blocks.0",)
    with pytest.raises(ValueError, match="name the tapped modules"):
        default_taps(nn.Linear(1, 1))


@NETS
def test_taps_read_features(make):
    net = make()
    net.taps = default_taps(net.network)
    x, t, cond = problem(net)
    pred = net(x, t, cond, tap=True)
    assert [tuple(f.shape) for f in pred.features] == [(3, 16, 4, 4)] if isinstance(net.network, UNet2DModel) else [(3, 16, 16)]
    assert all(f.requires_grad for f in pred.features)
    half = pred.rows(slice(1, 3))
    torch.testing.assert_close(half.features[0], pred.features[0][1:3])
    torch.testing.assert_close(half.x0, pred.x0[1:3])
    assert half.alpha.shape == (2,)


def test_taps_leave_no_hook_behind_an_error():
    net = tiny_unet()
    with pytest.raises(RuntimeError, match="stop"), tapped(net, ("mid_block",)):
        raise RuntimeError("stop")
    assert not net.mid_block._forward_hooks


@NETS
def test_training_mode_changes_nothing_after_loading(make):
    """Networks with dropout of labels or activations: `without_dropout` makes train mode draw no random numbers."""
    from stepdistill.models.load import without_dropout

    net = Denoiser(tiny_unet(dropout=0.5), TABLE, "eps") if make is unet else make()
    x, t, cond = problem(net, 4)
    net.network.train()
    assert not torch.equal(net(x, t, cond).raw, net(x, t, cond).raw) or make is dit
    without_dropout(net.network)
    state = torch.get_rng_state()
    trained = net(x, t, cond).raw
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(trained, Denoiser(net.network.eval(), TABLE, "eps", channels=net.channels)(x, t, cond).raw, rtol=0, atol=0)


def test_guidance_zero_is_one_pass_of_the_null_condition():
    net = Denoiser(tiny_unet(), TABLE, "eps")
    cond = Conditioning({"class_labels": torch.tensor([0, 1])}, {"class_labels": torch.tensor([3, 3])})
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), f64(0.5)
    with torch.no_grad(), Counted(net.network) as calls:
        got = net(x, t, cond, w=0.0).raw
    assert calls == [2]
    with torch.no_grad():
        assert torch.equal(got, net(x, t, cond.null).raw)
