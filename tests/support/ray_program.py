"""A sweep on a Ray cluster of two worker nodes, one of which is lost on the way: run by test_cluster.py in a network of
its own. Arguments: the store's folder, the number of runs."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from fsl_sage.commands.figures import machines
from fsl_sage.config.presets import preset
from fsl_sage.experiments.pool import train_missing
from fsl_sage.experiments.runs import RunStore


def children(node):
    try:
        return psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    except psutil.Error:  # one has just ended
        return []


def command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def lose_a_worker(cluster, nodes, store, lost):
    """Once a run is stored, kill a node that is at work, as a power failure would."""
    while not lost:
        time.sleep(0.05)
        for node in nodes if list(store.glob("*/provenance.json")) else ():
            if any("PoolActor" in command(child) for child in children(node)):
                lost.append(sorted(path.stem for path in (store / "locks").glob("*.lock")))  # what was being trained
                cluster.remove_node(node, allow_graceful=False)
                return


def main(store: Path, n: int) -> None:
    here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | here)
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(2)]
    os.environ["RAY_ADDRESS"], lost = cluster.address, []
    smaller = {"rounds": 16, "dataset.max_train": 300}
    experiments = [preset("smoke", "sl_single_server", seed=seed, **smaller) for seed in range(n)]
    threading.Thread(target=lose_a_worker, args=(cluster, nodes, store, lost), daemon=True).start()
    with machines("ray", None) as jobs:
        failed = train_missing(store, experiments, "cpu", progress=False, jobs=jobs)
    found = [RunStore(store).find(run) is not None for run in experiments]
    print(json.dumps({"jobs": jobs, "found": found, "failed": [str(e) for e in failed.values()], "lost": lost}))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
