"""`fsl-sage-federate`: shares, keys, mistakes; and Flower's own processes where Flower is installed."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import numpy as np
import pandas as pd
import psutil
import pytest

from fsl_sage.commands import federate
from fsl_sage.commands.federate import Processes, main
from fsl_sage.commands.federation import Federation, federation, follow, run_config, write_app
from fsl_sage.config.presets import preset
from fsl_sage.data import files
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train
from fsl_sage.machines import flower
from fsl_sage.machines.flower import own_data
from fsl_sage.machines.gate import NoGate, Refused
from fsl_sage.machines.shares import read_share, write_shares
from tests.support.strangers import STRANGE, ask, flwr

SMALL = {"num_clients": 2, "rounds": 2, "dataset.max_train": 60, "dataset.max_test": 20, "model.width": 8}
SMALL |= {"model.client.batch_size": 16, "algorithm.align_epochs": 2, "algorithm.align_interval": 2}
EXPERIMENT = preset("smoke", **SMALL)
needs_flower = pytest.mark.skipif(
    not find_spec("flwr"), reason="Flower is missing: pip install 'fsl_sage[distributed]'"
)
needs_keys = pytest.mark.skipif(not find_spec("cryptography"), reason="cryptography is missing: it comes with Flower")


def share(**changes):
    """The arrays of a good share, but for `changes`; None leaves one out."""
    good = {"images": np.zeros((4, 1, 28, 28), np.uint8), "labels": np.array([0, 1, 2, 9])}
    good |= {"num_classes": np.array(10), "mean": np.array([0.5], np.float32), "std": np.array([0.5], np.float32)}
    return {name: array for name, array in (good | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images", None),
        ("images", np.zeros((4, 28, 28), np.uint8)),
        ("images", np.zeros((4, 1, 28, 28))),
        ("images", np.zeros((0, 1, 28, 28), np.uint8)),
        ("images", np.zeros((4, 5, 28, 28), np.uint8)),
        ("labels", np.array([0, 1, 2, 10])),
        ("labels", np.array([-1, 1, 2, 3])),
        ("labels", np.array([0, 1, 2])),
        ("labels", np.array([0, 1, 2, 3], np.int32)),
        ("num_classes", np.array([10])),
        ("num_classes", np.array(1)),
        ("mean", np.array([np.nan])),
        ("mean", np.array([0.5, 0.5])),
        ("std", np.array([0.0])),
        ("std", np.array([1])),
    ],
)
def test_a_bad_share_is_refused_by_file_and_field(name, array, tmp_path):
    path = tmp_path / "client-0.npz"
    np.savez(path, **share())
    assert len(read_share(path, EXPERIMENT, 0)) == 4
    np.savez(path, **share(**{name: array}))
    with pytest.raises(ValueError, match=rf"client-0.npz: {name} is .*; it must be"):
        read_share(path, EXPERIMENT, 0)


ON_TEXTS = {"dataset.name": "restaurants", "dataset.max_train": 60, "dataset.max_test": 20, "dataset.size_spread": 0.5}
ON_TEXTS |= {"model.name": "gpt2_tiny", "model.blocks": 2, "model.width": 16, "model.client.batch_size": 8}
ON_TEXTS |= {"model.adapter.rank": 2, "algorithm.align_epochs": 2, "algorithm.align_interval": 2, "rounds": 2}
WORDS_ON_TEXTS = [f"{name}={value}" for name, value in ON_TEXTS.items()]


def share_of_texts(**changes):
    good = {"tokens": np.array([[4, 9, 0], [1, 2, 3]], np.int32), "num_classes": np.array(10)}
    good |= {"labels": np.array([[[9, 0, 0], [1, 0, 0]], [[2, 3, 0], [0, 1, 1]]], np.int32)}
    return {name: array for name, array in (good | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("tokens", np.zeros((2, 3))),
        ("tokens", np.zeros((2, 3), np.int64)),
        ("tokens", np.zeros((0, 3), np.int32)),
        ("tokens", np.zeros((2, 0), np.int32)),
        ("tokens", np.zeros((2, 3, 1), np.int32)),
        ("tokens", np.array([[4, 10, 0], [1, 2, 3]], np.int32)),
        ("tokens", np.array([[4, -1, 0], [1, 2, 3]], np.int32)),
        ("labels", None),
        ("labels", np.zeros((2, 3), np.int32)),
        ("labels", np.zeros((2, 2, 4), np.int32)),
        ("labels", np.zeros((1, 2, 3), np.int32)),
        ("labels", np.zeros((2, 2, 3))),
        ("labels", np.full((2, 2, 3), -1, np.int32)),
        ("labels", np.full((2, 2, 3), 2, np.int32)),
        ("labels", np.array([[[10, 0, 0], [1, 0, 0]]] * 2, np.int32)),
        ("num_classes", None),
        ("num_classes", np.array(1)),
    ],
)
def test_a_bad_share_of_texts_is_refused_by_file_and_field(name, array, tmp_path):
    experiment, path = preset("smoke", num_clients=2, **ON_TEXTS), tmp_path / "client-0.npz"
    np.savez(path, **share_of_texts())
    assert len(read_share(path, experiment, 0)) == 2
    np.savez(path, **share_of_texts(**{name: array}))
    with pytest.raises(ValueError, match=rf"client-0.npz: {name} is .*; it must be"):
        read_share(path, experiment, 0)
    np.savez(path, **share())
    with pytest.raises(ValueError, match=r"client-0.npz.*: must be a share of texts, which model.name='gpt2_tiny'"):
        read_share(path, experiment, 0)


@pytest.mark.attack("data")
def test_a_share_that_claims_more_than_it_has_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE", 2**16)
    path, header = tmp_path / "client-0.npz", io.BytesIO()
    about = {"descr": "<i4", "fortran_order": False, "shape": (2**40, 3)}
    np.lib.format.write_array_header_1_0(header, about)
    np.savez(path, **share_of_texts(tokens=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tokens.npy", header.getvalue() + bytes(12))
    with pytest.raises(ValueError, match=r"client-0.npz: .*announces shape \(1099511627776, 3\)"):
        read_share(path, preset("smoke", num_clients=2, **ON_TEXTS), 0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, about | {"shape": (2**20, 1)})
        archive.writestr("tokens.npy", header.getvalue() + bytes(2**22))
    with pytest.raises(ValueError, match=r"client-0.npz: .*would unpack to .*, more than 100 times"):
        read_share(path, preset("smoke", num_clients=2, **ON_TEXTS), 0)


def test_a_damaged_share_is_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "client-0.npz"
    np.savez(path, **share())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"client-0.npz: .*damaged"):
        read_share(path, EXPERIMENT, 0)
    np.savez(path, **share(labels=np.array([print], dtype=object)))
    with pytest.raises(ValueError, match=r"client-0.npz: .*pickle"):
        read_share(path, EXPERIMENT, 0)


def test_a_client_with_a_share_reads_nothing_else(tmp_path, monkeypatch):
    (path, _) = write_shares(EXPERIMENT, tmp_path)
    monkeypatch.setattr(flower, "prepare", lambda *_: pytest.fail("the data set was looked for"))
    node = {"partition-id": 0, "num-partitions": 2, "data": str(path)}
    assert len(own_data(EXPERIMENT, node, "cpu")) == 30
    with pytest.raises(ValueError, match="--of=3: must be 2"):
        own_data(EXPERIMENT, node | {"num-partitions": 3}, "cpu")


def test_shares_that_are_there_stay(tmp_path, capsys):
    words = ["split", "--clients", "2", str(tmp_path), *(f"{name}={value}" for name, value in SMALL.items())]
    words = [word for word in words if not word.startswith("num_clients")]
    assert main(words) == 0
    assert capsys.readouterr().out.count("30 images") == 2
    (tmp_path / "client-0.npz").unlink()
    before = (tmp_path / "client-1.npz").read_bytes()
    assert main(words) == 2
    assert "client-1.npz: is there already" in capsys.readouterr().err
    assert not (tmp_path / "client-0.npz").exists() and (tmp_path / "client-1.npz").read_bytes() == before


SERVER = ["server", "--clients", "2"]
CLIENT = ["client", "--server", "a:1", "--client", "0", "--of", "2", "--data", "nowhere.npz"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["lokal"], "choose from 'local'"),
        (["local", "--clients", "two"], "--clients"),
        (["local", "--client-s", "2"], "--client-s"),
        (["local", "quick"], "quick"),
        (["local", "roundz=3"], "did you mean rounds"),
        (["local", "rounds=none"], "rounds"),
        (["local", "algorithm=psl"], "fed_avg, cse_fsl, fsl_sage"),
        (["local", "--clients", "0"], "num_clients"),
        (["local", "num_clients=3"], "--clients"),
        (["local", "save=True"], "save"),
        (["local", "clock.spread=1"], "clock"),
        (SERVER, "--certificates FOLDER and --insecure"),
        ([*SERVER, "--insecure", "--certificates", "x"], "--certificates FOLDER and --insecure"),
        ([*SERVER, "--certificates", "nowhere"], "fsl-sage-federate certs"),
        ([*CLIENT, "--insecure"], "nowhere.npz"),
        ([*CLIENT, "--insecure", "rounds=3"], "rounds=3"),
        ([*CLIENT, "--insecure", "--client", "2"], "--client=2: must be from 0 to 1"),
        ([*CLIENT, "--insecure", "--server", "host"], "HOST:PORT"),
        (["certs", "--clients", "0", "--host", "a", "x"], "--clients=0"),
        (["certs", "--clients", "1", "--host", "a:80", "x"], "--host='a:80'"),
    ],
)
def test_mistakes_are_answered_in_one_line(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(federate, "find_spec", lambda name: name)  # as if Flower were here
    try:
        status = main(words)
    except SystemExit as error:  # argparse
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_texts_are_split_and_described(tmp_path, capsys):
    assert main(["split", "--clients", "2", str(tmp_path), *WORDS_ON_TEXTS]) == 0
    first, second = capsys.readouterr().out.splitlines()
    sizes = [int(line.partition(": ")[2].removesuffix(" texts")) for line in (first, second)]
    assert 50 < sum(sizes) <= 60 and sizes[0] != sizes[1]


@needs_flower
@pytest.mark.slow
def test_texts_between_processes_end_with_the_history_of_the_simulation(tmp_path):
    with runs_in(tmp_path):
        assert main(["local", "--clients", "2", *WORDS_ON_TEXTS, "device=cpu"]) == 0
    experiment = preset("smoke", num_clients=2, **ON_TEXTS)
    one, other = train(experiment, "cpu", progress=False), RunStore(tmp_path).find(experiment)
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)


def test_who_has_no_flower_is_told_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(federate, "find_spec", lambda name: None)
    assert main(["local"]) == 2
    assert "pip install 'fsl_sage[distributed]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["local", "split", "certs", "server", "client"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert f"fsl-sage-federate {command}" in said
    assert ("KEY=VALUE are the words" in said) == (command in ("local", "split", "server"))


@needs_keys
def test_private_keys_are_private_and_never_overwritten(tmp_path, capsys):
    words = ["certs", "--clients", "2", "--host", "server.example", str(tmp_path)]
    before = os.umask(0)
    try:
        assert main(words) == 0
    finally:
        os.umask(before)
    assert capsys.readouterr().out.count("alone") == 3
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files if path.suffix == ".key"} == {
        "server.key": "0o600", "client.key": "0o600",
    }  # fmt: skip
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


class Meter:
    """What goes through a connection to the server, byte by byte."""

    def __init__(self, address):
        host, _, port = address.partition(":")
        self.bytes, self.to = 0, (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            try:
                ends = near, socket.create_connection(self.to)
            except OSError:  # the server has ended
                near.close()
                continue
            for source, sink in (ends, ends[::-1]):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def runs_in(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSL_SAGE_RUNS", str(folder))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run between processes by TLS, and two strangers who wanted to take part: what came of it."""
    folder, found = tmp_path_factory.mktemp("federation"), {}
    experiment = EXPERIMENT.replace(**{"algorithm.name": "cse_fsl", "model.width": 64})
    certificates = folder / "certs"
    main(["certs", "--clients", "3", "--host", "127.0.0.1", str(certificates)])
    (certificates / "server" / "client-2.pub").unlink()
    nodes = [{"data": str(path), "device": "cpu"} for path in write_shares(experiment, folder)]
    stolen, done = [], threading.Event()

    def steal(here):
        while not done.wait(0.05):
            stolen.append(ask(here, "/v1/runtime/acquire-task")[0])

    with runs_in(folder / "runs"), federation(folder / "room", [], certificates) as here:
        meters = [Meter(here.address) for _ in nodes]
        for i, (config, meter) in enumerate(zip(nodes, meters, strict=True)):
            here.node(i, config, meter.address, certificates / f"client-{i}")
        strangers = [here.node(2, nodes[0], certificates=certificates / "client-2")]
        strangers.append(here.node(3, nodes[0], patience=20))  # without TLS
        found["strangers"] = [stranger.wait(300) for stranger in strangers]
        thief = threading.Thread(target=steal, args=(here,))
        thief.start()
        (strange := folder / "strange" / "fsl_sage_app").mkdir(parents=True)
        write_app(strange.parent, {})
        (strange / "app.py").write_text(STRANGE.format(str(folder / "pwned")))

        def said():
            for text in here.said(here.submit(run_config(experiment, "cpu"))):
                if text.startswith("round 0:"):
                    found["handed in"] = flwr(here, folder / "home", "run", strange.parent, "here").returncode
                yield text

        follow(said(), experiment.rounds)
        done.set()
        thief.join()
        found["stolen"], found["pwned"], found["nodes"] = set(stolen), (folder / "pwned").exists(), here.nodes
        found["sent"] = sum(meter.bytes for meter in meters)
    return found | {"history": RunStore(folder / "runs").find(experiment), "left": here.processes.alive()}


@needs_flower
@pytest.mark.slow
def test_processes_end_with_the_history_of_the_simulation(run):
    one, other = train(run["history"].experiment, "cpu", progress=False), run["history"]
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert not run["left"]


@needs_flower
@pytest.mark.slow
def test_clients_and_server_send_little_more_than_the_ledger_says(run):
    """The average of the last round stays at the server: it would come with the next question. More than the ledger's
    are TLS, HTTP and the clients' looking for questions; what else they say (who they are, losses) is little."""
    ledger, rounds = run["history"].ledger, run["history"].experiment.rounds
    kept = ledger.query(f"round == {rounds - 1} and direction == 'down'")["bytes"].sum()
    assert kept > 0 and run["sent"] == pytest.approx(ledger["bytes"].sum() - kept, rel=0.03)


@needs_flower
@pytest.mark.slow
@pytest.mark.attack("network")
@pytest.mark.parametrize("which", [0, 1])
def test_an_unknown_key_and_plain_text_are_refused(which, run):
    assert run["strangers"][which]  # exit status


@needs_flower
@pytest.mark.slow
@pytest.mark.attack("network")
def test_a_stranger_runs_no_code_while_others_train(run):
    assert run["handed in"] and not run["pwned"]


@needs_flower
@pytest.mark.slow
@pytest.mark.attack("network")
def test_a_stranger_takes_no_task_of_a_run(run):
    assert run["stolen"] == {403}


@needs_flower
@pytest.mark.slow
def test_each_key_is_a_node(run):
    assert sorted(run["nodes"]) == [0, 1] and len(set(run["nodes"].values())) == 2


def inheriting(variable):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            found += [process] * (variable in process.environ())
    return found


@needs_flower
@pytest.mark.slow
@pytest.mark.attack("local")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_process_behind(how, tmp_path):
    mark = f"TEST_{uuid4().hex}"
    words = [sys.executable, "-c", "import sys; from fsl_sage.commands.federate import main; sys.exit(main())", "local"]
    here = os.environ | {mark: "1", "TMPDIR": str(tmp_path)}
    command = subprocess.Popen(words, env=here, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 600
    while sum("superexec" in " ".join(p.cmdline()) for p in inheriting(mark)) < 3:
        assert time.monotonic() < until and command.poll() is None
        time.sleep(1)
    command.send_signal(how)
    if how == signal.SIGKILL:  # it can clean up nothing: its watcher does
        command.wait(60)
        until = time.monotonic() + 60
        while inheriting(mark) and time.monotonic() < until:
            time.sleep(0.2)
    else:
        _, said = command.communicate(timeout=120)
        assert command.returncode == 130 and b"nothing is left running" in said
    assert not inheriting(mark) and not list(tmp_path.iterdir())


def test_a_client_that_is_not_let_in_is_told_why_and_knocks_again(tmp_path, capsys):
    reasons = [NoGate("nobody listens there (yet)", True), Refused("unknown key"), Refused("unknown key")]

    def ask():
        raise reasons.pop(0) if len(reasons) > 1 else reasons[0]

    with Processes(tmp_path) as processes, pytest.raises(RuntimeError, match=f"unknown key; .*{tmp_path.name}"):
        federate.keep_asking(ask, lambda: pytest.fail("a node was started"), Federation(processes), patience=0.3)
    said = capsys.readouterr().err
    assert said.count("nobody listens") == 1 == said.count("unknown key; trying again")


def test_a_node_that_ends_is_started_again(tmp_path, capsys):
    started = []

    class Ended:
        def wait(self):
            started.append(self)
            return 1

    def ask():
        if len(started) == 2:
            raise Refused("no more")

    with Processes(tmp_path) as processes, pytest.raises(RuntimeError, match="no more"):
        federate.keep_asking(ask, Ended, Federation(processes), patience=0.3)
    assert len(started) == 2 and "the node has ended with status 1" in capsys.readouterr().err


def test_processes_that_ignore_a_polite_end_are_ended(tmp_path):
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
    with Processes(tmp_path) as processes:
        deaf = processes.start("deaf", sys.executable, "-c", code, out=subprocess.PIPE)
        assert deaf.stdout.readline() == b"deaf\n"
        processes.end(seconds=1)
        assert not processes.alive()
    assert deaf.poll() is not None
    assert Federation(processes).folder == Path(tmp_path)
