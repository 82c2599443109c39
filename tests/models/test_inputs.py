"""Networks that are told s or w: no change at first, the numbers of diffusers' pipelines, and every way to lose what was told."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DModel
from oracles import f64
from torch import nn
from toys import Counted, tiny_dit, tiny_unet
from zoo import basics, images, videos

from stepdistill.diffusion.process import TableVP
from stepdistill.models.adapters import LoraRecipe, checkpoint_activations
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.inputs import ToldUNet2DModel, add_inputs, sinusoids, untold_class
from stepdistill.models.load import without_dropout
from stepdistill.models.roles import Role, Roles
from stepdistill.training.ema import Ema

TABLE = TableVP.scaled_linear()
NEEDS = {"teacher": Role(), "student": Role(trains=True, inputs=("s", "w")), "target": Role(inputs=("s", "w"))}


def teacher(make=tiny_unet) -> Denoiser:
    channels = 2 if make is tiny_dit else None
    return Denoiser(without_dropout(make()).requires_grad_(False), TABLE, "eps", channels=channels)


def problem(net: Denoiser, count: int = 3):
    channels = net.network.config.in_channels
    x = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count)
    return x, f64([0.9, 0.5, 0.2][:count]), Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)})


def build(make=tiny_unet, needs=NEEDS, lora=None) -> Roles:
    net = teacher(make)
    x, t, cond = problem(net, 1)
    return Roles.build(needs, net, lambda: (x, t, cond), lora=lora)


def scramble(network: nn.Module, seed: int = 0) -> None:
    """Weights that something could be told by."""
    generator = torch.Generator().manual_seed(seed)
    for embedder in network.embedders:
        with torch.no_grad():
            embedder.cond_proj.weight.copy_(0.2 * torch.randn(embedder.cond_proj.weight.shape, generator=generator))


both = pytest.mark.parametrize("make", [tiny_unet, tiny_dit])


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_student_that_is_told_starts_as_its_teacher(make, autocast):
    """Bit for bit, whatever it is told."""
    m = build(make)
    x, t, cond = problem(m.teacher)
    with torch.no_grad():
        expected = replace(m.teacher, autocast=autocast)(x, t, cond).raw
        for s, w in ((t, 1.0), (0.0, 7.5), (f64([0.1, 0.0, 0.2]), f64([1.0, 3.0, 8.0]))):
            assert torch.equal(replace(m.student, autocast=autocast)(x, t, cond, s=s, w=w).raw, expected)


@both
def test_each_sample_is_told_its_own(make):
    """s and w matter both, row by row; numbers are the same as rows of them."""
    m = build(make)
    scramble(m.student.network)
    x, t, cond = problem(m.student)
    s, w = f64([0.1, 0.0, 0.2]), f64([1.0, 3.0, 8.0])
    with torch.no_grad():
        whole = m.student(x, t, cond, s=s, w=w).raw
        for i in range(3):
            one = m.student(x[i : i + 1], t[i : i + 1], cond.slice(slice(i, i + 1)), s=float(s[i]), w=float(w[i])).raw
            torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)
        for other in (m.student(x, t, cond, s=s + 0.05, w=w).raw, m.student(x, t, cond, s=s, w=w + 0.5).raw):
            assert bool(((other - whole).abs().flatten(1).amax(1) > 1e-3).all())


def test_what_is_told():
    """The step t - s and w - 1 at 1000 each, before the time's own sinusoids: written out for one embedder."""
    m = build()
    scramble(m.student.network)
    x, t, cond = problem(m.student)
    s, w = f64([0.1, 0.0, 0.2]), f64([1.0, 3.0, 8.0])
    seen = []
    embedder = m.student.network.time_embedding
    embedder.linear_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        m.student(x, t, cond, s=s, w=w)
        m.teacher(x, t, cond)
        sines = m.student.network.time_proj((t * 1000 - 1).float())
    rates = torch.exp(-torch.arange(128, dtype=torch.float64) * torch.log(f64(10000.0)) / 127)
    told = [torch.cat([(1000 * n[:, None] * rates).sin(), (1000 * n[:, None] * rates).cos()], 1) for n in (t - s, w - 1)]
    expected = sines + (torch.cat(told, 1) @ embedder.cond_proj.weight.T.double()).float()
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=2e-2)


def test_guidance_is_told_as_pipelines_of_diffusers_tell_it():
    """Bit for bit, w counted from 1 instead of 0."""
    w = f64([1.0, 1.7, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, (w - 1).float(), embedding_dim=256)
    assert torch.equal(sinusoids((w - 1).float()[:, None]), theirs)


def test_one_pass_where_guidance_is_told_and_two_where_it_is_not():
    x, t, cond = problem(teacher())
    for inputs, calls in ((("w",), [3]), (("s",), [6])):
        student = build(needs={"teacher": Role(), "student": Role(trains=True, inputs=inputs)}).student
        scramble(student.network)
        told = {"s": t / 2} if "s" in inputs else {}
        with Counted(student.network) as rows, torch.no_grad():
            guided = student(x, t, cond, w=3.0, **told).raw
        assert rows == calls
        if "s" in inputs:                                                                           # both halves are told the same s
            with torch.no_grad():
                halves = [student(x, t, c, **told).raw for c in (cond, cond.null)]
                dropped = student(x, t, cond, w=0.0, **told).raw
            torch.testing.assert_close(guided, halves[1] + 3 * (halves[0] - halves[1]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dropped, halves[1], rtol=1e-4, atol=1e-5)


def test_s_is_for_those_that_are_told_it():
    m = build()
    x, t, cond = problem(m.teacher)
    with pytest.raises(ValueError, match="name it with s"):
        m.student(x, t, cond)
    with pytest.raises(ValueError, match="leave s out"):
        m.teacher(x, t, cond, s=0.0)


@both
def test_recomputed_blocks_are_told_what_the_forward_pass_was(make):
    """DiT embeds the time in every block, and blocks run again in the backward pass, when nobody tells them anything."""
    gradients = []
    for recompute in (False, True):
        m = build(make)
        scramble(m.student.network)
        if recompute:
            checkpoint_activations(m.student.network)
        m.train_only(("student",))
        x, t, cond = problem(m.student)
        out = m.student(x, t, cond, s=t / 2, w=f64([1.0, 3.0, 8.0])).raw
        with torch.no_grad():                                                                       # another call comes in between
            m.student(x, t, cond, s=t / 3, w=2.0)
        out.square().sum().backward()
        assert all(embedder.told is None for embedder in m.student.network.embedders)
        gradients.append(torch.cat([p.grad.flatten() for p in m.parameters("student")]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert all(bool(e.cond_proj.weight.grad.any()) for e in m.student.network.embedders)


def test_copies_averages_and_followers_have_weights_of_their_own():
    m = build()
    scramble(m.student.network)
    average, twin = Ema(m.module("student"), 0.5), m.student.copy()
    x, t, cond = problem(m.student)
    told = {"s": t / 2, "w": 3.0}
    with torch.no_grad():
        expected = m.student(x, t, cond, **told).raw
        assert torch.equal(twin(x, t, cond, **told).raw, expected)
        with m.averaged(average.network) as student:
            assert torch.equal(student(x, t, cond, **told).raw, expected)
        assert not torch.equal(m.target(x, t, cond, **told).raw, expected)
        m.follow("target", "student", 0)
        scramble(m.student.network, seed=1)
        for other in (m.target, twin):
            assert torch.equal(other(x, t, cond, **told).raw, expected)
    names = {name for name in m.module("student").state_dict() if "cond_proj" in name}
    assert names == {"time_embedding.cond_proj.weight"}
    assert any(p is m.student.network.time_embedding.cond_proj.weight for p in m.parameters("student"))


def test_half_precision_weights_are_told_in_float32():
    """1000·(w - 1) has too many digits for bfloat16: the sinusoids are made before they are rounded."""
    net = add_inputs(tiny_unet(), ("w",)).to(torch.bfloat16)
    scramble(net)
    half, full = (Denoiser(network, TABLE, "eps", inputs=("w",)) for network in (net, copy.deepcopy(net).float()))
    x, t, cond = problem(full)
    with torch.no_grad():
        a, b, c = half(x, t, cond, w=7.5).raw, full(x, t, cond, w=7.5).raw, full(x, t, cond, w=7.503).raw
    assert float((a - b).norm() / b.norm()) < 0.05
    assert float((c - b).norm() / b.norm()) > 0.1


def test_compiled():
    """One graph, which is told anew at each call."""
    student = Denoiser(add_inputs(tiny_dit(1), ("s", "w")), TABLE, "eps", channels=2, inputs=("s", "w"))
    scramble(student.network)
    x, t, cond = problem(student)
    values = lambda: [student(x, t, cond, s=t / 2, w=w).raw for w in (1.0, 3.0)]                                # noqa: E731
    with torch.no_grad():
        plain = values()
        student.network.compile(backend="eager", fullgraph=True)
        for got, expected in zip(values(), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_as_diffusers_does(tmp_path):
    network = add_inputs(tiny_unet(), ("s", "w"))
    scramble(network)
    network.save_pretrained(tmp_path)
    again = ToldUNet2DModel.from_pretrained(tmp_path)
    assert again.config.inputs == ["s", "w"]
    assert untold_class(again) is UNet2DModel is untold_class(tiny_unet())
    x, t, cond = problem(Denoiser(network, TABLE, "eps"))
    with torch.no_grad():
        first, second = (Denoiser(n, TABLE, "eps", inputs=("s", "w"))(x, t, cond, s=0.1, w=2.0).raw for n in (network, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("make", "component", "places"), [
    (basics.stable_diffusion, "unet", ["time_embedding"]),
    (images.sdxl, "unet", ["time_embedding"]),                                                      # not add_embedding: sizes
    (images.sd3, "transformer", ["time_text_embed.timestep_embedder"]),
    (images.flux, "transformer", ["time_text_embed.timestep_embedder"]),                            # not its guidance embedder
    (images.pixart, "transformer", ["adaln_single.emb.timestep_embedder"]),                         # not its resolution embedder
    (videos.wan21, "transformer", ["condition_embedder.time_embedder"]),
], ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""))
def test_where_networks_of_pipelines_are_told(make, component, places):
    network = add_inputs(getattr(make(), component), ("s",))
    assert [name for name, module in network.named_modules() if module in network.embedders] == places


def test_what_cannot_be_told():
    with pytest.raises(ValueError, match="Linear embeds its time in no TimestepEmbedding"):
        add_inputs(nn.Linear(1, 1), ("w",))
    with pytest.raises(ValueError, match="told something besides its time already"):
        add_inputs(add_inputs(tiny_unet(), ("w",)), ("s",))
    with pytest.raises(ValueError, match=r"lora\.student: this role is told s and w .* leave lora\.student out"):
        build(lora={"student": LoraRecipe(2)})
    for wrong in ({"inputs": ("w", "s")}, {"inputs": ("x",)}, {"inputs": ("s",), "source": "head"}, {"inputs": ("w",), "experts": 2}):
        with pytest.raises(ValueError, match=r"told|inputs must be"):
            Role(**wrong)
    taught = Denoiser(add_inputs(tiny_unet(), ("w",)), TABLE, "eps", inputs=("w",))
    with pytest.raises(ValueError, match="this teacher is a student that is told w"):
        Roles.build({"student": Role(trains=True)}, taught, lambda: None)
