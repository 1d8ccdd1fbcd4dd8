"""Alignments that would fail in a later round are refused before the first; a run that is watched is the run."""

import pytest
import torch

from fsl_sage.algorithms import sage
from fsl_sage.algorithms.sage import aligned_sizes, alignment_memory, init
from fsl_sage.algorithms.state import FixedData, init_parts
from fsl_sage.config.presets import preset
from fsl_sage.core import held_memory
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train_state
from fsl_sage.ledger import Ledger
from fsl_sage.networks.auxiliary import true_cut_grad
from fsl_sage.papers.watch import watched_rounds
from tests.support.refused import refused

NORMED = {"model.name": "resnet18", "model.width": 2, "rounds": 4}


def samples(*sizes):
    return [FixedData(torch.randn(n, 1, 28, 28), torch.arange(n) % 10, 32) for n in sizes]


@pytest.mark.parametrize("participation", [1.0, 0.7])
def test_buffers_grow_as_they_were_foretold(participation):
    changes = {"rounds": 5, "participation": participation, "algorithm.align_epochs": 1, "model.width": 1}
    changes |= {"algorithm.max_dataset_size": 300, "algorithm.server_update_interval": 2, "model.client.epoch": 2}
    history, state = train_state(preset("smoke", **changes), "cpu", progress=False)
    for i, data in enumerate(state.data):
        seen = history.alignments[history.alignments.client == i]
        seen = list(zip(seen["round"], seen.buffer_size, strict=True))
        foretold = list(aligned_sizes(state.experiment, len(data), i))
        assert foretold and seen[: len(foretold)] == foretold
        assert all(size == foretold[-1][1] for _, size in seen[len(foretold) :])


def test_an_alignment_that_leaves_one_sample_is_refused_before_the_first_round():
    changes = {"algorithm.align_batch_size": 159, "model.auxiliary.size": "server_copy"}
    experiment, data = preset("smoke", **NORMED | changes), samples(200, 200, 200)
    says = r"size=159: must be such that no batch .* \(client 0's buffer has 160 in round 2\).*; 1000 would do"
    refused(says, init, experiment, data, Ledger())
    init(experiment.replace(**{"algorithm.align_batch_size": 1000}), data, Ledger())
    set_up(experiment.replace(**{"model.name": "simple_conv", "model.auxiliary.size": "default"}))  # no BatchNorm


def test_a_buffer_of_one_sample_is_refused_before_the_first_round():
    experiment = preset("smoke", **NORMED | {"algorithm.max_dataset_size": 1})
    refused("algorithm.max_dataset_size=1: must be .* BatchNorm needs 2", set_up, experiment)


def test_the_advice_for_batches_of_one_sample_helps():
    experiment = preset("smoke", "fed_avg", **NORMED | {"num_clients": 2})
    for batch_size, sizes, advised in ((32, (33, 34), 34), (1, (4, 6), 2)):
        wrong = experiment.replace(**{"model.client.batch_size": batch_size})
        refused(f"batch_size={batch_size}: must be .*; {advised} would do", init_parts, wrong, samples(*sizes))
        init_parts(wrong.replace(**{"model.client.batch_size": advised}), samples(*sizes))
    says = r"num_clients=2: .*2 samples or more \(client 1 has 1\).*fewer clients"
    refused(says, init_parts, experiment.replace(**{"model.client.batch_size": 4}), samples(5, 1))


def test_joint_alignment_needs_all_clients_on_the_device():
    experiment = preset("smoke", rounds=1, **{"algorithm.align_jointly": True, "model.width": 1})
    refused("in_flight=1: must be all 3 clients", lambda: train_state(experiment, "cpu", progress=False, in_flight=1))


@pytest.mark.parametrize("changes", [
    {"comm_threshold_mb": 0.05, "rounds": 4}, {"participation": 0.4, "rounds": 2},
    {"algorithm.warm_start": True, "rounds": 1},
])  # fmt: skip
def test_a_run_that_is_watched_is_the_run(changes):
    experiment = preset("smoke", **{"model.width": 1, "algorithm.align_epochs": 1} | changes)
    history, trained = train_state(experiment, "cpu", progress=False)
    *_, (rnd, state) = watched_rounds(experiment, "cpu")
    assert rnd == history.rounds["round"].iloc[-1]
    for one, two in zip(trained.parts, state.parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_an_alignment_that_does_not_fit_into_memory_is_refused_before_the_first_round(monkeypatch):
    experiment = preset("smoke", **{"model.client.batch_size": 100, "algorithm.max_dataset_size": 1000, "rounds": 12})
    data = samples(700, 100)
    needed = alignment_memory(init(experiment, data, Ledger()), 1000)
    assert needed > 1000 * 2 * 28 * 28  # at least two bytes of each pixel
    monkeypatch.setattr(sage, "memory_of", lambda device: needed // 2)
    says = r"max_dataset_size=1000: must be such that an alignment fits .*client .'s buffer of 1000 samples needs"
    with pytest.raises(ValueError, match=says) as error:
        init(experiment, data, Ledger())
    enough = int(str(error.value).split()[-3])
    state = init(experiment.replace(**{"algorithm.max_dataset_size": enough}), data, Ledger())
    assert 100 < enough < 1000 and alignment_memory(state, enough) < needed // 2


def test_what_an_alignment_holds_is_what_autograd_saves():
    experiment, data = preset("smoke"), samples(40, 40)
    state = init(experiment, data, Ledger())
    x, y = next(data[0].batches(0, 0))
    smashed = state.clients[0].model(x).detach()
    with held_memory(state.servers[0].model) as held:
        true_cut_grad(state.servers[0].model, smashed, y)
    assert 0.5 < alignment_memory(state, 32) / sum(held.values()) < 4  # small maps hold a copy of their kernel, too
