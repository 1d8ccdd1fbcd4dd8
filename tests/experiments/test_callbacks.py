"""What callbacks are told, what they may add, and how they end a run."""

import pandas as pd
import pytest
import torch

from fsl_sage.experiments.callbacks import Callback, StopRun
from fsl_sage.experiments.checkpoint import load_beside
from fsl_sage.experiments.history import CallbackError, StoppedError
from fsl_sage.experiments.loggers import TensorBoard, WandB
from fsl_sage.experiments.models import KeepModel
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import checkpoint_of, model_of
from fsl_sage.experiments.stored import read_all, tidy
from fsl_sage.experiments.train import train, train_state
from tests.support.runs import assert_same, sessions_in, tiny

TABLES = ("rounds", "alignments", "ledger")


class Norm(Callback):
    """Adds a column: how large the evaluated model is."""

    def round(self, row, models):
        return {"norm": sum(float(parameter.detach().norm()) for parameter in models()[0].parameters())}


class Hears(Callback):
    """Writes down what it is told, draws random numbers, and spoils its copies."""

    def __init__(self):
        self.heard = []

    def start(self, at):
        self.heard.append(("start", at.name, at.first_round, [row["round"] for row in at.earlier]))
        at.earlier.clear()
        torch.rand(7)

    def round(self, row, models):
        self.heard.append(("round", row["round"], "norm" in row))
        row.clear()
        torch.rand(7)

    def end(self, history, models):
        self.heard.append(("end", history.stopped))

    def interrupted(self, error):
        self.heard.append(("interrupted", type(error)))


class Ends(Callback):
    """Ends a run in a round, by a wish or by an error."""

    def __init__(self, rnd, how):
        self.rnd, self.how = rnd, how

    def round(self, row, models):
        if row["round"] == self.rnd:
            raise self.how


@pytest.mark.parametrize("algorithm", ["fsl_sage", "sglr"])
def test_columns_of_callbacks_leave_all_numbers_as_they_are(algorithm):
    experiment, hears = tiny(algorithm), Hears()
    alone = train(experiment, "cpu", progress=False)
    watched = train(experiment, "cpu", progress=False, callbacks=[Norm(), hears])
    assert list(watched.rounds) == [*alone.rounds, "norm"] and watched.rounds.norm.gt(0).all()
    for name in TABLES:
        own = getattr(alone, name)
        pd.testing.assert_frame_equal(own, getattr(watched, name)[list(own)], check_exact=True)
    told = [("round", rnd, True) for rnd in (0, 1, 2)]
    assert hears.heard == [("start", experiment.hash, 0, []), *told, ("end", "rounds")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"test_loss": 0.0}, "column='test_loss': must be a name that no column and no field of an experiment has"),
        ({"clock_seconds": 0.0}, "column='clock_seconds'"),
        ({"norm": 0.0}, "column='norm'"),
        ({"seed": 0.0}, "column='seed'"),
        ({"algorithm.align_interval": 0.0}, r"column='algorithm\.align_interval'"),
        ({"label": 0.0}, "column='label'"),
        ({"mine": "text"}, r"column 'mine'='text': must be a number, such as tensor\.item\(\) gives"),
        (3.0, r"what round\(\) returned=3\.0: must be a dict of numbers, or None"),
    ],
)
def test_a_column_that_is_taken_or_no_number_is_refused(columns, says):
    class Adds(Callback):
        def round(self, row, models):
            return columns

    with pytest.raises(ValueError, match=says):
        train(tiny("fed_avg"), "cpu", progress=False, callbacks=[Norm(), Adds()])


def test_in_a_store_a_column_that_is_refused_costs_no_run(tmp_path):
    class Adds(Callback):
        def round(self, row, models):
            return {"test_loss": 0.0}

    experiment = tiny("fed_avg")
    with pytest.warns(UserWarning, match="Adds failed in round 0"), pytest.raises(CallbackError, match="test_loss"):
        RunStore(tmp_path).get([experiment], "cpu", progress=False, jobs=1, callbacks=[Adds(), Norm()])
    kept = RunStore(tmp_path).find(experiment)
    assert kept.rounds.norm.gt(0).all() and tidy([kept]).norm.gt(0).all()
    alone = train(experiment, "cpu", progress=False).rounds
    pd.testing.assert_frame_equal(kept.rounds[list(alone)], alone, check_exact=True)
    assert RunStore(tmp_path).frame().norm.gt(0).all()


def test_columns_survive_a_stop(tmp_path):
    experiment, path, hears = tiny("fsl_sage"), tmp_path / "run.safetensors", Hears()
    whole = train(experiment, "cpu", progress=False, callbacks=[Norm()])
    with pytest.raises(KeyboardInterrupt):
        ends = Ends(1, KeyboardInterrupt)
        train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=[Norm(), ends])
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=path, callbacks=[Norm(), hears]))
    assert hears.heard[:2] == [("start", experiment.hash, 1, [0]), ("round", 1, True)]


def test_a_run_goes_on_after_a_callback_has_stopped_it(tmp_path):
    """What it has is that of a run of fewer rounds; the rest is that of one that was never stopped."""
    experiment, path, hears = tiny("fsl_sage"), tmp_path / "run.safetensors", Hears()
    callbacks = [Ends(1, StopRun("enough", {"enough": 1})), Norm(), hears]
    part = train(experiment, "cpu", progress=False, checkpoint=path, callbacks=callbacks)
    assert part.stopped == "callback" and part.rounds["round"].tolist() == [0, 1]
    assert part.rounds.enough.isna().tolist() == [True, False]  # all callbacks have heard the last round
    assert hears.heard[-2:] == [("round", 1, True), ("end", "callback")]
    short = train(experiment.replace(rounds=2), "cpu", progress=False)
    for name in TABLES:
        own = getattr(short, name)
        pd.testing.assert_frame_equal(own, getattr(part, name)[list(own)], check_exact=True)
    went_on, alone = (train(experiment, "cpu", progress=False, checkpoint=file) for file in (path, None))
    assert went_on.stopped == "rounds"
    pd.testing.assert_frame_equal(went_on.rounds[list(alone.rounds)], alone.rounds, check_exact=True)


def test_a_wish_to_stop_in_the_last_round_changes_nothing():
    callbacks = [Ends(2, StopRun())]
    assert_same(*(train(tiny("fed_avg"), "cpu", progress=False, callbacks=some) for some in ([], callbacks)))


def test_a_store_never_takes_a_stopped_run_for_the_whole_one(tmp_path):
    experiment, store, hears = tiny("fed_avg"), RunStore(tmp_path), Hears()
    callbacks = [Ends(0, StopRun("enough")), KeepModel(tmp_path), hears]
    says = rf"stopped run {experiment.hash} after round 0 \(enough\): it is not stored.*checkpoint is kept"
    with pytest.raises(StoppedError, match=says) as caught:
        store.get([experiment], "cpu", progress=False, jobs=1, callbacks=callbacks)
    assert len(caught.value.history.rounds) == 1 and hears.heard[-1] == ("end", "callback")
    assert store.find(experiment) is None and read_all(tmp_path) == []
    assert not model_of(tmp_path, experiment.hash).exists()
    load_beside(checkpoint_of(tmp_path, experiment.hash), experiment)  # it can be read
    with pytest.raises(ValueError, match=r"history\.stopped='callback': must be one of rounds, budget, target"):
        store.save(caught.value.history, 1.0, "cpu")
    (whole,) = store.get([experiment], "cpu", progress=False, jobs=1, callbacks=[hears])
    assert ("start", experiment.hash, 1, [0]) in hears.heard  # it went on
    assert_same(whole, train(experiment, "cpu", progress=False))


@pytest.mark.parametrize("store", [False, True])
def test_an_interruption_is_told_instead_of_the_end(store, tmp_path):
    class Clumsy(Callback):
        def interrupted(self, error):
            raise OSError("no network")

    experiment, hears = tiny("fed_avg"), Hears()
    callbacks = [Clumsy(), hears, Ends(1, KeyboardInterrupt)]
    with pytest.raises(KeyboardInterrupt) as caught:
        if store:
            RunStore(tmp_path).get([experiment], "cpu", progress=False, jobs=1, callbacks=callbacks)
        else:
            train(experiment, "cpu", progress=False, callbacks=callbacks)
    assert hears.heard[-1] == ("interrupted", KeyboardInterrupt)
    assert caught.value.__notes__ == ["Clumsy failed (OSError: no network)"]


def test_callbacks_hear_of_a_run_that_cannot_be_stored(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fsl_sage.experiments.attempt.put_run", full)
    hears = Hears()
    with pytest.raises(OSError, match="No space left"):
        RunStore(tmp_path).get([tiny("fed_avg")], "cpu", progress=False, jobs=1, callbacks=[hears])
    assert hears.heard[-1] == ("interrupted", OSError)


def test_tensorboard_draws_the_columns_of_callbacks_before_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    experiment = tiny("fed_avg")
    train(experiment, "cpu", progress=False, callbacks=[Norm(), TensorBoard(tmp_path)])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / experiment.hash)).Reload()
    assert [event.step for event in events.Scalars("norm")] == [0, 1, 2]


@pytest.mark.slow
def test_in_one_session_weights_and_biases_go_on_after_ctrl_c(tmp_path, monkeypatch):
    """With the real package, offline, beside a run of the session's own."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    experiment, path = tiny("fed_avg"), tmp_path / "run.safetensors"
    mine = wandb.init(project="mine", dir=str(tmp_path / "mine"), id="mine", mode="offline")
    for others in [Ends(1, KeyboardInterrupt)], []:
        try:
            callbacks = [WandB(tmp_path), *others]
            train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=callbacks)
        except KeyboardInterrupt:
            assert others
    mine.log({"round": 7}, step=0)  # still open
    mine.finish()
    ((ids, steps),) = sessions_in(tmp_path).values()
    assert set(ids) == {experiment.hash} and steps == [(0, 0), (1, 1), (2, 2)]
    ((ids, steps),) = sessions_in(tmp_path / "mine").values()
    assert set(ids) == {"mine"} and steps == [(0, 7)]
