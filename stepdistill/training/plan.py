"""What a recipe asks of a card, before anything is downloaded: bytes per role, the peak of each update, and what would make it fit.

One round of the method's own updates is rehearsed: its losses and backward passes run on the real network classes with tensors that have
shapes and no numbers, while every storage is followed from its making to its end. So copies in half precision that autocast keeps,
recomputed blocks, passes without a gradient and adapters are counted by what the code does, not by a formula of ours. Optimizer moments
and the average are added by their size. What is not a tensor of PyTorch is not seen: `RESERVE` stands for it.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill import recipe as recipes
from stepdistill.diffusion.draws import Draws, Noise
from stepdistill.diffusion.process import Flow
from stepdistill.methods import find
from stepdistill.methods.base import Batch, Conditions, Method, Pairs, Sample, Setup, Update
from stepdistill.models.adapters import active, checkpoint_activations
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.experts import Experts
from stepdistill.models.features import load_features
from stepdistill.models.judges import load_judge
from stepdistill.models.networks import META, NetworkSpec, of_folder
from stepdistill.models.roles import Roles, features_of
from stepdistill.models.variance import LogVariance
from stepdistill.recipe import DataRecipe, Recipe
from stepdistill.training.assemble import AUTOCAST, assemble, dtype_of
from stepdistill.training.live import Live, alive, rehearsal
from stepdistill.training.measure import iterate, period
from stepdistill.worlds.fashion.data import CLASSES

GIB = 2**30
RESERVE = GIB                                             # for what is no tensor: the CUDA context, workspaces, gaps. A rule of thumb
GRADIENTS = "gradients"
PLANS = 512                                               # steps after which a method's plan has shown all its updates
ACCUMULATE = ("accumulate",)                              # how many micro-batches is found when its turn comes
RANK = 64                                                 # of the adapters that are proposed


@dataclass(frozen=True)
class Demand:
    """Numbers and bytes of one role. Its gradients are alive in its own updates only; its activations are the most that its calls and
    its backward pass hold at one time."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int


@dataclass(frozen=True)
class Switch:
    """Recipe keys (`key=value`) put on top of those before it, what they cost, and the bytes at the peak then."""

    keys: tuple[str, ...]
    price: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """Bytes of one process. `updates` are the peaks of each update, everything included; `encoders` the rest of the teacher's pipeline.

    `switches` are empty where it fits as it is, or no card was named. `cards` is on how many it would fit if weights, gradients,
    optimizer and average were divided among them, all switches on; None where it fits without, or never would.
    """

    network: str
    micro_batch: int
    roles: Mapping[str, Demand]
    ema: int
    encoders: Mapping[str, int]
    updates: Mapping[str, int]
    gpu: int | None = None
    switches: tuple[Switch, ...] = ()
    cards: int | None = None

    @property
    def peak(self) -> int:
        return max(self.updates.values())

    @property
    def resident(self) -> int:
        """What is held between the updates."""
        return sum(role.weights + role.optimizer for role in self.roles.values()) + self.ema + sum(self.encoders.values())

    @property
    def fits(self) -> bool | None:
        """As the recipe is; None without a card."""
        return None if self.gpu is None else self.peak + RESERVE <= self.gpu

    @property
    def fits_with_switches(self) -> bool | None:
        """With all of them on."""
        peak = self.switches[-1].peak if self.switches else self.peak
        return None if self.gpu is None else peak + RESERVE <= self.gpu

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `fits` is that of the recipe as it is."""
        return {**asdict(self), "peak": self.peak, "resident": self.resident, "reserve": RESERVE, "fits": self.fits,
                "fits_with_switches": self.fits_with_switches}


def plan(recipe: Recipe, network: NetworkSpec | None = None, gpu: int | None = None, *, card: bool = True) -> Plan:
    """The bytes of a recipe, and on a card of `gpu` bytes what makes it fit; `network` stands in for a teacher whose folder is not here.

    `card=False` counts a run on a CPU. Weights are never read. FileNotFoundError or ValueError with the remedy.
    """
    network, known = (network or network_of(recipe)).at(recipe.teacher.call), Known()

    def counted(other: Recipe) -> Plan:
        return count(other, network, gpu, card=card, known=known)

    found = now = counted(recipe)
    switches: list[Switch] = []
    for keys, price in _ladder(recipe, found):
        if now.fits is not False:
            break
        keys = (f"accumulate={_accumulate(recipe, counted)}",) if keys == ACCUMULATE else keys
        try:
            then = counted(changed(recipe, keys))
        except ValueError:                                                       # this network cannot be switched so
            continue
        if then.peak < now.peak:
            recipe, now = changed(recipe, keys), then
            switches.append(Switch(keys, price, now.peak))
    return replace(found, switches=tuple(switches), cards=_cards(now, gpu) if gpu is not None and now.fits is False else None)


def network_of(recipe: Recipe) -> NetworkSpec:
    """The network that the recipe's teacher folder or world describes."""
    return of_folder(recipe.teacher.folder)


def changed(recipe: Recipe, keys: tuple[str, ...]) -> Recipe:
    """The recipe with `key=value` put in."""
    tree = yaml.safe_load(recipes.dump(recipe))
    for item in keys:
        path, _, value = item.partition("=")
        *parents, last = path.split(".")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = yaml.safe_load(value)
    return recipes.parse(tree)


def bytes_of_card(text: str) -> int:
    """Bytes of "24GB", "24GiB", "80g" or "24576MiB": cards are sold by powers of two, whatever they are called. ValueError otherwise."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([mgt])(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu {text!r} is no size of memory: write 24GB, 80GiB or 40g")
    return int(float(match[1]) * 2 ** {"m": 20, "g": 30, "t": 40}[match[2]])


def shown(found: Plan) -> str:
    """The plan for a person to read."""
    unit, name = (GIB, "GiB") if found.peak >= GIB else (2**20, "MiB")
    row = lambda label, *values: f"{label:<14}{values[0]:>15}" + "".join(f"{v / unit:>12.2f}" for v in values[1:])                # noqa: E731
    lines = [f"{'role':<14}{'parameters':>15}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'activations':>12}   {name}"]
    lines += [row(label, f"{d.parameters:,}", d.weights, d.gradients, d.optimizer, d.activations) for label, d in found.roles.items()]
    lines += [row("ema", "", found.ema)] if found.ema else []
    lines += [row(label, "", size) for label, size in found.encoders.items()]
    lines += [f"held between updates {found.resident / unit:.2f} {name}; at the peak of an update of "
              + ", ".join(f"{loss} {size / unit:.2f}" for loss, size in found.updates.items())
              + f" (batches of {found.micro_batch}, one process)"]
    if found.gpu is None:
        return "\n".join(lines)
    limit = f"{found.gpu / unit:.2f} {name} with {RESERVE / unit:.2f} kept for what is no tensor"
    if found.fits:
        return "\n".join([*lines, f"fits on {limit}"])
    lines += [f"does not fit on {limit}. Switches, cheapest first, each with those above it:"]
    before = found.peak
    for switch in found.switches:
        saved = f"saves {(before - switch.peak) / unit:.2f}, peak {switch.peak / unit:.2f}"
        lines += [f"  {' '.join(switch.keys)}", f"      {saved}; price: {switch.price}"]
        before = switch.peak
    if found.fits_with_switches:
        return "\n".join([*lines, "fits with these"])
    cards = (f"weights, gradients and optimizer divided among {found.cards} such cards (FSDP) might, which has not been run here"
             if found.cards else "neither would dividing the weights among more of them: activations and encoders alone are too much")
    return "\n".join([*lines, f"nothing here makes it fit; {cards}"])


# ---- counting

Known = dict[str, tuple[dict[str, int], Counter[str]]]    # what was rehearsed, by all that a rehearsal depends on


def count(recipe: Recipe, network: NetworkSpec, gpu: int | None = None, *, card: bool = True, known: Known | None = None) -> Plan:
    """One round of the method's updates at the recipe's micro-batch, on one process. ValueError where the network cannot be called so."""
    config, cls = recipe.method_config, find(recipe.method["name"])
    decode = None if network.prompted else network.codec.decode
    method, needs = cls(config, Setup(Flow(), network.shape, recipe.student.sampler, decode, recipe.guidance)), cls.needs(config)
    features = {name: load_features(role.of).to("meta") for name, role in needs.items() if role.source == "features" and role.of}
    judges = {name: load_judge(role.of, CLASSES).to("meta")                      # any labels: they weigh next to nothing
              for name, role in needs.items() if role.source == "judge" and role.of}
    if (features or judges) and "vae" in network.frozen:
        raise ValueError(f"{recipe.method['name']} judges pictures, and plan rehearses no VAE: count this one with train --dry-run")
    dtype = dtype_of(recipe)
    teacher = network.denoiser(dtype=dtype, guidance=recipe.guidance, autocast=AUTOCAST[recipe.precision], taps=recipe.student.taps)
    with META:
        copies = {name: role for name, role in needs.items() if role.source == "teacher"}
        roles = Roles.build(copies, teacher, lambda: _example(network), recipe.seed, recipe.lora, method.sampler().boundaries)
        if recipe.weights == "bfloat16":
            for name in roles.trains:
                roles.module(name).to(torch.bfloat16)
    networks = roles.networks
    if recipe.gradient_checkpointing:
        for module in networks:
            checkpoint_activations(module)
    with rehearsal(card=card) as blank:
        for module in (*networks, *features.values(), *judges.values()):
            blank(module)
        try:
            seen = lambda of: features[of].seen() if of in features else features_of(roles.denoisers[of], lambda: _example(network))     # noqa: E731
            heads: dict[str, tuple[str | None, nn.Module]] = {name: (role.of, Discriminator(seen(role.of)))
                                                              for name, role in needs.items() if role.source == "head" and role.of}
            heads |= {name: (None, LogVariance()) for name, role in needs.items() if role.source == "variance"}
            roles = Roles(roles.denoisers, heads, [name for name, role in needs.items() if role.trains], {**features, **judges})
            likewise, known = _rehearsed_alike(recipe), {} if known is None else known
            work, activations = known[likewise] = known.get(likewise) or _rehearsed(recipe, network, method, roles)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"network {network.name} cannot be called with the arguments that it is said to take: name its own with "
                             f"--network FILE ({' '.join(str(error).split())[:200]})") from error
    demands = {name: _demand(recipe, roles, name, activations[name]) for name in roles.names}
    ema = sum(p.numel() * max(4, p.element_size()) for p in _tensors(roles.module("student"))) if recipe.ema_decay else 0
    encoders = {name: number * (dtype.itemsize if network.prompted else 4) for name, number in network.frozen.items()
                if name == "vae" or not recipe.data.cache}
    found = Plan(network.name, recipe.batch_size // recipe.accumulate, demands, ema, encoders, {}, gpu)
    return replace(found, updates={name: found.resident + size for name, size in work.items()})


def _rehearsed_alike(recipe: Recipe) -> str:
    """The same for recipes whose rehearsals hold the same bytes: the second micro-batch is like every later one."""
    accumulate = min(recipe.accumulate, 2)
    batch_size = recipe.batch_size // recipe.accumulate * accumulate
    return repr(replace(recipe, optim={}, ema_decay=0.0, data=DataRecipe(), accumulate=accumulate, batch_size=batch_size))


def _rehearsed(recipe: Recipe, network: NetworkSpec, method: Method[Any], roles: Roles) -> tuple[dict[str, int], Counter[str]]:
    """The most bytes that each update needs beside what is resident, and the most of each role's activations."""
    micro, work, most = recipe.batch_size // recipe.accumulate, Counter[str](), Counter[str]()
    held = [tensor for name in roles.names for tensor in _tensors(roles.module(name))]
    draws = BlankDraws(recipe.seed, range(micro))
    plans = list(dict.fromkeys(tuple(method.plan(step)) for step in range(PLANS)))
    fresh = {update.loss for updates in plans for update in updates if not update.reuse}
    for updates in plans:
        new = [update.loss not in work and not (update.reuse and update.loss in fresh) for update in updates]
        batch = _batch(method, network, micro, recipe.guidance != 1)
        for update in updates[: max((i + 1 for i, is_new in enumerate(new) if is_new), default=0)]:
            batch = batch if update.reuse else _batch(method, network, micro, recipe.guidance != 1)
            roles.train_only(update.trains, update.expert)
            with Live(held) as live, _labelled(roles, update, live):
                if recipe.accumulate > 1:                                        # those of the micro-batches before this one
                    for parameter in (p for name in update.trains for p in roles.parameters(name) if p.requires_grad):
                        parameter.grad = torch.empty_like(parameter)
                        live.relabel(parameter.grad, GRADIENTS)
                loss = method.loss(update, roles, batch, draws).value / recipe.accumulate
                live.label = update.trains[0]
                torch.autograd.backward(loss)
                del loss
            for parameter in (p for name in update.trains for p in roles.parameters(name)):
                parameter.grad = None
            work[update.loss] = max(work[update.loss], live.peak)
            most |= live.most
    return dict(work), most


@contextmanager
def _labelled(roles: Roles, update: Update, live: Live) -> Iterator[None]:
    """What is made in a role's call is that role's; what becomes a gradient moves to the gradients."""
    others = [name for name in roles.names if name not in roles.denoisers]
    names = roles.callers | {(id(roles.module(name)), None): name for name in others}

    def begin(module: nn.Module, args: Any) -> None:
        live.label = names[id(module), active(module)]

    def end(module: nn.Module, args: Any, out: Any) -> None:
        live.label = ""

    def settle(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.relabel(parameter.grad, GRADIENTS)

    modules = {id(module): module for module in (*(d.network for d in roles.denoisers.values()), *map(roles.module, others))}.values()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        for parameter in (p for name in update.trains for p in roles.parameters(name) if p.requires_grad):
            stack.callback(parameter.register_post_accumulate_grad_hook(settle).remove)
        yield


def _example(network: NetworkSpec) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.zeros(1, *network.shape), torch.full((1,), 0.5, dtype=torch.float64), network.condition(1, guided=False)


def _batch(method: Method[Any], network: NetworkSpec, size: int, guided: bool) -> Batch:
    def state(wanted: bool) -> Tensor | None:
        return torch.zeros(size, *network.shape) if wanted else None

    return Batch({name: Sample(network.condition(size, guided), x0=state(not isinstance(stream, Conditions)),
                               z=state(isinstance(stream, Pairs)), labels=torch.zeros(size, dtype=torch.long))
                  for name, stream in type(method).data(method.cfg).items()})


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _demand(recipe: Recipe, roles: Roles, name: str, activations: int) -> Demand:
    parameters, buffers = roles.parameters(name), list(roles.module(name).buffers())
    module = roles.module(name)
    moving = list(module.experts[0].parameters()) if isinstance(module, Experts) else parameters        # one at a time, all alike
    moving = moving if name in roles.trains else []
    moments = sum(p.numel() * (2 if recipe.optim[name].name == "adamw8bit" else 2 * p.element_size()) for p in moving)
    weights = sum(t.nbytes for t in (*parameters, *buffers))
    return Demand(sum(p.numel() for p in parameters), weights, sum(p.nbytes for p in moving), moments, activations)


@dataclass(frozen=True)
class BlankDraws(Draws):
    """Draws without numbers; what is drawn for the whole batch is the last: the call that is trained comes after the longest rollout."""

    def shared(self, tag: str) -> Noise:
        return _Last(super().shared(tag).seeds, False, self.device)


class _Last(Noise):
    def integers(self, high: int) -> Tensor:
        return torch.tensor(high - 1)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.tensor(high, dtype=torch.float64)


# ---- what would make it fit

def _ladder(recipe: Recipe, found: Plan) -> Iterator[tuple[tuple[str, ...], str]]:
    """The switches that are still off and what they cost, cheapest first."""
    needs = find(recipe.method["name"]).needs(recipe.method_config)
    full = [name for name, role in needs.items() if role.trains and role.source == "teacher" and name not in recipe.lora]
    critics = [name for name in full if name != "student"]
    if set(found.encoders) - {"vae"}:
        yield ("data.cache=cache",), "every prompt is encoded once, beforehand; text encoders leave the card"
    if recipe.teacher.dtype == "float32" and recipe.precision == "bf16":
        yield ("teacher.dtype=bfloat16",), "frozen weights are rounded once, and full copies begin with the rounded ones"
    if not recipe.gradient_checkpointing:
        yield ("gradient_checkpointing=true",), "about a third slower"
    if recipe.accumulate < recipe.batch_size:
        yield ACCUMULATE, "the same gradient from smaller micro-batches, which fill the card less"
    if eight := [name for name in full if recipe.optim[name].name != "adamw8bit"]:
        yield tuple(f"optim.{name}.name=adamw8bit" for name in eight), "moments of 8 bits; needs bitsandbytes"
    if critics:
        yield tuple(f"lora.{name}.rank={RANK}" for name in critics), "critics that can follow the student less far"
    if "student" in full:
        yield (f"lora.student.rank={RANK}",), "a student that can leave the teacher less far"
    if recipe.ema_decay:
        yield ("ema_decay=0",), "the last weights in the place of their average: noisier pictures"


def _accumulate(recipe: Recipe, peak_of: Callable[[Recipe], Plan]) -> int:
    """The fewest micro-batches that fit, or one sample in each.

    A first step from one micro-batch to two may cost more than it saves: gradients are then alive in the second one's forward pass.
    """
    counts = [n for n in range(recipe.accumulate + 1, recipe.batch_size + 1) if recipe.batch_size % n == 0]
    first = bisect.bisect_left(counts, True, key=lambda n: bool(peak_of(changed(recipe, (f"accumulate={n}",))).fits))
    return counts[min(first, len(counts) - 1)]


def _cards(now: Plan, gpu: int) -> int | None:
    """How many would do if all but activations and encoders were divided among them; None where those alone are too much."""
    room = gpu - RESERVE - sum(now.encoders.values()) - sum(role.activations for role in now.roles.values())
    divided = now.ema + sum(role.weights + role.gradients + role.optimizer for role in now.roles.values())
    return math.ceil(divided / room) if room > 0 else None


# ---- the same on this machine

def measured(recipe: Recipe, accelerator: Accelerator) -> int:
    """Bytes at the peak of one real round of the method's updates: every tensor storage alive then that was not alive before."""
    before = {id(tensor.untyped_storage()) for tensor in alive()}
    run = assemble(recipe, accelerator)
    steps = period(run)
    iterate(run, 0, steps)                                                       # from here on the optimizers have their moments
    held = alive()
    resident = sum(s.nbytes() for s in (tensor.untyped_storage() for tensor in held) if id(s) not in before)
    with Live(held) as live:
        iterate(run, 0, steps)
    return resident + live.peak
