"""What must hold across modules, whatever the numbers."""

from copy import deepcopy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.sage import SageState
from fsl_sage.algorithms.state import FixedData, State
from fsl_sage.config.experiment import Experiment
from fsl_sage.config.presets import preset
from fsl_sage.core import tensor_bytes, weighted_average
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.networks.auxiliary import AlignmentBuffer, estimate_cut_grad
from fsl_sage.networks.part import Part, server_step
from fsl_sage.networks.zoo import split_model

SMALL = {"model.name": "simple_conv", "model.width": 4, "model.client.batch_size": 4}


def small(algorithm: str, sizes=(6, 9), image_size: int = 8, **changes) -> tuple[State, Ledger]:
    """A federation on random images in float64, set up for `algorithm`."""
    gen = torch.Generator().manual_seed(0)
    data = [
        FixedData(
            torch.randn(n, 3, image_size, image_size, generator=gen, dtype=torch.double),
            torch.randint(10, (n,), generator=gen),
            batch_size=4,
        )
        for n in sizes
    ]
    experiment = Experiment(num_clients=len(sizes)).replace(**SMALL, **{"algorithm.name": algorithm} | changes)
    ledger = Ledger()
    state = ALGORITHMS[algorithm].init(experiment, data, ledger)
    ledger.transfers.clear()
    for part in state.parts:
        part.model.double()
    return state, ledger


def run(algorithm: str, rounds: int = 2, **changes) -> tuple[State, Ledger]:
    state, ledger = small(algorithm, **changes)
    for rnd in range(rounds):
        ALGORITHMS[algorithm].run_round(state, rnd, ledger)
    return state, ledger


def assert_same(one: torch.nn.Module, other: torch.nn.Module, **tolerance) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), **tolerance)


@pytest.mark.parametrize("name", ["simple_conv", "resnet18", "resnet50_cifar", "resnet56"])
def test_split_gradient_is_unsplit_gradient(name):
    split = split_model(name, image_size=32, width=8).double()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.double), torch.randint(10, (4,))
    whole = deepcopy(split)
    F.cross_entropy(whole(x), y).backward()
    server = Part(split.server, torch.optim.SGD(split.server.parameters(), lr=0.0))
    smashed = split.client(x)
    _, cut_grad = server_step(server, smashed, y)
    smashed.backward(cut_grad)
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert_same(split, whole)  # BatchNorm statistics moved alike


def test_sage_with_a_copy_of_the_server_takes_the_exact_step():
    """q = 1 and aux = server before its step: FSL-SAGE's client step is SplitFed-SS's."""
    sage, ledger = small("fsl_sage", sizes=(4,), **{"algorithm.server_update_interval": 1})
    exact, _ = small("sl_single_server", sizes=(4,))
    sage.auxes[0].model = deepcopy(sage.servers[0].model)
    ALGORITHMS["fsl_sage"].run_round(sage, 1, ledger)  # round 1 does not align
    ALGORITHMS["sl_single_server"].run_round(exact, 1, Ledger())
    assert_same(sage.clients[0].model, exact.clients[0].model)
    assert_same(sage.servers[0].model, exact.servers[0].model)


def test_sage_follows_the_exact_gradient_while_its_copy_is_renewed():
    """The same over many steps and clients, with the auxiliary model renewed before each step of the server."""
    sage, _ = small("fsl_sage", **{"algorithm.server_update_interval": 1})
    exact, _ = small("sl_single_server")
    server = sage.servers[0]
    for i, (client, aux) in enumerate(zip(sage.clients, sage.auxes, strict=True)):
        for _, x, y in sage.batches(i, 0):
            aux.model = deepcopy(server.model)
            smashed = client.model(x)
            server_step(server, smashed.detach(), y)
            client.step(smashed, estimate_cut_grad(aux.model, smashed, y)[0])
    link = Ledger()
    for i, client in enumerate(exact.clients):
        for _, x, y in exact.batches(i, 0):
            smashed = client.model(x)
            client.step(smashed, server_step(exact.servers[0], link.link(0, i).up(smashed=smashed), y)[1])
    for one, other in zip(sage.clients + sage.servers, exact.clients + exact.servers, strict=True):
        assert_same(one.model, other.model)


@pytest.mark.parametrize("sizes", [(6, 9), (4, 4, 4), (5,)])
def test_fed_avg_is_splitfed_ms(sizes):
    fed_avg, _ = run("fed_avg", sizes=sizes)
    many, _ = run("sl_multi_server", sizes=sizes)
    for one, other in zip(fed_avg.parts, many.parts, strict=True):
        assert_same(one.model, other.model, rtol=1e-12, atol=1e-14)


def test_shared_server_is_another_algorithm():
    correct, released = run("fed_avg")[0], run("fed_avg", **{"algorithm.share_server": True})[0]
    assert len({id(part.model) for part in released.servers}) == 1
    ours, theirs = correct.servers[0].model.fc1.weight, released.servers[0].model.fc1.weight
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("algorithm", ["fed_avg", "sl_single_server", "sl_multi_server"])
def test_one_client_is_centralised(algorithm):
    alone, _ = run(algorithm, sizes=(9,))
    centralised, _ = run("centralised", sizes=(9,))
    assert_same(alone.clients[0].model, centralised.clients[0].model)
    assert_same(alone.servers[0].model, centralised.servers[0].model)


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) & {"fed_avg", "sl_multi_server", "cse_fsl", "fsl_sage"}))
def test_clients_agree_after_a_round(algorithm):
    state, _ = run(algorithm)
    assert_same(state.clients[0].model, state.clients[1].model, rtol=0, atol=0)


def test_auxiliary_models_are_averaged_by_cse_fsl_only():
    one, other = run("cse_fsl")[0].auxes
    assert_same(one.model, other.model, rtol=0, atol=0)
    one, other = run("fsl_sage")[0].auxes
    assert not torch.equal(one.model.fc.weight, other.model.fc.weight)


# The ledger by hand: two rounds, the first with alignment, of two clients with 6 and 9 samples: 2 and 3 steps of 4.


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("centralised", lambda c, s, a, z: 0),
        ("fed_avg", lambda c, s, a, z: 2 * 2 * 2 * (c + s)),
        ("sl_single_server", lambda c, s, a, z: 2 * (2 * 2 * c + 2 * 15 * z)),
        ("sl_multi_server", lambda c, s, a, z: 2 * (2 * 2 * c + 2 * 15 * z)),
        ("cse_fsl", lambda c, s, a, z: 2 * (2 * 2 * (c + a) + (4 + 4 + 1) * z)),  # q = 2: steps 0 | 0 and 2
        ("fsl_sage", lambda c, s, a, z: 2 * (2 * 2 * c + (4 + 4 + 1) * z) + 2 * a),
    ],
)
def test_ledger_by_hand(algorithm, expected):
    q = {"algorithm.server_update_interval": 2} if algorithm in ("cse_fsl", "fsl_sage") else {}
    sizes = (15,) if algorithm == "centralised" else (6, 9)
    changes = q | ({"num_clients": 1} if algorithm == "centralised" else {})
    state, ledger = run(algorithm, sizes=sizes, **changes)
    client, server = (tensor_bytes(part.model) for part in (state.clients[0], state.servers[0]))
    aux = tensor_bytes(state.auxes[0].model) if state.auxes else 0
    smashed = 4 * 2 * 2 * 8  # 4 channels of 2 × 2, float64, per sample
    assert ledger.bytes("paper") == expected(client, server, aux, smashed)


def test_wire_adds_labels_framing_and_the_first_broadcast():
    history = train(preset("smoke"), "cpu", progress=False)
    table = history.ledger
    extra = table.query("phase == 'start' or kind in ('labels', 'framing')").bytes.sum()
    last = history.rounds.iloc[-1]
    assert last.wire_bytes - last.paper_bytes == extra
    assert table.query("kind == 'labels'").bytes.sum() == 8 * 3 * 3 * (32 + 32)  # 200 samples a client: steps 0 and 5
    assert (table.query("phase == 'start'").kind.isin(["client_model", "aux_model", "framing"])).all()


PUBLISHED_BYTES = {
    "fed_avg": 1790605120,
    "sl_single_server": 437281920,
    "sl_multi_server": 437281920,
    "cse_fsl": 488321280,
    "fsl_sage": 235739040,
}  # released code; rounds 0 and 1 of ResNet-18, 10 clients with 1,000 images each, batch 256


@pytest.mark.parametrize("algorithm", PUBLISHED_BYTES)
def test_published_bytes(algorithm):
    """The real rounds on PyTorch's meta device: shapes, no arithmetic. A round that read a number would fail here."""
    images, labels = torch.empty(1000, 3, 32, 32, device="meta"), torch.empty(1000, dtype=torch.long, device="meta")
    sgd = {f"model.{part}.optimizer.name": "sgd" for part in ("client", "server", "auxiliary")}
    short = {"algorithm.align_epochs": 1} if algorithm == "fsl_sage" else {}  # passes send nothing
    experiment = Experiment(num_clients=2).replace(**sgd, **short, **{"algorithm.name": algorithm})
    ledger, rounds = Ledger(phase="start"), ALGORITHMS[algorithm]
    state = rounds.init(experiment, [FixedData(images, labels, 256)] * 2, ledger)
    ledger.phase = "round"
    for rnd in range(2):
        rounds.run_round(state, rnd, ledger)
    assert 5 * ledger.bytes("paper") == PUBLISHED_BYTES[algorithm]  # all clients send the same


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_average_of_equal_models_is_the_model(sizes, seed):
    state = {"w": torch.randn(5, generator=torch.Generator().manual_seed(seed)), "n": torch.tensor(7)}
    mean = weighted_average([state] * len(sizes), [n / sum(sizes) for n in sizes])
    torch.testing.assert_close(mean["w"], state["w"])
    assert mean["n"] == 7


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_buffer_keeps_the_newest(max_size, batches):
    buffer, seen = AlignmentBuffer(max_size), []
    for n in batches:
        labels = torch.arange(len(seen), len(seen) + n)
        seen += labels.tolist()
        buffer.add(labels[:, None].float(), labels)
        assert buffer.labels.tolist() == seen[-max_size:] == buffer.smashed[:, 0].int().tolist()


def test_a_buffer_that_is_smaller_than_a_batch_still_aligns():
    state, _ = run("fsl_sage", **{"algorithm.max_dataset_size": 3, "algorithm.align_batch_size": 2})
    assert isinstance(state, SageState) and [len(buffer) for buffer in state.buffers] == [3, 3]


def test_seeds_are_held_apart():
    base = preset("smoke", "fed_avg", rounds=1)
    reference = train(base, "cpu", progress=False)
    for stream in ("init_seed", "partition_seed", "sampling_seed"):
        other = train(base.replace(**{stream: 7}), "cpu", progress=False)
        assert not reference.rounds.test_loss.equals(other.rounds.test_loss), stream


@pytest.mark.parametrize("algorithm", ["centralised", "fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl"])
def test_same_seed_same_history(algorithm):
    """FSL-SAGE's is in the training notebook."""
    one, other = (train(preset("smoke", algorithm, rounds=2), "cpu", progress=False) for _ in range(2))
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)


def test_evaluation_and_looking_do_not_change_a_run(monkeypatch):
    """The quality of the estimates is measured beside the run: without it the run is the same."""
    reference = train(preset("smoke"), "cpu", progress=False)
    nothing = torch.tensor(0.0), torch.tensor(0.0)
    monkeypatch.setattr("fsl_sage.algorithms.sage.look_at_estimate", lambda *_, **__: nothing)
    blind = train(preset("smoke"), "cpu", progress=False)
    assert reference.rounds.equals(blind.rounds) and not reference.alignments.equals(blind.alignments)
