"""A server and clients in processes of their own, over the loopback interface, give what the simulation gives."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.config.presets import preset
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train
from fsl_sage.machines.remote import check_remote
from tests.support import ROOT
from tests.support.double import double_precision

SMALL = {"num_clients": 2, "rounds": 2, "dataset.max_train": 100, "dataset.max_test": 20, "dataset.val_size": 20}
SMALL |= {"dataset.distribution": "noniid_dirichlet", "model.width": 8, "model.client.batch_size": 16}
OWN = {
    "fsl_sage": {"algorithm.align_epochs": 2, "algorithm.align_interval": 2, "algorithm.server_update_interval": 2},
    "sglr": {"algorithm.lr_power": 1.0},
}
ALONE = (
    "centralised",
    "async_splitfed",
    "gas",
    "scaffold",
    "scala",
    "cycle_psl",
    "cycle_sfl",
    "mix2sfl",
)  # refused there
EXPERIMENTS = {name: preset("smoke", name, **SMALL | OWN.get(name, {})) for name in ALGORITHMS if name not in ALONE}
EXPERIMENTS["fsl_sage, jointly"] = EXPERIMENTS["fsl_sage"].replace(**{"algorithm.align_jointly": True})
EQUAL = {"dataset.distribution": "balanced", "dataset.max_train": 200, "algorithm.active_fraction": 0.5}
EXPERIMENTS["sglr, averaged"] = EXPERIMENTS["sglr"].replace(**EQUAL)
BUDGET = {"rounds": 5, "comm_threshold_mb": 1.0, "eval_every": 3}
EXPERIMENTS["psl, within a budget"] = EXPERIMENTS["psl"].replace(**BUDGET)
for name in ("fsl_sage", "psl", "ssl", "fed_avg"):
    EXPERIMENTS[f"{name}, half of the clients"] = EXPERIMENTS[name].replace(participation=0.5, rounds=3)
LIARS = {"hostile.clients": [0], "hostile.attack": "sign_flip", "hostile.scale": 2.0}
EXPERIMENTS["fed_avg, one flips"] = EXPERIMENTS["fed_avg"].replace(**LIARS)
EXPERIMENTS["cse_fsl, one flips, clipped"] = EXPERIMENTS["cse_fsl"].replace(**LIARS | {"average.name": "clip"})
TEXTS = {"dataset.name": "restaurants", "dataset.max_train": 60, "dataset.max_test": 20, "dataset.val_size": 10}
TEXTS |= {"model.name": "gpt2_tiny", "model.blocks": 2, "model.width": 16, "model.client.batch_size": 8}
TEXTS |= {"num_clients": 2, "rounds": 2, "dataset.distribution": "iid", "dataset.size_spread": 0.5}
ADAPTED = {"model.adapter": {"rank": 2, "dropout": 0.1}, "model.server.optimizer.name": "adamw"}
for name, changes in {
    "fsl_sage": ADAPTED | {"algorithm.language_branch": True, "algorithm.align_batch_size": 7},
    "fsl_sage, whole": {},
    "sl_single_server": ADAPTED,
    "sl_multi_server, whole": {},
    "cse_fsl, within a budget": ADAPTED | {"rounds": 5, "comm_threshold_mb": 0.32, "eval_every": 9},
    "ssl, within a budget": {"rounds": 5, "comm_threshold_mb": 0.99, "eval_every": 9},
}.items():
    algorithm = name.partition(",")[0]
    EXPERIMENTS[f"texts, {name}"] = preset("smoke", algorithm, **TEXTS | OWN.get(algorithm, {}) | changes)
BITS = {"codec.smashed.bits": 4, "codec.cut_grad.bits": 4, "codec.cut_grad.stochastic": True}
SPARSE = {"codec.smashed.name": "random_top_k", "codec.cut_grad.name": "top_k"}
PIECES = {"codec.smashed.name": "product", "codec.smashed.correction": 0.1}
CODED = {"fsl_sage": BITS, "psl": SPARSE, "sl_single_server": PIECES, "sglr, averaged": BITS}
EXPERIMENTS |= {f"{name}, packed": EXPERIMENTS[name].replace(**changes) for name, changes in CODED.items()}
DOUBLE = "fsl_sage", "sglr"  # in double precision too
PROGRAM = "tests.support.ranks_program"
OWN_NETWORK = ["unshare", "--net", "--map-root-user"]  # a loopback interface that nobody else uses
UP = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x49))"


def has_own_network():
    return shutil.which("unshare") and not subprocess.run([*OWN_NETWORK, sys.executable, "-c", UP]).returncode


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """All experiments in one group of ranks: the store, and what was sent for each, by its hash."""
    folder = tmp_path_factory.mktemp("ranks")
    plan = [e.to_dict() for e in EXPERIMENTS.values()], [EXPERIMENTS[name].to_dict() for name in DOUBLE]
    (folder / "plan.json").write_text(json.dumps(plan))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--module", PROGRAM]
    command = [sys.executable, *words, str(folder), str(folder / "plan.json")]
    if has_own_network():
        start = f"{UP}; import os, sys; os.execv(sys.executable, {command!r})"
        command = [*OWN_NETWORK, sys.executable, "-c", start]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return RunStore(folder), {line.pop("hash"): line for line in lines}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_ranks_end_with_the_history_of_the_simulation(on_ranks, name):
    store, _ = on_ranks
    one, other = train(EXPERIMENTS[name], "cpu", progress=False), store.find(EXPERIMENTS[name])
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert one.stopped == other.stopped


@pytest.mark.parametrize("name", DOUBLE)
def test_in_double_precision_too(on_ranks, name):
    with double_precision():
        one, other = train(EXPERIMENTS[name], "cpu", progress=False), RunStore(on_ranks[0].root / "double")
    pd.testing.assert_frame_equal(one.rounds, other.find(EXPERIMENTS[name]).rounds, rtol=1e-6, atol=0)
    single = train(EXPERIMENTS[name], "cpu", progress=False)
    sent = [run.rounds.paper_bytes.iloc[-1] for run in (one, single)]
    assert sent[0] == pytest.approx(2 * sent[1], rel=0.01)  # labels and counts do not double


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("sglr, averaged")])
def test_what_the_ledger_calls_wire_is_what_is_sent(on_ranks, name):
    store, sent = on_ranks
    experiment = EXPERIMENTS[name]
    carried = store.find(experiment).ledger.query("kind not in ('frozen', 'kv')")  # these are noted, and never sent
    assert sent[experiment.hash]["ledger"] == carried["bytes"].sum()


@pytest.mark.skipif(not has_own_network(), reason="no network namespace: others use the loopback interface too")
def test_the_interface_carries_little_more_than_the_messages(on_ranks):
    """Over all runs: on a busy machine TCP cuts a small run's messages into more packets, each with a header."""
    broadcast = [e.hash for name, e in EXPERIMENTS.items() if name.startswith("sglr, averaged")]  # none between two
    runs = [run for name, run in on_ranks[1].items() if name not in broadcast]
    interface = sum(run["interface"] for run in runs)  # less what the idle group says of itself
    messages = sum(n for run in runs for kind, n in run.items() if kind != "interface")
    assert interface == pytest.approx(messages, rel=0.03)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fed_avg", {"algorithm.share_server": True}),
        ("fsl_sage", {"algorithm.warm_start": True}),
        ("fsl_sage", {"algorithm.align_tolerance": 0.1}),
        ("fsl_sage", {"clock.spread": 0.5}),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(name, change):
    field = "clock" if "clock.spread" in change else next(iter(change))
    with pytest.raises(ValueError, match=field):
        check_remote(EXPERIMENTS[name].replace(**change))
