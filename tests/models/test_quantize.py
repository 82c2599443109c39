"""A quantised frozen base: what is refused, what is packed, and that gradients, checkpoints and exports are those of an adapter on it.

torchao runs on a CPU. diffusers quantises with bitsandbytes on a GPU only, so of that library the layers alone are tried here.
"""

from importlib import metadata

import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from safetensors.torch import load_file, save_file
from tiny import final_tensors, tiny_recipe
from torch import nn
from zoo import basics

from stepdistill import recipe as recipes
from stepdistill.data.cache import Cache, Wanted
from stepdistill.diffusion.process import TableVP
from stepdistill.export import export
from stepdistill.models import load
from stepdistill.models.adapters import LoraRecipe, adapted, adapter_parameters, inject, merged, target_names
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.kept import Learnt
from stepdistill.models.load import load_pipeline, load_teacher
from stepdistill.models.prompted import open_pipeline
from stepdistill.models.quantize import QuantizeRecipe, config_of, held
from stepdistill.models.roles import Role, Roles
from stepdistill.training import loop
from stepdistill.training.assemble import assemble
from stepdistill.training.measure import bytes_of

CALL = {"height": 16, "width": 16}
INT8 = QuantizeRecipe("torchao")
LORA = {"student": LoraRecipe(4, alpha=8.0), "fake": LoraRecipe(2)}
NEEDS = {"teacher": Role(), "student": Role(trains=True), "fake": Role(trains=True)}


def linears(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    pipeline = basics.stable_diffusion()
    pipeline.save_pretrained(folder / "teacher")
    layers = [name for name in linears(pipeline.unet) if name.endswith(("to_q", "to_v"))]
    generator = torch.Generator().manual_seed(0)
    save_file({f"unet.{name}.{part}.weight": 0.3 * torch.randn(shape, generator=generator) for name in layers
               for part, shape in (("lora_A", (2, linears(pipeline.unet)[name].in_features)),
                                   ("lora_B", (linears(pipeline.unet)[name].out_features, 2)))}, folder / "style.safetensors")
    (folder / "prompts.txt").write_text("a red apple\nsnow\n")
    return folder


def tree(world, **changes):
    return {"teacher": {"path": str(world / "teacher"), "call": CALL, "quantize": {"backend": "torchao"}},
            "student": {"steps": 2}, "method": {"name": "dmd2", "fake_updates": 1, "gan_weight": 0},
            "lora": {"student": {"rank": 4, "alpha": 8.0}, "fake": {"rank": 2}}, "gradient_checkpointing": True,
            "optim": {"student": {"lr": 1e-2}, "fake": {"lr": 1e-3}}, "data": {"prompts": str(world / "prompts.txt")},
            "guidance": 3.0, "steps": 2, "batch_size": 2, "precision": "bf16", "ema_decay": 0.9, "preview_count": 1, "trackers": [],
            **changes}


class TestRefused:
    @pytest.fixture
    def installed(self, monkeypatch):
        monkeypatch.setattr(metadata, "version", lambda name: "1.0")

    @pytest.mark.parametrize(("lora", "name"), [({}, "student"), ({"student": {"rank": 2}}, "fake")])
    def test_a_full_copy(self, world, lora, name):
        with pytest.raises(ValueError, match=rf"{name} would be a full copy.*lora\.{name}\.rank"):
            recipes.parse(tree(world, lora=lora))

    @pytest.mark.parametrize(("backend", "package"), [("bitsandbytes_4bit", "bitsandbytes"), ("torchao", "torchao")])
    def test_a_missing_library(self, monkeypatch, backend, package):
        def version(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(ValueError, match=f"pip install {package}$"):
            config_of(QuantizeRecipe(backend), "cuda")

    @pytest.mark.usefixtures("installed")
    def test_a_cpu(self):
        with pytest.raises(ValueError, match="on a GPU only and this run is on a CPU: take torchao"):
            config_of(QuantizeRecipe("bitsandbytes_8bit"), "cpu")

    @pytest.mark.usefixtures("installed")
    def test_an_option_that_is_none(self):
        with pytest.raises(ValueError, match="did you mean 'bnb_4bit_quant_type'"):
            config_of(QuantizeRecipe("bitsandbytes_4bit", {"bnb_4bit_quant_typ": "nf4"}), "cuda")

    def test_a_network_without_prompts(self, tmp_path):
        path = tiny_recipe(tmp_path).teacher.path
        with pytest.raises(ValueError, match="is for pipelines with prompts"):
            load_teacher(path, quantize=INT8)

    def test_an_unknown_backend(self, world):
        with pytest.raises(ValueError, match="backend"):
            recipes.parse(tree(world, teacher={"path": str(world / "teacher"), "quantize": {"backend": "torch_ao"}}))

    @pytest.mark.parametrize(("options", "words"), [
        ({"quant_type": "Int8WeightOnly"}, "did you mean 'Int8WeightOnlyConfig'"), ({"groupsize": 8}, "did you mean 'group_size'"),
        ({"quant_type": ["Int8WeightOnlyConfig"]}, "it knows no")])
    def test_options_of_torchao(self, options, words):
        pytest.importorskip("torchao")
        with pytest.raises(ValueError, match=words) as caught:
            config_of(QuantizeRecipe("torchao", options), "cpu")
        assert "\n" not in str(caught.value)


def test_a_recipe_survives_its_file(world):
    given = tree(world)
    given["teacher"]["quantize"] = {"backend": "bitsandbytes_4bit", "options": {"bnb_4bit_quant_type": "nf4"}}
    recipe = recipes.parse(given)
    (world / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(world / "again.yaml") == recipe
    assert recipe.teacher.quantize == QuantizeRecipe("bitsandbytes_4bit", {"bnb_4bit_quant_type": "nf4"})


def test_packed_weights_and_adapters_do_not_say_what_the_weights_are_stored_in():
    network = nn.ModuleDict({"block": nn.Linear(4, 4, bias=False), "norm": nn.LayerNorm(4)}).to(torch.bfloat16)
    inject(network, "student", LoraRecipe(2, targets=("block",)), 0)
    network["block"].base_layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert [p.dtype for p in network.parameters()][:2] == [torch.uint8, torch.float32]
    assert Denoiser(network, TableVP.scaled_linear(), "eps").dtype == torch.bfloat16


# ---- torchao

@pytest.fixture(scope="module")
def teacher(world):
    pytest.importorskip("torchao")
    return load_teacher(world / "teacher", prompts=("a red apple", "snow"), call=CALL, quantize=INT8)


def test_only_the_network_is_packed(teacher):
    pipeline, network = teacher.recording.driven.pipeline, teacher.denoiser.network
    assert linears(network)
    assert {type(module.weight).__name__ for module in linears(network).values()} == {"Int8Tensor"}
    assert {type(module.weight) for module in linears(pipeline.text_encoder).values()} == {nn.Parameter}
    assert teacher.denoiser.dtype == torch.float32
    wide, packed = sum(p.nbytes for p in network.parameters()), sum(held(p)[1] for p in network.parameters())
    weights = sum(module.weight.numel() for module in linears(network).values())
    assert sum(held(p)[0] for p in network.parameters()) == sum(p.numel() for p in network.parameters())
    assert wide - packed == pytest.approx(3 * weights, rel=0.2)                       # the rest: scales of rows that are short here


def test_gradients_are_those_of_adapters_on_the_unpacked_base(world, teacher):
    """The oracle: the same adapters on the plain network, its weights being the packed ones unpacked."""
    plain = load_pipeline(world / "teacher").unet
    for name, module in linears(plain).items():
        module.weight.data = linears(teacher.denoiser.network)[name].weight.dequantize()
    grads, text = [], torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    for network in (load_pipeline(world / "teacher", quantize=INT8).unet, plain):
        network.requires_grad_(False)
        inject(network, "student", LoraRecipe(4), 0)
        assert len(adapter_parameters(network, "student")) == 2 * len(target_names(network, ()))
        for i, parameter in enumerate(adapter_parameters(network, "student").values()):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.requires_grad_(True)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        with adapted(network, "student"):
            network(x, torch.tensor([10, 900]), text, return_dict=False)[0].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in adapter_parameters(network, "student").values())])
    for packed, full in zip(*grads, strict=True):
        torch.testing.assert_close(packed, full, rtol=1e-3, atol=1e-4 * float(full.abs().max()))


def test_roles_share_the_packed_base(teacher, world):
    own = load_teacher(world / "teacher", prompts=("snow",), call=CALL, quantize=INT8)
    m = Roles.build(NEEDS, own.denoiser, own.example, 0, LORA)
    x, t, cond = torch.randn(2, *own.shape), torch.tensor([0.3, 0.8], dtype=torch.float64), own.condition(torch.tensor([0, 0]))
    expected = m.teacher(x, t, cond).raw
    m.train_only(("student",))
    x0 = m.student(x, t, cond).x0
    (m.fake(x0, t, cond).x0 - m.teacher(x0, t, cond).x0).square().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in m.parameters("student"))
    assert all(p.grad is None for p in m.parameters("fake"))
    for parameter in m.parameters("student"):
        parameter.data = torch.ones_like(parameter)
    assert torch.equal(m.teacher(x, t, cond).raw, expected)
    assert not torch.allclose(m.student(x, t, cond).raw, expected)


def test_the_recording_of_a_packed_network_is_that_of_the_plain_one(teacher, world):
    plain, _ = open_pipeline(world / "teacher", CALL, device="cpu", dtype=torch.float32)
    assert Learnt.of(teacher.recording, None).plain == Learnt.of(plain, None).plain


def test_the_users_lora_is_merged_before_the_network_is_packed(world):
    pytest.importorskip("torchao")
    loras = {str(world / "style.safetensors"): 1.0}
    exact = load_pipeline(world / "teacher", loras=loras).unet
    plain = load_pipeline(world / "teacher").unet
    packed = load_pipeline(world / "teacher", dtype=torch.bfloat16, loras=loras, quantize=INT8).unet
    assert packed.conv_in.weight.dtype == torch.bfloat16
    for name, module in linears(packed).items():
        wide, step = linears(exact)[name].weight, linears(exact)[name].weight.abs().amax(1, keepdim=True) / 127
        assert type(module.weight).__name__ == "Int8Tensor"
        assert bool(((module.weight.dequantize().float() - wide).abs() < 3 * step).all())     # half a step, and roundings to bf16
    changed = [name for name, module in linears(plain).items() if not torch.equal(module.weight, linears(exact)[name].weight)]
    assert {name.split(".")[-1] for name in changed} == {"to_q", "to_v"}


@pytest.fixture(scope="module")
def trained(world):
    pytest.importorskip("torchao")
    assert loop.start(recipes.parse(tree(world)), world / "run").finished
    return world / "run"


def test_a_checkpoint_holds_adapters_and_no_base(trained):
    tensors = final_tensors(trained)
    roles = {key for key in tensors if key.startswith(("role/", "ema/"))}
    assert roles
    assert all(key.endswith(("/lora_A", "/lora_B")) for key in roles)
    assert all(tensors[key].dtype == torch.float32 for key in roles)
    assert any(bool(tensors[key].any()) for key in roles if key.startswith("role/student/") and key.endswith("/lora_B"))


def test_the_export_is_the_unquantised_teacher_with_the_adapter(trained, world):
    export(trained, world / "student")
    tensors = final_tensors(trained)
    expected = merged(load_pipeline(world / "teacher").unet, {k.removeprefix("ema/"): v for k, v in tensors.items()
                                                              if k.startswith("ema/")}, LORA["student"]).state_dict()
    written = load_file(world / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in written.items())
    assert "trained on a base quantised with `torchao`" in (world / "student" / "README.md").read_text()


def test_bytes_are_those_of_the_packed_weights(world):
    pytest.importorskip("torchao")
    runs = {}
    for quantize in ({"backend": "torchao"}, None):
        chosen = recipes.parse(tree(world, teacher={"path": str(world / "teacher"), "call": CALL, "quantize": quantize}))
        runs[quantize is None] = bytes_of(assemble(chosen, loop.make_accelerator(chosen, None)))
    assert runs[False]["teacher"]["weights"] < 0.8 * runs[True]["teacher"]["weights"]
    assert runs[False]["teacher"]["parameters"] == runs[True]["teacher"]["parameters"]
    assert runs[False]["student"] == runs[True]["student"]


def test_a_cache_serves_packed_and_plain_networks_alike(world, tmp_path):
    pytest.importorskip("torchao")
    texts = ("a red apple", "snow")
    packed = Cache(tmp_path / "cache", Wanted(world / "teacher", CALL, torch.float32, 3.0, texts, quantize=INT8))
    assert packed.fill("cpu").encoded == 2
    plain = Cache(tmp_path / "cache", Wanted(world / "teacher", CALL, torch.float32, 3.0, texts))
    assert plain.fill("cpu").encoded == 0
    recording, inputs = open_pipeline(world / "teacher", CALL, device="cpu", dtype=torch.float32)
    single = recording.encode(inputs(["snow"]), 1, 3.0)
    row = plain.kept().bank.slice(torch.tensor([1]))
    assert all(torch.equal(row[name], single[name]) for name in single)
    restored = load_teacher(world / "teacher", prompts=texts, call=CALL, kept=packed.kept(), quantize=INT8)
    assert {type(module.weight).__name__ for module in linears(restored.denoiser.network).values()} == {"Int8Tensor"}


# ---- bitsandbytes

@pytest.mark.parametrize("backend", ["bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_a_run_on_bitsandbytes(world, tmp_path, monkeypatch, backend):
    """Its kernels have a slow version for CPUs; what asks for a GPU, here and in diffusers, is told that there is one."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)                 # a layout of its weights for rows of 64 and more
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(load, "config_of", lambda recipe, device: config_of(recipe, "cuda"))
    given = tree(world)
    given["teacher"]["quantize"] = {"backend": backend}
    assert loop.start(recipes.parse(given), tmp_path / "run").finished
    adapters = {key: value for key, value in final_tensors(tmp_path / "run").items() if key.startswith("role/")}
    assert all(key.endswith(("/lora_A", "/lora_B")) and value.dtype == torch.float32 for key, value in adapters.items())
    assert all(bool(value.any()) for key, value in adapters.items() if key.startswith("role/student/"))


def test_layers_of_bitsandbytes_take_adapters():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    network = nn.ModuleDict({"block": nn.ModuleList([layer.to("cpu").requires_grad_(False)]), "norm": nn.LayerNorm(64)})
    network.is_loaded_in_4bit = True                                              # as diffusers marks it
    assert layer.weight.dtype == torch.uint8
    numbers, size = held(layer.weight)
    assert numbers == 64 * 64
    assert 64 * 64 / 2 < size < 64 * 64
    inject(network, "student", LoraRecipe(2), 0)
    x = torch.randn(3, 64, requires_grad=True)
    for parameter in adapter_parameters(network, "student").values():
        parameter.data = torch.randn_like(parameter)
        parameter.requires_grad_(True)
    with adapted(network, "student"):
        network["block"][0](x).square().sum().backward()
    assert all(p.dtype == torch.float32 and bool(p.grad.any()) for p in adapter_parameters(network, "student").values())
    assert Denoiser(network, TableVP.scaled_linear(), "eps").dtype == torch.float32
    assert bool(x.grad.any())
