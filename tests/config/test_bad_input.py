"""What a user may get wrong: each is answered by an error that names the field, the value and the way out."""

import copy
import errno
import os
import pickle
from pathlib import Path
from typing import Literal, Union

import numpy as np
import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.sglr import epsilon
from fsl_sage.config.experiment import Experiment, from_dict
from fsl_sage.config.parts import ClientConfig, ClockConfig, DatasetConfig
from fsl_sage.config.presets import check_parameters, preset
from fsl_sage.core import choose_device, generator, tensor_bytes, weighted_average
from fsl_sage.data.partition import partition
from fsl_sage.data.sources import load
from fsl_sage.experiments.history import DivergedError
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import StoreError
from fsl_sage.experiments.stored import tidy
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger, table6_bytes
from fsl_sage.networks.auxiliary import AlignmentBuffer, align, auxiliary_for, auxiliary_model
from fsl_sage.networks.cut import SplitModel, cut_layers
from fsl_sage.networks.zoo import split_model
from fsl_sage.papers.claims import published
from fsl_sage.papers.explore import explore
from fsl_sage.papers.leakage import distance_correlation, ssim
from fsl_sage.papers.saving import save_figure

FIELDS = [
    ({"num_clients": 0}, "num_clients=0"),
    ({"rounds": 0}, "rounds=0"),
    ({"rounds": -1}, "rounds=-1"),
    ({"rounds": 2.5}, "rounds=2.5"),
    ({"rounds": True}, "rounds=True"),
    ({"seed": -1}, "seed=-1"),
    ({"comm_threshold_mb": 0}, "comm_threshold_mb=0"),
    ({"dataset.distribution": "dirichlet"}, "noniid_dirichlet"),
    ({"dataset.distribution": "noniid_dirichlet", "dataset.alpha": 0}, "dataset.alpha=0"),
    ({"dataset.alpha": "1"}, "dataset.alpha='1'"),
    ({"dataset.shard_num": 0}, "dataset.shard_num=0"),
    ({"dataset.max_train": 0}, "dataset.max_train=0"),
    ({"dataset.alfa": 1}, "alpha"),
    ({"model.name": "resnet81"}, "resnet18"),
    ({"model.width": 0}, "model.width=0"),
    ({"model.client.batch_size": 0}, "batch_size=0"),
    ({"model.client.epoch": 0}, "epoch=0"),
    ({"model.client.optimizer.name": "adamm"}, "did you mean 'adam'"),
    ({"model.client.optimizer.lr": 0}, "lr=0"),
    ({"model.server.optimizer.weight_decay": -1}, "weight_decay=-1"),
    ({"model.auxiliary.size": "huge"}, "server_copy"),
    ({"algorithm.name": "fedavg"}, "did you mean 'fed_avg'"),
    ({"algorithm.server_update_interval": 0}, "server_update_interval=0"),
    ({"algorithm.align_interval": -1}, "align_interval=-1"),
    ({"algorithm.align_epochs": 0}, "align_epochs=0"),
    ({"algorithm.warm_start": 1}, "warm_start=1"),
]


@pytest.mark.parametrize(("changes", "says"), FIELDS, ids=lambda value: str(value)[:60])
def test_configuration(changes, says):
    with pytest.raises(ValueError) as error:
        Experiment().replace(**changes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"seed": -1}, "seed=-1: must be a whole number, 0 or more"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be at most 2**63 - 1"),
        ({"seed": 3, "partition_seed": -1}, "partition_seed=-1: must be"),
        ({"rounds": 2**63}, "rounds=9223372036854775808: must be at most 2**63 - 1"),
        ({"dataset.alpha": 10**400}, "dataset.alpha=1000"),
        ({"model.client.optimizer.lr": -1.0}, "model.client.optimizer.lr=-1.0: must be greater than 0"),
        ({"model.server.optimizer.lr": -1.0}, "model.server.optimizer.lr=-1.0"),
        ({"model.auxiliary.optimizer.momentum": -1.0}, "model.auxiliary.optimizer.momentum=-1.0"),
        ({"model.server.optimizer.scheduler.gamma": 0.0}, "model.server.optimizer.scheduler.gamma=0.0"),
        ({"model.client": {"batchsize": 3}}, "model.client.batchsize='batchsize': must be one of epoch, batch_size"),
        ({"model.client": {"optimizer": {"lr": {"x": 3}}}}, "model.client.optimizer.lr={'x': 3}"),
    ],
)
def test_the_message_begins_with_the_field_as_it_was_given(changes, begins):
    with pytest.raises(ValueError) as error:
        Experiment().replace(**changes)
    assert str(error.value).startswith(begins)
    Experiment().replace(seed=2**63 - 1)  # which the tables of the store can hold


def test_numbers_of_numpy_and_pandas_are_numbers():
    table = pd.DataFrame({"num_clients": [3, 4], "alpha": [1.5, 2.5], "warm_start": [True, False]})
    row, distribution = table.iloc[0], {"dataset.distribution": "noniid_dirichlet"}
    changes = {"dataset.alpha": np.float32(1.5), "algorithm.warm_start": np.bool_(True), **distribution}
    plain = Experiment(num_clients=3).replace(**{**distribution, "dataset.alpha": 1.5, "algorithm.warm_start": True})
    for kind in (np.int64, np.int32, np.uint8):
        assert Experiment(num_clients=kind(3)).replace(**changes).hash == plain.hash
    changes |= {"dataset.alpha": row.alpha, "algorithm.warm_start": table.warm_start[0]}
    assert Experiment(num_clients=table.num_clients.iloc[0]).replace(**changes).hash == plain.hash
    with pytest.raises(ValueError, match=r"rounds=2\.5: must be of type int"):
        Experiment(rounds=np.float64(2.5))


def test_a_seed_that_was_given_stays():
    given = preset("smoke", "fed_avg", seed=7, init_seed=7)
    assert given == preset("smoke", "fed_avg", seed=7) and given.hash == preset("smoke", "fed_avg", seed=7).hash
    for experiment in (given, given.replace(rounds=5), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        changed = experiment.replace(seed=8)
        assert (changed.init_seed, changed.partition_seed, changed.seed) == (7, 8, 8)
    assert from_dict(preset("smoke", seed=7).to_dict()).replace(seed=8) == preset("smoke", seed=8)


def test_a_table_changes_the_fields_that_it_names():
    table = preset("smoke", "sglr", **{"model.client": {"epoch": 2, "optimizer": {"lr": 0.5}}})
    assert table == preset("smoke", "sglr", **{"model.client.epoch": 2, "model.client.optimizer.lr": 0.5})
    assert table.model.client.batch_size == 16 and table.model.client.optimizer.scheduler.name == "fraction"
    clocked = preset("smoke", clock={"deadline": 60})
    assert clocked == preset("smoke", clock=ClockConfig(deadline=60.0)) and preset("smoke", clock={}).clock
    whole = {"model.client.batch_size": 4, "model.client": ClientConfig(epoch=3)}  # a dataclass is all fields, first
    client = preset("smoke", **whole).model.client
    assert (client.batch_size, client.epoch) == (4, 3)


@pytest.mark.parametrize(
    ("kind", "injected", "value"),
    [
        (Literal["a", "b"], "b", "b"),
        (int | None, 3, 3),
        (Union[int, None], None, None),  # noqa: UP007
        (Path, "a/b", Path("a/b")),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (tuple[str, float], ["a", 1], ("a", 1.0)),
        (dict[str, int], {"a": 3}, {"a": 3}),
        (list, [1], [1]),
        ("list[float]", [1], [1.0]),
    ],
    ids=str,
)
def test_parameters_of_a_notebook_of_any_type(kind, injected, value):
    namespace = {"__annotations__": {"x": kind, "unset": int}, "x": injected}
    check_parameters(namespace)
    assert namespace["x"] == value and type(namespace["x"]) is type(value)
    with pytest.raises(ValueError, match=r"^x="):
        check_parameters({"__annotations__": {"x": kind}, "x": object()})


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"round": 3}, "did you mean 'rounds'"),
        ({"dataset": "cifar10"}, "dataset='cifar10'"),
        ({"model": {"client": {"batchsize": 3}}}, "batch_size"),
        ([], "table of fields"),
    ],
)
def test_configuration_from_a_file(tree, says):
    with pytest.raises(ValueError, match=says):
        from_dict(tree)


CALLS = [
    (lambda: preset("fast"), "preset='fast'"),
    (lambda: choose_device("gpu"), "device='gpu'"),
    (lambda: generator(-1), "seed=-1"),
    (lambda: weighted_average([{}], [0.5]), "1 in all"),
    (lambda: weighted_average([{}], [1.0, 0.0]), "as many numbers as there are models"),
    (lambda: AlignmentBuffer(0), "max_dataset_size=0"),
    (lambda: split_model("resnet18", num_classes=0), "num_classes=0"),
    (lambda: split_model("simple_conv", image_size=4), "image_size=4"),
    (lambda: auxiliary_model("simple_conv", split_model("simple_conv"), "linear"), "size='linear'"),
    (lambda: SplitModel.cut(torch.nn.Sequential(torch.nn.Linear(2, 2)), at="1"), "at='1'"),
    (lambda: Ledger().link(0, 0).up(gradient=torch.zeros(1)), "kind='gradient'"),
    (lambda: Ledger().bytes("tables"), "convention='tables'"),
    (lambda: train(preset("smoke", num_clients=601), "cpu", progress=False), "num_clients=601"),
    (lambda: train(preset("smoke", **{"dataset.max_train": 10**6}), "cpu", progress=False), "max_train"),
    (lambda: train(preset("smoke", **{"model.client.batch_size": 199}), "cpu", progress=False), "batch_size=199"),
    (lambda: train(preset("smoke", **{"dataset.name": "cifar11"}), "cpu", progress=False), "cifar10"),
]


NAN, TWO = float("nan"), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
LABELS, IMAGES = torch.arange(10) % 2, torch.zeros(2, 3, 32, 32)
CALLS += [
    (lambda: Experiment().replace(**{"model.client.optimizer.lr": NAN}), "lr=nan"),
    (lambda: Experiment().replace(**{"model.client.optimizer.weight_decay": NAN}), "weight_decay=nan"),
    (lambda: Experiment().replace(comm_threshold_mb=NAN), "comm_threshold_mb=nan"),
    (lambda: Experiment().replace(**{"algorithm.server_update_interval": 2.5}), "server_update_interval=2.5"),
    (lambda: preset("smoke", "fslsage"), "did you mean 'fsl_sage'"),
    (lambda: preset("smoke", round=3), "did you mean 'rounds'"),
    (lambda: train(preset("smoke"), "tpu", progress=False), "device='tpu'"),
    (lambda: train(preset("smoke"), "cpu", progress=False, in_flight=0), "in_flight=0"),
    (lambda: SplitModel.cut("resnet18", "layer2"), "module='resnet18'"),
    (lambda: SplitModel.cut(TWO, 0), "did you mean '0'"),
    (lambda: SplitModel.cut(TWO, None), "at=None"),
    (lambda: SplitModel.cut(TWO, "0", np.zeros((2, 2))), "example_input='ndarray'"),
    (lambda: SplitModel.cut(TWO, "0", torch.zeros(2, 3)), "cannot take a tensor of shape (2, 3)"),
    (lambda: SplitModel.cut(TWO, "0", torch.full((2, 2), NAN)), "such that the network gives finite numbers"),
    (lambda: SplitModel.cut(TWO, "0", stages="01"), "stages='01'"),
    (lambda: SplitModel.cut(TWO, "0", stages=["0", 3]), "stages=3"),
    (lambda: cut_layers("resnet18"), "module='resnet18'"),
    (lambda: split_model("resnet19"), "did you mean 'resnet18'"),
    (lambda: split_model("resnet18", num_classes=2.5), "num_classes=2.5"),
    (lambda: split_model("resnet18", image_size="32"), "image_size='32'"),
    (lambda: auxiliary_for(TWO, IMAGES), "split='Sequential'"),
    (lambda: auxiliary_for(split_model("resnet18", width=4), IMAGES[:1]), "2 samples or more"),
    (lambda: auxiliary_for(split_model("resnet18", width=4), IMAGES[:, :1]), "shape (2, 1, 32, 32)"),
    (lambda: auxiliary_for(split_model("resnet18", width=4), IMAGES, 0), "budget_mb=0"),
    (lambda: auxiliary_for(split_model("resnet18", width=4), IMAGES, NAN), "budget_mb=nan"),
    (lambda: auxiliary_model("alexnet", split_model("resnet18", width=4)), "model.name='alexnet'"),
    (lambda: AlignmentBuffer(2.5), "max_dataset_size=2.5"),
    (lambda: AlignmentBuffer(3).add(torch.zeros(3, 2), torch.zeros(2)), "labels=2"),
    (lambda: align(None, AlignmentBuffer(3), torch.zeros(0), 1, 1), "buffer=0"),
    (lambda: weighted_average([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], [0.5, 0.5]), "states=['b']"),
    (lambda: weighted_average([{"a": torch.zeros(1)}, {}], [0.5, 0.5]), "the same names and shapes"),
    (lambda: weighted_average([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], [0.5, 0.5]), "states=['a']"),
    (lambda: weighted_average([{}], [NAN]), "weights=[nan]"),
    (lambda: weighted_average([{}, {}], [1.5, -0.5]), "weights=[1.5, -0.5]"),
    (lambda: weighted_average([], []), "weights=[]"),
    (lambda: generator(1.5), "seed=1.5"),
    (lambda: tensor_bytes("resnet18"), "value='str'"),
    (lambda: tensor_bytes(3), "value='int'"),
    (lambda: Ledger().link(0, 0).up(), "message={}"),
    (lambda: Ledger().link(0, 0).up(smashed="x"), "value='str'"),
    (lambda: table6_bytes("FLX", 3), "did you mean 'FL'"),
    (lambda: explore(TWO, 2), "input_shape=2"),
    (lambda: explore(TWO, (2,), samples=2.5), "samples=2.5"),
    (lambda: load("cifar12"), "dataset.name='cifar12'"),
    (lambda: load("fmnist_mini", max_train=0), "max_train=0"),
    (lambda: partition(LABELS, 0), "num_clients=0"),
    (lambda: partition(LABELS, 11), "num_clients=11"),
    (lambda: partition(LABELS[:0], 2), "num_clients=2"),
    (lambda: partition(LABELS, 2, "niid"), "did you mean 'iid'"),
    (lambda: partition(LABELS, 2, "noniid_dirichlet", alpha=NAN), "alpha=nan"),
    (lambda: tidy([]), "histories=[]"),
    (lambda: published("fig99"), "paper='fig99'"),
    (lambda: epsilon(1.0, 0, 1e-5), "releases=0"),
    (lambda: ssim(IMAGES[:, :, :8], IMAGES), "11 × 11 pixels"),
    (lambda: distance_correlation(torch.zeros(2, 3), torch.zeros(3, 3)), "as many samples"),
]


CALLS += [
    (lambda: Experiment(num_clients=2.5), "num_clients=2.5"),
    (lambda: Experiment(rounds="3"), "rounds='3': must be of type int"),
    (lambda: Experiment(dataset="cifar10"), "dataset='cifar10': must be a table of fields"),
    (lambda: DatasetConfig(alpha="1"), "dataset.alpha='1'"),
    (lambda: Experiment().replace(**{"dataset.name.x": 3}), "dataset.name.x=3: must be left out: 'name' has no fields"),
    (lambda: Experiment().replace(**{"comm_threshold_mb.x": 3}), "'comm_threshold_mb' has no fields"),
    (lambda: train("smoke"), "experiment='smoke': must be an Experiment"),
    (lambda: RunStore().get(["smoke"]), "experiments=['smoke']: must be a list of Experiments"),
    (lambda: RunStore().get("smoke"), "experiments='smoke'"),
    (lambda: RunStore().get(preset("smoke")), "must be a list of Experiments"),
    (lambda: save_figure(None, Path(__file__) / "gallery", "a", "A line.", {}, preset="smoke"), "a file is in the way"),
    (lambda: preset("smoke", **{"model.name": "resnet16"}), "model.auxiliary.size=first_layers"),
    (lambda: preset("smoke", **{"model.auxiliary.budget_mb": -1}), "budget_mb=-1"),
]


@pytest.mark.parametrize(("call", "says"), CALLS, ids=[f"{i}-{says}" for i, (_, says) in enumerate(CALLS)])
def test_calls(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_a_cut_around_which_a_tensor_passes_is_named():
    class Skip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x)) + x

    for at in ("first", "second"):
        with pytest.raises(ValueError, match=f"one tensor crosses; here .'x', '{at}'. do"):
            SplitModel.cut(Skip(), at=at)


@pytest.mark.parametrize("algorithm", ["fsl_sage", "sl_single_server"])
def test_divergence_names_the_step_and_keeps_the_history(algorithm, monkeypatch):
    experiment = preset("smoke", algorithm)
    reference = train(experiment, "cpu", progress=False)
    step = torch.optim.Adam.step
    steps = []

    def poisoned(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == first_round + 5:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.fill_(float("nan"))
        return step(self, *args, **kwargs)

    first_round = 10**9
    monkeypatch.setattr(torch.optim.Adam, "step", poisoned)
    train(experiment.replace(rounds=1), "cpu", progress=False)
    first_round = len(steps)
    steps.clear()
    with pytest.raises(DivergedError, match=r"loss of client 0 is nan in round 1, local step \d") as error:
        train(experiment, "cpu", progress=False)
    assert error.value.history.rounds.equals(reference.rounds[:1]) and error.value.history.stopped == "diverged"


PIXELS, CLASSES = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x_train": np.full((4, 8, 8, 3), np.nan)}, "x_train must be uint8"),
        ({"y_train": CLASSES + 0.5}, "y_train must be whole numbers"),
        ({"y_train": CLASSES[:3]}, "y_train has shape (3,) for the 4 images"),
        ({"x_train": PIXELS[:0], "y_train": CLASSES[:0]}, "x_train holds no image"),
        ({"x_train": PIXELS[0]}, "y_train has shape (4,) for the 8 images"),
    ],
)
def test_data_of_ones_own(arrays, says, tmp_path):
    whole = {"x_train": PIXELS, "y_train": CLASSES, "x_test": PIXELS, "y_test": CLASSES}
    np.savez(tmp_path / "mine.npz", **(whole | arrays))
    with pytest.raises(ValueError) as error:
        load("mine", root=tmp_path)
    assert says in str(error.value)


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(StoreError, match="make it a folder that can be written"):
        RunStore(tmp_path / "runs").get([preset("smoke")], "cpu")
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_full_disk_loses_no_finished_run(tmp_path, monkeypatch):
    """The error names the cause; the run before stays readable; with space again the missing one is trained."""
    one, two = (preset("smoke", "centralised", rounds=1, seed=seed, **{"dataset.max_train": 40}) for seed in (1, 2))
    store = RunStore(tmp_path / "runs")
    (before,) = store.get([one], "cpu", jobs=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises((OSError, StoreError), match="No space left on device"):
            store.get([one, two], "cpu", jobs=1)
    assert store.find(one).rounds.equals(before.rounds) and store.find(two) is None
    assert len(store.get([one, two], "cpu", jobs=1)) == 2


def test_parameters_are_known_where_python_keeps_no_annotations():
    """As in Python 3.14, where a namespace has none and a notebook executes its cells statement by statement."""
    cells = ["%matplotlib inline", "rounds: int = 3\nnames: list[str] = []", "# Parameters\nrounds = 4\n"]
    namespace = {"In": cells, "rounds": 4, "names": ["a"]}
    check_parameters(namespace)
    for extra, message in (("rounds = 'x'", "of type int"), ("round = 1", "did you mean 'rounds'")):
        name, _, value = extra.partition(" = ")
        with pytest.raises(ValueError, match=message):
            check_parameters(namespace | {"In": [*cells, f"# Parameters\n{extra}"], name: eval(value)})
    with pytest.raises(ValueError, match="of type int"):
        check_parameters({"__annotate__": lambda format: {"rounds": int}, "rounds": "x"})
