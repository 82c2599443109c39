"""Every method's students in Stable Diffusion and in SD3: which scheduler they get, and that it walks as our sampler does.

`docs/schedulers.md` is what is expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from export.test_told import Case, opened, ours, trained
from test_prompt_export import PROMPTS, Taught, distance, notes

from stepdistill.diffusion.process import NoiseProcess
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.export import export
from stepdistill.methods import METHODS
from stepdistill.methods.base import Setup
from stepdistill.recipe import build

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
COUNTS = (1, 2, 3, 4)
OPTIONS: Mapping[str, Callable[[int], dict[str, object]]] = {
    "progressive": lambda count: {"start": 4 * count}, "phased_dmd": lambda count: {"experts": False},
    "guided": lambda count: {"guidance": {"low": 1.0, "high": 8.0}}}
SHORT = {"LCMScheduler": "LCM", "TCDScheduler": "TCD", "DDIMScheduler": "DDIM", "FlowMatchEulerDiscreteScheduler": "Euler",
         "FewStepScheduler": "file"}


def sampler(name: str, process: NoiseProcess, count: int) -> SamplerSpec | None:
    """Of a student asked for in so many equal steps; None where the method trains no such student."""
    cls = METHODS[name]
    try:
        config = build(cls.Config, OPTIONS.get(name, lambda count: {})(count), "method")
        return cls(config, Setup(process, (4, 8, 8), SamplerSpec(trailing(count)), guidance=3.0)).sampler()
    except ValueError:
        return None


class Exports:
    """Students of one teacher, exported once for each sampler."""

    def __init__(self, family: str, root: Path):
        self.taught, self.root = Taught(family, root / "teacher"), root
        self.walk = functools.cache(self._walk)

    def _walk(self, spec: SamplerSpec) -> str:
        """The scheduler's short name, of a pipeline that ends where we do; or that such a student is refused."""
        out = self.root / f"{len(list(self.root.iterdir()))}"
        told = spec.inputs == ("w",) and self.taught.component == "unet"         # Stable Diffusion tells w
        run, student = (trained(Case("sd", spec), self.taught.folder, out / "run") if told
                        else (self.taught.run(out / "run", spec), self.taught.student))
        if spec.inputs and not told:
            with pytest.raises(ValueError, match="cannot tell its network"):
                export(run, out / "to")
            return "refused"
        export(run, out / "to")
        model = opened(self.taught.folder, True) if told else self.taught.model
        noise = [torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)),
                 *torch.randn(len(spec.times), 2, *model.shape, generator=torch.Generator().manual_seed(1))]
        expected = ours(student, spec, model.condition(torch.arange(2)), noise)
        pipe = DiffusionPipeline.from_pretrained(out / "to", trust_remote_code=True, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)                                                 # SD3 hands its generator to no step
            found = pipe(prompt=list(PROMPTS), latents=noise[0], output_type="latent", generator=torch.Generator().manual_seed(1),
                         **notes(out / "to")["call"])[0]
        assert distance(found, expected) < 1e-4, spec
        assert distance(found, noise[0]) > 1e-2
        return SHORT[type(pipe.scheduler).__name__]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Exports]:
    return {name: Exports(name, tmp_path_factory.mktemp(name)) for name in ("sd", "sd3")}


def said(spec: SamplerSpec) -> str:
    """How a sampler goes on after a call."""
    way = {0.0: "follows the ODE", 1.0: "re-noises x0"}.get(spec.renoise, f"re-noises a share of {spec.renoise:g}")
    known = ", the first step's noise known" if spec.known_noise else ""
    return way + known + "".join(f", told {name}" for name in spec.inputs)


def cell(walked: Mapping[int, str]) -> str:
    """LCM 1 2 4, file 3."""
    return ", ".join(f"{name} {' '.join(str(count) for count, found in walked.items() if found == name)}"
                     for name in dict.fromkeys(walked.values()))


@pytest.mark.parametrize("name", METHODS)
def test_a_students_scheduler_walks_as_our_sampler_does(name: str, families: Mapping[str, Exports]) -> None:
    cells = []
    for family in families.values():
        specs = {count: spec for count in COUNTS if (spec := sampler(name, family.taught.student.process, count))}
        assert specs
        cells.append(cell({count: family.walk(spec) for count, spec in specs.items()}))
    ways = {said(spec) for spec in specs.values()}
    assert len(ways) == 1
    assert f"| `{name}` | {ways.pop()} | {' | '.join(cells)} |" in PAGE.read_text().splitlines()
