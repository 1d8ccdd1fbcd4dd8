"""The store between processes: killed, racing, not allowed to write, pointed elsewhere."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pandas as pd
import pytest

from fsl_sage import runs
from fsl_sage.config import preset
from fsl_sage.runs import TABLES, RunStore, StoreError
from fsl_sage.training import History

EXPERIMENT = preset("smoke", "fed_avg")


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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
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
    assert any(tmp_path.iterdir()) and RunStore(tmp_path).find(EXPERIMENT) is None


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
