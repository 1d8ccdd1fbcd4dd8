"""Clients that fail, a server that is killed, a network that stalls: what is lost is a client's part in a round.

The measure is the simulation in which the same clients are absent from the same rounds, in every bit."""

import io
import json
import logging
import math
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.participation import asked_clients
from fsl_sage.experiments.history import DivergedError
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train
from fsl_sage.machines.flower import GridExchange
from fsl_sage.machines.mail import Question
from fsl_sage.machines.messages import MessageError, decode, encode
from fsl_sage.machines.parties import ask_clients
from tests.support import ROOT
from tests.support.asking import ASKED_ONCE, THREE, Clients, assert_simulated, simulated, small
from tests.support.double import double_precision
from tests.support.proxy import Proxy
from tests.support.runs import assert_same


class Failing(Clients):
    """Clients of which some fail: (round, client) → what becomes of its answers in that round; None: nothing comes."""

    def __init__(self, experiment, folder, failures):
        super().__init__(experiment, folder)
        self.failures = failures

    def __call__(self, questions):
        answers = super().__call__(questions)
        for i, question in questions.items():
            spoil = self.failures.get((question.round, i), lambda ups: ups)
            answers[i] = spoil(answers[i])
        return {i: answer for i, answer in answers.items() if answer is not None}


def lost(ups):
    return None


# ------------------------------------------------------------------------------------------ what can become of answers


def changed(position, change):
    """Spoil one message of an answer: `change` makes new tensors of its tensors."""

    def spoil(ups):
        return [encode(change(decode(up)[0]), decode(up)[1]) if up is ups[position] else up for up in ups]

    return spoil


def not_finite(tensors):
    return {name: t * math.nan if t.is_floating_point() else t for name, t in tensors.items()}


SPOILED = {
    "no answer": (lost, "client {}: no answer"),
    "an error": (lambda ups: MessageError("has failed: out of memory"), "client {}: has failed: out of memory"),
    "nothing": (lambda ups: [], "smashed, labels of client {}: not in its answer"),
    "noise": (lambda ups: [b"\0" * len(ups[0]), *ups[1:]], "smashed, labels of client {}: no message of ours"),
    "half a message": (lambda ups: [ups[0][: len(ups[0]) // 2]], "smashed, labels of client {}: .* bytes, where"),
    "too many bytes": (changed(0, lambda t: t | {"more.": torch.zeros(99)}), "labels of client {}: .* bytes, where"),
    "wrong shape": (changed(0, lambda t: {n: v[None] for n, v in t.items()}), "smashed, labels of client {}"),
    "wrong type": (
        changed(-2, lambda t: {n: v.view(torch.int32) if v.is_floating_point() else v for n, v in t.items()}),
        "client_model of client {}: .* is torch.int32",
    ),
    "NaN in smashed data": (changed(0, not_finite), "smashed, labels of client {}: smashed. has numbers that are NaN"),
    "NaN in the model": (changed(-2, not_finite), "client_model of client {}: .* NaN"),
    "NaN in a loss": (changed(-1, not_finite), "losses of client {}: .* NaN"),
    "labels of no class": (changed(0, lambda t: t | {"labels.": t["labels."] + 10}), "labels. are not all from 0 to 9"),
}
WHERE = {name: (1 + k // 2, 1 + k % 2) for k, name in enumerate(SPOILED)}  # two a round


@pytest.fixture(scope="module")
def spoiled_run(tmp_path_factory):
    """A run in which all of it happens, the clients it was made with, and what the log says."""
    folder, written = tmp_path_factory.mktemp("spoiled"), io.StringIO()
    experiment = small("fsl_sage", **THREE | {"rounds": 8, "algorithm.align_interval": 100})
    clients = Failing(experiment, folder, {WHERE[name]: spoil for name, (spoil, _) in SPOILED.items()})
    logging.getLogger("fsl_sage.machines").addHandler(handler := logging.StreamHandler(written))
    history = ask_clients(experiment, clients, folder / "server")
    logging.getLogger("fsl_sage.machines").removeHandler(handler)
    return history, clients, written.getvalue()


@pytest.mark.parametrize("name", SPOILED)
def test_an_answer_that_is_missing_or_wrong_is_named_in_the_log(name, spoiled_run):
    (rnd, client), (_, says) = WHERE[name], SPOILED[name]
    says = rf"^round {rnd} without .*client {client}.*: .*{says.format(client)}"
    assert re.search(says, spoiled_run[2], re.MULTILINE)


def test_rounds_are_completed_without_the_clients_that_fail(spoiled_run):
    history, clients, _ = spoiled_run
    assert_simulated(history, {rnd: [1, 2] for rnd in range(1, 7)})
    assert all(clients.asked[rnd, 0] == 1 + (rnd == 0) for rnd in range(8))  # nobody's answer is asked for again


def test_an_answer_that_ends_too_early(tmp_path, caplog):
    experiment = small("cse_fsl", **THREE | {"rounds": 2})
    clients = Failing(experiment, tmp_path, {(1, 1): lambda ups: ups[:-1]})
    assert_simulated(ask_clients(experiment, clients, tmp_path / "server"), {1: [1]})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "losses of client 1: not in its answer" in record.message


@pytest.mark.parametrize("jointly", [False, True])
def test_what_rests_on_a_lost_answer_is_asked_for_again(jointly, tmp_path):
    """In a round with alignment the server's step on client 1's data is in client 2's auxiliary model, and only there.

    Jointly aligned, it is in everybody's."""
    experiment = small("fsl_sage", **THREE, **{"algorithm.align_jointly": jointly})
    spoil = changed(-1, not_finite)  # the losses, which come with the second answer
    clients = Failing(experiment, tmp_path, {(2, 1): lambda ups: spoil(ups) if len(ups) > 1 else ups})
    assert_simulated(ask_clients(experiment, clients, tmp_path / "server"), {2: [1]})
    assert {i: clients.asked[2, i] for i in range(3)} == ({0: 3, 1: 2, 2: 3} if jointly else {0: 2, 1: 2, 2: 3})


PATTERNS = {
    "from the first round": {0: [2], 1: [0, 2], 2: [2]},
    "in turn": {0: [0], 1: [1], 2: [2], 3: [0]},
    "for good": {1: [1], 2: [1], 3: [1]},
    "but one": {0: [0, 1], 2: [1, 2]},
}


def comings_and_goings():
    """FSL-SAGE in every pattern, the other algorithms in two, which alternate."""
    others = [name for name in ASKED_ONCE if name != "fsl_sage"]
    alternate = [(name, [*PATTERNS][i % 2 :: 2]) for i, name in enumerate(others)]
    return [(name, pattern) for name, own in [("fsl_sage", [*PATTERNS]), *alternate] for pattern in own]


@pytest.mark.parametrize(("algorithm", "pattern"), comings_and_goings())
def test_who_comes_back_goes_on_from_where_it_was(algorithm, pattern, tmp_path):
    """Client 1 has trained when its answer is lost: the round has not been, for it. Others have not even been there."""
    experiment, absent = small(algorithm, **THREE), PATTERNS[pattern]

    class Away(Clients):
        def __call__(self, questions):
            out = absent.get(max(question.round for question in questions.values()), [])
            answers = super().__call__({i: q for i, q in questions.items() if i not in out or i == 1})
            return {i: answer for i, answer in answers.items() if i not in out}

    assert_simulated(ask_clients(experiment, Away(experiment, tmp_path), tmp_path / "server"), absent)


@pytest.mark.parametrize("algorithm", ASKED_ONCE)
def test_only_a_part_of_the_clients_is_asked_and_of_them_one_fails(algorithm, tmp_path):
    experiment = small(algorithm, **THREE | {"num_clients": 4, "participation": 0.5, "rounds": 5})
    (rnd, first), absent = (1, asked_clients(experiment, 1)[0]), {1: asked_clients(experiment, 1)[:1]}
    clients = Failing(experiment, tmp_path, {(rnd, first): lost})
    history = ask_clients(experiment, clients, tmp_path / "server")
    assert history.rounds.participants.tolist() == [2, 1, 2, 2, 2]
    one = simulated(experiment, absent)
    pd.testing.assert_frame_equal(one.ledger, history.ledger, check_exact=True)
    drop = {"columns": "participants"}  # the simulation of a pattern does not know who was to come
    pd.testing.assert_frame_equal(one.rounds.drop(**drop), history.rounds.drop(**drop), check_exact=True)
    assert {i for asked, i in clients.asked if asked == 1} == set(asked_clients(experiment, 1))


def test_where_nobody_is_left_the_run_stops_and_can_go_on(tmp_path):
    experiment = small("fsl_sage", **THREE)
    clients = Failing(experiment, tmp_path, {(1, i): lost for i in range(3)})
    with pytest.raises(MessageError, match=r"no client is left in round 1 \(.*client 0: no answer.*goes on"):
        ask_clients(experiment, clients, tmp_path / "server")
    assert_same(simulated(experiment, {}), ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server"))


def test_a_client_that_is_missing_at_the_start_is_named(tmp_path):
    experiment = small("fed_avg", **THREE)
    with pytest.raises(MessageError, match="client 1: no answer"):
        ask_clients(experiment, Failing(experiment, tmp_path, {(-1, 1): lost}), tmp_path / "server")


def test_a_client_that_has_lost_its_file_is_left_out(tmp_path):
    experiment = small("cse_fsl", **THREE)

    class Forgetful(Clients):
        def answer(self, i, question):
            try:
                return super().answer(i, question)
            except ValueError as error:
                return MessageError(str(error))

        def __call__(self, questions):
            if questions[0].round == 2:
                (tmp_path / "client-1-after-1.safetensors").unlink(missing_ok=True)
            return super().__call__(questions)

    assert_simulated(ask_clients(experiment, Forgetful(experiment, tmp_path), tmp_path / "server"), {2: [1], 3: [1]})


# --------------------------------------------------------------------------------------------- a server that is killed


class PowerCut(BaseException):
    """Nothing that the program could do something about."""


def test_a_server_that_is_stopped_anywhere_goes_on(tmp_path):
    """Before and after every exchange, and after every checkpoint, with a client that fails in round 1."""
    experiment, seen = small("fsl_sage"), set()
    clients = Failing(experiment, tmp_path, {(1, 1): lost})

    def step(*where):
        if where not in seen:  # each step is the last one, the first time that it is reached
            seen.add(where)
            raise PowerCut

    def exchange(questions):
        what = [(i, question.round, question.have) for i, question in questions.items()]
        step("before", *what)
        answers = clients(questions)
        step("after", *what)
        return answers

    history = None
    while history is None:
        try:
            done = lambda done: step("stored", done.next_round)  # noqa: E731
            history = ask_clients(experiment, exchange, tmp_path / "server", each_round=done)
        except PowerCut:
            pass
    assert_simulated(history, {1: [1]})
    assert len(seen) == 3 + 2 * (1 + 2 + 1 + 2)  # rounds; exchanges: who are you, two with alignment, one without


def test_a_server_process_that_is_killed_goes_on(tmp_path):
    """SIGKILL in the middle of rounds 1 and 3, when some clients have answered."""
    experiment = small("fsl_sage", **THREE)
    (tmp_path / "experiment.json").write_text(json.dumps(experiment.to_dict()))
    command = [sys.executable, "-m", "tests.support.faults_program", tmp_path, tmp_path / "experiment.json"]
    for rnd in (1, 3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            until = time.monotonic() + 300
            while not (tmp_path / f"client-0-after-{rnd}.safetensors").exists() and time.monotonic() < until:
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert len(done.stdout.splitlines()) < 4, "it has begun anew"
    assert_same(simulated(experiment, {}), RunStore(tmp_path / "store").find(experiment))


def test_a_finished_run_is_not_run_again(tmp_path):
    experiment = small("fed_avg", comm_threshold_mb=0.2)
    first = ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")
    assert first.stopped == "budget" and len(first.rounds) < experiment.rounds
    assert_same(first, ask_clients(experiment, lambda questions: {}, tmp_path / "server"))


# -------------------------------------------------------------------------------------------------- nodes and networks


class Nodes(GridExchange):
    """Flower's nodes, by function call; `there`: node → client; `away`: round → what has become of `there`."""

    def __init__(self, clients, there, changes):
        super().__init__(self, clients.experiment.num_clients, seconds=0.1)
        self.clients, self.there, self.changes, self.hangs = clients, there, changes, set()

    def get_node_ids(self):
        return list(self.there)

    def __call__(self, questions):
        rnd = max(question.round for question in questions.values())
        self.there = self.changes.get(rnd, self.there)
        return super().__call__(questions)

    def _send(self, questions):
        asked = {node: self.there[node] for node in questions if isinstance(self.there[node], int)}
        return {n: {"client": i, "ups": self.clients.answer(i, questions[n])} for n, i in asked.items()}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({1: {10: 0, 77: 1}}, {}),  # started again between two rounds
        ({1: {10: 0}, 2: {10: 0, 77: 1}}, {1: [1]}),  # gone for a round
        ({1: {10: 0, 11: "silent", 77: 1}, 2: {10: 0, 77: 1}}, {1: [1]}),  # the old one is in the list for a while
        ({1: {10: 0, 11: "silent"}, 2: {10: 0, 11: 1}}, {1: [1]}),  # it hangs, then goes on
        ({1: {10: 0, 11: 1, 12: "silent"}}, {}),  # a stranger
    ],
    ids=["started again", "gone", "old and new", "hangs", "stranger"],
)
def test_nodes_come_and_go(changes, absent, tmp_path):
    experiment = small("fsl_sage")
    nodes = Nodes(Clients(experiment, tmp_path), {10: 0, 11: 1}, changes)
    assert_simulated(ask_clients(experiment, nodes, tmp_path / "server"), absent)


@pytest.mark.parametrize("record", [None, 3, {}, {"client": 7, "ups": []}, {"client": "1"}, {"client": 0.0}])
def test_who_does_not_say_which_client_it_is_is_nobody(record):
    class Odd(Nodes):
        def _send(self, questions):
            return dict.fromkeys(questions, record)

    class Two:
        experiment = small("fed_avg")

    odd = Odd(Two, {10: 0, 11: 1}, {})
    assert odd(dict.fromkeys(range(2), Question(-1))) == {} and odd.nodes == {}


class OverHttp(Clients):
    """Each client is a web server behind a proxy; who does not answer within `seconds` has not answered.

    Clients are threads, and go on when the server has given them up; but only one thread computes at a time, the
    server's too: cutting a network (torch.fx) changes all modules of the process for a moment, and initial models are
    drawn from a stream that threads share."""

    def __init__(self, experiment, folder, seconds, modes):
        super().__init__(experiment, folder)
        self.seconds, self.modes, self.lock = seconds, modes, threading.Lock()

    def __enter__(self):
        self.lock.acquire()  # the server computes whenever it does not ask
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(i)) for i in range(len(self.data))]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.proxies = [Proxy(server.server_port).__enter__() for server in self.servers]
        return self

    def __exit__(self, *_):
        self.lock.release()
        for proxy, server in zip(self.proxies, self.servers, strict=True):
            proxy.mode = "pass"
            proxy.__exit__()
            server.shutdown()
            server.server_close()

    def _handler(self, i):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                told = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                question = Question(**{name: opened(value) for name, value in told.items()})
                with self.lock:
                    text = json.dumps([up.hex() for up in self.answer(i, question)]).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(text)))
                handler.end_headers()
                handler.wfile.write(text)

            def log_message(handler, *_):
                pass

        def opened(value):
            if isinstance(value, list):
                return [bytes.fromhex(text) for text in value]
            return bytes.fromhex(value) if isinstance(value, str) else value

        return Handler

    def _ask(self, i, question):
        words = {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(question).items()}
        words |= {name: [data.hex() for data in words[name]] for name in ("late", "downs")}
        self.proxies[i].mode = self.modes.get((question.round, i), "pass")
        request = Request(f"http://127.0.0.1:{self.proxies[i].port}", json.dumps(words).encode())
        try:
            with urlopen(request, timeout=self.seconds) as reply:
                return [bytes.fromhex(text) for text in json.loads(reply.read())]
        except OSError as error:
            return MessageError(f"no answer ({type(error).__name__})")

    def __call__(self, questions):
        self.lock.release()
        try:
            with ThreadPoolExecutor() as pool:
                return dict(zip(questions, pool.map(self._ask, questions, questions.values()), strict=True))
        finally:
            self.lock.acquire()


def test_a_network_that_delays_stalls_and_resets(tmp_path):
    experiment = small("fsl_sage", **THREE | {"rounds": 6})
    modes = {(0, 1): "delay", (1, 1): "stall", (2, 0): "reset", (3, 1): "reset", (3, 2): "stall", (4, 0): "delay"}
    with OverHttp(experiment, tmp_path, 10, modes) as clients:
        history = ask_clients(experiment, clients, tmp_path / "server")
    assert_simulated(history, {1: [1], 2: [0], 3: [1, 2]})
    assert all(proxy.bytes > 100_000 for proxy in clients.proxies)


def test_a_test_loss_that_is_not_finite_ends_the_run_as_it_ends_the_simulation(tmp_path):
    once = {"num_clients": 1, "rounds": 1, "algorithm.server_update_interval": 100, "model.server.optimizer.lr": 1e30}
    experiment = small("cse_fsl", **once)
    with pytest.raises(DivergedError, match=r"test loss is .* after round 0"):
        train(experiment, "cpu", progress=False)
    with pytest.raises(DivergedError, match=r"test loss is .* after round 0"):
        ask_clients(experiment, Clients(experiment, tmp_path), tmp_path / "server")


# ---------------------------------------------------------------------------------------------------- double precision


def test_in_double_precision_too(tmp_path):
    experiment = small("fsl_sage", **THREE)
    with double_precision():
        clients = Failing(experiment, tmp_path, {(1, 1): lost})
        history = ask_clients(experiment, clients, tmp_path / "server")
        assert_simulated(history, {1: [1]})
    single = ask_clients(experiment, Failing(experiment, tmp_path, {(1, 1): lost}), tmp_path / "single")
    twice = history.ledger["bytes"].sum() / single.ledger["bytes"].sum()
    assert 1.9 < twice < 2  # labels and headers are as they were
