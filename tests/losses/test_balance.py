"""Terms weighed by gradients at the last layer: by hand on a linear one, and the sum's gradient is that of the weighed terms."""

import pytest
import torch
from toys import Mlp, tiny_dit, tiny_unet

from stepdistill.losses.balance import FLOOR, ratio, weighed
from stepdistill.models.denoiser import last_layer


def test_the_ratio_by_hand():
    """raw = h·W^T, one term linear in raw and one in its square: d/dW is a·mean h, and 2·mean raw·h."""
    h, weight = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64), torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    weight.requires_grad_()
    raw = h @ weight.T                                                                              # -1.5 and 1.5
    value, found = weighed(raw, weight, {"linear": 3 * raw.mean(), "square": raw.square().mean()}, {"linear": 2.0, "square": 5.0})
    assert float(value.detach()) == pytest.approx(2 * 0 + 5 * 2.25)
    assert found["linear"].tolist() == [[6.0, 3.0]]                                                 # 3·(2, 1)
    assert found["square"].tolist() == [[3.0, -3.0]]                                                # (-1.5·(1, 2) + 1.5·(3, 0))
    assert ratio(found["linear"], found["square"]) == pytest.approx(45**0.5 / (18**0.5 + FLOOR))
    assert ratio(found["linear"], torch.zeros(1)) == pytest.approx(45**0.5 / 1e-4)
    value.backward()
    assert weight.grad.tolist() == [[2 * 6.0 + 5 * 3.0, 2 * 3.0 - 5 * 3.0]]


def test_the_whole_gradient_is_that_of_the_weighed_terms():
    """Through every layer before, and with terms that share what comes after the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, after = Mlp(2, 8).double(), torch.nn.Linear(2, 2).double().requires_grad_(False)
    x, t = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 5).double()

    def made():
        raw = net(x, t)[0]
        shared = after(raw).tanh()
        return raw, {"a": shared.square().mean(), "b": shared.sum().exp(), "c": raw.abs().mean()}

    weights, parameters = {"a": 1.0, "b": 0.3, "c": -2.0}, list(net.parameters())
    _, terms = made()
    plain = sum(weights[name] * term for name, term in terms.items())
    expected = torch.autograd.grad(plain, parameters, retain_graph=True)
    raw, again = made()
    value, at_last = weighed(raw, net.leave.weight, again, weights)
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, parameters), expected)
    for name, term in terms.items():
        torch.testing.assert_close(at_last[name], torch.autograd.grad(term, net.leave.weight, retain_graph=True)[0])
    with torch.no_grad():
        raw, terms = made()
    value, at_last = weighed(raw, net.leave.weight, terms, weights)
    assert float(value) == pytest.approx(float(plain.detach()), rel=1e-12)
    assert at_last == {}


def test_the_last_layer_is_known_by_its_name():
    unet, dit = tiny_unet(), tiny_dit()
    assert last_layer(unet) is unet.conv_out.weight
    assert last_layer(dit) is dit.proj_out_2.weight
    with pytest.raises(ValueError, match="Linear has no last layer by the name of conv_out"):
        last_layer(torch.nn.Linear(1, 1))
    unet.compile(backend="eager")
    with pytest.raises(ValueError, match="set compile: false"):
        last_layer(unet)
