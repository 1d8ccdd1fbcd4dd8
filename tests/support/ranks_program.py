"""What each rank runs in test_ranks.py; rank 0 prints what was sent. Arguments: STORE LIST.json"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fsl_sage.config.experiment import from_dict
from fsl_sage.experiments.runs import RunStore
from fsl_sage.ledger import KINDS
from fsl_sage.machines.ranks import RankMail, train_on_ranks
from tests.support.double import double_precision

counted = {}


class CountingMail(RankMail):
    def send(self, to, kinds, data):
        kind = "ledger" if set(kinds) <= set(KINDS) else kinds[0]
        counted[kind] = counted.get(kind, 0) + len(data)
        super().send(to, kinds, data)


def interface_bytes():
    """Bytes this network namespace's loopback interface has sent."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


def idle_rate():
    """Bytes a second that the group's processes exchange to know of each other."""
    before = interface_bytes()
    time.sleep(2)
    return (interface_bytes() - before) / 2


def main(store, plan):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    single, double = json.loads(Path(plan).read_text())
    with double_precision():
        for tree in double:
            history = train_on_ranks(from_dict(tree), "cpu", progress=False)
            if history is not None:
                RunStore(Path(store) / "double").save(history)
    for tree in single:
        counted.clear()
        experiment = from_dict(tree)
        dist.barrier()
        idle = idle_rate()
        dist.barrier()
        before, start = interface_bytes(), time.monotonic()
        history = train_on_ranks(experiment, "cpu", progress=False)
        dist.barrier()
        interface = interface_bytes() - before - idle * (time.monotonic() - start)
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, counted)
        if history is not None:
            RunStore(store).save(history)
            sent = {kind: sum(one.get(kind, 0) for one in everybody) for one in everybody for kind in one}
            print(json.dumps({"hash": experiment.hash, "interface": interface, **sent}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    from fsl_sage.machines import ranks

    ranks.RankMail = CountingMail
    main(*sys.argv[1:])
