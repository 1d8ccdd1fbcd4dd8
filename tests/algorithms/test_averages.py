"""Hostile clients, and averages that withstand them: by hand, in runs, and between machines."""

import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.averages import AVERAGES
from fsl_sage.algorithms.poison import backdoor_success
from fsl_sage.config.parts import AverageConfig
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import record_of
from fsl_sage.costs.clock import attendances
from fsl_sage.data.batches import eval_batches
from fsl_sage.data.sources import load
from fsl_sage.experiments.loop import Run, rounds
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from tests.support.runs import assert_same, stopped_after, tiny

ROBUST = {name: {"average.name": name} for name in AVERAGES if name != "mean"} | {
    "trimmed_mean": {"average.name": "trimmed_mean", "average.trim": 0.34},
    "krum": {"average.name": "krum", "average.hostile": 2},
}
EIGHT = {
    "num_clients": 8, "rounds": 2, "dataset.max_train": 480, "dataset.max_test": 100, "dataset.distribution": "iid",
    "dataset.augment": False, "model.client.batch_size": 20,
}  # fmt: skip
LIARS = {"hostile.clients": [2, 5], "hostile.attack": "scaled", "hostile.scale": 100.0}


def weights_of(state):
    """What the first client's half has learnt, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in state.clients[0].model.parameters()])


def weights_after(**changes):
    """The clients' average after a run of eight clients."""
    history, state = train_state(preset("smoke", "fed_avg", **EIGHT | changes), "cpu", progress=False)
    return history, weights_of(state)


def test_two_scaling_clients_of_eight_move_the_mean_and_no_other_average():
    (fair, honest), (_, poisoned) = weights_after(), weights_after(**LIARS)
    usual = (honest - weights_of(set_up(fair.experiment))).norm()
    assert (poisoned - honest).norm() > 5 * usual
    for name, changes in ROBUST.items():
        history, robust = weights_after(**LIARS, **changes)
        assert (robust - honest).norm() < 2.5 * usual, name  # Krum: of one client
        assert history.rounds.paper_bytes.tolist() == fair.rounds.paper_bytes.tolist()


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage"])
def test_every_client_counts_while_some_are_at_rest(algorithm, name):
    small = {"dataset.size_spread": 0.5, "num_clients": 5, "rounds": 2, "average.hostile": 1} if name == "krum" else {}
    experiment = tiny(algorithm, **{"num_clients": 5, "rounds": 2} | ROBUST[name] | small)
    all_here, few = (train_state(experiment, "cpu", progress=False, in_flight=n)[1] for n in (None, 2))
    for group in ("clients", "auxes") if algorithm == "fsl_sage" else ("clients",):
        for one, other in zip(getattr(all_here, group), getattr(few, group), strict=True):
            assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


@pytest.mark.parametrize("attack, sign", [("scaled", 1), ("sign_flip", -1)])
def test_an_average_with_a_hostile_client_by_hand(attack, sign):
    """One round of FedAvg with two clients of one size: (w₀ + w_t ± s·(w₁ − w_t)) / 2."""
    own = {"num_clients": 2, "rounds": 1, "dataset.max_train": 80, "dataset.distribution": "iid"}
    experiment = preset("smoke", "fed_avg", **own)
    state = set_up(experiment)
    start = {name: tensor.clone() for name, tensor in state.clients[0].model.named_parameters()}
    alone = []
    for i in (0, 1):  # what each client learns, if its model alone is averaged
        state = set_up(experiment)
        (attendance,) = attendances(experiment, [len(local) for local in state.data])
        next(iter(rounds(Run(state, Ledger(), [attendance._replace(clients=[i])]))))
        alone.append({name: tensor.clone() for name, tensor in state.clients[i].model.named_parameters()})
    hostile = {"hostile.clients": [1], "hostile.attack": attack, "hostile.scale": 3.0}
    _, state = train_state(experiment.replace(**hostile), "cpu", progress=False)
    for name, tensor in state.clients[0].model.named_parameters():
        sent = start[name] + sign * 3 * (alone[1][name] - start[name])
        torch.testing.assert_close(tensor, (alone[0][name] + sent) / 2, rtol=1e-4, atol=1e-6)


def test_the_mean_is_the_average_of_before():
    usual = tiny("fsl_sage")
    assert usual.replace(average=AverageConfig()).hash == usual.hash and "average" not in usual.to_dict()
    assert "hostile" not in usual.to_dict()


@pytest.mark.parametrize("algorithm", ["fed_avg", "sl_multi_server", "cse_fsl", "fsl_sage", "sfl", "heron_sfl"])
def test_algorithms_average_with_their_own_parts(algorithm):
    """Each average changes the run, not its bytes; with one client of a kind it changes nothing."""
    usual = train(tiny(algorithm, rounds=2), "cpu", progress=False)
    for changes in ROBUST.values():
        history = train(tiny(algorithm, rounds=2, **changes), "cpu", progress=False)
        assert history.rounds.wire_bytes.tolist() == usual.rounds.wire_bytes.tolist()
        assert not history.rounds.test_loss.equals(usual.rounds.test_loss)


@pytest.mark.parametrize("attack", ["scaled", "backdoor"])
def test_a_stopped_run_with_hostile_clients_goes_on_to_the_same_bits(attack, tmp_path, monkeypatch):
    own = {"hostile.clients": [1], "hostile.attack": attack, "average.name": "clip", "participation": 0.7}
    experiment = tiny("fsl_sage", **own)
    stopped_after(1, monkeypatch, experiment, tmp_path / "run.ckpt")
    resumed = train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run.ckpt")
    assert_same(resumed, train(experiment, "cpu", progress=False))


def test_a_backdoor_is_learnt_and_the_median_of_eight_forgets_less_of_the_rest():
    plan = EIGHT | {"rounds": 6, "hostile.clients": [0, 1, 2], "hostile.attack": "backdoor", "hostile.target": 3}
    success = {}
    for name, changes in {"backdoor": plan, "honest": {k: v for k, v in plan.items() if "hostile" not in k}}.items():
        history, state = train_state(preset("smoke", "fed_avg", **changes), "cpu", progress=False)
        (model,) = record_of(history.experiment).evaluation_models(state)
        data = load("fmnist_mini", max_test=200)
        success[name] = backdoor_success(model, eval_batches(data.test, data.mean, data.std), 3)
    assert success["backdoor"] > success["honest"] + 0.2


@pytest.mark.parametrize(
    "algorithm, changes, words",
    [
        ("psl", {"average.name": "median"}, "average.name='median': must be left out for 'psl'"),
        ("async_splitfed", {"average.name": "median"}, "must be left out for 'async_splitfed'"),
        ("psl", {"hostile.clients": [0], "hostile.attack": "scaled"}, "hostile.attack='scaled': must be left out"),
        (
            "fed_avg",
            {"hostile.clients": [0], "hostile.attack": "sign_flip", "algorithm.share_server": True},
            "false with hostile models",
        ),
        ("fed_avg", {"hostile.clients": [9]}, r"hostile.clients=\[9\]: must be from 0 to 2"),
        ("fed_avg", {"average.trim": 0.5}, "average.trim=0.5: must be a number in"),
        (
            "sl_multi_server",
            {"average.name": "krum", "model.cuts": ["layer1", "layer2", "layer2"]},
            "must be left out with model.cuts",
        ),
    ],
)
def test_where_nothing_is_averaged_it_is_refused(algorithm, changes, words):
    with pytest.raises(ValueError, match=words):
        preset("smoke", algorithm, **changes)


def test_the_median_ignores_how_many_samples_a_client_claims():
    models = [{"w": torch.tensor([float(k)])} for k in (1, 2, 9)]
    by_shares = [AVERAGES["median"](models, shares, {}, AverageConfig()) for shares in ([0.1, 0.1, 0.8], [1 / 3] * 3)]
    assert by_shares[0]["w"] == by_shares[1]["w"] == 2
    assert (
        pd.Series([AVERAGES["mean"](models, [0.1, 0.1, 0.8], {}, AverageConfig())["w"].item()]).round(1).item() == 7.5
    )
