"""A student that is told a first time below 1 starts from noise alone: its method trains it on that, or refuses the time."""

from __future__ import annotations

import pytest
import torch
from oracles import GaussianTeacher, f64
from small import TABLE, keyed, labelled, unet_roles

from stepdistill import recipe as recipes
from stepdistill.diffusion.sampler import SamplerSpec, start
from stepdistill.diffusion.solver import follow
from stepdistill.methods import METHODS, find
from stepdistill.methods.base import Setup
from stepdistill.recipe import build


@pytest.mark.parametrize("name", METHODS)
def test_noise_is_a_state_of_training_or_no_start(name: str) -> None:
    cls = METHODS[name]
    spec = SamplerSpec((0.4,) if cls.one_step else (0.4, 0.2))
    config, setup = build(cls.Config, {"experts": False} if name == "phased_dmd" else {}, "method"), Setup(TABLE, (1, 8, 8), spec)
    if cls.on_trajectories:
        with pytest.raises(ValueError, match=r"^student\.times must begin at 1 for .*, which learns along trajectories, where at 0\.4 .*$"):
            cls(config, setup)
        return
    method, fed, noise = cls(config, setup), list[torch.Tensor](), list[torch.Tensor]()
    m = unet_roles(method)
    m.module("student").register_forward_pre_hook(lambda module, args: fed.extend(args[0][args[1] == 399]))
    for step in range(1000, 1003):                                               # after any warm-up; calls are drawn
        draws = keyed(step)
        method.loss(next(u for u in method.plan(0) if u.loss == "student"), m, labelled(draws, method), draws)
        noise.extend(start(TABLE, spec, draws.each("start").normal(1, 8, 8)))
    assert any(torch.allclose(x, z) for x in fed for z in noise), "no call of training begins as the sampler does: set on_trajectories"


def test_where_the_ode_ends_from_such_noise() -> None:
    """The numbers of `Method`: a perfect student that begins below 1 is a wrong one."""
    teacher, z = GaussianTeacher(TABLE, "eps"), torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start(TABLE, SamplerSpec((0.4,)), z)
    end = follow(lambda x_t, t: teacher(x_t, t, None), x, f64([0.4] * len(x)), f64([0.0] * len(x)), 30, TABLE, "heun")
    assert float(end.mean()) == pytest.approx(0.70, abs=0.02)
    assert float(end.std()) == pytest.approx(0.53, abs=0.01)
    assert (float(teacher.mean), float(teacher.std)) == (1.3, 0.6)


@pytest.mark.parametrize("name", recipes.names())
def test_the_shipped_recipes_begin_where_they_may(name: str) -> None:
    recipe = recipes.load(name)
    method = find(recipe.method["name"])(recipe.method_config, Setup(TABLE, (1, 8, 8), recipe.student.sampler))
    assert len(method.sampler().times) == recipe.student.steps
