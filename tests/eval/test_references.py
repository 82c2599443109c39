"""Real pictures on their way into a reference, and pictures on their way to a judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.eval import pictures, references
from stepdistill.eval.cards import CARDS, Brought, draft
from stepdistill.eval.extractors import Tiny, extract
from stepdistill.eval.metrics import Moments
from stepdistill.eval.pictures import Pictures
from stepdistill.eval.protocol import Protocol
from stepdistill.images import save_png, to_image


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def folder_of(images: Tensor, folder: Path) -> Path:
    for i, picture in enumerate(images):
        save_png(to_image(picture), folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def exam() -> Protocol:
    return draft(CARDS["custom"], 50, 0, Brought(extractor="tiny"))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return folder_of(noise(30, 3, 24, 24), tmp_path / "real")


# ------------------------------------------------------------------------------------------------------------------------- the statistics


def test_a_reference_holds_what_the_extractor_says(exam: Protocol, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of all, features of evenly spaced ones, whatever is held at a time."""
    monkeypatch.setattr(references, "BLOCK", 7)
    stored = references.make(real, exam, tmp_path / "r.safetensors", keep=9)
    features, _ = extract(Tiny(), noise(30, 3, 24, 24), 250)
    expected = Moments.of(features)
    assert stored.count == stored.real["tiny"].train.n == 30
    torch.testing.assert_close(stored.real["tiny"].train.mean, expected.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored.real["tiny"].train.cov, expected.cov, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored.real["tiny"].test_features, features[[0, 3, 6, 10, 13, 16, 20, 23, 26]], rtol=0, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["r.safetensors"]


def test_kept_features_know_the_names_of_their_pictures(exam: Protocol, real: Path, tmp_path: Path) -> None:
    """Through the file, of every picture or of some; of published pictures their rows; of a reference from before, none."""
    (real / "010.png").rename(real / "010 é\n.png")
    stored = references.make(real, exam, tmp_path / "r.safetensors", keep=9)
    assert stored.real["tiny"].names == tuple(f"{i}.png" for i in ("000", "003", "006", "010 é\n", "013", "016", "020", "023", "026"))
    tensors = load_file(tmp_path / "r.safetensors")
    with safe_open(tmp_path / "r.safetensors", "pt") as file:
        save_file({name: t for name, t in tensors.items() if not name.endswith("names")}, tmp_path / "b.safetensors", file.metadata())
    before = references.read(tmp_path / "b.safetensors", exam)
    assert before.real["tiny"].names == ()
    assert torch.equal(before.real["tiny"].test_features, stored.real["tiny"].test_features)
    np.savez(tmp_path / "more.npz", mu=np.zeros(16), sigma=np.eye(16), arr_0=noise(12, 3, 24, 24).movedim(1, -1).numpy())
    mixed = references.make(real, exam, tmp_path / "m.safetensors", keep=6, set_from=tmp_path / "more.npz").real["tiny"]
    assert mixed.names == tuple(f"more.npz[{i}]" for i in (0, 2, 4, 6, 8, 10))
    torch.testing.assert_close(mixed.train.mean, stored.real["tiny"].train.mean)


def test_one_pixel_makes_another_reference(exam: Protocol, real: Path, tmp_path: Path) -> None:
    first = references.make(real, exam, tmp_path / "a.safetensors", keep=9)
    assert references.make(real, exam, tmp_path / "b.safetensors", keep=9).sha256 == first.sha256
    image = noise(30, 3, 24, 24)[5]
    image[0, 0, 0] ^= 1
    save_png(to_image(image), real / "005.png")
    other = references.make(real, exam, tmp_path / "a.safetensors", keep=9)
    assert other.sha256 != first.sha256
    assert replace(exam, reference_sha256=other.sha256).hash != replace(exam, reference_sha256=first.sha256).hash


def test_folders_of_classes_are_read_one_level_down(exam: Protocol, real: Path, tmp_path: Path) -> None:
    """The same pictures in the same order are the same reference; hidden folders and deeper ones are none of it."""
    for i, path in enumerate(sorted(real.iterdir())):
        to = tmp_path / "classes" / f"c{i // 10}" / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    for other in (".cache", "c1/deeper"):
        folder_of(noise(2, 3, 24, 24, seed=9), tmp_path / "classes" / other)
    flat = references.make(real, exam, tmp_path / "a.safetensors", keep=9)
    nested = references.make(tmp_path / "classes", exam, tmp_path / "b.safetensors", keep=9)
    assert (nested.sha256, nested.count) == (flat.sha256, 30)
    assert nested.real["tiny"].names[:5] == ("c0/000.png", "c0/003.png", "c0/006.png", "c1/010.png", "c1/013.png")
    with pytest.raises(ValueError, match="holds no pictures itself, and those in c0 have no place in the order of samples"):
        pictures.files_in(tmp_path / "classes")
    folder_of(noise(1, 3, 24, 24), tmp_path / "classes")
    with pytest.raises(ValueError, match="holds 1 pictures itself and others in c0"):
        references.make(tmp_path / "classes", exam, tmp_path / "c.safetensors", keep=9)
    assert [path.name for path in pictures.files_in(tmp_path / "classes")] == ["000.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures .* and no folders of them"):
        pictures.files_in(tmp_path / "empty", nested=True)


def test_published_statistics_are_taken_over(exam: Protocol, real: Path, tmp_path: Path) -> None:
    """mu and sigma as they stand; features from the pictures in the file, or from another source."""
    mean, cov = torch.rand(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    np.savez(tmp_path / "stats.npz", mu=mean.numpy(), sigma=cov.numpy())
    with pytest.raises(ValueError, match="moments alone, and kid_tiny_real_50 looks at features"):
        references.make(tmp_path / "stats.npz", exam, tmp_path / "r.safetensors", keep=9, count=5000)
    stored = references.make(tmp_path / "stats.npz", exam, tmp_path / "r.safetensors", keep=9, count=5000, set_from=real)
    torch.testing.assert_close(stored.real["tiny"].train.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(stored.real["tiny"].train.cov, cov, rtol=0, atol=1e-9)
    assert (stored.count, stored.real["tiny"].train.n, len(stored.real["tiny"].test_features)) == (5000, 5000, 9)
    images = noise(12, 3, 24, 24)
    np.savez(tmp_path / "more.npz", mu=mean.numpy(), sigma=cov.numpy(), arr_0=images.movedim(1, -1).numpy())
    kept = references.make(tmp_path / "more.npz", exam, tmp_path / "m.safetensors", keep=12).real["tiny"].test_features
    torch.testing.assert_close(kept, extract(Tiny(), images, 250)[0], rtol=0, atol=1e-6)


def test_larger_pictures_are_shrunk_and_smaller_ones_stay() -> None:
    picture = noise(3, 40, 60)
    assert pictures.shrunk(picture, 20, "lanczos").shape == (3, 20, 30)
    assert pictures.shrunk(picture.mT, 20, "box").shape == (3, 30, 20)
    for size in (0, 40, 41):
        assert pictures.shrunk(picture, size, "lanczos") is picture
    some = Pictures.of(noise(10, 3, 4, 4)).part(3, 8)
    assert some.count == 5
    assert torch.equal(torch.stack(list(some.part(1, 4).read(range(1, 3)))), noise(10, 3, 4, 4)[5:7])


def test_unfit_sources_are_refused(exam: Protocol, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "code.npz", mu=np.array([object()], dtype=object), sigma=np.eye(16))
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"\x89PNG")
    for source, words in (("other.npz", "holds no mu and sigma of tiny"), ("code.npz", "cannot be read"), ("none.npz", "no file"),
                          ("none", "no folder"), ("empty", "holds no pictures"), ("damaged", "cannot be read as a picture")):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            references.make(tmp_path / source, exam, tmp_path / "r.safetensors", keep=9)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "r.safetensors").exists()


def test_a_reference_of_another_kind_is_refused(exam: Protocol, real: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    references.make(real, exam, path, keep=9)
    with pytest.raises(ValueError, match="other weights of the extractor tiny"):
        references.read(path, replace(exam, extractor_sha256="0" * 64))
    with pytest.raises(ValueError, match="cropped and resized in another way"):
        references.read(path, replace(exam, crop="centre", metric_size=16))
    with pytest.raises(ValueError, match="knows nothing of fashion, which kid_fashion_real_50"):
        references.read(path, draft(CARDS["custom"], 50, 0, Brought(extractor="tiny", also=("kid:fashion",))))
    save_file(load_file(path), tmp_path / "plain.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    for damaged in (path, tmp_path / "plain.safetensors"):
        with pytest.raises(ValueError, match="is damaged or no reference"):
            references.read(damaged, exam)


# ------------------------------------------------------------------------------------------------------------------- on the way to a judge


def test_crop_and_filter_are_pillows() -> None:
    """The middle of the long side, then Lanczos on 8 bits; what has the size already is not touched."""
    image = noise(3, 40, 60)
    pillow = to_image(image).crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(pictures.whole(image, "centre", 16, "lanczos").movedim(0, -1).numpy(), np.asarray(pillow))
    assert torch.equal(pictures.whole(image, "centre", 40, "lanczos"), image[:, :, 10:50])
    assert torch.equal(pictures.whole(image, "none", 0, "lanczos"), image)
    with pytest.raises(ValueError, match="60x40 and the protocol looks at 48x48"):
        pictures.whole(image, "centre", 48, "lanczos")


def test_a_patch_is_the_middle_as_it_is() -> None:
    image = noise(1, 400, 300)
    assert torch.equal(pictures.patch(image), image[:, 50:349, 0:299])
    small = noise(1, 299, 200)
    mirrored = pictures.patch(small)
    assert mirrored.shape == (1, 299, 299)
    assert torch.equal(mirrored[:, :, 49:249], small)
    assert torch.equal(mirrored[:, :, 48], small[:, :, 1])
    assert torch.equal(mirrored[:, :, 249], small[:, :, -2])
    with pytest.raises(ValueError, match="too small for a patch"):
        pictures.patch(noise(1, 100, 299))


def test_grey_and_coloured_pictures_come_together() -> None:
    grey, coloured = noise(1, 8, 8), noise(3, 8, 8)
    batch = pictures.together([grey, coloured])
    assert batch.shape == (2, 3, 8, 8)
    assert torch.equal(batch[0], grey.expand(3, -1, -1))


def test_real_pictures_of_any_size_are_read_and_jpeg_is_welcome(exam: Protocol, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    to_image(noise(3, 40, 50)).save(tmp_path / "real" / "a.jpg", quality=95)
    to_image(noise(1, 30, 20)).save(tmp_path / "real" / "b.png")
    found = references.gather(pictures.real(pictures.files_in(tmp_path / "real")), replace(exam, crop="centre", metric_size=16), 2)
    assert found["tiny"].train.n == 2


def test_pictures_are_read_a_few_at_a_time(exam: Protocol) -> None:
    """Never more than the batch of the protocol."""
    asked, images = [], noise(700, 1, 8, 8)

    def read(rows: range) -> list[Tensor]:
        asked.append(len(rows))
        return list(images[rows.start : rows.stop])

    references.gather(Pictures(700, read), exam, 9)
    assert asked == [250, 250, 200]
