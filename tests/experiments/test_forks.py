"""Runs with the same first rounds: one makes them for all, and nobody can tell from the numbers."""

import pandas as pd
import pytest

from fsl_sage import preset, train
from fsl_sage.config.experiment import trunk_of
from fsl_sage.config.settings import algorithms
from fsl_sage.costs.estimate import count, estimate
from fsl_sage.experiments import train as training
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.pool import forks_among, train_missing
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import TABLES, checkpoint_of

NAMES = "algorithm.average_phase", "algorithm.average_fraction", "algorithm.active_fraction"
PHASES = {  # those of SGLR's Table 3; φ = 0 and φ = 1 throughout make the rounds that the others have in common
    "none": ("full", 0.6, 0), "full": ("full", 0.6, 1),
    "initial 60%": ("initial", 0.6, 1), "initial 40%": ("initial", 0.4, 1),
    "final 60%": ("final", 0.6, 1), "final 40%": ("final", 0.4, 1),
}  # fmt: skip
COMMON = {"initial 60%": ("full", 3), "initial 40%": ("full", 2), "final 60%": ("none", 2), "final 40%": ("none", 3)}
TINY = {"rounds": 5, "model.width": 4, "dataset.max_test": 20, "dataset.val_size": 20}


def phased(name, **changes):
    return preset("smoke", "sglr", **(TINY | changes), **dict(zip(NAMES, PHASES[name], strict=True)))


class Heard(Callback):
    """Which rounds of which runs were made; ends the process's work in one of them."""

    def __init__(self, stop=None):
        self.made, self.stop = [], stop

    def start(self, at):
        self.name = at.name

    def round(self, row, models):
        self.made.append((self.name, row["round"]))
        if self.made[-1] == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def from_scratch():
    return {name: train(phased(name), "cpu", progress=False) for name in PHASES}


def assert_same(store, from_scratch):
    for name, whole in from_scratch.items():
        found = store.find(phased(name))
        for table in TABLES:
            pd.testing.assert_frame_equal(getattr(found, table), getattr(whole, table), check_exact=True)
        assert found.stopped == "rounds"


def test_runs_with_common_rounds_make_them_once(tmp_path, from_scratch):
    """Table 3's six phases: 20 rounds instead of 30, the same histories bit for bit, and the provenance says it."""
    heard, store = Heard(), RunStore(tmp_path)
    runs = {name: phased(name) for name in reversed(PHASES)}  # forks are asked for first
    assert not train_missing(tmp_path, runs.values(), "cpu", progress=False, jobs=1, callbacks=[heard])
    assert len(heard.made) == len(set(heard.made)) == 20
    assert_same(store, from_scratch)
    for name, run in runs.items():
        made_with = store.made_with(run)
        trunk, rounds = COMMON.get(name, (None, 0))
        said = made_with.get("forked") or {"rounds": 0}
        assert said["rounds"] == rounds and said.get("run") == (trunk and runs[trunk].hash)
        assert "resumed" not in made_with and made_with["core_seconds"] > said.get("core_seconds", 0)
        assert not checkpoint_of(tmp_path, run.hash).exists()


def test_common_rounds_that_were_interrupted_go_on(tmp_path, monkeypatch, from_scratch):
    """Killed after the first fork has its checkpoint and before the second has: both begin where they part."""
    real, full = training.Saver, phased("full")
    monkeypatch.setattr(training, "Saver", lambda path, seconds, forks=(): real(path, 0.0, forks))
    names = "full", "initial 60%", "initial 40%"
    killed, again = Heard(stop=(full.hash, 2)), Heard()
    with pytest.raises(KeyboardInterrupt):
        train_missing(tmp_path, map(phased, names), "cpu", progress=False, jobs=1, callbacks=[killed])
    there = {name: checkpoint_of(tmp_path, phased(name).hash).exists() for name in names}
    assert there == {"full": True, "initial 60%": False, "initial 40%": True}
    assert not train_missing(tmp_path, map(phased, names), "cpu", progress=False, jobs=1, callbacks=[again])
    assert len(again.made) == 3 + 2 + 3 and (full.hash, 2) in again.made and (full.hash, 1) not in again.made
    store = RunStore(tmp_path)
    assert_same(store, {name: from_scratch[name] for name in names})
    notes = [store.made_with(phased(name)) for name in names]
    assert [("resumed" in made, made.get("forked", {}).get("rounds")) for made in notes] == [
        (True, None), (False, 3), (False, 2),
    ]  # fmt: skip


def test_a_fork_that_was_interrupted_is_both(tmp_path, monkeypatch, from_scratch):
    real, late = training.Saver, phased("final 60%")
    monkeypatch.setattr(training, "Saver", lambda path, seconds, forks=(): real(path, 0.0, forks))
    runs = [phased("none"), late]
    with pytest.raises(KeyboardInterrupt):
        train_missing(tmp_path, runs, "cpu", progress=False, jobs=1, callbacks=[Heard(stop=(late.hash, 4))])
    assert not train_missing(tmp_path, runs, "cpu", progress=False, jobs=1)
    store = RunStore(tmp_path)
    assert_same(store, {name: from_scratch[name] for name in ("none", "final 60%")})
    assert store.made_with(late)["resumed"] and store.made_with(late)["forked"]["rounds"] == 2


def test_without_the_other_run_all_rounds_are_made(tmp_path, from_scratch):
    """It is stored already, or was never asked for: nothing is left of its middle."""
    late, heard = phased("final 40%"), Heard()
    train_missing(tmp_path, [phased("none")], "cpu", progress=False, jobs=1)
    assert not train_missing(tmp_path, [phased("none"), late], "cpu", progress=False, jobs=1, callbacks=[heard])
    assert len(heard.made) == 5 and "forked" not in RunStore(tmp_path).made_with(late)
    assert RunStore(tmp_path).find(late).rounds.equals(from_scratch["final 40%"].rounds)


@pytest.mark.parametrize("rounds", [1, 2, 3, 200])
def test_only_whole_common_rounds_are_shared(rounds):
    """A phase of all rounds, or of none, leaves nothing to part from."""
    for name in PHASES:
        run = phased(name).replace(rounds=rounds)
        trunk = trunk_of(run)
        assert trunk is None or (0 < trunk[1] < rounds and trunk[0].hash != run.hash and trunk_of(trunk[0]) is None)
    assert (trunk_of(phased("initial 60%").replace(rounds=rounds)) is None) == (rounds < 3)


def test_other_algorithms_have_no_phases():
    runs = [preset("smoke", name) for name in algorithms()]
    assert not any(map(trunk_of, runs)) and not forks_among(runs)


def test_an_estimate_counts_common_rounds_once():
    runs = {name: phased(name, rounds=10, eval_every=5) for name in PHASES}
    (row,) = estimate({"table": list(runs.values())}, seconds=0.01).itertuples()
    alone = {name: count(run) for name, run in runs.items()}
    work = [counted[kind] for counted in alone.values() for kind in ("training", "alignment", "evaluation")]
    spared = sum(
        alone[name]["training"] * rounds / 10 + alone[name]["evaluation"] * (rounds // 5) / 2
        for name, rounds in {"initial 60%": 6, "initial 40%": 4, "final 60%": 4, "final 40%": 6}.items()
    )
    assert pytest.approx(sum(work) - spared, rel=1e-9) == row.PFLOP * 1e15
