"""Parts of one's own: whose they are, in other processes, in the store; and those who look on."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from fsl_sage import plugins
from fsl_sage.config import PLUGGED, SESSION, MissingPluginError, preset
from fsl_sage.data import load
from fsl_sage.loggers import TensorBoard, WandB
from fsl_sage.plugins import PluginError, load_plugins
from fsl_sage.runs import TABLES, RunStore
from fsl_sage.runs_cli import list_runs, prunable
from fsl_sage.training import ALGORITHMS, Callback, train

ROOT = Path(__file__).parent.parent
FLAT = """
from torch import nn
from fsl_sage.plugins import split_model

@split_model("flat", cut="0")
def flat(in_channels, num_classes, image_size, width):
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), pool, nn.Flatten(), nn.Linear(16, num_classes))
"""
SMALL = {"rounds": 1, "dataset.max_train": 90, "dataset.max_test": 50}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for home in {plugins._home(tag) for tag in PLUGGED.values()}:
        plugins.forget(home)


@pytest.fixture
def file(tmp_path):
    def write(text, name="parts.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def small(model="flat", algorithm="fed_avg"):
    return preset("smoke", algorithm, **SMALL, **{"model.name": model})


def test_two_files_with_one_name_are_two_experiments(file, tmp_path):
    store, hashes = RunStore(tmp_path / "runs"), []
    for text in (FLAT, FLAT + "# changed"):
        load_plugins([file(text)])
        store.get([small()], "cpu", progress=False)
        hashes.append(small().hash)
    assert hashes[0] != hashes[1] and all((store.root / name).exists() for name in hashes)
    # The first one's parts are gone: its run is left alone.
    assert [path.name for path, _ in prunable(store.root)] == []
    assert set(store.frame()["hash"]) == {hashes[1]} and hashes[1] in list_runs(store.root)
    load_plugins([file(FLAT)])
    assert store.find(small()) is not None and small().hash == hashes[0]


def test_without_plugins_nothing_is_said_of_them():
    assert "plugins" not in preset("smoke").to_dict()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (FLAT.replace('"flat"', '"alexnet"'), "alexnet"),
        (FLAT.replace('"flat"', '"a b"'), "plain name"),
        (FLAT.replace("image_size, width)", "image_size)"), "width"),
        (FLAT + FLAT, "line 13"),
        ("from fsl_sage.plugins import dataset\n@dataset('d')\ndef d(): pass", "line 2"),
        ("from fsl_sage.plugins import algorithm\n@algorithm('a', uses=['alpha'])\ndef a(s, r, l): pass", "uses"),
        ("from fsl_sage.plugins import algorithm\n@algorithm('a')\ndef a(state): pass", "(state, rnd, ledger)"),
        ("from fsl_sage.plugins import auxiliary\n@auxiliary('resnet18')\ndef a(split): pass", "resnet18/default"),
        ("1 / 0", "line 1: ZeroDivisionError"),
    ],
)
def test_a_plugin_that_is_wrong_names_its_line_and_leaves_nothing(file, text, says):
    with pytest.raises(PluginError) as error:
        load_plugins([file(text)])
    assert says in str(error.value) and "parts.py, line" in str(error.value) and not PLUGGED


def test_another_file_may_not_take_the_name(file):
    load_plugins([file(FLAT)])
    with pytest.raises(PluginError, match=r"parts\.py has this one"):
        load_plugins([file(FLAT + "# another", "other.py")])
    assert small().plugins[0].startswith("parts@")


def test_a_data_set_must_be_arrays(file):
    text = "from fsl_sage.plugins import dataset\n@dataset('odd')\ndef odd(root): return {'x_train': 1}"
    load_plugins([file(text)])
    with pytest.raises(ValueError, match="x_train, y_train, x_test, y_test"):
        load("odd")


def test_an_experiment_takes_its_plugins_along(file, tmp_path):
    load_plugins([file(FLAT)])
    parcel = tmp_path / "experiment.pickle"
    parcel.write_bytes(pickle.dumps(small()))
    code = f"import pickle; print(pickle.loads(open({str(parcel)!r}, 'rb').read()).hash)"
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.stdout.strip() == small().hash, done.stderr
    data = parcel.read_bytes()
    load_plugins([file(FLAT + "# changed meanwhile")])
    with pytest.raises(MissingPluginError):
        pickle.loads(data)


def test_parts_of_a_session_are_trained_in_it(tmp_path):
    source = "from fsl_sage.plugins import algorithm\n@algorithm('same')\ndef same(s, r, l): return ROUND(s, r, l)"
    exec(source, {"ROUND": ALGORITHMS["sl_single_server"].run_round})
    experiments = [small("simple_conv", "same").replace(seed=seed) for seed in (1, 2)]
    assert experiments[0].plugins[0].startswith(SESSION)
    RunStore(tmp_path).get(experiments, "cpu", progress=False, jobs=2)


def test_installed_packages_offer_parts_by_entry_points(tmp_path, monkeypatch):
    (tmp_path / "flat_package.py").write_text(FLAT)
    info = tmp_path / "flat_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flat-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fsl_sage.plugins]\nflat = flat_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_plugins() == list(small().plugins)
    assert pickle.loads(pickle.dumps(small())) == small()


class Vandal(Callback):
    "Does to a run whatever one who looks on could."

    def start(self, experiment):
        torch.manual_seed(0)

    def round(self, row, models):
        for model in models():
            model.eval()
            for parameter in model.parameters():
                parameter.data.zero_()
        row.clear()
        torch.rand(7)

    def end(self, history, models):
        history.rounds.loc[:, "test_accuracy"] = 1.0


def test_callbacks_cannot_change_the_numbers(file):
    load_plugins([file(FLAT.replace("nn.Flatten(),", "nn.Flatten(), nn.Dropout(),"))])  # global random numbers
    experiment = small().replace(rounds=3)
    histories = []
    for callbacks in ([], [Vandal()]):
        torch.manual_seed(5)
        histories.append(train(experiment, "cpu", progress=False, callbacks=callbacks))
    for name in TABLES:
        pd.testing.assert_frame_equal(*(getattr(history, name) for history in histories), check_exact=True)


def test_tensorboard_gets_every_round(file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    load_plugins([file(FLAT)])
    history = train(small().replace(rounds=2), "cpu", progress=False, callbacks=[TensorBoard(tmp_path)])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / history.experiment.hash)).Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [0, 1]


def test_wandb_works_offline(file, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    load_plugins([file(FLAT)])
    train(small(), "cpu", progress=False, callbacks=[WandB(tmp_path)])
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
