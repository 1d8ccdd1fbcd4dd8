"""Layers that clients keep for themselves: never averaged, never sent, each client judged by its own model."""

import numpy as np
import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import aggregate
from fsl_sage.algorithms.state import FixedData, is_own
from fsl_sage.config.presets import preset
from fsl_sage.costs.clock import simulated_seconds
from fsl_sage.costs.estimate import count
from fsl_sage.data.batches import eval_batches
from fsl_sage.experiments.setup import client_data, prepare, register_of, set_up, shares_of_clients
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from fsl_sage.machines.remote import check_remote
from tests.support.runs import assert_same, stopped_after, tiny

LITTLE = {
    "model.name": "simple_conv", "model.width": 2, "dataset.max_train": 60, "dataset.val_size": 0,
    "dataset.max_test": 40, "model.client.batch_size": 16, "rounds": 2,
}  # fmt: skip
OWN = {
    "fed_avg": ["conv1", "olayer"],
    "sl_multi_server": ["conv1", "olayer"],
    "sl_single_server": ["conv2"],
    "sfl": ["conv1"],
}


def small(algorithm, own=None, **changes):
    return tiny(algorithm, **LITTLE | {"model.own_layers": OWN[algorithm] if own is None else own} | changes)


def test_two_clients_by_hand():
    """With 1 and 3 samples the weights are ¼ and ¾; the own layer stays, and is in no message."""
    data = [FixedData(torch.randn(n, 1, 28, 28), torch.arange(n), 4) for n in (1, 3)]
    run = preset("smoke", "sl_single_server", num_clients=2, **{"model.name": "simple_conv", "model.width": 4})
    state = ALGORITHMS["sl_single_server"].init(run.replace(**{"model.own_layers": ["conv2"]}), data, Ledger())
    first, second = (client.model for client in state.clients)
    with torch.no_grad():
        for model, value in ((first, 1.0), (second, 3.0)):
            model.conv1.bias.fill_(value), model.conv2.bias.fill_(value)
    aggregate(state, 0, ledger := Ledger(), client_model=state.clients)
    assert first.conv1.bias.tolist() == second.conv1.bias.tolist() == [2.5] * 4
    assert first.conv2.bias.tolist() == [1.0] * 4 and second.conv2.bias.tolist() == [3.0] * 4
    assert ledger.bytes("paper") == 4 * 4 * (4 * 25 + 4)  # two clients, two ways, conv1's 104 numbers
    one, two = ALGORITHMS["sl_single_server"].evaluation_models(state)
    assert one.client is first and two.client is second


@pytest.mark.parametrize("algorithm", OWN)
def test_own_layers_differ_and_all_others_are_equal_after_a_round(algorithm):
    experiment = small(algorithm)
    history, state = train_state(experiment, "cpu", progress=False)
    for parts in (state.clients, state.servers):
        first, *others = (part.model.state_dict() for part in parts)
        for other in others:
            assert all(torch.equal(first[n], other[n]) != is_own(experiment, n) for n in first if n.endswith("weight"))
    models = ALGORITHMS[algorithm].evaluation_models(state)
    assert len(models) == 3
    # Each client's accuracy is its own model's, on its own mixture of labels.
    dataset, _ = prepare(experiment, torch.device("cpu"))
    shares, seen = shares_of_clients(client_data(experiment, dataset)).numpy(), []
    for model, own in zip(models, shares, strict=True):
        x, y = next(iter(eval_batches(dataset.test, dataset.mean, dataset.std)))
        right = (model.eval()(x).argmax(1) == y).numpy()
        there = [c for c in range(10) if (y == c).any()]
        by_class = np.array([right[(y == c).numpy()].mean() for c in there])
        seen.append((own[there] * by_class).sum() / own[there].sum())
    last = history.rounds.iloc[-1]
    assert last.client_accuracy_worst == pytest.approx(min(seen), abs=1e-6)
    assert last.client_accuracy_mean == pytest.approx(np.mean(seen), abs=1e-6)


@pytest.mark.parametrize("algorithm", OWN)
def test_what_is_sent_is_priced_and_no_own_layer_is_in_it(algorithm):
    experiment = small(algorithm, **{"clock.spread": 0.5})
    history = train(experiment, "cpu", progress=False)
    register = register_of(set_up(experiment), clock=True)
    simulated_seconds(history, register.samples, register.costs, experiment.clock)  # refuses other bytes than the run's
    plain = train(experiment.replace(**{"model.own_layers": []}), "cpu", progress=False)
    assert history.rounds.paper_bytes.iloc[-1] < plain.rounds.paper_bytes.iloc[-1]
    assert count(experiment)["bytes"] == history.rounds.paper_bytes.iloc[-1]
    assert count(experiment)["evaluation"] == 3 * count(experiment.replace(**{"model.own_layers": []}))["evaluation"]


@pytest.mark.parametrize("attack", ["scaled", "sign_flip"])
def test_a_poisoned_update_leaves_layers_that_are_not_sent_as_they_are(attack):
    liar = {"hostile.clients": [1], "hostile.attack": attack, "hostile.scale": 3.0}
    (_, honest), (_, poisoned) = (
        train_state(small("fed_avg", rounds=1, **more), "cpu", progress=False) for more in ({}, liar)
    )
    for parts in ("clients", "servers"):
        one, other = (getattr(state, parts)[1].model.state_dict() for state in (honest, poisoned))
        assert all(torch.equal(one[n], other[n]) == is_own(honest.experiment, n) for n in one if n.endswith("weight"))


def test_none_is_the_default_and_leaves_hash_and_history():
    plain = small("sl_multi_server", own=[])
    assert "own_layers" not in plain.to_dict()["model"] and plain == small("sl_multi_server", own=())
    assert plain.hash == tiny("sl_multi_server", **LITTLE).hash


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    experiment = small("sl_multi_server", rounds=3)
    whole = train(experiment, "cpu", progress=False)
    stopped_after(2, monkeypatch, experiment, tmp_path / "checkpoint")
    assert_same(train(experiment, "cpu", progress=False, checkpoint=tmp_path / "checkpoint"), whole)


def test_absent_clients_get_the_average_and_keep_their_layers():
    history = train(small("fed_avg", participation=0.5, num_clients=4, rounds=4), "cpu", progress=False)
    assert history.stopped == "rounds"


def test_own_heads_with_labels_at_the_client():
    both = {"model.cut": "conv1", "model.head_cut": "relu4", "model.own_layers": ["olayer"]}
    state = train_state(small("sl_single_server", **both), "cpu", progress=False)[1]
    heads = [client.model.get_submodule("head").olayer.weight for client in state.clients]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(
        *(client.model.get_submodule("bottom").conv1.weight for client in state.clients[:2])
    )


@pytest.mark.parametrize(("algorithm", "changes", "words"), [
    ("cse_fsl", {"model.own_layers": ["conv1"]}, r"left out for 'cse_fsl'; clients of fed_avg"),
    ("psl", {"model.own_layers": ["conv1"]}, r"left out for 'psl'"),
    ("fed_avg", {"model.own_layers": ["olayer"], "algorithm.share_server": True}, "false with model.own_layers"),
    ("sl_multi_server", {"model.own_layers": ["conv1"], "model.cuts": ["conv1", "flatten", "conv1"]}, "own_layers"),
    ("fed_avg", {"model.own_layers": ["h0"], "model.name": "gpt2_tiny", "dataset.name": "e2e"}, "reads text"),
])  # fmt: skip
def test_what_cannot_have_own_layers_is_refused(algorithm, changes, words):
    with pytest.raises(ValueError, match=words):
        preset("smoke", algorithm, **{"model.name": "simple_conv"} | changes)


@pytest.mark.parametrize(("algorithm", "layer", "words"), [
    ("sl_single_server", "olayer", r"model.own_layers='olayer': must be layers of the client's half"),
    ("fed_avg", "fc9", r"model.own_layers='fc9': must be layers with weights"),
])  # fmt: skip
def test_layers_that_are_not_there_are_refused_before_the_first_round(algorithm, layer, words):
    with pytest.raises(ValueError, match=words):
        set_up(small(algorithm, own=[layer]))
    with pytest.raises(ValueError, match="left out between machines"):
        check_remote(small("fed_avg"))
    with pytest.raises(ValueError, match="in_flight"):
        train(small("fed_avg"), "cpu", progress=False, in_flight=1)
