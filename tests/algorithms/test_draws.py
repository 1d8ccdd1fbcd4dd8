"""Random numbers that layers and algorithms of one's own draw: the same whatever happens around them."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fsl_sage import algorithm, network
from fsl_sage.algorithms.base import Metrics, aggregate, each_client, whole_step
from fsl_sage.algorithms.baselines import FedAvgSettings, init_fed_avg
from fsl_sage.config.experiment import PLUGGED
from fsl_sage.config.presets import preset
from fsl_sage.experiments import plugins
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import client_data, prepare
from fsl_sage.experiments.stored import read_all
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.machines.parties import ask_clients
from fsl_sage.machines.remote import WireRun, rounds_here, rounds_of
from fsl_sage.machines.wire import WireLedger
from tests.support.asking import Clients, small
from tests.support.runs import assert_same, stopped_after

SMALL = {"dataset.max_train": 90, "dataset.max_test": 20, "dataset.val_size": 20, "dataset.distribution": "iid",
         "rounds": 2, "model.width": 4}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for home in {plugins.home_of(tag) for tag in PLUGGED.values()}:
        plugins.forget(home)


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x * float(np.random.uniform(0.5, 1.5)) if self.training else x  # noqa: NPY002


def droppy(name, *layers, p=0.5, cut="1"):
    @network(name, cut=cut)
    def build(channels, classes, size, width):
        lower = nn.Sequential(nn.Conv2d(channels, width, 3), nn.Dropout(p), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(*lower, *layers, nn.Dropout(p), nn.Linear(4 * width, classes))

    return name


def own(algorithm_name, model, **changes):
    aux = {"model.auxiliary.size": "first_layers"} if algorithm_name in ("fsl_sage", "cse_fsl") else {}
    return preset("smoke", algorithm_name, **(SMALL | aux | changes), **{"model.name": model})


def numbers(experiment, **how):
    torch.manual_seed(np.random.SeedSequence().entropy % 2**32)  # where the process's stream stands does not matter
    return train(experiment, "cpu", progress=False, **how)


@pytest.mark.parametrize("name", ["fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl", "psl", "fsl_sage"])
def test_dropout_follows_from_the_seed(name):
    experiment = own(name, droppy("droppy", NumpyNoise()))
    one = numbers(experiment)
    assert_same(one, numbers(experiment))
    assert one.rounds.train_loss[0] != numbers(experiment.replace(sampling_seed=5)).rounds.train_loss[0]


@pytest.mark.parametrize("name", ["fed_avg", "fsl_sage"])
def test_dropout_goes_on_where_a_run_was_stopped_and_with_streamed_clients(name, tmp_path, monkeypatch):
    experiment, path = own(name, droppy("droppy")), tmp_path / "run.safetensors"
    whole = numbers(experiment)
    assert_same(whole, numbers(experiment, in_flight=1))
    stopped_after(1, monkeypatch, experiment, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the run begins again")
        assert_same(whole, numbers(experiment, checkpoint=path))


def test_a_script_with_a_plugin_finds_its_stored_run_again(tmp_path):
    """The script's own frames call the store, which opens files; these are none of the plug-in's."""
    experiment, store = own("fed_avg", droppy("droppy")), RunStore(tmp_path)
    for _ in range(2):
        (history,) = store.get([experiment], "cpu", progress=False, jobs=1)
        assert store.folder(experiment).name == experiment.hash
    assert [run.folder.name for run in read_all(tmp_path)] == [experiment.hash]
    assert_same(history, store.find(experiment))


def losses_on(threads, experiment):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return numbers(experiment).rounds.train_loss.tolist()
    finally:
        torch.set_num_threads(before)


def noisy(name, draw):
    @algorithm(name, init=init_fed_avg)
    def noisy_round(state, rnd, ledger):
        metrics = Metrics()

        def work(i):
            for s, x, y in state.batches(i, rnd):
                metrics.loss(i, s, whole_step(state.clients[i], state.servers[i], x + draw(x), y))

        list(each_client(state, work))
        aggregate(state, rnd, ledger, client_model=state.clients, server_model=state.servers)
        return metrics

    return name


def test_threads_change_nothing_where_layers_draw():
    experiment = own("fed_avg", droppy("droppy"))
    assert losses_on(1, experiment) == losses_on(2, experiment)


def test_an_algorithm_that_draws_in_its_clients_work():
    experiment = own(noisy("noisy", torch.randn_like), "simple_conv")
    one = losses_on(1, experiment)
    assert one == losses_on(2, experiment)
    plain = own(noisy("plain", torch.zeros_like), "simple_conv")
    assert losses_on(1, plain) == losses_on(2, plain) != one


def test_the_users_stream_goes_on_as_if_there_had_been_no_run():
    experiment = own("fed_avg", droppy("droppy"), rounds=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train(experiment, "cpu", progress=False)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name", ["fed_avg", "cse_fsl", "fsl_sage"])
def test_dropout_between_machines(name, tmp_path):
    aux = {"model.auxiliary.size": "first_layers"} if name != "fed_avg" else {}
    experiment = small(name, **aux, **{"model.name": droppy("droppy", cut="3"), "model.width": 4})
    assert_same(numbers(experiment), ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server"))


def test_an_algorithm_that_draws_elsewhere_is_refused_between_machines():
    @algorithm("loose", init=init_fed_avg, settings=FedAvgSettings)
    def loose(state, rnd, ledger):
        torch.rand(1)
        return Metrics()

    experiment, ledger = small("loose", **{"model.name": "simple_conv"}), WireLedger()
    data = client_data(experiment, prepare(experiment, torch.device("cpu"))[0])
    state = init_fed_avg(experiment, data, Ledger())
    with pytest.raises(ValueError, match=r"'loose' draws from a global random stream.*draw from core\.generator"):
        next(rounds_here(WireRun(state, ledger, rounds_of(experiment))))
