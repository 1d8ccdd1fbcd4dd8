"""Parts of one's own: whose they are, in other processes, in the store; and those who look on."""

import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.commands import runs as runs_cli
from fsl_sage.commands import train as cli
from fsl_sage.commands.runs import list_runs, prunable
from fsl_sage.config.experiment import PLUGGED, SESSION, MissingPluginError
from fsl_sage.config.presets import preset
from fsl_sage.data.sources import load
from fsl_sage.experiments import digests, plugin_files, plugins
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.digests import data_digest
from fsl_sage.experiments.loggers import TensorBoard, WandB
from fsl_sage.experiments.plugin_files import PluginError, load_plugins
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import TABLES
from fsl_sage.experiments.train import train
from fsl_sage.networks.zoo import MODELS
from tests.support import ROOT

FLAT = """
from torch import nn
from fsl_sage import network

@network("flat", cut="0")
def flat(in_channels, num_classes, image_size, width):
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), pool, nn.Flatten(), nn.Linear(16, num_classes))
"""
EVASIVE = """
import importlib, pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).parent))
try:
    importlib.import_module("later")
finally:
    sys.path.pop(0)
"""
SMALL = {"rounds": 1, "dataset.max_train": 90, "dataset.max_test": 50}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for home in {plugins.home_of(tag) for tag in PLUGGED.values()}:
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
        ("from fsl_sage import dataset\n@dataset('d')\ndef d(): pass", "line 2"),
        ("from fsl_sage import algorithm\n@algorithm('a', labels='A')\ndef a(s, r, l): pass", "did you mean 'label'"),
        ("from fsl_sage import algorithm\n@algorithm('a')\ndef a(state): pass", "(state, rnd, ledger)"),
        ("from fsl_sage import auxiliary\n@auxiliary('resnet18')\ndef a(split): pass", "resnet18/default"),
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
    text = "from fsl_sage import dataset\n@dataset('odd')\ndef odd(root): return {'x_train': 1}"
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
    source = "from fsl_sage import algorithm\n@algorithm('same')\ndef same(s, r, l): return ROUND(s, r, l)"
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


HELPED = """
from helper import channels
from torch import nn
from fsl_sage import network

@network("flat", cut="0")
def flat(in_channels, num_classes, image_size, width):
    import later
    pool = nn.AdaptiveAvgPool2d(2)
    net = nn.Sequential(nn.Conv2d(in_channels, channels, 3), pool, nn.Flatten())
    return net.append(nn.Linear(4 * channels, num_classes, bias=later.BIAS))
"""


@pytest.fixture
def helped(file):
    file("channels = 4\n", "helper.py")
    file("BIAS = True\n", "later.py")
    return file(HELPED)


def parameters():
    return sum(p.numel() for p in MODELS["flat"].build(1, 10, 8, 8).parameters())


def test_an_edited_module_of_a_plugin_is_another_plugin(file, helped):
    """Whether it is imported at the top, in a function, or by another module."""
    load_plugins([helped])
    first, size = small().hash, parameters()
    file("channels = 5\n", "helper.py")
    load_plugins([helped])
    assert small().hash != first and parameters() != size
    file("from nested.deep import channels\n", "helper.py")
    (helped.parent / "nested").mkdir()
    file("channels = 4\n", "nested/deep.py")
    load_plugins([helped])
    nested = small().hash
    assert nested != first and parameters() == size
    file("channels = 4 + 0\n", "nested/deep.py")
    load_plugins([helped])
    assert small().hash != nested
    file("channels = 4\n", "helper.py")
    load_plugins([helped])
    assert small().hash == first
    file("BIAS = False\n", "later.py")
    load_plugins([helped])
    assert small().hash != first and parameters() == size - 10


def test_a_module_is_run_as_it_was_when_the_tag_was_made(file, helped):
    load_plugins([helped])
    size = parameters()
    file("1 / 0\n", "later.py")
    sys.modules.pop("later", None)
    assert parameters() == size


def test_a_module_that_the_tag_cannot_cover_is_refused(file, helped):
    with pytest.raises(PluginError, match="import later"):
        load_plugins([file(FLAT + EVASIVE)])
    del sys.modules["later"]


def test_a_plugin_of_the_same_name_has_its_own_modules(file, helped, tmp_path):
    load_plugins([helped])
    other = tmp_path / "other"
    other.mkdir()
    (other / "helper.py").write_text("channels = 7\n")
    (other / "b.py").write_text("import helper\nfrom fsl_sage import algorithm\n"
                                "algorithm(f'a{helper.channels}')(lambda state, rnd, ledger: None)\n")  # fmt: skip
    load_plugins([other / "b.py"])
    assert "a7" in ALGORITHMS


def test_a_plugin_without_parts_is_refused(file):
    with pytest.raises(PluginError, match="in no run's address"):
        load_plugins([file("import fsl_sage.core\n")])


def test_a_tag_of_a_file_that_stands_alone_stays(file):
    tags = load_plugins([file(FLAT)])
    assert tags == [f"parts@{hashlib.sha256(FLAT.encode()).hexdigest()[:12]}"]


class Edit(Callback):
    "Edits a plug-in's file while its run is at work."

    def __init__(self, path):
        self.path = path

    def round(self, row, models):
        self.path.write_text("1 / 0\n")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_edited_while_its_runs_are_at_work_changes_nothing(file, helped, tmp_path, jobs):
    load_plugins([helped])
    runs = [small().replace(seed=seed, rounds=2) for seed in (1, 2, 3)]
    for path in (helped, helped.parent / "helper.py"):
        store = RunStore(tmp_path / f"runs-{path.stem}")
        before = path.read_text()
        assert len(store.get(runs, "cpu", progress=False, jobs=jobs, callbacks=[Edit(path)])) == 3
        assert path.read_text() == "1 / 0\n" and len(list(store.root.glob("*/config.json"))) == 3
        path.write_text(before)


def test_an_experiment_of_a_plugin_that_was_loaded_anew_is_not_trained(file):
    load_plugins([file(FLAT)])
    experiment = small()
    load_plugins([file(FLAT + "# changed")])
    with pytest.raises(MissingPluginError):
        train(experiment, "cpu", progress=False)


def test_the_words_for_a_run_whose_plugin_is_not_loaded_show_it(file, tmp_path, capsys):
    path, root = file(FLAT), str(tmp_path / "runs")
    load_plugins([path])
    experiment = small()
    RunStore(root).get([experiment], "cpu", progress=False)
    words = ["show", experiment.hash, "--runs", root]
    plugins.forget(str(path.resolve()))
    assert runs_cli.main(words) == 1
    assert "load their files by plugins=[FILE] (fsl-sage), --plugins FILE (fsl-sage-runs)" in capsys.readouterr().err
    assert runs_cli.main([*words, "--plugins", str(path)]) == 0
    assert words[1] in capsys.readouterr().out


def test_a_plugin_that_no_run_uses_gets_a_word(file):
    tags = load_plugins([file(FLAT)])
    assert plugin_files.unused(tags, [small()]) == []
    assert "model=flat" in plugin_files.unused(tags, [small("simple_conv")])[0]


class Vandal(Callback):
    "Does to a run whatever one who looks on could."

    def start(self, at):
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


def test_a_file_edited_between_the_jobs_of_a_sweep_changes_nothing(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    edits = "    open(__file__, 'w').write('1 / 0')\n    pool = nn"
    path = file(FLAT.replace("    pool = nn", edits))
    words = ["-m", f"plugins=[{path}]", "model=flat", "algorithm=fed_avg", "preset=smoke", "device=cpu", "seed=1,2"]
    words += [f"{name}={value}" for name, value in SMALL.items()]
    assert cli.main([*words, "hydra.launcher.n_jobs=1"]) == 0, capsys.readouterr().err
    assert path.read_text() == "1 / 0" and len(list((tmp_path / "runs").glob("*/config.json"))) == 2


WEIGHTS = """
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from fsl_sage import network

HERE = Path(__file__).parent
{0}

@network("begun", cut="0")
def begun(in_channels, num_classes, image_size, width):
    net = nn.Sequential(nn.Conv2d(in_channels, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, num_classes))
    nn.init.constant_(net[0].weight, {1})
    return net
"""
READERS = {
    "text": ("", "float((HERE / 'w').read_text())"),
    "numpy": ("", "float(np.load(HERE / 'w.npy'))"),
    "torch": ("", "float(torch.load(HERE / 'w.pt', weights_only=True))"),
    "safetensors": ("", "float(safetensors.torch.load_file(HERE / 'w.safetensors')['w'])"),
    "at import": ("W = float((HERE / 'w').read_text())\n", "W"),
}


def put_weights(folder, value):
    (folder / "w").write_text(str(value))
    np.save(folder / "w.npy", value)
    torch.save(torch.tensor(value), folder / "w.pt")
    save_file({"w": torch.tensor(value)}, folder / "w.safetensors")


@pytest.mark.parametrize("reader", READERS)
def test_a_run_is_served_only_for_the_weights_that_it_began_from(reader, file, tmp_path):
    path, store = file(WEIGHTS.format(*READERS[reader])), RunStore(tmp_path / "runs")
    experiment, losses = {}, []
    for value in (0.1, -0.2, 0.1):
        put_weights(tmp_path, value)
        plugins.forget(str(path))  # as a new process
        digests._READ.clear()
        load_plugins([path], installed=False)
        experiment = preset("smoke", "fed_avg", **SMALL | {"model.name": "begun"})
        (history,) = store.get([experiment], "cpu", progress=False, jobs=1)
        losses.append(history.rounds.test_loss[0])
    assert losses[0] == losses[2] != losses[1]
    assert len(list(store.root.glob(f"{experiment.hash}*"))) == 2


def test_a_run_whose_weights_change_on_the_way_is_no_other_run(file, tmp_path):
    """Looked for with one file, resumed with another: nothing of the one goes into the other."""
    path, store = file(WEIGHTS.format(*READERS["text"])), RunStore(tmp_path / "runs")
    put_weights(tmp_path, 0.1)
    load_plugins([path], installed=False)
    experiment = preset("smoke", "fed_avg", **SMALL | {"model.name": "begun", "rounds": 2})
    before = store.folder(experiment)
    put_weights(tmp_path, 0.3)
    (history,) = store.get([experiment], "cpu", progress=False, jobs=1)
    assert store.folder(experiment) == before and len(history.data) == 64
    put_weights(tmp_path, 0.1)
    assert store.find(experiment) is None


def test_a_plugin_in_another_folder_reads_the_files_there(tmp_path):
    """The same text has the same tag; what the first one read must not count for the second."""
    source, store = WEIGHTS.format(*READERS["text"]), RunStore(tmp_path / "runs")
    data, names = [], []
    for place, value in ("here", 0.1), ("there", -0.2):
        folder = tmp_path / place
        folder.mkdir()
        put_weights(folder, value)
        (folder / "own.py").write_text(source)
        load_plugins([folder / "own.py"], installed=False)
        experiment = preset("smoke", "fed_avg", **SMALL | {"model.name": "begun"})
        data += [history.data for history in store.get([experiment], "cpu", progress=False, jobs=1)]
        names.append(store.folder(experiment).name)
        plugins.forget(str(folder / "own.py"))
    assert data[0] != data[1] and names[0] != names[1]


def test_ordinary_plugins_have_the_digest_of_their_data(file, tmp_path):
    load_plugins([file(FLAT)], installed=False)
    experiment = preset("smoke", "fed_avg", **SMALL | {"model.name": "flat"})
    assert train(experiment, "cpu", progress=False).data == data_digest("fmnist_mini")
