"""Parallel split learning, SplitLr and SplitAvg: what must hold whatever the numbers, Table 6, and bad input."""

from collections import OrderedDict

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.sglr import MIXES, MIXING_MODES, ManyHeads, active_clients, fraction_now, n_active
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.parts import SchedulerConfig
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import settings_of
from fsl_sage.core import generator, tensor_bytes, weighted_average
from fsl_sage.experiments import plugins
from fsl_sage.experiments.history import evaluate_mean
from fsl_sage.experiments.setup import prepare
from fsl_sage.experiments.train import selected, train
from fsl_sage.ledger import Ledger, table6_bytes, table6_seconds
from fsl_sage.networks.part import LOSSES, Part
from fsl_sage.networks.zoo import split_model
from fsl_sage.papers.oracle import replay
from tests.support.traces import read_trace

SMALL = {"model.name": "resnet16", "model.width": 8, "model.client.batch_size": 4}


def federation(algorithm: str, sizes=(8, 8, 8), model: str = "resnet16", **changes) -> State:
    """Clients with random images, set up for `algorithm`; fields of the algorithm by their short names."""
    gen = torch.Generator().manual_seed(0)
    data = [
        FixedData(torch.randn(n, 1, 16, 16, generator=gen), torch.randint(10, (n,), generator=gen), batch_size=4)
        for n in sizes
    ]
    own = {name if "." in name else f"algorithm.{name}": value for name, value in changes.items()}
    base = SMALL | {"model.name": model, "algorithm.name": algorithm}
    experiment = Experiment(num_clients=len(sizes), rounds=4).replace(**base | own)
    return ALGORITHMS[algorithm].init(experiment, data, Ledger())


def run(algorithm: str, rounds: int = 2, ledger: Ledger | None = None, **changes) -> State:
    state = federation(algorithm, **changes)
    for rnd in range(rounds):
        ALGORITHMS[algorithm].run_round(state, rnd, ledger or Ledger())
    return state


def assert_same_bits(one: State, other: State) -> None:
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        for name, tensor in mine.model.state_dict().items():
            assert torch.equal(tensor, theirs.model.state_dict()[name]), name


def changed(one: State, other: State) -> bool:
    weights = [[part.model.state_dict()["conv1.weight"] for part in state.clients] for state in (one, other)]
    return not all(map(torch.equal, *weights))


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_client_loss", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (6, 9, 4)], ids=str)
def test_without_its_two_ideas_sglr_is_psl(sizes, loss, per_client_loss):
    changes = {"sizes": sizes, "loss": loss, "per_client_loss": per_client_loss}
    assert_same_bits(run("sglr", lr_power=0, active_fraction=0, **changes), run("psl", **changes))


def test_one_active_client_changes_nothing():
    none, one, two = (run("sglr", active_fraction=fraction) for fraction in (0, 0.34, 0.67))
    assert n_active(0.34, 3) == 1 and n_active(0.67, 3) == 2
    assert_same_bits(none, one)
    assert changed(none, two)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_active_clients_receive_the_same_average_and_others_their_own(fraction, monkeypatch):
    steps = []
    own_step = Part.step
    monkeypatch.setattr(Part, "step", lambda part, z, g=None: (steps.append((part, g)), own_step(part, z, g))[1])

    def received(state):
        steps.clear()
        ALGORITHMS["sglr"].run_round(state, 0, Ledger())
        of_step = dict(reversed([(id(part), g) for part, g in steps if g is not None]))  # each client's first
        return [of_step[id(client)] for client in state.clients]

    own = received(federation("sglr", sizes=(8,) * 4))
    state = federation("sglr", sizes=(8,) * 4, active_fraction=fraction)
    gradients, active = received(state), active_clients(state.experiment, 0, 0)
    assert len(active) == 4 * fraction
    average = torch.stack([own[i] for i in active]).mean(0)
    for i, gradient in enumerate(gradients):
        assert torch.equal(gradient, average if i in active else own[i])


@pytest.mark.parametrize("algorithm", ["psl", "sfl", "ssl", "sglr"])
def test_one_client_is_centralised_training(algorithm):
    extra = {"lr_power": 2.0, "active_fraction": 1.0} if algorithm == "sglr" else {}
    assert_same_bits(run(algorithm, sizes=(10,), **extra), run("centralised", sizes=(10,)))


def test_sfl_is_psl_and_an_average():
    psl, sfl = run("psl", 1, sizes=(4, 12)), run("sfl", 1, sizes=(4, 12))
    mean = weighted_average([part.model.state_dict() for part in psl.clients], [0.25, 0.75])
    for client in sfl.clients:
        torch.testing.assert_close(client.model.state_dict(), mean)
    assert not changed(psl, psl) and len({part.model.conv1.weight[0, 0, 0, 0].item() for part in psl.clients}) == 2


def test_ssl_hands_the_model_on():
    state = run("ssl", 1, sizes=(4, 4))
    alone = run("ssl", 1, sizes=(4,))  # the same first client
    assert torch.equal(state.clients[0].model.conv1.weight, alone.clients[0].model.conv1.weight)
    (model,) = ALGORITHMS["ssl"].evaluation_models(state)
    assert model.client is state.clients[1].model


def test_clients_keep_their_own_models():
    state = run("sglr", active_fraction=1.0)
    models = ALGORITHMS["sglr"].evaluation_models(state)
    assert [model.client for model in models] == [client.model for client in state.clients]
    weights = [client.model.conv1.weight for client in state.clients]
    assert not torch.equal(weights[0], weights[1])


# ------------------------------------------------------------------------------------------------------- mixing modes


@pytest.mark.parametrize("mode", ["concat_batch", "pooling", "concat_channels"])
def test_the_cut_does_not_change_the_gradient(mode):
    """Clients step along the gradient of the server's loss through the whole uncut network."""
    sgd = {"model.client.optimizer.name": "sgd", "model.client.optimizer.weight_decay": 0.0}
    state = federation("sglr", sizes=(4, 4, 4), mixing_mode=mode, **sgd)
    for part in state.parts:
        part.model.double()
    for local in state.data:
        local.x = local.x.double()
    stream = generator(state.experiment.sampling_seed, "mix", 0, 0)
    smashed = [client.model(local.x) for client, local in zip(state.clients, state.data, strict=True)]
    joint, targets = MIXES[mode](smashed, [local.y for local in state.data], 10, stream)
    whole = F.cross_entropy(state.servers[0].model(joint), targets)
    weights = [client.model.conv1.weight for client in state.clients]
    expected = [w.detach() - 1e-3 * g for w, g in zip(weights, torch.autograd.grad(whole, weights), strict=True)]
    metrics = ALGORITHMS["sglr"].run_round(state, 0, Ledger())
    assert metrics.losses[0].value.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close([w.detach() for w in weights], expected, rtol=1e-12, atol=1e-15)


def test_concat_batch_pool_sends_the_released_codes_gradient():
    """0.9 of a client's own slice and 0.1 of its predecessor's; forwards the last mixes with the mixed first."""
    parts = [torch.full((2, 3), value).double().requires_grad_() for value in (1.0, 10.0, 100.0)]
    joint, targets = MIXES["concat_batch_pool"](parts, [torch.tensor([0, 1])] * 3, 4, None)
    torch.testing.assert_close(joint[::2, 0], torch.tensor([1.9, 19.0, 90.19]).double())
    torch.testing.assert_close(targets.sum(1), torch.ones(6).double())
    g = torch.randn(6, 3).double()
    own = torch.autograd.grad(joint, parts, g)
    for i in range(3):
        torch.testing.assert_close(own[i], 0.9 * g[2 * i : 2 * i + 2] + 0.1 * g.roll(2, 0)[2 * i : 2 * i + 2])


def test_pooling_mixes_labels_with_the_same_shares():
    labels = [torch.arange(5), torch.arange(5) + 5]
    smashed = [F.one_hot(y, 10).float().view(5, 10, 1, 1) for y in labels]
    joint, targets = MIXES["pooling"](smashed, labels, 10, generator(1))
    assert torch.equal(joint.flatten(1), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))


@pytest.mark.parametrize("model", ["resnet16", "alexnet", "resnet18", "simple_conv"])
def test_a_server_widened_for_all_channels(model):
    state = run("sglr", 1, model=model, mixing_mode="concat_channels")
    server = state.servers[0].model
    assert isinstance(server, ManyHeads) and server.training
    results = [model(state.data[0].x) for model in ALGORITHMS["sglr"].evaluation_models(state)]
    assert [tuple(logits.shape) for logits in results] == [(8, 10)] * 3
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("mode", MIXING_MODES)
def test_every_mode_trains_and_repeats(mode):
    experiment = preset("smoke", "sglr", **{"algorithm.mixing_mode": mode, "algorithm.active_fraction": 0.67})
    one, other = (train(experiment.replace(rounds=2), "cpu", progress=False) for _ in range(2))
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)


# ------------------------------------------------------------------------------------------------------- who and when


@pytest.mark.parametrize(
    ("fraction", "n", "active"),
    [(0, 5, 0), (0.25, 2, 1), (0.25, 4, 1), (0.25, 6, 2), (0.25, 10, 3), (0.75, 6, 5), (0.5, 1, 1), (1, 20, 20)],
)
def test_number_of_active_clients(fraction, n, active):
    """⌊φ·n⌉ with halves rounded up."""
    assert n_active(fraction, n) == active


def test_active_clients_are_drawn_anew_and_from_a_stream_of_their_own():
    experiment = Experiment(num_clients=8).replace(**{"algorithm.name": "sglr", "algorithm.active_fraction": 0.5})
    draws = [tuple(active_clients(experiment, rnd, s)) for rnd in range(3) for s in range(40)]
    assert all(len(set(draw)) == 4 for draw in draws) and len(set(draws)) > 40
    share = torch.tensor(draws).flatten().bincount(minlength=8) / len(draws)
    assert (share - 0.5).abs().max() < 0.2
    fewer = experiment.replace(**{"algorithm.active_fraction": 0.25})
    assert all(set(active_clients(fewer, 0, s)) < set(draws[s]) for s in range(40))
    other = experiment.replace(sampling_seed=1)
    assert [active_clients(other, 0, s) for s in range(9)] != [active_clients(experiment, 0, s) for s in range(9)]


@pytest.mark.parametrize(("phase", "averaged"), [("full", [0, 1, 2, 3]), ("initial", [0, 1]), ("final", [2, 3])])
def test_phases(phase, averaged):
    ledger = Ledger()
    run("sglr", 4, ledger, active_fraction=1.0, average_phase=phase, average_fraction=0.5)
    kinds = ledger.frame().groupby("round").kind.agg(set)
    assert [rnd for rnd in range(4) if "mean_cut_grad" in kinds[rnd]] == averaged
    assert [rnd for rnd in range(4) if "cut_grad" in kinds[rnd]] == sorted({0, 1, 2, 3} - set(averaged))


# ------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("power", [0, 0.5, 1, 1.5, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_split_lr_with_any_optimiser_and_schedule(power, optimizer):
    drop = SchedulerConfig("multistep", milestones=(1,), gamma=0.5)
    both = {f"model.{part}.optimizer.name": optimizer for part in ("client", "server")}
    both |= {f"model.{part}.optimizer.scheduler": drop for part in ("client", "server")}
    state = federation("sglr", lr_power=power, **both, **{"model.client.optimizer.lr": 0.01})
    rates = []
    for rnd in range(2):
        ALGORITHMS["sglr"].run_round(state, rnd, Ledger())
        rates.append((state.clients[0].lr, state.servers[0].lr))
        for part in state.parts:
            part.step_schedule()
    assert rates == [pytest.approx((0.01, 0.01 * 3**power)), pytest.approx((0.005, 0.005 * 3**power))]


def test_the_drop_at_80_percent_and_a_cycle_of_the_server_alone():
    cyclic = SchedulerConfig("cyclic", step_size=2, gamma=0.5)
    experiment = preset("smoke", "sglr", rounds=5, **{"model.server.optimizer.scheduler": cyclic})
    rounds = train(experiment, "cpu", progress=False).rounds
    assert rounds.client_lr.tolist() == pytest.approx([1e-3] * 4 + [1e-4])
    assert rounds.server_lr.tolist() == pytest.approx([0.5e-3, 0.75e-3, 1e-3, 0.75e-3, 0.5e-3])


# ------------------------------------------------------------------------------------------------------------ Table 6


@pytest.mark.parametrize("method", ["FL", "PSL", "SFL", "SGLR"])
def test_ledger_is_table_6(method):
    """Totals of a real run of two rounds; "table6" as printed, "broadcast" as sent, "paper" one by one."""
    algorithm = {"FL": "fed_avg"}.get(method, method.lower())
    ledger = Ledger()
    phi = {"active_fraction": 0.5} if method == "SGLR" else {}
    state = run(algorithm, 2, ledger, sizes=(12,) * 4, **phi)
    client, server = tensor_bytes(state.clients[0].model), tensor_bytes(state.servers[0].model)
    cut = tensor_bytes(state.clients[0].model(state.data[0].x)[0])
    sizes = {"n_clients": 4, "samples": 48, "cut": cut, "whole": client + server, "client": client, **phi}
    assert ledger.bytes("table6") == 2 * table6_bytes(method, **sizes)
    if method == "SGLR":
        assert ledger.bytes("broadcast") == 2 * table6_bytes(method, **sizes, per_iteration=True)
        assert ledger.bytes("broadcast") == 2 * (1.5 * 48 * cut + 48 * cut / 4)
        assert ledger.bytes("paper") == 2 * table6_bytes("PSL", **sizes)
    else:
        assert ledger.bytes("broadcast") == ledger.bytes("paper") == ledger.bytes("table6")


def test_worked_example():
    sizes = {"n_clients": 100, "samples": 50_000, "cut": 0.024, "whole": 200, "client": 67, "active_fraction": 0.5}
    total = {method: table6_bytes(method, **sizes) for method in ("FL", "PSL", "SFL", "SGLR")}
    assert total == pytest.approx({"FL": 40_000, "PSL": 2400, "SFL": 15_800, "SGLR": 1800.024})
    assert 100 * (1 - total["SGLR"] / total["SFL"]) == pytest.approx(88.6, abs=0.05)
    assert 100 * (1 - total["SGLR"] / total["FL"]) == pytest.approx(95.499, abs=0.002)
    seconds = {method: table6_seconds(method, 5.0, 10.0, **sizes) for method in total}
    assert seconds == pytest.approx({"FL": 45, "PSL": 245, "SFL": 20.8, "SGLR": 6.800024})


def test_totals_do_not_depend_on_when_they_are_asked():
    asked, late = Ledger(), Ledger()
    for ledger in (asked, late):
        for rnd in range(3):
            for _ in range(2):
                ledger.multicast(rnd, range(3), mean_cut_grad=torch.zeros(2, 5))
                asked.bytes("wire")
    assert [ledger.bytes("table6") for ledger in (asked, late)] == [3 * 20] * 2
    assert [ledger.bytes("broadcast") for ledger in (asked, late)] == [6 * 40] * 2


# --------------------------------------------------------------------------------------------- models and evaluation


def test_published_sizes():
    split = split_model("resnet16")
    counts = [sum(p.numel() for p in part.parameters()) for part in (split.client, split.server)]
    assert counts == [42_896, 206_346]
    parts = split.client, split.server
    convolutions = [sum(isinstance(layer, torch.nn.Conv2d) for layer in part.modules()) for part in parts]
    assert convolutions == [9 + 1, 6 + 1]  # and a shortcut in each; the server has a linear layer besides
    for channels, size, side in ((3, 32, 8), (1, 28, 7)):
        smashed = split_model("alexnet", channels, 10, size).client(torch.zeros(1, channels, size, size))
        assert smashed.shape == (1, 96, side, side)


def test_accuracy_is_the_mean_over_clients_and_the_round_is_chosen_by_validation():
    experiment = preset("smoke", "sglr", rounds=2)
    history = train(experiment, "cpu", progress=False)
    dataset, validation = prepare(experiment, torch.device("cpu"))
    assert len(validation) == 100 and len(dataset.train) == 600
    models = [split_model("resnet16", 1, 10, 28, 16) for _ in range(3)]
    apart = [evaluate_mean([model], validation, dataset) for model in models]
    together = evaluate_mean(models, validation, dataset)
    assert together == pytest.approx(tuple(sum(values) / 3 for values in zip(*apart, strict=True)))
    row = selected(history)
    assert row.val_accuracy == history.rounds.val_accuracy.max()
    assert history.rounds.test_accuracy[int(row["round"])] == row.test_accuracy
    other = prepare(experiment.replace(partition_seed=1), torch.device("cpu"))[1]
    assert not torch.equal(validation.x, other.x)


def test_a_selection_needs_a_validation_set():
    history = train(preset("smoke", "psl", rounds=1, **{"dataset.val_size": 0}), "cpu", progress=False)
    assert "val_accuracy" not in history.rounds
    with pytest.raises(ValueError, match=r"dataset\.val_size=0"):
        selected(history)


# ------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize(
    "change",
    [
        {"seed0": 30},
        {"n_clients": 2},
        {"samples_per_client": 20},  # a short last batch
        {"lr_power": 1.5},
        {"average_until_fraction": 1.0},
        {"mixing_mode": "concat_batch_pool"},
        {"mixing_mode": "pooling"},
        {"mixing_mode": "concat_channels"},
        {"lr": 0.01},
    ],
    ids=str,
)
def test_other_trace_settings(change):
    spec, _ = read_trace("resnet16-psl")
    spec |= {"epochs": 2, "image_size": 16}
    plain, other = replay(spec), replay(spec | change)
    assert plain != other and len(other) == 2 and len(other[0]["clients"]) == change.get("n_clients", 3)


@pytest.mark.parametrize(("epochs", "drop"), [(1, None), (2, 0), (3, 1), (5, 3), (6, 3)])
def test_the_released_codes_drop(epochs, drop):
    """Before epoch index int(0.8 · epochs) - 1; a run of one epoch never gets there."""
    spec, _ = read_trace("resnet16-psl")
    spec |= {"n_clients": 1, "samples_per_client": 2, "batch_size": 2, "image_size": 8, "epochs": epochs}
    rates = [row["client_lr"] for row in replay(spec)]
    assert rates == pytest.approx([1e-3 if drop is None or epoch < drop else 1e-4 for epoch in range(epochs)])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"algorithm.active_fraction": -0.1}, "algorithm.active_fraction=-0.1: must be a number from 0 to 1"),
        ({"algorithm.active_fraction": 1.01}, "algorithm.active_fraction=1.01: must be a number from 0 to 1"),
        ({"algorithm.active_fraction": float("nan")}, "algorithm.active_fraction=nan"),
        ({"algorithm.lr_power": -0.5}, "algorithm.lr_power=-0.5: must be a number from 0"),
        ({"algorithm.average_fraction": 0.0}, "algorithm.average_fraction=0.0: must be greater than 0"),
        ({"algorithm.average_phase": "last"}, "algorithm.average_phase='last': must be one of full, initial, final"),
        ({"algorithm.mixing_mode": "concat_chanels"}, "did you mean 'concat_channels'"),
        ({"algorithm.loss": "bce"}, "algorithm.loss='bce': must be one of cross_entropy, binary_cross_entropy"),
        ({"algorithm.mixing_mode": "pooling", "algorithm.per_client_loss": True}, "algorithm.per_client_loss=True"),
        ({"algorithm.name": "cse_fsl"}, "model.name='resnet16': must be one of resnet18, resnet50, resnet152"),
        ({"algorithm.name": "fsl_sage", "model.name": "alexnet"}, "model.name='alexnet'"),
        ({"dataset.val_size": -1}, "dataset.val_size=-1"),
        ({"model.server.optimizer.scheduler": SchedulerConfig()}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configuration(changes, says):
    if says is None:
        assert preset("smoke", "sglr", **changes)
        return
    with pytest.raises(ValueError) as error:
        preset("smoke", "sglr", **changes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "fraction", "fraction": 0.0}, "scheduler.fraction=0.0"),
        ({"name": "fraction", "early": -1}, "scheduler.early=-1"),
        ({"name": "cycle"}, "did you mean 'cyclic'"),
        ({"name": "cyclic", "step_size": 0}, "scheduler.step_size=0"),
    ],
)
def test_schedules(wrong, says):
    with pytest.raises(ValueError) as error:
        SchedulerConfig(**wrong)
    assert says in str(error.value)


@pytest.mark.parametrize("size", [698, 700, 10_000])
def test_too_few_images_for_validation(size):
    with pytest.raises(ValueError, match=f"dataset.val_size={size}: must be from 0 to 697"):
        train(preset("smoke", "psl", **{"dataset.val_size": size}), "cpu", progress=False)


@pytest.mark.parametrize("mode", MIXING_MODES[1:])
def test_unequal_batches(mode):
    with pytest.raises(ValueError, match=rf"algorithm.mixing_mode='{mode}': must be 'concat_batch' .*\(4 to 9 samples"):
        federation("sglr", sizes=(8, 9, 4), mixing_mode=mode)


def test_unequal_batches_cannot_be_averaged():
    with pytest.raises(ValueError, match=r"algorithm.active_fraction=1.0: must be less than 0.5 "):
        federation("sglr", sizes=(8, 9, 4), active_fraction=1.0)
    state = run("sglr", sizes=(8, 9, 4), active_fraction=0.34)  # one client's average is its own gradient
    assert_same_bits(state, run("psl", sizes=(8, 9, 4)))


def test_what_does_not_matter_is_forgotten():
    assert settings_of("psl", lr_power=2.0, active_fraction=1) == settings_of("psl")
    assert settings_of("sglr", average_phase="initial") == settings_of("sglr")
    assert settings_of("fsl_sage", loss="binary_cross_entropy") == settings_of("fsl_sage")
    fast = preset("smoke", "sglr", **{"model.server.optimizer.lr": 7.0, "algorithm.lr_power": 1})
    assert fast.hash == preset("smoke", "sglr", **{"algorithm.lr_power": 1.0}).hash


LENGTHS = [(0.6, 2, 2), (0.4, 2, 1), (0.5, 5, 3), (0.55, 100, 55), (0.6, 5, 3)]


@pytest.mark.parametrize(("fraction", "rounds", "long"), LENGTHS)
def test_the_first_and_the_last_phase_are_equally_long(fraction, rounds, long):
    config = {"active_fraction": 1.0, "average_fraction": fraction}
    first, last = (settings_of("sglr", average_phase=phase, **config) for phase in ("initial", "final"))
    on = [1.0] * long + [0.0] * (rounds - long)
    assert [fraction_now(first, rnd, rounds) for rnd in range(rounds)] == on
    assert [fraction_now(last, rnd, rounds) for rnd in range(rounds)] == on[::-1]


class Viewed(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y.view(len(x), -1).view(y.shape)  # not channels last


def test_a_network_that_needs_the_usual_layout_can_be_widened():
    def build(in_channels, num_classes, image_size, width):
        layers = {"conv": nn.Conv2d(in_channels, 8, 3, 2), "viewed": Viewed(8), "pool": nn.AdaptiveAvgPool2d(1)}
        return nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "fc": nn.Linear(4, num_classes)}))

    try:
        plugins.network("viewed", cut="conv")(build)
        state = run("sglr", 1, model="viewed", mixing_mode="concat_channels")
        assert isinstance(state.servers[0].model, ManyHeads) and not state.fast
    finally:
        plugins.forget(plugins.FILES[plugins.PLUGGED["model", "viewed"]].home)
