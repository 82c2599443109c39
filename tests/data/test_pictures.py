"""The same pictures from every kind of container, and the place of whatever is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.data.pictures import Picture, fitted, nearest, read_pictures, tensors

CAPTIONS = ("a red apple", "snow", "two houses", "a blue door")
SIZE = (8, 8)


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    noise = torch.randint(0, 256, (size[1] * size[0] * 3,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    file = io.BytesIO()
    Image.frombytes("RGB", size, bytes(noise.tolist())).save(file, "png")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def beside(folder: Path, data: list[bytes]) -> None:
    for i, content in enumerate(data):
        (folder / f"{i}.png").write_bytes(content)
        (folder / f"{i}.txt").write_text(CAPTIONS[i] + "\n")


def metadata(folder: Path, data: list[bytes]) -> None:
    for i, content in enumerate(data):
        (folder / f"{i}.png").write_bytes(content)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i]}) + "\n"
                                                   for i in range(len(data))))


def webdataset(folder: Path, data: list[bytes]) -> None:
    first, *rest = range(len(data))
    tar(folder / "a-1.tar", {name: value for i in rest for name, value in {f"{i}.png": data[i], f"{i}.txt": CAPTIONS[i].encode()}.items()})
    tar(folder / "a-0.tar", {"in/0.json": json.dumps({"caption": CAPTIONS[first]}).encode(), "in/0.PNG": data[first], "in/0.cls": b"7"})


def parquet(folder: Path, data: list[bytes]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [{"bytes": d, "path": None} for d in data], "text": list(CAPTIONS[:len(data)])}),
                   folder / "x.parquet", row_group_size=2)


def raw_parquet(folder: Path, data: list[bytes]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"jpg": data, "prompt": list(CAPTIONS[:len(data)])}), folder / "x.parquet")


def saved(folder: Path, data: list[bytes]) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": d, "path": None} for d in data], "text": list(CAPTIONS[:len(data)])}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}))
    made.save_to_disk(str(folder))


KINDS: dict[str, tuple[Callable[[Path, list[bytes]], None], str]] = {            # maker, how the second picture's place ends
    "beside": (beside, "1.png"), "metadata": (metadata, "1.png"), "tars": (webdataset, "a-1.tar, 1.png"),
    "parquet": (parquet, "x.parquet, row 1"), "raw parquet": (raw_parquet, "x.parquet, row 1"),
    "datasets": (saved, "data-00000-of-00001.arrow, row 1")}


def all_of(pictures: tuple[Picture, ...]) -> Tensor:
    return torch.stack(list(tensors(pictures, SIZE, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_pictures(tmp_path, kind):
    data = [png(i) for i in range(4)]
    KINDS[kind][0](tmp_path, data)
    found = read_pictures(tmp_path)
    assert tuple(p.caption for p in found) == CAPTIONS
    assert found[1].where.endswith(KINDS[kind][1])
    assert [p.read() for p in found] == data
    expected = torch.stack([fitted(Image.open(io.BytesIO(d)), SIZE) for d in data])
    assert torch.equal(all_of(found), expected)
    assert torch.equal(all_of((found[3], found[0])), expected[[3, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_picture_names_its_place(tmp_path, kind):
    KINDS[kind][0](tmp_path, [png(0), png(1)[:60]])
    found = read_pictures(tmp_path)
    with pytest.raises(ValueError, match=rf"{KINDS[kind][1]} cannot be read as a picture") as error:
        all_of(found)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "gif"])
def test_pictures_cut_anywhere_are_errors_of_one_kind(form):
    whole = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(whole, form)
    data = whole.getvalue()
    for keep in range(0, len(data) - 40, 7):
        with pytest.raises(ValueError, match="x cannot be read as a picture"):
            Picture("x", "", lambda keep=keep: data[:keep]).image(3)


def test_a_single_tar_and_a_single_table(tmp_path):
    tar(tmp_path / "x.tar", {"0.jpg": png(0), "0.txt": b"one"})
    assert [p.caption for p in read_pictures(tmp_path / "x.tar")] == ["one"]
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.zip: the name of a file must end in \.tar or \.parquet"):
        read_pictures(tmp_path / "x.zip")


@pytest.mark.parametrize(("members", "message"), [
    ({"0.png": b"", "1.txt": b"one"}, r"x\.tar, 0\.png has no caption: put a 0\.txt or \.json beside it"),
    ({"0.png": b"", "0.jpg": b"", "0.txt": b"one"}, r"x\.tar, 0\.jpg: a second picture beside 0\.png"),
    ({"0.png": b"", "0.txt": b" "}, r"x\.tar, 0\.txt: the caption is empty"),
    ({"0.png": b"", "0.txt": b"\n\xff"}, r"x\.tar, 0\.txt, line 2: not UTF-8"),
    ({"0.png": b"", "0.json": b"{"}, r"x\.tar, 0\.json: not a JSON object"),
    ({"0.png": b"", "0.json": b'{"label": 1}'}, r"x\.tar, 0\.json: no text under prompt, caption, text"),
    ({"0.txt": b"one"}, r"holds no pictures")])
def test_a_bad_shard_names_the_member(tmp_path, members, message):
    tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path)


def test_links_and_hidden_members_of_a_tar_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tar(tmp_path / "d" / "x.tar", {"._0.png": b"", "../0.png": png(0), "../0.txt": b"one"})
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
        file.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    (found,) = read_pictures(path)
    assert (found.caption, found.image(3).size) == ("one", (12, 10))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [300, 700, 1024, 1100, 2048])
def test_a_cut_tar_is_named(tmp_path, keep):
    """In a header, in a picture, and between two members."""
    path = tar(tmp_path / "x.tar", {"0.png": png(0), "0.txt": b"one"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.tar cannot be read as a tar"):
        read_pictures(tmp_path)


@pytest.mark.parametrize(("files", "message"), [
    ({}, "holds no pictures"), ({"0.png": b""}, r"0\.png has no caption: put it into 0\.txt beside it"),
    ({"0.png": b"", "0.txt": b""}, r"0\.txt: the caption is empty"),
    ({"metadata.jsonl": b'{"text": "a"}\n'}, r"metadata\.jsonl, line 1: no file_name"),
    ({"metadata.jsonl": b'{"file_name": "0.png", "text": "a"}\n'}, r"metadata\.jsonl, line 1: 0\.png is not in"),
    ({"metadata.jsonl": b'{"file_name": "../0.png", "text": "a"}\n'}, r"line 1: \.\./0\.png is not in"),
    ({"0.png": b"", "metadata.jsonl": b'{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png", "text": ""}\n'},
     r"metadata\.jsonl, line 2: the caption is empty")])
def test_a_bad_folder_names_the_file(tmp_path, files, message):
    (tmp_path / "0.png").write_bytes(b"")                                    # outside the folder
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path / "in")


def test_a_table_of_paths_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "0.png"}], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 0 cannot be read as a picture: the cell holds no bytes"):
        read_pictures(tmp_path)[0].image(3)


def test_small_pictures_are_reported(capsys):
    whole, small = (Picture(name, "", lambda size=size: png(0, size)) for name, size in (("big", (9, 9)), ("low", (20, 7))))
    assert len(list(tensors([whole], SIZE, 3))) == 1
    assert capsys.readouterr().err == ""
    assert len(list(tensors([whole, small], SIZE, 3))) == 2
    assert "1 of 2 pictures are smaller than 8x8 and were enlarged, the first of them low" in capsys.readouterr().err


def test_pictures_are_turned_as_the_camera_says():
    file = io.BytesIO()
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6                                                         # a quarter turn
    image.save(file, "jpeg", exif=exif)
    assert Picture("x", "", file.getvalue).image(3).size == (4, 6)


# ---- buckets

@pytest.mark.parametrize(("size", "number"), [
    ((100, 100), 0), ((100, 120), 0), ((100, 125), 1), ((1000, 1250), 3), ((125, 100), 2), ((110, 900), 3), ((100, 900), 1), ((51, 64), 1),
    ((30, 38), 1)])
def test_a_picture_goes_where_it_is_cropped_least(size: tuple[int, int], number: int) -> None:
    """Of two sizes with one aspect it takes the largest that it fills; one that fills neither, the smallest."""
    assert nearest(size, ((64, 64), (51, 77), (77, 51), (102, 154))) == number


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_that_of_the_turned_picture(orientation: int) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (12, 10)).save(file, "jpeg", exif=exif)
    picture = Picture("a.jpg", "", file.getvalue)
    assert picture.size == (picture.image(3).height, picture.image(3).width)
    with pytest.raises(ValueError, match=r"^a\.jpg cannot be read as a picture"):
        _ = Picture("a.jpg", "", lambda: file.getvalue()[:20]).size
