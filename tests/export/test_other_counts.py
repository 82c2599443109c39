"""A student told an earlier time than 1 and run with more steps than it was trained for: pipeline and sampler mean the same."""

import torch
from diffusers import DiffusionPipeline
from tiny import tiny_recipe

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.sampler import start, steps
from stepdistill.export import export, load_student
from stepdistill.training import loop


def test_two_steps_of_a_one_step_student_from_half_way(tmp_path):
    loop.start(tiny_recipe(tmp_path, method__gan_weight=0, steps=2, student={"steps": 1, "times": [0.5]}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "student")
    model, spec = load_student(tmp_path / "student")
    assert spec.times == (0.5,)
    noise = [torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    spec = spec.at(2)
    walk = steps(model.denoiser, start(model.denoiser.process, spec, noise[0]), spec, model.condition(torch.arange(3)), Draws(0, range(3)),
                 noise=lambda i: noise[i + 1])
    ours = [step.x0 for step in walk][-1]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    theirs = pipe([0, 1, 2], num_inference_steps=2, noise=noise, output_type="latent").images
    assert (theirs - ours).norm() < 1e-4 * ours.norm()
    assert (pipe([0, 1, 2], noise=noise[:1], output_type="latent").images - ours).norm() > 1e-2 * ours.norm()
