"""The faults of test_faults.py where they happen: between Flower's processes, on this machine's loopback interface."""

import re
import threading
import time

import psutil
import pytest

from fsl_sage.experiments.runs import RunStore
from tests.support.asking import assert_simulated, small
from tests.support.proxy import Proxy

pytest.importorskip("flwr", reason="no flwr (the extra `distributed`): faults are tested without its processes")
federation = pytest.importorskip("fsl_sage.commands.federation", reason="no module that starts Flower's processes")

SECONDS = 150  # that the server waits for an answer: each one starts a process, which takes a busy machine long
NODE = {"device": "cpu"}


class Run:
    """A run of a federation: its lines as they come, with the time."""

    def __init__(self, here, experiment):
        self.lines, self.experiment = [], experiment
        self.process = here.submit(federation.run_config(experiment, "cpu", SECONDS))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for text in self.process.stdout:
            self.lines.append((time.monotonic(), text.decode("utf-8", "replace").rstrip()))

    def wait_for(self, pattern, seconds=3 * SECONDS):
        """When a line matched."""
        until, running = time.monotonic() + seconds, True
        while running and time.monotonic() < until:
            running = self.process.poll() is None
            for when, text in list(self.lines):
                if re.search(pattern, text):
                    return when
            time.sleep(0.2)
        raise AssertionError(f"no {pattern!r} in:\n" + "\n".join(text for _, text in self.lines[-40:]))

    def absent(self):
        """Round → clients that were left out, as the log says."""
        found = {}
        for _, text in self.lines:
            if match := re.search(r"round (\d+) without (client [\d, client]+):", text):
                found.setdefault(int(match[1]), []).extend(int(n) for n in re.findall(r"\d+", match[2]))
        return {rnd: sorted(clients) for rnd, clients in found.items()}


def stored(folder, experiment):
    """The run; where clients were absent it has a store of its own."""
    found = [RunStore(store).find(experiment) for store in (folder, *folder.glob("federated/*"))]
    (history,) = [history for history in found if history]
    return history


def when_at_work(here, place, seconds=200):
    """A client app is running for `place`: its processes."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = here.processes.alive(place)
        if any("clientapp" in " ".join(process.cmdline()) for process in alive):
            return alive
        time.sleep(0.2)
    raise AssertionError(f"{place} is not at work")


def test_nodes_killed_and_stopped_and_a_bad_network(tmp_path, monkeypatch):
    """SIGKILL in round 1, SIGSTOP past the deadline in round 2, stalls and resets in round 3, delays all the time."""
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "store"))
    experiment = small("cse_fsl", rounds=4)
    with federation.Processes(tmp_path) as processes, Proxy(0) as proxy:
        here = federation.Federation(processes, anyone=True, environment={"OMP_NUM_THREADS": "1"})
        here.link()  # without keys, as with --insecure: the proxy's connections are a stranger's
        proxy.target, proxy.mode = here.port, "delay"
        for i in range(2):
            here.node(i, NODE, f"127.0.0.1:{proxy.port}" if i == 0 else None)
        run = Run(here, experiment)
        run.wait_for("round 0:")
        for process in when_at_work(here, "client-1"):
            process.kill()
        killed = time.monotonic()
        here.node(1, NODE)
        print(f"round 1 ended {run.wait_for('round 1:') - killed:.0f} s after client 1 was killed")
        stopped = when_at_work(here, "client-1")
        for process in stopped:
            process.suspend()
        halted = time.monotonic()
        print(f"round 2 ended {run.wait_for('round 2:') - halted:.0f} s after client 1 was stopped")
        for process in stopped:
            process.resume()
        for mode in ("stall", "reset", "delay"):
            proxy.mode = mode
            time.sleep(5)
        run.wait_for("stored in ")
    history, absent = stored(tmp_path / "store", experiment), run.absent()
    print(f"{len(history.rounds)} rounds, left out: {absent}")
    assert len(history.rounds) == 4 and 1 in absent[1] and 1 in absent[2]
    assert_simulated(history, absent)


def test_a_server_that_is_killed_goes_on(tmp_path, monkeypatch):
    """First the server app: the nodes stay. Then all of the server's processes: a new SuperLink does not know its
    predecessor's nodes, they end and are started again, as `fsl-sage-federate client` does."""
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "store"))
    experiment = small("fed_avg", rounds=4)
    with federation.federation(tmp_path, [NODE] * 2) as here:
        run = Run(here, experiment)
        run.wait_for("round 1:")
        for process in here.processes.alive("server"):
            if "serverapp" in " ".join(process.cmdline()):
                process.kill()
        killed, run = time.monotonic(), Run(here, experiment)
        print(f"round 2 ended {run.wait_for('round 2:') - killed:.0f} s after the server app was killed")
        for process in (dying := here.processes.alive("server")):
            process.kill()
        psutil.wait_procs(dying, 30)  # until then the port answers
        killed = time.monotonic()
        here.link()
        for i in range(2):
            here.node(i, NODE)
        run = Run(here, experiment)
        print(f"round 3 ended {run.wait_for('round 3:') - killed:.0f} s after the server was killed")
        run.wait_for("stored in ")
    history = stored(tmp_path / "store", experiment)
    assert len(history.rounds) == 4
    assert_simulated(history, run.absent())
