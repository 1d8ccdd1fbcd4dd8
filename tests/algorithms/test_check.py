"""A server that leaves out smashed data that are outliers: which, what follows for its half, and where it cannot."""

import math
from statistics import median

import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.config.presets import preset
from fsl_sage.costs.clock import Attendance, attendances
from fsl_sage.experiments.history import DivergedError
from fsl_sage.experiments.loop import Run, rounds
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.machines.parties import ask_clients
from tests.support.asking import Clients
from tests.support.asking import small as asked
from tests.support.runs import assert_same, stopped_after, tiny

EIGHT = {
    "num_clients": 8, "rounds": 2, "dataset.max_train": 320, "dataset.max_test": 40, "dataset.distribution": "iid",
    "dataset.augment": False, "model.name": "simple_conv", "model.width": 4, "model.client.batch_size": 20,
}  # fmt: skip
SAGE = {"algorithm.align_interval": 1, "algorithm.align_epochs": 1}
EACH = {"algorithm.server_update_interval": 1}  # two uploads in a round
OWN = {"cse_fsl": EACH, "fsl_sage": EACH | SAGE, "sage_split_lr": EACH | SAGE}
LIARS = {"hostile.clients": [2, 5], "hostile.attack": "smashed_scaled", "hostile.scale": 5.0}
CHECKED = [name for name, record in ALGORITHMS.items() if record.checks]
IN_STEP = {"psl", "sfl", "scala", "cycle_psl", "cycle_sfl", "mix2sfl"}


def eight(algorithm, check="norm", **changes):
    more = {} if check == "none" else {"smashed_check.name": check}
    return preset("smoke", algorithm, **EIGHT | OWN.get(algorithm, {}) | more | changes)


def made(experiment, clients=None):
    """The rounds of a run, and its state; `clients`: those that take part, if not all."""
    state = set_up(experiment)
    some = attendances(experiment, [len(own) for own in state.data])
    if clients is not None:
        some = [Attendance(rnd, clients, []) for rnd in range(experiment.rounds)]
    return list(rounds(Run(state, Ledger(), some))), state


@pytest.mark.parametrize("algorithm", CHECKED)
def test_of_eight_clients_the_two_that_scale_are_left_out(algorithm):
    """In turn, client 2 comes third in round 0 and is compared with nothing; in step, all are compared at once."""
    (first, second), state = made(eight(algorithm, **LIARS))
    both = [(i, s) for i in (2, 5) for s in (0, 1)]
    assert sorted(first.metrics.left_out) == (both if algorithm in IN_STEP else both[2:])
    assert sorted(second.metrics.left_out) == both
    assert {i: (rnd, len(values)) for i, (rnd, values) in state.upload_sizes.items()} == dict.fromkeys(range(8), (1, 2))
    ((_, honest), (_, scaled)) = state.upload_sizes[1], state.upload_sizes[2]
    assert all(3 * one < other for one, other in zip(honest, scaled, strict=True))


@pytest.mark.parametrize("check", ["norm", "loss"])
def test_each_decision_by_hand(check):
    """SplitFed-SS: what an upload is compared with is written down here once more."""
    (first, second), state = made(eight("sl_single_server", check, **LIARS | {"smashed_check.limit": 3.0}))
    done = [
        made(eight("sl_single_server", check, rounds=1, **LIARS | {"smashed_check.limit": 3.0}))[1].upload_sizes,
        state.upload_sizes,
    ]
    for rnd, row in enumerate((first, second)):
        expected, before = [], [] if rnd == 0 else done[0].items()
        known = {i: list(values) for i, (_, values) in before}
        for i in range(8):
            known[i] = []
            for s, value in enumerate(done[rnd][i][1]):
                known[i].append(value)
                others = [v for j in known if j != i for v in known[j]]
                if len(known) < 4:
                    continue
                middle = median(others)
                spread = max(1.4826 * median(abs(v - middle) for v in others), middle / 10)
                expected += [(i, s)] if value > middle + 3 * spread else []
        assert row.metrics.left_out == expected


@pytest.mark.parametrize("check", ["norm", "loss"])
@pytest.mark.parametrize("algorithm, alpha", [("sl_single_server", 0.3), ("cse_fsl", 10.0), ("psl", 0.3)])
def test_an_honest_federation_loses_nothing(algorithm, alpha, check):
    dirichlet = {"dataset.distribution": "noniid_dirichlet", "dataset.alpha": alpha, "rounds": 4, "eval_every": 4}
    assert train(eight(algorithm, check, **dirichlet), "cpu", progress=False).rounds.left_out.sum() == 0


@pytest.mark.parametrize("algorithm", CHECKED)
def test_a_limit_that_nothing_reaches_changes_no_bit(algorithm):
    plain = train(eight(algorithm, "none"), "cpu", progress=False)
    for check in ("norm", "loss"):
        checked = train(eight(algorithm, check, **{"smashed_check.limit": 1e9}), "cpu", progress=False)
        assert checked.rounds.left_out.tolist() == [0, 0]
        assert checked.rounds.drop(columns="left_out").equals(plain.rounds)
        assert checked.ledger.equals(plain.ledger) and checked.alignments.equals(plain.alignments)


@pytest.mark.parametrize("algorithm", CHECKED)
def test_where_all_are_left_out_the_server_learns_nothing(algorithm):
    """Clients that have overflowed: no step of the server."""
    state = set_up(eight(algorithm))
    for client in state.clients:
        for own in client.model.parameters():
            own.data.fill_(math.nan)
    before = {name: own.clone() for name, own in state.servers[0].model.state_dict().items()}
    attended = attendances(state.experiment, [len(own) for own in state.data])
    first = next(iter(rounds(Run(state, Ledger(), attended))))
    assert {i for i, _ in first.metrics.left_out} == set(range(8))
    after = state.servers[0].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [loss for loss in first.metrics.losses if loss.at == "server"] == []


@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage", "scala", "mix2sfl"])
def test_clients_that_overflow_end_the_run_at_its_next_evaluation(algorithm):
    with pytest.raises(DivergedError, match="test loss is nan after round 0"):
        train(eight(algorithm, **{"model.client.optimizer.lr": 1e30}), "cpu", progress=False)


def test_none_is_the_default_and_in_no_description():
    plain = tiny("fsl_sage")
    assert "smashed_check" not in plain.to_dict() and plain.replace(**{"smashed_check.limit": 2.0}).hash == plain.hash
    assert "left_out" not in train(tiny("psl", rounds=1), "cpu", progress=False).rounds


@pytest.mark.parametrize("algorithm", ["sl_single_server", "cse_fsl", "fsl_sage", "psl", "sfl"])
def test_the_server_is_the_one_that_has_never_met_them(algorithm):
    """Clients 5 and 6 are left out from the first upload on: bit for bit as if they had been absent."""
    late = {"hostile.clients": [5, 6], "hostile.scale": 50.0, "rounds": 1}
    (round_,), state = made(eight(algorithm, **LIARS | late))
    assert {i for i, _ in round_.metrics.left_out} == {5, 6}
    _, without = made(eight(algorithm, "none", rounds=1), [0, 1, 2, 3, 4, 7])
    one, other = (run.servers[0].model.state_dict() for run in (state, without))
    assert all(torch.equal(one[name], other[name]) for name in one)
    if algorithm == "fsl_sage":
        assert [len(buffer) for buffer in state.buffers] == [40] * 5 + [0, 0, 40]
        assert [row["client"] for row in round_.metrics.alignments] == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage", "psl"])
def test_bytes_are_those_of_an_honest_federation(algorithm):
    honest, hostile = (
        train(eight(algorithm, check, **more), "cpu", progress=False) for check, more in (("none", {}), ("norm", LIARS))
    )
    assert hostile.rounds.left_out.sum() > 4 and hostile.ledger.equals(honest.ledger)
    assert not hostile.rounds.test_loss.equals(honest.rounds.test_loss)


def test_noise_has_the_size_of_smashed_data_and_true_labels():
    noisy = LIARS | {"hostile.attack": "smashed_noise"}
    plain, (first, _) = made(eight("psl"))[1], made(eight("psl", **noisy))[0]
    assert not first.metrics.left_out
    _, state = made(eight("psl", rounds=1, **noisy))
    _, honest = made(eight("psl", rounds=1))
    assert state.upload_sizes[2][1][0] == pytest.approx(honest.upload_sizes[2][1][0], rel=0.1)
    assert state.upload_sizes[2][1] != honest.upload_sizes[2][1]
    assert state.upload_sizes[1][1][0] == honest.upload_sizes[1][1][0] and plain.upload_sizes


@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage"])
def test_a_stopped_run_goes_on_to_the_same_bits(algorithm, tmp_path, monkeypatch):
    experiment = eight(algorithm, rounds=3, participation=0.75, **LIARS)
    stopped_after(1, monkeypatch, experiment, tmp_path / "run.ckpt")
    resumed = train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run.ckpt")
    assert resumed.rounds.left_out.sum() > 0
    assert_same(resumed, train(experiment, "cpu", progress=False))


@pytest.mark.parametrize("algorithm", ["cse_fsl", "fsl_sage"])
def test_between_machines_the_same_batches_are_left_out(algorithm, tmp_path):
    four = {"num_clients": 5, "dataset.max_train": 150, "smashed_check.name": "norm", "hostile.clients": [3]}
    experiment = asked(algorithm, **four | {"hostile.attack": "smashed_scaled", "hostile.scale": 5.0})
    history = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert (history.rounds.left_out > 0).all()
    assert_same(train(experiment, "cpu", progress=False), history)


@pytest.mark.parametrize(
    "algorithm, changes, words",
    [
        ("fed_avg", {}, "smashed_check.name='norm': must be none for 'fed_avg'"),
        (
            "sl_multi_server",
            {},
            "none for 'sl_multi_server'; a batch can be left out by the server of sl_single",
        ),
        ("sglr", {}, "must be none for 'sglr'"),
        ("sl_single_server", {"model.head_cut": "layer4"}, "none with model.head_cut: no labels arrive"),
        ("sl_single_server", {"model.cuts": ["layer1"] * 4 + ["layer2"] * 4}, "none with model.cuts"),
        ("fsl_sage", {"num_clients": 3}, "num_clients=3: must be at least 4 with smashed_check"),
        ("fsl_sage", {"smashed_check.limit": 0}, "smashed_check.limit=0.0: must be greater than 0"),
        ("fed_avg", {"smashed_check.name": "none", **LIARS}, "must be an attack on models or data for 'fed_avg'"),
    ],
)
def test_where_it_cannot_be_it_is_refused(algorithm, changes, words):
    with pytest.raises(ValueError, match=words):
        preset("smoke", algorithm, **{"num_clients": 8, "smashed_check.name": "norm"} | changes)
