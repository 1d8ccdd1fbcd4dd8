"""Finding data sets, damaged files, downloads, augmentation against torchvision, partitions, batches of a client."""

import gzip
import io
import os
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from fsl_sage.config.experiment import Experiment, from_dict
from fsl_sage.config.presets import preset
from fsl_sage.core import generator
from fsl_sage.data import files, sources
from fsl_sage.data.augment import apply_augmentation, augment, draw_augmentation, normalise
from fsl_sage.data.batches import ClientData, eval_batches
from fsl_sage.data.images import Images
from fsl_sage.data.partition import DISTRIBUTIONS, draw_classes, labels_per_client, partition, plot_labels_per_client
from fsl_sage.data.sources import class_balanced_part, load
from fsl_sage.experiments.setup import prepare

some = settings(deadline=None, max_examples=60, derandomize=True)


def arrays(n=20, test=10, shape=(8, 8), classes=10, fill=None):
    """A small data set; `fill` makes its pixels recognisable."""
    rng = np.random.default_rng(0)
    made = {}
    for split, size in (("train", n), ("test", test)):
        pixels = rng.integers(0, 256, (size, *shape), np.uint8)
        made[f"x_{split}"] = pixels if fill is None else np.full_like(pixels, fill)
        made[f"y_{split}"] = np.arange(size) % classes
    return made


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder, made, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for key, stem in files.IDX_FILES.items():
        content = idx(made[key])
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


def write_pictures(folder, sizes=((6, 6),), classes=("bear", "cat")):
    for split in ("train", "test"):
        for c in classes:
            (folder / split / c).mkdir(parents=True)
            for i, size in enumerate(sizes):
                mode, value = [("RGB", (10, 20, 30 + i)), ("L", 99), ("P", 0)][i % 3]
                Image.new(mode, size, value).save(folder / split / c / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No data set of this machine and no network gets into a test unless it asks for one."""
    monkeypatch.delenv("FSL_SAGE_DATA", raising=False)
    monkeypatch.setattr(sources, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setitem(sources.KNOWN, "fmnist", replace(sources.KNOWN["fmnist"], place=tmp_path / "debian"))


# ---------------------------------------------------------------- the embedded data


def test_embedded_part_is_balanced_small_and_licensed():
    mini = load()
    assert mini.name == "fmnist_mini" and mini.num_classes == 10
    assert (
        mini.train.x.shape == (6000, 1, 28, 28) and mini.train.x.dtype == torch.uint8 and mini.train.x.is_contiguous()
    )
    assert mini.train.y.bincount().tolist() == [600] * 10 and mini.train.y.dtype == torch.int64
    assert mini.test.y.bincount().tolist() == [100] * 10
    assert (files.EMBEDDED / "fmnist_mini.npz").stat().st_size <= 4 * 2**20
    notice = (files.EMBEDDED / "README.md").read_text()
    assert "2017 Zalando SE" in notice and "Permission is hereby granted" in notice
    pixels = torch.cat([mini.train.x, mini.test.x]).double() / 255
    assert abs(pixels.mean() - mini.mean[0]) < 0.01 and abs(pixels.std() - mini.std[0]) < 0.01


def test_embedded_file_can_be_made_again(tmp_path, monkeypatch):
    debian = sources.Path("/usr/share/datasets/fashion-mnist")
    if not debian.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    monkeypatch.setitem(sources.KNOWN, "fmnist", replace(sources.KNOWN["fmnist"], place=debian))
    sources.make_fmnist_mini(tmp_path / "again.npz")
    old, new = files.read_npz(files.EMBEDDED / "fmnist_mini.npz"), files.read_npz(tmp_path / "again.npz")
    assert all(np.array_equal(old[key], new[key]) and old[key].dtype == np.uint8 for key in files.KEYS)


@some
@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(0, 5), st.integers(0, 9))
def test_class_balanced_part_is_exact_or_refused(labels, per_class, seed):
    y = torch.tensor(labels)
    images = Images(torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1), y)
    fewest = int(y.bincount().min())
    if not 1 <= per_class <= fewest:
        with pytest.raises(ValueError, match=f"per_class={per_class}: must be from 1 to {fewest}"):
            class_balanced_part(images, per_class, seed)
        return
    part = class_balanced_part(images, per_class, seed)
    assert part.y.bincount().tolist() == [per_class] * (max(labels) + 1)
    positions = part.x.flatten().long()
    assert positions.tolist() == sorted(set(positions.tolist())) and torch.equal(y[positions], part.y)


# ---------------------------------------------------------------- where a data set is found


def test_places_are_tried_in_order(tmp_path):
    """Root's npz, then root's folder, then what a package brought."""
    made = partial(arrays, shape=(28, 28))
    write_idx(tmp_path / "debian", made(fill=3))
    assert (load("fmnist", tmp_path).train.x == 3).all()
    write_idx(tmp_path / "fmnist", made(fill=2), suffix="")
    assert (load("fmnist", tmp_path).train.x == 2).all()
    np.savez(tmp_path / "fmnist.npz", **made(fill=1))
    assert (load("fmnist", tmp_path).train.x == 1).all()
    np.savez(tmp_path / "fmnist_mini.npz", **made(fill=4))
    assert (load("fmnist_mini", tmp_path).train.x == 4).all()
    assert len(load("fmnist_mini", tmp_path / "elsewhere").train) == 6000


def test_root_is_argument_then_environment_then_cache(tmp_path, monkeypatch):
    for name, fill in (("argument", 1), ("environment", 2), ("cache/fsl_sage", 3)):
        (tmp_path / name).mkdir(parents=True)
        np.savez(tmp_path / name / "mine.npz", **arrays(fill=fill))
    assert load("mine").train.x[0, 0, 0, 0] == 3
    monkeypatch.setenv("FSL_SAGE_DATA", str(tmp_path / "environment"))
    assert load("mine").train.x[0, 0, 0, 0] == 2
    assert load("mine", root=str(tmp_path / "argument")).train.x[0, 0, 0, 0] == 1


def test_keras_form_becomes_channels_first(tmp_path):
    made = arrays(shape=(32, 32, 3))
    made["y_train"] = made["y_train"][:, None].astype(np.uint8)
    np.savez_compressed(tmp_path / "cifar10.npz", **made)
    cifar = load("cifar10", tmp_path)
    assert cifar.train.x.shape == (20, 3, 32, 32)
    assert np.array_equal(cifar.train.x[5].permute(1, 2, 0), made["x_train"][5])
    assert cifar.train.y.tolist() == [i % 10 for i in range(20)]
    assert cifar.mean == (0.485, 0.456, 0.406) and cifar.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_any_idx_folder_loads(tmp_path, suffix):
    made = arrays(shape=(28, 28), classes=7)
    write_idx(tmp_path / "kuzushiji", made, suffix)
    kuzushiji = load("kuzushiji", tmp_path)
    assert np.array_equal(kuzushiji.test.x[:, 0], made["x_test"]) and kuzushiji.num_classes == 7
    assert (kuzushiji.mean, kuzushiji.std) == ((0.5,), (0.5,))


def test_not_found_lists_every_place_and_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("fmnist", tmp_path / "root", download=False)
    way_out = "FSL_SAGE_DATA, or by data_root"
    for place in ("root/fmnist.npz", "root/fmnist,", "debian", "download=False", "x_train", way_out):
        assert place in str(error.value)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["cifar11", "../cifar10", "..", "", "a/b"])
def test_unknown_or_impossible_names(tmp_path, name):
    with pytest.raises(ValueError, match=r"dataset\.name="):
        load(name, tmp_path)


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="fmnist_mini, fmnist, mnist, cifar10, cifar100, imagefolder"):
        load("cifar11", tmp_path)


@settings(some, max_examples=20)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 3))
def test_smaller_sets_are_beginnings_of_one_shuffle(few, many, seed):
    few, many = sorted((few, many))
    small, large = (load(max_test=n, max_train=10, seed=seed).test for n in (few, many))
    assert len(small) == few and torch.equal(small.x, large.x[:few]) and torch.equal(small.y, large.y[:few])


@pytest.mark.parametrize("wish", [{"max_train": 0}, {"max_train": 6001}, {"max_test": -1}, {"max_test": 2.5}])
def test_impossible_limits(wish):
    (field, value), *_ = wish.items()
    with pytest.raises(ValueError, match=f"dataset.{field}={value}.*from 1 to"):
        load(**wish)


# ---------------------------------------------------------------- damaged files


@some
@given(st.data(), st.booleans())
def test_a_damaged_npz_is_refused_or_harmless(tmp_path_factory, draw, compressed):
    """Cut anywhere: an error that names the file. One byte changed: that error, or the very same arrays."""
    path = tmp_path_factory.mktemp("npz") / "mine.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays(n=3, test=2, shape=(4, 4)))
    whole, good = path.read_bytes(), files.read_npz(path)
    path.write_bytes(whole[: draw.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"mine\.npz: .*Mend it, replace it by a whole copy"):
        load("mine", path.parent)
    at = draw.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ draw.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        found = files.read_npz(path)
    except ValueError as error:
        assert "mine.npz: " in str(error)
    else:
        assert all(np.array_equal(found[key], good[key]) for key in files.KEYS)


WRONG = {
    "lacks y_test": {"y_test": None},
    "x_train must be uint8, is float32": {"x_train": np.zeros((20, 8, 8), np.float32)},
    "x_train must have shape": {"x_train": np.zeros((20, 64), np.uint8)},
    "1 to 4 channels": {"x_train": np.zeros((20, 3, 8, 8), np.uint8)},
    "x_test holds no image": {"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, int)},
    "training images are .* test images": {"x_test": np.zeros((10, 8, 9), np.uint8)},
    r"y_train has shape \(19,\) for the 20 images": {"y_train": np.zeros(19, int)},
    r"y_test has shape \(10, 10\)": {"y_test": np.eye(10, dtype=int)},
    "y_train must be whole numbers, is float64": {"y_train": np.zeros(20)},
    "y_train must be 0 or more, found -1": {"y_train": np.arange(20) - 1},
    "y_test must be below 10, found 10": {"y_test": np.arange(10) + 1},
    "y_train holds pickled Python objects": {"y_train": np.array([{}] * 20, dtype=object)},
}


@pytest.mark.parametrize("what", WRONG)
def test_misshaped_npz(tmp_path, what):
    made = {key: value for key, value in (arrays() | WRONG[what]).items() if value is not None}
    np.savez(tmp_path / "mnist.npz", **made)
    with pytest.raises(ValueError, match=rf"mnist\.npz: .*{what}.*delete it"):
        load("mnist", tmp_path)


def test_wrong_number_of_channels(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **arrays(shape=(32, 32)))
    with pytest.raises(ValueError, match=r"cifar10\.npz: x_train must have 3 channel\(s\), has 1"):
        load("cifar10", tmp_path)


def test_a_plain_array_is_no_archive(tmp_path):
    with open(tmp_path / "mine.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"mine\.npz: is damaged or no \.npz archive"):
        load("mine", tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("keep", [0, 3, 10, -1])
def test_truncated_idx(tmp_path, suffix, keep):
    folder = write_idx(tmp_path / "mnist", arrays(shape=(28, 28)), suffix)
    path = folder / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mnist/t10k-images-idx3-ubyte.*Mend it"):
        load("mnist", tmp_path)


def test_idx_that_is_something_else(tmp_path):
    folder = write_idx(tmp_path / "mnist", arrays(shape=(28, 28)))
    labels, images = folder / "train-labels-idx1-ubyte.gz", folder / "train-images-idx3-ubyte.gz"
    whole = labels.read_bytes()
    for content, what in (
        (b"<html>404</html>", "cannot be read"),
        (images.read_bytes(), "no IDX file"),
        (whole[:30] + bytes([whole[30] ^ 255]) + whole[31:], "cannot be read|no IDX|holds"),
        (gzip.compress(idx(np.zeros(19))), "for the 20 images"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=f"mnist.*({what})"):
            load("mnist", tmp_path)
    labels.unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: cannot be read"):
        load("mnist", tmp_path)


# ---------------------------------------------------------------- small files that claim to be large


def npz_of(path, arrays, announced=None, method=zipfile.ZIP_DEFLATED, held=None):
    """An archive whose x_train announces the shape `announced` and holds `held` zeros (None: as announced)."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, values in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                if key != "x_train" or announced is None:
                    np.lib.format.write_array(file, values)
                    continue
                header = {"descr": "|u1", "fortran_order": False, "shape": announced}
                np.lib.format.write_array_header_1_0(file, header)
                left, zeros = int(np.prod(announced)) if held is None else held, bytes(2**22)
                while left > 0:
                    left -= file.write(zeros[:left])
    return path


def refused_within(mebibytes, match, call, *args, **wish):
    """The call is refused with these words, and takes no more memory on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as error:
            call(*args, **wish)
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(error.value).splitlines()) == 1


LYING = {
    "much more than the file holds": ((10**10, 8, 8), 100),
    "more than a number can say": ((2**62, 2**62), 100),
    "less than nothing": ((-5, 8, 8), 100),
    "two negatives": ((-5, -8, 8), 320),
    "less than the file holds": ((20, 8, 8), 2**20),
}


@pytest.mark.attack("data")
@pytest.mark.parametrize("lie", LYING)
def test_a_header_that_does_not_fit_its_array_is_refused(tmp_path, lie):
    announced, held = LYING[lie]
    npz_of(tmp_path / "mine.npz", arrays(), announced, held=held)
    refused_within(4, r"mine\.npz: .*the header of x_train announces", load, "mine", tmp_path)


@pytest.mark.attack("data")
@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_python_unpacks_without_limit_is_refused(tmp_path, method):
    npz_of(tmp_path / "mine.npz", arrays(), (2**26, 1, 1), method)
    assert (tmp_path / "mine.npz").stat().st_size < 2**15
    refused_within(4, r"mine\.npz: .*method that NumPy does not write", load, "mine", tmp_path)


@pytest.mark.attack("data")
@pytest.mark.parametrize("kind", ["npz", "idx"])
def test_a_file_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, monkeypatch, kind):
    """Shapes that fit each other: only the sizes tell. 64 MiB of zeros, with the limit at 1 MiB instead of 256."""
    monkeypatch.setattr(files, "FREE", 2**20)
    large = arrays() | {"y_train": np.zeros(2**16, np.uint8)}
    if kind == "npz":
        npz_of(tmp_path / "mine.npz", large, (2**16, 32, 32))
    else:
        write_idx(tmp_path / "mine", large | {"x_train": np.zeros((2**16, 32, 32), np.uint8)})
    refused_within(4, r"mine.*bytes would unpack to \d+, more than 100 times", load, "mine", tmp_path)
    monkeypatch.setattr(files, "RATIO", 10**6)
    with pytest.raises(ValueError, match="training images are"):
        load("mine", tmp_path)


@pytest.mark.attack("data")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sizes", [(2**32 - 1,) * 3, (2**31, 1, 1), (1, 8, 8)])
def test_an_idx_header_that_lies_is_refused(tmp_path, suffix, sizes):
    folder = write_idx(tmp_path / "mine", arrays(), suffix)
    content = bytes([0, 0, 8, 3]) + np.array(sizes, ">u4").tobytes() + bytes(100)
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    refused_within(4, "train-images-idx3-ubyte.*(would unpack|its header says)", load, "mine", tmp_path)


@pytest.mark.attack("data")
def test_a_gzip_that_goes_on_after_its_array_is_not_unpacked(tmp_path):
    folder = write_idx(tmp_path / "mine", arrays())
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(2**26)))
    refused_within(4, "train-labels-idx1-ubyte.gz: holds more bytes, its header says 20", load, "mine", tmp_path)


@pytest.mark.attack("data")
def test_a_second_member_of_the_same_name_is_not_read(tmp_path):
    """NumPy takes `x_train` for `x_train.npy` and reads it whole."""
    npz_of(tmp_path / "mine.npz", arrays(fill=7))
    with zipfile.ZipFile(tmp_path / "mine.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train", bytes(2**24))
    tracemalloc.start()
    assert (load("mine", tmp_path).train.x == 7).all()
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.attack("data")
@pytest.mark.parametrize("place", ["mine.npz", "mine/train-labels-idx1-ubyte", "mine/train/bear/pipe.png"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, place):
    (write_pictures if "train/" in place else write_idx)(tmp_path / "mine", *([] if "train/" in place else [arrays()]))
    (tmp_path / "mine" / "train-labels-idx1-ubyte.gz").unlink(missing_ok=True)
    os.mkfifo(tmp_path / place)
    if place == "mine.npz":
        (tmp_path / "mine").rename(tmp_path / "other")
        with pytest.raises(ValueError, match=r"dataset\.name='mine'"):
            load("mine", tmp_path, download=False)
        return
    with pytest.raises(ValueError, match=f"{place}: cannot be read.*no regular file"):
        load("mine", tmp_path)


# ---------------------------------------------------------------- labels


@pytest.mark.attack("data")
@pytest.mark.parametrize("first", [2**63, 2**64 - 20, 2**31])
def test_labels_beyond_what_a_label_can_be_are_refused(tmp_path, first):
    made = arrays()
    np.savez(tmp_path / "mine.npz", **made | {"y_train": made["y_train"].astype(np.uint64) + np.uint64(first)})
    with pytest.raises(ValueError, match=r"mine\.npz: y_train must be below 2147483648, found \d{10}"):
        load("mine", tmp_path)


@pytest.mark.attack("data")
@pytest.mark.parametrize("largest", [22, 10**9, 2**31 - 1])
def test_one_large_label_does_not_make_as_many_classes(tmp_path, largest):
    """Eleven labels may leave eleven out: 0 … 21; and the line that the message advises mends the file."""
    made = arrays()
    np.savez(tmp_path / "mine.npz", **made | {"y_train": np.where(made["y_train"] == 9, largest, made["y_train"])})
    with pytest.raises(ValueError, match=rf"has 11 different labels up to {largest}; at least half") as error:
        load("mine", tmp_path)
    advice = str(error.value).partition("those of y_train first: ")[2].partition(". Mend")[0]
    y_train, y_test = files.read_npz(tmp_path / "mine.npz")["y_train"], made["y_test"]
    both = eval(advice, {"np": np, "y_train": y_train, "y_test": y_test})
    np.savez(tmp_path / "mine.npz", **made | {"y_train": both[:20], "y_test": both[20:]})
    assert load("mine", tmp_path).num_classes == 11


def test_labels_may_leave_some_out(tmp_path):
    made = arrays(classes=5)
    np.savez(tmp_path / "mine.npz", **made | {key: 2 * made[key] + 1 for key in ("y_train", "y_test")})
    assert load("mine", tmp_path).num_classes == 10


def test_a_test_label_that_is_never_trained_is_said(tmp_path):
    made = arrays(classes=4)
    np.savez(tmp_path / "mine.npz", **made | {"y_train": made["y_train"] % 3})
    with pytest.warns(UserWarning, match=r"mine\.npz: 1 label\(s\) of y_test occur in no training image \(3\)"):
        load("mine", tmp_path)
    np.savez(tmp_path / "mine.npz", **made)
    with warnings.catch_warnings(action="error"):
        load("mine", tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [(("y_train", "y_test"), "all labels are 0, so every accuracy will be 1"), (("y_train",), "nothing can be learnt")],
)
def test_a_single_class_is_said(keys, says, tmp_path):
    made = arrays(classes=4)
    np.savez(tmp_path / "mine.npz", **made | {key: 0 * made[key] for key in keys})
    with pytest.warns(UserWarning) as told:
        load("mine", tmp_path)
    assert any(says in str(warning.message) for warning in told)


def test_the_remedy_is_one_for_this_file(tmp_path, monkeypatch):
    assert "Reinstall the package" in str(files.broken(files.EMBEDDED / "fmnist_mini.npz", "is damaged"))
    assert "einstall" not in str(files.broken(tmp_path / "mine.npz", "is damaged"))
    monkeypatch.setitem(sources.MADE, "made", lambda root: arrays() | {"x_train": np.zeros(3)})
    with pytest.raises(ValueError, match=r"plug-in:made: x_train must be uint8.*Mend the plug-in's function"):
        load("made", tmp_path)


# ---------------------------------------------------------------- folders of pictures


def test_imagefolder_below_root_and_root_itself(tmp_path):
    write_pictures(tmp_path / "pets", sizes=((6, 5),) * 3)
    (tmp_path / "pets" / "train" / "cat" / ".hidden").write_text("not a picture")
    pets, same = load("pets", tmp_path), load("imagefolder", tmp_path / "pets")
    assert pets.train.x.shape == pets.test.x.shape == (6, 3, 5, 6) and pets.num_classes == 2
    assert pets.train.y.tolist() == [0, 0, 0, 1, 1, 1] and pets.mean == pets.std == (0.5, 0.5, 0.5)
    assert pets.train.x[0, :, 0, 0].tolist() == [10, 20, 30] and pets.train.x[1, :, 0, 0].tolist() == [99] * 3
    assert torch.equal(pets.train.x, same.train.x)


def test_imagefolder_sizes(tmp_path):
    write_pictures(tmp_path / "pets", sizes=((6, 6), (7, 6)))
    found = r"bear/1\.png: is of size \(6, 7\), others are \(6, 6\)"
    with pytest.raises(ValueError, match=rf"{found}; set dataset\.image_size to resize all"):
        load("pets", tmp_path)
    assert load("pets", tmp_path, image_size=4).train.x.shape == (4, 3, 4, 4)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"image_size={size}"):
            load("pets", tmp_path, image_size=size)
    with pytest.raises(ValueError, match="image_size=32: must be None"):
        load("fmnist_mini", image_size=32)


def test_pictures_of_two_sizes_train_with_the_field_that_the_message_names(tmp_path):
    write_pictures(tmp_path / "pets", sizes=((6, 6), (7, 6)))
    plain = preset("smoke").replace(**{"dataset.name": "pets", "dataset.max_train": None, "dataset.max_test": None})
    with pytest.raises(ValueError, match=r"set dataset\.image_size to resize all"):
        prepare(plain, torch.device("cpu"), tmp_path)
    resized = plain.replace(**{"dataset.image_size": 8})
    assert prepare(resized, torch.device("cpu"), tmp_path)[0].train.x.shape == (4, 3, 8, 8)
    assert resized.hash != plain.hash and from_dict(resized.to_dict()) == resized
    assert "image_size" not in plain.to_dict()["dataset"] and Experiment().hash == "d2e77978c131fb96"
    with pytest.raises(ValueError, match=r"dataset\.image_size=0: must be at least 1, or None"):
        plain.replace(**{"dataset.image_size": 0})
    for name in ("fmnist_mini", "made"):
        sources.MADE["made"] = lambda root: arrays()
        with pytest.raises(ValueError, match=r"dataset\.image_size=8: must be None for the data set"):
            load(name, image_size=8)
        del sources.MADE["made"]


def test_imagefolder_unreadable_picture(tmp_path):
    pets = write_pictures(tmp_path / "pets")
    picture = pets / "test" / "cat" / "0.png"
    whole = (pets / "test" / "bear" / "0.png").read_bytes()
    for content in (b"", b"not a picture", whole[: whole.index(b"IDAT") + 8], whole.replace(b"IDAT", b"IDAD")):
        picture.write_bytes(content)
        with pytest.raises(ValueError, match=r"test/cat/0\.png: cannot be read as a picture"):
            load("pets", tmp_path)


def test_imagefolder_classes(tmp_path):
    pets = write_pictures(tmp_path / "pets")
    (pets / "test" / "dog").mkdir()
    Image.new("RGB", (6, 6)).save(pets / "test" / "dog" / "0.png")
    with pytest.raises(ValueError, match="test/dog: is a class that train/ does not have"):
        load("pets", tmp_path)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty/train: holds no picture"):
        load("empty", tmp_path)


def saved(tmp_path, pixels, name="picture.png", **wish):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(tmp_path / name, **wish)
    return files.read_image(str(tmp_path / name))


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm", "16.jp2"])
def test_sixteen_bits_become_eight_by_the_range_of_the_type(tmp_path, name):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    grey = saved(tmp_path, ramp, name)
    assert (grey == np.arange(256).reshape(16, 16, 1)).all() and grey.shape == (16, 16, 3)


def test_floating_point_from_0_to_1_is_scaled_and_else_refused(tmp_path):
    values = (np.arange(256, dtype=np.float32) / 255).reshape(16, 16)
    assert (saved(tmp_path, values, "float.tif") == np.arange(256).reshape(16, 16, 1)).all()
    for wrong in (1.01, -0.01, np.nan, 255):
        with pytest.raises(ValueError, match=r"float\.tif: .*its numbers lie from .* must lie from 0 to 1"):
            saved(tmp_path, np.where(values == 1, np.float32(wrong), values), "float.tif")


def test_32_bit_whole_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"int\.tif: cannot be read as a picture \(it holds 32-bit whole numbers"):
        saved(tmp_path, np.full((4, 4), 300, np.int32), "int.tif")


def test_what_is_transparent_becomes_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3], rgba[4:6, :, 3] = 255, 51
    composed = np.repeat([0, 204, 255], [4, 2, 2])[:, None, None]
    assert (saved(tmp_path, rgba) == composed).all()
    assert (saved(tmp_path, rgba, "a.webp", lossless=True, exact=True) == composed).all()
    assert (saved(tmp_path, rgba[..., [0, 3]]) == composed).all()
    marked = Image.fromarray(np.repeat(np.array([3, 7], np.uint8), 8).reshape(4, 4))
    assert np.unique(saved(tmp_path, marked, transparency=7)).tolist() == [3, 255]
    palette = marked.convert("P")
    assert np.unique(saved(tmp_path, palette, "a.gif", transparency=7)).tolist() == [3, 255]
    sixteen = np.array([[256, 512]], np.uint16)
    assert saved(tmp_path, sixteen, transparency=512)[0, :, 0].tolist() == [1, 255]


def test_opaque_pictures_are_what_they_were(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    opaque = np.concatenate([rgb, np.full((9, 7, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(saved(tmp_path, rgb), rgb) and np.array_equal(saved(tmp_path, opaque), rgb)
    grey = Image.fromarray(rgb[..., 0])
    for kind in (grey, grey.convert("P"), grey.convert("1", dither=0), Image.fromarray(rgb).convert("CMYK")):
        name = "picture.tif" if kind.mode == "CMYK" else "picture.png"
        assert np.array_equal(saved(tmp_path, kind, name), np.asarray(kind.convert("RGB")))


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.tif"])
def test_orientation_tags_are_obeyed(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels = np.kron(np.array([[0, 255, 0]], np.uint8), np.ones((8, 8), np.uint8))
    upright = saved(tmp_path, pixels, name, exif=exif)
    assert upright.shape == (24, 8, 3) and upright[:, 0, 0].reshape(3, 8).mean(1).round(-1).tolist() == [0, 260, 0]


@pytest.mark.parametrize("name", ["frames.gif", "frames.tif", "frames.webp", "frames.png"])
def test_several_frames_are_refused(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), (90 * i, 0, 0)) for i in range(3)]
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a picture \(it has several frames"):
        saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    assert (saved(tmp_path, frames[0], name) == 0).all()


def test_a_camera_s_preview_is_left_out(tmp_path):
    frames = [Image.new("RGB", (8, 8), "white"), Image.new("RGB", (4, 4))]
    assert (saved(tmp_path, frames[0], "camera.mpo", save_all=True, append_images=frames[1:]) == 255).all()


@pytest.mark.attack("data")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 13000, 30000])
def test_a_picture_of_too_many_pixels_is_not_unpacked(tmp_path, side):
    import zlib

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(png)
    refused_within(4, r"large\.png: .*pixels", files.read_image, tmp_path / "large.png")


@pytest.mark.attack("data")
def test_many_pictures_that_unpack_to_much_more_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE", 2**18)
    write_pictures(tmp_path / "pets", sizes=((400, 400),) * 3)
    with pytest.raises(ValueError, match=r"pets: is too large .*set dataset\.image_size to make all smaller"):
        load("pets", tmp_path)
    assert load("pets", tmp_path, image_size=8).train.x.shape == (6, 3, 8, 8)


@pytest.mark.attack("data")
def test_formats_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(ValueError, match=r"page\.png: cannot be read as a picture"):
        files.read_image(tmp_path / "page.png")


def test_what_desktops_leave_is_no_class(tmp_path):
    pets = write_pictures(tmp_path / "pets")
    for place in ("__MACOSX/._bear", "__MACOSX/bear", "bear/__MACOSX"):
        (pets / "train" / place).mkdir(parents=True)
    (pets / "train" / "__MACOSX" / "bear" / "._0.png").write_text("no picture")
    (pets / "train" / "Thumbs.db").write_text("no picture")
    assert load("pets", tmp_path).train.y.tolist() == [0, 1]


def test_an_empty_class_and_a_stray_picture_are_refused(tmp_path):
    pets = write_pictures(tmp_path / "pets")
    (pets / "train" / "ape").mkdir()
    with pytest.raises(ValueError, match="train/ape: is a class without a picture"):
        load("pets", tmp_path)
    (pets / "train" / "ape").rmdir()
    Image.new("RGB", (6, 6)).save(pets / "test" / "0.png")
    with pytest.raises(ValueError, match=r"test/0\.png: lies in no class folder"):
        load("pets", tmp_path)


# ---------------------------------------------------------------- download, from a server on this machine


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_archive(labels):
    """A tiny archive of CIFAR's binary form: two images a file, pixels equal to the number of the file."""
    cifar = sources.CIFAR["cifar10" if labels == 1 else "cifar100"]
    record = lambda i: bytes([7] * (labels - 1) + [i]) + bytes([i]) * 3072  # noqa: E731
    return tar_of({member: record(i) * 2 for i, member in enumerate((*cifar.train, *cifar.test))})


@pytest.fixture
def server(monkeypatch):
    """A web server of `files`; `cut` sends half of each, as a connection that breaks does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            server.asked.append(self.path)
            self.wfile.write((content or b"")[: len(content or b"") // 2 if server.cut else None])

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.cut = {}, [], False
    server.url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", server.url + "cifar-10-python.tar.gz")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Where downloads are kept while they are incomplete."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(sources.tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.parametrize(("name", "labels"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_download(server, temporary, tmp_path, monkeypatch, name, labels):
    archive = cifar_archive(labels)
    monkeypatch.setitem(sources.CIFAR, name, replace(sources.CIFAR[name], md5=md5(archive).hexdigest()))
    server.files["/" + sources.CIFAR[name].file] = archive
    cifar = load(name, tmp_path / "root")
    files = len(sources.CIFAR[name].train)
    assert (
        cifar.train.y.tolist() == [i for i in range(files) for _ in range(2)] and cifar.test.y.tolist() == [files] * 2
    )
    assert torch.equal(cifar.train.x[:, 2, 31, 31].long(), cifar.train.y) and cifar.train.x.shape[1:] == (3, 32, 32)
    assert cifar.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert [p.name for p in (tmp_path / "root").iterdir()] == [f"{name}.npz"] and not list(temporary.iterdir())
    asked = len(server.asked)
    assert torch.equal(load(name, tmp_path / "root").train.x, cifar.train.x) and len(server.asked) == asked


def test_cifar_pixels_are_planes_of_rows(tmp_path):
    """Red, green, blue planes of 32 rows in the archive; rows of pixels of three channels in our arrays."""
    cifar = sources.CIFAR["cifar10"]
    record = bytes([3]) + bytes(range(256)) * 12
    (tmp_path / "a.tar.gz").write_bytes(tar_of(dict.fromkeys((*cifar.train, *cifar.test), record)))
    x = sources.read_cifar(tmp_path / "a.tar.gz", cifar)["x_test"]
    assert x.shape == (1, 32, 32, 3)
    assert all(x[0, i, j, c] == (c * 1024 + i * 32 + j) % 256 for c in range(3) for i in (0, 9, 31) for j in (0, 5, 31))


def test_mnist_download_tries_the_next_mirror(server, temporary, tmp_path, monkeypatch):
    made = arrays(shape=(28, 28))
    resources = []
    for key, stem in files.IDX_FILES.items():
        content = gzip.compress(idx(made[key]))
        resources.append((f"{stem}.gz", md5(content).hexdigest()))
        server.files |= {f"/good/{stem}.gz": content, f"/bad/{stem}.gz": content[:-1]}
    for kind in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(kind, "resources", resources)
        monkeypatch.setattr(kind, "mirrors", [server.url + "gone/", server.url + "bad/", server.url + "good/"])
    for name in ("mnist", "fmnist"):
        assert np.array_equal(load(name, tmp_path / "root").train.x[:, 0], made["x_train"])
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["fmnist.npz", "mnist.npz"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("failure", ["gone", "cut", "checksum"])
def test_failed_download_leaves_nothing_and_says_why(server, temporary, tmp_path, monkeypatch, failure):
    archive = cifar_archive(1)
    right = md5(archive).hexdigest() if failure != "checksum" else "0" * 32
    monkeypatch.setitem(sources.CIFAR, "cifar10", replace(sources.CIFAR["cifar10"], md5=right))
    server.files = {} if failure == "gone" else {"/cifar-10-binary.tar.gz": archive}
    server.cut = failure == "cut"
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz.*download failed \(http.*cifar-10-binary\.tar\.gz: "):
        load("cifar10", tmp_path / "root")
    assert not list(tmp_path.glob("root/*")) and not list(tmp_path.glob("root/.*")) and not list(temporary.iterdir())


@pytest.fixture
def hostile(monkeypatch):
    """A web server that misbehaves by the name of the file, and hands out `good` in the end."""
    good, released = os.urandom(50_000), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            if kind == "mute":
                released.wait(20)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(good)) if kind != "endless" else str(2**40))
            self.end_headers()
            try:
                if kind == "stalling":
                    self.wfile.write(good[:1000])
                    released.wait(20)
                while kind == "endless" and not released.is_set():
                    self.wfile.write(good)
                while kind == "trickling" and not released.wait(0.05):
                    self.wfile.write(b".")
                if kind == "good":
                    self.wfile.write(good)
            except OSError:
                self.close_connection = True

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.good, server.url = good, f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    released.set()
    server.shutdown()
    server.server_close()


HOSTILE = {"mute": "timed out", "stalling": "timed out", "trickling": "more slowly than", "endless": "longer than"}


@pytest.mark.attack("data")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_server_is_left_for_the_next(hostile, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "PATIENCE", 0.3)
    monkeypatch.setattr(sources, "LARGEST", 10**6)
    right, bad, good = md5(hostile.good).hexdigest(), f"{hostile.url}{kind}/file", f"{hostile.url}good/file"
    with pytest.raises(OSError, match=f"{kind}/file: .*{HOSTILE[kind]}"):
        sources.fetch([bad], tmp_path, right)
    assert not list(tmp_path.iterdir())
    sources.fetch([bad, good], tmp_path, right)
    assert (tmp_path / "file").read_bytes() == hostile.good


@pytest.mark.parametrize("when", ["download", "writing"])
def test_interrupted_download_leaves_nothing(server, temporary, tmp_path, monkeypatch, when):
    archive = cifar_archive(1)
    monkeypatch.setitem(sources.CIFAR, "cifar10", replace(sources.CIFAR["cifar10"], md5=md5(archive).hexdigest()))
    server.files["/cifar-10-binary.tar.gz"] = archive

    def interrupted(path, *args, **kwargs):
        sources.Path(path).write_bytes(b"the first half")
        raise KeyboardInterrupt

    if when == "writing":
        monkeypatch.setattr(np, "savez", interrupted)
    else:
        monkeypatch.setattr(sources, "read_cifar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", tmp_path / "root")
    assert not list(tmp_path.glob("root/*")) and not list(tmp_path.glob("root/.*")) and not list(temporary.iterdir())


# ---------------------------------------------------------------- normalisation and augmentation

batches = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@some
@given(batches, st.integers(0, 5), st.integers(0, 1000))
def test_augmentation_equals_torchvision_on_the_same_draws(shape, padding, seed):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))
    flip, dy, dx = draw_augmentation(len(x), generator(seed, "draws"), padding)
    fast = apply_augmentation(x, flip, dy, dx, padding)
    height, width = shape[2:]
    for image, got, f, top, left in zip(x, fast, flip, dy.tolist(), dx.tolist(), strict=True):
        flipped = tv.hflip(image) if f else image
        assert torch.equal(got, tv.crop(tv.pad(flipped, padding), top, left, height, width))
    assert fast.dtype == torch.uint8 and torch.equal(augment(x, generator(seed, "draws"), padding), fast)
    assert torch.equal(apply_augmentation(x.float(), flip, dy, dx, padding), fast.float())


def test_augmentation_equals_torchvision_on_pil_images():
    """The form in which the papers' pipelines see them: PIL image → flip → padded crop → tensor → normalised."""
    x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    flip, dy, dx = draw_augmentation(8, generator(2))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    fast = normalise(apply_augmentation(x, flip, dy, dx), mean, std)
    for image, got, f, top, left in zip(x, fast, flip, dy.tolist(), dx.tolist(), strict=True):
        pil = tv.to_pil_image(image)
        pil = tv.crop(tv.pad(tv.hflip(pil) if f else pil, 4), top, left, 32, 32)
        torch.testing.assert_close(got, tv.normalize(tv.to_tensor(pil), mean, std), rtol=1e-6, atol=1e-6)


def test_draws_are_uniform_and_flips_can_be_left_out():
    flip, dy, dx = draw_augmentation(90_000, generator(0), padding=4)
    assert abs(flip.float().mean() - 0.5) < 0.01
    joint = (dy * 9 + dx).bincount(minlength=81)
    assert len(joint) == 81 and (joint - 90_000 / 81).abs().max() < 200  # six deviations
    assert not draw_augmentation(1000, generator(0), flip=False)[0].any()


# ---------------------------------------------------------------- partitions


def check_parts(parts, n, num_clients):
    joined = torch.cat(parts)
    assert len(parts) == num_clients and len({len(p) for p in parts}) == 1 and len(parts[0]) >= 1
    assert joined.dtype == torch.int64 and joined.min() >= 0 and joined.max() < n
    assert len(joined.unique()) == len(joined)


many_labels = st.lists(st.integers(0, 5), min_size=1, max_size=150).map(torch.tensor)
alphas = st.floats(min_value=5e-324, max_value=1.7e308) | st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e4, 1e308])


@settings(some, max_examples=150)
@given(many_labels, st.data(), st.integers(0, 2**40), st.sampled_from(["iid", "noniid", "noniid_dirichlet"]))
def test_partition_is_disjoint_equal_and_deterministic(labels, draw, seed, distribution):
    n = len(labels)
    m = draw.draw(st.integers(1, n))
    wish = {"alpha": draw.draw(alphas), "shard_num": draw.draw(st.integers(1, n // m))}
    parts = partition(labels, m, distribution, seed, **wish)
    check_parts(parts, n, m)
    share = n // m if distribution != "noniid" else wish["shard_num"] * (n // (wish["shard_num"] * m))
    assert len(parts[0]) == share
    assert all(map(torch.equal, parts, partition(labels, m, distribution, seed, **wish)))
    counts = labels_per_client(labels, parts, 6)
    assert (
        counts.shape == (m, 6)
        and (counts.sum(1) == share).all()
        and (counts.sum(0) <= labels.bincount(minlength=6)).all()
    )


@some
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 8), st.data(), st.integers(0, 99))
def test_balanced_is_exact(classes, each, m, draw, seed):
    labels = torch.arange(classes).repeat_interleave(each)[torch.randperm(classes * each, generator=generator(seed))]
    if m > each:
        with pytest.raises(ValueError, match=f"num_clients={m}: must be"):
            partition(labels, m, "balanced", seed)
        return
    per_class = draw.draw(st.integers(1, each // m))
    parts = partition(labels, m, "balanced", seed, samples_per_client=per_class * classes)
    check_parts(parts, len(labels), m)
    assert (labels_per_client(labels, parts, classes) == per_class).all()
    most = labels_per_client(labels, partition(labels, m, "balanced", seed), classes)
    assert (most == each // m).all()


@pytest.mark.parametrize("distribution", [name for name in DISTRIBUTIONS if name != "by_length"])
def test_partitions_of_different_seeds_differ(distribution):
    labels = torch.arange(10).repeat(60)
    found = {tuple(torch.cat(partition(labels, 5, distribution, seed)).tolist()) for seed in range(20)}
    assert len(found) == 20


def test_by_length_a_seed_draws_whose_share_is_whose():
    """The shares themselves are the same: the shortest fifth, the next one, and so on."""
    lengths = torch.arange(10).repeat(60)
    dealt = [[tuple(part.tolist()) for part in partition(lengths, 5, "by_length", seed)] for seed in range(20)]
    assert len({frozenset(parts) for parts in dealt}) == 1
    held = sorted(lengths[list(part)].unique().tolist() for part in dealt[0])
    assert held == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert len({tuple(parts) for parts in dealt}) > 1


def test_shards_hold_few_classes():
    labels = torch.arange(10).repeat(60)
    counts = labels_per_client(labels, partition(labels, 10, "noniid", shard_num=2), 10)
    assert ((counts > 0).sum(1) <= 2).all() and counts.sum(0).tolist() == [60] * 10
    # What is left over is not always the end of the last class.
    left = {
        tuple(set(range(601)) - set(torch.cat(partition(torch.arange(601), 10, "noniid", s)).tolist()))
        for s in range(5)
    }
    assert len(left) > 1


def test_alpha_makes_clients_more_or_less_alike():
    labels = torch.arange(10).repeat(500)

    def spread(alpha):
        counts = labels_per_client(labels, partition(labels, 10, "noniid_dirichlet", 1, alpha), 10)
        return counts[:5].double().std(0).mean()

    assert spread(0.1) > 2 * spread(10) > 2 * spread(1e4)


def one_by_one(rng, proportions, stock, n):
    """The definition of Dirichlet's draws, a sample at a time."""
    drawn, stock = [], stock.copy()
    for _ in range(n):
        p = np.where(stock > 0, proportions, 0)
        p = p if p.sum() > 0 else stock
        drawn.append(rng.choice(len(p), p=p / p.sum()))
        stock[drawn[-1]] -= 1
    return drawn


def test_blocks_draw_as_one_by_one_does():
    """Shares of each class at each position, and of pairs of positions, are equal within the error of chance."""
    proportions, stock = np.array([0.5, 0.3, 0.2, 0.0]), np.array([2, 1, 4, 3])
    rng, runs, n = np.random.default_rng(0), 3000, 8
    fast = np.array([draw_classes(rng, proportions, stock, n) for _ in range(runs)])
    slow = np.array([one_by_one(rng, proportions, stock, n) for _ in range(runs)])
    for c in range(4):
        assert np.abs((fast == c).mean(0) - (slow == c).mean(0)).max() < 0.06
    pairs = [np.bincount(d[:, 1] * 4 + d[:, 3], minlength=16) / runs for d in (fast, slow)]
    assert np.abs(pairs[0] - pairs[1]).max() < 0.06
    assert (np.sort(fast[:, :7]) == [0, 0, 1, 2, 2, 2, 2]).all()  # what has a probability first, then what is left
    assert (fast[:, 7] == 3).all()


@some
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data(), st.integers(0, 99))
def test_draws_never_exceed_the_stock(stock, draw, seed):
    stock = np.array(stock)
    p = np.array(
        draw.draw(st.lists(st.sampled_from([0, 5e-324, 1e-9, 0.3, 1.0]), min_size=len(stock), max_size=len(stock)))
    )
    n = draw.draw(st.integers(0, int(stock.sum())))
    drawn = draw_classes(np.random.default_rng(seed), p, stock, n)
    assert len(drawn) == n and (np.bincount(drawn, minlength=len(stock)) <= stock).all()


IMPOSSIBLE = [
    ({"num_clients": 0}, "num_clients=0: must be a whole number from 1 to 100"),
    ({"num_clients": 101}, "num_clients=101: must be a whole number from 1 to 100"),
    ({"num_clients": 2.0}, "num_clients=2.0: "),
    (
        {"distribution": "dirichlet"},
        "dataset.distribution='dirichlet': must be one of iid, noniid, noniid_dirichlet, balanced",
    ),
    *(
        ({"distribution": "noniid_dirichlet", "alpha": a}, f"dataset.alpha={a}: must be a finite number above 0")
        for a in (0, -1.0, float("inf"), float("nan"), None)
    ),
    ({"distribution": "noniid", "shard_num": 0}, "dataset.shard_num=0: must be a whole number from 1 to 10"),
    ({"distribution": "noniid", "shard_num": 11}, "dataset.shard_num=11: must be a whole number from 1 to 10"),
    ({"distribution": "balanced", "samples_per_client": 0}, "dataset.samples_per_client=0: must be"),
    ({"distribution": "balanced", "samples_per_client": 7}, "dataset.samples_per_client=7: must be .* multiple of 5"),
    ({"distribution": "balanced", "samples_per_client": 15}, "dataset.samples_per_client=15: must be .* from 5 to 10"),
    ({"distribution": "balanced", "num_clients": 21}, "num_clients=21: must be at most 20"),
    ({"seed": -1}, "seed=-1"),
]


@pytest.mark.parametrize(("wish", "message"), IMPOSSIBLE)
def test_impossible_partitions_name_field_value_and_range(wish, message):
    with pytest.raises(ValueError, match=message):
        partition(torch.arange(5).repeat(20), **({"num_clients": 10} | wish))


def test_heat_map_has_clients_and_classes():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    ax = plot_labels_per_client(torch.tensor([[1, 2, 3], [4, 5, 6]]), Figure().subplots())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("class", "client")
    assert ax.images[0].get_array().tolist() == [[1, 2, 3], [4, 5, 6]]


# ---------------------------------------------------------------- batches


def client(n=23, batch_size=5, **wish):
    """Images that tell their position: pixel and label are the same number."""
    y = torch.arange(n)
    x = y.to(torch.uint8).view(-1, 1, 1, 1).expand(n, 1, 6, 6).contiguous()
    return ClientData(Images(x, y), (0.0,), (1 / 255,), 10, batch_size, **({"seed": 3, "client": 1} | wish))


def test_batches_hold_every_sample_once_in_a_new_order():
    epochs = [list(client().batches(rnd, epoch)) for rnd in (0, 1) for epoch in (0, 1)]
    for epoch in epochs:
        assert [len(y) for _, y in epoch] == [5, 5, 5, 5, 3]
        assert torch.cat([y for _, y in epoch]).sort().values.tolist() == list(range(23))
        for x, y in epoch:
            assert x.dtype == torch.float32 and torch.equal(x[:, 0, 2, 2].round().long(), y)
    assert len({tuple(torch.cat([y for _, y in e]).tolist()) for e in epochs}) == 4


def order(data, rnd=0):
    return torch.cat([y for _, y in data.batches(rnd)]).tolist()


def test_batches_depend_on_their_address_alone():
    data = client(augment=True)
    first = list(data.batches(5))
    list(data.batches(6))
    torch.rand(3)
    for (x, y), (again, same) in zip(first, client(augment=True).batches(5), strict=True):
        assert torch.equal(x, again) and torch.equal(y, same)
    assert order(client()) == order(client(augment=True)) == order(client(batch_size=23))
    assert len({tuple(order(client(**w))) for w in ({}, {"seed": 4}, {"client": 2}, {"client": 0})}) == 4


def test_augmented_batches_are_the_drawn_ones():
    data = client(augment=True)
    draws = draw_augmentation(23, generator(3, "augment", 1, 9, 2))
    expected = apply_augmentation(
        data.images.take(torch.randperm(23, generator=generator(3, "order", 1, 9, 2))).x, *draws
    )
    assert torch.equal(torch.cat([x for x, _ in data.batches(9, 2)]).round().byte(), expected)


def test_client_without_samples_or_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        client(batch_size=0)
    with pytest.raises(ValueError, match="samples of client 1"):
        client(n=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(eval_batches(client().images, (0.5,), (0.5,), 0))


def test_eval_batches_keep_order():
    images = client().images
    found = list(eval_batches(images, (0.5,), (0.25,), 10))
    assert [len(y) for _, y in found] == [10, 10, 3] and torch.equal(torch.cat([y for _, y in found]), images.y)
    assert torch.equal(torch.cat([x for x, _ in found]), normalise(images.x, (0.5,), (0.25,)))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 37, 37)])
def test_small_images_are_evaluated_a_thousand_at_a_time(shape):
    """As every data set of today is, bit for bit."""
    images = Images(torch.zeros(2100, *shape, dtype=torch.uint8), torch.zeros(2100, dtype=torch.int64))
    assert [len(y) for _, y in eval_batches(images, (0.5,), (0.5,))] == [1000, 1000, 100]


@pytest.mark.parametrize(("shape", "sizes"), [((3, 224, 224), [27, 27, 6]), ((3, 2100, 2100), [1] * 3)])
def test_large_images_are_evaluated_in_batches_of_bounded_size(shape, sizes):
    n = sum(sizes)
    images = Images(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, *shape), torch.zeros(n, dtype=torch.int64))
    assert [len(y) for _, y in eval_batches(images, (0.5,), (0.5,))] == sizes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches_without_waiting():
    here = client(augment=True)
    there = ClientData(here.images.to("cuda"), here.mean, here.std, 10, 5, 3, 1, augment=True)
    list(there.batches(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(there.batches(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x_gpu, y_gpu) in zip(here.batches(0), found, strict=True):
        torch.testing.assert_close(x, x_gpu.cpu())
        assert torch.equal(y, y_gpu.cpu())
