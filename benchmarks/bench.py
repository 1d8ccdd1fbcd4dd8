"""How close rounds come to bare compute, and what many clients cost.

`make bench`, or `python benchmarks/bench.py --help`. Everything is timed in one process, yardstick and round in turn:
the machines are shared, so only ratios within one run mean something.

The yardstick of a round is the forward and backward pass of the same layers on the same batches, in the same memory
layout and precision, with nothing around it: no augmentation, no optimiser, no federation. For CSE-FSL and FSL-SAGE
that includes the auxiliary models and, for FSL-SAGE, every pass of an alignment.

The third table has the processor time of starting: the package, the command's help, and PyTorch beside them.
"""

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from fsl_sage.algorithms.all import ALGORITHMS, LABELS
from fsl_sage.algorithms.base import Metrics
from fsl_sage.algorithms.fleet import clients_in_flight
from fsl_sage.algorithms.record import label
from fsl_sage.algorithms.state import State
from fsl_sage.config.experiment import PRECISIONS, Experiment
from fsl_sage.config.presets import preset
from fsl_sage.core import arithmetic, atomic_path, choose_device
from fsl_sage.costs.table import CountFlops
from fsl_sage.data.batches import ClientData
from fsl_sage.data.images import Images
from fsl_sage.experiments.provenance import provenance
from fsl_sage.ledger import Ledger
from fsl_sage.networks.auxiliary import estimate_cut_grad, true_cut_grad
from fsl_sage.networks.part import Part
from fsl_sage.papers.plots import new_figure
from fsl_sage.papers.saving import stamp

HERE = Path(__file__).parent
WHOLE = ("centralised", "fed_avg", "sl_single_server", "sl_multi_server", "ssl")  # one batch after another
DEFAULT = ("fed_avg", "sl_multi_server", "sl_single_server", "cse_fsl", "fsl_sage", "psl", "sglr")
JOINT = ("psl", "sfl", "sglr")  # one server batch of all clients
ROUNDS = 2  # in a unit of measurement: the first of them aligns FSL-SAGE's auxiliary models


def federation(experiment: Experiment, samples: int, device: torch.device) -> State:
    """Clients with `samples` random images each."""
    gen = torch.Generator().manual_seed(0)
    data = []
    for i in range(experiment.num_clients):
        x = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8, generator=gen)
        images = Images(x.to(device), torch.randint(10, (samples,), generator=gen).to(device))
        batch_size = experiment.model.client.batch_size
        data.append(ClientData(images, [0.5] * 3, [0.25] * 3, 10, batch_size, client=i, augment=True))
    return ALGORITHMS[experiment.algorithm.name].init(experiment, data, Ledger())


def wait_for(part: Part) -> None:
    """Wait until the part's device has computed all that it was given: a loss is known before the steps after it."""
    device = next(part.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_rounds(state: State, rounds: int = ROUNDS) -> None:
    """What is measured: rounds as `train` runs them, with their ledger and metrics."""
    with arithmetic(state.experiment.precision):
        for rnd in range(rounds):
            metrics: Metrics = ALGORITHMS[state.experiment.algorithm.name].run_round(state, rnd, Ledger())
            float(metrics.losses[-1].value)  # the round's one wait, as in `train`
    wait_for(state.clients[0])


# ------------------------------------------------------------------------------------------------------- yardstick


Descend = Callable[..., None]  # (output to go back from, its gradient or None, parts)


def backward(out: torch.Tensor, grad: torch.Tensor | None, *parts: Part) -> None:
    """A backward pass into fresh gradients."""
    for part in parts:
        part.optimizer.zero_grad(set_to_none=True)
    out.backward(grad)


def step(out: torch.Tensor, grad: torch.Tensor | None, *parts: Part) -> None:
    """A backward pass and a step of every optimiser."""
    backward(out, grad, *parts)
    for part in parts:
        part.optimizer.step()


def bare_compute(state: State, batches: list[list[list[tuple]]], descend: Descend) -> None:
    """The arithmetic of `run_rounds`; `batches[round][client]` are (x, y) at hand."""
    with arithmetic(state.experiment.precision):
        for rnd, clients in enumerate(batches):
            if state.experiment.algorithm.name in JOINT:
                joint_round(state, clients, descend)
            elif state.experiment.algorithm.name in WHOLE:
                for i, own in enumerate(clients):
                    client, server = state.clients[i], state.servers[i % len(state.servers)]
                    for x, y in own:
                        descend(F.cross_entropy(server(client(x)), y), None, client, server)
            else:
                auxiliary_round(state, rnd, clients, descend)
        wait_for(state.clients[0])


def joint_round(state: State, clients: list[list[tuple]], descend: Descend) -> None:
    """All clients' smashed data in one batch of the server."""
    for batches in zip(*clients, strict=True):
        smashed = torch.cat([part(x) for part, (x, _) in zip(state.clients, batches, strict=True)])
        loss = F.cross_entropy(state.servers[0](smashed), torch.cat([y for _, y in batches]))
        descend(loss, None, *state.clients, *state.servers)


def auxiliary_round(state: State, rnd: int, clients: list[list[tuple]], descend: Descend) -> None:
    """CSE-FSL and FSL-SAGE: auxiliary losses at every step, the server at every q-th, alignment."""
    config, (server,) = state.experiment.algorithm, state.servers
    sage = config.name == "fsl_sage"
    for client, aux, own in zip(state.clients, state.auxes, clients, strict=True):
        for s, (x, y) in enumerate(own):
            smashed = client(x)
            uploaded = smashed.detach()
            if s % config.server_update_interval == 0:
                descend(F.cross_entropy(server(uploaded), y), None, server)
            if sage and s == 0 and rnd % config.align_interval == 0:
                align(aux, uploaded, y, true_cut_grad(server, uploaded, y), config.align_epochs, descend)
            if sage:
                descend(smashed, estimate_cut_grad(aux, smashed, y)[0], client)
            else:
                descend(F.cross_entropy(aux(smashed), y), None, client, aux)


def align(
    aux: Part, smashed: torch.Tensor, y: torch.Tensor, target: torch.Tensor, passes: int, descend: Descend
) -> None:
    """Passes over one batch."""
    for _ in range(passes):
        estimate, _ = estimate_cut_grad(aux, smashed, y, create_graph=True)
        descend((estimate - target).square().sum(), None, aux)


# --------------------------------------------------------------------------------------------------------- measures


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Peak:
    """The most memory in use: of the GPU, or of this process less the files that are mapped into it."""

    mib = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Fills in the peak at the end of the block."""
    peak, done = Peak(), threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mib = torch.cuda.max_memory_allocated(device) / 2**20
        return
    import psutil  # not needed on a GPU, whose machine may lack it

    process = psutil.Process()

    def watch() -> None:
        while not done.wait(0.02):
            memory = process.memory_info()
            peak.mib = max(peak.mib, (memory.rss - memory.shared) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def ceiling(device: torch.device, precision: str, size: int) -> float:
    """FLOP/s of the best of five products of two square matrices."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def product() -> None:
        float((a @ b)[0, 0])

    with arithmetic(precision):
        return 2 * size**3 / min(seconds(product) for _ in range(6))


def measure(algorithm: str, args: argparse.Namespace, device: torch.device, most: float) -> dict[str, object]:
    """A row of the table: the algorithm's rounds beside their yardstick, in turn."""
    clients = 1 if algorithm == "centralised" else args.clients
    changes = {"num_clients": clients, "model.client.batch_size": args.batch_size, "precision": args.precision}
    if algorithm in ("fsl_sage", "cse_fsl"):
        changes["algorithm.server_update_interval"] = args.batches
    if algorithm == "fsl_sage":
        changes |= {"algorithm.align_interval": ROUNDS, "algorithm.align_epochs": args.passes}
        changes["algorithm.max_dataset_size"] = args.batch_size  # the last upload, as in the yardstick
    experiment = preset("paper", algorithm, **{"model.name": "resnet18", "model.width": args.width} | changes)
    samples = args.batches * args.batch_size
    state, bare = (federation(experiment, samples, device) for _ in range(2))
    batches = [[list(local.batches(rnd)) for local in bare.data] for rnd in range(ROUNDS)]
    with CountFlops() as counter:  # and warms up
        bare_compute(bare, batches, backward)
    run_rounds(state, 1)
    times: dict[str, list[float]] = {"round": [], "backward": [], "step": []}
    with peak_memory(device) as peak:
        for _ in range(args.repeats):
            times["backward"].append(seconds(partial(bare_compute, bare, batches, backward)))
            times["round"].append(seconds(partial(run_rounds, state)))
            times["step"].append(seconds(partial(bare_compute, bare, batches, step)))
    ratios = [a / b for a, b in zip(times["round"], times["backward"], strict=True)]
    rate = counter.flops / statistics.median(times["round"])
    return {
        "algorithm": algorithm, "label": label(experiment), "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3), "ratio_most": round(max(ratios), 3),
        "ratio_with_optimiser": round(statistics.median(times["round"]) / statistics.median(times["step"]), 3),
        "samples_per_s": round(ROUNDS * samples * len(state.data) / statistics.median(times["round"]), 1),
        "gflop_per_s": round(rate / 1e9, 2), "share_of_ceiling": round(rate / most, 3),
        "peak_mib": round(peak.mib, 1),
    }  # fmt: skip


def many_clients(n: int, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """A row of the other table: the first round of `n` clients with 50 samples each, of which a few are on the device.

    It also makes the files of those at rest."""
    changes = {"num_clients": n, "model.client.batch_size": 50, "model.width": args.many_width}
    experiment = preset("paper", "sl_single_server", **changes, precision=args.precision)
    with peak_memory(device) as peak, clients_in_flight(args.in_flight):
        state = federation(experiment, 50, device)
        took = seconds(lambda: run_rounds(state, 1))
    return {
        "clients": n, "in_flight": args.in_flight, "width": args.many_width, "seconds_per_round": round(took, 3),
        "ms_per_client": round(1000 * took / n, 2), "peak_mib": round(peak.mib, 1),
    }  # fmt: skip


STARTS = {
    "python": ["-c", "pass"],
    "import fsl_sage": ["-c", "import fsl_sage"],
    "fsl-sage --help": ["-m", "fsl_sage", "--help"],
    "import torch": ["-c", "import torch"],
}  # what is started: the interpreter's words


def start_up(name: str, repeats: int) -> dict[str, object]:
    """A row of the third table: user and system time of a new process, which other programs change little."""
    times = []
    for _ in range(1 + repeats):  # the first one reads files from the disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *STARTS[name]], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    middle, least, most = statistics.median(times[1:]), min(times[1:]), max(times[1:])
    return {"start": name, "cpu_seconds": round(middle, 3), "least": round(least, 3), "most": round(most, 3)}


# ---------------------------------------------------------------------------------------------------------- results


def write_csv(rows: list[dict[str, object]], path: Path) -> None:
    with atomic_path(path) as whole, open(whole, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, object]]) -> str:
    """The rows in columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def draw(rows: list[dict[str, object]], many: list[dict[str, object]], words: str) -> Figure:
    """Ratios as bars with their spread; time and memory over the number of clients."""
    figure, axes = new_figure(1, 1 + bool(many), height=2.8)
    names = [LABELS[row["algorithm"]] for row in rows]
    names, middle = [name.upper() if name.islower() else name for name in names], [row["ratio"] for row in rows]
    spread = [[row["ratio"] - row["ratio_least"] for row in rows], [row["ratio_most"] - row["ratio"] for row in rows]]
    axes[0].barh(names, middle, xerr=spread, color="0.75", ecolor="0.3", capsize=2)
    axes[0].axvline(1, color="black", linewidth=1)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("time of rounds / bare forward and backward\n(median; lines: least and most)")
    if many:
        n = [row["clients"] for row in many]
        memory = axes[1].twinx()
        axes[1].loglog(n, [row["seconds_per_round"] for row in many], "o-", color="black")
        memory.plot(n, [row["peak_mib"] for row in many], "s--", color="0.5")
        axes[1].set(xlabel="clients", ylabel="seconds a round")
        memory.set_ylabel("peak memory [MiB], dashed", color="0.4")
        memory.set_ylim(0, 1.2 * max(row["peak_mib"] for row in many))
    stamp(figure, words)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rounds of every algorithm against bare compute, and rounds of many clients, on random images of "
        "3×32×32 pixels with ResNet-18.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, …")
    add("--precision", default="fp32", choices=PRECISIONS, help="of the arithmetic")
    add("--threads", type=int, default=1, help="cores, on a CPU: for the yardstick's kernels, for the round's clients")
    add("--clients", type=int, default=2, help="clients of a round")
    add("--batches", type=int, default=2, help="batches a client")
    add("--batch-size", type=int, default=256, help="samples")
    add("--width", type=int, default=32, help="of the network; 64 as published")
    add("--passes", type=int, default=10, help="of FSL-SAGE's alignment; 100 as published")
    add("--repeats", type=int, default=3, help="how often each is timed")
    add("--only", nargs="+", default=list(DEFAULT), choices=list(ALGORITHMS), help="algorithms")
    add("--many", nargs="*", type=int, default=[10, 100, 1000], help="numbers of clients of the second table")
    add("--many-width", type=int, default=8, help="of the network there")
    add("--in-flight", type=int, default=4, help="clients on the device at a time there")
    add("--matrix", type=int, default=2048, help="rows and columns of the ceiling's matrices")
    add("--out", type=Path, default=HERE / "results", help="folder for bench.csv, clients.csv, starts.csv, bench.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    most = ceiling(device, args.precision, args.matrix)
    made = provenance(device)
    words = (
        f"{made['device_name']}, {args.threads} thread{'s' * (args.threads > 1)}, {args.precision}, "
        f"torch {made['torch']}; {args.clients} clients, {args.batches} batches of {args.batch_size}; "
        f"matrix product {most / 1e9:.0f} GFLOP/s"
    )
    print(words, flush=True)
    rows = [measure(name, args, device, most) for name in tqdm(args.only, "algorithms", leave=False)]
    print(table(rows), flush=True)  # at once: the second table takes a while
    many = []
    if args.many:
        many_clients(args.in_flight, args, device)  # warms up
        many = [many_clients(n, args, device) for n in tqdm(args.many, "many clients", leave=False)]
    print(table(many) if many else "")
    starts = [start_up(name, args.repeats) for name in tqdm(STARTS, "starts", leave=False)]
    print(table(starts))
    where = {"device": made["device_name"], "threads": args.threads, "precision": args.precision}
    where |= {"torch": made["torch"], "finished": made["finished"]}
    write_csv([row | where for row in rows], args.out / "bench.csv")
    if many:
        write_csv([row | where for row in many], args.out / "clients.csv")
    machine = {name: where[name] for name in ("device", "torch", "finished")}
    write_csv([row | machine for row in starts], args.out / "starts.csv")
    with atomic_path(args.out / "bench.png") as whole:
        draw(rows, many, words).savefig(whole, dpi=200)


if __name__ == "__main__":
    main()
