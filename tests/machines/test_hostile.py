"""What an attacker would try as a client, or as the server of one: named in the log, left out, and the run goes on.

The measure is the simulation in which the attacker is absent, in every bit."""

import json
import math
import re
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fsl_sage.experiments.checkpoint import CheckpointError, Progress, save_checkpoint
from fsl_sage.experiments.history import DivergedError
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.stored import read_all
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.machines import mail, remote, wire
from fsl_sage.machines.flower import GridExchange, registered
from fsl_sage.machines.mail import Question, within
from fsl_sage.machines.messages import MessageError, decode, encode
from fsl_sage.machines.parties import account, answer_question, ask_clients
from fsl_sage.machines.placed import Outline
from fsl_sage.machines.remote import due_bytes, outline_of
from fsl_sage.machines.shares import write_shares
from fsl_sage.networks.gpt2 import gpt2, weights_in
from tests.support.asking import ADAPTED, ASKED_ONCE, THREE, Clients, assert_simulated, small, small_on_texts
from tests.support.runs import assert_same

SHORT = THREE | {"rounds": 2}


class Lying(Clients):
    """Client `who` changes what it sends in round `rnd`: `change(tensors, about)` gives what goes out instead."""

    def __init__(self, experiment, folder, change, who=1, rnd=-1):
        super().__init__(experiment, folder)
        self.change, self.who, self.rnd, self.sent = change, who, rnd, {}

    def __call__(self, questions):
        answers = super().__call__(questions)
        for i, question in questions.items():
            self.sent[question.round, i] = answers[i]
            if (question.round, i) == (self.rnd, self.who):
                answers[i] = self.spoil(answers[i])
        return answers

    def spoil(self, ups):
        return [encode(*self.change(*decode(up))) for up in ups]


def lie(**rows):
    def change(tensors, about):
        row = tensors["hello."].clone()
        for name, value in rows.items():
            row[["samples", "channels", "height", "width", "classes", "experiment"].index(name)] = value
        return {"hello.": row}, about

    return change


LIES = {
    "no samples": (1, lie(samples=0), "0 samples, where 1 to 30 are allowed"),
    "negative samples": (1, lie(samples=-5), "-5 samples, where 1 to 30"),
    "10**7 samples": (1, lie(samples=10**7), "10000000 samples, where 1 to 30"),
    "2**62 samples": (1, lie(samples=2**62), "samples, where 1 to 30"),
    "more than anyone": (1, lie(samples=31), "31 samples, where 1 to 30"),
    "a last batch of one": (1, lie(samples=17), "client 1 .*BatchNorm needs 2"),
    "RGB": (1, lie(channels=3), r"images \(3, 28, 28\), where .*\(1, 28, 28\)"),
    "no channel": (1, lie(channels=-1), r"images \(-1, 28, 28\)"),
    "larger": (1, lie(height=56, width=56), r"images \(1, 56, 56\)"),
    "12 classes": (1, lie(classes=12), "classes 12, where .* 10"),
    "10**9 classes": (1, lie(classes=10**9), "classes 1000000000"),
    "client 0: RGB": (0, lie(channels=3), r"images \(3, 28, 28\)"),
    "client 0: 11 classes": (0, lie(classes=11), "classes 11"),
    "client 0: 10**6 channels": (0, lie(channels=10**6), "images"),
    "another version": (1, lambda tensors, about: (tensors, about | {"version": "0.0"}), "fsl_sage '0.0', the server"),
    "no version": (1, lambda tensors, about: (tensors, {}), "fsl_sage None"),
    "another client": (1, lambda tensors, about: (tensors, about | {"client": 0}), "names .*0.* was due"),
    "escapes": (1, lambda tensors, about: (tensors, about | {"version": "\x1b[2J"}), r"fsl_sage '\\x1b\[2J'"),
    "no row": (1, lambda tensors, about: ({"x": torch.zeros(9)}, about), "missing or not asked for"),
    "a long row": (1, lambda tensors, about: ({"hello.": torch.zeros(10**4)}, about), "bytes, where"),
}


@pytest.mark.attack("introductions")
@pytest.mark.parametrize("name", LIES)
def test_a_client_that_lies_of_itself_is_named_and_left_out(name, tmp_path, caplog):
    (who, change, why), experiment = LIES[name], small("fed_avg", **SHORT | {"rounds": 1})
    history = ask_clients(experiment, Lying(experiment, tmp_path, change, who), tmp_path / "server")
    assert_simulated(history, {0: [who]})
    said = [record.message for record in caplog.records if record.message.startswith(f"client {who} ")]
    assert len(said) == 1 and re.search(why, said[0]), caplog.text
    assert account(tmp_path / "server", experiment)["absent"] == {"0": [who]}


def say(change):
    """What a client says of its texts: `change(lengths)` in the place of their lengths."""
    return lambda tensors, about: ({n: change(t) if n == "lengths." else t for n, t in tensors.items()}, about)


def lie_of_texts(**rows):
    def change(tensors, about):
        for name, value in rows.items() if "hello." in tensors else ():
            tensors["hello."][["samples", "length", "tokens", "experiment"].index(name)] = value
        return tensors, about

    return change


def unsaid(tensors, about):
    return ({} if "lengths." in tensors else tensors), about


LIES_OF_TEXTS = {
    "too few": (say(lambda t: t[1:]), r"lengths. is torch.int64 \(\d+,\), where torch.int64 \(\d+,\) was due"),
    "too many": (say(lambda t: torch.ones(10**5, dtype=torch.long)), "bytes, where"),
    "not said": (unsaid, "missing or not asked for"),
    "zero": (say(lambda t: t * 0), "texts of 0 to 0 tokens, where 1 to"),
    "negative": (say(lambda t: -t), "texts of -.* tokens, where 1 to"),
    "longer than any": (say(lambda t: t + 10**3), "tokens, where 1 to"),
    "huge": (say(lambda t: t + 2**62), "tokens, where 1 to"),
    "fractions": (say(torch.Tensor.float), "lengths. is torch.float32"),
    "a table": (say(lambda t: t[None]), r"lengths. is torch.int64 \(1, \d+\)"),
    "of another client": (
        lambda tensors, about: (tensors, about | ({"client": 0} if "lengths." in tensors else {})), "names .* was due"
    ),
    "other width": (lie_of_texts(length=9), r"texts \(9,\), where the server's data set has"),
    "beyond the context": (lie_of_texts(length=10**4), r"texts \(10000,\), where"),
    "more tokens": (lie_of_texts(tokens=10**6), "classes 1000000, where"),
    "images": (lambda tensors, about: ({"hello.": torch.zeros(6, dtype=torch.long)}, about), "hello. is .* was due"),
    "2**62 texts": (lie_of_texts(samples=2**62), "samples, where 1 to"),
}  # fmt: skip


@pytest.mark.attack("introductions")
@pytest.mark.parametrize("name", LIES_OF_TEXTS)
def test_a_client_that_lies_of_its_texts_is_named_and_left_out(name, tmp_path, caplog):
    (change, why), experiment = LIES_OF_TEXTS[name], small_on_texts("cse_fsl", rounds=1)
    history = ask_clients(experiment, Lying(experiment, tmp_path, change), tmp_path / "server")
    assert_simulated(history, {0: [1]})
    said = [record.message for record in caplog.records if record.message.startswith("client 1 ")]
    assert len(said) == 1 and re.search(why, said[0]), caplog.text


def weights(folder, seed, vocabulary):
    """A folder with pretrained weights, found like a data set."""
    torch.manual_seed(seed)
    (folder / "gpt2_tiny").mkdir(parents=True)
    tensors = {name: t.clone() for name, t in gpt2(vocabulary, 128, 16, 4, 2).state_dict().items()}
    save_file(tensors, folder / "gpt2_tiny" / "model.safetensors")
    return str(folder)


@pytest.mark.attack("introductions")
def test_a_client_with_other_pretrained_weights_is_named_and_left_out(tmp_path, caplog):
    experiment = small_on_texts("cse_fsl", rounds=1, **{"model.pretrained": True, "model.adapter": {"rank": 2}})

    class In(Clients):
        def answer(self, i, question):
            with weights_in(self.roots[i]):
                return super().answer(i, question)

    same, other = In(experiment, tmp_path / "a"), In(experiment, tmp_path / "b")
    one, two = (weights(tmp_path / f"{seed}", seed, same.data[0].num_classes) for seed in (1, 2))
    same.roots, other.roots = [one, one], [one, two]
    simulation = train(experiment, "cpu", one, progress=False)
    history = ask_clients(experiment, same, tmp_path / "server", root=one)
    assert_same(simulation, history)
    assert simulation.data == history.data
    ask_clients(experiment, other, tmp_path / "another", root=one)
    assert "client 1 has other pretrained weights than the server" in caplog.text
    assert account(tmp_path / "another", experiment)["absent"] == {"0": [1]}


def test_a_server_that_goes_on_knows_how_long_texts_are(tmp_path):
    experiment = small_on_texts("fsl_sage", **ADAPTED)

    class Stop(BaseException):
        pass

    def stop(done):
        raise Stop

    clients = Clients(experiment, tmp_path)
    with pytest.raises(Stop):
        ask_clients(experiment, clients, tmp_path / "server", each_round=stop)
    assert_same(train(experiment, "cpu", progress=False), ask_clients(experiment, clients, tmp_path / "server"))
    assert clients.asked[-1, 0] == 1


@pytest.mark.attack("introductions")
def test_a_client_that_has_failed_before_it_could_introduce_itself_is_named(tmp_path, caplog):
    experiment = small("fed_avg", **SHORT)

    class Old(Clients):
        def answer(self, i, question):
            return MessageError("has failed (no such field)") if i == 1 else super().answer(i, question)

    assert_simulated(ask_clients(experiment, Old(experiment, tmp_path), tmp_path / "server"), {0: [1], 1: [1]})
    assert "client 1 has failed (no such field)" in caplog.text


def test_a_refused_client_can_introduce_itself_again_to_a_server_that_is_started_again(tmp_path):
    experiment = small("fed_avg", **SHORT)

    class Mended(Lying):
        def __call__(self, questions):
            if max(q.round for q in questions.values()) == 1:
                raise KeyboardInterrupt
            return super().__call__(questions)

    with pytest.raises(KeyboardInterrupt):
        ask_clients(experiment, Mended(experiment, tmp_path, lie(channels=3)), tmp_path / "server")
    again = Clients(experiment, tmp_path)
    assert_simulated(ask_clients(experiment, again, tmp_path / "server"), {0: [1]})
    assert [i for rnd, i in again.asked if rnd == -1] == [1]


def floats(change):
    return lambda name, tensor: change(tensor) if tensor.is_floating_point() else tensor


def of(kind, change):
    """Change the tensors of one kind of message."""

    def spoil(tensors, about):
        return {name: change(name, t) if name.startswith(kind) else t for name, t in tensors.items()}, about

    return spoil


def where(end, change):
    return lambda name, tensor: change(tensor) if name.endswith(end) else tensor


HOSTILE = {
    "1e38": ("fed_avg", of("client_model", floats(lambda t: torch.full_like(t, 1e38))), "update of client 1"),
    "3.4e38": ("fed_avg", of("server_model", floats(lambda t: torch.full_like(t, 3.4e38))), "update of client 1"),
    "times 1e6": ("fed_avg", of("client_model", floats(lambda t: t * 1e6)), "update of client 1"),
    "times -30": ("fed_avg", of("client_model", where("weight", lambda t: t * -30)), "update of client 1"),
    "auxiliary model": ("cse_fsl", of("aux_model", floats(lambda t: t * 1e6)), "update of client 1"),
    "running_var": ("fed_avg", of("client_model", where("running_var", torch.neg)), "running_var .*below 0"),
    "counts": ("fed_avg", of("client_model", where("tracked", lambda t: t - 2**62)), "tracked .*below 0"),
    "huge counts": ("fed_avg", of("client_model", where("tracked", lambda t: t + 2**62)), "tracked .*above"),
    "losses": ("fed_avg", of("losses", floats(lambda t: t * 1e30)), "client 1 tells of a loss"),
    "negative losses": ("fed_avg", of("losses", floats(torch.neg)), "losses. .*below 0"),
    "smashed 1e38": ("fsl_sage", of("smashed", floats(lambda t: torch.full_like(t, 1e38))), "square of 1e.38"),
    "smashed times 1e6": ("fsl_sage", of("smashed", floats(lambda t: t * 1e6)), "smashed. has a root mean square"),
    "smashed 1e30": ("cse_fsl", of("smashed", floats(lambda t: torch.full_like(t, 1e30))), "square of 1e.30"),
}


@pytest.mark.attack("numbers")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers_are_named_and_left_out(name, tmp_path, caplog):
    algorithm, change, why = HOSTILE[name]
    experiment = small(algorithm, **SHORT)
    clients = Lying(experiment, tmp_path, change, rnd=1)
    assert_simulated(ask_clients(experiment, clients, tmp_path / "server"), {1: [1]})
    (record,) = caplog.records
    assert re.search(f"^round 1 without client 1: .*{why}", record.message), record.message


def in_row(row, change):
    """Change the targets (row 0) or masks (row 1) of a batch of texts."""

    def spoil(name, labels):
        labels = labels.clone()
        labels[:, row] = change(labels[:, row])
        return labels

    return of("labels", spoil)


HOSTILE_ON_TEXTS = {
    "tokens beyond": (in_row(0, lambda t: t + 10**6), r"labels. are not all from 0 to \d+"),
    "negative tokens": (in_row(0, lambda t: t - 1), r"labels. are not all from 0 to \d+"),
    "masks": (in_row(1, lambda t: t + 1), "masks of labels. are not all from 0 to 1"),
    "huge masks": (in_row(1, lambda t: t * 2**60), "masks of labels. are not all from 0 to 1"),
    "smashed 1e30": (of("smashed", lambda name, t: torch.full_like(t, 1e30)), "square of 1e.30"),
    "longer": (of("", lambda name, t: torch.cat([t, t], 1) if name[:2] == "sm" else t), "bytes, where"),
}


@pytest.mark.attack("numbers")
@pytest.mark.parametrize("name", HOSTILE_ON_TEXTS)
def test_hostile_numbers_on_texts_are_named_and_left_out(name, tmp_path, caplog):
    (change, why), experiment = HOSTILE_ON_TEXTS[name], small_on_texts("cse_fsl", rounds=2)
    history = ask_clients(experiment, Lying(experiment, tmp_path, change, rnd=1), tmp_path / "server")
    assert_simulated(history, {1: [1]})
    (record,) = caplog.records
    assert re.search(f"^round 1 without client 1: .*{why}", record.message), record.message


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage"])
def test_the_bytes_of_texts_are_bounded_before_they_come(algorithm, tmp_path):
    experiment = small_on_texts(algorithm, rounds=2, **ADAPTED)
    clients = Lying(experiment, tmp_path, None, who=-1)
    ask_clients(experiment, clients, tmp_path / "server")
    for (rnd, i), ups in clients.sent.items():
        about = outline_of(clients.data[i])
        assert rnd < 0 or sum(map(len, ups)) <= due_bytes(experiment, about) == due_bytes(experiment, replace(
            about, lengths=None
        ))  # fmt: skip


@pytest.mark.attack("numbers")
@pytest.mark.parametrize(
    ("change", "absent"),
    [
        (of("", floats(lambda t: t * 1e6)), {1: [1]}),
        (lambda tensors, about: ({n: t * (n[:7] == "losses.") for n, t in tensors.items()}, about), {}),
    ],
    ids=["larger", "smaller"],
)
def test_of_two_clients_the_hostile_one_is_left_out_and_not_the_honest_one(change, absent, tmp_path):
    experiment = small("fed_avg", rounds=2)
    ask_clients(experiment, Lying(experiment, tmp_path, change, rnd=1), tmp_path / "server")
    about = account(tmp_path / "server", experiment)
    assert (about["absent"] if about else {}) == {str(rnd): clients for rnd, clients in absent.items()}


@pytest.mark.attack("numbers")
def test_a_run_that_diverges_names_the_largest_update(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "LARGEST", math.inf)  # as if the bound were too generous
    experiment = small("fed_avg", **SHORT)
    clients = Lying(experiment, tmp_path, of("client_model", floats(lambda t: t * 1e30)), rnd=1)
    with pytest.raises(DivergedError, match=r"diverged; .*largest update is that of client 1, .* times the"):
        ask_clients(experiment, clients, tmp_path / "server")


@pytest.mark.parametrize("algorithm", ASKED_ONCE)
def test_the_bytes_that_are_due_are_known_before_they_come(algorithm, tmp_path):
    experiment = small(algorithm, **SHORT)
    clients = Lying(experiment, tmp_path, None, who=-1)
    ask_clients(experiment, clients, tmp_path / "server")
    due = due_bytes(experiment, Outline(30, (1, 28, 28), 10, 16))
    (size,) = {sum(map(len, ups)) for (rnd, _), ups in clients.sent.items() if rnd == 1}
    assert size <= due <= size + remote.NOTE * (1 + len(clients.sent[1, 0]))


class Spoiled(Lying):
    def spoil(self, ups):
        return self.change(self, ups)


SPOILED = {
    "of round 0": ("fed_avg", lambda self, ups: self.sent[0, 1], r"'round': 0.*'round': 1.* was due"),
    "of client 0": ("fed_avg", lambda self, ups: self.sent[1, 0], r"'client': 0.*'client': 1.* was due"),
    "without a stamp": ("fed_avg", lambda self, ups: [encode(decode(up)[0]) for up in ups], "None.* was due"),
    "too large": ("fed_avg", lambda self, ups: [*ups, bytes(mail.MARGIN + 9999)], r"where at most \d+ are allowed"),
    "many": ("fsl_sage", lambda self, ups: ups + [b"x"] * (mail.MARGIN + 9999), "are allowed"),
    "a number": ("fed_avg", lambda self, ups: 5, "not a list of messages"),
    "text": ("fed_avg", lambda self, ups: ["x"], "not a list of messages"),
    "nothing in a list": ("fed_avg", lambda self, ups: [None], "not a list of messages"),
}


@pytest.mark.attack("messages")
@pytest.mark.parametrize("name", SPOILED)
def test_an_answer_that_is_another_one_is_refused(name, tmp_path, caplog):
    algorithm, change, why = SPOILED[name]
    experiment = small(algorithm, **SHORT)
    history = ask_clients(experiment, Spoiled(experiment, tmp_path, change, rnd=1), tmp_path / "server")
    assert_simulated(history, {1: [1]})
    (record,) = caplog.records
    assert re.search(f"^round 1 without client 1: .*{why}", record.message), record.message


def test_what_fits_is_let_through():
    assert within([b"abc"], 3) == [b"abc"] and isinstance(within([b"abc"], 2), MessageError)


# ------------------------------------------------------------------------------------------------------ nodes and seats


class Grid(GridExchange):
    """Nodes by function call: node → what it answers, "silent" or a client's number."""

    def __init__(self, there, n=2, **options):
        super().__init__(self, n, 0.1, **options)
        self.there, self.calls = there, []

    def get_node_ids(self):
        return list(self.there)

    def _send(self, questions):
        self.calls.append(sorted(questions))
        return {
            node: {"client": self.there[node], "ups": [b"node %d" % node]}
            for node in questions if self.there[node] != "silent"
        }  # fmt: skip

    def ask(self, rnd):
        return self({i: Question(rnd) for i in range(self.n)})


@pytest.mark.attack("introductions")
def test_a_node_that_takes_anothers_number_is_refused(caplog):
    grid = Grid({10: 0, 11: 1})
    grid.ask(-1)
    grid.there[12] = 0
    for rnd in range(3):
        assert grid.ask(rnd) == {0: [b"node 10"], 1: [b"node 11"]}
    (record,) = caplog.records
    assert "node 12 is refused: it says that it is client 0, and node 10 is" in record.message
    del grid.there[10]
    assert grid.ask(3) == {0: [b"node 12"], 1: [b"node 11"]}
    assert "client 0 is node 12 from now on: node 10 is gone" in caplog.text


@pytest.mark.attack("introductions")
def test_two_nodes_with_one_number_are_named(caplog):
    assert Grid({10: 0, 11: 0}).ask(-1) == {0: [b"node 10"]}
    assert "node 11 is refused" in caplog.text


@pytest.mark.attack("introductions")
@pytest.mark.parametrize("nodes", [None, {0: 10, 1: 11}], ids=["without keys", "with keys"])
def test_a_number_that_changes_is_refused(nodes):
    grid = Grid({10: 0, 11: 1}, nodes=nodes)
    grid.ask(-1)
    grid.there[11] = 0
    answers = grid.ask(0)
    assert answers[0] == [b"node 10"] and "says that it is client 0, where the server asked client 1" in str(answers[1])


@pytest.mark.attack("introductions")
def test_with_keys_only_registered_nodes_are_asked_each_as_the_client_of_its_key():
    config = {"nodes": json.dumps({"0": 2**63 + 10, "1": 11})}
    grid = Grid({2**63 + 10: 0, 11: 1, 12: 0, 13: "silent"}, nodes=registered(config))
    assert registered({}) is None
    for rnd in (-1, 0, 1):
        assert grid.ask(rnd) == {0: [b"node %d" % (2**63 + 10)], 1: [b"node 11"]}
    assert grid.calls == [[11, 2**63 + 10]] * 3


@pytest.mark.attack("introductions")
def test_a_silent_stranger_is_asked_once():
    grid = Grid({10: 0, 11: 1, 12: "silent"})
    for rnd in range(-1, 3):
        grid.ask(rnd)
    assert sum(12 in call for call in grid.calls) == 1


@pytest.mark.attack("introductions")
def test_a_client_that_falls_silent_is_asked_less_and_less_often():
    grid = Grid({10: 0, 11: 1})
    grid.ask(-1)
    grid.there[11] = "silent"
    asked = [rnd for rnd in range(9) if (grid.ask(rnd), 11 in grid.calls[-1])[1]]
    assert asked == [0, 1, 3, 7] and "silent 4 times, is asked again in round 15" in str(grid.ask(9)[1])


@pytest.mark.parametrize("said", [True, -1, 2, 10**30, None, [0]])
def test_odd_numbers_seat_nobody(said):
    grid = Grid({10: said}, n=1)
    assert grid.ask(-1) == {} and grid.nodes == {}


# --------------------------------------------------------------------------------------------------- servers and stores


@pytest.mark.attack("server")
@pytest.mark.parametrize(
    "question",
    [
        Question(2**62), Question(10**6), Question("../../x"), Question(0.5), Question(True), Question(6, 5),
        Question(0, 0), Question(0, -1, -1), Question(0, -1, "x"), Question(1, -2),
    ],
    ids=str,
)  # fmt: skip
def test_a_question_that_cannot_be_is_refused(question, tmp_path):
    experiment = small("fsl_sage")
    with pytest.raises(ValueError, match=r"^question\."):
        answer_question(experiment, 0, Clients(experiment, tmp_path).data[0], tmp_path / "in", question)
    assert not (tmp_path / "in").exists()


@pytest.mark.attack("server")
@pytest.mark.parametrize(
    "change",
    [{4: 10**9}, {1: 10**5, 2: 10**4}, {0: 10**15}, {0: -1}, {4: 11}],
    ids=["classes", "image", "samples", "negative", "one more"],
)
def test_a_client_believes_no_server_about_its_own_images(change, tmp_path):
    experiment = small("fsl_sage")
    data, row = Clients(experiment, tmp_path).data[0], torch.tensor([30, 1, 28, 28, 10, int(experiment.hash, 16) >> 1])
    for k, value in change.items():
        row[k] = value
    with pytest.raises(MessageError, match="for one with other images"):
        answer_question(
            experiment, 0, data, tmp_path / "in", Question(0, -1, 0, encode({"all.": torch.stack([row] * 2)}))
        )


@pytest.mark.attack("server")
def test_two_servers_cannot_share_a_checkpoint(tmp_path):
    experiment = small("fed_avg", **SHORT)

    class Second(Clients):
        def __call__(self, questions):
            with pytest.raises(RuntimeError, match=r"another server is at work on .*server"):
                ask_clients(experiment, Clients(experiment, tmp_path / "b"), tmp_path / "server")
            return super().__call__(questions)

    history = ask_clients(experiment, Second(experiment, tmp_path / "a"), tmp_path / "server")
    assert_same(train(experiment, "cpu", progress=False), history)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_checkpoint_that_no_client_can_follow_says_how_to_begin_again(tmp_path):
    experiment, path = small("fed_avg", **SHORT), tmp_path / "server"

    class Stop(BaseException):
        pass

    def stop(done):
        raise Stop

    with pytest.raises(Stop):
        ask_clients(experiment, Clients(experiment, tmp_path / "a"), path, each_round=stop)

    class Fresh(Clients):
        def answer(self, i, question):
            try:
                return super().answer(i, question)
            except ValueError as error:
                return MessageError(str(error))

    fresh = Fresh(experiment, tmp_path / "b")
    with pytest.raises(MessageError, match=r"state after round 0 is not in its folder.*to begin again, delete .*er"):
        ask_clients(experiment, fresh, path)
    path.unlink()
    assert_same(train(experiment, "cpu", progress=False), ask_clients(experiment, fresh, path))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_server_names_a_checkpoint_that_it_cannot_use_and_the_way_out(tmp_path, damaged):
    experiment, path = small("fed_avg", **SHORT), tmp_path / "server"
    beside = {"after": torch.zeros(3), "everyone": torch.zeros(1, dtype=torch.uint8)}  # as an older version wrote it
    save_checkpoint(path, set_up(experiment), Ledger(), Progress(0), beside)
    path.write_bytes(path.read_bytes()[: -1 if damaged else None])
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + r".*: delete it, and the run begins anew"):
        ask_clients(experiment, Clients(experiment, tmp_path), path)


def stored(experiment, clients, folder):
    history = ask_clients(experiment, clients, folder / "server")
    return RunStore(folder / "store").save(history, federation=account(folder / "server", experiment))


def test_an_undisturbed_run_is_the_simulations(tmp_path):
    experiment = small("fed_avg", **SHORT)
    folder = stored(experiment, Clients(experiment, tmp_path), tmp_path)
    assert folder.name == experiment.hash and "federation" not in json.loads((folder / "provenance.json").read_text())
    assert_same(train(experiment, "cpu", progress=False), RunStore(tmp_path / "store").find(experiment))


@pytest.mark.attack("store")
def test_a_run_with_an_absent_client_is_no_simulation(tmp_path):
    experiment = small("fed_avg", **SHORT)
    folder = stored(experiment, Spoiled(experiment, tmp_path, lambda self, ups: [], rnd=1), tmp_path)
    assert folder.parent.parent == tmp_path / "store" / "federated" and folder.name == experiment.hash
    about = json.loads((folder / "provenance.json").read_text())["federation"]
    assert about["absent"] == {"1": [1]} and about["own_data"] == [] and len(set(about["sha256"])) == 3
    store = RunStore(tmp_path / "store")
    assert store.find(experiment) is None and not read_all(store.root)
    (run,) = read_all(folder.parent)
    assert run.folder == folder and not run.problem


@pytest.mark.attack("store")
def test_a_run_on_a_clients_own_images_is_no_simulation(tmp_path):
    experiment = small("fed_avg", **SHORT)
    clients = Clients(experiment, tmp_path)
    clients.data[1].images.x[0, 0, 0, 0] ^= 1  # one bit
    folder = stored(experiment, clients, tmp_path)
    about = json.loads((folder / "provenance.json").read_text())["federation"]
    assert folder.parent.parent.name == "federated" and about["own_data"] == [1] and about["absent"] == {}
    (run,) = read_all(folder.parent)
    assert not [name for name in run.history.rounds if name.startswith("client_accuracy")]  # whose labels are not known


def test_shares_and_states_are_their_owners_alone(tmp_path):
    experiment = small("fed_avg", **SHORT)
    paths = write_shares(experiment, tmp_path / "shares")
    ask_clients(experiment, Clients(experiment, tmp_path / "states"), tmp_path / "server")
    paths += [tmp_path / "shares", *(tmp_path / "states").rglob("*"), tmp_path / "states"]
    modes = {stat.filemode(path.stat().st_mode) for path in paths}
    assert modes == {"-rw-------", "drwx------"} and len(paths) == 11


def test_a_log_cannot_be_written_to_by_a_client(caplog):
    error = MessageError("evil \x1b[2J\nround 3: accuracy 1.000" + "x" * 10_000)
    assert str(error).isprintable() and len(str(error)) <= 1000
