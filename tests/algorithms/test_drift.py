"""A proximal term and an interval between averages: by hand, at their defaults, after a stop, and refused."""

import pandas as pd
import pytest
import torch
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.baselines import splitfed_round
from fsl_sage.algorithms.optimisers import make_part
from fsl_sage.algorithms.participation import take_part
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.parts import OptimizerConfig
from fsl_sage.config.presets import preset
from fsl_sage.costs.clock import simulated_seconds
from fsl_sage.costs.estimate import count
from fsl_sage.experiments.setup import client_memory_of, register_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from fsl_sage.machines.remote import check_remote
from tests.support.runs import assert_same, stopped_after, tiny

FIELDS = ("proximal", "average_every")
DRIFTING = [name for name, record in ALGORITHMS.items() if set(FIELDS) <= set(vars(record.settings()))]


LITTLE = {
    "model.name": "simple_conv", "model.width": 2, "dataset.max_train": 60, "dataset.val_size": 0,
    "dataset.max_test": 20, "model.client.batch_size": 16,
}  # fmt: skip


def small(algorithm, **changes):
    return tiny(algorithm, **LITTLE | changes)


def linear(weight):
    model = nn.Linear(len(weight[0]), len(weight), bias=False).double()
    model.weight.data = torch.tensor(weight, dtype=torch.double)
    return make_part(model, OptimizerConfig("sgd", lr=0.5))


def squares(logits, labels, reduction="mean"):
    return (logits - labels).square().sum() / 2


def by_hand(**settings):
    """Two clients w = 1 with targets 0 and 3, two steps a round at rate ½, one server 1·z that stands still."""
    changes = {"algorithm.name": "sl_multi_server", "model.client.epoch": 2}
    changes |= {f"algorithm.{name}": value for name, value in settings.items()}
    run = Experiment(num_clients=2).replace(**changes)
    one = torch.ones(1, 1, dtype=torch.double)
    data = [FixedData(one, torch.tensor([a], dtype=torch.double), 1, num_classes=1) for a in (0.0, 3.0)]
    servers = [linear([[1.0]]) for _ in data]
    for server in servers:
        server.model.requires_grad_(False)
    return State(run, data, [linear([[1.0]]) for _ in data], servers)


def weights(state):
    return [client.model.weight.item() for client in state.clients]


def a_round(state, rnd, monkeypatch):
    monkeypatch.setattr(State, "criterion", property(lambda state: squares))
    ledger = Ledger()
    take_part(state, [0, 1], rnd, ledger)
    splitfed_round(state, rnd, ledger)
    return ledger


def stepped(w, a, strength):
    start = w
    for _ in range(2):
        w -= 0.5 * (w - a + strength * (w - start))
    return w


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_proximal_term_by_hand(strength, monkeypatch):
    state, w = by_hand(proximal=strength), 1.0
    for rnd in range(3):
        a_round(state, rnd, monkeypatch)
        w = (stepped(w, 0.0, strength) + stepped(w, 3.0, strength)) / 2
        assert weights(state) == pytest.approx([w, w], rel=1e-12)


def test_the_interval_by_hand(monkeypatch):
    """Averaged after rounds 2 and 5 alone; no model is sent in the others."""
    state, own = by_hand(average_every=3), [1.0, 1.0]
    for rnd in range(6):
        kinds = {transfer.kind for transfer in a_round(state, rnd, monkeypatch).transfers}
        own = [stepped(w, a, 0.0) for w, a in zip(own, (0.0, 3.0), strict=True)]
        own = [sum(own) / 2] * 2 if rnd in (2, 5) else own
        assert weights(state) == pytest.approx(own, rel=1e-12)
        assert ("client_model" in kinds) == (rnd in (2, 5))
        assert len(ALGORITHMS["sl_multi_server"].evaluation_models(state)) == (1 if rnd in (2, 5) else 2)


def test_which_algorithms_have_the_fields():
    names = ["sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage", "sage_split_lr", "sfl"]
    assert set(names) <= set(DRIFTING)


@pytest.mark.parametrize("algorithm", DRIFTING)
def test_defaults_are_left_out_of_the_hash_and_a_weak_pull_changes_little(algorithm):
    plain = small(algorithm)
    same = plain.replace(**{"algorithm.proximal": 0.0, "algorithm.average_every": 1})
    assert same == plain and same.hash == plain.hash and not {*FIELDS} & {*plain.to_dict()["algorithm"]}
    pulled = train_state(plain.replace(**{"algorithm.proximal": 10.0}), "cpu", progress=False)[1]
    left = train_state(plain, "cpu", progress=False)[1]
    start = set_up(plain).clients[0]

    def moved(state):
        pairs = zip(state.clients[0].model.parameters(), start.model.parameters(), strict=True)
        return sum((one - other).square().sum().item() for one, other in pairs)

    assert 0 < moved(pulled) < moved(left)


@pytest.mark.parametrize("algorithm", DRIFTING)
def test_an_interval_is_priced_as_it_is_sent_and_evaluates_one_model_per_client(algorithm):
    experiment = small(algorithm, rounds=4, **{"algorithm.average_every": 2, "clock.spread": 0.5})
    history, state = train_state(experiment, "cpu", progress=False)
    sent = history.ledger.query("kind == 'client_model' and phase == 'round'")
    assert set(sent["round"]) == {1, 3}
    register = register_of(set_up(experiment), clock=True)
    simulated_seconds(history, register.samples, register.costs, experiment.clock)  # refuses other bytes than the run's
    assert count(experiment)["bytes"] == history.rounds.paper_bytes.iloc[-1]
    assert len(ALGORITHMS[algorithm].evaluation_models(state)) == 1


@pytest.mark.parametrize("changes", [{"average_every": 2}, {"proximal": 0.5, "average_every": 3}])
@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(algorithm, changes, tmp_path, monkeypatch):
    experiment = small(algorithm, rounds=4, **{f"algorithm.{name}": value for name, value in changes.items()})
    whole = train(experiment, "cpu", progress=False)
    stopped_after(2, monkeypatch, experiment, tmp_path / "checkpoint")
    assert_same(train(experiment, "cpu", progress=False, checkpoint=tmp_path / "checkpoint"), whole)


def test_a_pull_does_not_depend_on_how_many_clients_are_on_the_device():
    experiment = small("cse_fsl", **{"algorithm.proximal": 0.5})
    assert_same(train(experiment, "cpu", progress=False, in_flight=1), train(experiment, "cpu", progress=False))


def test_labels_at_the_client_and_a_pull_go_together():
    both = {"model.cut": "conv1", "model.head_cut": "norm2", "algorithm.proximal": 5.0}
    pulled = train(small("sl_multi_server", **both), "cpu", progress=False).rounds
    left = train(small("sl_multi_server", **both | {"algorithm.proximal": 0.0}), "cpu", progress=False).rounds
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(pulled, left)


def test_a_client_holds_where_it_began():
    plain = preset("smoke", "sl_single_server")
    one, two = (client_memory_of(plain.replace(**{"algorithm.proximal": mu})) for mu in (0.0, 0.1))
    half = sum(p.nbytes for p in set_up(plain).clients[0].model.parameters())
    assert two.models - one.models == two.peak - one.peak == half


@pytest.mark.parametrize(("changes", "words"), [
    ({"participation": 0.5}, "participation=0.5: must be 1 for average_every=2"),
    ({"clock.deadline": 60.0}, "algorithm.average_every=2: must be 1 with clock.deadline"),
    ({"model.cuts": ["layer1", "layer2", "layer3"]}, "must be 1 with model.cuts"),
    ({"algorithm.average_every": 0}, "at least 1"),
    ({"algorithm.proximal": -0.1}, "algorithm.proximal"),
])  # fmt: skip
def test_what_an_interval_cannot_do_is_refused_before_the_first_round(changes, words):
    with pytest.raises(ValueError, match=words):
        preset("smoke", "sl_multi_server", **{"algorithm.average_every": 2} | changes)


def test_an_interval_needs_all_clients_on_the_device_and_one_machine():
    experiment = small("sl_single_server", **{"algorithm.average_every": 2})
    with pytest.raises(ValueError, match="in_flight"):
        train(experiment, "cpu", progress=False, in_flight=1)
    with pytest.raises(ValueError, match="1 between machines"):
        check_remote(experiment)
