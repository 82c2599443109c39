"""Networks over pictures for discriminators: the shipped classifier and vision transformers from folders, differentiable and frozen."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2ForImageClassification, Dinov2Model, ViTConfig, ViTModel

from stepdistill.models.features import PREPROCESSOR, load_features
from stepdistill.worlds.fashion import classifier

SMALL = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PREPARED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved(folder: Path, model: nn.Module | None = None) -> Path:
    """A folder as `save_pretrained` leaves it, with the numbers pictures are normalised by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (model or Dinov2Model(Dinov2Config(**SMALL))).save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps(PREPARED))
    return folder


def test_the_worlds_classifier():
    """Three maps, the last of which pools to its own features; 16 channels of the first stage, 64 of the last. They are not the judge's."""
    net, x = load_features("fashion"), (pictures(3, 1, 28, 28) * 127.5 + 127.5).round()
    maps = net(x / 127.5 - 1)
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 28, 28), (32, 14, 14), (64, 7, 7)]
    torch.testing.assert_close(maps[-1].mean((2, 3)), classifier.load(classifier.SECOND)(x.to(torch.uint8))[0])
    assert not torch.allclose(maps[-1].mean((2, 3)), classifier.load()(x.to(torch.uint8))[0], atol=0.1)
    assert [f.shape[1:] for f in net.seen()] == [f.shape[1:] for f in maps]
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(module.training for module in net.modules())


def test_gradients_reach_the_pictures_alone():
    net, x = load_features("fashion"), pictures(2, 1, 28, 28).requires_grad_()
    sum(f.square().mean() for f in net(x)).backward()
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(p.grad is None for p in net.parameters())


def test_other_sizes_are_resized_and_other_channels_refused():
    net = load_features("fashion")
    for side in (8, 56):
        assert [f.shape[2:] for f in net(pictures(2, 1, side, side))] == [(28, 28), (14, 14), (7, 7)]
    flat = torch.full((1, 1, 28, 28), 0.3)
    for a, b in zip(net(flat), net(flat[..., :9, :9]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"reads pictures of 1 channels.*\(3, 28, 28\)"):
        net(pictures(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"reads pictures of 1 channels.*\(2,\)"):
        net(pictures(1, 2))


def test_a_vision_transformer(tmp_path):
    """Tokens of four blocks at even distances, of pictures normalised as its own processor would; grey ones become colours."""
    folder = saved(tmp_path / "dino")
    net, model, x = load_features(str(folder)), Dinov2Model.from_pretrained(folder).eval(), pictures(2, 3, 28, 28)
    mean, std = (torch.tensor(PREPARED[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        hidden = model(((x + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states                     # the embedding first
    assert net.taps == tuple(f"encoder.layer.{i}" for i in (1, 2, 3, 5))
    for tokens, i in zip(net(x), (1, 2, 3, 5), strict=True):
        torch.testing.assert_close(tokens, hidden[i + 1])
    for a, b in zip(net(x[:, :1]), net(x[:, :1].repeat(1, 3, 1, 1)), strict=True):
        torch.testing.assert_close(a, b)
    twelve = saved(tmp_path / "twelve", Dinov2Model(Dinov2Config(**{**SMALL, "num_hidden_layers": 12})))
    assert load_features(str(twelve)).taps == tuple(f"encoder.layer.{i}" for i in (2, 5, 8, 11))


def test_what_comes_after_the_blocks_may_be_missing(tmp_path):
    """A head more than the model has, or a pooler less."""
    load_features(str(saved(tmp_path / "head", Dinov2ForImageClassification(Dinov2Config(**SMALL)))))
    load_features(str(saved(tmp_path / "pooler", ViTModel(ViTConfig(**{**SMALL, "intermediate_size": 32}), add_pooling_layer=False))))


def damaged(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "mean":
        (folder / PREPROCESSOR).write_text("{}")
    elif what == "deeper":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(("what", "message"), [
    ("config.json", "has no config.json"), (PREPROCESSOR, f"has no {PREPROCESSOR}"), ("pickled", "pickled weights are not read"),
    ("cut", "cannot be loaded"), ("mean", "lacks image_mean"), ("deeper", r"do not fit its config: \['encoder\.layer\.6")])
def test_folders_that_are_refused(tmp_path, what, message):
    folder = saved(tmp_path / "dino")
    damaged(folder, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_features(str(folder))
    assert "\n" not in str(caught.value)


def test_text_is_no_picture(tmp_path):
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="no vision transformer"):
        load_features(str(saved(tmp_path / "text", text)))
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json; name 'fashion'"):
        load_features(str(tmp_path / "nowhere"))
