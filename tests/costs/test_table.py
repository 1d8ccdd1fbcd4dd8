"""What a record says of a round's cost is what a real round sends and computes."""

import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS, LABELS, cost_words
from fsl_sage.algorithms.participation import take_part
from fsl_sage.algorithms.state import FixedData
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import algorithms
from fsl_sage.costs import table
from fsl_sage.costs.clock import attendances, order_of
from fsl_sage.costs.table import CountFlops, costs_of
from fsl_sage.ledger import Ledger

PRICED = [name for name, record in ALGORITHMS.items() if record.cost and not record.alone]
OWN = {"algorithm.server_update_interval": 2, "algorithm.align_interval": 2, "algorithm.align_epochs": 2}
NETWORK = {"model.name": "simple_conv", "model.width": 4, "model.client.batch_size": 4, "model.client.epoch": 2}


def federation(name, n, sizes, **changes):
    """A run of `name` whose clients have so many samples; its state, its ledger, its record."""
    experiment = preset("smoke", name, num_clients=n, rounds=4, **NETWORK | OWN | changes)
    data = [FixedData(torch.randn(size, 1, 28, 28), torch.arange(size) % 10, 4) for size in sizes]
    ledger = Ledger(phase="start")
    state = ALGORITHMS[name].init(experiment, data, ledger)
    ledger.phase = "round"
    return experiment, state, ledger


def rounds_of(experiment, state, ledger, sizes):
    """Each round's attendance, the bytes that it has sent, and the FLOPs that it has computed."""
    for attendance in attendances(experiment, sizes, costs_of(state)):
        before, run_round = ledger.bytes("paper"), ALGORITHMS[experiment.algorithm.name].round_at(attendance.round)
        take_part(state, attendance.clients, attendance.round, ledger)
        state.events = attendance.events
        with CountFlops() as counter:
            run_round(state, attendance.round, ledger)
        yield attendance, ledger.bytes("paper") - before, counter.flops


@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (2, 0.5), (10, 0.5)])
@pytest.mark.parametrize("name", PRICED)
def test_a_record_prices_the_bytes_of_a_real_round(name, n, share):
    """With short last batches, and clients that come back after an absence."""
    sizes = [(7, 6, 10)[i % 3] for i in range(n)]
    run = federation(name, n, sizes, participation=share)
    for attendance, sent, _ in rounds_of(*run, sizes):
        assert sum(work.up + work.down for work in attendance.works) == sent, attendance.round


def test_a_warm_start_is_priced_as_the_algorithm_that_it_is():
    run = federation("fsl_sage", 2, [7, 6], **{"algorithm.warm_start": True})
    rounds = [(a.round, sum(w.up + w.down for w in a.works), sent) for a, sent, _ in rounds_of(*run, [7, 6])]
    assert [rnd for rnd, _, _ in rounds] == [-1, 0, 1, 2, 3] and all(priced == sent for _, priced, sent in rounds)


@pytest.mark.parametrize("name", PRICED)
def test_a_record_prices_the_flops_of_a_real_round(name):
    """In a round without alignment, whose errors and cosines are looked at besides."""
    run = federation(name, 2, [8, 8], **{"algorithm.generate_every": 0} if name == "gas" else {})
    made = {a.round: (sum(w.flops + w.server_flops for w in a.works), flops) for a, _, flops in rounds_of(*run, [8, 8])}
    assert made[1][0] == pytest.approx(made[1][1], rel=1e-9)


def test_every_algorithm_has_words_for_its_cost():
    for name, record in algorithms().items():
        words = cost_words(record)
        assert set(words) == {"client", "server", "up", "down"} and (words["client"] or record.cost is None), name
    assert LABELS["fsl_sage"] == "FSL-SAGE"
    assert order_of(preset("smoke", "psl"), 0) == "in step"


@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_the_shapes_of_batch_norm_are_those_that_pytorch_finds(shape, mask):
    x, (weight, bias) = torch.empty(shape, device="meta"), torch.empty(2, 3, device="meta")
    aten = torch.ops.aten
    forward, backward = aten.native_batch_norm.default, aten.native_batch_norm_backward.default
    how = x, weight, bias, None, None, True, 0.1, 1e-5
    out, mean, scale = forward(*how)
    back = torch.empty_like(out), x, weight, None, None, mean, scale, True, 1e-5, mask
    ours, theirs = table.LIGHT[backward](*back), backward(*back)
    assert tuple(gradient is not None for gradient in ours) == mask
    pairs = [*zip(table.LIGHT[forward](*how), (out, mean, scale), strict=True)]
    pairs += [both for both in zip(ours, theirs, strict=True) if both[0] is not None]
    for own, other in pairs:
        assert (own.shape, own.dtype, own.device) == (other.shape, other.dtype, other.device)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_counts_are_those_without_a_short_way_through_batch_norm(norm, monkeypatch):
    """Also of an alignment, which passes through the auxiliary model's BatchNorm twice."""
    changes = {"model.name": "resnet18", "model.width": 4, "model.norm": norm}
    _, state, _ = federation("fsl_sage", 1, [4], **changes)
    short = costs_of(state)
    monkeypatch.setattr(table, "LIGHT", {})
    assert costs_of(state) == short and short.alignment > short.estimate > 0
