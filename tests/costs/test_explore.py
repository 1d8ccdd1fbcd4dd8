"""What cuts cost: predictions on shapes alone against real tensors and the ledger of real runs."""

from functools import partial

import pandas as pd
import pytest
import torch
import torchvision.models as zoo

from fsl_sage.config.presets import preset
from fsl_sage.core import held_memory, tensor_bytes
from fsl_sage.experiments.train import train
from fsl_sage.networks.auxiliary import auxiliary_model
from fsl_sage.networks.cut import SplitModel
from fsl_sage.networks.zoo import split_model
from fsl_sage.papers.explore import bytes_per_round, explore, plot_cuts

SMALL = {"num_clients": 2, "rounds": 2, "dataset.max_train": 104, "dataset.max_test": 10, "model.width": 4}
OF_PAPER = {"fed_avg": {}, "sl_single_server": {}, "cse_fsl": {"algorithm.server_update_interval": 3}, "fsl_sage": {
    "algorithm.server_update_interval": 3, "algorithm.align_interval": 2, "algorithm.align_epochs": 1
}}  # fmt: skip


@pytest.mark.parametrize("name", OF_PAPER)
def test_bytes_are_the_ledgers(name):
    """52 samples a client in batches of 16, two epochs, every third batch uploaded: a short batch is among them."""
    own = {"model.client.batch_size": 16, "model.client.epoch": 2}
    experiment = preset("smoke", name, **(SMALL | own | OF_PAPER[name]))
    history = train(experiment, "cpu", progress=False)
    split = split_model("resnet18", 1, 10, 28, 4)
    z = tensor_bytes(split.client.eval()(torch.zeros(1, 1, 28, 28)))
    sizes = [tensor_bytes(model) for model in (split.client, split.server, auxiliary_model("resnet18", split))]
    assert 2 * bytes_per_round(experiment, 52, z, *sizes)[name] == history.rounds.paper_bytes.iloc[-1]


@pytest.mark.parametrize("name", ["sl_multi_server", "ssl", "psl", "sfl", "sglr"])
def test_bytes_of_the_others(name):
    changes = SMALL | {"rounds": 1, "model.name": "resnet18", "model.client.batch_size": 26}
    if name in ("ssl", "psl", "sfl", "sglr"):
        changes |= {"dataset.distribution": "iid", "dataset.val_size": 0}
    experiment = preset("smoke", name, **changes)
    history = train(experiment, "cpu", progress=False)
    split = split_model("resnet18", 1, 10, 28, 4)
    z = tensor_bytes(split.client.eval()(torch.zeros(1, 1, 28, 28)))
    sizes = [tensor_bytes(model) for model in (split.client, split.server)]
    assert bytes_per_round(experiment, 52, z, *sizes, 0)[name] == history.rounds.paper_bytes.iloc[-1]


@pytest.mark.parametrize(
    ("build", "at"),
    [
        (zoo.mobilenet_v3_small, "features.4"),
        (zoo.densenet121, "features.transition1"),
        (partial(zoo.VisionTransformer, 32, 8, 2, 2, 32, 64), "encoder.layers.encoder_layer_0"),
    ],
)
def test_memory_is_what_a_real_client_holds(build, at):
    network, two = build(), preset("smoke", **{"model.client.batch_size": 2})
    table = explore(network, (3, 32, 32), two)
    x = torch.zeros(2, 3, 32, 32)
    client = SplitModel.cut(network, at, x).client.train()
    with held_memory(client) as held:
        smashed = client(x)
    row = table.loc[at]
    most = 1.25 if "encoder" in at else 1  # on meta, attention is computed step by step
    assert sum(held.values()) <= row.held_bytes <= most * sum(held.values())
    assert row.smashed_bytes == tensor_bytes(smashed) / 2
    assert row.client_params == sum(p.numel() for p in client.parameters())
    assert (table.client_params + table.server_params == sum(p.numel() for p in network.parameters())).all()
    assert network.training and next(network.parameters()).device.type == "cpu"


def test_the_picture_shows_every_cut():
    table = explore(zoo.resnet18(num_classes=10), (3, 32, 32))
    axes = plot_cuts(table).axes
    assert [text.get_text() for text in axes[0].get_yticklabels()] == list(table.index)
    assert [len(ax.patches) for ax in axes[:4]] == [len(table)] * 4
    assert len(axes[4].lines) == 5


class Untraceable(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: explore("resnet18", (3, 32, 32)), "module='resnet18': must be a torch.nn.Module"),
        (lambda: explore(torch.nn.Linear(2, 2), (2,)), "module='Linear': must be a network that torch.fx can follow"),
        (lambda: explore(Untraceable(torch.nn.Linear(2, 2)), (2,)), "module='Untraceable'"),
        (lambda: explore(zoo.resnet18(), (1, 32, 32)), "input_shape=(1, 32, 32): the network cannot be run on it"),
        (lambda: explore(zoo.resnet18(), (3, 32, 32), samples=0), "samples=0: must be a whole number"),
        (lambda: explore(zoo.resnet18(), (3, 32, 32), aux_mb=-1), "aux_mb=-1: must be 0 MiB or more"),
        (lambda: plot_cuts(pd.DataFrame()), "table=0: must be a table with at least one cut"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
