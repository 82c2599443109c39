"""A page in the browser: a student beside its teacher, on the same noise, for one prompt or class and so many steps each.

Needs gradio, the extra `demo`. The page is served to this machine alone.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stepdistill import recipe as recipes
from stepdistill import worlds
from stepdistill.diffusion.sampler import SamplerSpec
from stepdistill.diffusion.times import trailing
from stepdistill.eval.generate import generate
from stepdistill.eval.models import Opened, is_teacher, open_model
from stepdistill.images import grid
from stepdistill.models.load import is_prompted
from stepdistill.models.prompted import PromptTeacher
from stepdistill.recipe import Recipe
from stepdistill.training.loop import RECIPE

PICTURES, COLUMNS, SIDE = 4, 2, 400                      # of one model; pixels of their square, at least, where they are enlarged
COUNTS = (1, 2, 4, 8)                                    # of steps, beside a model's own
LARGEST_SEED = 2**31 - 1
STEPS = 25                                               # of a teacher that says nothing of its own
EXAMPLE = "red apple"


def open_pair(model: str, teacher: str | None = None, device: torch.device | str = "cpu") -> tuple[Opened, ...]:
    """A model, and behind it the teacher that is named, or else the one that it was distilled from, where that is on this machine.

    Raises ValueError or FileNotFoundError where one cannot be opened, or one takes prompts and the other classes.
    """
    first = _opened(model, device)
    path = first.teacher.folder / RECIPE
    recipe = recipes.load(path) if path.is_file() else None
    name = teacher or (recipe.teacher.path if recipe else "")
    if not teacher and not (recipe and recipe.teacher.folder.is_dir()):
        return (first,)
    second = _opened(name, device, recipe)
    if isinstance(second.teacher, PromptTeacher) != isinstance(first.teacher, PromptTeacher):
        raise ValueError(f"{model} and {name} cannot be asked for the same: one takes prompts, the other classes; name another --teacher")
    return first, second


def _opened(name: str, device: torch.device | str, recipe: Recipe | None = None) -> Opened:
    """A model in its own sampler; a pipeline that says nothing of one in STEPS, called and guided as the recipe of its student says."""
    shipped = worlds.teacher_folder(name)
    folder = shipped or Path(name).expanduser()
    prompts = ("",) if is_prompted(folder) else ()
    if shipped or name.startswith("teacher:") or not is_teacher(folder):
        return open_model(name, device=device, prompts=prompts)
    return open_model(name, STEPS, recipe.guidance if recipe else 1.0, device=device, prompts=prompts,
                      call=recipe.teacher.call if recipe else None)


def sampler(model: Opened, steps: int) -> SamplerSpec:
    """How a model is run in so many steps; ValueError where it cannot be."""
    if model.is_teacher and steps != model.trained:
        return replace(model.spec, times=trailing(steps))
    return model.spec.at(steps)


def counts(model: Opened) -> list[int]:
    """The numbers of steps that the page offers: its own, and of COUNTS what it can be run in."""
    def runs(steps: int) -> bool:
        try:
            sampler(model, steps)
        except ValueError:
            return False
        return True

    return [steps for steps in sorted({*COUNTS, model.trained}) if runs(steps)]


def pictures(model: Opened, asked: str, seed: int | None, steps: int) -> tuple[Image.Image, float]:
    """PICTURES samples of a prompt or a class as one square, and milliseconds for each, encoding and decoding counted.

    Sample i has the noise of (seed, i): models with states of one shape start alike. Raises ValueError where this cannot be made.
    """
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"a seed is a whole number from 0 to {LARGEST_SEED}, got {'none' if seed is None else seed}")
    taught, spec = model.teacher, sampler(model, steps)
    if isinstance(taught, PromptTeacher):
        if not asked.strip():
            raise ValueError("there is no prompt: write what the picture should show")
        taught, label = replace(taught, prompts=(asked.strip(),), bank=None), 0
    else:
        label = model.class_number(asked) if taught.classes else 0
    made = generate(taught, spec, PICTURES, seed, batch_size=PICTURES, label=lambda i: label, quiet=True)
    return grid(made.images, COLUMNS, max(1, SIDE // COLUMNS // made.images.shape[-1])), made.ms_per_image


def page(models: Sequence[Opened]) -> Any:
    """A gradio.Blocks of one or two models. ValueError where gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'stepdistill[demo]'")
    import gradio

    def draw(asked: str, seed: int | None, *steps: int) -> Iterator[list[Any]]:
        shown: list[Any] = [gradio.skip()] * (2 * len(models))
        try:
            for i, (model, count) in enumerate(zip(models, steps, strict=True)):
                image, milliseconds = pictures(model, asked, seed, count)
                shown[2 * i : 2 * i + 2] = image, f"network evaluations: {sampler(model, count).nfe}; {milliseconds:.0f} ms a picture"
                yield shown
        except ValueError as error:
            gradio.Warning(str(error), title="Not drawn")
            yield shown

    first, steps, shown = models[0].teacher, [], []
    with gradio.Blocks(title="stepdistill", analytics_enabled=False) as blocks:
        with gradio.Row():
            if isinstance(first, PromptTeacher):
                asked = gradio.Textbox(EXAMPLE, label="Prompt", scale=3)
            else:
                asked = gradio.Dropdown(list(first.labels), value=next(iter(first.labels), None), label="Class", scale=3,
                                        visible=bool(first.classes))
            seed = gradio.Number(0, label="Seed", precision=0)
            button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            for model in models:
                title = f"{'teacher' if model.is_teacher else 'student'} {Path(model.name).name}"
                with gradio.Column():
                    steps.append(gradio.Radio(counts(model), value=model.trained, label=f"Steps of the {title}"))
                    shown.append(gradio.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"],
                                              alt_text=f"{PICTURES} pictures of the {title}"))
                    shown.append(gradio.Markdown())
        triggers = [button.click, asked.submit] if isinstance(first, PromptTeacher) else [button.click]
        gradio.on(triggers, draw, [asked, seed, *steps], shown)
    return blocks


def serve(models: Sequence[Opened], port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `ready` is told its address. ValueError where the port is taken."""
    blocks = page(models)
    try:
        _, address, _ = blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, footer_links=[],
                                      share=False, ssr_mode=False)
    except OSError as error:
        raise ValueError(f"port {port} cannot be used ({error.strerror or 'it is taken'}): name another with --port") from error
    try:
        ready(address)
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
