"""Layers in their fast form: BatchNorm whose gradient is differentiated, beside PyTorch's."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsl_sage.experiments.setup import set_up
from fsl_sage.networks.layout import TwiceBatchNorm2d, fast_twice
from tests.support.runs import tiny

SHAPE = 4, 8, 2, 3


class Counts(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, operation, types, args=(), named=None):
        self.of[str(operation)] += not operation.is_view
        return operation(*args, **(named or {}))


def both(dtype=torch.float64, **how):
    plain = nn.BatchNorm2d(8, **how).to(dtype)
    for own in plain.parameters() if plain.affine else ():
        nn.init.normal_(own)
    return plain, fast_twice(deepcopy(plain))


def of_the_gradients(layer, x, grad, v, of_weight, of_bias):
    """Derivatives of a function of all three gradients that the backward pass makes."""
    x, grad = (tensor.clone().requires_grad_() for tensor in (x, grad))
    made = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], grad, create_graph=True)
    return torch.autograd.grad(made, [x, grad, layer.weight], [v, of_weight, of_bias])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_second_derivatives_are_pytorchs(layout):
    plain, twice = both()
    maps = [torch.randn(SHAPE, dtype=torch.float64).to(memory_format=layout) for _ in range(3)]
    given = *maps, torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected, found = (of_the_gradients(layer, *given) for layer in (plain, twice))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert all(map(torch.equal, twice.state_dict().values(), plain.state_dict().values()))


def test_the_second_derivative_has_a_third_of_the_operations():
    counts = []
    for layer in both(torch.float32):
        x, grad = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
        (made,) = torch.autograd.grad(layer(x), x, grad, create_graph=True)
        with Counts() as counted:
            torch.autograd.grad(made, [x, grad, layer.weight], torch.ones(SHAPE))
        counts.append(counted.of.total())
    plain, twice = counts
    assert 3 * twice <= plain and twice <= 25


@pytest.mark.parametrize("enabled", [False, True])
def test_mixed_precision_is_as_near_as_pytorchs(enabled):
    """Measured against float64: bf16 costs the same, fp32 nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    )
    x = torch.randn(16, 8, 4, 4)

    def derivatives(model, x):
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled and x.dtype == torch.float32):
            (made,) = torch.autograd.grad(model(x).pow(2).mean(), x, create_graph=True)
            error = made.square().sum()
        return torch.autograd.grad(error, [model[0].weight, model[1].weight])

    exact = derivatives(deepcopy(net).double(), x.double())
    plain, twice = (
        [float((one - two).norm() / two.norm()) for one, two in zip(derivatives(model, x), exact, strict=True)]
        for model in (net, fast_twice(deepcopy(net)))
    )
    assert all(ours < 1.2 * theirs + 1e-6 for ours, theirs in zip(twice, plain, strict=True)), (plain, twice)


def test_only_what_is_as_usual_is_replaced():
    """No weights, no running statistics or a cumulative average: as they were. In evaluation: as PyTorch."""
    for how in {"affine": False}, {"track_running_stats": False}, {"momentum": None}:
        assert type(both(**how)[1]) is nn.BatchNorm2d
    plain, twice = (layer.eval() for layer in both())
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert type(twice) is TwiceBatchNorm2d and torch.equal(plain(x), twice(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twice.train()(x[:1, :, :1, :1])


def test_auxiliary_models_have_it_and_halves_do_not():
    state = set_up(tiny("fsl_sage", **{"model.name": "resnet18", "model.width": 8}))
    client, server, aux = (
        {type(layer) for layer in parts[0].model.modules()} for parts in (state.clients, state.servers, state.auxes)
    )
    assert TwiceBatchNorm2d in aux and nn.BatchNorm2d not in aux
    assert nn.BatchNorm2d in client & server and TwiceBatchNorm2d not in client | server
