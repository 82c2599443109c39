"""Pictures from folders, and batches that depend on keys alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import LABELS, tiny_pictures, tiny_teacher

from stepdistill.data.streams import PictureSet, Source, folder_pictures, source
from stepdistill.diffusion.draws import Draws
from stepdistill.methods.base import Conditions, Images, Pairs
from stepdistill.models.load import Teacher, load_teacher

STREAMS = {"main": Conditions(), "real": Images()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


def picture(path: Path, value: int = 128, size: tuple[int, int] = (16, 16), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(path)
    return path


# ---- folders

def test_classes_are_sub_folders_by_name_or_number(tmp_path: Path) -> None:
    picture(tmp_path / "glove" / "b.png", 20)
    picture(tmp_path / "glove" / "a.PNG", 10)
    picture(tmp_path / "1" / "x.png", 30)
    picture(tmp_path / "sock" / "x.bmp", 40)
    (tmp_path / "sock" / "notes.txt").write_text("not a picture, by its name")
    (tmp_path / "README.md").write_text("")
    found = folder_pictures(tmp_path, (16, 16), 1, LABELS)
    assert (found.images.shape, found.images.dtype) == ((4, 1, 16, 16), torch.uint8)
    assert found.labels.tolist() == [1, 2, 2, 0]                             # folders and files in the order of their names
    assert found.images[:, 0, 0, 0].tolist() == [30, 10, 20, 40]


def test_a_number_may_also_be_a_name(tmp_path: Path) -> None:
    picture(tmp_path / "1" / "x.png")
    assert folder_pictures(tmp_path, (16, 16), 1, ("7", "3", "1")).labels.tolist() == [2]


def test_pictures_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    for labels in ((), ("0",)):
        assert folder_pictures(tmp_path, (16, 16), 1, labels).labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"has no sub-folders, and this teacher has 3 classes: .* named 'sock' or 0, 'hat' or 1"):
        folder_pictures(tmp_path, (16, 16), 1, LABELS)                       # they would all be socks


@pytest.mark.parametrize(("name", "labels", "message"), [
    ("shoe", LABELS, r"shoe is no class of this teacher; sub-folders are named .*sock.* or 0..2"),
    ("3", LABELS, "3 is no class of this teacher"), ("-1", LABELS, "-1 is no class"),
    ("sock", (), "this teacher has no classes: put the pictures into"),
])
def test_a_folder_that_is_no_class(tmp_path: Path, name: str, labels: tuple[str, ...], message: str) -> None:
    picture(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match=message):
        folder_pictures(tmp_path, (16, 16), 1, labels)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        folder_pictures(tmp_path / "nowhere", (16, 16), 1, ())
    with pytest.raises(ValueError, match=r"holds no pictures \(.png, .jpg"):
        folder_pictures(tmp_path, (16, 16), 1, ())
    (tmp_path / "sock").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        folder_pictures(tmp_path, (16, 16), 1, LABELS)


@pytest.mark.parametrize("keep", [0, 7, 20, 40, 60])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, keep: int) -> None:
    """Cut short anywhere: in the signature, in the header, in the pixels."""
    path = tmp_path / "x.png"
    Image.effect_noise((16, 16), 50).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.png cannot be read as a picture"):
        folder_pictures(tmp_path, (16, 16), 1, ())


def test_a_picture_with_a_broken_chunk_is_named(tmp_path: Path) -> None:
    """Here Pillow raises SyntaxError, of all things."""
    path = tmp_path / "x.png"
    Image.effect_noise((16, 16), 50).save(path)
    data = bytearray(path.read_bytes())
    data[18] ^= 255                                                          # the width, so that its checksum fails
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.png cannot be read as a picture"):
        folder_pictures(tmp_path, (16, 16), 1, ())


def test_pictures_are_cropped_in_the_middle(tmp_path: Path) -> None:
    """A 48x16 picture, black and white at its ends: only the grey middle is left, to its last column."""
    path = picture(tmp_path / "x.png", 100, (48, 16))
    with Image.open(path) as image:
        image = image.copy()
    image.paste(0, (0, 0, 16, 16))
    image.paste(255, (32, 0, 48, 16))
    image.save(path)
    assert set(folder_pictures(tmp_path, (16, 16), 1, ()).images.flatten().tolist()) == {100}
    tall = folder_pictures(tmp_path, (8, 4), 1, ()).images                   # (H, W): its middle 8x16
    assert tall.shape == (1, 1, 8, 4)
    assert set(tall.flatten().tolist()) == {100}


def test_colours(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", 200, mode="RGB")
    colour = folder_pictures(tmp_path, (4, 4), 3, ()).images
    assert colour[0, :, 2, 1].tolist() == [200, 0, 55]
    assert folder_pictures(tmp_path, (4, 4), 1, ()).images.shape == (1, 1, 4, 4)


# ---- batches

def test_states_are_pictures_between_minus_one_and_one(teacher: Teacher) -> None:
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    images[1] = 255
    images[1, :, 0, 1] = 51
    made = Source(teacher, PictureSet(images, torch.tensor([2, 0]))).batch(STREAMS, Draws(0, range(32)))
    x0, label = made["real"].clean, made["real"].cond["class_labels"]
    assert (x0.shape, x0.dtype) == ((32, 4, 8, 8), torch.float32)
    assert set(label.tolist()) == {0, 2}
    assert bool((x0[label == 2] == -1).all())
    white = x0[label == 0][0]
    assert float(white.max()) == 1.0
    assert float(white[1, 0, 0]) == pytest.approx(2 * 51 / 255 - 1, abs=1e-6)   # space to depth: pixel (0, 1) is channel 1
    assert made["main"].x0 is None
    with pytest.raises(ValueError, match="declare it as Images"):
        _ = made["main"].clean


def same(a: Source, one: Draws, parts: list[Draws]) -> bool:
    whole, split = a.batch(STREAMS, one), [a.batch(STREAMS, part) for part in parts]
    return (torch.equal(whole["real"].clean, torch.cat([s["real"].clean for s in split]))
            and torch.equal(whole["real"].cond["class_labels"], torch.cat([s["real"].cond["class_labels"] for s in split]))
            and torch.equal(whole["main"].cond["class_labels"], torch.cat([s["main"].cond["class_labels"] for s in split])))


def test_batches_do_not_depend_on_how_they_are_split(teacher: Teacher, tmp_path: Path) -> None:
    made = source(teacher, STREAMS, None, tiny_pictures(tmp_path))
    whole = Draws(5, range(16), step=3, update=1)
    torch.manual_seed(0)
    assert same(made, whole, [Draws(5, range(i, i + 4), step=3, update=1) for i in range(0, 16, 4)])
    for other in (Draws(6, range(16), 3, 1), Draws(5, range(16), 4, 1), Draws(5, range(16), 3, 0), Draws(5, range(1, 17), 3, 1)):
        assert not same(made, whole, [other])


def test_labels_and_pictures_are_uniform_and_streams_independent(teacher: Teacher, tmp_path: Path) -> None:
    """Of 3000 draws each class has 1000 +- 26 and each of 15 pictures 200 +- 14: within five standard deviations."""
    made = source(teacher, STREAMS, None, tiny_pictures(tmp_path))
    batch = made.batch(STREAMS, Draws(1, range(3000)))
    main, real = batch["main"].cond["class_labels"], batch["real"].cond["class_labels"]
    assert (torch.bincount(main) - 1000).abs().max() < 130
    assert (torch.bincount(real) - 1000).abs().max() < 130
    assert abs(float((main == real).double().mean()) - 1 / 3) < 0.045
    _, counts = torch.unique(batch["real"].clean, dim=0, return_counts=True)
    assert len(counts) == 15
    assert (counts - 200).abs().max() < 70


def test_pictures_go_with_their_labels(teacher: Teacher, tmp_path: Path) -> None:
    """The square of class k begins in row 4k."""
    batch = source(teacher, STREAMS, None, tiny_pictures(tmp_path)).batch(STREAMS, Draws(0, range(12)))
    pictures = teacher.pictures(batch["real"].clean)
    bright = (pictures[:, 0, :, 4:12].float().mean(2) > 150).double()
    assert torch.equal(bright.argmax(1) // 4, batch["real"].cond["class_labels"])


def test_only_what_is_declared_is_read(teacher: Teacher, tmp_path: Path) -> None:
    only = {"main": Conditions()}
    assert source(teacher, only, None, tmp_path / "nowhere").pictures is None          # not even looked for
    assert set(source(teacher, only, None, None).batch(only, Draws(0, range(2)))) == {"main"}
    with pytest.raises(ValueError, match=r"reads real pictures: set data.folder"):
        source(teacher, STREAMS, None, None)
    with pytest.raises(ValueError, match=r"reads real pictures: set data.folder"):
        Source(teacher).batch(STREAMS, Draws(0))


def test_every_sample_says_its_labels(teacher: Teacher, tmp_path: Path) -> None:
    """Those that its condition was made of, of whatever stream; 0 where a teacher has no classes."""
    class Stored:
        count = 3

        def rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            states = torch.zeros(len(rows), 4, 8, 8)
            return states, states, 2 - rows

    made = replace(source(teacher, STREAMS, None, tiny_pictures(tmp_path)), pairs=Stored())
    batch = made.batch({**STREAMS, "pairs": Pairs()}, Draws(0, range(40)))
    for sample in batch.values():
        assert torch.equal(sample.rows, sample.cond["class_labels"])
        assert set(sample.rows.tolist()) == {0, 1, 2}
    assert Source(replace(teacher, classes=0)).batch({"main": Conditions()}, Draws(0, range(2)))["main"].rows.tolist() == [0, 0]
