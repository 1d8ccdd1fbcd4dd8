"""Rounds in the order of the simulated clock: events by hand, what a round learns, and what a checkpoint must hold."""

from copy import deepcopy

import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.asynchronous import (
    AVERAGE,
    MODEL,
    SERVER_STEP,
    START,
    UPLOAD,
    Event,
    Pace,
    generated,
    no_moments,
    pool_moments,
    schedule,
)
from fsl_sage.algorithms.record import begin
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import record_of
from fsl_sage.costs.clock import attendances, simulated_seconds
from fsl_sage.experiments.setup import events_of, register_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from fsl_sage.machines.remote import check_remote
from tests.support.runs import assert_same, stopped_after, tiny

NAMES = "async_splitfed", "gas"
UNEQUAL = {"clock.spread": 1.0, "algorithm.buffer_size": 2, "rounds": 5}


def test_events_of_three_clients_are_those_on_paper():
    """Client 0 is fast, client 1 has one batch, client 2 is slow; a model takes a second up and half of one down."""
    experiment = preset("smoke", "async_splitfed", rounds=3, **{"algorithm.buffer_size": 2})
    ways = {"up": 1.0, "down": 0.5}
    paces = [Pace([1.0, 1.0], [0.5, 0.5], **ways), Pace([2.0], [1.0], **ways), Pace([4.0, 4.0], [1.0, 1.0], **ways)]
    assert list(schedule(experiment, paces)) == [
        [
            Event(1, 0, UPLOAD, 0, 0, 1),
            Event(2, 1, UPLOAD, 0, 0, 1),
            Event(2, -1, SERVER_STEP),
            Event(2.5, 0, UPLOAD, 1, 0, 2),
            Event(4, 0, MODEL),
            Event(4, 1, MODEL),  # uploaded at 2, answered until 3, a second on its way
            Event(4, -1, AVERAGE),
            Event(4, 0, START),
            Event(4, 1, START),
        ],
        [
            Event(4, 2, UPLOAD, 0, 1, 1),  # began before all uploads
            Event(4, -1, SERVER_STEP),
            Event(5.5, 0, UPLOAD, 0, 0, 4),  # three uploads before its start
            Event(6.5, 1, UPLOAD, 0, 0, 4),
            Event(6.5, -1, SERVER_STEP),
            Event(7, 0, UPLOAD, 1, 0, 5),
            Event(8.5, 0, MODEL),
            Event(8.5, 1, MODEL),
            Event(8.5, -1, AVERAGE),
            Event(8.5, 0, START),
            Event(8.5, 1, START),
        ],
        [
            Event(9, 2, UPLOAD, 1, 2, 2),
            Event(9, -1, SERVER_STEP),
            Event(10, 0, UPLOAD, 0, 0, 8),
            Event(11, 1, UPLOAD, 0, 0, 8),
            Event(11, -1, SERVER_STEP),
            Event(11, 2, MODEL, 0, 2),
            Event(11.5, 0, UPLOAD, 1, 0, 9),
            Event(13, 0, MODEL),
            Event(13, -1, AVERAGE),
            Event(13, 0, START),
            Event(13, 2, START),
        ],
    ]


def test_one_seed_gives_one_event_list():
    fields = {"clock.spread": 1.0, "num_clients": 6, "participation": 0.5, "algorithm.buffer_size": 2, "rounds": 6}
    one, same, other = (events_of(preset("smoke", "gas", seed=seed, **fields)) for seed in (200, 200, 201))
    pd.testing.assert_frame_equal(one, same)
    assert not one.equals(other)  # which clients start is drawn
    working = 0
    for event in one.itertuples():
        working -= event.what == MODEL
        working += event.what == START
        assert working <= 0  # three at first, and as many start as have delivered


def synchronous(experiment):
    """What K = all and equal speeds must give: all step, the server steps on their batches, all are averaged."""
    state = begin(experiment, [deepcopy(own) for own in set_up(experiment).data], Ledger())
    (server,) = state.servers
    for rnd in range(experiment.rounds):
        state.draws.begin(rnd)
        for batches in zip(*(list(state.batches(i, rnd)) for i in range(len(state.data))), strict=True):
            arrived = []
            for client, (_, x, y) in zip(state.clients, batches, strict=True):
                smashed = client(x)
                leaf = smashed.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(state.criterion(server(leaf), y), leaf)
                client.step(smashed, gradient)
                arrived.append((smashed.detach(), y))
            z, y = (torch.cat(parts) for parts in zip(*arrived, strict=True))
            server.step(state.criterion(server(z), y))
        own = [client.exchanged() for client in state.clients]
        mean = {name: sum(each[name] for each in own) / len(own) for name in own[0]}
        for client in state.clients:
            client.load({name: tensor.to(own[0][name].dtype) for name, tensor in mean.items()})
        for part in state.parts:
            part.step_schedule()
    return state


def test_with_all_and_equal_speeds_it_is_the_synchronous_schedule():
    experiment = tiny("async_splitfed", **{"dataset.val_size": 0, "rounds": 2})
    by_hand, (history, state) = synchronous(experiment), train_state(experiment, "cpu", progress=False)
    for one, other in (
        *zip(by_hand.clients, state.clients, strict=True),
        *zip(by_hand.servers, state.servers, strict=True),
    ):
        for name, tensor in one.exchanged().items():
            torch.testing.assert_close(other.exchanged()[name], tensor, rtol=1e-5, atol=1e-6)
    splitfed = train(tiny("sl_single_server", **{"dataset.val_size": 0, "rounds": 2}), "cpu", progress=False)
    pd.testing.assert_frame_equal(history.ledger, splitfed.ledger)  # every byte
    events = events_of(experiment)
    assert (
        events.groupby("round").second.max().diff().dropna().round(9).unique().size == 1 and not events.staleness.any()
    )


def test_without_draws_and_shift_gas_is_buffered_asynchronous_splitfed():
    plain = train(tiny("async_splitfed", **UNEQUAL), "cpu", progress=False)
    switched_off = {"algorithm.generate_every": 0, "algorithm.shift_logits": False}
    off = train(tiny("gas", **UNEQUAL, **switched_off), "cpu", progress=False)
    assert_same(off, plain)
    for changes in ({"algorithm.generate_every": 0}, {"algorithm.shift_logits": False}):
        assert not train(tiny("gas", **UNEQUAL, **changes), "cpu", progress=False).rounds.equals(plain.rounds)


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    """After two rounds uploads wait in the buffer, and a client is in the middle of its local steps."""
    experiment = tiny(name, **UNEQUAL, **{"dataset.distribution": "noniid_dirichlet", "model.client.batch_size": 16})
    events = events_of(experiment)
    early = events[events["round"] < 2]
    assert (early.what == UPLOAD).sum() % 2 == 1 and events.staleness.max() > 0
    path = tmp_path / "run.ckpt"
    stopped_after(2, monkeypatch, experiment, path)
    assert path.exists()
    resumed = train(experiment, "cpu", progress=False, checkpoint=path)
    whole = train(experiment, "cpu", progress=False)
    assert_same(resumed, whole)
    assert_same(train(experiment, "cpu", progress=False, in_flight=1), whole)  # clients at rest between their steps


def test_the_price_of_a_run_is_what_it_sends():
    experiment = tiny("async_splitfed", **UNEQUAL)
    state = set_up(experiment)
    register = register_of(state, True)
    history = train(experiment, "cpu", progress=False)
    again = simulated_seconds(history, register.samples, register.costs, experiment.clock)  # refuses other bytes
    assert again.tolist() == pytest.approx(history.rounds.clock_seconds.tolist())
    last = max(own.events[-1].second for own in attendances(experiment, register.samples, register.costs))
    assert history.rounds.clock_seconds.iloc[-1] == pytest.approx(last)
    with pytest.raises(ValueError, match="the events would have had another order"):
        faster = experiment.replace(**{"clock.up": 1e9}).clock
        simulated_seconds(history, register.samples, register.costs, faster)


def test_stale_models_weigh_less():
    """Of the round in which a stale model arrives, the average by hand."""
    experiment = tiny("async_splitfed", **UNEQUAL, **{"algorithm.staleness_power": 0.5})
    events = events_of(experiment)
    stale = events[(events.what == MODEL) & (events.staleness > 0)].iloc[0]
    state, record = set_up(experiment), record_of(experiment)
    register = register_of(state, True)
    for own in attendances(experiment, register.samples, register.costs):
        if own.round > stale["round"]:
            break
        # the average comes before the new starts, which overwrite models: stop there, and look
        k = next(k for k, event in enumerate(own.events) if event.what == AVERAGE)
        state.draws.begin(own.round)
        state.events = own.events[: k + 1]
        record.run_round(state, own.round, Ledger())
        arrived = [event for event in state.events if event.what == MODEL]
        weights = [(1 + event.staleness) ** -0.5 for event in arrived]
        for name, tensor in state.newest.items():
            models = [state.clients[event.client].exchanged()[name] for event in arrived]
            mean = sum(w * model for w, model in zip(weights, models, strict=True)) / sum(weights)
            torch.testing.assert_close(tensor, mean.to(tensor.dtype), rtol=1e-5, atol=1e-6)
        for event in own.events[k + 1 :]:
            state.clients[event.client].load(state.newest)
    assert len({*weights}) == 2


@pytest.mark.parametrize("size", [3, 600])  # all covariances; variances alone
def test_pooled_moments_are_those_of_all_weighted_samples(size):
    draw = torch.Generator().manual_seed(size)
    moments, seen = no_moments(2, size), {0: [], 1: []}
    for weight in (1, 3, 4):
        z, y = torch.randn(7, size, generator=draw) * weight + weight, torch.tensor([0, 1, 1, 0, 1, 1, 1])
        pool_moments(moments, z, y, weight)
        for c in seen:
            seen[c] += [z[y == c].double()] * weight
    for c, parts in seen.items():
        together = torch.cat(parts)
        torch.testing.assert_close(moments["mean"][c], together.mean(0))
        whole = together.T.cov(correction=0)
        torch.testing.assert_close(moments["spread"][c], whole if size == 3 else whole.diagonal())
        assert moments["weight"][c] == len(together)
    drawn = generated(moments, 1, 4000, draw).double()
    assert ((drawn.mean(0) - moments["mean"][1]).abs() < 6 * drawn.std(0) / 4000**0.5).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"algorithm.buffer_size": 4}, "algorithm.buffer_size=4: must be at most 3"),
        ({"clock.deadline": 1.0}, "clock.deadline=1.0: must be none"),
        ({"model.head_cut": "layer4"}, "head_cut"),
        ({"model.cuts": ["layer1", "layer2", "layer2"]}, "cuts"),
    ],
)
def test_what_cannot_be_is_refused_before_round_0(changes, words):
    with pytest.raises(ValueError, match=words):
        train(tiny("async_splitfed", **changes), "cpu", progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_machines_have_an_order_of_their_own(name):
    with pytest.raises(ValueError, match=r"algorithm\.name"):
        check_remote(tiny(name))
    with pytest.raises(ValueError, match=r"state\.events"):
        record_of(tiny(name)).run_round(set_up(tiny(name)), 0, Ledger())
