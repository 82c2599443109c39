"""Public files become safetensors once, behind their SHA-256, and what is missing is named in one line. Nothing asks the network."""

import json
import os
import socket
from pathlib import Path

import judges
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepdistill.cli import run
from stepdistill.eval import extractors, weights
from stepdistill.eval.networks import WEIGHTS

NAME = "dinov2-s14"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where weights are looked for: empty."""
    folder = tmp_path / "weights"
    monkeypatch.setenv(weights.ENVIRONMENT, str(folder))
    return folder


@pytest.fixture
def public(tmp_path, monkeypatch) -> Path:
    """A small DINOv2 as its authors would publish it, and the table states its digest."""
    file = tmp_path / "public.pth"
    torch.save(judges.dinov2(depth=1), file)
    return judges.known_as(monkeypatch, NAME, file)


@pytest.fixture
def nothing_is_opened(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the file was opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.jit, "load", refuse)


@pytest.fixture
def no_network(monkeypatch):
    """Whoever looks up a host or connects to one fails."""
    def refuse(*args, **options):
        raise AssertionError("something asked the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# --------------------------------------------------------------------------------------------------------------------------- conversion


def test_from_the_public_file_to_features_without_the_network(public, place, tmp_path, no_network, capfd):
    """The whole way, by the commands and as torch-fidelity goes it."""
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(judges.WORDS)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    torch.save(judges.clip(vision=176), tmp_path / "open_clip.bin")
    assert run(["weights", "convert", NAME, str(public)]) == 0
    assert run(["weights", "convert", "clip-g14", str(tmp_path / "open_clip.bin"), "--unchecked", "--vocabulary", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"{NAME} in {place / NAME}\nclip-g14 in {place / 'clip-g14'}\n"
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    for name in (NAME, "clip-g14"):
        features, _ = extractors.extract(extractors.EXTRACTORS[name](), images, 2)
        assert features.isfinite().all()
        assert not torch.equal(features[0], features[1])
    with pytest.raises(ValueError, match="is not CLIP's"):
        extractors.TEXT_IMAGE["clip-g14"]().text(["a cat"])


def test_what_is_kept(public, place):
    """Safetensors, which tell where they came from; nothing beside them."""
    assert weights.convert(NAME, public) == place / NAME
    assert sorted(path.name for path in place.rglob("*")) == ["config.json", NAME, WEIGHTS]
    with safe_open(place / NAME / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "source": "dinov2_vits14_pretrain.pth", "source_sha256": weights.digest(public)}
    config = json.loads((place / NAME / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"], config["image_size"]) == (128, 2, 1, 42)
    net, fingerprint = weights.network(NAME)
    assert not net.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    assert fingerprint == weights.fingerprint(place / NAME / WEIGHTS)


def test_elsewhere(public, place, tmp_path):
    assert weights.convert(NAME, public, tmp_path / "other") == tmp_path / "other" / NAME
    assert not place.exists()


def test_another_file_is_refused_before_it_is_opened(public, place, nothing_is_opened):
    public.write_bytes(public.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is another file .* and was not opened: get dinov2_vits14_pretrain.pth") as caught:
        weights.convert(NAME, public)
    one_line(caught)
    with pytest.raises(ValueError, match="leave --unchecked out"):
        weights.convert(NAME, public, unchecked=True)
    assert not place.exists()


def test_a_file_of_unknown_digest_needs_the_users_word(tmp_path, place, nothing_is_opened):
    file = tmp_path / "open_clip.bin"
    file.write_bytes(b"weights")
    with pytest.raises(ValueError, match=weights.digest(file)) as caught:
        weights.convert("clip-g14", file)
    assert "--unchecked" in one_line(caught)
    assert not place.exists()


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("content", ["code", "others", "cut", "text"])
def test_whatever_a_trusted_file_holds_no_code_is_run(tmp_path, place, content):
    file = tmp_path / "open_clip.bin"
    torch.save({"code": Code(tmp_path / "ran")} if content == "code" else {"weight": torch.zeros(2)}, file)
    if content in ("cut", "text"):
        file.write_bytes(file.read_bytes()[:200] if content == "cut" else b"words")
    with pytest.raises(ValueError, match=r"does not hold what open_clip_pytorch_model\.bin does") as caught:
        weights.convert("clip-g14", file, unchecked=True)
    one_line(caught)
    assert not (tmp_path / "ran").exists()
    assert not place.exists()


def test_an_interrupted_conversion_leaves_nothing(public, place, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_built", stop)                                   # when everything is written
        with pytest.raises(KeyboardInterrupt):
            weights.convert(NAME, public)
    assert list(place.iterdir()) == []
    weights.convert(NAME, public)
    with pytest.raises(ValueError, match="is there already: delete it"):
        weights.convert(NAME, public)


def test_wrong_vocabularies(public, tmp_path):
    with pytest.raises(ValueError, match="reads no prompts"):
        weights.convert(NAME, public, vocabulary=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no vocab\.json"):
        weights.convert("clip-g14", public, vocabulary=tmp_path, unchecked=True)


# ------------------------------------------------------------------------------------------------------------------------------- finding


def test_missing_weights_are_named_with_their_remedy(place):
    for name, entry in weights.KNOWN.items():
        with pytest.raises(FileNotFoundError) as caught:
            weights.network(name)
        text = one_line(caught)
        for word in (entry.file, entry.origin, str(place), f"stepdistill weights convert {name} FILE", weights.ENVIRONMENT):
            assert word in text
        assert entry.sha256 is None or entry.sha256 in text
    with pytest.raises(ValueError, match="did you mean 'clip-l14'"):
        weights.find("clip-l-14")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.pth: get ViT-B-32\.pt"):
        weights.convert("clip-b32", place / "gone.pth")


def test_without_the_variable_weights_are_in_the_cache(monkeypatch):
    monkeypatch.delenv(weights.ENVIRONMENT)
    assert weights.root() == Path.home() / ".cache" / "stepdistill" / "eval"


def test_the_table_agrees_with_the_files_names():
    """Digests are whole, and those that a name or address repeats are the same."""
    for entry in weights.KNOWN.values():
        assert entry.sha256 is None or (len(entry.sha256) == 64 and set(entry.sha256) <= set("0123456789abcdef"))
    assert weights.known("inception-2015-12-05").sha256.startswith("6726825d")
    from torch_fidelity.feature_extractor_clip import MODEL_URLS

    for ours, theirs in {"clip-b32": "clip-vit-b-32", "clip-l14": "clip-vit-l-14", "clip-l14-336": "clip-vit-l-14-336px"}.items():
        assert weights.known(ours).origin == MODEL_URLS[theirs]


def test_the_list(public, place, tmp_path, capfd):
    """States of weights that are missing, converted, and laid there by hand."""
    assert run(["weights", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert {row["name"]: row["state"] for row in rows} == dict.fromkeys(weights.KNOWN, "missing")
    weights.convert(NAME, public)
    by_hand = weights.convert(NAME, public, tmp_path)
    tensors = load_file(by_hand / WEIGHTS)
    save_file(tensors, by_hand / WEIGHTS, metadata={"format": "pt"})
    by_hand.rename(place / "dinov2-l14")
    assert {row["name"]: row["state"] for row in weights.listing() if row["state"] != "missing"} == {
        NAME: "checked", "dinov2-l14": "unchecked"}
    assert weights.network(NAME)[1] == weights.network("dinov2-l14")[1]
    assert run(["weights"]) == 0
    out = capfd.readouterr().out
    assert str(place) in out
    assert f"to get clip-b32: ViT-B-32.pt from {weights.known('clip-b32').origin}\n" in out
    assert f"to get {NAME}" not in out


def test_a_fingerprint_is_of_the_values(tmp_path):
    tensors = {"b": torch.randn(3, 2).half(), "a": torch.tensor(2.0), "steps": torch.tensor(7)}
    same = {"a": torch.tensor(2.0), "b": tensors["b"].float()}
    variants = [same, {**same, "a": torch.tensor(2.5)}, {**same, "b": same["b"].T.contiguous()}, {"c": same["a"], "b": same["b"]}]
    save_file(tensors, tmp_path / "first", metadata={"source": "somewhere"})
    first, seen = weights.fingerprint(tmp_path / "first"), set()
    for i, variant in enumerate(variants):
        save_file(variant, tmp_path / str(i))
        seen.add(weights.fingerprint(tmp_path / str(i)))
        assert (weights.fingerprint(tmp_path / str(i)) == first) == (i == 0)
    assert len(seen) == len(variants)


@pytest.mark.parametrize("damage", ["cut", "lacking", "config"])
def test_damaged_weights_are_refused(public, place, damage):
    weights.convert(NAME, public)
    file = place / NAME / WEIGHTS
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "lacking":
        save_file({key: tensor for key, tensor in load_file(file).items() if "fc2" not in key}, file, metadata={"format": "pt"})
    else:
        (place / NAME / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"cannot be loaded .*delete that folder.*convert {NAME} FILE") as caught:
        weights.network(NAME)
    one_line(caught)
    weights.listing()


def test_the_command_answers_mistakes_in_one_line(public, tmp_path, capfd):
    for arguments, words in ((["dinov", str(public)], "did you mean"), ([NAME, str(tmp_path / "gone")], "no file"),
                             (["clip-b32", str(public)], "was not opened")):
        assert run(["weights", "convert", *arguments]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err
    assert run(["weights", "--help"]) == 0
    assert "STEPDISTILL_EVAL_WEIGHTS" in capfd.readouterr().out
