"""The visit to a GPU machine, tried on a CPU: packed, checked, trained until it is killed, brought home."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.provenance import provenance
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import checkpoint_of
from fsl_sage.experiments.stored import read_all
from fsl_sage.experiments.train import train, train_state
from fsl_sage.papers.comparison import headline_run
from tests.support import ROOT

PROGRAM = ROOT / "benchmarks" / "gpu_visit.py"
ABSENT = """import sys

class Absent:
    names = {"hydra", "omegaconf", "papermill", "nbformat", "IPython", "ipykernel", "ipywidgets", "opacus", "pyarrow",
             "ray", "flwr", "markdown_it", "mdit_py_plugins", "latex2mathml", "tensorboard", "nbdev", "pytest",
             "scipy"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Absent())
"""
TINY = {"dataset.max_train": 60, "dataset.max_test": 20, "model.width": 4, "num_clients": 2}


class Machine:
    """A folder that stands for the GPU machine, without the packages that it lacks."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "absent").mkdir()
        (folder / "absent" / "sitecustomize.py").write_text(ABSENT)

    def environment(self, out):
        here = {name: str(self.folder / name) for name in ("carried", "there", "nowhere")}
        path = os.pathsep.join([str(self.folder / "absent"), f"{here['carried']}/common/site"])
        return os.environ | {
            "VISIT_CARRIED": here["carried"], "VISIT_TMP": here["there"], "OUT": str(self.folder / out),
            "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FSL_SAGE_DATA": here["nowhere"],
        }  # fmt: skip

    def start(self, *words, out="out"):
        command = [sys.executable, str(PROGRAM), *words]
        return subprocess.Popen(command, env=self.environment(out), stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def visit():
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("gpu_visit", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine to which the first two transfers have been packed."""
    folder = tmp_path_factory.mktemp("visit")
    draw, sizes = np.random.RandomState(0), {"train": 230, "test": 70}
    arrays = {f"x_{s}": draw.randint(256, size=(n, 32, 32, 3)).astype(np.uint8) for s, n in sizes.items()}
    np.savez(folder / "cifar10.npz", **arrays, **{f"y_{s}": np.arange(n) % 10 for s, n in sizes.items()})
    machine = Machine(folder)
    packing = machine.start("pack", "--data", str(folder))
    said, _ = packing.communicate()
    assert packing.returncode == 0 and said.count(": fits") >= 2 and "gpu_visit.py check --seconds" in said
    return machine


@pytest.mark.slow
def test_every_check_passes_without_the_packages_that_are_missing_there(machine):
    """A step is a process with a result of its own; all of them together take less than five minutes."""
    checking = machine.start("check", "--tiny", "--device", "cpu", "--seconds", "300", out="first")
    checking.communicate()
    out = machine.folder / "first"
    said = json.loads((out / "check.json").read_text())
    assert all(words.startswith("ok") for words in said.values()), (said, (out / "log.txt").read_text()[-3000:])
    found = {path.stem for path in out.glob("*.json")} - {"check"}
    assert set(said) == found == {"env", "traces", "smoke", "engine", "recorded", "beside"}
    assert len(list(out.iterdir())) <= 8
    traces, smoke = (json.loads((out / f"{name}.json").read_text()) for name in ("traces", "smoke"))
    assert traces["simple_conv-cse_fsl"]["worst"] < 1e-7
    assert smoke["fsl_sage"]["same_bytes"] and smoke["fsl_sage"]["twice_equal"]
    assert smoke["fsl_sage"]["far_from_cpu"] == smoke["fsl_sage"]["resumed_far"] == 0
    assert {how: row["far"] for how, row in smoke["one seed twice"].items()} == dict.fromkeys(
        ("as it stands", "cudnn", "all"), 0.0
    )


@pytest.mark.slow
def test_a_visit_that_is_killed_leaves_its_runs(machine):
    """Once the first run is in the archive the program is killed; its children end; what came home is whole."""
    training = machine.start("train", "--tiny", "--device", "cpu", "--seconds", "500", "--jobs", "1", out="second")
    archive, names = machine.folder / "second" / "runs.tar.gz", []
    try:
        while training.poll() is None and not any(name.endswith("rounds.csv") for name in names):
            time.sleep(0.2)
            if archive.exists():
                with tarfile.open(archive) as tar:
                    names = tar.getnames()
    finally:
        children = psutil.Process(training.pid).children(recursive=True) if training.poll() is None else []
        training.send_signal(signal.SIGKILL)
        training.communicate()
    assert children, "it had ended before it could be killed"
    assert not psutil.wait_procs(children, timeout=60)[1], "its children have survived it"

    store = machine.folder / "store"
    for _ in range(2):  # a second time nothing changes
        subprocess.run([sys.executable, PROGRAM, "home", archive.parent, "--store", store], check=True)
        runs = read_all(store)
        assert len(runs) >= 1 and not any(run.problem for run in runs)
    assert {run.folder.name for run in runs} >= {name.split("/")[1] for name in names if name.endswith("rounds.csv")}
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert {run.made_with["commit"] for run in runs} == {commit or None}
    assert {run.history.experiment.precision for run in runs} == {"tf32"}


class Stop(Callback):
    """Ends a run in its third round, of which the first two are in a checkpoint."""

    def round(self, row, models):
        if row["round"] == 2:
            raise KeyboardInterrupt


@pytest.fixture
def cut_short(tmp_path, monkeypatch, visit):
    """The archive of a run of five rounds that was cut short in its third."""
    monkeypatch.setattr(visit, "STORE", tmp_path / "runs")
    monkeypatch.setattr(visit, "OUT", tmp_path)
    monkeypatch.setattr(visit, "THERE", tmp_path)

    def cut(**changes):
        run = headline_run("smoke", "fsl_sage", rounds=5, **TINY, **changes)
        path = checkpoint_of(visit.STORE, run.hash)
        with pytest.raises(KeyboardInterrupt):
            train_state(run, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=[Stop()])
        visit.collect()
        with tarfile.open(tmp_path / "runs.tar.gz") as tar:
            return run, json.loads(tar.extractfile(f"unfinished/{run.hash}.json").read())

    return cut


def test_a_run_that_was_cut_short_is_a_run_of_fewer_rounds(cut_short, visit, tmp_path):
    """The same numbers as if so many rounds had been asked for."""
    run, head = cut_short()
    assert "of 2 rounds" in visit.finish(head, provenance("cpu"), tmp_path / "home")
    short = run.replace(rounds=2)
    kept, whole = RunStore(tmp_path / "home").find(short), train(short, "cpu", progress=False)
    for name in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(kept, name), getattr(whole, name), check_exact=True)


def test_a_run_whose_rates_depend_on_its_rounds_is_dropped(cut_short, visit, tmp_path):
    """Two of five rounds are not a run of two rounds where the rate falls after a fraction of them."""
    _, head = cut_short(**{"model.client.optimizer.scheduler.name": "fraction"})
    assert "dropped" in visit.finish(head, provenance("cpu"), tmp_path / "home")
    assert not (tmp_path / "home").exists() or not read_all(tmp_path / "home")


def test_a_mosaic_gives_its_images_back(visit):
    """Also where the last row is not full."""
    images = np.random.RandomState(1).randint(256, size=(73, 32, 32, 3)).astype(np.uint8)
    assert (visit.tiles(visit.mosaic(images))[:73] == images).all()
