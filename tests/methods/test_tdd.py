"""TDD: the card's target set, the law of the target, decoupled guidance, the sampler's grid (card 9)."""

from types import SimpleNamespace

import pytest
import torch
from oracles import KINDS, GaussianTeacher, MapOfTimes, MixtureTeacher, f64

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.process import TableVP
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.solver import jump
from stepdistill.diffusion.times import to_index, trailing
from stepdistill.losses.distance import pseudo_huber
from stepdistill.methods.base import Batch, Images, Sample, Setup
from stepdistill.methods.tdd import TDD, TDDConfig
from stepdistill.models.conditioning import Conditioning

TABLE = TableVP.scaled_linear()
SET = [127, 143, 167, 199, 251, 287, 335, 375, 399, 431, 499, 571, 599, 627, 667, 715, 751, 799, 835, 859, 875]


def tdd(times=trailing(4), clip_x0=None, **options) -> TDD:
    return TDD(TDDConfig(**options), Setup(TABLE, (1,), SamplerSpec(times, clip_x0=clip_x0)))


def test_the_cards_target_set():
    """N = 250 and 4 to 8 steps; 999 is no target."""
    targets = tdd().targets.tolist()
    assert targets[0] == 0
    assert [to_index(t, 1000) for t in targets[1:]] == SET


def test_target_is_within_the_window_below():
    """s <= r always. Undiminished targets are the members in [tau - window, tau], each as often, tau the largest not above r."""
    method, r = tdd(eta=0.0), f64([0.0, 0.12, 0.128, 0.5, 0.74, 0.996]).repeat_interleave(2000)
    s = method.target_below(r, Draws(0, range(len(r))))
    assert bool((s <= r).all())
    members = f64([0, *((n + 1) / 1000 for n in SET)])
    for time in r.unique().tolist():
        tau = float(members[members <= time].max())
        allowed = members[(members <= tau) & (members >= tau - 0.26 - 1e-9)]
        seen, counts = s[r == time].unique(return_counts=True)
        torch.testing.assert_close(seen, allowed)
        assert float((counts / 2000 - 1 / len(allowed)).abs().max()) < 5 * (0.25 / 2000) ** 0.5
    assert set(s[r == 0.996].tolist()) == {t for t in members.tolist() if 0.616 <= t <= 0.876}


def test_target_falls_by_a_share_of_at_most_eta():
    r, keyed = torch.full((4000,), 0.252, dtype=torch.float64), Draws(0, range(4000))
    whole, moved = tdd(eta=0.0).target_below(r, keyed), tdd(eta=0.3).target_below(r, keyed)
    share = (1 - moved / whole)[whole > 0]
    assert 0 <= float(share.min()) < 0.002
    assert 0.298 < float(share.max()) <= 0.3
    assert float(share.mean()) == pytest.approx(0.15, abs=0.006)
    assert bool((moved[whole == 0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_two_jumps_to_the_target(kind):
    teacher = GaussianTeacher(TABLE, kind)
    student, keyed, method = MapOfTimes(teacher, kind=kind, bend=0.2), Draws(0, range(64)), tdd(dropout=0.0)
    batch = Batch({"real": Sample(Conditioning(), teacher.data(64, torch.Generator().manual_seed(0), 1))})
    got = method.student_loss(SimpleNamespace(teacher=teacher, student=student), batch, keyed).value
    n = 1 + keyed.each("n").integers(250)
    t, r = n.double() / 250, (n - 1).double() / 250
    s = method.target_below(r, keyed)
    x_t = TABLE.add_noise(batch["real"].clean, keyed.each("eps").normal_like(batch["real"].clean), t)
    x_r = jump(teacher(x_t, t), TABLE, r)
    target = torch.where((s == r)[:, None], x_r, jump(student(x_r, r), TABLE, s))
    torch.testing.assert_close(got, pseudo_huber(jump(student(x_t, t), TABLE, s), target).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("h", [0.0, 1.0, 1.7])
def test_guidance_of_a_student_multiplies_that_of_its_teacher(kind, h):
    """S(cond) guided with g, S(null) plain: null + h·(S(cond) - null) is the teacher at h·g (card 9; trajectory S4)."""
    x, t = torch.linspace(-3, 3, 6, dtype=torch.float64), f64([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    cond = Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    teacher = MixtureTeacher(TABLE, kind, guidance=4.5)
    guided, plain = teacher(x, t, cond).x0, teacher(x, t, cond.null).x0
    torch.testing.assert_close(plain, teacher(x, t, cond.null, w=1.0).x0, rtol=1e-9, atol=1e-9)                               # unguided
    torch.testing.assert_close(plain + h * (guided - plain), teacher(x, t, cond, w=4.5 * h).x0, rtol=1e-6, atol=1e-6)


def test_conditions_drop_by_whole_batches():
    """A share of the updates has the null condition for teacher, target and student alike."""
    seen = []
    teacher = GaussianTeacher(TABLE)

    def net(x_t, t, cond, *, w=None, tap=False):
        seen.append(cond["class_labels"].tolist())
        return teacher(x_t, t)

    labels = torch.tensor([0, 1])
    sample = Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)}), torch.zeros(2, 1))
    for share, low, high in ((0.2, 20, 62), (0.0, 0, 0)):
        seen.clear()
        for step in range(200):
            tdd(dropout=share).student_loss(SimpleNamespace(teacher=net, student=net), Batch({"real": sample}), Draws(0, range(2), step))
        assert [seen[3 * i] == seen[3 * i + 1] == seen[3 * i + 2] for i in range(200)] == [True] * 200
        assert low <= sum(seen[3 * i] == [2, 2] for i in range(200)) <= high


def test_sampler_walks_the_target_set():
    """Equal steps move up to the grid (card 9: 999, 751, 499, 251); other times of the set stay; noise as in training."""
    spec = tdd(clip_x0=1.5).sampler()
    assert [to_index(t, 1000) for t in spec.times] == [999, 751, 499, 251]
    assert (spec.renoise, spec.clip_x0, spec.guidance) == (0.3, 1.5, 1.0)
    for uneven in ((1.0, 0.876, 0.752, 0.5, 0.252), (1.0, 0.876, 0.752, 0.628, 0.5, 0.252), (1.0, 0.876, 0.752, 0.628, 0.5, 0.376, 0.252)):
        assert tdd(uneven).sampler().times == uneven
        assert set(uneven[1:]) <= set(tdd().targets.tolist())
    for count in range(4, 9):                                                   # one student, every number of steps of its set
        assert set(spec.at(count).times[1:]) <= set(tdd().targets.tolist())
        assert len(spec.at(count).times) == count
    with pytest.raises(ValueError, match=r"or in 5, 6, 7, 8, not in 9"):
        spec.at(9)
    assert tdd(eta=0.0).sampler().renoise == 0


def test_needs_and_data():
    assert set(TDD.needs(TDDConfig())) == {"teacher", "student"}
    assert TDD.data(TDDConfig()) == {"real": Images()}


@pytest.mark.parametrize("options", [{"fewest": 0}, {"fewest": 9}, {"most": 300}, {"window": -0.1}, {"eta": 1.5}, {"dropout": 1.0},
                                     {"huber": -1.0}])
def test_impossible_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TDDConfig(**options)
