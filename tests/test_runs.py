"""The store between processes: killed, racing, not allowed to write, pointed elsewhere."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from fsl_sage import runs
from fsl_sage.config import preset
from fsl_sage.runs import TABLES, RunStore, StoreError, checkpoint_of
from fsl_sage.runs_cli import prune
from fsl_sage.training import History, train_state

EXPERIMENT = preset("smoke", "fed_avg")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


@pytest.fixture
def history():
    "A history that no training made, with columns that no algorithm here has."
    rounds = pd.DataFrame({"round": [0, 1], "test_accuracy": [0.1, 1 / 3], "spread of clients": [0.1 + 0.2, 1e-300]})
    ledger = pd.DataFrame({"phase": ["round"], "kind": ["smashed"], "bytes": [2**53 + 1]})
    return History(EXPERIMENT, rounds, pd.DataFrame([], columns=["round", "client"]), ledger, "rounds")


def assert_same(one, two):
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)
    assert (one.experiment, one.stopped) == (two.experiment, two.stopped)


def test_columns_of_any_algorithm_come_back_exactly(history, tmp_path):
    store = RunStore(tmp_path)
    store.save(history, 1.0, "cpu")
    assert_same(store.find(EXPERIMENT), history)


def test_equal_histories_make_equal_files(history, tmp_path):
    folders = [RunStore(tmp_path / name).save(history, seconds, "cpu") for name, seconds in (("a", 1.0), ("b", 2.0))]
    files = sorted(path.name for path in folders[0].iterdir())
    assert [name for name in files if (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes()] == [
        "provenance.json"
    ]


def test_what_csv_cannot_hold_is_refused_and_leaves_nothing(history, tmp_path):
    odd = replace(history, rounds=pd.DataFrame({"round": [0], "who": [(1, 2)]}))
    with pytest.raises(StoreError, match="'rounds'"):
        RunStore(tmp_path).save(odd, 1.0, "cpu")
    assert [path.name for path in tmp_path.rglob("*")] == ["locks"]


@posix
@pytest.mark.parametrize("files", range(1, 2 * len(TABLES) + 1))
def test_a_process_killed_while_saving_leaves_no_run(history, tmp_path, monkeypatch, files):
    write, written = runs._write, []

    def write_and_die(path, text):
        written.append(path)
        write(path, text[: len(text) // 2] if len(written) == files else text)
        if len(written) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(runs, "_write", write_and_die)
    process = multiprocessing.get_context("fork").Process(target=RunStore(tmp_path).save, args=(history, 1.0, "cpu"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert runs.leftovers(tmp_path, EXPERIMENT.hash) and RunStore(tmp_path).find(EXPERIMENT) is None
    monkeypatch.undo()
    RunStore(tmp_path).save(history, 1.0, "cpu")  # the lock is free, and what was left goes
    assert not runs.leftovers(tmp_path, EXPERIMENT.hash)


def test_of_two_that_finish_the_same_run_the_first_stays(history, tmp_path):
    store = RunStore(tmp_path)
    first = store.save(history, 1.0, "cpu")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert store.save(replace(history, stopped="budget"), 2.0, "cpu") == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "history.json", "rounds.csv", "alignments.csv", "ledger.csv"])
@pytest.mark.parametrize("kept", [None, 0, 0.5])
def test_a_damaged_run_names_the_file_and_the_way_out(history, tmp_path, name, kept):
    store = RunStore(tmp_path)
    path = store.save(history, 1.0, "cpu") / name
    whole = path.read_bytes()
    path.unlink() if kept is None else path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(StoreError, match=rf"{name} is (missing|damaged).*delete the folder"):
        store.find(EXPERIMENT)


def test_a_stranger_under_the_same_hash_is_refused(history, tmp_path):
    store = RunStore(tmp_path)
    other = EXPERIMENT.replace(seed=1)
    store.save(history, 1.0, "cpu").rename(store.folder(other))
    with pytest.raises(StoreError, match="another experiment"):
        store.find(other)


def test_a_diverged_history_is_not_a_finished_run(history, tmp_path):
    with pytest.raises(ValueError, match=r"history\.stopped='diverged'"):
        RunStore(tmp_path).save(replace(history, stopped="diverged"), 1.0, "cpu")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_said_before_training(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(StoreError, match="FSL_SAGE_RUNS"):
        RunStore(tmp_path).get([EXPERIMENT], "cpu", progress=False)


def test_a_store_that_is_a_file_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="FSL_SAGE_RUNS"):
        RunStore(tmp_path / "file").get([EXPERIMENT], "cpu", progress=False)


def test_where_the_store_is(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = fsl_sage\n")
    inside = tmp_path / "figures" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.delenv("FSL_SAGE_RUNS", raising=False)
    assert RunStore().root.resolve() == tmp_path.resolve() / "runs"
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "shared"))
    assert RunStore().root == tmp_path / "shared"
    assert RunStore(tmp_path / "given").root == tmp_path / "given"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    monkeypatch.delenv("FSL_SAGE_RUNS")
    assert RunStore().root.resolve() == inside.resolve() / "runs"


def in_another_process(work, *args):
    "Start `work` in a forked process."
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def get(store, experiments):
    return RunStore(store).get(experiments, "cpu", progress=False, jobs=1)


def held_up(history, started, go_on):
    "A `train` that says which seed it was asked for, waits for a word from that seed's `go_on`, and returns `history`."

    def train(experiment, *_, **__):
        started.send(experiment.seed)
        go_on[experiment.seed].recv()
        return replace(history, experiment=experiment)

    return train


@posix
def test_two_processes_that_want_a_run_train_it_once(history, tmp_path, monkeypatch):
    (said, started), other = multiprocessing.Pipe(False), EXPERIMENT.replace(seed=7)
    pipes = {experiment.seed: multiprocessing.Pipe(False) for experiment in (EXPERIMENT, other)}
    go_on = {seed: reader for seed, (reader, _) in pipes.items()}
    monkeypatch.setattr(runs, "train", held_up(history, started, go_on))
    first = in_another_process(get, tmp_path, [EXPERIMENT])
    assert said.recv() == EXPERIMENT.seed  # the first has the lock and trains
    second = in_another_process(get, tmp_path, [EXPERIMENT, other])
    assert said.recv() == 7  # the second does not wait while there is something else to do
    for _, word in pipes.values():
        word.send("go on")
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert not said.poll()  # nobody was asked for anything again
    assert_same(RunStore(tmp_path).find(EXPERIMENT), history)
    assert RunStore(tmp_path).find(other) and not list((tmp_path / "locks").iterdir())


@posix
def test_who_waits_says_so_once_and_takes_over_from_the_killed(history, tmp_path, monkeypatch):
    (said, started), (go_on, word), (read, write) = multiprocessing.Pipe(False), multiprocessing.Pipe(False), os.pipe()
    monkeypatch.setattr(runs, "train", held_up(history, started, {EXPERIMENT.seed: go_on}))
    owner = in_another_process(get, tmp_path, [EXPERIMENT])
    said.recv()
    (tmp_path / f".{EXPERIMENT.hash}-half").mkdir()  # as if the owner were writing

    def wait_for_it():
        os.dup2(write, 2)
        monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", buffering=1))
        get(tmp_path, [EXPERIMENT])

    waiting = in_another_process(wait_for_it)
    os.close(write)
    with os.fdopen(read) as words:
        assert "waiting for it" in words.readline() and not said.poll()
        os.kill(owner.pid, signal.SIGKILL)
        assert said.recv() == EXPERIMENT.seed  # the second trains it now
        assert not list(tmp_path.glob(".*"))  # what the first left is gone
        word.send("go on")
        waiting.join(60)
        assert waiting.exitcode == 0 and "waiting" not in words.read()
    owner.join()
    assert_same(RunStore(tmp_path).find(EXPERIMENT), history)


@posix
def test_a_folder_that_is_being_written_is_left_alone(history, tmp_path, monkeypatch):
    (said, started), (go_on, word) = multiprocessing.Pipe(False), multiprocessing.Pipe(False)
    write = runs._write

    def slow_write(path, text):
        if path.name == "history.json":
            started.send(1)
            go_on.recv()
        write(path, text)

    monkeypatch.setattr(runs, "_write", slow_write)
    writer = in_another_process(RunStore(tmp_path).save, history, 1.0, "cpu")
    said.recv()
    assert "nothing to delete" in prune(tmp_path, yes=True) and len(runs.leftovers(tmp_path, EXPERIMENT.hash)) == 1
    with runs.run_lock(tmp_path, EXPERIMENT.hash, wait=False) as held:
        assert not held
    word.send("go on")
    writer.join(60)
    assert writer.exitcode == 0
    assert_same(RunStore(tmp_path).find(EXPERIMENT), history)


def test_one_that_fails_does_not_stop_the_others_in_other_processes(tmp_path):
    tiny = {"rounds": 1, "num_clients": 2, "dataset.max_train": 20, "dataset.max_test": 10}
    fine = preset("smoke", "fed_avg", **tiny)
    nowhere = fine.replace(**{"dataset.name": "nowhere"})
    with pytest.raises(ValueError, match="nowhere") as caught:
        RunStore(tmp_path).get([nowhere, fine], "cpu", progress=False, jobs=2)
    assert "_train_and_put" in "".join(caught.value.__notes__)  # where it was in the other process
    assert RunStore(tmp_path).find(fine)
    assert len(RunStore(tmp_path).get(run for run in [fine, fine])) == 2  # a generator can be read only once


def test_a_run_has_one_thread_however_many_are_trained(tmp_path, monkeypatch, history):
    monkeypatch.setattr(runs, "train", lambda experiment, *_, **__: replace(history, experiment=experiment))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        get(tmp_path, [EXPERIMENT])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / EXPERIMENT.hash / "provenance.json").read_text())["threads"] == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("history.json", '"format": 1', '"format": 2', "format 2"),
        ("history.json", '"ledger": {', '"log": {', "tables rounds, alignments, log"),
        ("history.json", '"stopped"', '"ended"', "damaged"),
        ("config.json", '"rounds": 3', '"rounds": 3, "mood": "good"', "mood"),
        ("config.json", '"num_clients"', '"n_clients"', "n_clients"),
    ],
)
def test_a_run_of_another_version_is_refused_and_can_be_pruned(history, tmp_path, file, old, new, words):
    path = RunStore(tmp_path).save(history, 1.0, "cpu") / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StoreError):
        RunStore(tmp_path).find(EXPERIMENT)
    (stored,) = runs.read_all(tmp_path)
    assert stored.history is None and words in stored.problem
    assert EXPERIMENT.hash in prune(tmp_path, yes=False) and path.exists()
    prune(tmp_path, yes=True)
    assert not path.exists() and RunStore(tmp_path).find(EXPERIMENT) is None


def test_checkpoint_of_a_run_goes_when_it_is_stored_or_set_aside(history, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda experiment, *_, **__: replace(history, experiment=experiment))
    store, checkpoint = RunStore(tmp_path), checkpoint_of(tmp_path, EXPERIMENT.hash)
    for work in (lambda: get(tmp_path, [EXPERIMENT]), lambda: store.set_aside([EXPERIMENT])):
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text("{}")
        stored = store.find(EXPERIMENT) is not None
        said = prune(tmp_path, yes=False)
        assert "checkpoint of a run that is finished" in said if stored else "nothing to delete" in said
        work()
        assert not checkpoint.exists()
    assert [path.name[:16] for path in (tmp_path / "replaced").iterdir()] == [EXPERIMENT.hash]


@posix
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fsl_sage", "sl_multi_server"])
def test_killed_ten_times_the_history_is_the_same_to_the_byte(algorithm, tmp_path, monkeypatch):
    def train(experiment, device, root, progress, checkpoint, **_):
        return train_state(experiment, device, root, progress, checkpoint=checkpoint, checkpoint_seconds=0)[0]

    monkeypatch.setattr(runs, "train", train)
    own = {"algorithm.align_interval": 3, "algorithm.align_epochs": 3} if algorithm == "fsl_sage" else {}
    run = preset("smoke", algorithm, rounds=20, **{"dataset.max_train": 200, "dataset.max_test": 20}, **own)
    get(tmp_path / "warm", [run])
    start, whole, parts = time.perf_counter(), tmp_path / "whole", tmp_path / "parts"
    get(whole, [run])
    seconds, moments, went_on = time.perf_counter() - start, random.Random(0), 0
    for _ in range(10):
        process = in_another_process(get, parts, [run])
        process.join(moments.uniform(0.05, 0.3) * seconds)
        process.kill()
        process.join()
        went_on += checkpoint_of(parts, run.hash).exists()
    get(parts, [run])
    assert went_on and not list((parts / "progress").iterdir())
    files = sorted(path.name for path in (whole / run.hash).iterdir())
    different = [f for f in files if (whole / run.hash / f).read_bytes() != (parts / run.hash / f).read_bytes()]
    assert different == ["provenance.json"]
    assert json.loads((parts / run.hash / "provenance.json").read_text())["resumed"] is True
