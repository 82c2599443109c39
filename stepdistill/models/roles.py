"""Roles: the models a method declares, built as full copies of the teacher (or heads on one of them), and who of them trains now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import key
from stepdistill.diffusion.sampler import check_inputs
from stepdistill.models.adapters import LoraRecipe, base_of, exchanged, inject, trained_of, views_of
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser, tapped
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.experts import Experts, serving
from stepdistill.models.features import load_features
from stepdistill.models.inputs import add_inputs
from stepdistill.models.judges import load_judge
from stepdistill.models.variance import LogVariance

Example = Callable[[], tuple[Tensor, Tensor, Conditioning]]              # a tiny (x_t, t, cond) to measure features with


@dataclass(frozen=True)
class Role:
    """One model of a method: does it train, and where does it come from.

    "teacher" is a copy of the teacher (the role named teacher is the teacher itself); "head" is a discriminator over the features of
    the role `of`; "variance" is a log-variance of a loss at each time (models.variance); "features" is a frozen network over pictures,
    `of` a world or a folder (models.features), and "judge" is one that compares them with the teacher's labels (models.judges). With
    several `experts` it is a copy for each stretch of time between the boundaries of the method's sampler. `inputs` ("s", "w") are what
    the copy is told besides its time (models.inputs).
    """

    trains: bool = False
    source: Literal["teacher", "head", "variance", "features", "judge"] = "teacher"
    of: str | None = None
    experts: int = 1
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_inputs(self.inputs)
        if self.inputs and (self.source != "teacher" or self.experts > 1):
            raise ValueError("only a single copy of the teacher can be told something besides its time, no head and no experts")


class Roles:
    """What a method's losses call: `m.student(x_t, t, cond)`, `m.teacher.plain(...)`, `m.disc(features)`.

    A role that is training goes through its distributed wrapper when gradients are on; every other call goes to the bare network.
    """

    def __init__(self, denoisers: Mapping[str, Denoiser], heads: Mapping[str, tuple[str | None, nn.Module]], trains: Iterable[str],
                 over_pictures: Mapping[str, nn.Module] | None = None):
        """`heads` pairs each head with the role it reads, None where it reads times alone; `over_pictures` are frozen: features, judges."""
        self._denoisers, self._wrapped = dict(denoisers), dict[str, nn.Module]()
        self._adapters = {name: own for name, d in self._denoisers.items() if (own := trained_of(d.network, d.adapter)) is not None}
        self._heads = {name: head for name, (_, head) in heads.items()}
        self._over_pictures = dict(over_pictures or {})
        self.heads = {name: of for name, (of, _) in heads.items() if of is not None}
        self.trains, self._active = tuple(trains), tuple[str, ...]()
        for name in self.names:
            self.module(name).requires_grad_(False).eval()

    @classmethod
    def build(cls, needs: Mapping[str, Role], teacher: Denoiser, example: Example, seed: int = 0,
              lora: Mapping[str, LoraRecipe] | None = None, boundaries: Sequence[float] = (), labels: Sequence[str] = ()) -> Roles:
        """Copies for every role but the teacher, with float32 master weights (float64 if the teacher's are), trained or following.

        A role in `lora` is an adapter on the teacher's own network instead, and each expert of a role one of its own: one base for as many
        roles as are named there. `boundaries` are those between the experts of a role that has several, `labels` the names of the
        teacher's classes, for a judge.
        """
        lora = lora or {}
        if unknown := sorted(set(lora) - {n for n, r in needs.items() if r.source == "teacher" and n != "teacher"}):
            raise ValueError(f"lora.{unknown[0]}: this method has no such copy of the teacher")
        _check_told(needs, teacher, lora)
        if "student" not in needs or not needs["student"].trains:
            raise ValueError("a method must declare a role 'student' that trains")
        denoisers: dict[str, Denoiser] = {}
        for name, role in needs.items():
            if role.source == "teacher":
                if name in lora:
                    continue
                if name == "teacher":
                    denoisers[name] = teacher
                else:
                    denoisers[name] = teacher.copy() if role.experts == 1 else teacher.divided(boundaries)
                if name != "teacher" and denoisers[name].dtype in (torch.float16, torch.bfloat16):
                    denoisers[name].network.float()
                if role.inputs:
                    add_inputs(denoisers[name].network, role.inputs)
                    denoisers[name] = replace(denoisers[name], inputs=role.inputs)
        for name, recipe in lora.items():                                # after the full copies, which must not copy adapters
            if (count := needs[name].experts) == 1:
                denoisers[name] = teacher.shared(name)
                inject(teacher.network, name, recipe, key(seed, "lora", name))
                continue
            denoisers[name] = teacher.shared_by([f"{name}_{i + 1}" for i in range(count)], boundaries)
            for view in views_of(denoisers[name].network):
                inject(view.base, view.name, recipe, key(seed, "lora", view.name), view.network)
        denoisers = {name: denoisers[name] for name in needs if name in denoisers}
        weight = next(teacher.network.parameters())
        place = weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32
        features = {name: load_features(role.of).to(*place) for name, role in needs.items() if role.source == "features" and role.of}
        heads: dict[str, tuple[str | None, nn.Module]] = {}
        for name, role in needs.items():
            if role.source == "variance":
                heads[name] = None, _seeded(LogVariance, key(seed, "head", name)).to(*place)
            if role.source == "head":
                if role.of is None or role.of not in {**denoisers, **features}:
                    raise ValueError(f"head {name!r} reads features of {role.of!r}, which is not declared: {[*denoisers, *features]}")
                seen = features_of(denoisers[role.of], example) if role.of in denoisers else features[role.of].seen()
                heads[name] = role.of, _seeded(partial(Discriminator, seen), key(seed, "head", name)).to(*place)
        judges = {name: load_judge(role.of, labels).to(*place) for name, role in needs.items() if role.source == "judge" and role.of}
        return cls(denoisers, heads, [name for name, role in needs.items() if role.trains], {**features, **judges})

    @property
    def names(self) -> tuple[str, ...]:
        """Every role."""
        return (*self._denoisers, *self._over_pictures, *self._heads)

    @property
    def given(self) -> tuple[str, ...]:
        """The roles that no method changes: no checkpoint holds them."""
        return ("teacher", *self._over_pictures)

    @property
    def denoisers(self) -> Mapping[str, Denoiser]:
        """The roles that are denoisers."""
        return self._denoisers

    @property
    def networks(self) -> list[nn.Module]:
        """What the denoisers run on, each once: roles that are adapters share theirs."""
        bases = [base_of(denoiser.network) for denoiser in self._denoisers.values()]
        return list({id(base): base for base in bases}.values())

    @property
    def callers(self) -> dict[tuple[int, str | None], str]:
        """Whose call it is when a network runs, by the network's id and the adapter that is on."""
        own = {(id(d.network), d.adapter): name for name, d in self._denoisers.items()}
        return own | {(id(view.base), view.name): name for name, d in self._denoisers.items() for view in views_of(d.network)}

    def module(self, name: str) -> nn.Module:
        """The bare network, adapter or head, without its distributed wrapper."""
        if name in self._adapters:
            return self._adapters[name]
        return self._denoisers[name].network if name in self._denoisers else {**self._over_pictures, **self._heads}[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All parameters of a role, collected by name and never by what happens to require a gradient; a base without its adapters."""
        return [p for path, p in self.module(name).named_parameters() if name in self._adapters or ".lora_" not in path]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._denoisers:
            return self._denoisers[name]
        if name in self._over_pictures:
            return self._over_pictures[name]
        if name in self._heads:
            return self._wrapped[name] if name in self._active and name in self._wrapped else self._heads[name]
        raise AttributeError(f"this method declared no role {name!r}; it has {', '.join(self.names)}")

    def train_only(self, names: Sequence[str], expert: int | None = None) -> None:
        """Gradients, train mode and the distributed wrapper for these roles; none of them for the others.

        Of a role that is several experts, only this `expert` if one is named.
        """
        self._active = tuple(names)
        for name in sorted(self.names, key=lambda n: n in names):        # a base holds the adapters: freeze it before one of them trains
            active = name in names
            module = self.module(name)
            module.requires_grad_(active).train(active)
            if active and expert is not None and isinstance(module, Experts):
                module.requires_grad_(False).experts[expert].requires_grad_(True)
            if name in self._denoisers:
                self._denoisers[name].wrapped = self._wrapped.get(name) if active else None

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap every trained role for several processes; the wrapper goes around the raw network."""
        for name in self.trains:
            self.module(name).requires_grad_(True)
            self._wrapped[name] = wrapper(self._denoisers[name].network if name in self._adapters else self.module(name))
            self.module(name).requires_grad_(False)

    @contextmanager
    def no_sync(self, names: Sequence[str], *, unless: bool) -> Iterator[None]:
        """Hold the gradient exchange of these roles back, unless this is the last micro-batch."""
        with ExitStack() as stack:
            for name in names:
                module = self._wrapped.get(name)
                if not unless and isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    @contextmanager
    def averaged(self, average: nn.Module | None) -> Iterator[Denoiser]:
        """The student as it is sampled, with the weights of its moving average where there is one."""
        student = self._denoisers["student"]
        with ExitStack() as stack:
            if average is not None and "student" in self._adapters:
                stack.enter_context(exchanged(self._adapters["student"], average))
            network = average if average is not None and "student" not in self._adapters else student.network
            was_training = network.training
            network.eval()
            yield replace(student, network=network, wrapped=None)
            network.train(was_training)

    @torch.no_grad()
    def follow(self, target: str, source: str, decay: float) -> None:
        """target <- decay·target + (1 - decay)·source, buffers copied; decay 0 copies."""
        follow(self.module(target), self.module(source), decay)


    @torch.no_grad()
    def restart(self, name: str) -> None:
        """A copy of the teacher as it began: with the teacher's weights, or as an adapter that changes nothing."""
        if name in self._adapters:
            for path, parameter in self.module(name).named_parameters():
                if path.endswith("lora_B"):
                    parameter.zero_()
            return
        mine, theirs = ([*self.parameters(role), *self.module(role).buffers()] for role in (name, "teacher"))
        for own, first in zip(mine, theirs, strict=True):
            own.copy_(first)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights of one module in another."""
    mine: list[Tensor] = list(target.parameters())
    torch._foreach_lerp_(mine, [theirs.to(p.dtype) for p, theirs in zip(mine, source.parameters(), strict=True)], 1 - decay)
    for buffer, theirs in zip(target.buffers(), source.buffers(), strict=True):
        buffer.copy_(theirs)


@torch.no_grad()
def features_of(denoiser: Denoiser, example: Example) -> list[Tensor]:
    """What its taps read of an example."""
    x_t, t, cond = example()
    with tapped(serving(denoiser.network, t), denoiser.taps) as features:
        denoiser.raw(x_t, t, cond)
    return features


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _check_told(needs: Mapping[str, Role], teacher: Denoiser, lora: Mapping[str, LoraRecipe]) -> None:
    """ValueError where a role cannot be told what it declares."""
    if teacher.inputs:
        raise ValueError(f"this teacher is a student that is told {' and '.join(teacher.inputs)}: distil the model it was made from")
    for name, role in needs.items():
        said = " and ".join(role.inputs)
        if role.inputs and name in lora:
            raise ValueError(f"lora.{name}: this role is told {said} by weights that an adapter has not: leave lora.{name} out")
        if role.inputs and isinstance(teacher.network, Experts):
            raise ValueError(f"{name} is told {said}, which copies of a teacher of several networks cannot be")
        if "w" in role.inputs and teacher.wiring is not None and teacher.wiring.embeds:
            raise ValueError("this teacher is told its guidance already, and its students are told the number that they were made with")
