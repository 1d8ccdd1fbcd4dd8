"""Remedies for unequal labels: by hand, at the setting that is the base algorithm, after a stop, and refused."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.optimisers import make_part
from fsl_sage.algorithms.scala import log_shares, sizes_in_step
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.parts import OptimizerConfig
from fsl_sage.config.presets import preset
from fsl_sage.experiments.setup import client_memory_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from fsl_sage.machines.remote import check_remote
from tests.support.runs import assert_same, stopped_after, tiny

LITTLE = {
    "model.name": "simple_conv", "model.width": 2, "model.cut": None, "dataset.max_train": 60, "dataset.val_size": 0,
    "dataset.max_test": 20, "model.client.batch_size": 16,
}  # fmt: skip
SGD = {"model.client.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0}}
REMEDIES = ("scaffold", "scala", "cycle_psl", "cycle_sfl", "mix2sfl")


def small(algorithm, **changes):
    return tiny(algorithm, **LITTLE | changes)


def linear(weight, rate=0.5):
    model = nn.Linear(len(weight[0]), len(weight), bias=False).double()
    model.weight.data = torch.tensor(weight, dtype=torch.double)
    return make_part(model, OptimizerConfig("sgd", lr=rate))


def federation(algorithm, labels, **settings):
    """Clients of two weights, all alike, a server of three classes; a batch a client."""
    draw = torch.Generator().manual_seed(2)
    data = [
        FixedData(torch.randn(len(own), 2, generator=draw).double(), torch.tensor(own), len(own), num_classes=3)
        for own in labels
    ]
    changes = {f"algorithm.{name}": value for name, value in settings.items()}
    own = SGD if algorithm == "scaffold" else {}
    run = Experiment(num_clients=len(data)).replace(**own | {"algorithm.name": algorithm} | changes)
    clients = [linear([[1.0, 0.5], [-0.5, 1.0]]) for _ in data]
    return State(run, data, clients, [linear([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])])


def joint(state):
    """Weights of client and server, all smashed data, all labels, the batches' lengths."""
    w_c, w_s = (part.model.weight.detach().clone() for part in (state.clients[0], state.servers[0]))
    x, y = torch.cat([own.x for own in state.data]), torch.cat([own.y for own in state.data])
    return w_c, w_s, x, (x @ w_c.T).requires_grad_(), y, [len(own) for own in state.data]


def expect(state, server, cut_grads):
    """After one step at rate ½: the server's weights, and each client's before an average."""
    torch.testing.assert_close(state.servers[0].model.weight.detach(), server)
    for client, own, grad in zip(state.clients, state.data, cut_grads, strict=True):
        w_c = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.double)
        torch.testing.assert_close(client.model.weight.detach(), w_c - 0.5 * grad.T @ own.x)


# Baselines: the setting at which nothing is added.


def learnt(history):
    return history.rounds[["test_accuracy", "test_loss", "train_loss", "paper_bytes", "wire_bytes"]]


@pytest.mark.parametrize(("remedy", "base", "off"), [
    ("scaffold", "sl_single_server", {"algorithm.control": 0.0}),
    ("mix2sfl", "sfl", {"algorithm.mix_weight": 0.0}),
])  # fmt: skip
def test_switched_off_a_remedy_is_its_base_to_the_last_bit(remedy, base, off):
    experiment = small(remedy, **SGD)
    runs = experiment.replace(**off), experiment.replace(**{"algorithm.name": base}), experiment
    without, as_base, with_remedy = (learnt(train(run, "cpu", progress=False)) for run in runs)
    pd.testing.assert_frame_equal(without, as_base, check_exact=True)
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(with_remedy, as_base)


@pytest.mark.parametrize("per_client", [False, True])
def test_with_equal_shares_of_labels_scala_is_sfl_to_the_last_bit(per_client):
    weights = []
    for name in ("sfl", "scala"):
        state = federation(name, [[0, 1, 2], [2, 0, 1, 1, 2, 0]], per_client_loss=per_client)
        metrics = ALGORITHMS[name].run_round(state, 0, Ledger())
        weights.append([*(part.model.weight for part in state.parts), metrics.losses[0].value])
    assert all(map(torch.equal, *weights))


# By hand: two clients.


def test_scala_by_hand(monkeypatch):
    monkeypatch.setattr("fsl_sage.algorithms.scala.aggregate", lambda *args, **groups: None)
    state = federation("scala", [[0, 0, 1], [2, 0]], per_client_loss=True)
    w_c, w_s, _, z, y, sizes = joint(state)
    ALGORITHMS["scala"].run_round(state, 0, ledger := Ledger())
    shares = torch.tensor([3 / 5, 1 / 5, 1 / 5]), torch.tensor([2 / 3, 1 / 3, 0]), torch.tensor([1 / 2, 0, 1 / 2])
    adjusted = [(share.double() + 1e-8).log() for share in shares]
    server = w_s.clone().requires_grad_()
    F.cross_entropy(z.detach() @ server.T + adjusted[0], y).backward()
    grads = []
    for own, share, labels in zip(z.split(sizes), adjusted[1:], y.split(sizes), strict=True):
        alone = own.detach().requires_grad_()
        F.cross_entropy(alone @ w_s.T + share, labels).backward()
        grads.append(alone.grad)
    torch.testing.assert_close(state.servers[0].model.weight.detach(), w_s - 0.5 * server.grad, rtol=1e-5, atol=1e-7)
    for client, own, grad in zip(state.clients, state.data, grads, strict=True):
        torch.testing.assert_close(client.model.weight.detach(), w_c - 0.5 * grad.T @ own.x, rtol=1e-5, atol=1e-7)
    assert ledger.bytes("paper") == 2 * 5 * 2 * 8  # smashed data and gradients: five samples of two numbers


@pytest.mark.parametrize("per_client", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_cycle_psl_by_hand_with_one_minibatch_as_large_as_the_pool(epochs, per_client):
    """SplitAvg's concatenation, with the gradients taken after the server's steps."""
    options = {"server_batch_size": 99, "server_epochs": epochs, "per_client_loss": per_client}
    state = federation("cycle_psl", [[0, 0, 1], [2, 0]], **options)
    _, w_s, _, z, y, sizes = joint(state)
    ALGORITHMS["cycle_psl"].run_round(state, 0, Ledger())
    for _ in range(epochs):
        server = w_s.clone().requires_grad_()
        F.cross_entropy(z.detach() @ server.T, y).backward()
        w_s = w_s - 0.5 * server.grad
    F.cross_entropy(z @ w_s.T, y).backward()
    expect(state, w_s, [own * (len(y) / len(own) if per_client else 1) for own in z.grad.split(sizes)])


def test_a_pool_is_learnt_in_shuffled_minibatches_and_each_sample_once_in_a_pass():
    seen = []
    state = federation("cycle_psl", [[0, 0, 1], [2, 0]], server_batch_size=2, server_epochs=2)
    state.servers[0].model.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0].detach().clone()))
    ALGORITHMS["cycle_psl"].run_round(state, 0, Ledger())
    *minibatches, pool = seen
    assert [len(one) for one in minibatches] == [2, 2, 1] * 2 and len(pool) == 5
    passes = [torch.cat(minibatches[:3]), torch.cat(minibatches[3:])]
    assert all(torch.equal(one.sort(0)[0], pool.sort(0)[0]) and not torch.equal(one, pool) for one in passes)
    assert not torch.equal(*passes)


def test_cycle_sfl_is_cycle_psl_with_an_average():
    states = {name: federation(name, [[0, 0, 1], [2, 0]]) for name in ("cycle_psl", "cycle_sfl")}
    for name, state in states.items():
        ALGORITHMS[name].run_round(state, 0, Ledger())
    one, two = (part.model.weight for part in states["cycle_psl"].clients)
    for part in states["cycle_sfl"].clients:
        torch.testing.assert_close(part.model.weight, 0.6 * one + 0.4 * two)


def test_mix2sfl_by_hand(monkeypatch):
    """The server's gradient has the mixtures' loss, the clients' has not; all active clients get one average."""
    monkeypatch.setattr("fsl_sage.algorithms.mix2sfl.aggregate", lambda *args, **groups: None)
    mixtures = []

    def kept(*args):
        mixtures.append(ring(*args))
        return mixtures[-1]

    from fsl_sage.algorithms import mix2sfl

    ring = mix2sfl.ring_mixtures
    monkeypatch.setattr(mix2sfl, "ring_mixtures", kept)
    state = federation("mix2sfl", [[0, 1], [2, 0]], mix_weight=0.5, active_fraction=1.0)
    _, w_s, _, z, y, sizes = joint(state)
    ALGORITHMS["mix2sfl"].run_round(state, 0, Ledger())
    server, (mixed, targets) = w_s.clone().requires_grad_(), mixtures[0]
    F.cross_entropy(z @ w_s.T, y).backward()
    (F.cross_entropy(z.detach() @ server.T, y) + 0.5 * F.cross_entropy(mixed @ server.T, targets)).backward()
    mean = sum(z.grad.split(sizes)) / 2
    expect(state, w_s - 0.5 * server.grad, [mean, mean])
    first, second = z.detach().split(sizes)
    share = ((mixed[:2] - second) / (first - second)).flatten()
    assert torch.allclose(share, share[0]) and 0 < share[0] < 1  # one λ for a pair
    assert torch.allclose(targets.sum(1), torch.ones(4).double())


def test_scaffold_by_hand_for_two_rounds():
    """Weights n_i/n everywhere; c_i is the mean of a client's plain gradients."""
    state = ALGORITHMS["scaffold"].init(small("scaffold", num_clients=2, **SGD | {
        "model.client.optimizer.weight_decay": 0.0, "model.client.epoch": 2}), [
        FixedData(torch.randn(n, 1, 28, 28), torch.arange(n), n) for n in (2, 6)], Ledger(phase="start"))  # fmt: skip
    plain, steps = {0: [], 1: []}, {}
    for i, part in enumerate(state.clients):
        optimizer_step = part.optimizer.step
        steps[i] = optimizer_step
        backward = part.step

        def noting(loss, gradient=None, part=part, i=i, backward=backward):
            shift, part.correction = part.correction, None
            parameters = list(part.model.parameters())
            plain[i].append(torch.autograd.grad(loss, parameters, gradient, retain_graph=True))
            part.correction = shift
            backward(loss, gradient)

        part.step = noting
    control = {name: torch.zeros_like(c) for name, c in state.control.items()}
    for rnd in range(2):
        for notes in plain.values():
            notes.clear()
        before = [dict(client.model.named_parameters()) for client in state.clients]
        start = {name: p.detach().clone() for name, p in before[0].items()}
        own = [dict(one) for one in state.own_controls]
        ALGORITHMS["scaffold"].run_round(state, rnd, Ledger())
        means = [{name: sum(step[k] for step in plain[i]) / 2 for k, name in enumerate(start)} for i in (0, 1)]
        for i in (0, 1):
            for name in start:
                torch.testing.assert_close(state.own_controls[i][name], means[i][name], rtol=1e-3, atol=2e-5)
        moved = [{n: start[n] - 0.05 * 2 * (means[i][n] + control[n] - own[i][n]) for n in start} for i in (0, 1)]
        control = {name: means[0][name] / 4 + 3 * means[1][name] / 4 for name in start}
        for name in start:
            torch.testing.assert_close(state.control[name], control[name], rtol=1e-3, atol=2e-5)
            average = moved[0][name] / 4 + 3 * moved[1][name] / 4
            torch.testing.assert_close(before[0][name].detach(), average, rtol=1e-4, atol=1e-5)


def test_absent_clients_keep_their_control_variates():
    experiment = small("scaffold", participation=0.5, num_clients=4, rounds=4)
    history, state = train_state(experiment, "cpu", progress=False)
    total = sum(map(len, state.data))
    for name, c in state.control.items():
        mean = sum(len(own) / total * one[name] for own, one in zip(state.data, state.own_controls, strict=True))
        torch.testing.assert_close(c, mean, rtol=1e-4, atol=1e-6)
    sent = history.ledger.query("kind == 'control'").groupby("direction").bytes.sum()
    assert sent["up"] == sent["down"] == 4 * 2 * sum(c.nbytes for c in state.control.values())


def test_a_client_of_scaffold_holds_three_more_halves():
    one, two = (client_memory_of(small("scaffold", **{"algorithm.control": part})) for part in (0.0, 1.0))
    half = sum(p.nbytes for p in set_up(small("scaffold")).clients[0].model.parameters())
    assert two.models - one.models == two.peak - one.peak == 3 * half


# Batches as large as the data.


def test_unequal_clients_of_scala_make_equally_many_steps():
    experiment = small("scala", **{"dataset.size_spread": 0.7, "model.client.epoch": 2, "dataset.max_train": 90})
    state = set_up(experiment)
    of_each = [[len(y) for _, _, y in state.batches(i, 0)] for i in range(3)]
    assert len({len(own) for own in of_each}) == 1 and len({*map(len, state.data)}) > 1
    assert [sum(own) for own in of_each] == [2 * len(own) for own in state.data]
    for sizes in zip(*of_each, strict=True):
        shares = [size / len(own) for size, own in zip(sizes, state.data, strict=True)]
        assert max(shares) - min(shares) < 1.01 / min(map(len, state.data))
    history = train(experiment, "cpu", progress=False)
    assert history.stopped == "rounds"


def test_a_client_with_too_few_samples_for_the_steps_is_refused():
    with pytest.raises(ValueError, match=r"model.client.batch_size=2: must be such that .*client 0 has 3\)"):
        sizes_in_step([3, 40], 2)
    assert sizes_in_step([3, 40], 16) == [[2, 1], [30, 10]]
    assert log_shares(torch.tensor([1]), 2)[0] == pytest.approx(-18.42, abs=0.01)


# What holds for all of them.


@pytest.mark.parametrize("algorithm", REMEDIES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(algorithm, tmp_path, monkeypatch):
    experiment = small(algorithm)
    whole = train(experiment, "cpu", progress=False)
    stopped_after(1, monkeypatch, experiment, tmp_path / "checkpoint")
    assert_same(train(experiment, "cpu", progress=False, checkpoint=tmp_path / "checkpoint"), whole)


@pytest.mark.parametrize("algorithm", REMEDIES)
def test_what_cannot_be_is_refused_before_the_first_round(algorithm):
    with pytest.raises(ValueError, match=r"algorithm.name=.*another one between machines"):
        check_remote(small(algorithm))
    with pytest.raises(ValueError, match=r"model.head_cut"):
        small(algorithm, **{"model.cut": "conv1", "model.head_cut": "norm2"})
    with pytest.raises(ValueError, match=r"model.cuts"):
        small(algorithm, **{"model.cuts": ["conv1", "flatten", "conv1"]})
    if algorithm != "scaffold":
        with pytest.raises(ValueError, match=r"model.name='gpt2_tiny'"):
            preset("smoke", algorithm, **{"model.name": "gpt2_tiny", "dataset.name": "restaurants"})


@pytest.mark.parametrize("algorithm", REMEDIES)
def test_smashed_data_may_be_packed(algorithm):
    experiment = small(algorithm, rounds=1, **{"codec.smashed.bits": 8, "codec.cut_grad.bits": 8})
    packed, plain = (train(one, "cpu", progress=False) for one in (experiment, small(algorithm, rounds=1)))
    sent = [one.ledger.groupby("kind").bytes.sum() for one in (packed, plain)]
    assert sent[0].smashed < 0.3 * sent[1].smashed and sent[0].cut_grad < 0.3 * sent[1].cut_grad


@pytest.mark.parametrize(("optimizer", "words"), [
    ({"name": "adam"}, r"model.client.optimizer.name='adam': must be 'sgd' for 'scaffold'"),
    ({"momentum": 0.9}, r"model.client.optimizer.momentum=0.9: must be 0 for 'scaffold'"),
    ({"scheduler": {"name": "warmup_linear"}}, r"scheduler.name='warmup_linear': must be a schedule in rounds"),
])  # fmt: skip
def test_scaffold_is_for_plain_sgd(optimizer, words):
    with pytest.raises(ValueError, match=words):
        preset("smoke", "scaffold", **{f"model.client.optimizer.{name}": value for name, value in optimizer.items()})
