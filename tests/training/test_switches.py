"""Switches that change speed and never the result: memory format and compilation."""

import pytest
import torch
from tiny import final_tensors, tiny_recipe, tiny_run

from stepdistill.training import loop


def trained(tmp_path, name, **options):
    assert loop.start(tiny_recipe(tmp_path, steps=3, ema_decay=0.5, precision="fp64", **options), tmp_path / name).finished
    return {key: value for key, value in final_tensors(tmp_path / name).items() if key.startswith(("role/", "ema/"))}


@pytest.fixture
def dynamo(monkeypatch):
    """torch.compile with everything but the code generator, which takes a minute a network."""
    whole = torch.nn.Module.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))


LORA = {"student": {"rank": 2}, "fake": {"rank": 2}}


@pytest.mark.parametrize(("switch", "lora"), [
    pytest.param("channels_last", {}, id="channels_last-copies"), pytest.param("channels_last", LORA, id="channels_last-adapters"),
    pytest.param("compile", {}, id="compile-copies"), pytest.param("compile", LORA, id="compile-adapters", marks=pytest.mark.slow)])
def test_the_result_is_the_same(tmp_path, dynamo, switch, lora):
    plain, switched = (trained(tmp_path, str(on), lora=lora, **{switch: on}) for on in (False, True))
    assert plain.keys() == switched.keys()
    furthest = max((float((switched[name] - value).abs().max()), name) for name, value in plain.items())
    assert furthest[0] < 1e-9, furthest                                          # Adam's first steps make 1e-4 of a rounding in float32


def test_the_switches_reach_every_network_once(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    run = tiny_run(tmp_path, channels_last=True, compile=True, lora={"fake": {"rank": 2}})
    networks = {id(denoiser.network): denoiser.network for denoiser in run.roles.denoisers.values()}
    assert {id(module) for module in compiled} == set(networks)
    assert len(compiled) == 2                                                    # the teacher with the fake's adapter, and the student
    for network in networks.values():
        kernels = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
