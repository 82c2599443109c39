"""Judges of pictures and labels: the cosines of the shipped classifier and of a CLIP model, differentiable, frozen, refused in words."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from zoo.base import shaken
from zoo.basics import clip_tokenizer

from stepdistill import recipe as recipes
from stepdistill.models.features import PREPROCESSOR
from stepdistill.models.judges import TOGETHER, load_judge
from stepdistill.worlds.fashion import classifier, data
from stepdistill.worlds.fashion.data import CLASSES

PREPARED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
NAMES = ("a red apple", "snow", "two blue houses in the rain by the sea")        # the last is longer than the model reads
PAIRS = torch.tensor([2, 0])


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder with a tiny CLIP model of random weights, as `save_pretrained` leaves it."""
    tokenizer, tower = clip_tokenizer(), {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    last = len(tokenizer) - 1
    text = {**tower, "hidden_size": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": last,
            "bos_token_id": last - 1, "pad_token_id": last}
    config = CLIPConfig(text_config=text, vision_config={**tower, "hidden_size": 24, "image_size": 28, "patch_size": 14}, projection_dim=12)
    shaken(CLIPModel(config), std=0.5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / PREPROCESSOR).write_text(json.dumps(PREPARED))
    return tmp_path


# ---- what they say

def test_the_classifier_compares_its_features_with_the_rows_of_its_last_layer():
    judge, net, x = load_judge("fashion", CLASSES), classifier.load(classifier.SECOND), (pictures(10, 1, 28, 28) * 127.5 + 127.5).round()
    expected = functional.cosine_similarity(net(x.to(torch.uint8))[0], net.head.weight, dim=1)
    torch.testing.assert_close(judge(x / 127.5 - 1, torch.arange(10)), expected)
    some = load_judge("fashion", ("Bag", "Trouser"))                             # a teacher's own labels, in its own order
    torch.testing.assert_close(some(x[:2] / 127.5 - 1, torch.tensor([1, 0])), judge(x[:2] / 127.5 - 1, torch.tensor([1, 8])))


def test_what_the_recipe_asks_of_the_classifier_most_real_pictures_have():
    """Three quarters of them with their own label, hardly any with another."""
    try:
        test = data.load("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    judge, above = load_judge("fashion", CLASSES), recipes.load("fashion/swiftbrush_v2").method["align_above"]
    pictures, own = data.to_model(test.images[:2000]), test.labels[:2000]
    assert 0.7 < float((judge(pictures, own) > above).float().mean()) < 0.8
    assert float((judge(pictures, (own + 1 + torch.arange(2000) % 9) % 10) > above).float().mean()) < 0.05


def test_clip_compares_pictures_with_labels_as_texts(clip):
    """As the whole model does, which multiplies its cosines by a scale; grey pictures become colours, other sizes are resized."""
    judge, model, x = load_judge(str(clip), NAMES), CLIPModel.from_pretrained(clip).eval(), pictures(2, 3, 28, 28)
    mean, std = (torch.tensor(PREPARED[key])[:, None, None] for key in ("image_mean", "image_std"))
    tokens = clip_tokenizer()(list(NAMES), padding=True, truncation=True, max_length=24, return_tensors="pt")
    assert tokens["input_ids"].shape == (3, 24)
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=((x + 1) / 2 - mean) / std)
    cosines = out.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(judge(x, PAIRS), cosines[torch.arange(2), PAIRS])
    assert float(cosines.detach().std()) > 0.01
    torch.testing.assert_close(judge(x[:, :1], PAIRS), judge(x[:, :1].repeat(1, 3, 1, 1), PAIRS))
    assert judge(pictures(2, 3, 56, 56), PAIRS).shape == (2,)


def test_many_labels_are_read_in_parts(clip):
    """And each as if it were alone: padding to the longest of its part changes nothing."""
    names = [f"thing {'x' * (i % 9)}{i}" for i in range(TOGETHER + 3)]
    rows = load_judge(str(clip), names).rows
    assert rows.shape == (TOGETHER + 3, 12)
    for i in (0, 7, TOGETHER + 2):
        torch.testing.assert_close(rows[i], load_judge(str(clip), [names[i]]).rows[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["fashion", "clip"])
def test_gradients_reach_the_pictures_alone(source, clip):
    judge = load_judge("fashion", CLASSES) if source == "fashion" else load_judge(str(clip), NAMES)
    x = pictures(2, 1, 28, 28).requires_grad_()
    judge(x, PAIRS).sum().backward()
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(p.grad is None and not p.requires_grad for p in judge.parameters())
    assert not judge.rows.requires_grad
    assert not any(module.training for module in judge.modules())
    assert not [name for name, _ in judge.named_parameters() if "text" in name], "the half that reads is not kept"


def test_float64_is_judged_in_float64(clip):
    judge, x = load_judge(str(clip), NAMES), pictures(2, 3, 28, 28)
    found = judge(x, PAIRS)
    exact = judge.double()(x.double(), PAIRS)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-4)


# ---- what is refused

def test_labels_that_say_nothing(clip):
    for source in ("fashion", str(clip)):
        with pytest.raises(ValueError, match=r"this teacher has none: set method\.align_weight=0"):
            load_judge(source, ())
    with pytest.raises(ValueError, match="knows no 'hat'"):
        load_judge("fashion", ("Bag", "hat"))
    with pytest.raises(ValueError, match=r"numbers its classes: name them under labels in its stepdistill\.json"):
        load_judge(str(clip), ("0", "1", "2"))


def test_other_channels_are_refused(clip):
    with pytest.raises(ValueError, match=r"method\.judge names reads pictures of 3 channels.*\(4, 28, 28\)"):
        load_judge(str(clip), NAMES)(pictures(2, 4, 28, 28), PAIRS)


def damaged(folder: Path, what: str) -> None:
    if what == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "words":
        for path in (*folder.glob("tokenizer.json"), *folder.glob("vocab.json")):
            path.unlink()
    elif what == "cut words":
        words = folder / ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.json")
        words.write_text(words.read_text()[:200])
    elif what == "other":
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        Dinov2Model(config).save_pretrained(folder)
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(("what", "message"), [
    ("config.json", r"^method\.judge: .* has no config\.json; name 'fashion', or a folder with .* of a CLIP model, with its tokenizer"),
    (PREPROCESSOR, f"has no {PREPROCESSOR}"), ("pickled", "pickled weights are not read"),
    ("words", r"neither tokenizer\.json nor vocab\.json"),
    ("cut words", "is not valid JSON"), ("other", "holds a Dinov2Model, which is no CLIP model")])
def test_folders_that_are_refused(clip, what, message):
    damaged(clip, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_judge(str(clip), NAMES)
    assert "\n" not in str(caught.value)
