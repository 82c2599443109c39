"""Folders to teachers: pipelines, bare networks, codecs, and one clear line for everything that can be wrong with them."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from oracles import f64
from safetensors.torch import load_file, save_file
from toys import tiny_dit, tiny_unet

from stepdistill.diffusion.process import Flow, TableVP
from stepdistill.models.load import SpaceToDepth, Vae, load_teacher, process_of
from stepdistill.models.roles import Role, Roles

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def bare(tmp_path):
    """A bare network beside its scheduler, with notes."""
    tiny_unet().save_pretrained(tmp_path)
    DDPMScheduler(beta_schedule="scaled_linear").save_config(tmp_path)
    (tmp_path / "stepdistill.json").write_text(json.dumps({"null_class": 3, "labels": ["a", "b", "c"]}))
    return tmp_path


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bare_network(bare):
    teacher = load_teacher(bare, guidance=2.0)
    assert teacher.shape == (1, 8, 8)
    assert (teacher.classes, teacher.null_class, teacher.labels) == (3, 3, ("a", "b", "c"))
    net = teacher.denoiser
    assert (net.kind, net.clock, net.guidance, net.taps, net.channels) == ("eps", "index", 2.0, ("mid_block",), None)
    assert isinstance(net.process, TableVP)
    assert not net.network.training
    assert not any(p.requires_grad for p in net.network.parameters())
    cond = teacher.condition(torch.tensor([0, 2]))
    assert cond.null["class_labels"].tolist() == [3, 3]
    assert net(torch.randn(2, 1, 8, 8), f64([0.2, 0.9]), cond).x0.shape == (2, 1, 8, 8)
    states = torch.tensor([-2.0, 0.0, 0.5, 1.0]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert teacher.pictures(states)[:, 0, 0, 0].tolist() == [0, 128, 191, 255]
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 0\.\.3"):
        teacher.condition(torch.tensor([0, 3]))


def test_unconditional_network(tmp_path):
    tiny_unet(classes=0, num_class_embeds=None).save_pretrained(tmp_path)
    DDPMScheduler().save_config(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.classes == 0
    assert teacher.null_class is None
    assert len(teacher.condition(torch.zeros(2, dtype=torch.long))) == 0
    assert teacher.denoiser(torch.randn(2, 1, 8, 8), f64(0.5), teacher.condition(torch.zeros(2))).x0.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="null_class"):
        load_teacher(tmp_path, guidance=2.0)


def test_weights_are_those_of_the_file(bare):
    stored, loaded = load_file(bare / WEIGHTS), load_teacher(bare).denoiser.network.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[k], loaded[k]) for k in stored)


def test_half_precision_file_gives_float32(bare):
    tiny_unet().to(torch.float16).save_pretrained(bare, variant="fp16")
    (bare / WEIGHTS).unlink()
    assert load_teacher(bare).denoiser.dtype == torch.float32


def test_teacher_stored_in_bfloat16_trains_float32_copies(bare):
    teacher = load_teacher(bare, dtype=torch.bfloat16, autocast=torch.bfloat16)
    needs = {"teacher": Role(), "student": Role(trains=True), "target": Role(), "disc": Role(source="head", of="teacher", trains=True)}
    m = Roles.build(needs, teacher.denoiser, teacher.example)
    assert m.teacher.dtype == torch.bfloat16
    assert m.student.dtype == m.target.dtype == torch.float32
    assert next(m.disc.parameters()).dtype == torch.float32
    cond = teacher.condition(torch.tensor([1]))
    assert m.teacher(torch.randn(1, 1, 8, 8), f64(0.5), cond, w=1.0).x0.dtype == torch.float32


def test_pipeline_folder_with_a_vae(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        scaling_factor=0.5, shift_factor=0.1, sample_size=16).eval()
    tiny_unet(channels=4).save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    teacher = load_teacher(tmp_path)
    assert teacher.denoiser.kind == "v"
    assert teacher.shape == (4, 8, 8)
    assert isinstance(teacher.codec, Vae)
    assert teacher.codec.to_dict() == {"vae": True}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = teacher.codec.encode(images)
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(latents, (mode - 0.1) * 0.5)
        torch.testing.assert_close(teacher.codec.decode(latents), vae.decode(mode).sample, rtol=1e-4, atol=1e-5)
    pictures = teacher.pictures(latents)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.dtype == torch.uint8


def test_dit_folder(tmp_path):
    tiny_dit().save_pretrained(tmp_path / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    teacher = load_teacher(tmp_path, guidance=1.5)
    assert teacher.shape == (2, 8, 8)
    assert (teacher.classes, teacher.null_class) == (5, 5)                                          # one more row for the dropped label
    assert teacher.denoiser.channels == 2                                                           # the learned variance is left out
    assert teacher.denoiser.taps == ("transformer_blocks.1",)
    cond = teacher.condition(torch.tensor([0, 4]))
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    first = teacher.denoiser(x, f64(0.5), cond)
    assert first.x0.shape == (2, 2, 8, 8)
    teacher.denoiser.network.train()                                                                # a student trains in this mode
    for _ in range(5):
        torch.testing.assert_close(teacher.denoiser(x, f64(0.5), cond).raw, first.raw, rtol=0, atol=0)


def test_space_to_depth():
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.float32).reshape(2, 1, 4, 4)
    codec = SpaceToDepth(2)
    states = codec.encode(images)
    assert states.shape == (2, 4, 2, 2)
    assert states[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(codec.decode(states), images)
    assert torch.equal(SpaceToDepth().encode(images), images)
    assert codec.to_dict() == {"space_to_depth": 2}


def test_shipped_world_by_name():
    assert load_teacher("fashion").folder == load_teacher("teacher:fashion").folder


@pytest.mark.parametrize(("scheduler", "kind", "clock"), [
    (DDPMScheduler(prediction_type="epsilon"), "eps", "index"),
    (DDPMScheduler(prediction_type="sample"), "x0", "index"),
    (EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"), "v", "index"),
    (DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v", "index"),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", "1000sigma")])
def test_processes_of_schedulers(scheduler, kind, clock):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    process, got_kind, got_clock = process_of(config)
    assert (got_kind, got_clock) == (kind, clock)
    if kind == "flow":
        assert isinstance(process, Flow)
        assert process.shift == 3.0
    else:
        table = DDPMScheduler.from_config(dict(config)).alphas_cumprod.double()
        torch.testing.assert_close(process.alpha(torch.arange(1, 1001).double() / 1000).square(), table, rtol=1e-6, atol=1e-7)


def test_schedulers_that_cannot_be_read():
    for config in ({"_class_name": "EDMEulerScheduler", **EDMEulerScheduler().config}, {}, {"_class_name": "NoSuchScheduler"},
                   {**DDPMScheduler().config, "_class_name": "DDPMScheduler", "prediction_type": "score"}):
        with pytest.raises(ValueError, match="neither a DDPM table nor"):
            process_of(config)
    zero = DDPMScheduler(rescale_betas_zero_snr=True).config
    with pytest.raises(ValueError, match="v_prediction"):
        process_of({**zero, "_class_name": "DDPMScheduler"})


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a diffusers folder or the name of a shipped world"):
        load_teacher(tmp_path / "nothing")


def test_no_network(bare):
    (bare / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_teacher(bare)


def test_no_scheduler(bare):
    (bare / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json, so its noise process is unknown"):
        load_teacher(bare)


def test_only_pickled_weights(bare):
    torch.save({}, bare / "diffusion_pytorch_model.bin")
    (bare / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        load_teacher(bare)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "stepdistill.json"])
def test_damaged_json(bare, name):
    for text in ('{"_class_name": "UNet', "[1, 2]"):
        (bare / name).write_text(text)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_teacher(bare)


def test_unknown_network(bare):
    edit(bare / "config.json", _class_name="UNet3DConditionModel")
    with pytest.raises(ValueError, match="'UNet3DConditionModel'; this version distils UNet2DModel, DiTTransformer2DModel"):
        load_teacher(bare)


def test_truncated_weights(bare):
    data = (bare / WEIGHTS).read_bytes()
    (bare / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_teacher(bare)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["shape", "missing", "extra"])
def test_weights_that_do_not_fit(bare, damage):
    """Strict: a partial load is never silent."""
    weights = load_file(bare / WEIGHTS)
    if damage == "shape":
        weights["conv_out.bias"] = torch.zeros(3)
    elif damage == "missing":
        del weights["conv_out.bias"]
    else:
        weights["conv_out.more"] = torch.zeros(3)
    save_file(weights, bare / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_out\.(bias|more)") as error:
        load_teacher(bare)
    assert "\n" not in str(error.value)


def test_missing_sample_size(bare):
    edit(bare / "config.json", sample_size=None)
    with pytest.raises(ValueError, match="no sample_size"):
        load_teacher(bare)


def test_unknown_tap(bare):
    assert load_teacher(bare, taps=("up_blocks.0",)).denoiser.taps == ("up_blocks.0",)
    with pytest.raises(ValueError, match=r"'up_blocks\.9', which is no module of this UNet2DModel"):
        load_teacher(bare, taps=("mid_block", "up_blocks.9"))


def test_damaged_vae(bare):
    shutil.copytree(bare, bare / "vae")
    with pytest.raises(ValueError, match="vae holds a UNet2DModel"):
        load_teacher(bare)
    edit(bare / "vae" / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="vae"):
        load_teacher(bare)
    (bare / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="vae holds no VAE"):
        load_teacher(bare)
