"""Experts: each sample answered by the network of its time, and everything else as for one network."""

import copy

import pytest
import torch
from accelerate import Accelerator
from oracles import f64
from tiny import tiny_recipe
from torch import nn
from toys import Counted, tiny_dit, tiny_unet

from stepdistill.diffusion.process import TableVP
from stepdistill.models.adapters import LoraRecipe, adapted, checkpoint_activations, merged, target_names
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser, default_taps
from stepdistill.models.experts import Experts, parts_of, serving
from stepdistill.models.load import without_dropout
from stepdistill.models.roles import Role, Roles
from stepdistill.models.tangent import along
from stepdistill.recipe import OptimRecipe
from stepdistill.training import plan
from stepdistill.training.ema import Ema
from stepdistill.training.optim import Optimizers

TABLE = TableVP.scaled_linear()
BOUNDARIES = (0.7, 0.3)
NEEDS = {"teacher": Role(), "student": Role(trains=True, experts=3), "fake": Role(trains=True)}
TIMES = f64([0.2, 0.9, 0.5, 0.7, 0.31, 1.0])                              # experts 2 0 1 1 1 0: a boundary belongs to what lies below


def mixture() -> Denoiser:
    return Denoiser(Experts([tiny_unet(seed=i) for i in range(3)], BOUNDARIES), TABLE, "eps", taps=("mid_block",))


def problem(t=TIMES):
    x = torch.randn(len(t), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(t)) % 3
    return x, t, Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)})


def single(denoiser: Denoiser, i: int) -> Denoiser:
    return Denoiser(denoiser.network.experts[i], TABLE, "eps")


def build(network=None, needs=NEEDS, lora=None, boundaries=BOUNDARIES) -> Roles:
    teacher = Denoiser(network or tiny_unet(), TABLE, "eps", taps=("mid_block",))
    return Roles.build(needs, teacher, lambda: problem(f64([0.5])), 0, lora, boundaries)


@pytest.mark.parametrize("w", [1.0, 2.5, f64([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])], ids=["plain", "guided", "each its own"])
def test_each_sample_is_answered_by_the_expert_of_its_time(w):
    """In the order of the batch, its own condition and guidance with it, and in one call for each expert."""
    net, (x, t, cond) = mixture(), problem()
    halves = 1 if isinstance(w, float) and w == 1 else 2
    with Counted(net.network.experts[0]) as high, Counted(net.network.experts[1]) as middle, Counted(net.network.experts[2]) as low:
        got = net(x, t, cond, w=w).raw
    assert (high, middle, low) == ([2 * halves], [3 * halves], [halves])
    for i, expert in enumerate((2, 0, 1, 1, 1, 0)):
        row = slice(i, i + 1)
        one = single(net, expert)(x[row], t[row], cond.slice(row), w=w if isinstance(w, float) else w[row]).raw
        torch.testing.assert_close(got[row], one, rtol=1e-5, atol=1e-5)


def test_one_expert_for_all_costs_nothing():
    """One call on the very memory, bitwise the expert's own answer; the others are not called."""
    net, seen = mixture(), []
    x, t, cond = problem(f64([0.6, 0.4]))
    net.network.experts[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with Counted(net.network.experts[0]) as high, Counted(net.network.experts[2]) as low:
        assert torch.equal(net(x, t, cond).raw, single(net, 1)(x, t, cond).raw)
    assert high == low == []
    assert seen[0].data_ptr() == x.data_ptr()


def test_lists_and_shared_leaves_of_a_condition_go_along():
    class Sum(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x, clock, *, rows, ids, return_dict):
            assert ids.shape == (7,)
            return (self.factor * torch.stack([row.sum() for row in rows])[:, None].expand_as(x),)

    net = Denoiser(Experts([Sum(1.0), Sum(10.0)], (0.5,)), TABLE, "eps")
    cond = Conditioning({"rows": tuple(torch.ones(n) for n in (1, 2, 3)), "ids": torch.arange(7)}, None, frozenset({"ids"}))
    out = net(torch.zeros(3, 1), f64([0.9, 0.1, 0.6]), cond).raw
    assert out[:, 0].tolist() == [1, 20, 3]


def test_features_are_those_of_one_expert():
    net, (x, t, cond) = mixture(), problem()
    kept = f64([0.6, 0.4])
    alike = net(x[:2], kept, cond.slice(slice(2)), w=3.0, tap=True)
    one = Denoiser(net.network.experts[1], TABLE, "eps", taps=("mid_block",))(x[:2], kept, cond.slice(slice(2)), w=3.0, tap=True)
    assert torch.equal(alike.features[0], one.features[0])
    with pytest.raises(ValueError, match="features are read of one expert"):
        net(x, t, cond, tap=True)
    needs = {"teacher": Role(), "student": Role(trains=True), "disc": Role(source="head", of="teacher", trains=True)}
    assert build(mixture().network, needs).module("disc") is not None


def test_is_a_module_like_any():
    """Copies, saved weights, precision, and forward-mode derivatives."""
    net, (x, t, cond) = mixture(), problem()
    other = net.copy()
    assert torch.equal(other(x, t, cond).raw, net(x, t, cond).raw)
    assert other.network.boundaries == BOUNDARIES
    with torch.no_grad():
        for p in other.network.parameters():
            p.zero_()
    other.network.load_state_dict(net.network.state_dict())
    assert torch.equal(other(x, t, cond).raw, net(x, t, cond).raw)
    assert other.network.double() is other.network
    assert other.dtype == torch.float64
    still, clock = torch.zeros_like(x), torch.ones_like(t)
    slope = along(net, x, t, cond, still, clock, lambda found: found.raw)[1]
    for i, expert in enumerate((2, 0, 1, 1, 1, 0)):
        r = slice(i, i + 1)
        one = along(single(net, expert), x[r], t[r], cond.slice(r), still[r], clock[r], lambda found: found.raw)[1]
        torch.testing.assert_close(slope[r], one, rtol=1e-4, atol=1e-3)
        assert bool(slope[r].any())


@pytest.mark.parametrize("lora", [None, {"student": LoraRecipe(2)}], ids=["copies", "adapters"])
def test_gradients_and_their_recomputation(lora):
    """Every expert with rows gets its gradient, through an adapter on each as well; checkpointing recomputes the same."""
    found = []
    for checkpointed in (False, True):
        base = Experts([without_dropout(tiny_dit(seed=i)) for i in range(2)], (0.5,))
        teacher = Denoiser(base, TABLE, "eps", channels=2, taps=default_taps(base.experts[0]))
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        t, cond = f64([0.9, 0.2, 0.6, 0.4]), Conditioning({"class_labels": torch.arange(4)})
        m = Roles.build({"teacher": Role(), "student": Role(trains=True)}, teacher, lambda x=x, t=t, cond=cond: (x, t, cond), 0, lora)
        with torch.no_grad():
            for i, p in enumerate(m.parameters("student")):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        if checkpointed:
            checkpoint_activations(m.student.network)
        m.train_only(("student",))
        calls = []
        m.student.network.experts[1].transformer_blocks[0].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        m.student(x, t, cond).x0.square().mean().backward()
        assert len(calls) == 1 + checkpointed
        found.append([p.grad for p in m.parameters("student")])
        assert sum(g is not None and bool(g.any()) for g in found[-1]) > len(found[-1]) / 2
        moved = {path.split("/")[1] if lora else path.split(".")[1] for path, p in m.module("student").named_parameters()
                 if p.grad is not None and bool(p.grad.any())}
        assert moved == {"0", "1"}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_adapters_go_to_the_blocks_of_each():
    names = target_names(Experts([tiny_dit(), tiny_dit()], (0.5,)), ())
    alone = target_names(tiny_dit(), ())
    assert sorted(names) == sorted(f"experts.{i}.{name}" for i in (0, 1) for name in alone)


@pytest.mark.parametrize(("count", "boundaries"), [(2, ()), (2, (0.5, 0.3)), (3, (0.3, 0.7)), (2, (1.0,)), (2, (0.0,))])
def test_boundaries_that_divide_nothing(count, boundaries):
    with pytest.raises(ValueError, match=f"{count} experts need {count - 1} boundaries|boundaries between experts must fall"):
        Experts([nn.Linear(1, 1) for _ in range(count)], boundaries)


def test_experts_of_several_classes():
    with pytest.raises(ValueError, match="one class, got DiTTransformer2DModel, UNet2DModel"):
        Experts([tiny_unet(), tiny_dit()], (0.5,))


def test_a_role_of_several_experts_begins_as_the_teacher_everywhere():
    m, (x, t, cond) = build(), problem()
    assert isinstance(m.student.network, Experts)
    assert m.student.network.boundaries == BOUNDARIES
    assert torch.equal(m.student(x[:1], t[:1], cond.slice(slice(1))).raw, m.teacher(x[:1], t[:1], cond.slice(slice(1))).raw)
    assert len(set(map(id, m.parameters("student")))) == 3 * len(m.parameters("teacher"))


def test_a_divided_teacher_of_two_networks():
    """Each expert begins as the one that the teacher asks where its stretch begins."""
    base = Experts([tiny_unet(seed=1), tiny_unet(seed=2)], (0.6,))
    student = Denoiser(base, TABLE, "eps").divided(BOUNDARIES).network
    for expert, origin in zip(student.experts, (0, 0, 1), strict=True):
        assert torch.equal(expert.conv_in.weight, base.experts[origin].conv_in.weight)
        assert expert is not base.experts[origin]


LORA = {"student": LoraRecipe(2), "fake": LoraRecipe(3)}


def moved(m: Roles, name: str, seed: int = 0) -> None:
    """Every adapter of a role far from no change."""
    with torch.no_grad():
        for i, p in enumerate(m.parameters(name)):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i)))


def test_adapters_as_experts_share_the_weights_of_the_teacher():
    """Each begins as no change and answers for its own stretch alone; teacher and fake score, on the same weights, never hear of it."""
    m, (x, t, cond) = build(lora=LORA), problem()
    assert m.networks == [m.teacher.network]
    assert {view.network for view in m.student.network.experts} == {m.teacher.network}
    plain, high = m.teacher(x, t, cond).raw, t > BOUNDARIES[0]
    question = x[high], t[high], cond.slice(high.nonzero()[:, 0])
    assert torch.equal(m.student(*question).raw, m.teacher(*question).raw)
    moved(m, "student")
    assert torch.equal(m.teacher(x, t, cond).raw, plain)
    assert torch.equal(m.fake(x, t, cond).raw, plain)
    got = m.student(x, t, cond, w=2.5).raw
    for i, expert in enumerate((2, 0, 1, 1, 1, 0)):
        row = slice(i, i + 1)
        alone = m.teacher.shared(f"student_{expert + 1}")(x[row], t[row], cond.slice(row), w=2.5).raw
        torch.testing.assert_close(got[row], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[row], plain[row])
    one = build(lora=LORA, needs={**NEEDS, "student": Role(trains=True)})
    assert len(m.parameters("student")) == 3 * len(one.parameters("student"))
    assert not m.teacher.network.training


def test_only_the_adapter_of_the_named_expert_gets_a_gradient():
    m, (x, t, cond) = build(lora=LORA), problem()
    moved(m, "student")
    m.train_only(("student",), 1)
    m.student(x, t, cond).x0.square().mean().backward()
    assert [any(p.grad is not None for p in part.parameters()) for part in m.module("student").experts] == [False, True, False]
    assert all(p.grad is None for name in ("teacher", "fake") for p in m.parameters(name))


def test_adapters_as_experts_of_a_teacher_of_two():
    """Each goes to the network that answers at its upper end, and to that alone; the other roles see both."""
    base = Experts([tiny_unet(seed=1), tiny_unet(seed=2)], (0.6,))
    m, (x, t, cond) = build(base, lora=LORA), problem()
    assert [view.network for view in m.student.network.experts] == [base.experts[0], base.experts[0], base.experts[1]]
    plain = m.teacher(x, t, cond).raw
    moved(m, "student")
    moved(m, "fake")
    assert torch.equal(m.teacher(x, t, cond).raw, plain)
    got, fake = m.student(x, t, cond).raw, m.fake(x, t, cond).raw
    for i, (expert, part) in enumerate(zip((2, 0, 1, 1, 1, 0), (1, 0, 0, 0, 0, 0), strict=True)):
        row = slice(i, i + 1)
        with adapted(base, f"student_{expert + 1}"):
            alone = Denoiser(base.experts[part], TABLE, "eps")(x[row], t[row], cond.slice(row)).raw
        torch.testing.assert_close(got[row], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[row], fake[row])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_adapters_as_experts(checkpointed):
    """Those of the merged networks: an expert's update lies in W + B·A, recomputed or not."""
    base = without_dropout(tiny_dit(seed=0))
    x, t = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)), f64([0.9, 0.2, 0.6, 0.4])
    cond = Conditioning({"class_labels": torch.arange(4)})
    teacher = Denoiser(base, TABLE, "eps", channels=2, taps=default_taps(base))
    whole = teacher.divided((0.5,))
    needs = {"teacher": Role(), "student": Role(trains=True, experts=2)}
    m = Roles.build(needs, teacher, lambda: (x, t, cond), 0, {"student": LoraRecipe(2)}, (0.5,))
    moved(m, "student")
    for expert, share in zip(whole.network.experts, m.module("student").experts, strict=True):
        merged(expert, share.state_dict(), LoraRecipe(2))
    if checkpointed:
        for network in m.networks:
            checkpoint_activations(network)
    m.train_only(("student",))
    m.student(x, t, cond).x0.square().mean().backward()
    whole(x, t, cond).x0.square().mean().backward()
    layer = "transformer_blocks.0.attn1.to_q"
    for i, expert in enumerate(whole.network.experts):
        name = layer.replace(".", "/")
        a, b = (dict(m.module("student").experts[i].named_parameters())[f"{name}/lora_{part}"] for part in "AB")
        full = expert.get_submodule(layer).weight.grad
        assert full.abs().max() > 1e-6
        torch.testing.assert_close(b.grad, full @ a.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.grad, b.T @ full, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("expert", [None, 1])
@pytest.mark.parametrize("lora", [None, {"student": LoraRecipe(2)}], ids=["copies", "adapters"])
def test_only_the_named_expert_trains(expert, lora):
    m = build(lora=lora)
    m.train_only(("student",), expert)
    for i, part in enumerate(m.module("student").experts):
        assert {p.requires_grad for p in part.parameters()} == {expert in (None, i)}
    m.train_only(("fake",), expert)
    assert not any(p.requires_grad for p in m.parameters("student"))
    assert all(p.requires_grad for p in m.parameters("fake"))


@pytest.mark.parametrize("lora", [None, {"fake": LoraRecipe(2)}], ids=["copy", "adapter"])
def test_restart(lora):
    m, (x, t, cond) = build(lora=lora), problem(f64([0.5, 0.6]))
    with torch.no_grad():
        for p in m.parameters("fake"):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(m.fake(x, t, cond).raw, m.teacher(x, t, cond).raw)
    m.restart("fake")
    assert torch.equal(m.fake(x, t, cond).raw, m.teacher(x, t, cond).raw)
    if lora:
        assert all(bool(p.any()) == path.endswith("lora_A") for path, p in m.module("fake").named_parameters())   # it can learn again


@pytest.mark.parametrize("lora", [None, {"student": LoraRecipe(2)}], ids=["copies", "adapters"])
def test_an_average_keeps_what_its_frozen_experts_were(lora):
    m = build(lora=lora)
    module = m.module("student")
    ema = Ema(module, 0.9)
    m.train_only(("student",), 1)
    before = copy.deepcopy(ema.network)
    with torch.no_grad():
        for p in module.parameters():                                     # frozen ones as well, as they would after an earlier phase
            p.add_(1.0)
    ema.after(module, 5)
    assert [all(torch.equal(a, b) for a, b in zip(a.parameters(), b.parameters(), strict=True))
            for a, b in zip(before.experts, ema.network.experts, strict=True)] == [True, False, True]


def test_the_age_of_a_role_is_counted_from_its_last_restart():
    """The update that a stage begins with is the first of its age; the last one before still belongs to the stage before."""
    m = build()
    optim = Optimizers(m, {name: OptimRecipe(1e-3) for name in m.trains}, {"student": 5, "fake": 5}, {"student": [0, 2]})
    ages = []
    for _ in range(5):
        optim.step(("student",))
        ages.append(optim.age("student"))
    assert ages == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("lora", [{}, {"lora__student__rank": 4}, {"lora__student__rank": 4, "lora__fake__rank": 2}],
                         ids=["copies", "adapters", "all adapters"])
def test_one_expert_at_a_time_is_counted(tmp_path, lora):
    """Gradients and moments of one, weights of all; and the peak is what a real round holds."""
    recipe = tiny_recipe(tmp_path, "phased_dmd", method__phases=2, student__steps=2, method__fake_updates=1, **lora)
    found = plan.plan(recipe, card=False)
    student = found.roles["student"]
    assert student.weights == 2 * student.gradients == student.optimizer
    assert plan.measured(recipe, Accelerator(mixed_precision="no")) == pytest.approx(found.peak, rel=0.03)


def test_parts():
    net = mixture().network
    assert [id(part) for part in parts_of(net)] == [id(part) for part in net.experts]
    assert parts_of(net.experts[0]) == [net.experts[0]]
    assert serving(net.experts[0], TIMES) is net.experts[0]
