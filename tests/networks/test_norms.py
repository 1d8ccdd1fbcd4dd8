"""GroupNorm in the place of BatchNorm: network, auxiliary model, cuts, costs, runs; and nothing else changes."""

import pytest
import torch
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.commands.train import main
from fsl_sage.config.experiment import from_dict
from fsl_sage.config.presets import preset
from fsl_sage.core import generator, random_stream
from fsl_sage.costs.estimate import networks
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import set_up
from fsl_sage.networks.auxiliary import auxiliary_model
from fsl_sage.networks.cut import cut_layers
from fsl_sage.networks.zoo import MODELS, split_model

SMALL = {
    "dataset.max_train": 60,
    "dataset.val_size": 0,
    "dataset.max_test": 20,
    "rounds": 1,
    "model.client.batch_size": 10,
}
SMALL |= {"dataset.samples_per_client": None}
RESNETS = ("resnet18", "resnet50_cifar", "resnet56", "resnet16")


def fresh(name, norm, **sizes):
    with random_stream(generator(0, "init")):
        return split_model(name, width=8, norm=norm, **sizes)


@pytest.mark.parametrize("name", RESNETS)
def test_only_the_norms_differ(name):
    batch, group = fresh(name, "batch"), fresh(name, "group")
    theirs = dict(batch.named_parameters())
    assert list(theirs) == [parameter for parameter, _ in group.named_parameters()]
    assert all(torch.equal(parameter, theirs[where]) for where, parameter in group.named_parameters())
    norms = [[isinstance(layer, kind) for split in (batch, group) for layer in split.modules()].count(True)
             for kind in (nn.BatchNorm2d, nn.GroupNorm)]  # fmt: skip
    assert norms[0] == norms[1] > 0 and not any(isinstance(layer, nn.BatchNorm2d) for layer in group.modules())
    assert not list(group.buffers())  # nothing is averaged but parameters


@pytest.mark.parametrize("size", ["linear", "one_block", "default", "server_copy"])
@pytest.mark.parametrize("cut", ["layer1", "layer2"])
def test_auxiliary_models_follow(size, cut):
    split = fresh("resnet18", "group", cut=cut)
    aux = auxiliary_model("resnet18", split, size)
    norms = {type(layer) for layer in aux.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
    assert norms == (set() if size == "linear" else {nn.GroupNorm})
    assert aux(split.client(torch.randn(1, 3, 32, 32))).shape == (1, 10)


def test_every_cut_of_the_network_works():
    whole = MODELS["resnet18"].build(3, 10, 32, 8)
    for cut in cut_layers(whole):
        assert fresh("resnet18", "group", cut=cut)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("algorithm", [name for name, record in ALGORITHMS.items() if not record.alone])
def test_every_algorithm_trains_with_it(algorithm):
    experiment = preset("smoke", algorithm, **SMALL | {"model.norm": "group"})
    assert from_dict(experiment.to_dict()) == experiment
    assert experiment.hash != experiment.replace(**{"model.norm": "batch"}).hash
    state = set_up(experiment)
    kinds = {type(layer) for part in state.parts for layer in part.model.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    split, aux, _ = networks(experiment.model, experiment.dataset, algorithm, 10)
    assert not any(isinstance(layer, nn.BatchNorm2d) for half in (split, aux) if half for layer in half.modules())


def test_networks_without_batch_norm_refuse_it():
    with pytest.raises(ValueError, match=r"model\.norm='group': must be batch for 'simple_conv'"):
        split_model("simple_conv", norm="group")
    with pytest.raises(ValueError, match=r"model\.norm='layer': must be one of batch, group"):
        preset("smoke", **{"model.norm": "layer"})
    text = preset("smoke", "fed_avg", **{"dataset.name": "restaurants", "model.name": "gpt2_tiny"})
    assert text.replace(**{"model.norm": "group"}) == text


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = "preset=smoke algorithm=fsl_sage model.norm=group rounds=1 dataset.max_train=60 dataset.max_test=20"
    words += " device=cpu"
    assert main(words.split()) in (0, None)
    (norm,) = RunStore(tmp_path).frame()["model.norm"]
    assert norm == "group"
