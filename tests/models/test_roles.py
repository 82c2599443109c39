"""Roles: copies, who trains, which call goes through the distributed wrapper, and the averages that follow."""

import pytest
import torch
from oracles import f64
from torch import nn
from toys import Counted, tiny_unet

from stepdistill.diffusion.process import TableVP
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Role, Roles, follow

NEEDS = {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True), "target": Role(),
         "disc": Role(source="head", of="fake", trains=True)}
TABLE = TableVP.scaled_linear()


def teacher(dtype: torch.dtype = torch.float32) -> Denoiser:
    return Denoiser(tiny_unet().to(dtype), TABLE, "eps", guidance=3.0, taps=("mid_block",))


def example():
    return torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})


def build(needs=NEEDS, dtype: torch.dtype = torch.float32, seed: int = 0) -> Roles:
    net = teacher(dtype)
    return Roles.build(needs, net, lambda: (example()[0].to(dtype), *example()[1:]), seed)


def problem(count: int = 2):
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, f64([0.3, 0.7])[:count], Conditioning({"class_labels": torch.arange(count)})


class Wrapper(nn.Module):
    """What a distributed wrapper looks like: a module around the raw network."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_starts_frozen():
    m = build()
    assert m.names == ("teacher", "student", "fake", "target", "disc")
    assert m.trains == ("student", "fake", "disc")
    for name in m.names:
        assert not any(p.requires_grad for p in m.parameters(name))
        assert not m.module(name).training


def test_copies_are_equal_and_independent():
    m = build()
    before = [p.clone() for p in m.parameters("teacher")]
    for name in ("student", "fake", "target"):
        assert all(torch.equal(a, b) for a, b in zip(m.parameters(name), before, strict=True))
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(1.0)
    for name in ("teacher", "fake", "target"):
        assert all(torch.equal(a, b) for a, b in zip(m.parameters(name), before, strict=True))
    assert m.teacher.guidance == 3.0
    assert m.student.guidance == m.fake.guidance == m.target.guidance == 1.0                        # only the teacher is guided
    assert m.student.process is m.teacher.process
    assert m.student.taps == ("mid_block",)


def test_teacher_is_not_copied():
    net = teacher()
    assert Roles.build(NEEDS, net, example).teacher is net


@pytest.mark.parametrize("trained", [("student",), ("fake", "disc"), ("fake",), ()])
def test_train_only(trained):
    m = build()
    for before in ((), ("student", "fake", "disc"), ("fake",)):
        m.train_only(before)
        m.train_only(trained)
        for name in m.names:
            assert {p.requires_grad for p in m.parameters(name)} == {name in trained}
            assert {module.training for module in m.module(name).modules()} == {name in trained}


def test_parameters_by_name_include_frozen_ones():
    m = build()
    m.train_only(("fake",))
    assert [p.shape for p in m.parameters("student")] == [p.shape for p in m.student.network.parameters()]
    assert len(m.parameters("disc")) == len(list(m.disc.parameters())) > 0


def test_unknown_role():
    m = build()
    with pytest.raises(AttributeError, match="no role 'judge'; it has teacher, student, fake, target, disc"):
        m.judge  # noqa: B018
    assert not hasattr(m, "_anything")


def test_declarations_that_cannot_be_built():
    with pytest.raises(ValueError, match="'student' that trains"):
        build({"teacher": Role(), "student": Role()})
    with pytest.raises(ValueError, match="features of 'critic', which is not declared"):
        build({"teacher": Role(), "student": Role(trains=True), "disc": Role(source="head", of="critic", trains=True)})


def test_a_network_over_pictures_is_given_and_judged():
    """A head is built for its blocks; it is frozen whoever trains, and neither it nor the teacher belongs in a checkpoint."""
    m = build({"teacher": Role(), "student": Role(trains=True), "eyes": Role(source="features", of="fashion"),
               "disc": Role(source="head", of="eyes", trains=True)}, torch.float64)
    assert m.names == ("teacher", "student", "eyes", "disc")
    assert m.given == ("teacher", "eyes")
    assert m.disc(m.eyes(torch.zeros(2, 1, 8, 8))).shape == (2,)
    assert m.eyes(torch.zeros(2, 1, 8, 8))[0].dtype == next(m.disc.parameters()).dtype == torch.float64
    m.train_only(("student", "disc"))
    assert not any(p.requires_grad for p in m.parameters("eyes"))
    assert not any(module.training for module in m.eyes.modules())


def test_a_judge_is_given_and_no_discriminator_reads_it():
    needs = {"teacher": Role(), "student": Role(trains=True), "judge": Role(source="judge", of="fashion")}
    m = Roles.build(needs, teacher(), example, labels=("Bag", "Coat"))
    assert m.given == ("teacher", "judge")
    assert m.judge(torch.zeros(2, 1, 8, 8), torch.tensor([1, 0])).shape == (2,)
    m.train_only(("student",))
    assert not any(p.requires_grad for p in m.parameters("judge"))
    assert not any(module.training for module in m.judge.modules())
    with pytest.raises(ValueError, match="features of 'judge', which is not declared"):
        Roles.build({**needs, "disc": Role(source="head", of="judge", trains=True)}, teacher(), example, labels=("Bag", "Coat"))


def test_gradients_through_a_frozen_role_reach_its_input():
    m = build()
    m.train_only(("student",))
    x, t, cond = problem()
    x.requires_grad_()
    m.fake(x, t, cond).x0.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in m.parameters("fake"))


def test_only_the_trained_roles_gradient_call_is_wrapped():
    m = build()
    m.wrap(Wrapper)
    assert not any(p.requires_grad for name in m.names for p in m.parameters(name))
    x, t, cond = problem()
    wrappers = {name: m._wrapped[name] for name in m.trains}
    assert set(wrappers) == {"student", "fake", "disc"}
    with Counted(wrappers["student"]) as student, Counted(wrappers["fake"]) as fake:
        m.train_only(("student",))
        m.student(x, t, cond)                                                                       # counts
        with torch.no_grad():
            m.student(x, t, cond)
        m.fake(x, t, cond)                                                                          # gradients pass, weights do not move
        m.teacher(x, t, cond, w=1.0)
        m.target(x, t, cond)
        assert (student, fake) == ([2], [])
        m.train_only(("fake", "disc"))
        with torch.no_grad():
            m.student(x, t, cond)
        m.student(x, t, cond)
        m.fake(x, t, cond)                                                                          # counts
        assert (student, fake) == ([2], [2])
    assert m.disc is wrappers["disc"]
    m.train_only(("student",))
    assert m.disc is wrappers["disc"].module
    assert m.module("student") is wrappers["student"].module                                        # saved and averaged without it


def test_a_call_of_a_property_of_a_trained_role_keeps_its_wrapper():
    m = build()
    m.wrap(Wrapper)
    m.train_only(("student",))
    assert m.student.plain.wrapped is m._wrapped["student"]
    assert m.student.copy().wrapped is None


def test_no_sync_holds_back_all_but_the_last():
    m = build()
    entered = []

    class Ddp(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module, self.name = module, None

        def no_sync(self):
            from contextlib import nullcontext

            entered.append(self.module)
            return nullcontext()

    m.wrap(Ddp)
    with m.no_sync(("fake", "disc"), unless=False):
        assert entered == [m.module("fake"), m.module("disc")]
    entered.clear()
    with m.no_sync(("fake", "disc"), unless=True):
        assert not entered


def test_head_is_reproducible_and_leaves_the_generator_alone():
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = build(seed=4)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(17)
    second, other = build(seed=4), build(seed=5)
    weights = [[p for p in m.parameters("disc") if p.ndim > 1] for m in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_head_fits_the_features_it_reads():
    m = build()
    x, t, cond = problem()
    assert m.disc(m.fake(x, t, cond, tap=True).features).shape == (2,)
    assert not m.fake.network.mid_block._forward_hooks


@pytest.mark.parametrize(("stored", "held"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_copies_hold_at_least_float32(stored, held):
    """A teacher stored in half precision stays so; what an optimizer or `follow` moves cannot be, or small updates would vanish."""
    m = build(dtype=stored)
    assert m.teacher.dtype == stored
    assert m.student.dtype == m.fake.dtype == m.target.dtype == held
    assert {p.dtype for p in m.parameters("disc")} == {held}
    x, t, cond = problem()
    assert m.disc(m.fake(x, t, cond, tap=True).features).dtype == held
    assert m.teacher(x, t, cond, w=1.0).x0.dtype == held
    m.follow("target", "student", 0.95)


def test_follow():
    m = build()
    with torch.no_grad():
        for p in m.parameters("student"):
            p.add_(1.0)
    before = [p.clone() for p in m.parameters("target")]
    m.follow("target", "student", 0.75)
    for now, old, theirs in zip(m.parameters("target"), before, m.parameters("student"), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * theirs)
    m.follow("target", "student", 0.0)
    assert all(torch.equal(a, b) for a, b in zip(m.parameters("target"), m.parameters("student"), strict=True))
    assert not any(p.requires_grad for p in m.parameters("target"))


def test_follow_copies_buffers_and_bridges_precisions():
    source, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    source(torch.randn(4, 2))
    with torch.no_grad():
        source.weight.fill_(2.0)
    follow(average, source.to(torch.bfloat16), 0.5)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.weight.dtype == torch.float32
    assert int(average.num_batches_tracked) == 1
    assert torch.equal(average.running_var, source.running_var.float())


def test_many_small_steps_are_not_lost():
    """decay 0.999 a thousand times: 1 - e^-1 of the way, in float32."""
    average, source = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        average.weight.fill_(1.0)
        source.weight.fill_(2.0)
    for _ in range(1000):
        follow(average, source, 0.999)
    assert float(average.weight.detach()) == pytest.approx(2 - 0.999**1000, abs=1e-4)
