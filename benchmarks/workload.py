"""The published settings, smaller: what two rounds on a fifth of CIFAR-10 take on this machine, and what comes of them.

`python benchmarks/workload.py --data-root FOLDER`, where FOLDER has cifar10.npz (nbs/08_data.sources says how it is
made). Everything is as in the preset `paper` (ResNet-18, 10 clients, batches of 256, q = 5, 100 passes of alignment)
but for what is said on the command line: images and rounds. Seconds are those of a whole `train`, evaluation included.
"""

import argparse
import time
from pathlib import Path

import torch
from bench import HERE, table, write_csv
from tqdm import tqdm

from fsl_sage.algorithms.record import label
from fsl_sage.config.experiment import PRECISIONS
from fsl_sage.config.presets import preset
from fsl_sage.core import choose_device
from fsl_sage.experiments.provenance import provenance
from fsl_sage.experiments.train import train

RUNS = {
    "fed_avg": {}, "sl_multi_server": {}, "sl_single_server": {}, "cse_fsl": {}, "fsl_sage": {},
    "fsl_sage_tolerance": {"algorithm.align_tolerance": 0.2},
}  # fmt: skip


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """A row of the table: one run."""
    changes = {"rounds": args.rounds, "dataset.max_train": args.images, "dataset.max_test": args.test_images}
    changes |= RUNS[name] | {"precision": args.precision, "comm_threshold_mb": None}
    experiment = preset("paper", name.removesuffix("_tolerance"), **changes)
    start = time.perf_counter()
    history = train(experiment, args.device, root=args.data_root, progress=False)
    seconds, last = time.perf_counter() - start, history.rounds.iloc[-1]
    return {
        "run": name, "label": label(experiment), "seconds": round(seconds, 1), "rounds": args.rounds,
        "images": args.images, "test_accuracy": round(float(last.test_accuracy), 4),
        "paper_bytes": int(last.paper_bytes),
        "alignment_passes": int(history.alignments.passes.sum()) if len(history.alignments) else 0,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-root", required=True, help="folder with cifar10.npz")
    add("--device", default="auto", help="auto, cpu, cuda, …")
    add("--precision", default="fp32", choices=PRECISIONS, help="of the arithmetic")
    add("--threads", type=int, default=2, help="cores, on a CPU (default: %(default)s)")
    add("--rounds", type=int, default=2, help="200 as published (default: %(default)s)")
    add("--images", type=int, default=10_000, help="50,000 as published (default: %(default)s)")
    add("--test-images", type=int, default=2_000, help="10,000 as published (default: %(default)s)")
    add("--only", nargs="+", default=list(RUNS), choices=list(RUNS), help="runs")
    add("--out", type=Path, default=HERE / "results", help="folder for workload.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = provenance(choose_device(args.device))
    where = {"device": made["device_name"], "threads": args.threads, "precision": args.precision}
    where |= {"torch": made["torch"], "finished": made["finished"]}
    rows = [measure(name, args) for name in tqdm(args.only, "runs")]
    print(table(rows))
    write_csv([row | where for row in rows], args.out / "workload.csv")


if __name__ == "__main__":
    main()
