"""Strangers before the gate: of other machines, of this one, with keys and without; and why a client is not let in."""

import http.client
import multiprocessing
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from importlib.util import find_spec

import psutil
import pytest

from fsl_sage.machines import certificates, gate
from fsl_sage.machines.certificates import make_certificates
from fsl_sage.machines.gate import CLIENTS, KEY, REGISTER, NoGate, Refused, knock, own_key, signature
from fsl_sage.machines.processes import Processes, listening

pytest.importorskip("cryptography", reason="cryptography is missing: it comes with Flower")
federate = pytest.importorskip("fsl_sage.commands.federate")
federation = pytest.importorskip("fsl_sage.commands.federation")
from tests.support.strangers import STRANGE, ask, flwr  # noqa: E402

needs_flower = pytest.mark.skipif(
    not find_spec("flwr"), reason="Flower is missing: pip install 'fsl_sage[distributed]'"
)
network, local = pytest.mark.attack("network"), pytest.mark.attack("local")
MIB = 1 << 20
MOST = 3 * MIB  # that a client may send at once


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Folders of a server, a client, and a client whom the server does not know."""
    server, *clients = make_certificates(tmp_path_factory.mktemp("keys") / "certs", ["server.example"], 2)
    (server / "client-1.pub").unlink()
    return server, *clients


@pytest.fixture(scope="module")
def link(keys, tmp_path_factory):
    """A SuperLink with keys, behind the gate. This process is a stranger to it: it has no mark."""
    with Processes(tmp_path_factory.mktemp("link")) as processes:
        here = federation.Federation(processes, certificates=keys[0])
        here.process = here.link(MOST)
        yield here


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory):
    """A SuperLink as `fsl-sage-federate local` starts it: without keys, for its own processes."""
    with Processes(tmp_path_factory.mktemp("unlocked")) as processes:
        here = federation.Federation(processes)
        here.process = here.link()
        yield here


INSIDE = ["/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs", "/v1/control/list-nodes",
          "/v1/control/stop-run", "/v1/control/stream-logs", "/v1/runtime/acquire-task", "/v1/runtime/pull-task-input",
          "/v1/runtime/push-object", *REGISTER, "/docs", "/openapi.json", "/health", "//v1/control/start-run",
          "/v1/fleet/../control/start-run", "/gate/../v1/control/start-run"]  # fmt: skip


@needs_flower
@network
@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("key", [False, True])
def test_nobody_else_reaches_what_is_for_the_servers_own_processes(path, key, link, keys):
    """A client with a key neither: it would run code on the server and on all other clients."""
    assert ask(link, path, signature(own_key(keys[1])) if key else {})[0] == 403


@needs_flower
@local
@pytest.mark.parametrize("path", [*INSIDE, *CLIENTS])
def test_nobody_else_reaches_a_server_without_keys(path, unlocked):
    assert ask(unlocked, path)[0] == 403


@needs_flower
@network
@pytest.mark.parametrize("path", CLIENTS)
def test_a_clients_routes_are_for_owners_of_keys(path, link, keys):
    own, stranger = signature(own_key(keys[1])), signature(own_key(keys[2]))
    assert ask(link, path)[0] == ask(link, path, stranger)[0] == ask(link, path, {KEY: own[KEY]})[0] == 403
    assert ask(link, path, own)[0] not in (403, 404)  # Flower's own answer to an empty question


def asked_by_another_user(address, path, said):
    os.setgid(65534)
    os.setuid(65534)
    host, port = address.split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=60)
    line.request("POST", path, b"", {"Content-Type": "application/protobuf"})
    said.put((os.getuid(), line.getresponse().status))


@needs_flower
@local
@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", REGISTER[0]])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_this_machine_is_a_stranger(path, unlocked):
    fork = multiprocessing.get_context("fork")
    said = fork.SimpleQueue()
    process = fork.Process(target=asked_by_another_user, args=(unlocked.address, path, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and said.get() == (65534, 403)


ASKS = """if True:
    import http.client, sys
    from fsl_sage.machines.gate import knock
    print(knock(sys.argv[1]))
"""


@needs_flower
def test_the_servers_own_processes_are_known(unlocked):
    one = unlocked.processes.start("own", sys.executable, "-c", ASKS, unlocked.address, out=subprocess.PIPE)
    assert one.communicate(timeout=60)[0] == b"one of our own\n"
    assert knock_says(unlocked.address) == "the server is for its own processes only"


def knock_says(address, ca=None, key=None):
    with pytest.raises((Refused, NoGate)) as error:
        knock(address, ca, key)
    return str(error.value)


@needs_flower
@local
def test_nobody_borrows_the_address_of_the_servers_own_process(unlocked):
    """Web servers believe a proxy on the same machine when it says for whom it asks, port included."""
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
    code += "print(s.getsockname()[1], flush=True); s.recv(1)"
    port = str(unlocked.port)
    own = unlocked.processes.start("own", sys.executable, "-c", code, port, out=subprocess.PIPE)
    borrowed = f"127.0.0.1:{own.stdout.readline().decode().strip()}"
    assert ask(unlocked, "/v1/control/list-runs", {"X-Forwarded-For": borrowed})[0] == 403
    own.kill()


@needs_flower
@network
@pytest.mark.parametrize("who", ["nobody", "a stranger", "a public key"])
def test_a_large_body_is_not_read(who, link, keys):
    """600 MiB: it is refused by its headers; the server holds no more than before."""
    headers = {"nobody": {}, "a stranger": signature(own_key(keys[2]))}.get(who)
    headers = {KEY: signature(own_key(keys[1]))[KEY]} if headers is None else headers
    assert grows_by(link, headers | {"Content-Length": str(600 * MIB)}, 600) < 20 * MIB


@needs_flower
@network
@pytest.mark.parametrize("says", ["the truth", "nothing"])
def test_a_client_sends_no_more_than_is_due(says, link, keys):
    length = {"Content-Length": str(600 * MIB)} if says == "the truth" else {}  # in chunks
    assert grows_by(link, signature(own_key(keys[1])) | length, 600) < 20 * MIB
    assert "client-0 " in (link.folder / "server.log").read_text().split("gate: ")[-1]  # the culprit is named


def grows_by(here, headers, mebibytes):
    """Bytes by which the server grows at most while it is sent so much. It must refuse."""
    process, peak, done = psutil.Process(here.process.pid), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status, _ = ask(here, "/v1/fleet/push-object", headers, (bytes(MIB) for _ in range(mebibytes)))
    done.set()
    watcher.join()
    closed = "BrokenPipeError", "ConnectionResetError", "SSLEOFError"  # while the stranger still sends
    assert status in (403, *closed)
    return peak[0] - before


@needs_flower
@network
@pytest.mark.slow
def test_a_stranger_hands_in_no_run(link, tmp_path):
    federation.write_app(tmp_path / "app", {})
    (tmp_path / "app" / "fsl_sage_app" / "app.py").write_text(STRANGE.format(str(tmp_path / "pwned")))
    assert flwr(link, tmp_path / "home", "run", tmp_path / "app", "here", "--stream").returncode != 0
    assert not (tmp_path / "pwned").exists()


@needs_flower
@network
@pytest.mark.slow
def test_a_stranger_registers_no_key(link, keys, tmp_path):
    public = own_key(keys[2]).public_key()
    from cryptography.hazmat.primitives import serialization as form

    (tmp_path / "stranger.pub").write_bytes(public.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH))
    assert flwr(link, tmp_path / "home", "supernode", "register", tmp_path / "stranger.pub", "here").returncode != 0
    assert ask(link, CLIENTS[0], signature(own_key(keys[2])))[0] == 403


@needs_flower
@local
@pytest.mark.slow
def test_a_clients_own_interface_is_for_its_own_processes(link, keys):
    """A SuperNode listens, too: who takes its tasks answers for the client."""
    link.node(0, {}, certificates=keys[1])
    until, ports = time.monotonic() + 120, []
    while not ports and time.monotonic() < until:
        for process in link.processes.alive("client-0"):
            with suppress(psutil.Error):
                ports += [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    (port,) = set(ports)
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    line.request("POST", "/v1/runtime/acquire-task", b"", {"Content-Type": "application/protobuf"})
    assert line.getresponse().status == 403
    link.processes.end("client-0")


@needs_flower
def test_flower_serves_what_the_gate_knows(link):
    """Fails when another Flower has other routes, headers or ports: then the gate must be looked at again."""
    from flwr.common import constant
    from flwr.supercore import constant as own
    from flwr.superlink.routers.fleet.router import router

    assert {route.path for route in router.routes} == {*CLIENTS, *REGISTER}
    assert constant.TIMESTAMP_HEADER == gate.TIME and own.FLEET_HTTP_PUBLIC_KEY_HEADER == gate.KEY
    assert own.FLEET_HTTP_SIGNATURE_HEADER == gate.SIGNATURE
    assert gate.FAST == constant.SYSTEM_TIME_TOLERANCE and gate.SLOW == gate.FAST + constant.TIMESTAMP_TOLERANCE
    open_ports = {
        connection.laddr.port
        for process in link.processes.alive("server")
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert open_ports == {link.port}


def test_why_a_client_is_not_let_in(keys, tmp_path, monkeypatch):
    """One sentence each: authority, name, encryption, time, nobody there."""
    server = keys[0]
    other, *_ = make_certificates(tmp_path / "other", ["server.example"], 1)
    monkeypatch.setattr(certificates, "VALID", timedelta(minutes=-10))
    expired, *_ = make_certificates(tmp_path / "expired", ["server.example"], 1)
    with Shown(server) as shown, Shown(expired) as old, Shown(None) as plain:
        assert "does not name the authority" in knock_says(shown.address, other / "ca.pem")
        assert "expired" in knock_says(old.address, expired / "ca.pem")
        named = shown.address.replace("127.0.0.1", "127.0.0.2")
        assert "is not for this address" in knock_says(named, server / "ca.pem")
        assert "does not speak TLS" in knock_says(plain.address, server / "ca.pem")
        assert "without TLS, or is no server of fsl_sage" in knock_says(shown.address)
    assert "no server listens" in knock_says(shown.address)
    assert "no machine of this name" in knock_says("no.such.machine.invalid:1")


class Shown:
    """Somebody who shows a certificate, and then says nothing of use."""

    def __init__(self, folder):
        self.context = folder and ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if folder:
            self.context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def __enter__(self):
        self.listener = listening("0.0.0.0")
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def serve(self):
        with suppress(OSError):  # it is closed
            while True:
                line, _ = self.listener.accept()
                with suppress(OSError), line:
                    line = self.context.wrap_socket(line, server_side=True) if self.context else line
                    line.recv(1000)
                    line.sendall(b"hello\r\n")

    def __exit__(self, *_):
        with suppress(OSError):
            self.listener.shutdown(2)  # wakes `accept`
        self.listener.close()


@needs_flower
def test_why_a_key_is_not_let_in(link, keys, monkeypatch):
    ca = keys[0] / "ca.pem"
    assert knock(link.address, ca, own_key(keys[1])) == "client-0"
    assert "does not know this key" in knock_says(link.address, ca, own_key(keys[2]))
    assert "only clients that have one" in knock_says(link.address, ca)
    for seconds, says in ((60, "seconds ahead of"), (-600, "seconds behind")):

        class Clock(datetime):
            @classmethod
            def now(cls, zone, seconds=seconds):
                return datetime.now(zone) + timedelta(seconds=seconds)

        with monkeypatch.context() as patch:
            patch.setattr(gate, "datetime", Clock)
            found = re.search(r"clock is (\d+) (.*) the server's", knock_says(link.address, ca, own_key(keys[1])))
            assert found[2] == says and abs(int(found[1]) - abs(seconds)) < 10


@network
def test_a_port_that_another_program_has_is_refused_at_once(capsys, monkeypatch, tmp_path):
    """Two servers at one port: the second one's run was executed in the first one's server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(federate, "find_spec", lambda name: name)  # as if Flower were here
    with listening() as other:
        port = str(other.getsockname()[1])
        assert federate.main(["server", "--clients", "2", "--insecure", "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}: must be a port that no other program has" in said and said.count("\n") == 1


@network
def test_what_a_stranger_writes_is_not_written_to_the_log(capsys):
    one = gate.Gate(None, "mark", 0, {})
    one.tell("192.0.2.1", "/\x1b]0;pwned\x07\n gate: forged", "no")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.strip().isprintable()
