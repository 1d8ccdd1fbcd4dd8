"""Runs of the headline end when their last claim is decided; what is stored already is found as before."""

import shutil
from contextlib import nullcontext

import pandas as pd
import pytest

from fsl_sage import preset, train
from fsl_sage.commands.figures import Figure, draw_only, figure_notebooks, planned, still_needed, train_planned
from fsl_sage.costs.estimate import count
from fsl_sage.experiments.callbacks import Callback, RunStart, StopRun
from fsl_sage.experiments.history import StoppedError
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import TABLES, checkpoint_of
from fsl_sage.papers import comparison
from fsl_sage.papers.claims import published
from fsl_sage.papers.comparison import METHODS, PRINTED_ROUNDS, PUBLISHED_ROUNDS, Decided, headline_run
from tests.support import ROOT

FIGURES = ROOT / "figures"
TINY = {"rounds": 4, "num_clients": 2, "dataset.max_train": 60, "dataset.max_test": 20, "model.width": 4}


@pytest.mark.parametrize("name", METHODS)
def test_no_run_ends_before_it_has_sent_the_printed_bytes(name):
    """The first round in which they are spent; SplitFed-MS's run has to serve FedAvg, which sends fewer in a round."""
    rounds = PRINTED_ROUNDS[name]
    claims = published("sage", "accuracy vs communication (CIFAR-10)", "communication_to_81_percent")
    printed = claims.set_index("algorithm").value * 2**30
    before, after = (count(headline_run("published", name, rounds=n))["bytes"] for n in (rounds - 1, rounds))
    assert after >= printed[name] and rounds < PUBLISHED_ROUNDS[name]
    if name == "sl_multi_server":
        assert rounds == PRINTED_ROUNDS["fed_avg"]
    else:
        assert before < printed[name]


@pytest.mark.parametrize(("target", "rounds"), [(0.0, 2), (2.0, 4)])
def test_a_decided_run_is_kept_as_the_run_of_so_many_rounds(tmp_path, monkeypatch, target, rounds):
    """It is that run, bit for bit, is trained once, and nothing is missing; an undecided one goes on to its end."""
    monkeypatch.setitem(comparison.PRINTED_ROUNDS, "cse_fsl", 2)
    monkeypatch.setitem(comparison.TARGETS, "published", target)
    run, store = preset("smoke", "cse_fsl", **TINY), RunStore(tmp_path)
    parameters = {"preset": "smoke", "device": "cpu", "train": True}
    decided = Decided([run])
    decided.start(RunStart(run, run.hash, 1, [{"round": 0, "test_accuracy": 0.5}]))
    with pytest.raises(StopRun, match="its claims are decided") if target < 1 else nullcontext():
        decided.round({"round": 1, "test_accuracy": 0.1}, None)
    figure = Figure(FIGURES / "some.ipynb", parameters, [run], ends=[Decided([run])])
    assert still_needed(figure, store) == [run]
    assert not train_planned([figure], store, parameters, 1, force=False)
    short = run.replace(rounds=rounds)
    assert set(store.stored([short, run])) == {short}
    whole = train(short, "cpu", progress=False)
    for table in TABLES:
        pd.testing.assert_frame_equal(getattr(store.find(short), table), getattr(whole, table), check_exact=True)
    made = (store.folder(short) / "history.json").stat()
    assert not checkpoint_of(tmp_path, run.hash).exists() and still_needed(figure, store) == []
    assert not train_planned([figure], store, parameters, 1, force=False)
    draw_only([figure], store)
    assert not figure.remarks and figure.wrong is None
    assert (store.folder(short) / "history.json").stat() == made and store.longest([run]) == [short]


@pytest.mark.parametrize(("accuracies", "over"), [
    ([0.9], False), ([0.9, 0.1], True), ([0.1, 0.9], True), ([0.1, 0.1], False), ([0.1, 0.1, 0.9], True),
])  # fmt: skip
def test_both_claims_must_be_decided(monkeypatch, accuracies, over):
    """The bytes are sent after two rounds; the target may have been reached before."""
    monkeypatch.setitem(comparison.PRINTED_ROUNDS, "cse_fsl", 2)
    run = preset("smoke", "cse_fsl", **TINY)
    rounds = pd.DataFrame({"test_accuracy": accuracies})
    assert Decided([run]).over(run, rounds) == over and not Decided([]).over(run, rounds)


def test_a_run_that_depends_on_its_length_is_not_cut(tmp_path):
    """SGLR's learning rate falls at 80 % of all rounds: fewer rounds would be another experiment."""

    class Enough(Callback):
        def round(self, row, models):
            raise StopRun("it is enough", enough=True)

    run = preset("smoke", "sglr")
    with pytest.raises(StoppedError, match=r"it is enough.* it is not stored"):
        RunStore(tmp_path).get([run], "cpu", progress=False, jobs=1, callbacks=[Enough()])
    assert not RunStore(tmp_path).stored([run, run.replace(rounds=1)])


def test_the_committed_histories_are_found(tmp_path):
    """Whole runs by their address; SplitFed-SS's 134 rounds decide its claims; FSL-SAGE's 84 do not."""
    shutil.copytree(FIGURES / "gallery" / "published" / "histories", tmp_path / "runs")
    notebooks = figure_notebooks(FIGURES, ["sage_accuracy_vs_communication"])
    (figure,) = planned(notebooks, {"preset": "published", "precision": "tf32"}, [200])
    store = RunStore(tmp_path / "runs")
    found = {run.algorithm.name: run.rounds for run in store.longest(figure.experiments)}
    assert found == {"fsl_sage": 84, "cse_fsl": 110, "sl_multi_server": 90, "sl_single_server": 134}
    assert [run.algorithm.name for run in still_needed(figure, store)] == ["fsl_sage"]
    assert {"713066e13c9e33d4", "da2f21162fb0b1ab"} <= {run.hash for run in figure.experiments}
