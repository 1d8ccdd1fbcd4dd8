"""Where a network is cut: what must not depend on it, what does, and how a cut is named."""

import json

import pandas as pd
import pytest
import torchvision.models as zoo

from fsl_sage.commands.train import main
from fsl_sage.commands.words import jobs_of
from fsl_sage.config.presets import preset
from fsl_sage.experiments.train import train
from fsl_sage.papers.explore import explore

SMALL = {
    "num_clients": 3, "rounds": 2, "dataset.max_train": 96, "dataset.max_test": 50, "model.width": 4,
    "model.client.batch_size": 16, "dataset.size_spread": 0.5,
}  # fmt: skip
CUTS = {
    "simple_conv": ("conv1", "flatten", "relu4"),
    "resnet18": ("relu", "layer1.0", "avgpool"),
    "resnet56": ("bn1", "layer2.3", "layer3"),
    "resnet50_cifar": ("conv1", "layer3.1", "flatten"),
    "alexnet": ("conv1", "relu4", "fc7"),
}


def rounds_of(algorithm, model, **changes):
    """What the run has learnt: its history without bytes and rates."""
    experiment = preset("smoke", algorithm, **(SMALL | {"model.name": model} | changes))
    return train(experiment, "cpu", progress=False).rounds[["test_accuracy", "test_loss", "train_loss"]]


def alike(one, other):
    try:
        pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=1e-4, atol=0)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("model", CUTS)
def test_splitfed_ms_does_not_depend_on_the_cut_and_splitfed_ss_does(model):
    """SplitFed-MS is FedAvg with the network in two pieces; with one server the order of its steps decides."""
    fed_avg = rounds_of("fed_avg", model)
    many = [rounds_of("sl_multi_server", model, **{"model.cut": cut}) for cut in CUTS[model]]
    assert all(alike(history, fed_avg) for history in many)
    one = [rounds_of("sl_single_server", model, **{"model.cut": cut}) for cut in CUTS[model]]
    assert not any(alike(history, fed_avg) for history in one)
    assert not alike(one[0], one[1]) and not alike(one[1], one[2])


def test_the_explorers_words_train_each_cut():
    """Any cut of the table, also FSL-SAGE's with an auxiliary model; what is sent is what the table says."""
    small = preset("smoke", **SMALL)
    table = explore(zoo.resnet18(num_classes=10), (3, 28, 28), small, samples=32, aux_mb=0.25)
    assert len(set(table.words)) == len(table)
    for cut in ("conv1", "layer2", "layer3.0", "avgpool"):
        words = ["preset=smoke", "model=resnet18", *table.words[cut].split()]
        words += [*(f"{name}={value}" for name, value in SMALL.items()), "rounds=1"]
        exchanged, aligned = (jobs_of([*words, f"algorithm={name}"])[0] for name in ("sl_single_server", "fsl_sage"))
        assert exchanged.experiment.model.cut == (None if cut == "layer2" else cut)  # the published one needs no word
        ledger = train(exchanged.experiment, "cpu", progress=False).ledger
        sent = ledger.groupby("kind").bytes.sum()
        samples = sent.labels / 8
        assert sent.smashed == sent.cut_grad == samples * table.smashed_bytes[cut] / 16  # 4 channels, not 64
        assert len(train(aligned.experiment, "cpu", progress=False).alignments) == 3


def test_the_command_line_sweeps_over_cuts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = [f"{name}={value}" for name, value in SMALL.items()]
    own = ["algorithm=sl_multi_server", "model.cut=layer1,layer2,layer3", "hydra.launcher.n_jobs=1", "device=cpu"]
    assert main(["-m", "preset=smoke", "model=resnet18", *words, *own]) == 0
    told = capsys.readouterr().out
    stored = [json.loads(file.read_text()) for file in tmp_path.glob("*/config.json")]
    assert {run["model"].get("cut") for run in stored} == {"layer1", None, "layer3"}, told
