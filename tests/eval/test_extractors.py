"""Public networks as judges: preprocessing against Pillow, features against their formulas and against torch-fidelity's own loaders."""

import json
import math
import os
import shutil
from pathlib import Path

import judges
import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch.nn import functional
from torch.utils.data import Dataset
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchvision.transforms import functional as vision
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from stepdistill.eval import extractors, metrics, weights
from stepdistill.eval.extractors import EXTRACTORS, SHIPPED, TEXT_IMAGE
from stepdistill.models.precision import exact

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
SMALL_CLIP = {"projection_dim": 16, "text_config": {**SMALL, "vocab_size": 10},
              "vision_config": {**SMALL, "image_size": 224, "patch_size": 56}}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normalised(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (x.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def pillow(images: torch.Tensor, side: int) -> torch.Tensor:
    """Bicubic on float planes."""
    planes = [Image.fromarray(plane.float().numpy()).resize((side, side), Image.Resampling.BICUBIC) for plane in images.flatten(0, 1)]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).unflatten(0, images.shape[:2])


# -------------------------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("side", [32, 64, 224, 299, 500, 1024])
def test_bicubic_is_pillows(side):
    torch.testing.assert_close(extractors.bicubic(noise(1, 2, side, side), 299), pillow(noise(1, 2, side, side), 299), rtol=0, atol=0.01)


def test_a_fine_chequerboard_becomes_grey_only_with_antialiasing():
    """Why protocols resize before TF1's filter sees a picture: it makes moire of what should be grey."""
    board = (torch.arange(1024)[:, None] + torch.arange(1024)).remainder(2).mul(255).to(torch.uint8).expand(1, 3, -1, -1)
    assert (extractors._clipped(board, 299) - 127.5).abs().max() < 10
    moire = extractors._tensorflow1(board, 299)
    assert moire.std() > 40
    assert moire.max() - moire.min() > 250


def test_clips_own_preprocessing_is_that_of_pictures_in_pillow():
    """Up to the level that Pillow loses by rounding between its two passes; between them it clips, too, what overshoots."""
    for height, width in ((300, 200), (97, 180), (224, 224)):
        image = noise(1, 3, height, width) // 4 + 96
        drawn = Image.fromarray(image[0].movedim(0, -1).numpy())
        theirs = vision.pil_to_tensor(vision.center_crop(vision.resize(drawn, [224], vision.InterpolationMode.BICUBIC), [224, 224]))
        assert (extractors._cropped(image, 224)[0] - theirs.float()).abs().max() <= 1


def test_clean_pictures_stay_within_the_grey_levels():
    edge = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    edge[..., 32:] = 255
    assert extractors.bicubic(edge, 299).amin() < -1
    assert (extractors._clipped(edge, 299).amin(), extractors._clipped(edge, 299).amax()) == (0, 255)


# ------------------------------------------------------------------------------------------------------------------------------ Inception


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where weights are looked for, and a patch that lasts as long as this file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("weights")
        patch.setenv(weights.ENVIRONMENT, str(folder))
        yield folder, patch
        shutil.rmtree(folder)                                                    # a hundred megabytes twice


@pytest.fixture(scope="module")
def inception(place):
    """The public file of a random Inception, converted and found."""
    folder, patch = place
    file = judges.known_as(patch, "inception-2015-12-05", judges.inception(folder / "inception.public"))
    weights.convert("inception-2015-12-05", file)
    return file


def test_inception_is_torch_fidelitys(inception):
    """Loaded by us from our file and by them from the public one: the same features and logits, of a size to be compared."""
    before = torch.random.get_rng_state()
    ours, images = EXTRACTORS["inception-tf"](), noise(4, 3, 40, 40)
    assert torch.equal(torch.random.get_rng_state(), before)
    theirs = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                        feature_extractor_weights_path=str(inception))
    features, logits = extractors.extract(ours, images, 4)
    with torch.no_grad():
        wanted = theirs(images)
    for made, want, width in zip((features, logits), wanted, (2048, 1008), strict=True):
        assert made.shape == (4, width)
        assert want.std() > 0.01
        torch.testing.assert_close(made, want)
    assert ours.dim == 2048
    assert not any(p.requires_grad for p in ours.parameters())


def test_inception_sees_clean_pictures_as_pillow_makes_them(inception):
    judge, images = EXTRACTORS["inception-clean"](), noise(1, 1, 64, 48)
    features, _ = extractors.extract(judge, images, 1)
    with exact(), torch.inference_mode():
        wanted = judge.trunk((pillow(images, 299).clamp(0, 255).expand(-1, 3, -1, -1) - 128) / 128).flatten(1)
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"'inception-clean' reads pictures of one or three channels, got \(1, 2, 8, 8\)"):
        judge.features(noise(1, 2, 8, 8))


# --------------------------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def published(place):
    """Public files of a DINOv2 and of three CLIPs, converted and found; their tensors by name."""
    folder, patch = place
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(judges.WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    patch.setattr(weights, "PROBE", ("a cat", tuple(judges.tokens_of("a cat"))))
    states = {"dinov2-s14": judges.dinov2(), "clip-b32": judges.clip(), "clip-l14-336": judges.clip(), "clip-g14": judges.clip(vision=176)}
    for name, state in states.items():
        file = folder / f"{name}.public"
        if weights.known(name).layout == "openai":
            states[name] = {key: tensor.half().float() for key, tensor in state.items()}
            judges.archive({key: tensor.half() for key, tensor in state.items()}, file)
        else:
            torch.save(state, file)
        if name != "clip-g14":
            judges.known_as(patch, name, file)
        weights.convert(name, file, vocabulary=folder if name in TEXT_IMAGE else None, unchecked=name == "clip-g14")
    return states


def test_dinov2_is_its_formula(published):
    judge, images = EXTRACTORS["dinov2-s14"](), noise(2, 3, 96, 64)
    features, logits = extractors.extract(judge, images, 2)
    state, x = published["dinov2-s14"], normalised(pillow(images, 224), *extractors.IMAGENET)
    wanted = judges.dinov2_features(state, x, extractors.positions(state["pos_embed"], 16))
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-3)                     # resized by Pillow
    assert (features.shape, logits, judge.dim) == ((2, 128), None, 128)


def test_folders_of_transformers_serve_as_they_are(place):
    """Laid there by hand, as `save_pretrained` leaves them."""
    clip, dinov2 = CLIPConfig(**SMALL_CLIP), Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {"clip-l14": CLIPModel(clip).eval(), "dinov2-l14": Dinov2Model(dinov2).eval()}
    images = noise(2, 3, 224, 224)
    for name, model in models.items():
        model.save_pretrained(place[0] / name)
    with torch.no_grad():
        seen = models["clip-l14"].vision_model(normalised(images, *extractors.OPENAI)).pooler_output
        wanted = {"clip-l14": functional.normalize(models["clip-l14"].visual_projection(seen), dim=-1),
                  "dinov2-l14": models["dinov2-l14"](normalised(images, *extractors.IMAGENET)).pooler_output}
    for name, features in wanted.items():
        judge = EXTRACTORS[name]()
        torch.testing.assert_close(extractors.extract(judge, images, 2)[0], features, rtol=1e-4, atol=1e-5)
        assert features.shape == (2, judge.dim)


def cubic(n: int, side: int, scale: float) -> torch.Tensor:
    """Weights (side, n) of convolution with the cubic kernel of a = -3/4 at points (i + 1/2)/scale - 1/2, borders repeated."""
    out, a = torch.zeros(side, n, dtype=torch.float64), -0.75
    for i in range(side):
        point = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(point) - 1, math.floor(point) + 3):
            d = abs(point - tap)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i, min(max(tap, 0), n - 1)] += weight
    return out


def test_positions_are_interpolated_as_dinov2s_authors_do():
    table = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    made, grid = extractors.positions(table, 16), table[0, 1:].unflatten(0, (37, 37)).double()
    for scale, alike in ((16.1 / 37, True), (16 / 37, False)):
        rows = cubic(37, 16, scale)
        wanted = torch.einsum("in,jm,nmd->ijd", rows, rows, grid).flatten(0, 1).float()
        assert torch.allclose(made[0, 1:], wanted, atol=1e-4) == alike
    assert torch.equal(made[:, 0], table[:, 0])
    assert extractors.positions(table, 37) is table


def test_clip_pictures_are_torch_fidelitys(published, tmp_path):
    """At the network's own size nobody resizes; torch-fidelity reads the same archive and leaves out the norm."""
    images = noise(3, 3, 32, 32)
    public = judges.archive({key: tensor.half() for key, tensor in published["clip-b32"].items()}, tmp_path / "public.pt")
    theirs = torch_fidelity.FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(public))
    with torch.no_grad():
        wanted = functional.normalize(theirs(images)[0], dim=-1)
    for name in ("clip-b32", "clip-l14-336"):
        features, _ = extractors.extract(EXTRACTORS[name](), images, 2)
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


def test_clip_is_its_formula(published):
    """Pictures that are resized, and the larger heads and other activation of open_clip's network."""
    images = noise(2, 3, 60, 45)
    cropped = vision.center_crop(vision.resize(images, [32], vision.InterpolationMode.BICUBIC), [32, 32])
    for name, seen, options in (("clip-l14-336", pillow(images, 32), {}), ("clip-b32", cropped, {}),
                                ("clip-g14", cropped, {"head": 88, "activation": functional.gelu})):
        features, _ = extractors.extract(EXTRACTORS[name](), images, 2)
        wanted = judges.clip_pictures(published[name], normalised(seen, *extractors.OPENAI), **options)
        torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


def test_prompts_get_their_prefix_and_are_cut_at_the_context(published):
    prompts = ["a cat", "Two  dogs", "x " * 50]
    for name, activation in (("clip-b32", judges.quick_gelu), ("clip-g14", functional.gelu)):
        judge = TEXT_IMAGE[name]()
        made = extractors.embed(judge, prompts, 2)
        wanted = torch.cat([judges.clip_text(published[name], f"A photo depicts {prompt}", activation) for prompt in prompts])
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        assert made.shape == (3, judge.dim)
    with pytest.raises(ValueError, match="no prompts"):
        extractors.embed(judge, [], 2)


def test_the_bare_prompt_is_clip_l14s(published, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda name, find=weights.find: find("clip-b32"))
    made = extractors.embed(TEXT_IMAGE["clip-l14"](), ["a cat"], 2)
    torch.testing.assert_close(made, judges.clip_text(published["clip-b32"], "a cat"), rtol=1e-4, atol=1e-5)


def test_a_vocabulary_that_is_missing_or_not_clips(published, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary.*copy vocab.json and merges.txt there") as caught:
        EXTRACTORS["clip-l14-336"]().text(["a cat"])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(weights, "PROBE", ("a cat", (49406, 320, 2368, 49407)))
    with pytest.raises(ValueError, match="is not CLIP's"):
        TEXT_IMAGE["clip-b32"]().text(["a cat"])


# ------------------------------------------------------------------------------------------------------------------------- second opinion


class Pictures(Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def opinion(images: torch.Tensor, reference: torch.Tensor | None = None, **options) -> dict[str, float]:
    extractors.register()
    return torch_fidelity.calculate_metrics(input1=Pictures(images), input2=None if reference is None else Pictures(reference), cuda=False,
                                            cache=False, save_cpu_ram=True, verbose=False, batch_size=16, **options)


def test_torch_fidelity_agrees_on_our_extractor():
    made, reference = noise(64, 3, 20, 20), noise(64, 3, 20, 20, seed=1) // 2
    theirs = opinion(made, reference, fid=True, kid=True, kid_subsets=1, kid_subset_size=64, feature_extractor="stepdistill-tiny")
    f, g = (extractors.extract(extractors.Tiny(), images, 16)[0] for images in (made, reference))
    assert metrics.frechet(metrics.Moments.of(f), metrics.Moments.of(g)) == pytest.approx(theirs[torch_fidelity.KEY_METRIC_FID], rel=1e-4)
    assert metrics.kid(f, g) == pytest.approx(theirs[torch_fidelity.KEY_METRIC_KID_MEAN], rel=1e-3)


def test_torch_fidelity_reads_our_logits():
    images = noise(40, 1, 28, 28)
    theirs = opinion(images, isc=True, isc_splits=1, feature_extractor="stepdistill-fashion")[torch_fidelity.KEY_METRIC_ISC_MEAN]
    log_p = extractors.extract(extractors.Fashion(), images, 16)[1].double().log_softmax(1)
    ours = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp()
    assert float(ours) == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(ValueError, match="'tiny' is no classifier"):
        opinion(images, isc=True, feature_extractor="stepdistill-tiny")
    with pytest.raises(ValueError, match="leave feature_extractor_weights_path out"):
        opinion(images, isc=True, feature_extractor="stepdistill-fashion", feature_extractor_weights_path="x.pth")


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    extractors.register()
    first = dict(FEATURE_EXTRACTORS_REGISTRY)
    extractors.register()
    assert first == FEATURE_EXTRACTORS_REGISTRY
    assert {f"stepdistill-{name}" for name in EXTRACTORS} <= set(first)
    assert "XFORMERS_DISABLED" not in os.environ


def test_every_public_network_says_what_is_missing(tmp_path: Path, monkeypatch):
    """Judges are named in the table, the table's weights by judges."""
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path))
    for name, make in EXTRACTORS.items():
        if name in SHIPPED:
            continue
        with pytest.raises(FileNotFoundError, match="stepdistill weights convert") as caught:
            make()
        assert "\n" not in str(caught.value)
        assert any(name in entry.serves for entry in weights.KNOWN.values() if f"convert {entry.name} " in str(caught.value))
