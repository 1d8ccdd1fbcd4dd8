"""What another process on the same cores does to a round: seconds alone and beside it.

`python benchmarks/busy.py`. The other process trains with as many threads as the measured one. PyTorch's threads wait
for each other by asking again and again (OpenMP's default: for some milliseconds), for some microseconds
(`GOMP_SPINCOUNT`, which the package sets), or asleep (`OMP_WAIT_POLICY=passive`). Each must be set before PyTorch is
imported, so each is measured in a process of its own, which imports PyTorch before the package.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import torch
from bench import DEFAULT, HERE, federation, run_rounds, seconds, table, write_csv
from tqdm import tqdm

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.record import label
from fsl_sage.config.presets import preset
from fsl_sage.core import choose_device
from fsl_sage.experiments.provenance import provenance

WAITING = {"default": {}, "short": {"GOMP_SPINCOUNT": "3000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
CLIENTS, BATCHES, WIDTH, PASSES = 4, 5, 32, 5  # of a round; a client sends every fifth batch


def round_of(algorithm: str, batch_size: int) -> tuple[str, object]:
    """The algorithm's label, and its federation of random images."""
    changes = {"num_clients": CLIENTS, "model.client.batch_size": batch_size, "model.width": WIDTH}
    if algorithm == "fsl_sage":
        changes |= {"algorithm.align_epochs": PASSES, "algorithm.align_interval": 1}
    experiment = preset("paper", algorithm, **{"model.name": "resnet18"} | changes)
    return label(experiment), federation(experiment, BATCHES * batch_size, choose_device("cpu"))


def measured(args: argparse.Namespace) -> None:
    """The measured process: prints its seconds as JSON, algorithm by algorithm."""
    took = {}
    for algorithm in args.only:
        name, state = round_of(algorithm, args.batch_size)
        run_rounds(state, 1)  # warms up
        took[name] = statistics.median(seconds(partial(run_rounds, state, 1)) for _ in range(args.repeats))
    print(json.dumps(took))


def beside(args: argparse.Namespace) -> None:
    """The other process: trains until it is killed."""
    _, state = round_of("sl_single_server", args.batch_size)
    for rnd in count():
        run_rounds(state, 1)
        if rnd == 0:
            print("trains", flush=True)


def started(role: str, waiting: str, args: argparse.Namespace) -> subprocess.Popen:
    """This program again, in that role, its threads waiting in that way."""
    ours = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    own = {name: value for name, value in os.environ.items() if name not in ours} | WAITING[waiting]
    words = [role, "--threads", str(args.threads), "--repeats", str(args.repeats), "--batch-size", str(args.batch_size)]
    command = [sys.executable, str(Path(__file__)), *words, "--only", *args.only]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True)


def both(waiting: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of the table: alone, then with the other process at work."""
    alone = json.loads(started("measured", waiting, args).communicate()[0])
    other = started("beside", "default", args)
    try:
        other.stdout.readline()  # it trains
        crowded = json.loads(started("measured", waiting, args).communicate()[0])
    finally:
        other.kill()
        other.communicate()
    return [
        {"label": name, "waiting": waiting, "threads": args.threads, "batch_size": args.batch_size,
         "seconds_alone": round(alone[name], 3), "seconds_beside": round(crowded[name], 3),
         "times": round(crowded[name] / alone[name], 2)}
        for name in alone
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("role", nargs="?", default="compare", choices=("compare", "measured", "beside"), help="of this process")
    add("--threads", type=int, default=2, help="cores of each process (default: %(default)s)")
    add("--repeats", type=int, default=3, help="how often each round is timed (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="samples of a batch (default: %(default)s)")
    add("--only", nargs="+", default=list(DEFAULT), choices=list(ALGORITHMS), help="algorithms")
    add("--waiting", nargs="+", default=list(WAITING), choices=list(WAITING), help="how threads wait (default: all)")
    add("--out", type=Path, default=HERE / "results", help="folder for busy.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.role != "compare":
        return {"measured": measured, "beside": beside}[args.role](args)
    rows = [row for waiting in tqdm(args.waiting, "ways to wait", leave=False) for row in both(waiting, args)]
    print(table(rows))
    made = provenance(choose_device("cpu"))
    where = {"device": made["device_name"], "torch": made["torch"], "finished": made["finished"]}
    write_csv([row | where for row in rows], args.out / "busy.csv")


if __name__ == "__main__":
    main()
