"""A protocol is a value: one hash in every process, another for every change, and it names what it does not know."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from stepdistill.eval import protocol
from stepdistill.eval.extractors import digest, fashion_file
from stepdistill.eval.metrics import Moments


def test_hash_is_the_same_in_another_process():
    code = "from stepdistill.eval import protocol; print(protocol.get('fashion', 500, 3).hash)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123"})
    assert other.stdout.strip() == protocol.get("fashion", 500, 3).hash


def test_hash_is_pinned():
    """Of a value spelled out here, so that a change of the canonical form is noticed."""
    assert protocol.hash_of({"b": [1, 2.5, None], "a": "ü"}) == protocol.hash_of({"a": "ü", "b": [1, 2.5, None]}) == "703dceec79c30480"


def test_every_field_moves_the_hash():
    base = protocol.get("fashion")
    changed = {bool: lambda v: not v, int: lambda v: v + 1, str: lambda v: v + "x", tuple: lambda v: (*v, "x")}
    hashes = {base.hash}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        other = (protocol.Measure("fid", "tiny"),) if field.name == "measures" else changed[type(value)](value)
        hashes.add(dataclasses.replace(base, **{field.name: other}).hash)
    assert len(hashes) == len(dataclasses.fields(base)) + 1
    assert len(base.hash) == 16


def test_round_trip_through_json():
    base = protocol.get("fashion", 300, 7)
    assert protocol.Protocol.from_dict(json.loads(json.dumps(base.to_dict()))) == base
    with pytest.raises(ValueError, match="quantise"):
        protocol.Protocol.from_dict({k: v for k, v in base.to_dict().items() if k != "quantise"})


def test_differing_fields():
    a, b = protocol.get("fashion", 1000, 0), protocol.get("fashion", 2000, 0)
    assert protocol.differing_fields(a, b) == {"count": (1000, 2000)}
    assert protocol.differing_fields(a, a.to_dict()) == {}


def test_unknown_names_and_small_counts_are_refused():
    with pytest.raises(ValueError, match="did you mean 'fashion'"):
        protocol.get("fashon")
    with pytest.raises(ValueError, match="at least 50 pictures"):
        protocol.get("fashion", 49)


def test_groups_follow_the_count():
    assert [protocol.get("fashion", n).groups for n in (50, 100, 250, 10000)] == [5, 10, 25, 25]


def test_names_the_files_it_was_measured_with():
    p = protocol.get("fashion")
    assert p.extractor_sha256 == digest(fashion_file("classifier.safetensors", ""))
    assert p.reference_sha256 == digest(fashion_file("reference.safetensors", ""))


def test_reference_and_floor():
    """The kept features belong to the kept moments, and real pictures are close to real pictures."""
    reference = protocol.fashion_reference()
    assert (reference.train.n, reference.test.n) == (60000, 10000)
    assert reference.test_features.shape == reference.train_features.shape == (10000, 64)
    assert reference.test_labels.bincount().tolist() == [1000] * 10
    kept = Moments.of(reference.test_features)
    torch.testing.assert_close(kept.mean, reference.test.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(kept.cov, reference.test.cov, rtol=0, atol=1e-4)
    assert 0 < protocol.floor() < 0.05
    assert fashion_file("reference.safetensors", "").stat().st_size < 3e6


def test_missing_file_names_the_remedy():
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors is missing.*scripts/make_reference\.py"):
        fashion_file("nothing.safetensors", "scripts/make_reference.py")
