"""A stored run, a checkpoint and a model belong to the data that they were made with."""

import json
import os
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from fsl_sage.commands.runs import find_run, list_runs, prunable, show_run
from fsl_sage.commands.train import main
from fsl_sage.config.experiment import PLUGGED
from fsl_sage.config.presets import preset
from fsl_sage.data import sources as data
from fsl_sage.data.sources import load
from fsl_sage.experiments import digests
from fsl_sage.experiments import train as training
from fsl_sage.experiments.attempt import digest_at, run_name
from fsl_sage.experiments.digests import data_digest
from fsl_sage.experiments.models import KeepModel
from fsl_sage.experiments.origins import FILES
from fsl_sage.experiments.plugin_files import load_plugins
from fsl_sage.experiments.plugins import forget
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import checkpoint_of, leftovers, model_of
from fsl_sage.experiments.stored import read_all
from fsl_sage.experiments.train import train
from tests.support.runs import stopped_after

OWN = {
    "dataset.name": "own", "dataset.max_train": None, "dataset.max_test": None, "rounds": 1, "num_clients": 2,
    "model.name": "simple_conv", "model.client.batch_size": 16,
}  # fmt: skip
EXPERIMENT = preset("smoke", "fed_avg", **OWN)
SET = load()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("FSL_SAGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(digests, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_KNOWN", {})
    yield
    for home in {FILES[tag].home for tag in PLUGGED.values()}:
        forget(home)


def put(turn, folder=None, name="own", age=60):
    """A data set of 60 images whose labels are turned by `turn`, written `age` seconds ago."""
    path = (folder or data.data_root()) / f"{name}.npz"
    y = (SET.train.y[:60].numpy() + turn) % 10
    np.savez(path, x_train=SET.train.x[:60, 0], y_train=y, x_test=SET.train.x[:60, 0], y_test=y)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def get(experiment=EXPERIMENT, root=None, **more):
    return RunStore().get([experiment], "cpu", root, progress=False, **more)[0]


def true(experiment=EXPERIMENT, root=None):
    return train(experiment, "cpu", root, progress=False)


def same(one, other):
    return one.rounds.equals(other.rounds)


def test_a_changed_data_set_is_trained_again_and_both_runs_stay():
    put(0)
    first = get()
    put(5)
    second = get()
    assert same(second, true()) and not same(first, second)
    put(0)
    assert same(get(), first)
    names = sorted(path.name for path in RunStore().root.glob("*-*"))
    assert names == [f"{EXPERIMENT.hash}-{second.data[:8]}"] and len(read_all(RunStore().root)) == 2


def test_another_data_root_is_other_data(tmp_path):
    roots = [tmp_path / name for name in ("A", "B")]
    for turn, root in enumerate(roots):
        root.mkdir()
        put(turn, root)
    runs = [get(root=str(root)) for root in roots]
    assert not same(*runs) and all(same(run, true(root=str(root))) for run, root in zip(runs, roots, strict=True))
    store = RunStore()
    for run, root in zip(runs, roots, strict=True):
        store.get([EXPERIMENT], "cpu", str(root), progress=False)
        assert store.about([EXPERIMENT])["data"] == {"own": run.data}


def test_a_folder_of_pictures_is_other_data_when_a_picture_changes(tmp_path):
    experiment = EXPERIMENT.replace(**{"dataset.name": "imagefolder", "model.client.batch_size": 4})
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(8):
                picture = np.full((8, 8), 30 * i + (label == "b"), np.uint8)
                Image.fromarray(picture).save(tmp_path / "data" / split / label / f"{i}.png")
    first = get(experiment)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "data" / "train" / "a" / "5.png")
    assert not same(get(experiment), first) and same(get(experiment), true(experiment))


def test_a_touched_file_is_still_the_same_data(monkeypatch):
    path = put(0)
    first = get()
    os.utime(path)
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".away").rename(path)
    monkeypatch.setattr(training, "prepare", None)  # training would fail
    assert same(get(), first)


def test_labels_of_another_type_and_shape_are_the_same_data():
    path = put(0)
    digest = data_digest("own")
    with np.load(path) as arrays:
        np.savez(path, **{name: array[:, None].astype(np.uint8) if name[0] == "y" else array[..., None]
                          for name, array in arrays.items()})  # fmt: skip
    assert data_digest("own") == digest == load("own").digest


def test_the_digest_is_kept_for_other_processes_and_notices_every_write(monkeypatch):
    path = put(0)
    first = data_digest("own")
    read = []
    monkeypatch.setattr(digests, "SETTLED", 0)
    monkeypatch.setattr(digests, "checked_arrays", lambda *args: read.append(1) or data.checked_arrays(*args))
    assert data_digest("own") == first and len(read) == 1
    digests._KNOWN.clear()  # as in another process
    assert data_digest("own") == first and len(read) == 1
    before = path.stat()
    put(5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data_digest("own") != first and len(read) == 2 and path.stat().st_size == before.st_size
    digests._kept().write_text("torn")
    digests._KNOWN.clear()
    assert data_digest("own") != first and len(read) == 3


def test_a_file_that_is_written_twice_in_one_tick_is_read_twice():
    put(0, age=0)
    first = data_digest("own")
    put(5, age=0)
    assert data_digest("own") != first


def test_without_the_data_stored_runs_can_still_be_read():
    path = put(0)
    first = get()
    path.unlink()
    assert same(get(), first) and data_digest("own") is None


def test_a_run_that_does_not_say_its_data_is_served_with_a_warning():
    put(0)
    first = get()
    file = RunStore().folder(EXPERIMENT) / "provenance.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in about.items() if name not in ("data", "sha256")}))
    with pytest.warns(UserWarning, match="do not say which data"):
        assert same(get(), first)


def test_a_checkpoint_of_other_data_is_not_continued(monkeypatch):
    experiment = EXPERIMENT.replace(rounds=3)
    put(0)
    store = RunStore()
    file = checkpoint_of(store.root, experiment.hash)
    stopped_after(1, monkeypatch, experiment, file)
    put(5)
    with pytest.warns(UserWarning, match="other data"):
        again = training.train(experiment, "cpu", progress=False, checkpoint=file)
    assert same(again, true(experiment))
    assert same(get(experiment), again) and digest_at(store.root, experiment.hash) != again.data  # the checkpoint stays
    put(0)
    resumed = get(experiment)
    assert same(resumed, true(experiment)) and store.made_with(experiment)["resumed"] and not file.exists()


def test_a_model_is_kept_for_the_run_of_its_data(capsys):
    words = ["dataset=own", "algorithm=fed_avg", "preset=smoke", "device=cpu", "rounds=1", "model=simple_conv"]
    words += ["dataset.max_train=null", "dataset.max_test=null", "num_clients=2", "model.client.batch_size=16"]
    put(0)
    assert main(words) == 0
    store = RunStore()
    put(5)
    assert main([*words, "save=true"]) == 0, capsys.readouterr().err
    models = [path.stem for path in (store.root / "models").iterdir()]
    assert models == [f"{EXPERIMENT.hash}-{data_digest('own')[:8]}"] and len(read_all(store.root)) == 2
    put(0)
    assert main([*words, "save=true"]) == 0 and model_of(store.root, EXPERIMENT.hash).exists()


def test_list_show_and_prune_know_both(tmp_path):
    store = RunStore()
    for turn in (0, 5):
        put(turn)
        get(callbacks=[KeepModel(store.root)])
    plain, beside = sorted((run.folder.name for run in read_all(store.root)), key=len)
    text = list_runs(store.root)
    assert {plain, beside} <= set(text.split()) and "2 of 2 runs" in text
    assert find_run(store.root, plain).folder.name == plain and find_run(store.root, beside).folder.name == beside
    assert beside in show_run(find_run(store.root, beside)) and prunable(store.root) == []
    assert set(store.frame().hash) == {plain, beside}
    left = store.root / f".{beside}-0123456789ab"
    left.mkdir()
    assert leftovers(store.root, plain) == [] and leftovers(store.root, beside) == [left]
    assert [path for path, _ in prunable(store.root)] == [left]
    assert store.set_aside([EXPERIMENT]) == 1 and (store.root / plain).exists() and not (store.root / beside).exists()


def test_a_figure_does_not_mix_data():
    put(0)
    store, other = RunStore(), EXPERIMENT.replace(seed=1)
    store.get([EXPERIMENT], "cpu", progress=False)
    put(5)
    store.get([other], "cpu", progress=False)
    with pytest.raises(ValueError, match="different data called 'own'"):
        store.about([EXPERIMENT, other])
    store.get([EXPERIMENT, other], "cpu", progress=False)
    assert store.about([EXPERIMENT, other])["data"] == {"own": data_digest("own")}


def test_a_file_that_hides_embedded_data_gets_a_word_and_its_own_run():
    experiment = EXPERIMENT.replace(**{"dataset.name": "fmnist_mini", "dataset.max_train": 60, "dataset.max_test": 60})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded = get(experiment)
    path = put(3, name="fmnist_mini")
    with pytest.warns(UserWarning, match=str(path)):
        assert not same(get(experiment), embedded)


MAKES = """
import numpy as np
from fsl_sage import dataset

@dataset("made")
def made(root):
    with np.load(root / "own.npz") as arrays:
        return dict(arrays)
"""


def test_what_a_plugin_reads_is_data(tmp_path):
    (tmp_path / "makes.py").write_text(MAKES)
    load_plugins([tmp_path / "makes.py"])
    experiment = EXPERIMENT.replace(**{"dataset.name": "made"})
    put(0)
    first = get(experiment)
    put(5)
    assert not same(get(experiment), first) and same(get(experiment), true(experiment))


def test_data_that_differ_each_time_are_refused(tmp_path):
    odd = MAKES.replace("dict(arrays)", "dict(arrays) | {'y_test': np.random.randint(0, 9, 60)}")
    (tmp_path / "odd.py").write_text(odd)
    load_plugins([tmp_path / "odd.py"])
    put(0)
    with pytest.raises(ValueError, match="a plug-in has other data"):
        get(EXPERIMENT.replace(**{"dataset.name": "made"}))


def test_runs_of_two_data_sets_at_once_get_two_places():
    """The name is looked up again under the lock."""
    put(0)
    get()
    digest = data_digest("own")
    put(5)
    other = data_digest("own")
    store = RunStore().root
    assert run_name(store, EXPERIMENT, digest) == EXPERIMENT.hash
    assert run_name(store, EXPERIMENT, other) == f"{EXPERIMENT.hash}-{other[:8]}"


def test_a_model_of_other_numbers_is_not_kept_beside_a_stored_run(capsys):
    """The run of an earlier version does not say its data, which have changed since."""
    words = ["dataset=own", "algorithm=fed_avg", "preset=smoke", "device=cpu", "rounds=1", "model=simple_conv"]
    words += ["dataset.max_train=null", "dataset.max_test=null", "num_clients=2", "model.client.batch_size=16"]
    put(0)
    get()
    file = RunStore().folder(EXPERIMENT) / "provenance.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in about.items() if name not in ("data", "sha256")}))
    assert main([*words, "save=true"]) == 0
    model_of(RunStore().root, EXPERIMENT.hash).unlink()
    put(5)
    assert main([*words, "save=true"]) == 2 and "other numbers" in capsys.readouterr().err
    assert not model_of(RunStore().root, EXPERIMENT.hash).exists()
