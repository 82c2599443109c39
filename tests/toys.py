"""Toy problems: small networks that answer like diffusers ones, a closed-form teacher behind the same seam, and a training loop for both.

The ring and the two-mode mixture are settings R and M of the method cards: 3 hidden layers, inputs [x, t, sin and cos of k·pi·t/2], a
velocity head, everything started from one network regressed on the teacher's velocity.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from confusion import record
from diffusers import DiTTransformer2DModel, UNet2DModel
from oracles import GaussianTeacher, MixtureTeacher, f64
from torch import Tensor, nn

from stepdistill.diagnose import LEAST, case_of, judge
from stepdistill.diffusion.draws import Draws, Noise, key
from stepdistill.diffusion.process import Flow, NoiseProcess
from stepdistill.diffusion.sampler import sample
from stepdistill.losses.reported import Mean
from stepdistill.methods.base import Batch, Conditions, Images, Method, Sample, Stream, Update
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.roles import Role, Roles
from stepdistill.models.variance import LogVariance
from stepdistill.recipe import OptimRecipe
from stepdistill.training.assemble import restarts_of, run_update, updates_of
from stepdistill.training.log import Means
from stepdistill.training.optim import Optimizers

HARMONICS = 8


class Mlp(nn.Module):
    """Velocity of a point (B, D) at time (B,); `trunk` puts out one token (B, 1, width), which a discriminator can tap."""

    def __init__(self, dim: int, width: int = 128, classes: int = 0):
        super().__init__()
        self.embed = nn.Embedding(classes, width) if classes else None
        self.enter = nn.Linear(dim + 1 + 2 * HARMONICS, width)
        self.trunk = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.leave = nn.Linear(width, dim)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, return_dict: bool = True) -> tuple[Tensor]:
        phase = time.to(x.dtype)[:, None] * torch.arange(1, HARMONICS + 1, dtype=x.dtype) * (math.pi / 2)
        h = self.enter(torch.cat([x, time.to(x.dtype)[:, None], phase.sin(), phase.cos()], dim=1))
        if self.embed is not None and class_labels is not None:
            h = h + self.embed(class_labels)
        return (self.leave(self.trunk(h[:, None]))[:, 0],)

    @property
    def proj_out(self) -> nn.Linear:
        """The last layer by the name that diffusers gives it."""
        return self.leave


class ToldMlp(Mlp):
    """A copy of an Mlp that is told numbers (B, count) besides its time; w - 1 may reach 4, so all are told in quarters."""

    def __init__(self, plain: Mlp, count: int):
        nn.Module.__init__(self)
        self.__dict__.update(copy.deepcopy(plain).__dict__)
        self.tell = nn.Linear(count * (1 + 2 * HARMONICS), plain.enter.out_features, bias=False)
        nn.init.zeros_(self.tell.weight)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, return_dict: bool = True,
                told: Tensor | None = None) -> tuple[Tensor]:
        assert told is not None
        phase = told[..., None] / 4 * torch.arange(1, HARMONICS + 1, dtype=x.dtype) * (math.pi / 2)
        more = self.tell(torch.cat([told / 4, phase.sin().flatten(1), phase.cos().flatten(1)], dim=1))
        hook = self.enter.register_forward_hook(lambda module, args, out: out + more)
        try:
            return super().forward(x, time, class_labels)
        finally:
            hook.remove()


def told(start: Denoiser, inputs: tuple[str, ...]) -> Denoiser:
    """A toy student that is told these."""
    return replace(start, network=ToldMlp(start.network, len(inputs)), inputs=inputs)


class Oracle(nn.Module):
    """A closed-form teacher as a network: its raw output in its own kind, at clock "t". One unused weight says the precision."""

    def __init__(self, teacher: GaussianTeacher | MixtureTeacher, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.teacher = teacher
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, return_dict: bool = True) -> tuple[Tensor]:
        cond = None if class_labels is None else {"class_labels": class_labels}
        shape = self.teacher.means.shape[1:] if isinstance(self.teacher, MixtureTeacher) else x.shape[1:]
        return (self.teacher(x.reshape(len(x), *shape), time.double(), cond, w=1.0).raw.reshape(x.shape),)

    def denoiser(self) -> Denoiser:
        """Ready for Roles."""
        return Denoiser(self, self.teacher.process, self.teacher.kind, clock="t")


class Counted:
    """Counts the calls of a network, and the rows of each: `with Counted(net) as calls: ...; calls == [4, 8]`."""

    def __init__(self, network: nn.Module):
        self.network, self.rows = network, list[int]()

    def __enter__(self) -> list[int]:
        self.hook = self.network.register_forward_pre_hook(lambda module, args: self.rows.append(len(args[0])))
        return self.rows

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


@dataclass(frozen=True)
class FastDraws(Draws):
    """Keyed by (seed, step, update, tag) like Draws, with one generator for the batch instead of one per sample: toys draw a lot."""

    def each(self, tag: str) -> Noise:
        return _Rows((key(self.seed, self.step, self.update, tag),), True, self.device, len(self.indices))


@dataclass(frozen=True)
class _Rows(Noise):
    count: int = 1

    def _draw(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        raise TypeError("FastDraws makes whole batches")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seeds[0])

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.count, *shape, generator=self._generator()).to(dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(*x.shape[1:], dtype=x.dtype)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.count, generator=self._generator(), dtype=torch.float64)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.count,), generator=self._generator())


def ring(process: NoiseProcess | None = None, kind: str = "flow") -> MixtureTeacher:
    """Setting R: eight modes of std 0.1 on a circle of radius 1.4 (data std 1)."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return MixtureTeacher(process or Flow(), kind, f64([1 / 8] * 8), means, f64([0.1] * 8))


def four() -> MixtureTeacher:
    """Four labelled modes of std 0.3 on a circle of radius 1.5, class 0 on the first axis; label 4 is the null label."""
    means = 1.5 * f64([[1, 0], [0, 1], [-1, 0], [0, -1]])
    return MixtureTeacher(Flow(), "flow", f64([1 / 4] * 4), means, f64([0.3] * 4))


def pretrained(teacher: MixtureTeacher, width: int, steps: int, batch: int = 512, seed: int = 0, labels: bool = False) -> Denoiser:
    """An Mlp regressed on the teacher's velocity (Adam 1e-3), as a flow denoiser tapped at its last hidden layer.

    With `labels` it is told the nearest mode, one class each, or in a fifth of the samples the null label.
    """
    dim, classes = teacher.means[0].numel(), len(teacher.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Mlp(dim, width, classes + 1 if labels else 0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    for step in range(steps):
        generator = torch.Generator().manual_seed(key(seed, "pretrain", step))
        x0 = teacher.data(batch, generator).reshape(batch, dim).float()
        eps, t = torch.randn(batch, dim, generator=generator), torch.rand(batch, generator=generator, dtype=torch.float64)
        x_t = teacher.process.add_noise(x0, eps, t)
        cond: dict[str, Tensor] = {}
        if labels:
            told = torch.rand(batch, generator=generator) > 0.2
            cond["class_labels"] = torch.where(told, torch.cdist(x0.double(), teacher.means).argmin(1), classes)
        truth = teacher(x_t.reshape(batch, *teacher.means.shape[1:]), t, cond, w=1.0).to("flow").reshape(batch, dim)
        loss = (network(x_t, t.float(), **cond)[0] - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Denoiser(network.eval(), teacher.process, "flow", clock="t", taps=("trunk",))


class ToyRoles(Roles):
    """Roles whose teacher is exact; `start` is what it is to its copies."""

    start: nn.Module

    @torch.no_grad()
    def restart(self, name: str) -> None:
        self.module(name).load_state_dict(self.start.state_dict())


def toy_roles(needs: Mapping[str, Role], teacher: Denoiser, student: Denoiser, seed: int = 0, boundaries: Sequence[float] = (),
              judge: nn.Module | None = None) -> Roles:
    """The roles of a method whose teacher is exact and whose other networks are copies of `student`; `judge` looks at its pictures."""
    denoisers = {name: teacher if name == "teacher" else student.copy() if role.experts == 1 else student.divided(boundaries)
                 for name, role in needs.items() if role.source == "teacher"}
    heads = {}
    for name, role in needs.items():
        if role.source in ("head", "variance"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key(seed, name))
                x = torch.zeros(1, student.network.leave.out_features)
                read = teacher if role.of == "teacher" and teacher.taps else student
                heads[name] = role.of, (LogVariance() if role.source == "variance" else
                                        Discriminator(read(x, f64([0.5]), Conditioning(), tap=True).features))
    judges = {name: judge for name, role in needs.items() if role.source in ("judge", "features") and judge is not None}
    roles = ToyRoles(denoisers, heads, [name for name, role in needs.items() if role.trains], judges)
    roles.start = student.network
    return roles


def toy_data(streams: Mapping[str, Stream], draws: Draws, clean: Callable[[Noise], Tensor] | None = None) -> Batch:
    """Unconditional batches: nothing for a stream of conditions, `clean` of keyed noise for one of pictures."""
    made = {}
    for name, stream in streams.items():
        assert isinstance(stream, Conditions | Images)
        x0 = clean(draws.each(f"data/{name}")) if isinstance(stream, Images) and clean else None
        made[name] = Sample(Conditioning(), x0)
    return Batch(made)


def run_of(method: Method[Any], roles: Roles, draws: Callable[[int, int], Draws], data: Callable[[Draws], Batch]) -> Any:
    """What `run_update` reads of a Run, on one process and without accumulation."""
    return SimpleNamespace(recipe=SimpleNamespace(accumulate=1), roles=roles, method=method, batch=data,
                           teacher=SimpleNamespace(shape=method.setup.shape),
                           draws=lambda step, update, micro: draws(step, update),
                           accelerator=SimpleNamespace(backward=lambda loss: loss.backward(), reduce=lambda sums, how: sums))


def train(method: Method[Any], roles: Roles, optim: Mapping[str, OptimRecipe], steps: int, draws: Callable[[int, int], Draws],
          data: Callable[[Draws], Batch], watch: Callable[[int, Update], None] | None = None,
          lines: list[dict[str, float]] | None = None) -> dict[str, int]:
    """The loop of the library without recipe, folder and accelerator. Returns how often each role moved.

    `lines` takes what the log would hold, in 64 lines. Where they are not asked for, the run must be in good health: no gradient that is
    not finite, and no illness in a log that is long enough to show one.
    """
    seen: list[dict[str, float]] = [] if lines is None else lines
    run, every, means, unseen = run_of(method, roles, draws, data), max(1, steps // 64), Means(), set(roles.trains)
    stages, begins, skipped = [stage for stage in method.stages(steps) if stage.steps], 0, 0
    optimizers = Optimizers(roles, optim, {**dict.fromkeys(roles.trains, 0), **updates_of(method, steps)}, restarts_of(method, stages))
    for step in range(steps):
        if step == begins:
            stage = stages.pop(0)
            method.enter(stage, roles)
            for name in stage.resets:
                optimizers.reset(name)
            begins += stage.steps
        batches: list[Any] = []
        for index, update in enumerate(method.plan(step)):
            batches, logs = run_update(run, step, index, update, batches)
            norms, changed = optimizers.step(update.trains, unseen & set(update.trains))
            assert lines is not None or all(math.isfinite(n) for n in norms.values()), f"step {step}: gradient norms {norms}"
            method.after_update(roles, update, optimizers.counts[update.trains[0]])
            unseen -= set(update.trains)
            if watch:
                watch(step, update)
            if all(math.isfinite(n) for n in norms.values()):
                numbers = {**{f"grad/{n}": v for n, v in norms.items()}, **changed}
                means.add({**logs, **{name: Mean.of(number, torch.device("cpu")) for name, number in numbers.items()}})
            else:
                skipped += 1
        if (step + 1) % every == 0:
            rates = {f"lr/{name}": rate for name, rate in optimizers.rates().items()}
            seen.append({"step": step, **means.take(run), **rates, "skipped": skipped})
            unseen = set(roles.trains)
    if lines is None and len(seen) >= LEAST:
        assert record("", type(method).__name__, [finding.illness for finding in judge(case_of(seen))]) == []
    return optimizers.counts


def distil(method: Method[Any], teacher: MixtureTeacher, start: Denoiser, optim: dict[str, OptimRecipe], steps: int, batch: int,
           seed: int = 0, lines: list[dict[str, float]] | None = None, judge: nn.Module | None = None) -> Roles:
    """Train every role from `start` against the exact teacher, in good health where `lines` are not asked for."""
    needs, streams, dim = method.needs(method.cfg), method.data(method.cfg), teacher.means[0].numel()
    roles = toy_roles(needs, Oracle(teacher).denoiser(), start, seed, method.sampler().boundaries, judge)

    def clean(noise: Noise) -> Tensor:
        return teacher.data(batch, torch.Generator().manual_seed(noise.seeds[0])).reshape(batch, dim).float()

    train(method, roles, {name: optim[name] for name in roles.trains}, steps,
          lambda step, update: FastDraws(seed, range(batch), step, update), lambda draws: toy_data(streams, draws, clean), lines=lines)
    return roles


def draw_student(student: Denoiser, method: Method[Any], count: int, shape: tuple[int, ...], seed: int = 77) -> Tensor:
    """Samples of a trained student through its own sampler."""
    student.network.eval()
    return sample(replace(student, wrapped=None), method.sampler(), Conditioning(), FastDraws(seed, range(count)), shape)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two equally large clouds (N, D): root mean over directions of the squared 1-D distance."""
    a, b = (x.double().flatten(1) for x in (a, b))
    w = torch.randn(directions, a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    gap = (a @ w.T).sort(dim=0).values - (b @ w.T).sort(dim=0).values
    return float(gap.square().mean().sqrt())


def modes_covered(x: Tensor, teacher: MixtureTeacher) -> tuple[int, float]:
    """(modes with above 20 % of their weight within 4 std, share of samples within 4 std of any mode)."""
    distance = torch.cdist(x.double(), teacher.means)
    nearest = distance.min(dim=1)
    inside = nearest.values < 4 * teacher.stds[nearest.indices]
    share = torch.stack([((nearest.indices == k) & inside).double().mean() for k in range(len(teacher.weights))])
    return int((share > 0.2 * teacher.weights).sum()), float(inside.double().mean())


def tiny_unet(channels: int = 1, size: int = 8, classes: int = 4, width: int = 8, seed: int = 0, **options: Any) -> UNet2DModel:
    """A class-conditional U-Net of diffusers with a few thousand weights; its middle block sees size/2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**{
            "sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1, "norm_num_groups": 4,
            "block_out_channels": (width, 2 * width), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": classes, **options}).eval()


def tiny_dit(blocks: int = 3, seed: int = 0) -> DiTTransformer2DModel:
    """DiT with a learned variance: twice as many channels out as in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=blocks,
                                    sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1) if p.ndim > 1 else nn.init.normal_(p, std=0.02)
    return net.eval()
