"""Natural clients: of an archive, of folders of pictures, of LEAF's files; from Python and from the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from fsl_sage.commands.train import main
from fsl_sage.config.presets import preset
from fsl_sage.data.leaf import LARGEST_JSON
from fsl_sage.data.partition import partition, sorting_labels
from fsl_sage.data.sources import load
from fsl_sage.experiments.digests import data_digest
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train
from tests.support.runs import assert_same

NATURAL = {"dataset.distribution": "natural"}


def some_arrays(n=120, **more):
    full = load("fmnist_mini", max_train=n, max_test=20)
    sets = {"train": full.train, "test": full.test}
    arrays = {f"{kind}_{name}": getattr(images, kind).numpy() for name, images in sets.items() for kind in "xy"}
    return arrays | {"x_train": full.train.x[:, 0].numpy(), "x_test": full.test.x[:, 0].numpy()} | more


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_ids_equal_to_an_iid_partition_reproduce_its_run(tmp_path, spread):
    """Samples that the IID partition leaves out belong to a fifth client, the smallest."""
    changes = {"num_clients": 4, "rounds": 2, "dataset.name": "mine", "dataset.size_spread": spread}
    iid = preset("smoke", "fsl_sage", **changes | {"dataset.max_train": None, "dataset.max_test": None})
    arrays = some_arrays(n=122)
    np.savez(tmp_path / "mine.npz", **arrays)
    expected = train(iid, "cpu", str(tmp_path), progress=False)
    owners = np.full(122, 9)
    labels = load("mine", tmp_path).train.y
    for i, part in enumerate(partition(labels, 4, "iid", iid.partition_seed, size_spread=spread)):
        owners[part] = 2 * i
    np.savez(tmp_path / "mine.npz", **arrays, client_train=owners)
    found = train(iid.replace(**NATURAL), "cpu", str(tmp_path), progress=False)
    assert_same(expected, found)


def test_the_first_clients_by_size_take_part_and_no_more_than_there_are(tmp_path):
    np.savez(tmp_path / "mine.npz", **some_arrays(n=12, client_train=np.repeat([5, 3, 8, 1], [2, 5, 1, 4])))
    images = load("mine", tmp_path).train
    keys = sorting_labels(images, "natural")
    assert [len(part) for part in partition(keys, 2, "natural")] == [4, 5]  # clients 1 and 3
    assert [len(part) for part in partition(keys, 4, "natural")] == [4, 5, 2, 1]
    with pytest.raises(ValueError, match=r"num_clients=5: must be at most 4, the number of clients in the data"):
        partition(keys, 5, "natural")
    assert load("mine", tmp_path, max_train=7).train.keys.tolist() != keys[:7].tolist()
    few = load("mine", tmp_path, max_train=7).train
    for image, key in zip(few.x, few.keys, strict=True):  # a part of the images keeps their clients
        assert key in keys[(images.x == image).flatten(1).all(1)]


def test_other_clients_are_other_data(tmp_path):
    digests = []
    for owners in {}, {"client_train": np.arange(12)}, {"client_train": np.arange(12) // 2}:
        np.savez(tmp_path / "mine.npz", **some_arrays(n=12, **owners))
        digests.append(data_digest("mine", tmp_path))
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    "owners", [np.zeros(11, int), np.zeros(12), np.zeros((12, 2), int), np.array(["a"] * 12), np.zeros((), int)]
)
def test_ids_that_do_not_fit_are_refused(tmp_path, owners):
    np.savez(tmp_path / "mine.npz", **some_arrays(n=12, client_train=owners))
    with pytest.raises(ValueError, match=r"mine\.npz: client_train is .* a whole number for each of the 12 training"):
        load("mine", tmp_path)


def test_data_without_owners_have_no_natural_clients():
    with pytest.raises(ValueError, match=r"dataset\.distribution='natural': must be another distribution"):
        train(preset("smoke", "fed_avg", **NATURAL), "cpu", progress=False)


def test_folders_of_clients_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    arrays, seen = some_arrays(n=40), np.arange(40) % 5 // 2  # two clients of 16 images, one of 8
    for split, owners in ("train", [f"c{i}/" for i in seen]), ("test", [""] * 20):
        for i, owner in enumerate(owners):
            path = tmp_path / f"photos/{split}/{owner}k{arrays[f'y_{split}'][i]}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(arrays[f"x_{split}"][i]).save(path)
    words = "preset=smoke algorithm=fed_avg rounds=1 num_clients=3 dataset.name=photos dataset.max_train=null"
    words += f" dataset.max_test=null dataset.distribution=natural data_root={tmp_path} device=cpu"
    assert main(words.split()) in (0, None)
    rounds = RunStore(tmp_path / "runs").frame()
    assert rounds["dataset.distribution"].tolist() == ["natural"]
    assert 0 <= rounds.client_accuracy_worst[0] <= rounds.client_accuracy_mean[0] <= 1
    assert load("photos", tmp_path).train.keys.bincount().tolist() == [16, 16, 8]


def leaf(folder, users):
    """A folder as LEAF's preparation leaves it, two users a file; split → user → number of images."""
    rng = np.random.default_rng(0)
    for split, sizes in users.items():
        (folder / split).mkdir(parents=True)
        names = list(sizes)
        for k in range(0, len(names), 2):
            own = {
                name: {"x": rng.random((n, 784)).round(3).tolist(), "y": [j % 10 for j in range(n)]}
                for name, n in [(name, sizes[name]) for name in names[k : k + 2]]
            }
            tree = {"users": list(own), "num_samples": [sizes[name] for name in own], "user_data": own}
            (folder / split / f"all_data_{k}.json").write_text(json.dumps(tree))


def test_leafs_writers_are_clients(tmp_path):
    leaf(tmp_path / "femnist", {"train": {"f3": 12, "f1": 20, "f2": 11}, "test": {"f1": 5, "f3": 6}})
    data = load("femnist", tmp_path)
    assert tuple(data.train.x.shape) == (43, 1, 28, 28) and len(data.test) == 11
    assert data.train.keys.bincount().tolist() == [20, 11, 12]  # f1, f2, f3
    first = json.loads((tmp_path / "femnist/train/all_data_0.json").read_text())["user_data"]["f1"]
    mine = data.train.x[data.train.keys == 0, 0]
    np.testing.assert_allclose(mine.flatten(1) / 255, first["x"], atol=0.5 / 255 + 1e-6)
    changes = {"dataset.name": "femnist", "num_clients": 2, "rounds": 1, "dataset.max_train": None}
    run = preset("smoke", "fed_avg", **changes | NATURAL | {"dataset.max_test": None})
    assert train(run, "cpu", str(tmp_path), progress=False).rounds.test_loss.notna().all()


def test_images_of_leaf_are_of_one_size(tmp_path):
    leaf(tmp_path / "mixed", {"train": {"f1": 2}, "test": {"f1": 2}})
    small = {"f2": {"x": [[0.5] * 100], "y": [1]}}
    tree = {"users": ["f2"], "num_samples": [1], "user_data": small}
    (tmp_path / "mixed/train/all_data_1.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="holds images of different sizes"):
        load("mixed", tmp_path)


def test_files_of_leaf_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    leaf(tmp_path / "femnist", {"train": {"f1": 2}, "test": {"f1": 2}})
    with open(tmp_path / "femnist/train/all_data_0.json", "r+b") as file:
        file.truncate(LARGEST_JSON + 1)
    monkeypatch.setattr("fsl_sage.data.leaf.json.loads", lambda text: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"all_data_0\.json: .*at most 536870912 are read"):
        load("femnist", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[1]", "{}", "[" * 100_000, '{"users": ["a"], "user_data": {"a": {"x": ["b.jpg"], "y": [0]}}}',
        '{"users": ["a"], "user_data": {"a": {"x": [[0, NaN, 0, 0]], "y": [0]}}}',
        '{"users": ["a"], "user_data": {"a": {"x": [[0, 1, 0, 0], [1]], "y": [0, 0]}}}',
        '{"users": ["a"], "user_data": {"a": {"x": [[0, 1, 0, 0]], "y": [0.5]}}}',
    ],
)  # fmt: skip
def test_files_that_are_none_of_leafs_are_refused_by_name(tmp_path, text):
    leaf(tmp_path / "femnist", {"train": {"f1": 2}, "test": {"f1": 2}})
    (tmp_path / "femnist/train/all_data_0.json").write_text(text)
    with pytest.raises(ValueError, match=r"all_data_0\.json: is damaged or no file of LEAF's images"):
        load("femnist", tmp_path)
