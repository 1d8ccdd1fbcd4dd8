"""A run ends at its target accuracy: in one go, stopped and continued, in the store, between machines."""

import pandas as pd
import pytest

from fsl_sage.commands.train import main
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train
from fsl_sage.machines.parties import ask_clients
from tests.support.asking import Clients, small
from tests.support.runs import assert_same, stopped_after, tiny


def with_target(experiment, after):
    """The whole run; the experiment that ends where it reaches its best accuracy of the first rounds; rounds it has."""
    whole = train(experiment, "cpu", progress=False)
    accuracy = whole.rounds.test_accuracy
    target = float(accuracy[:after].max())
    return whole, experiment.replace(target_accuracy=target), 1 + int(accuracy.ge(target).idxmax())


def assert_part(part, whole, n):
    assert part.stopped == "target" and len(part.rounds) == n < len(whole.rounds)
    for name in ("rounds", "alignments"):
        table = getattr(part, name)
        pd.testing.assert_frame_equal(table, getattr(whole, name)[: len(table)], check_exact=True)


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage"])
def test_a_run_ends_with_the_round_that_reaches_the_target(algorithm, tmp_path, monkeypatch):
    whole, experiment, n = with_target(tiny(algorithm, rounds=4), after=3)
    part = train(experiment, "cpu", progress=False)
    assert_part(part, whole, n)
    if n > 1:
        stopped_after(1, monkeypatch, experiment, tmp_path / "run")
        assert_same(part, train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run"))


def test_a_target_that_is_not_reached_changes_nothing_but_the_address():
    experiment = tiny("fed_avg")
    other = experiment.replace(target_accuracy=1.0)
    assert_same(train(experiment, "cpu", progress=False), train(other, "cpu", progress=False))
    assert other.hash != experiment.hash == experiment.replace(target_accuracy=None).hash


def test_only_rounds_that_are_evaluated_can_reach_it():
    experiment = tiny("fed_avg", eval_every=2, rounds=4, target_accuracy=1e-9)
    history = train(experiment, "cpu", progress=False)
    assert history.stopped == "target" and history.rounds.test_accuracy.notna().tolist() == [False, True]


@pytest.mark.parametrize("target", [0, -0.1, 1.1, float("nan")])
def test_a_target_is_an_accuracy(target):
    with pytest.raises(ValueError, match=r"target_accuracy=.*: must be greater than 0, at most 1, or None"):
        tiny("fed_avg", target_accuracy=target)


def test_the_store_takes_it_for_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = "preset=smoke algorithm=fed_avg rounds=3 dataset.max_train=60 dataset.max_test=20 target_accuracy=1e-9"
    for _ in range(2):  # the second time it is there
        assert main([*words.split(), "device=cpu"]) in (0, None)
    table = RunStore(tmp_path).frame()
    assert table["round"].tolist() == [0] and table.target_accuracy.tolist() == [1e-9]
    (folder,) = [path for path in tmp_path.iterdir() if (path / "history.json").exists()]
    assert '"stopped": "target"' in (folder / "history.json").read_text()


def test_between_machines_it_ends_there_too_and_is_not_run_again(tmp_path):
    whole, experiment, n = with_target(small("fed_avg", rounds=4), after=3)
    first = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert_part(first, whole, n)
    assert_same(first, train(experiment, "cpu", progress=False))
    assert_same(first, ask_clients(experiment, lambda questions: {}, tmp_path / "server"))
