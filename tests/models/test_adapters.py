"""LoRA roles on one base, and the traps: what requires a gradient, what is recomputed, and under which adapter."""

import copy

import pytest
import torch
from oracles import f64
from toys import tiny_dit, tiny_unet

from stepdistill.diffusion.process import TableVP
from stepdistill.models.adapters import Adapter, LoraRecipe, active, adapted, checkpoint_activations, inject, merged, target_names
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Role, Roles
from stepdistill.training.ema import Ema

NEEDS = {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}
TABLE = TableVP.scaled_linear()
LORA = {"student": LoraRecipe(4), "fake": LoraRecipe(2, alpha=4.0)}


def unet():
    return tiny_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def example():
    return torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})


def problem(count: int = 2):
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, f64([0.3, 0.7])[:count], Conditioning({"class_labels": torch.arange(count)})


def build(lora=LORA, needs=NEEDS, network=None):
    return Roles.build(needs, Denoiser(network or unet(), TABLE, "eps", taps=("mid_block",)), example, 0, lora)


def scramble(roles, *names, size: float = 0.3):
    """Adapters start as no change; give them one."""
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        for parameter in roles.parameters(name):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def test_one_network_for_all_roles():
    m = build()
    assert m.student.network is m.teacher.network is m.fake.network
    assert sum(p.numel() for p in m.parameters("student")) < sum(p.numel() for p in unet().parameters()) / 2
    assert not set(map(id, m.parameters("student"))) & set(map(id, m.parameters("fake")))


def test_an_adapter_starts_as_its_teacher():
    m, (x, t, cond) = build(), problem()
    assert torch.equal(m.student(x, t, cond).raw, m.teacher(x, t, cond).raw)


def test_the_teacher_is_the_base_with_adapters_off():
    plain, m, (x, t, cond) = unet(), build(), problem()
    expected = Denoiser(plain, TABLE, "eps")(x, t, cond).raw
    scramble(m, "student", "fake")
    assert torch.equal(m.teacher(x, t, cond).raw, expected)
    outputs = [m.student(x, t, cond).raw, m.fake(x, t, cond).raw, expected]
    assert not any(torch.allclose(outputs[i], outputs[j], atol=1e-3) for i in range(3) for j in range(i))


@pytest.mark.parametrize("trained", ["student", "fake"])
def test_choosing_an_adapter_changes_nothing_about_what_trains(trained):
    """peft's own switch would make the judge's adapter trainable."""
    m, (x, t, cond) = build(), problem()
    m.train_only((trained,))
    for role in (m.fake, m.student, m.teacher, m.fake):
        role(x, t, cond)
    for name in NEEDS:
        flags = {p.requires_grad for p in m.parameters(name)} if name != "teacher" else {
            p.requires_grad for n, p in m.teacher.network.named_parameters() if ".lora_" not in n}
        assert flags == {name == trained}


def test_a_gradient_reaches_its_own_adapter_and_passes_through_the_others():
    m, (x, t, cond) = build(), problem()
    scramble(m, "student", "fake")
    m.train_only(("student",))
    x0 = m.student(x, t, cond).x0
    (m.fake(x0, t, cond).x0 - m.teacher(x0, t, cond).x0).square().sum().backward()
    assert all(p.grad is not None for p in m.parameters("student"))
    assert all(p.grad is None for p in m.parameters("fake"))
    assert all(p.grad is None for n, p in m.teacher.network.named_parameters() if ".lora_" not in n)


def test_the_gradient_is_that_of_a_merged_full_network():
    """d/dx of the adapted network equals that of a copy whose weights hold the adapter."""
    m, (x, t, cond) = build(), problem()
    scramble(m, "student")
    full = Denoiser(merged(unet(), m.module("student").state_dict(), LORA["student"]), TABLE, "eps")
    grads = []
    for net in (m.student, full):
        y = x.clone().requires_grad_(True)
        net(y, t, cond).x0.square().sum().backward()
        grads.append(y.grad)
    assert torch.allclose(m.student(x, t, cond).raw, full(x, t, cond).raw, atol=1e-5)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))


def test_activation_checkpointing_recomputes_under_the_adapter_that_ran():
    def gradients(with_checkpoints: bool):
        m, (x, t, cond) = build(), problem()
        scramble(m, "student", "fake")
        if with_checkpoints:
            checkpoint_activations(m.teacher.network)
        m.train_only(("student",))
        x0 = m.student(x, t, cond).x0
        loss = (m.fake(x0, t, cond).x0 - m.teacher(x0, t, cond).x0).square().mean()       # three adapters chosen before backward
        loss.backward()
        return [p.grad for p in m.parameters("student")]

    for plain, saved in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, saved, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_activation_checkpointing_really_recomputes():
    m, (x, t, cond) = build(), problem()
    checkpoint_activations(m.teacher.network)
    calls = []
    m.teacher.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *args: calls.append(1))   # recomputing stops early
    m.train_only(("student",))
    m.student(x, t, cond).x0.sum().backward()
    assert len(calls) == 2


def test_a_choice_ends_with_its_block_even_after_an_error():
    network = unet()
    inject(network, "a", LoraRecipe(2), 0)
    inject(network, "b", LoraRecipe(2), 0)
    with adapted(network, "a"):
        assert active(network) == "a"
        with pytest.raises(RuntimeError), adapted(network, "b"):
            raise RuntimeError
        assert active(network) == "a"
        with adapted(network, None):
            assert active(network) is None
    assert active(unet()) is None


def test_an_average_of_an_adapter_is_sampled_in_its_place():
    m, (x, t, cond) = build(), problem()
    ema = Ema(m.module("student"), 0.5)
    scramble(m, "student")
    moved = m.student(x, t, cond).raw
    with m.averaged(ema.network) as student:
        assert torch.equal(student(x, t, cond).raw, m.teacher(x, t, cond).raw)            # the average still is the start
    assert torch.equal(m.student(x, t, cond).raw, moved)
    ema.after(m.module("student"), 1)
    assert isinstance(ema.network, Adapter)
    assert all(not torch.equal(p, q) for p, q in zip(ema.network.parameters(), m.parameters("student"), strict=True))


def test_an_adapter_is_saved_and_loaded_by_name():
    m, other = build(), build()
    scramble(m, "student", "fake")
    other.module("student").load_state_dict(copy.deepcopy(m.module("student").state_dict()))
    x, t, cond = problem()
    assert torch.equal(other.student(x, t, cond).raw, m.student(x, t, cond).raw)
    assert torch.equal(other.fake(x, t, cond).raw, other.teacher(x, t, cond).raw)


def test_any_mix_of_full_and_adapted_roles():
    m, (x, t, cond) = build({"fake": LoraRecipe(2)}), problem()
    assert m.student.network is not m.teacher.network
    assert m.fake.network is m.teacher.network
    assert not any("lora" in name for name, _ in m.student.network.named_parameters())
    scramble(m, "fake")
    assert torch.equal(m.student(x, t, cond).raw, m.teacher(x, t, cond).raw)


def test_a_half_precision_base_has_float32_adapters_that_can_move():
    m = build(network=unet().to(torch.bfloat16))
    assert {p.dtype for p in m.parameters("student")} == {torch.float32}
    assert m.teacher.dtype == torch.bfloat16
    x, t, cond = problem()
    m.train_only(("student",))
    m.student(x, t, cond).x0.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters("student"))


def test_features_can_be_read_from_an_adapted_role():
    needs = {**NEEDS, "disc": Role(source="head", of="fake", trains=True)}
    m, (x, t, cond) = build(needs=needs), problem()
    scramble(m, "fake")
    features = [role(x, t, cond, tap=True).features[0] for role in (m.teacher, m.fake)]
    assert not torch.allclose(*features)
    assert m.disc(m.fake(x, t, cond, tap=True).features).shape[0] == 2


def test_where_adapters_go():
    names = target_names(unet(), ())
    assert any("attentions" in name for name in names)
    assert not any(name.startswith(("time_embedding", "conv_in", "conv_out")) for name in names)
    assert all(name.startswith("transformer_blocks.") for name in target_names(tiny_dit(), ()))
    assert {name.split(".")[-1] for name in target_names(unet(), ("to_q", "to_v"))} == {"to_q", "to_v"}


def test_grouped_convolutions_are_left_alone():
    network = torch.nn.ModuleDict({"block": torch.nn.ModuleList([torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 4, 1)])})
    assert target_names(network, ()) == ["block.1"]


def test_all_targets_are_the_layers_outside_the_blocks_too():
    network = unet()
    inside, every = target_names(network, ()), target_names(network, ["all"])
    assert set(every) - set(inside) == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert set(inside) < set(every)


@pytest.mark.parametrize(("targets", "message"), [(("to_qq",), "did you mean 'to_q'"), (("zzzzzz",), "there are")])
def test_targets_that_match_nothing(targets, message):
    with pytest.raises(ValueError, match=message):
        target_names(unet(), targets)


def test_a_role_that_cannot_be_adapted():
    with pytest.raises(ValueError, match=r"lora\.teacher"):
        build({"teacher": LoraRecipe(2)})
    with pytest.raises(ValueError, match=r"lora\.fak"):
        build({"fak": LoraRecipe(2)})


def test_a_network_without_checkpointing_says_so():
    with pytest.raises(ValueError, match="does not support"):
        checkpoint_activations(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("rank", [0, -1])
def test_impossible_ranks(rank):
    with pytest.raises(ValueError, match="rank"):
        LoraRecipe(rank)
