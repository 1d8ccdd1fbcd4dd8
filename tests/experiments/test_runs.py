"""The store between processes: killed, racing, not allowed to write, pointed elsewhere."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import fsl_sage
from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.commands import runs as runs_cli
from fsl_sage.commands import train as cli
from fsl_sage.commands.runs import import_runs, list_runs, prune
from fsl_sage.config.presets import preset
from fsl_sage.experiments import attempt
from fsl_sage.experiments import provenance as provenance_module
from fsl_sage.experiments import store as store_module
from fsl_sage.experiments import train as training
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.checkpoint import CheckpointError, load_beside
from fsl_sage.experiments.history import CallbackError, History
from fsl_sage.experiments.loggers import TensorBoard, WandB
from fsl_sage.experiments.models import KeepModel, load_model
from fsl_sage.experiments.pool import WorkerError
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import TABLES, StoreError, checkpoint_of, model_of
from fsl_sage.experiments.stored import flat, read_all, tidy
from fsl_sage.experiments.train import train, train_state
from tests.support.runs import sessions_in

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
    write, written = store_module._write, []

    def write_and_die(path, text):
        written.append(path)
        write(path, text[: len(text) // 2] if len(written) == files else text)
        if len(written) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(store_module, "_write", write_and_die)
    process = multiprocessing.get_context("fork").Process(target=RunStore(tmp_path).save, args=(history, 1.0, "cpu"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert store_module.leftovers(tmp_path, EXPERIMENT.hash) and RunStore(tmp_path).find(EXPERIMENT) is None
    monkeypatch.undo()
    RunStore(tmp_path).save(history, 1.0, "cpu")  # the lock is free, and what was left goes
    assert not store_module.leftovers(tmp_path, EXPERIMENT.hash)


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
    monkeypatch.setattr(attempt, "train", held_up(history, started, go_on))
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
    monkeypatch.setattr(attempt, "train", held_up(history, started, {EXPERIMENT.seed: go_on}))
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
    write = store_module._write

    def slow_write(path, text):
        if path.name == "history.json":
            started.send(1)
            go_on.recv()
        write(path, text)

    monkeypatch.setattr(store_module, "_write", slow_write)
    writer = in_another_process(RunStore(tmp_path).save, history, 1.0, "cpu")
    said.recv()
    assert (
        "nothing to delete" in prune(tmp_path, yes=True) and len(store_module.leftovers(tmp_path, EXPERIMENT.hash)) == 1
    )
    with store_module.run_lock(tmp_path, EXPERIMENT.hash, wait=False) as held:
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
    monkeypatch.setattr(attempt, "train", lambda experiment, *_, **__: replace(history, experiment=experiment))
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
    (stored,) = read_all(tmp_path)
    assert stored.history is None and words in stored.problem
    assert EXPERIMENT.hash in prune(tmp_path, yes=False) and path.exists()
    prune(tmp_path, yes=True)
    assert not path.exists() and RunStore(tmp_path).find(EXPERIMENT) is None


def test_checkpoint_of_a_run_goes_when_it_is_stored_or_set_aside(history, tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "train", lambda experiment, *_, **__: replace(history, experiment=experiment))
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
@pytest.mark.parametrize(("algorithm", "times"), [("fsl_sage", 10), ("sl_multi_server", 3)])
def test_killed_many_times_the_history_is_the_same_to_the_byte(algorithm, times, tmp_path, monkeypatch):
    def train(experiment, device, root, progress, checkpoint, **_):
        return train_state(experiment, device, root, progress, checkpoint=checkpoint, checkpoint_seconds=0)[0]

    monkeypatch.setattr(attempt, "train", train)
    own = {"algorithm.align_interval": 3, "algorithm.align_epochs": 3} if algorithm == "fsl_sage" else {}
    run = preset("smoke", algorithm, rounds=20, **{"dataset.max_train": 200, "dataset.max_test": 20}, **own)
    get(tmp_path / "warm", [run])
    start, whole, parts = time.perf_counter(), tmp_path / "whole", tmp_path / "parts"
    get(whole, [run])
    seconds, moments, went_on = time.perf_counter() - start, random.Random(0), 0
    for _ in range(times):
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


def resealed(path, **changes):
    "Change fields of a file of a run, as somebody would who knows of its checksum."
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"} | changes
    path.write_text(json.dumps(fields))


def retabled(folder, text, columns):
    "Put another table of rounds in the place of a run's, with its right checksum."
    (folder / "rounds.csv").write_text(text)
    tables = json.loads((folder / "history.json").read_text())["tables"]
    tables["rounds"] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "columns": columns}
    resealed(folder / "history.json", tables=tables)


def in_place_of(name, make):
    "Put something else in the place of a run's file."

    def harm(folder):
        (folder / name).unlink()
        make(folder / name)

    return harm


DEEP = "[" * 200_000
HARM = {
    "provenance is deep": lambda folder: (folder / "provenance.json").write_text(DEEP),
    "history is deep": lambda folder: (folder / "history.json").write_text(DEEP),
    "config is deep": lambda folder: (folder / "config.json").write_text(DEEP),
    "provenance is a list": lambda folder: (folder / "provenance.json").write_text("[1]"),
    "provenance without a field": lambda folder: (folder / "provenance.json").write_text("{}"),
    "provenance changed": lambda folder: (folder / "provenance.json").write_text(
        (folder / "provenance.json").read_text().replace('"threads": ', '"threads": 1')
    ),
    "provenance of 2 MB": lambda folder: resealed(folder / "provenance.json", commit="a" * 2**21),
    "finished is a number": lambda folder: resealed(folder / "provenance.json", finished=5),
    "finished is null": lambda folder: resealed(folder / "provenance.json", finished=None),
    "seconds are text": lambda folder: resealed(folder / "provenance.json", wall_seconds="x"),
    "seconds are a list": lambda folder: resealed(folder / "provenance.json", wall_seconds=[]),
    "seconds are no float": lambda folder: resealed(folder / "provenance.json", wall_seconds=10**400),
    "torch is a table": lambda folder: resealed(folder / "provenance.json", torch={"a": 1}),
    "tables is a number": lambda folder: resealed(folder / "history.json", tables=5),
    "tables has numbers": lambda folder: resealed(folder / "history.json", tables=[1, "a"]),
    "tables has texts": lambda folder: resealed(folder / "history.json", tables=dict.fromkeys(TABLES, "x")),
    "stopped is a number": lambda folder: resealed(folder / "history.json", stopped=5),
    "stopped is another word": lambda folder: resealed(folder / "history.json", stopped="x"),
    "columns is a list": lambda folder: retabled(folder, "round\n0\n", [1]),
    "a type is a number": lambda folder: retabled(folder, "round\n0\n", {"round": 5}),
    "a type is category": lambda folder: retabled(folder, "test_accuracy\n1\n", {"test_accuracy": "category"}),
    "accuracy is text": lambda folder: retabled(folder, "test_accuracy\nx\n", {"test_accuracy": "object"}),
    "a field of 200 kB": lambda folder: retabled(folder, f'round\n"{"x" * 200_000}"\n', {"round": "object"}),
    "NUL": lambda folder: retabled(folder, "round\n\0\n", {"round": "int64"}),
    "5000 digits": lambda folder: retabled(folder, f"round\n{'9' * 5000}\n", {"round": "int64"}),
    "beyond int64": lambda folder: retabled(folder, f"round\n{10**30}\n", {"round": "int64"}),
    "rounds are infinite": lambda folder: (folder / "config.json").write_text('{"rounds": 1e999}'),
    "plug-ins are a number": lambda folder: resealed(folder / "config.json", plugins=5),
    "a data set is a list": lambda folder: resealed(folder / "config.json", dataset=[]),
    "a field of no use": lambda folder: resealed(folder / "config.json", __class__="os.system"),
    **{f"a folder for {name}": in_place_of(name, os.mkdir) for name in ("config.json", "history.json", "rounds.csv")},
    "a folder for the provenance": in_place_of("provenance.json", os.mkdir),
    "a loop of links": in_place_of("history.json", lambda path: path.symlink_to(path)),
    "a device": in_place_of("provenance.json", lambda path: path.symlink_to("/dev/zero")),
    "a pipe for the table": in_place_of("rounds.csv", lambda path: os.mkfifo(path)),
    "a pipe for the history": in_place_of("history.json", lambda path: os.mkfifo(path)),
}


@posix
@pytest.mark.attack("store")
@pytest.mark.parametrize("harm", HARM)
def test_one_bad_folder_costs_no_other_run(harm, history, tmp_path, capsys):
    store, other = RunStore(tmp_path / "runs"), EXPERIMENT.replace(seed=7)
    bad = store.save(history, 1.0, "cpu")
    store.save(replace(history, experiment=other), 1.0, "cpu")
    HARM[harm](bad)
    with pytest.raises(StoreError):
        store.find(EXPERIMENT)
    where = "--runs", str(store.root)
    assert runs_cli.main(["list", *where]) == runs_cli.main(["show", other.hash, *where]) == 0
    assert runs_cli.main(["export", str(tmp_path / "t.parquet"), *where]) == runs_cli.main(["prune", *where]) == 0
    said = capsys.readouterr().out
    assert (
        "1 cannot be used" in said
        and f"{bad.name} left out" in said
        and set(said) <= set(filter(str.isprintable, said)) | {"\n"}
    )
    assert set(pd.read_parquet(tmp_path / "t.parquet").hash) == {other.hash}
    assert runs_cli.main(["prune", "--yes", *where]) == 0
    assert store.find(other) and (harm == "a loop of links" or not bad.exists())  # what cannot be read stays


@pytest.mark.attack("store")
def test_what_a_run_says_does_not_steer_the_terminal(history, tmp_path, capsys):
    folder = RunStore(tmp_path).save(history, 1.0, "cpu")
    evil = "\x1b]0;owned\x07\x1b[31m\u202eRED\nrun 0: fine"
    resealed(folder / "provenance.json", finished=evil, device_name=evil, **{evil: evil})
    assert runs_cli.main(["list", "--runs", str(tmp_path)]) == 0
    assert runs_cli.main(["show", folder.name, "--runs", str(tmp_path)]) == 0
    resealed(folder / "history.json", format=evil, tables={evil: 1})
    assert runs_cli.main(["show", folder.name, "--runs", str(tmp_path)]) == 1
    said = "".join(capsys.readouterr())
    assert "\\x1b[31m" in said and not {"\x1b", "\x07", "\u202e"} & set(said) and "\nrun 0" not in said


@posix
@pytest.mark.attack("store")
@pytest.mark.parametrize("name", ["models", "progress", "diverged", "locks"])
def test_prune_deletes_nothing_behind_a_link(name, tmp_path):
    thesis, store = tmp_path / "thesis", tmp_path / "runs"
    for inside in ("chapter1.tex", "0" * 16 + ".safetensors", "0" * 16 + ".lock", f".{'0' * 16}-x", "1" * 16 + "/a"):
        (thesis / inside).parent.mkdir(parents=True, exist_ok=True)
        (thesis / inside).write_text("precious")
    store.mkdir()
    (store / name).symlink_to(thesis)
    before = sorted(thesis.rglob("*"))
    assert f"{name}: stays: a link" in prune(store, yes=True)
    with store_module.run_lock(store, "0" * 16) if name != "locks" else pytest.MonkeyPatch.context():
        assert sorted(thesis.rglob("*")) == before


@posix
@pytest.mark.attack("store")
def test_prune_unlinks_links_and_leaves_what_the_store_did_not_make(history, tmp_path):
    thesis, store, name = tmp_path / "thesis", tmp_path / "runs", "0" * 16
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("precious")
    for folder in ("models", "progress", "locks"):
        (store / folder).mkdir(parents=True)
    links = [
        store / ("1" * 16),
        store / f".{name}-x",
        store / "models" / f"{name}.safetensors",
        store / "locks" / f"{name}.lock",
    ]
    for link in links:
        link.symlink_to(thesis)
    strange = [
        store / "models" / "thesis",
        store / "progress" / "x.safetensors",
        store / ".git-x",
        store / "locks" / "x.lock",
    ]
    for path in strange:
        path.mkdir()
    (store / "progress" / f"server-{name}.safetensors").touch()
    (store / "progress" / f".server-{name}-x").mkdir()
    assert "5 deleted" in prune(store, yes=True)
    assert not any(link.is_symlink() for link in links) and all(path.is_dir() for path in strange)
    assert (thesis / "chapter1.tex").read_text() == "precious"
    RunStore(store).save(history, 1.0, "cpu")
    server = store / "progress" / f"server-{history.experiment.hash}.safetensors"
    server.touch()
    assert "checkpoint of a run that is finished" in prune(store, yes=True) and not server.exists()


@posix
@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_a_run_is_as_open_to_others_as_the_umask_says(mask, history, tmp_path):
    before = os.umask(mask)
    try:
        folder = RunStore(tmp_path / "runs").save(history, 1.0, "cpu")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everywhere")
def test_another_users_file_is_said_and_not_pruned(history, tmp_path):
    folder = RunStore(tmp_path).save(history, 1.0, "cpu")
    (folder / "rounds.csv").chmod(0)
    with pytest.raises(StoreError, match="ask its owner"):
        RunStore(tmp_path).find(EXPERIMENT)
    assert "stays" in prune(tmp_path, yes=True) and folder.exists()


def test_another_users_file_is_a_store_error(history, tmp_path, monkeypatch):
    folder = RunStore(tmp_path).save(history, 1.0, "cpu")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store_module, "_content", denied)
    with pytest.raises(StoreError, match=r"Permission denied.*ask its owner"):
        RunStore(tmp_path).find(EXPERIMENT)
    assert "stays" in prune(tmp_path, yes=True) and folder.exists()


def test_a_filter_compares_a_field(history, tmp_path):
    for seed in (2, 200, 3):
        own = EXPERIMENT.replace(seed=seed, init_seed=2)
        RunStore(tmp_path).save(replace(history, experiment=own), 1.0, "cpu")
    assert "1 of 3 runs" in list_runs(tmp_path, ["seed=2"]) and "3 of 3 runs" in list_runs(tmp_path, ["init_seed=2"])
    with pytest.raises(ValueError, match="did you mean 'rounds'"):
        list_runs(tmp_path, ["round=3"])


def test_a_run_that_is_given_twice_is_no_repetition(history):
    other = replace(history, experiment=EXPERIMENT.replace(seed=7))
    assert len(tidy([history, other, history])) == 2 * len(history.rounds)


def test_fields_at_their_defaults_are_shown(history):
    assert {"participation", "clock", "plugins", "dataset.size_spread"} <= set(flat(EXPERIMENT))


def test_a_wheel_inside_a_checkout_is_not_described_by_its_commit(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = fsl_sage\n")
    installed = tmp_path / ".venv" / "site-packages" / "fsl_sage"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance_module, "_git", lambda *_: "somebody's commit")
    monkeypatch.setattr(fsl_sage, "__file__", str(installed / "__init__.py"))
    made_with = provenance_module.provenance("cpu")
    assert (made_with["commit"], made_with["modified"]) == (None, None)
    monkeypatch.setattr(fsl_sage, "__file__", str(tmp_path / "fsl_sage" / "__init__.py"))
    assert provenance_module.provenance("cpu")["commit"] == "somebody's commit"


def test_runs_that_come_home(history, tmp_path, capsys):
    home, away = RunStore(tmp_path / "home"), RunStore(tmp_path / "away")
    others = [replace(history, experiment=EXPERIMENT.replace(seed=seed)) for seed in (1, 2, 3)]
    for one in (history, *others):
        resealed(away.save(one, 1.0, "cpu") / "provenance.json", commit=None, modified=None)
    first, broken = home.save(history, 2.0, "cpu"), away.folder(others[2].experiment)
    (broken / "rounds.csv").write_text("round\n")
    before, sha = (first / "provenance.json").read_bytes(), "0123456789abcdef" * 2 + "01234567"
    words = ["import", str(away.root), "--commit", sha, "--runs", str(home.root)]
    assert runs_cli.main(words) == 1  # one of them is broken
    assert (
        "is damaged" in capsys.readouterr().err and broken.exists() and not home.folder(others[2].experiment).exists()
    )
    assert (first / "provenance.json").read_bytes() == before and away.folder(EXPERIMENT).exists()
    for one in others[:2]:
        assert_same(home.find(one.experiment), one)
        assert home.made_with(one.experiment)["commit"] == sha and not away.folder(one.experiment).exists()
    (single := home.folder(others[0].experiment)).rename(tmp_path / single.name)
    assert "taken in" in import_runs(home.root, tmp_path / single.name)
    assert home.made_with(others[0].experiment)["commit"] == sha
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        import_runs(home.root, away.root, "main")


TINY = {"num_clients": 2, "rounds": 3, "model.width": 1, "dataset.max_train": 40, "dataset.max_test": 10}


class FailsIn(Callback):
    "A callback that fails at an event, in its second round, and says what it heard."

    def __init__(self, event, heard):
        self.event, self.heard = event, heard

    def round(self, row, models):
        self.heard.append(row["round"])
        if self.event == "round" and row["round"] == 1:
            raise OSError(28, "No space left on device")

    def end(self, history, models):
        self.heard.append("end")
        if self.event == "end":
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("event", "heard"), [("round", [0, 1, "end"]), ("end", [0, 1, 2, "end"])])
@pytest.mark.parametrize("diverges", [False, True])
def test_a_callback_that_fails_costs_no_run(event, heard, diverges, tmp_path, monkeypatch):
    said, fine, experiment = [], [], preset("smoke", "fed_avg", **TINY)
    if diverges:
        monkeypatch.setattr(
            training, "trouble", lambda made, results, due: "a loss is nan" if made.number == 2 else None
        )
        heard = [one for one in heard if one != 2]
    callbacks = [FailsIn(event, said), FailsIn("nowhere", fine)]
    with pytest.raises(RuntimeError, match=r"complete, but FailsIn failed \(OSError.*No space left"):
        RunStore(tmp_path).get([experiment], "cpu", progress=False, jobs=1, callbacks=callbacks)
    (stored,) = read_all(tmp_path)
    assert stored.history.stopped == ("diverged" if diverges else "rounds")
    assert said == heard and fine == [0, 1, *([] if diverges else [2]), "end"]
    assert not checkpoint_of(tmp_path, experiment.hash).exists()


def test_without_a_store_the_error_has_the_history():
    experiment, heard = preset("smoke", "fed_avg", **TINY), []
    with pytest.raises(CallbackError) as caught:
        train(experiment, "cpu", progress=False, callbacks=[FailsIn("end", []), FailsIn("nowhere", heard)])
    assert len(caught.value.history.rounds) == 3 and heard[-1] == "end"


def no_more_than(size, work, *args):
    "Do the work in another process that may write no file above so many bytes, as on a full disk."
    import resource

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work(*args)

    process = in_another_process(limited)
    process.join(120)
    return process.exitcode


@posix
def test_on_a_full_disk_the_model_is_lost_and_not_the_run(tmp_path):
    experiment, said = preset("smoke", "fed_avg", **TINY | {"model.width": 8}), tmp_path / "said"

    def work():
        try:
            RunStore(tmp_path).get([experiment], "cpu", progress=False, jobs=1, callbacks=[KeepModel(tmp_path)])
        except CallbackError as error:
            said.write_text(str(error))

    assert no_more_than(20_000, work) == 0
    assert "KeepModel failed (OSError: [Errno 27] File too large" in said.read_text()
    assert str(model_of(tmp_path, experiment.hash)) in said.read_text()
    assert RunStore(tmp_path).find(experiment) and not model_of(tmp_path, experiment.hash).exists()


@posix
def test_without_room_for_checkpoints_training_goes_on(tmp_path):
    experiment, file = preset("smoke", "fed_avg", **TINY | {"model.width": 8}), tmp_path / "run.safetensors"

    def work():
        with pytest.warns(UserWarning, match="no checkpoint after round 0.*File too large.*goes on without"):
            history, _ = train_state(experiment, "cpu", progress=False, checkpoint=file, checkpoint_seconds=0)
        assert len(history.rounds) == 3

    assert no_more_than(20_000, work) == 0 and not file.exists()


def test_no_place_for_models_is_said_before_training(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(StoreError, match="models"):
        RunStore(tmp_path).get(
            [preset("smoke", "fed_avg", **TINY)], "cpu", progress=False, callbacks=[KeepModel(tmp_path)]
        )
    assert not list(tmp_path.glob("[0-9a-f]*[0-9a-f]")) and not (tmp_path / "progress").exists()


def test_the_model_of_a_diverged_run_is_not_promised(history, tmp_path):
    gone = replace(history, stopped="diverged")
    store_module.put_run(tmp_path / "diverged" / EXPERIMENT.hash, gone, provenance_module.provenance("cpu"))
    with pytest.raises(ValueError, match="did not diverge"):
        load_model(tmp_path, EXPERIMENT.hash)


def stopped_in(rnd, experiment, path, *callbacks):
    "Train until a round is over; its checkpoint is not written any more."

    class Stop(Callback):
        def round(self, row, models):
            if row["round"] == rnd:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_state(
            experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=[*callbacks, Stop()]
        )


@pytest.mark.attack("store")
def test_a_garbled_checkpoint_is_never_read_with_other_numbers(tmp_path):
    experiment, path = preset("smoke", "fsl_sage", **TINY), tmp_path / "run.safetensors"
    stopped_in(1, experiment, path)
    whole, chance, read = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(300):
        garbled = bytearray(whole)
        start, end = (0, header) if i % 3 == 0 else (header, len(whole))
        for _ in range(1 + i % 3):
            garbled[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        path.write_bytes(garbled[: chance.randrange(len(whole)) if i % 10 == 9 else None])
        try:
            load_beside(path, experiment)
            read += bytes(garbled) != whole
        except CheckpointError:
            pass
    assert read == 0
    path.write_bytes(whole)
    load_beside(path, experiment)


@posix
@pytest.mark.attack("store")
def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match="ordinary file"):
        load_beside(tmp_path / "run.safetensors", EXPERIMENT)


def with_own_state(monkeypatch, **first):
    "FedAvg whose rate falls with the rounds it has seen, which it keeps in its state."
    usual = ALGORITHMS["fed_avg"]

    def run_round(state, rnd, ledger):
        state.seen = [*getattr(state, "seen", []), torch.tensor(rnd)]
        for part in state.clients:
            part.optimizer.param_groups[0]["lr"] = 0.1 / len(state.seen)
        return usual.run_round(state, rnd, ledger)

    def init(*args):
        state = usual.init(*args)
        vars(state).update(first)
        return state

    monkeypatch.setitem(ALGORITHMS, "fed_avg", usual._replace(init=init, run_round=run_round))
    return preset("smoke", "fed_avg", **TINY)


def test_what_an_algorithm_keeps_in_its_state_survives_a_stop(tmp_path, monkeypatch):
    experiment = with_own_state(monkeypatch, table={"a": (1, None), 2: [0.5, "b"]})
    whole = train(experiment, "cpu", progress=False)
    stopped_in(1, experiment, tmp_path / "run.safetensors")
    resumed, state = train_state(experiment, "cpu", progress=False, checkpoint=tmp_path / "run.safetensors")
    assert_same(whole, resumed)
    assert resumed.rounds.client_lr.tolist() == [0.1, 0.05, 0.1 / 3] and state.table == {"a": (1, None), 2: [0.5, "b"]}


def test_what_a_checkpoint_cannot_hold_is_refused_before_training(tmp_path, monkeypatch):
    experiment = with_own_state(monkeypatch, teacher=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"state\.teacher='Linear'"):
        RunStore(tmp_path).get([experiment], "cpu", progress=False, jobs=1)
    assert len(train(experiment, "cpu", progress=False).rounds) == 3  # without a store there is nothing to resume


def test_seconds_count_all_parts_of_a_run(tmp_path, monkeypatch):
    experiment, path, clock = preset("smoke", "fed_avg", **TINY), tmp_path / "run.safetensors", [0.0]
    usual = training.rounds

    def slow_rounds(run):
        for made in usual(run):
            clock[0] += 100
            yield made

    monkeypatch.setattr(training, "rounds", slow_rounds)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(training.time, "process_time", lambda: 2 * clock[0])  # two cores at work
    stopped_in(1, experiment, path)  # the checkpoint is of round 0
    clock[0] = 5000.0
    history = train(experiment, "cpu", progress=False, checkpoint=path)
    assert (history.seconds, history.core_seconds) == (300, 600)


def test_a_run_says_what_it_cost(tmp_path):
    """Processor time, memory and how many ran side by side, for a run in this process and for runs in others."""
    pair = [preset("smoke", name, **TINY) for name in ("fed_avg", "cse_fsl")]
    store = RunStore(tmp_path)
    store.get(pair[:1], "cpu", progress=False, jobs=1)
    store.get([*pair, pair[0].replace(seed=7)], "cpu", progress=False, jobs=2)
    made = [store.made_with(run) for run in (pair[0], pair[1])]
    assert [one["jobs"] for one in made] == [1, 2]
    assert all(one["core_seconds"] > 0 and one["peak_bytes"] > 2**26 for one in made)
    about = store.about(pair)
    assert about["core_seconds"] == sum(one["core_seconds"] for one in made) and about["jobs"] == [1, 2]
    assert about["instruction_sets"] == made[0]["instruction_set"].split() and about["cores"]
    assert about["torch_builds"][0].startswith(torch.__version__)
    assert {"numpy", "pandas", "matplotlib"} < set(about["versions"])


def steps_in(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return [event.step for event in accumulator.EventAccumulator(str(folder)).Reload().Scalars("test_loss")]


def test_after_a_stop_tensorboard_shows_each_round_once(tmp_path):
    pytest.importorskip("tensorboard")
    experiment, path = preset("smoke", "fed_avg", **TINY), tmp_path / "run.safetensors"
    stopped_in(1, experiment, path, TensorBoard(tmp_path))
    train(experiment, "cpu", progress=False, checkpoint=path, callbacks=[TensorBoard(tmp_path)])
    assert steps_in(tmp_path / "tensorboard" / experiment.hash) == [0, 1, 2]
    train(experiment, "cpu", progress=False, callbacks=[TensorBoard(tmp_path)])  # from the start
    assert steps_in(tmp_path / "tensorboard" / experiment.hash) == [0, 1, 2]


ENDED = """
import os, signal, sys
from fsl_sage.config.presets import preset
from fsl_sage.experiments.loggers import WandB
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.train import train_state

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background work ignores it
changes, folder, how = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class End(Callback):
    def round(self, row, models):
        if row["round"] == 1:
            os.kill(os.getpid(), how)


path, both = f"{folder}/run.safetensors", [WandB(folder), End()]
experiment = preset("smoke", "fsl_sage", **changes)
train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=both)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_after_a_stop_weights_and_biases_go_on_with_the_run(how, tmp_path, monkeypatch):
    """With the real package, offline: one session that holds each round once."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # another test's, which would know the run that is killed
    changes = TINY | {"algorithm.warm_start": True}
    for number in int(getattr(signal, how)), 0:  # signal 0 does nothing
        words = [sys.executable, "-c", ENDED, str(changes), str(tmp_path), str(number)]
        ended = subprocess.run(words, capture_output=True)
        assert bool(ended.returncode) == bool(number), ended.stderr
    ((ids, steps),) = sessions_in(tmp_path).values()
    assert set(ids) == {preset("smoke", "fsl_sage", **changes).hash}
    assert steps == [(0, -1), (1, 0), (2, 1), (3, 2)]


class Session:
    """A stand-in for a run of Weights & Biases."""

    steps, said = [], []

    def __init__(self, **words):
        self.summary = {}
        self.said.append(words)

    def log(self, row, step):
        self.steps.append((row["round"], step))

    def finish(self, exit_code):
        pass


@pytest.mark.parametrize("mode", ["online", "synced"])
def test_a_server_that_knows_the_run_gets_no_earlier_rounds(mode, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Session, Settings=lambda **_: None))
    monkeypatch.setattr(Session, "steps", [])
    monkeypatch.setattr(Session, "said", [])
    monkeypatch.setenv("WANDB_MODE", "online" if mode == "online" else "offline")
    experiment, path = preset("smoke", "fed_avg", **TINY), tmp_path / "run.safetensors"
    stopped_in(1, experiment, path, WandB(tmp_path))
    if mode == "synced":
        sent = tmp_path / "wandb" / f"offline-run-1-{experiment.hash}" / "run.wandb.synced"
        sent.parent.mkdir(parents=True)
        sent.touch()
    train(experiment, "cpu", progress=False, checkpoint=path, callbacks=[WandB(tmp_path)])
    again = "allow" if mode == "online" else None
    assert [(words["id"], words["resume"]) for words in Session.said] == [(experiment.hash, again)] * 2
    assert Session.steps == [(0, 0), (1, 1), (1, 1), (2, 2)]  # a step that comes again is the same step


class Named(Callback):
    def start(self, at):
        (Path(self.folder) / at.name).touch()


def test_loggers_keep_runs_of_other_data_apart(tmp_path):
    """Both runs have one hash; what they are called tells the data."""
    experiment, named = preset("smoke", "fed_avg", **TINY | {"dataset.name": "mine"}), Named()
    named.folder, store = tmp_path / "names", RunStore(tmp_path / "runs")
    named.folder.mkdir()
    for seed in (0, 1):
        data = tmp_path / f"data{seed}"
        data.mkdir()
        x, y = np.full((60, 28, 28), 7, np.uint8), np.arange(60) % 10
        np.savez(data / "mine.npz", x_train=x, y_train=(y + seed) % 10, x_test=x, y_test=y)
        store.get([experiment], "cpu", str(data), progress=False, jobs=1, callbacks=[named])
    names = {path.name for path in store.root.glob(f"{experiment.hash}*")}
    assert {path.name for path in named.folder.iterdir()} == names and len(names) == 2


KILLED = """
import os, signal
from fsl_sage.algorithms.baselines import fed_avg_round, init_fed_avg
from fsl_sage import algorithm


def init(experiment, data, ledger):
    if experiment.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
    return init_fed_avg(experiment, data, ledger)


@algorithm("fragile", init=init)
def fragile(state, rnd, ledger):
    return fed_avg_round(state, rnd, ledger)
"""


class Killed(Callback):
    def start(self, at):
        if at.experiment.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@posix
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a process was ended from outside")
def test_one_worker_killed_costs_only_its_run(tmp_path):
    sweep = [preset("smoke", "fed_avg", **TINY, seed=seed) for seed in range(4)]
    with pytest.raises(WorkerError, match=rf"run {sweep[1].hash}: its process was ended .*SIGKILL"):
        RunStore(tmp_path).get(sweep, "cpu", progress=False, jobs=2, callbacks=[Killed()])
    assert [RunStore(tmp_path).find(run) is not None for run in sweep] == [True, False, True, True]


def cannot_arrive():
    raise LookupError("no such thing on this side")


class Unreadable(Callback):
    def __reduce__(self):
        return cannot_arrive, ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a process was ended from outside")
def test_what_a_worker_cannot_read_is_said(tmp_path):
    sweep = [preset("smoke", "fed_avg", **TINY, seed=seed) for seed in range(2)]
    with pytest.raises(WorkerError, match="failed to un-serialize: LookupError: no such thing on this side"):
        RunStore(tmp_path).get(sweep, "cpu", progress=False, jobs=2, callbacks=[Unreadable()])


@posix
@pytest.mark.slow
def test_one_worker_killed_in_a_sweep_is_in_the_table(tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(KILLED)
    words = [f"{key}={value}" for key, value in TINY.items() if key != "rounds"]
    words += ["rounds=1", "preset=smoke", f"plugins=[{tmp_path / 'fragile.py'}]", "algorithm=fragile", "seed=0,1,2"]
    done = subprocess.run(
        [sys.executable, "-m", "fsl_sage", "-m", *words, "hydra.launcher.n_jobs=2"],
        capture_output=True, text=True, env=os.environ | {"FSL_SAGE_RUNS": str(tmp_path / "runs")},
    )  # fmt: skip
    assert done.returncode == 1 and "1 of 3 runs failed" in done.stdout, done
    assert "SIGKILL" in done.stdout and "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("[0-9a-f]" * 16))) == 2


def test_options_that_stored_runs_do_not_heed_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = [f"{key}={value}" for key, value in TINY.items() if key != "rounds"]
    words += ["rounds=1", "preset=smoke", "algorithm=fed_avg", "device=cpu"]
    assert cli.main(words) == 0 and "of no effect" not in capsys.readouterr().err
    assert cli.main([*words, "resume=False", "log=[tensorboard]"]) == 0
    said = capsys.readouterr().err
    assert all(
        f"{word}: has no effect on stored runs" in said for word in ["device=cpu", "resume=False", "log=[tensorboard]"]
    )


def test_a_run_that_was_cut_short_stands_in_for_the_whole(tmp_path):
    """Of several the longest; not where what a round does follows from their number."""
    store, tiny = RunStore(tmp_path), {"num_clients": 2, "dataset.max_train": 64, "dataset.max_test": 32}
    one, two, five = (preset("smoke", "cse_fsl", rounds=n, **tiny) for n in (1, 2, 5))
    falling = {f"model.{part}.optimizer.scheduler": {"name": "fraction"} for part in ("client", "server", "auxiliary")}
    for run in (one, two, two.replace(**falling)):
        store.save(training.train(run, "cpu", progress=False), device="cpu")
    assert store.longest([five, five.replace(seed=7)]) == [two]
    assert store.longest([one, five]) == [one, two]  # a stored run comes before its beginnings
    assert store.longest([five.replace(**falling), five.replace(eval_every=2)]) == []
    assert store.longest([five.replace(**{"algorithm.server_update_interval": 3})]) == []
