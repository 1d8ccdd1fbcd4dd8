"""Clients without back-propagation: what their papers' definitions promise, without a reference code."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.optimisers import make_part
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.algorithms.zeroth import addresses_of, directions_of, step_along, two_point_step
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.parts import OptimizerConfig
from fsl_sage.config.presets import preset
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger

ZEROTH = ("heron_sfl", "ho_sfl", "hosl")
SMALL = {"model.name": "simple_conv", "model.width": 4, "dataset.max_train": 120, "dataset.distribution": "iid"}


def linear(weight, rate=1.0):
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    model.weight.data = weight.clone()
    return make_part(model, OptimizerConfig("sgd", lr=rate))


def federation(algorithm, n=2, **changes):
    """Linear clients and a linear server in float64; a loss that is quadratic in the client's weights."""
    draw = torch.Generator().manual_seed(1)
    x, weight, server = (torch.randn(size, generator=draw).double() for size in ((4, 3), (3, 3), (2, 3)))
    data = [FixedData(x, torch.zeros(4, dtype=torch.long), 4, num_classes=2) for _ in range(n)]
    run = Experiment(num_clients=n).replace(**{"algorithm.name": algorithm} | changes)
    clients, auxes = [linear(weight) for _ in data], [linear(server) for _ in data] if algorithm == "heron_sfl" else []
    return State(run, data, clients, [linear(server, 1e-300)], auxes), weight, server, x


def quadratic(logits, labels, reduction="mean"):
    return logits.square().sum(1).mean()


@pytest.mark.parametrize("algorithm", ZEROTH)
def test_on_a_quadratic_loss_the_mean_step_is_the_gradients(algorithm, monkeypatch):
    """One client, one step a round, η = 1: over many rounds the steps' mean is −∂L/∂w, within its standard error."""
    monkeypatch.setattr(State, "criterion", property(lambda state: quadratic))
    state, weight, server, x = federation(algorithm, n=1, **{"algorithm.directions": 1})
    exact = weight.clone().requires_grad_()
    quadratic(x @ exact.T @ server.T, None).backward()
    estimates = []
    for rnd in range(1500):
        ALGORITHMS[algorithm].run_round(state, rnd, Ledger())
        estimates.append(weight - state.clients[0].model.weight.detach())
        for part, before in ((state.clients[0], weight), *((aux, server) for aux in state.auxes)):
            part.model.weight.data.copy_(before)
    estimates = torch.stack(estimates)
    bias = 0.002 * exact.grad.abs().max()  # of one-sided differences, ~ μ times the curvature
    away = ((estimates.mean(0) - exact.grad).abs() - bias).clamp_min(0) / (estimates.std(0) / len(estimates) ** 0.5)
    assert away.max() < 5
    assert exact.grad.norm() > 20 * bias


def test_a_two_point_step_is_exact_on_a_quadratic_loss_along_each_direction():
    weight, x = torch.randn(3, 3).double(), torch.randn(4, 3).double()
    part = linear(weight)
    addresses = [(0, "u", p) for p in range(3)]
    (gradient,) = torch.autograd.grad(quadratic(part.model(x), None), part.model.parameters())
    units = [next(directions_of([part], address))[2] for address in addresses]
    expected = weight - sum((gradient * u).sum() * u for u in units) / 3
    two_point_step(lambda: quadratic(part.model(x), None), [part], addresses, 1e-3)
    torch.testing.assert_close(part.model.weight.data, expected, rtol=1e-8, atol=1e-9)
    assert part.model.weight.grad is None


def test_clients_of_ho_sfl_stay_equal_to_the_last_bit_and_send_no_model():
    run = preset("smoke", "ho_sfl", **{"dataset.max_train": 200, "dataset.distribution": "noniid_dirichlet"})
    history, state = train_state(run, "cpu", progress=False)
    first, *others = (client.model.state_dict() for client in state.clients)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    sent = history.ledger[history.ledger.phase == "round"]
    assert "client_model" not in set(sent.kind) and {"scalars", "cut_grad"} <= set(sent.kind)
    fresh = train_state(run.replace(rounds=1, **{"model.client.optimizer.lr": 1e-12}), "cpu", progress=False)[1]
    pairs = zip(fresh.clients[0].model.parameters(), state.clients[0].model.parameters(), strict=True)
    assert not all(torch.allclose(one, other, atol=1e-7) for one, other in pairs)


def test_equal_seeds_give_equal_directions_wherever_they_are_drawn():
    client, other = (linear(torch.zeros(2, 3).double()) for _ in range(2))
    config = preset("smoke", "ho_sfl").algorithm
    addresses, slopes = addresses_of(200, config, 5, 1), torch.tensor([1.0, -2.0])
    step_along([client], addresses, slopes)
    step_along([other], addresses, slopes)
    assert torch.equal(client.model.weight, other.model.weight)
    places = (client, addresses[0]), (other, addresses[0]), (other, addresses_of(200, config, 5, 2)[0])
    ours, theirs, next_step = (next(directions_of([part], address))[2] for part, address in places)
    assert torch.equal(ours, theirs) and not torch.equal(ours, next_step)


@pytest.mark.parametrize("algorithm", ZEROTH)
def test_a_client_never_has_a_gradient(algorithm):
    state = train_state(preset("smoke", algorithm, rounds=1, **SMALL), "cpu", progress=False)[1]
    for part in (*state.clients, *state.auxes):
        assert all(parameter.grad is None for parameter in part.model.parameters()) and not part.optimizer.state
    assert any(parameter.grad is not None for parameter in state.servers[0].model.parameters())


def test_bytes_of_a_round_by_hand():
    """120 images at 3 clients in batches of 32: two steps each, of 32 and 8 images; P = 2; simple_conv of width 4."""
    for algorithm, up, down in (("ho_sfl", {"smashed": 1, "scalars": 2}, {"cut_grad": 1, "scalars": 2}),
                                ("hosl", {"smashed": 3}, {"scalars": 2})):  # fmt: skip
        ledger = train(preset("smoke", algorithm, rounds=1, **SMALL), "cpu", progress=False).ledger
        sent = ledger[ledger.phase == "round"].set_index(["direction", "kind"])["bytes"]
        model = train_state(preset("smoke", algorithm, rounds=1, **SMALL), "cpu", progress=False)[1].clients[0].model
        sample = 4 * model(torch.zeros(1, 1, 28, 28)).numel()
        for way, kinds in (("up", up), ("down", down)):
            for kind, times in kinds.items():
                assert sent[way, kind] == times * (3 * 2 * 4 if kind == "scalars" else 120 * sample), (algorithm, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"defence.clip": 1.0, "defence.noise": 0.1},
        {"defence.drop": 0.1},
        {"codec.smashed.name": "random_top_k"},
        {"codec.smashed.bits": 4, "codec.smashed.stochastic": True},
        {"dataset.name": "restaurants", "model.name": "gpt2_tiny", "model.adapter": {"rank": 2, "dropout": 0.1}},
    ],
)
def test_hosl_refuses_draws_that_hide_its_differences(changes):
    """Noise of 0.05 C made its slopes six times as long, dropout thirty times."""
    changes = SMALL | changes
    with pytest.raises(
        ValueError,
        match="left out for 'hosl': draws in each upload would hide the small differences that it learns from",
    ):
        preset("smoke", "hosl", **changes)
    preset("smoke", "ho_sfl", **changes)


def test_their_clients_have_plain_sgd_at_the_rate_of_the_configuration():
    run = preset("smoke", "heron_sfl", **{"model.client.optimizer": {"name": "adam", "lr": 0.25}})
    client, aux, server = (getattr(run.model, part).optimizer for part in ("client", "auxiliary", "server"))
    assert (client.name, client.lr, aux.name, server.name) == ("sgd", 0.25, "sgd", "adam")


def test_a_step_leaves_the_weights_where_they_were_if_the_loss_is_flat():
    part = linear(torch.randn(5, 5).double())
    before = deepcopy(part.model.weight)
    two_point_step(lambda: torch.tensor(1.0), [part], [(0, "u", p) for p in range(8)], 1e-3)
    torch.testing.assert_close(part.model.weight, before, rtol=0, atol=1e-12)
