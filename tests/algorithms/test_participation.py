"""Clients that are absent, differ in size and speed, or would be too late: what is kept, sent, averaged and counted."""

import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import Metrics
from fsl_sage.algorithms.fleet import part_tensors
from fsl_sage.algorithms.participation import asked_clients, take_part
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.commands.schema import help_text
from fsl_sage.commands.train import comparison
from fsl_sage.commands.words import jobs_of
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.parts import ClockConfig
from fsl_sage.config.presets import PRESETS, preset
from fsl_sage.core import tensor_bytes, weighted_average
from fsl_sage.costs.clock import Speed, attendances, attended_seconds, client_latency, simulated_seconds, speeds
from fsl_sage.costs.table import Costs, costs_of
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import register_of, set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.ledger import Ledger
from tests.support.runs import stopped_after

ASKED = {name for name, record in ALGORITHMS.items() if record.schedule is None}  # the others' events say who is there
FEDERATED = sorted(ASKED - {"centralised"})
SIZES = (6, 9, 4, 12)


def federation(algorithm: str, sizes=SIZES, **changes) -> State:
    """Clients with random images, set up for `algorithm`."""
    gen = torch.Generator().manual_seed(0)
    data = [FixedData(torch.randn(n, 3, 8, 8, generator=gen), torch.arange(n) % 10, batch_size=4) for n in sizes]
    small = {"model.name": "simple_conv", "model.width": 4, "model.client.batch_size": 4, "rounds": 6}
    small |= {"algorithm.name": algorithm, "algorithm.align_interval": 2, "algorithm.align_epochs": 2}
    small |= {"model.client.optimizer.name": "sgd"} if algorithm == "scaffold" else {}
    experiment = Experiment(num_clients=len(sizes)).replace(**small | {"algorithm.server_update_interval": 2} | changes)
    return ALGORITHMS[algorithm].init(experiment, data, Ledger())


def attend(state: State, clients: list[int], rnd: int, ledger: Ledger) -> Metrics:
    take_part(state, clients, rnd, ledger)
    return ALGORITHMS[state.experiment.algorithm.name].run_round(state, rnd, ledger)


def tiny(algorithm: str, **changes) -> Experiment:
    own = {"algorithm.align_interval": 2, "algorithm.align_epochs": 2} if algorithm == "fsl_sage" else {}
    small = {"dataset.max_train": 150, "dataset.val_size": 30, "dataset.max_test": 20, "num_clients": 4}
    small |= {"dataset.distribution": "iid", "model.client.batch_size": 10}
    return preset("smoke", algorithm, **(small | own | changes))


def assert_same(one, two, *columns):
    """Equal histories, but for these columns of the first."""
    pd.testing.assert_frame_equal(one.rounds.drop(columns=list(columns)), two.rounds, check_exact=True)
    for table in ("alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(two, table), check_exact=True)


# ------------------------------------------------------------------------------------------- experiments and draws


def test_experiments_from_before_keep_their_addresses():
    assert Experiment().hash == "d2e77978c131fb96" and preset("paper").hash == "0a4cb5e068e3561e"
    assert preset("quick", "fed_avg", participation=1.0, participation_seed=7).hash == "0f9e3741a6aa8414"
    every = [preset(name, algorithm).to_dict() for name in PRESETS for algorithm in ALGORITHMS]
    assert not any({"participation", "participation_seed", "clock", "plugins"} & set(tree) for tree in every)
    assert not any("size_spread" in tree["dataset"] for tree in every)


def test_a_draw_follows_from_its_seed_and_the_round_alone():
    half = Experiment(num_clients=10, participation=0.5)
    draws = [asked_clients(half, rnd) for rnd in range(50)]
    assert draws == [asked_clients(half.replace(rounds=3, init_seed=1, sampling_seed=2), rnd) for rnd in range(50)]
    assert all(draw == sorted(set(draw)) and len(draw) == 5 for draw in draws)
    assert {i for draw in draws for i in draw} == set(range(10)) and len(set(map(tuple, draws))) > 30
    assert draws != [asked_clients(half.replace(participation_seed=1), rnd) for rnd in range(50)]
    assert len(asked_clients(half.replace(participation=1e-9), 0)) == 1
    assert asked_clients(half, -1) == list(range(10))  # everyone is asked for a warm start


# --------------------------------------------------------------------------------------------------------- a round


@pytest.mark.parametrize("algorithm", FEDERATED)
def test_an_absent_client_keeps_what_is_its_own_and_sends_nothing(algorithm):
    sizes = (8, 8, 8) if algorithm == "sglr" else (6, 9, 4)
    state, ledger = federation(algorithm, sizes), Ledger()
    attend(state, [0, 1, 2], 0, ledger)
    own = {"client": state.clients[1], "aux": state.auxes[1]} if state.auxes else {"client": state.clients[1]}
    before = {f"{kind}.{n}": t.clone() for kind, part in own.items() for n, t in part_tensors(part).items()}
    buffers = [buffer.labels.clone() for buffer in getattr(state, "buffers", ())]
    ledger.transfers.clear()
    metrics = attend(state, [0, 2], 2, ledger)
    assert {transfer.client for transfer in ledger.transfers} == {0, 2}
    assert {loss.client for loss in metrics.losses} <= {-1, 0, 2}
    after = {f"{kind}.{n}": t for kind, part in own.items() for n, t in part_tensors(part).items()}
    averaged = [f"{'aux' if kind == 'aux_model' else 'client'}.model" for kind in state.averaged]
    kept = [name for name in before if not name.startswith(tuple(averaged))]
    assert kept or not any(part.optimizer.state for part in own.values())  # plain SGD keeps nothing
    assert all(torch.equal(before[name], after[name]) for name in kept)
    if buffers:
        assert torch.equal(buffers[1], state.buffers[1].labels) and len(state.buffers[0]) > len(buffers[0])
    last = ALGORITHMS[algorithm].evaluation_models(state)
    assert all(tensor.isfinite().all() for model in last for tensor in model.state_dict().values())


def test_who_comes_back_begins_with_the_newest_average(monkeypatch):
    """FedAvg: weights are n_i over the participants' samples; the download is in the account of the round."""
    state, ledger, begun, sent = federation("fed_avg", (6, 9, 3)), Ledger(), {}, {}
    step, aggregate = (ALGORITHMS["fed_avg"].run_round.__globals__[name] for name in ("whole_step", "aggregate"))

    def copy(i: int) -> dict:
        return {name: tensor.clone() for name, tensor in state.clients[i].model.state_dict().items()}

    def note_first_step(client, *args):
        begun.setdefault(state.clients.index(client), copy(state.clients.index(client)))
        return step(client, *args)

    def note_upload(*args, **groups):
        sent.update({i: copy(i) for i in state.present})
        aggregate(*args, **groups)

    monkeypatch.setattr("fsl_sage.algorithms.baselines.whole_step", note_first_step)
    monkeypatch.setattr("fsl_sage.algorithms.baselines.aggregate", note_upload)
    attend(state, [1, 2], 0, ledger)
    mean = weighted_average([sent[1], sent[2]], [0.75, 0.25])
    attend(state, [0, 2], 1, ledger)
    assert all(torch.equal(begun[0][name], tensor) for name, tensor in mean.items())
    assert not any(torch.equal(begun[1][name], tensor) for name, tensor in mean.items())
    models = sum(tensor_bytes(parts[0].model) for parts in (state.clients, state.servers))
    frame = ledger.frame().query("kind != 'framing' and direction == 'down'")
    down = frame.groupby(["round", "client"]).bytes.sum().to_dict()
    assert down == {(0, 1): models, (0, 2): models, (1, 0): 2 * models, (1, 2): models}


def test_ssl_hands_on_from_the_last_who_was_there():
    state, ledger = federation("ssl", (6, 9, 4)), Ledger()
    attend(state, [0, 1], 0, ledger)
    left = {name: t.clone() for name, t in state.clients[1].model.state_dict().items()}
    state.clients[2].optimizer.param_groups[0]["lr"] = 0.0  # it only takes the model over
    attend(state, [2], 1, ledger)
    assert all(torch.equal(left[name], t) for name, t in state.clients[2].model.state_dict().items())
    (model,) = ALGORITHMS["ssl"].evaluation_models(state)
    assert model.client is state.clients[2].model


# ----------------------------------------------------------------------------------------- bytes, as planned and sent


@pytest.mark.parametrize("jointly", [False, True])
def test_the_bytes_of_a_round_by_hand(jointly):
    """FSL-SAGE, q = 2, aligned in rounds 0 and 2; client 1 (9 samples: batches of 4, 4, 1) is absent from round 1."""
    state, ledger = federation("fsl_sage", (8, 9), **{"algorithm.align_jointly": jointly}), Ledger()
    client, aux = (tensor_bytes(parts[0].model) for parts in (state.clients, state.auxes))
    smashed = tensor_bytes(state.clients[0].model(state.data[0].x)) // 8
    sent = []
    for rnd, clients in enumerate([[0, 1], [0], [0, 1]]):
        before = ledger.bytes("paper")
        attend(state, clients, rnd, ledger)
        sent.append(ledger.bytes("paper") - before)
    both = 2 * 2 * client + 2 * aux + (4 + 4 + 1) * smashed
    assert sent == [both, 2 * client + 4 * smashed, both + client]


@pytest.mark.parametrize("algorithm", FEDERATED)
def test_what_is_sent_is_what_was_planned(algorithm):
    """Each client's bytes in each round, with absences, returns and a straggler, as the clock predicts them."""
    sizes = (8, 8, 8, 8) if algorithm == "sglr" else SIZES
    more = {"algorithm.active_fraction": 0.5} if algorithm == "sglr" else {}
    clock = ClockConfig(spread=1.0, seed=2)
    state, ledger = federation(algorithm, sizes, participation=0.6, clock=clock, **more), Ledger()
    costs, of = costs_of(state), speeds(clock, 4)
    everyone = next(attendances(state.experiment.replace(participation=1), sizes, costs)).works
    limit = sorted(client_latency(work, of[work.client], clock.server_flops) for work in everyone)[2]
    experiment = state.experiment = state.experiment.replace(**{"clock.deadline": 1.01 * limit})
    planned, absent = {}, 0
    for attendance in attendances(experiment, sizes, costs):
        metrics = attend(state, attendance.clients, attendance.round, ledger)
        absent += 4 - len(attendance.clients)
        for work in attendance.works:
            for direction, n in (("up", work.up), ("down", work.down)):
                planned[attendance.round, work.client, direction] = n
        for row in metrics.alignments:
            (work,) = (work for work in attendance.works if work.client == row["client"])
            assert work.alignment_flops == row["buffer_size"] * (costs.target + 2 * costs.alignment)
    frame = ledger.frame().query("kind not in ('labels', 'framing')")
    sent = frame.groupby(["round", "client", "direction"]).bytes.sum().to_dict()
    assert sent == {key: n for key, n in planned.items() if n} and absent > 6 * 2


# ------------------------------------------------------------------------------------------------------- whole runs


PARTIAL = {"participation": 0.5, "dataset.size_spread": 0.5, "rounds": 4}


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage", "sl_multi_server", "ssl", "psl"])
def test_a_stopped_run_goes_on_with_the_same_clients(algorithm, tmp_path, monkeypatch):
    experiment = tiny(algorithm, **PARTIAL, clock=ClockConfig(spread=1.0))
    whole, path = train(experiment, "cpu", progress=False), tmp_path / "run.safetensors"
    for _ in range(2):
        stopped_after(1, monkeypatch, experiment, path)
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=path))
    assert set(whole.rounds.participants) == {2} and whole.rounds.clock_seconds.is_monotonic_increasing


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage"])
def test_streaming_the_clients_changes_nothing(algorithm):
    experiment = tiny(algorithm, **PARTIAL)
    assert_same(*(train(experiment, "cpu", progress=False, in_flight=n) for n in (1, None)))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, None), (None, 2), (3, 2)])
@pytest.mark.parametrize(
    ("algorithm", "schedule"), [("fed_avg", "warmup_linear"), ("fed_avg", "cosine"), ("fsl_sage", "fraction")]
)
def test_a_run_goes_on_with_some_clients_at_rest(algorithm, schedule, before, after, tmp_path, monkeypatch):
    """Adam's moments, counters and rates of each client, however many are on the device before and after the stop."""
    rates = {"name": schedule, "warmup_steps": 5, "fraction": 0.5}
    asked = 1.0 if schedule == "cosine" else 0.5
    changes = PARTIAL | {"participation": asked, "model.client.optimizer.scheduler": rates}
    experiment, path = tiny(algorithm, **changes), tmp_path / "run.safetensors"
    stopped_after(2, monkeypatch, experiment, path, in_flight=before)
    histories, states = zip(
        train_state(experiment, "cpu", progress=False),
        train_state(experiment, "cpu", progress=False, in_flight=after, checkpoint=path),
        strict=True,
    )
    assert_same(*histories)
    for group in ("clients", "servers", "auxes"):
        for one, other in zip(*(getattr(state, group) for state in states), strict=True):
            tensors = part_tensors(other)
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in part_tensors(one).items())


@pytest.mark.filterwarnings("error")
def test_nothing_is_amiss_where_the_rate_falls_before_a_clients_first_step():
    falls = {"model.client.optimizer.scheduler.name": "step", "model.client.optimizer.scheduler.step_size": 1}
    state = train_state(tiny("psl", participation=0.5, rounds=3, seed=200, **falls), "cpu", progress=False)[1]
    assert len({part.lr for part in state.clients}) == 1


def test_a_deadline_that_all_can_keep_changes_nothing():
    experiment = tiny("fsl_sage", **{"dataset.distribution": "noniid_dirichlet", "dataset.size_spread": 0.5})
    timed = train(experiment.replace(**{"clock.deadline": 1e9}), "cpu", progress=False)
    assert_same(timed, train(experiment, "cpu", progress=False), "participants", "clock_seconds")
    assert set(timed.rounds.participants) == {4}
    samples = [len(local) for local in set_up(experiment).data]
    assert len(set(samples)) > 1 and sum(samples) <= 120


def test_a_stored_run_is_priced_as_it_was_and_by_other_clocks():
    """With alignments that end early, and a warm start."""
    changes = {"algorithm.align_tolerance": 0.9, "algorithm.align_epochs": 30, "algorithm.warm_start": True}
    changes |= {"algorithm.server_update_interval": 1}  # so that every sample's upload counts
    experiment = tiny("fsl_sage", **PARTIAL, **changes, clock=ClockConfig(spread=1.0, deadline=2.0))
    register = register_of(set_up(experiment), clock=True)
    history = train(experiment, "cpu", progress=False)
    assert (history.alignments.passes < 30).all() and history.rounds["round"].tolist() == [-1, 0, 1, 2, 3]
    priced = simulated_seconds(history, register.samples, register.costs, experiment.clock)
    assert priced.equals(history.rounds.clock_seconds)
    fast = ClockConfig(1e30, up=1e30, down=1e30, server_flops=1.0)  # then only the server's work counts
    seconds = simulated_seconds(history, register.samples, register.costs, fast)
    made = sum(row.buffer_size * (register.costs.target + row.passes * register.costs.alignment)
               for row in history.alignments.itertuples())  # fmt: skip
    rest = sum(work.server_flops for a in attendances(experiment, register.samples, register.costs) for work in a.works)
    assert seconds.iloc[-1] == pytest.approx(made + rest, rel=1e-9)
    with pytest.raises(ValueError, match=r"paper_bytes=.* must be costs and samples of this run"):
        simulated_seconds(history, register.samples[::-1], register.costs, fast)


def test_a_straggler_is_never_begun_with_and_nobody_waits_for_it():
    experiment = tiny("fed_avg", clock=ClockConfig(spread=1.5))
    register = register_of(set_up(experiment), clock=True)
    (attendance, *_) = attendances(experiment, register.samples, register.costs)
    of = speeds(experiment.clock, 4)
    takes = [client_latency(work, of[work.client], experiment.clock.server_flops) for work in attendance.works]
    slowest, limit = takes.index(max(takes)), sorted(takes)[-2]
    history, state = train_state(experiment.replace(**{"clock.deadline": limit}), "cpu", progress=False)
    assert slowest not in state.present and set(history.rounds.participants) == {3}
    assert history.rounds.clock_seconds.iloc[-1] == pytest.approx(3 * limit)
    assert "exp_avg" in "".join(part_tensors(state.clients[state.present[0]]))
    assert "exp_avg" not in "".join(part_tensors(state.clients[slowest]))  # it has not made a step
    everyone = train(experiment, "cpu", progress=False).rounds
    assert everyone.clock_seconds.iloc[-1] == pytest.approx(3 * max(takes))
    assert history.rounds.paper_bytes.iloc[-1] == 3 / 4 * everyone.paper_bytes.iloc[-1]


def test_an_algorithm_that_asks_absent_clients_is_stopped(monkeypatch):
    plain = ALGORITHMS["fed_avg"]

    def deaf(state, rnd, ledger):
        for i in range(len(state.clients)):
            ledger.link(rnd, i).up(client_model=state.clients[i].model)
        return plain.run_round(state, rnd, ledger)

    monkeypatch.setitem(ALGORITHMS, "fed_avg", plain._replace(run_round=deaf))
    whole = train(tiny("fed_avg", rounds=1), "cpu", progress=False)
    assert len(whole.rounds) == 1
    with pytest.raises(ValueError, match=r"rounds go over state\.present"):
        train(tiny("fed_avg", rounds=1, participation=0.5), "cpu", progress=False)


def test_the_clock_is_plain_arithmetic():
    """FedAvg by hand: the slowest of 2 clients; then both seconds of one client in turn."""
    experiment = Experiment(num_clients=2, rounds=1).replace(**{"algorithm.name": "fed_avg"})
    costs = Costs(whole=10, client_bytes=30, server_bytes=70)
    (attendance,) = attendances(experiment, [4, 8], costs)
    clock = ClockConfig(client_flops=20.0, up=50.0, down=100.0)
    assert attended_seconds(attendance, experiment, costs, clock) == 8 * 10 / 20 + 100 / 50 + 100 / 100
    shared = experiment.replace(**{"algorithm.share_server": True})
    assert attended_seconds(attendance, shared, costs, clock) == (4 + 3) + (2 + 3)
    assert speeds(clock, 2) == [Speed(20.0, 50.0, 100.0)] * 2


# ---------------------------------------------------------------------------------------- the command line, bad input


def test_the_command_line_knows_the_fields():
    words = ["preset=smoke", "participation=0.5", "clock.deadline=3", "clock.spread=1", "dataset.size_spread=0.5"]
    (job,) = jobs_of(words)
    fields = {"participation": 0.5, "clock.deadline": 3, "clock.spread": 1, "dataset.size_spread": 0.5}
    assert job.experiment == preset("smoke", **fields)
    assert job.experiment.clock == ClockConfig(deadline=3.0, spread=1.0)
    one, two = jobs_of(["preset=smoke", "participation=1,0.5"], multirun=True)
    assert one.experiment == preset("smoke") and two.experiment.participation_seed == 200
    assert all(word in help_text() for word in ("participation ", "clock.deadline", "clock.up", "dataset.size_spread"))


def test_a_sweep_over_participation_is_compared_by_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = ["preset=smoke", "algorithm=fed_avg", "rounds=1", "dataset.max_train=90", "participation=1,0.34"]
    jobs = jobs_of(words, multirun=True)
    RunStore().get([job.experiment for job in jobs], "cpu", progress=False, jobs=1)
    table, failed = comparison(jobs)
    header, one, two, *_ = table.splitlines()
    assert not failed and [line.split()[-1] for line in (header, one, two)] == ["participation", "1.00", "0.34"]


SGLR = {"algorithm.name": "sglr"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"participation": 0}, "participation=0"),
        ({"participation": 1.5}, "participation=1.5"),
        ({"participation": "half"}, "participation='half'"),
        ({"participation": 0.5, "participation_seed": -1}, "participation_seed=-1"),
        ({"clock.deadline": 0}, "clock.deadline=0"),
        ({"clock.up": 0}, "clock.up=0"),
        ({"clock.spread": -1}, "clock.spread=-1"),
        ({"clock.dedline": 1}, "did you mean 'deadline'"),
        ({"dataset.size_spread": -1}, "dataset.size_spread=-1"),
        ({"algorithm.name": "centralised", "num_clients": 1, "participation": 0.5}, "1 for 'centralised'"),
        ({"algorithm.name": "centralised", "num_clients": 1, "clock.up": 1}, "left out for 'centralised'"),
        (SGLR | {"algorithm.mixing_mode": "concat_channels", "participation": 0.5}, "participation=0.5"),
        (SGLR | {"algorithm.mixing_mode": "pooling", "clock.up": 1}, "mixing_mode='pooling'"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_bad_values_are_named(changes, says):
    with pytest.raises(ValueError) as error:
        Experiment().replace(**changes)
    assert says in str(error.value)


def test_a_deadline_that_nobody_can_keep_is_refused():
    with pytest.raises(ValueError, match=r"clock\.deadline=1e-06: must be at least .* the fastest client"):
        train(tiny("psl", **{"clock.deadline": 1e-6}), "cpu", progress=False)
