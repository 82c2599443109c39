"""Tiny roles, batches and closed-form students that the tests of several methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from oracles import GaussianTeacher, f64
from torch import Tensor
from toys import tiny_unet

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.prediction import Prediction, target
from stepdistill.diffusion.process import NoiseProcess, TableVP, like
from stepdistill.methods.base import Batch, Conditions, Method, Pairs, Sample
from stepdistill.models.adapters import LoraRecipe
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Roles
from stepdistill.worlds.fashion.data import CLASSES

TABLE = TableVP.scaled_linear()
COUNT = 4
NULL = 3                                                                                            # the tiny U-Net's null class


def bare() -> Batch:
    """A batch without conditions."""
    return Batch({"main": Sample(Conditioning())})


def keyed(step: int = 0, update: int = 0, seed: int = 0, count: int = COUNT) -> Draws:
    """The randomness of one small batch."""
    return Draws(seed, range(count), step, update)


def labelled(draws: Draws, method: Method[Any]) -> Batch:
    """Random labels with their null, and pictures or pairs where the method reads them."""
    made = {}
    for name, stream in method.data(method.cfg).items():
        labels = draws.each(f"{name}/labels").integers(NULL)
        x0, z = (draws.each(f"{name}/{part}").normal(*method.setup.shape) for part in ("x0", "z"))
        made[name] = Sample(Conditioning({"class_labels": labels}, {"class_labels": torch.full_like(labels, NULL)}),
                            None if isinstance(stream, Conditions) else x0, z if isinstance(stream, Pairs) else None, labels)
    return Batch(made)


def unet_roles(method: Method[Any], guidance: float = 2.0, lora: Mapping[str, LoraRecipe] | None = None, kind: str = "eps") -> Roles:
    """Roles over a tiny U-Net on Stable Diffusion's table, every copy moved away from the teacher: equal scores would hide mistakes."""
    teacher = Denoiser(tiny_unet(), TABLE, kind, guidance=guidance, taps=("mid_block",))
    example = torch.zeros(1, 1, 8, 8), f64([0.5]), Conditioning({"class_labels": torch.zeros(1, dtype=torch.long)})
    m = Roles.build(method.needs(method.cfg), teacher, lambda: example, lora=lora, boundaries=method.sampler().boundaries, labels=CLASSES)
    with torch.no_grad():
        for name in m.trains:
            generator = torch.Generator().manual_seed(len(name))
            for p in m.parameters(name):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return m


class AffineStudent:
    """x0 = weights[0] + weights[1]·x_t, whatever the time: from unit noise its law is N(mean, std²), exactly."""

    def __init__(self, process: NoiseProcess, mean: float, std: float, kind: str = "x0"):
        self.process, self.kind, self.times = process, kind, list[Tensor]()
        self.weights = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, *, w: float | None = None, tap: bool = False) -> Prediction:
        self.times.append(t)
        x, alpha, sigma = x_t.double(), self.process.alpha(t), self.process.sigma(t)
        x0 = self.weights[0] + self.weights[1] * x
        return Prediction(target(self.kind, x0, (x - like(alpha, x) * x0) / like(sigma, x), alpha, sigma), self.kind, x, alpha, sigma)

    def law(self) -> GaussianTeacher:
        """The exact score of its one-step samples."""
        mean, std = self.weights.detach().clone()
        return GaussianTeacher(self.process, "flow", mean, std)


def gaussians(process: NoiseProcess, student: tuple[float, float] = (0.2, 0.9), fake: tuple[float, float] | None = None,
              kind: str = "flow") -> SimpleNamespace:
    """Exact teacher N(1.3, .6²), an affine student, and the exact fake score of its law or of another."""
    mean, std = fake or student
    return SimpleNamespace(student=AffineStudent(process, *student), teacher=GaussianTeacher(process, "v"),
                           fake=GaussianTeacher(process, kind, f64(mean), f64(std)))


def gaussian_kl(weights: Sequence[float] | Tensor, mean: float = 1.3, std: float = 0.6) -> float:
    """KL(N(w0, w1²) | N(mean, std²))."""
    m, s = torch.as_tensor(weights).tolist()
    return 0.5 * ((s / std) ** 2 + ((m - mean) / std) ** 2 - 1) - float(torch.tensor(abs(s) / std).log())


def student_gradient(method: Method[Any], m: Roles, draws: Draws) -> Tensor:
    """The student's gradient of one update in one vector; no other role may have received any."""
    m.train_only(("student",))
    method.loss(next(u for u in method.plan(0) if u.loss == "student"), m, labelled(draws, method), draws).value.backward()
    found = torch.cat([p.grad.flatten() for p in m.parameters("student") if p.grad is not None])
    for role in m.names:
        assert role == "student" or all(p.grad is None for p in m.parameters(role))
    m.module("student").zero_grad(set_to_none=True)
    return found
