"""Where a network is cut: what must not depend on it, what does, and how a cut is named."""

import json

import pandas as pd
import pytest
import torch
import torchvision.models as zoo

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import average_layers, global_model
from fsl_sage.algorithms.record import begin
from fsl_sage.algorithms.state import FixedData, server_of
from fsl_sage.commands.train import main
from fsl_sage.commands.words import jobs_of
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import record_of
from fsl_sage.costs.clock import client_latency, simulated_seconds, speeds
from fsl_sage.costs.estimate import count
from fsl_sage.costs.table import work_of
from fsl_sage.experiments.models import whole_state
from fsl_sage.experiments.setup import cuts_in_time, register_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from fsl_sage.machines.remote import check_remote
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


# Each client its own cut.

OWN = {"resnet18": ("layer3", "relu", "layer1.0"), "simple_conv": ("relu4", "conv1", "flatten"),
       "alexnet": ("fc7", "pool1", "relu4")}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"participation": 0.67}])
@pytest.mark.parametrize("model", OWN)
def test_splitfed_ms_is_fed_avg_whatever_the_clients_cuts(model, changes):
    own = rounds_of("sl_multi_server", model, **{"model.cuts": list(OWN[model])}, **changes)
    assert alike(own, rounds_of("fed_avg", model, **changes))


@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_cuts_between_which_nothing_is_trained_are_one_cut(name):
    """Below a ReLU or above it: no layer with weights changes sides."""
    own = rounds_of(name, "resnet18", **{"model.cuts": ["relu", "bn1", "maxpool"]})
    assert alike(own, rounds_of(name, "resnet18", **{"model.cut": "relu"}))


@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_equal_cuts_are_the_run_with_one_cut(name):
    """The same description, so the same run in every bit; also where the parts are made for cuts of their own."""
    one = preset("smoke", name, **(SMALL | {"model.name": "resnet18", "model.cut": "layer1"}))
    for cuts in (["layer1"] * 3, ["layer1:1.0"], ["layer1:0.9", "layer3:0.1"]):
        assert preset("smoke", name, **(SMALL | {"model.name": "resnet18", "model.cuts": cuts})) == one
    published = preset("smoke", name, **(SMALL | {"model.name": "resnet18", "model.cuts": ["layer2"] * 3}))
    assert published == one.replace(**{"model.cut": None}) and "cuts" not in published.to_dict()["model"]


def test_layers_are_averaged_from_wherever_they_are():
    """By hand, with one server: client 0 has the first layer, client 1 the first two, and the server all above it."""
    cuts = {"model.name": "simple_conv", "model.cuts": ["flatten", "relu3"], "num_clients": 2}
    data = [FixedData(torch.randn(n, 1, 28, 28), torch.zeros(n, dtype=torch.long), batch_size=8) for n in (2, 6)]
    state = begin(preset("smoke", "sl_single_server", **cuts), data, Ledger())
    for part, value in ((state.clients[0], 1.0), (state.clients[1], 2.0), (state.servers[0], 4.0)):
        for parameter in part.model.parameters():
            parameter.data.fill_(value)
    average_layers(state)
    mean = {name: float(tensor.mean()) for name, tensor in whole_state(global_model(state)).items()}
    below = 0.25 * 1 + 0.75 * 2  # both clients have it
    between = 0.25 * 4 + 0.75 * 2  # client 0 has its share at the server
    wanted = {"conv1": below, "conv2": below, "fc1": between, "fc2": 4.0, "olayer": 4.0}
    assert {name: wanted[name.split(".")[0]] for name in mean} == pytest.approx(mean)
    one, other = ({name for name, _ in client.model.named_parameters()} for client in state.clients)
    assert other - one == {"fc1.weight", "fc1.bias"} and all(len(server_of(state, i).model(z)) for i, z in enumerate(
        [state.clients[0].model(data[0].x), state.clients[1].model(data[1].x)]))  # fmt: skip


FITTING = {"model.auxiliary.size": "first_layers", "model.auxiliary.budget_mb": 0.05}  # an auxiliary model for any cut


@pytest.mark.parametrize("joint", [False, True])
def test_fsl_sage_with_cuts_that_differ_in_shape_alone_is_the_run_with_one(joint):
    """Before numbers are laid in a row, or after: the parts are made for cuts of their own, nothing else differs."""
    how = FITTING | {"algorithm.align_epochs": 3, "algorithm.align_jointly": joint}
    own = rounds_of("fsl_sage", "resnet18", **{"model.cuts": ["flatten", "avgpool", "flatten"]}, **how)
    assert alike(own, rounds_of("fsl_sage", "resnet18", **{"model.cut": "avgpool"}, **how))


def test_auxiliary_models_are_averaged_among_the_clients_of_a_cut():
    """CSE-FSL: clients 0 and 2 end a round with one auxiliary model, client 1 with its own, all on one server."""
    own = {"model.name": "resnet18", "model.cuts": ["layer1", "layer3", "layer1"], "rounds": 1}
    _, state = train_state(preset("smoke", "cse_fsl", **(SMALL | own | FITTING)), "cpu", progress=False)
    one, alone, other = (aux.exchanged() for aux in state.auxes)
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() != alone.keys()
    shared = state.clients[0].exchanged()
    for client in state.clients[1:]:
        assert all(torch.equal(tensor, client.exchanged()[name]) for name, tensor in shared.items())
    deep = {n for n in state.clients[1].exchanged() if n not in shared}
    assert deep and all(torch.equal(state.clients[1].exchanged()[n], state.servers[0].exchanged()[n]) for n in deep)


def test_fsl_sage_aligns_each_client_with_the_server_from_its_own_cut():
    own = {"model.name": "resnet18", "model.cuts": ["layer1", "layer3", "layer2"], "algorithm.align_epochs": 20}
    history = train(preset("smoke", "fsl_sage", **(SMALL | own | FITTING)), "cpu", progress=False)
    first = history.alignments[history.alignments["round"] == 0]
    assert first.client.tolist() == [0, 1, 2] and (first.error_after < first.error_before).all()


@pytest.mark.parametrize("changes", [{}, {"participation": 0.67, "clock.deadline": 0.09}])
@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage"])
def test_each_clients_bytes_are_those_of_its_cut(name, changes):
    own = {"model.name": "resnet18", "model.cuts": list(OWN["resnet18"]), "clock.spread": 0.5}
    experiment = preset("smoke", name, **(SMALL | own | changes | (FITTING if ALGORITHMS[name].auxiliary else {})))
    history, register = train(experiment, "cpu", progress=False), register_of(set_up(experiment), clock=True)
    assert len({costs.client_bytes for costs in register.costs}) == 3
    again = simulated_seconds(history, register.samples, register.costs, experiment.clock)  # refuses other bytes
    assert again.tolist() == pytest.approx(history.rounds.clock_seconds.tolist())


def test_the_clock_gives_each_client_the_deepest_cut_in_time():
    cuts = ("layer1", "layer2", "layer3", "layer4")
    small = SMALL | {"model.name": "resnet18", "num_clients": 6, "clock.spread": 1.5, "clock.deadline": 0.05}
    experiment = preset("smoke", "sl_multi_server", **small)
    chosen = cuts_in_time(experiment, cuts)
    assert len(set(chosen)) > 1
    speed = speeds(experiment.clock, 6)

    def seconds(i, cut):
        run = experiment.replace(**{"model.cut": cut})
        register = register_of(set_up(run), clock=True)
        return client_latency(work_of(run, register.costs, i, register.samples[i]), speed[i], run.clock.server_flops)

    for i, cut in enumerate(chosen):
        deeper = cuts[cuts.index(cut) + 1 :]
        if seconds(i, cut) <= 0.05:
            assert all(seconds(i, other) > 0.05 for other in deeper)
        else:
            assert seconds(i, cut) == min(seconds(i, other) for other in cuts)
    with pytest.raises(ValueError, match="clock=None: must be a clock with a deadline"):
        cuts_in_time(preset("smoke"), cuts)


@pytest.mark.parametrize("name", ["sl_single_server", "cse_fsl", "fsl_sage"])
def test_a_run_with_cuts_of_their_own_goes_on_from_its_checkpoint(tmp_path, monkeypatch, name):
    own = {"model.name": "resnet18", "model.cuts": ["layer1", "layer3", "layer2"]}
    experiment = tiny(name, **own, **(FITTING if ALGORITHMS[name].auxiliary else {}))
    whole = train(experiment, "cpu", progress=False)
    stopped_after(1, monkeypatch, experiment, tmp_path / "run")
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run"))


REFUSED = [
    ({"algorithm.name": "heron_sfl"}, "'heron_sfl', whose auxiliary models all belong to one cut; .*fsl_sage"),
    ({"algorithm.name": "psl"}, "left out for 'psl', whose clients have one cut"),
    ({"num_clients": 4}, "model.cuts=.*one layer for each of the 4 clients, or shares"),
    ({"model.cuts": ["layer1:0.5", "layer2:0.4"]}, "shares that add up to 1"),
    ({"model.cuts": ["layer1:0.5", "layer2"]}, "a share above 0 for each layer"),
    ({"model.head_cut": "layer4"}, "model.head_cut='layer4': must be left out with model.cuts"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_cuts_that_do_not_fit_are_refused(changes, message):
    fine = preset("smoke", "sl_multi_server", **{"model.cuts": ["layer1", "layer3", "layer2"]})
    with pytest.raises(ValueError, match=message):
        fine.replace(**changes)


def test_shares_are_a_list_and_streamed_clients_cannot_differ():
    shares = preset("smoke", "sl_multi_server", num_clients=5, **{"model.cuts": ["layer1:0.6", "layer3:0.4"]})
    listed = ["layer1"] * 3 + ["layer3"] * 2
    assert shares == preset("smoke", "sl_multi_server", num_clients=5, **{"model.cuts": listed})
    with pytest.raises(ValueError, match="in_flight=2: must be all 5 clients"):
        train(shares, "cpu", progress=False, in_flight=2)
    with pytest.raises(ValueError, match=r"model.cuts=.*left out between machines"):
        check_remote(shares)
    words = ["preset=smoke", "algorithm=sl_multi_server", "num_clients=5", "model.cuts=[layer1:0.6,layer3:0.4]"]
    (job,) = jobs_of(words)
    assert job.experiment == shares


def test_an_estimate_counts_each_clients_cut_and_each_head():
    one, other = ({"model.cuts": [cut] * 3} for cut in ("layer1", "layer3"))
    mixed = {"model.cuts": ["layer1", "layer3", "layer3"]}
    counted = [count(preset("smoke", "sl_multi_server", **cuts)) for cuts in (one, other, mixed)]
    for name in ("training", "bytes"):
        shallow, deep, between = (row[name] for row in counted)
        assert between == pytest.approx((shallow + 2 * deep) / 3)
    experiment = preset("smoke", "sl_multi_server", **{"dataset.distribution": "iid"}, **u_shaped("layer1", "layer3"))
    history = train(experiment, "cpu", progress=False)
    assert count(experiment)["bytes"] == history.rounds.paper_bytes.iloc[-1]


def test_an_alignment_of_one_sample_is_refused_at_each_cut():
    """Client 0 has nothing but a linear layer above its cut; at client 1's BatchNorm wants two samples."""
    own = {"model.name": "resnet18", "model.cuts": ["avgpool", "layer1"], "num_clients": 2}
    one = FITTING | {"algorithm.max_dataset_size": 1}
    with pytest.raises(ValueError, match=r"algorithm.max_dataset_size=1: must be such .*client 1's buffer has 1"):
        set_up(preset("smoke", "fsl_sage", **(SMALL | own | one)))
