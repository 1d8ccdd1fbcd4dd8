"""Where a network is cut: what must not depend on it, what does, and how a cut is named."""

import json

import pandas as pd
import pytest
import torchvision.models as zoo

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.commands.train import main
from fsl_sage.commands.words import jobs_of
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import record_of
from fsl_sage.costs.clock import simulated_seconds
from fsl_sage.experiments.models import whole_state
from fsl_sage.experiments.setup import register_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.networks.zoo import MODELS
from fsl_sage.papers.explore import explore
from tests.support.runs import assert_same, stopped_after, tiny

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


# Labels stay at the client.

TWO_CUTS = {
    "simple_conv": (("conv1", "norm2"), ("flatten", "relu4")),
    "resnet18": (("relu", "layer4"), ("layer2.0", "layer3")),
    "resnet56": (("layer2", "avgpool"),),
    "alexnet": (("conv1", "relu7"),),
}


def pairs():
    return [(model, *pair) for model, cuts in TWO_CUTS.items() for pair in cuts]


def u_shaped(cut, head_cut):
    return {"model.cut": cut, "model.head_cut": head_cut}


@pytest.mark.parametrize(("model", "cut", "head_cut"), pairs())
@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_u_shaped_with_one_client_is_centralised_training(name, model, cut, head_cut):
    whole = rounds_of("centralised", model, num_clients=1, **{"dataset.size_spread": 0.0})
    split = rounds_of(name, model, num_clients=1, **{"dataset.size_spread": 0.0}, **u_shaped(cut, head_cut))
    pd.testing.assert_frame_equal(split, whole, check_exact=True)


@pytest.mark.parametrize(("model", "cut", "head_cut"), pairs())
def test_u_shaped_splitfed_ms_is_fed_avg(model, cut, head_cut):
    assert alike(rounds_of("sl_multi_server", model, **u_shaped(cut, head_cut)), rounds_of("fed_avg", model))


@pytest.mark.parametrize("changes", [{}, {"participation": 0.5}, {"model.client.epoch": 2}])
@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_u_shaped_sends_four_tensors_a_step_and_no_labels(name, changes):
    """The ledger's kinds, and its bytes: those of the record, priced by the networks."""
    own = u_shaped("layer1", "layer3") | {"model.name": "resnet18", "clock.spread": 0.5}
    experiment = preset("smoke", name, **(SMALL | own | changes))
    history = train(experiment, "cpu", progress=False)
    sent = history.ledger[history.ledger.phase == "round"].groupby(["direction", "kind"]).bytes.sum()
    kinds = {"client_model", "framing"}
    assert set(sent["up"].index) == kinds | {"smashed", "feature_grad"}
    assert set(sent["down"].index) == kinds | {"features", "cut_grad"}
    assert sent["up", "smashed"] == sent["down", "cut_grad"] and sent["up", "feature_grad"] == sent["down", "features"]
    register = register_of(set_up(experiment), clock=True)
    simulated_seconds(history, register.samples, register.costs, experiment.clock)  # refuses other bytes than the run's


def test_u_shaped_flops_are_those_of_the_whole_network():
    """Client and server together compute what one place would, but for the gradient at the images."""
    experiment = preset("smoke", "sl_multi_server", **(SMALL | u_shaped("layer1", "layer3") | {"clock.spread": 0.5}))
    costs = register_of(set_up(experiment), clock=True).costs
    assert costs.client + costs.exact == costs.whole > costs.exact > 0
    two = register_of(set_up(experiment.replace(**{"model.head_cut": None})), clock=True).costs
    assert costs.whole == two.whole and costs.client > two.client and costs.exact < two.exact


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"sl_single_server", "sl_multi_server"}))
def test_what_needs_labels_at_the_server_refuses_a_head_at_the_client(name):
    why = r"model.head_cut='layer4': must be None for .*(labels|client).*sl_single_server"
    with pytest.raises(ValueError, match=why):
        preset("smoke", name, **{"model.head_cut": "layer4"})


def test_a_head_cut_is_a_younger_field_and_names_a_layer_of_the_server():
    plain = preset("smoke", "sl_single_server")
    assert "head_cut" not in plain.to_dict()["model"] and plain.hash != plain.replace(**{"model.head_cut": "fc"}).hash
    other = preset("smoke", "sl_single_server", **(SMALL | u_shaped("layer2", "layer1")))
    with pytest.raises(ValueError, match=r"model.head_cut='layer1': must be one of layer3"):
        train(other, "cpu", progress=False)
    with pytest.raises(ValueError, match=r"model.head_cut='h2': must be None for a network that reads text"):
        preset("smoke", "sl_single_server", **{"model.name": "gpt2_tiny", "model.head_cut": "h2"})


def test_a_u_shaped_run_goes_on_from_its_checkpoint_and_keeps_one_model(tmp_path, monkeypatch):
    experiment = tiny("sl_single_server", **{"model.name": "resnet18"}, **u_shaped("layer1", "layer3"))
    whole = train(experiment, "cpu", progress=False)
    stopped_after(1, monkeypatch, experiment, tmp_path / "run")
    again = train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run")
    assert_same(whole, again)
    _, state = train_state(experiment, "cpu", progress=False)
    names = whole_state(record_of(experiment).evaluation_models(state)[0])
    assert set(names) == set(MODELS["resnet18"].build(1, 10, 28, 8).state_dict())
