"""What a user may get wrong: each is answered by an error that names the field, the value and the way out."""

import pytest
import torch

from fsl_sage.auxiliary import AlignmentBuffer, auxiliary_model
from fsl_sage.config import Experiment, from_dict, preset
from fsl_sage.core import choose_device, generator, weighted_average
from fsl_sage.ledger import Ledger
from fsl_sage.split import SplitModel, split_model
from fsl_sage.training import DivergedError, train

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


@pytest.mark.parametrize(("call", "says"), CALLS, ids=[says for _, says in CALLS])
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
