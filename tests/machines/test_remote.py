"""Messages from strangers, and clients that are asked once a round."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.experiments.plugin_files import load_plugins
from fsl_sage.experiments.plugins import forget
from fsl_sage.experiments.train import train
from fsl_sage.machines import placed
from fsl_sage.machines.flower import GridExchange, opened
from fsl_sage.machines.mail import Question
from fsl_sage.machines.messages import MessageError, check, check_numbers, decode, encode
from fsl_sage.machines.parties import ask_clients
from tests.support.asking import ADAPTED, ASKED_ONCE, Clients, small, small_on_texts
from tests.support.runs import assert_same

TENSORS = {"smashed.": torch.arange(6.0).view(2, 3), "labels.": torch.tensor([1, 2]), "scale.": torch.tensor(1.0)}
MESSAGE = encode(TENSORS, {"round": 3})


def decoded_or_refused(data):
    try:
        tensors, plain = decode(data, limit=10_000)
        check(tensors, TENSORS)
        check_numbers(tensors, classes=10)
    except MessageError:
        return None
    assert isinstance(plain, dict)
    return tensors


@settings(max_examples=2000, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(MESSAGE) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(MESSAGE)),
    more=st.binary(max_size=40),
)
def test_mutated_messages_are_read_or_refused(edits, cut, more):
    data = bytearray(MESSAGE)
    for position, value in edits:
        data[position] = value
    tensors = decoded_or_refused(bytes(data[:cut]) + more)
    assert tensors is None or tensors.keys() == TENSORS.keys()


@settings(max_examples=1000, deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_is_refused(data):
    assert decoded_or_refused(data) is None


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
))  # fmt: skip
ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "I64", "BOOL", "F99"]),
    "shape": st.lists(st.integers(-1, 2**62), max_size=4),
    "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
})  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(st.dictionaries(st.sampled_from([*TENSORS, "__metadata__", "x"]), ENTRY | JSON), st.binary(max_size=60))
def test_headers_that_lie_are_refused(header, tail):
    text = json.dumps(header).encode()
    decoded_or_refused(len(text).to_bytes(8, "little") + text + tail)


def test_what_is_no_message_is_refused_by_name():
    for data, why in (
        (b"\x80\x04\x95", "no message"),  # a pickle
        (MESSAGE[:-1], "no message"),
        (save(TENSORS, {"plain": "[" * 100_000}), "most|no message"),
        (save(TENSORS, {"plain": "3"}), "plain values"),
        (encode(TENSORS | {"more.": torch.zeros(1)}), "more"),
        (encode(TENSORS | {"smashed.": torch.zeros(3, 2)}), "smashed"),
        (encode(TENSORS | {"labels.": torch.zeros(2)}), "labels"),
        (encode(TENSORS | {"scale.": torch.tensor(math.nan)}), "scale.*NaN"),
        (encode(TENSORS | {"labels.": torch.tensor([1, -1])}), "labels.*from 0 to 9"),
    ):
        with pytest.raises(MessageError, match=why):
            check(decode(data, limit=50_000)[0], TENSORS)
            check_numbers(decode(data)[0], classes=10)


STEPS = {"name": "step", "step_size": 1, "gamma": 0.5}


@pytest.mark.parametrize("algorithm", ASKED_ONCE)
def test_clients_that_are_asked_end_with_the_history_of_the_simulation(algorithm, tmp_path):
    experiment = small(algorithm, **{"model.client.optimizer.scheduler": STEPS})
    clients = Clients(experiment, tmp_path)
    assert_same(train(experiment, "cpu", progress=False), ask_clients(experiment, clients, tmp_path / "server"))
    twice = {0, 2} if ALGORITHMS[algorithm].cost.aligned else set()  # rounds with alignment
    assert clients.asked == {(rnd, i): 1 + (rnd in twice) for rnd in range(-1, 3) for i in range(2)}


def test_a_shape_is_found_once_for_all_copies_of_a_network(tmp_path, monkeypatch):
    """Though a client sets up its parts for each question, and the server one part per client."""
    find, found = placed._shape_of, []

    def counted(model, x):
        found.append((sum(p.numel() for p in model.parameters()), x.shape))
        return find(model, x)

    monkeypatch.setattr(placed, "_shape_of", counted)
    placed.known_shapes.cache_clear()
    experiment = small("fsl_sage")
    ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert len(found) == len(set(found)) > 2


PACKED = {
    "fsl_sage": {"codec.smashed.bits": 2, "codec.smashed.stochastic": True},
    "cse_fsl": {"codec.smashed.name": "random_top_k", "codec.smashed.rate": 0.05},
}
DEFENDED = {"defence.nopeek": 0.5, "defence.clip": 2.0, "defence.noise": 0.1, "defence.drop": 0.2}


@pytest.mark.parametrize("algorithm", PACKED)
def test_packed_messages_travel_and_end_with_the_history_of_the_simulation(algorithm, tmp_path):
    experiment = small(algorithm, **PACKED[algorithm])
    history = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)
    packed = history.ledger.query("kind == 'smashed'").bytes.sum()
    plain = train(small(algorithm), "cpu", progress=False).ledger.query("kind == 'smashed'").bytes.sum()
    assert packed < plain / 8


@pytest.mark.parametrize("algorithm", PACKED)
def test_defended_clients_end_with_the_history_of_the_simulation(algorithm, tmp_path):
    experiment = small(algorithm, **PACKED[algorithm] | DEFENDED)
    history = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)


@pytest.mark.parametrize("changes", [{"average.name": "median"}, {"average.name": "clip"}, {"average.name": "krum"}])
def test_robust_averages_and_hostile_clients_are_those_of_the_simulation(changes, tmp_path):
    experiment = small("fsl_sage", **changes, **{"hostile.clients": [1], "hostile.attack": "sign_flip"})
    history = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)


def spoilt(answer):
    """Masks of packed smashed data that name all places."""
    spoilt = []
    for up in answer:
        tensors, plain = decode(up)
        if "smashed.places" in tensors:
            tensors["smashed.places"].fill_(255)
        spoilt.append(encode(tensors, plain))
    return spoilt


def test_packed_nonsense_leaves_its_sender_out(tmp_path):
    experiment = small("cse_fsl", **PACKED["cse_fsl"] | {"codec.smashed.rate": 0.5})

    class Mean(Clients):
        def answer(self, i, question):
            answer = super().answer(i, question)
            return spoilt(answer) if (i, question.round) == (1, 1) else answer

    history = ask_clients(experiment, Mean(experiment, tmp_path), tmp_path / "server")
    assert history.rounds.participants.tolist() == [2, 1, 2]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("algorithm", ASKED_ONCE)
def test_clients_with_texts_end_with_the_history_of_the_simulation(algorithm, adapted, tmp_path):
    branch = {"algorithm.language_branch": True, "algorithm.max_dataset_size": 12} if algorithm == "fsl_sage" else {}
    experiment = small_on_texts(algorithm, **(ADAPTED | branch if adapted else {}))
    simulation = train(experiment, "cpu", progress=False)
    assert_same(simulation, ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server"))
    assert "released_bytes" in simulation.rounds


def test_lengths_of_texts_are_told_to_the_server_alone_and_only_where_it_needs_them(tmp_path):
    for algorithm, says in (("fed_avg", False), ("fsl_sage", True)):
        experiment, told = small_on_texts(algorithm, rounds=1), []

        class Heard(Clients):
            def answer(self, i, question, told=told):
                answer = super().answer(i, question)
                told += [set(decode(up)[0]) for up in answer] if question.round < 0 else []
                assert not question.everyone or set(decode(question.everyone)[0]) == {"all."}
                return answer

        ask_clients(experiment, Heard(experiment, tmp_path / algorithm), tmp_path / f"{algorithm}.server")
        assert told == [{"hello."}, {"lengths."}] * 2 if says else [{"hello."}] * 2


def test_frozen_weights_are_those_of_the_server_or_refused(tmp_path):
    experiment, changed = small_on_texts("fsl_sage", **ADAPTED), []

    class Changed(Clients):
        def answer(self, i, question):
            for k, message in enumerate(question.late if question.round == 0 else ()):
                tensors, _ = decode(message)
                tensors["client_model.embed.wte.weight"] += 1
                question.late[k] = encode(tensors)
                changed.append(i)
            return super().answer(i, question)

    with pytest.raises(ValueError, match=r"frozen weights .* differ from the server"):
        ask_clients(experiment, Changed(experiment, tmp_path), tmp_path / "server")
    assert changed == [0]


def test_joint_alignment_asks_all_clients_together(tmp_path):
    experiment = small("fsl_sage", **{"algorithm.align_jointly": True})
    together, clients = [], Clients(experiment, tmp_path)

    def exchange(questions):
        together.append(sorted(questions))
        return clients(questions)

    assert_same(train(experiment, "cpu", progress=False), ask_clients(experiment, exchange, tmp_path / "server"))
    assert together == [[0, 1]] * 6  # who are you; two, one, two


def test_a_question_can_be_asked_again(tmp_path):
    """As after a lost answer, or a client that was killed when it had just written its file."""
    experiment = small("fsl_sage")

    class Twice(Clients):
        def answer(self, i, question):
            first = super().answer(i, question)
            assert super().answer(i, question) == first
            return first

    history = ask_clients(experiment, Twice(experiment, tmp_path), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)


def test_who_is_here_for_another_experiment_is_sent_away(tmp_path):
    with pytest.raises(MessageError, match="client 0 is here for another experiment"):
        ask_clients(small("fed_avg"), Clients(small("fed_avg", seed=1), tmp_path), tmp_path / "server")


@pytest.mark.parametrize("record", [None, 3, {}, {"ups": b"x"}, {"ups": [3]}])
def test_answers_without_messages_are_refused(record):
    with pytest.raises(MessageError, match="client 7"):
        opened(record, "client 7")


def test_algorithms_that_exchange_at_every_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"algorithm.name='psl'"):
        ask_clients(small("psl"), Clients(small("fed_avg"), tmp_path), tmp_path / "server")


def test_flower_apps_talk_in_one_process(tmp_path, monkeypatch):
    """Server and client app as Flower calls them; its messages go through its own encoding."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("task_id", "run_id", "node_id"):  # Flower's launcher sets them in a process of its own
        monkeypatch.setattr(identity, f"_{name}", 1)
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto, message_to_proto

    from fsl_sage.machines.flower import client_app

    experiment, app = small("fsl_sage"), client_app()
    run = {"experiment": json.dumps(experiment.to_dict())}

    class OneProcess:
        def get_node_ids(self):
            return [10, 11]

        def push_messages(self, messages):
            self.replies = []
            for k, message in enumerate(messages):
                message.metadata.__dict__["_message_id"] = str(k)  # as Flower's own grid does
                message = message_from_proto(message_to_proto(message))
                node = {"partition-id": message.metadata.dst_node_id - 10, "folder": str(tmp_path), "device": "cpu"}
                context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
                self.replies.append(message_from_proto(message_to_proto(app(message, context))))
            return [str(k) for k in range(len(self.replies))]

        def pull_messages(self, ids):
            return self.replies

    history = ask_clients(experiment, GridExchange(OneProcess(), 2, seconds=1), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)


def test_a_question_is_numbers_and_bytes_only():
    assert {type(value) for value in vars(Question(1, 0, 2, b"", [b"x"], [])).values()} == {int, bytes, list}


POOLED = """
from collections import OrderedDict

from torch import nn

from fsl_sage import network


@network("pooled", cut="relu")
def pooled(in_channels, num_classes, image_size, width):
    layers = {"conv": nn.Conv2d(in_channels, 16, 3), "norm": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    layers |= {"pool": nn.AvgPool2d(3, 1), "norm2": nn.BatchNorm2d(16), "mean": nn.AdaptiveAvgPool2d(5)}
    return nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "fc": nn.Linear(400, num_classes)}))
"""
LOOKS = """class Looks(nn.ReLU):
    def forward(self, x):
        return super().forward(x if x.sum().item() < 1e9 else -x)


@network("looking", """
LOOKING = POOLED.replace("nn.ReLU()", "Looks()").replace('@network("pooled", ', LOOKS)


@pytest.mark.parametrize(("name", "content"), [("pooled", POOLED), ("looking", LOOKING)])
def test_networks_of_ones_own_end_with_the_history_of_the_simulation(name, content, tmp_path):
    """Sums follow the order in memory, also above a pool; a layer may look at its numbers."""
    path = tmp_path / "own.py"
    path.write_text(content)
    load_plugins([path], installed=False)
    try:
        own = {"model.name": name, "model.auxiliary.size": "first_layers", "model.auxiliary.budget_mb": 1.0}
        experiment = small("fsl_sage", **own)
        history = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
        assert_same(train(experiment, "cpu", progress=False), history)
    finally:
        forget(str(path))
