"""A short time on a GPU machine: what travels there, what is checked and trained there, and how the runs come home.

    python benchmarks/gpu_visit.py pack --data FOLDER   at home: fills .visit/ and prints the commands for the machine
    python3 benchmarks/gpu_visit.py check               there: is everything right, and how fast is it?
    python3 benchmarks/gpu_visit.py train               there: runs at the published settings, side by side
    python benchmarks/gpu_visit.py home FOLDER          at home: the runs that came back in FOLDER go into the store

FOLDER of `pack` holds cifar10.npz. A transfer takes 64 MiB, so CIFAR-10 travels in two halves and Fashion-MNIST in a
third part; the machine keeps what has arrived in $VISIT_TMP. Each step is a process with its own limit in seconds: one
that hangs costs no other step its turn. The result of a step is $OUT/STEP.json, its output is in $OUT/log.txt, and
$OUT/runs.tar.gz has the runs; all of them are written while the steps work, so that nothing is lost if the time ends.

The tree must leave room for the data: `git sparse-checkout set --no-cone '/*' '!/figures/gallery'` takes the gallery
away, `git sparse-checkout disable` brings it back.
"""

import argparse
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARRIED = Path(os.environ.get("VISIT_CARRIED", ROOT / ".visit"))
THERE = Path(os.environ.get("VISIT_TMP", "/tmp/visit"))  # on the GPU machine, from one transfer to the next
OUT = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "visit"))
STORE = THERE / "runs"
METHODS = ("fsl_sage", "cse_fsl", "sl_multi_server", "sl_single_server", "fed_avg")
LIMIT = 64 * 2**20  # bytes of a transfer
MOSAIC, ACROSS = 5000, 50  # images of a mosaic; images side by side
SECOND = [*(("train", i) for i in range(6, 10)), ("test", 0), ("test", 1)]
HALVES = {"one": [("train", i) for i in range(6)], "two": SECOND}  # mosaics of each transfer
sys.path[:0] = [str(ROOT)]


def note(step: str, found: dict[str, Any]) -> None:
    """Keep what a step has found so far; a reader never sees half a file."""
    path = OUT / f".{step}.json"
    path.write_text(json.dumps(found, indent=1))
    path.replace(OUT / f"{step}.json")


# ----------------------------------------------------------------------------------------------- steps that check


def clock(work: Callable[[], Any], device: str, n: int = 20) -> float:
    """Seconds of one `work`: the median of `n`, after three that do not count."""
    import torch

    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    times = []
    for i in range(3 + n):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times += [time.perf_counter() - start] if i >= 3 else []
    return sorted(times)[n // 2]


def step_env(args: argparse.Namespace) -> None:
    """What machine this is, what it lacks, and how fast it copies and multiplies."""
    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    names = ("torchvision", "numpy", "pandas", "PIL", "safetensors", "joblib", "filelock", "platformdirs", "matplotlib")
    modules = ("experiments.train", "experiments.runs", "papers.comparison", "papers.oracle", "costs.clock")
    for name in (*names, *(f"fsl_sage.{module}" for module in modules)):
        start = time.perf_counter()
        try:
            version = getattr(importlib.import_module(name), "__version__", "there")
            found[name] = f"{version}, imported in {time.perf_counter() - start:.1f} s"
        except ImportError as error:
            found[name] = f"MISSING: {error}"
        note("env", found)
    from fsl_sage.core import arithmetic

    if args.device != "cpu":
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "GiB": round(p.total_memory / 2**30, 1), "processors": p.multi_processor_count}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    size = 256 if args.tiny else 8192
    a = torch.randn(size * size, device=args.device)
    b = torch.empty_like(a)
    found["copy_GB_s"] = round(8e-9 * len(a) / clock(lambda: b.copy_(a), args.device, 10), 1)
    for precision in ("fp32", "tf32", "bf16"):
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        x = torch.randn(size, size, device=args.device, dtype=kind)
        with arithmetic(precision):
            seconds = clock(lambda x=x: x @ x, args.device, 5)
        found[f"{precision}_TFLOP_s"] = round(2e-12 * size**3 / seconds, 3)
        note("env", found)


def one_trace(name: str, device: str) -> tuple[str, float, float]:
    """A trace of the authors' code in float64 on `device`: its name, the largest relative deviation, seconds."""
    import torch

    from fsl_sage.papers.oracle import deviations, replay

    torch.set_num_threads(1)
    start = time.perf_counter()
    spec = json.loads((ROOT / "tests" / "traces" / f"{name}.json").read_text())
    trace = spec.pop("trace")
    worst = max(deviations(replay(spec, device), trace))[0]
    return name, worst, round(time.perf_counter() - start, 1)


def step_traces(args: argparse.Namespace) -> None:
    """The authors' code, number for number, on this device: 1e-6 is expected in float64."""
    from joblib import Parallel, delayed

    names = sorted(path.stem for path in (ROOT / "tests" / "traces").glob("*.json"))
    names = [name for name in names if not args.tiny or name == "simple_conv-cse_fsl"]
    found, jobs = {}, min(5, len(names))
    work = (delayed(one_trace)(name, args.device) for name in names)
    for name, worst, seconds in Parallel(jobs, return_as="generator_unordered")(work):
        found[name] = {"worst": worst, "below_1e-6": worst < 1e-6, "seconds": seconds}
        note("traces", found)
        print(name, found[name], flush=True)


def farthest(one: Any, other: Any) -> float:
    """The largest relative difference between the losses of two histories."""
    names = [column for column in one.rounds if column.endswith("loss")]
    gaps = (one.rounds[names] - other.rounds[names]).abs() / other.rounds[names].abs()
    return float(gaps.max().max())


def twice(run: Any, device: str) -> dict[str, Any]:
    """How far two runs of one seed are from each other, as PyTorch stands and with kernels that repeat themselves."""
    import warnings

    import torch

    from fsl_sage.experiments.train import train

    found: dict[str, Any] = {}
    for how in ("as it stands", "cudnn", "all"):
        torch.backends.cudnn.deterministic = how != "as it stands"
        torch.use_deterministic_algorithms(how == "all", warn_only=True)  # tells of operations that have no such kernel
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one, other = (train(run, device, progress=False) for _ in range(2))
        said = sorted({str(warning.message)[:200] for warning in caught})
        found[how] = {"far": farthest(other, one), "seconds": round(other.seconds, 2), "warned": said}
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    return found


def step_smoke(args: argparse.Namespace) -> None:
    """Every algorithm, here and on the CPU: equal bytes, nearly equal losses; twice; resumed; other precisions.

    Before that, one method at the published size twice from one seed.
    """
    import torch

    from fsl_sage.algorithms.all import ALGORITHMS
    from fsl_sage.config.presets import preset
    from fsl_sage.experiments.callbacks import Callback
    from fsl_sage.experiments.train import train, train_state

    class Stop(Callback):
        def round(self, row: dict[str, Any], models: Any) -> None:
            if row["round"] == 1:  # round 0 is in a checkpoint
                raise KeyboardInterrupt

    torch.set_num_threads(1 if args.tiny else 4)
    size = {"model.width": 4, "num_clients": 2, "dataset.max_train": 120} if args.tiny else {"dataset.max_train": 5000}
    size |= {"dataset.name": "fmnist_mini", "dataset.max_test": 200, "rounds": 1, "algorithm.align_epochs": 10}
    found = {"one seed twice": twice(preset("paper", "fsl_sage", **size), args.device)}
    note("smoke", found)
    joint = ("ssl", "psl", "sfl", "sglr")
    for name in ("fsl_sage",) if args.tiny else ALGORITHMS:
        changes = {} if name in joint else {"dataset.max_train": 120 if args.tiny else 300}
        run = preset("smoke", name, rounds=3, **changes)
        cpu, there, again = (train(run, device, progress=False) for device in ("cpu", args.device, args.device))
        found[name] = row = {
            "same_bytes": cpu.ledger.equals(there.ledger), "far_from_cpu": farthest(there, cpu),
            "twice_equal": again.rounds.equals(there.rounds), "twice_far": farthest(again, there),
        }  # fmt: skip
        path = THERE / f"{name}.safetensors"
        path.unlink(missing_ok=True)
        try:
            train_state(run, args.device, progress=False, checkpoint=path, checkpoint_seconds=0, callbacks=[Stop()])
        except KeyboardInterrupt:
            row["resumed_far"] = farthest(train(run, args.device, progress=False, checkpoint=path), there)
        for precision in ("tf32", "bf16"):
            other = train(run.replace(precision=precision), args.device, progress=False)
            row[f"{precision}_far"] = farthest(other, cpu)
        note("smoke", found)
        print(name, row, flush=True)


def parts_of(precision: str, device: str, tiny: bool) -> tuple:
    """State, batch, smashed data and target of FSL-SAGE at the published size, with a full alignment buffer."""
    import torch

    from fsl_sage.algorithms.all import ALGORITHMS
    from fsl_sage.config.presets import preset
    from fsl_sage.data.batches import ClientData
    from fsl_sage.data.images import Images
    from fsl_sage.ledger import Ledger
    from fsl_sage.networks.auxiliary import true_cut_grad

    size = {"model.width": 8, "model.client.batch_size": 16} if tiny else {}
    run = preset("paper", "fsl_sage", num_clients=2, precision=precision, **size)
    batch, gen, data = run.model.client.batch_size, torch.Generator().manual_seed(0), []
    for i in range(2):
        x = torch.randint(256, (4 * batch, 3, 32, 32), dtype=torch.uint8, generator=gen)
        images = Images(x.to(device), torch.randint(10, (4 * batch,), generator=gen).to(device))
        data.append(ClientData(images, [0.5] * 3, [0.25] * 3, 10, batch, client=i, augment=True))
    state = ALGORITHMS["fsl_sage"].init(run, data, Ledger())
    x, y = next(data[0].batches(0))
    with torch.no_grad():
        smashed = state.clients[0](x).detach()
    for _ in range(4):
        state.buffers[0].add(smashed, y)
    buffer = state.buffers[0]
    return state, x, y, smashed, true_cut_grad(state.servers[0], buffer.smashed, buffer.labels)


def kinds_of_work(state: Any, x: Any, y: Any, smashed: Any, target: Any) -> dict[str, Callable[[], Any]]:
    """What a round is made of, each by name."""
    import torch

    from fsl_sage.core import weighted_average
    from fsl_sage.experiments.history import evaluate
    from fsl_sage.networks.auxiliary import align, estimate_cut_grad
    from fsl_sage.networks.cut import SplitModel
    from fsl_sage.networks.part import server_step

    client, server, aux = state.clients[0], state.servers[0], state.auxes[0]
    grad, models = torch.randn_like(smashed) * 1e-3, [client.model.state_dict()] * 10
    return {
        "client step": lambda: client.backward(client.forward(x), grad),
        "server step": lambda: server_step(server, smashed, y),
        "estimate": lambda: estimate_cut_grad(aux, smashed, y),
        "alignment pass": lambda: align(aux, state.buffers[0], target, 1, 1000),
        "average of 10 clients": lambda: weighted_average(models, [0.1] * 10),
        "evaluation of a batch": lambda: evaluate(SplitModel(client.model, server.model), [(x, y)]),
    }


def step_engine(args: argparse.Namespace) -> None:
    """Host and device milliseconds and kernels of each kind of work: as it stands, recorded, other layout."""
    import torch

    from fsl_sage.core import arithmetic
    from fsl_sage.networks.recording import OnGpu, Pretended, recording

    found: dict[str, Any] = {}

    def time_all(precision: str, how: str) -> None:
        parts = parts_of(precision, args.device, args.tiny)
        if how == "contiguous":
            for part in (*parts[0].clients, *parts[0].servers, *parts[0].auxes):
                part.model.to(memory_format=torch.contiguous_format)
        for name, work in kinds_of_work(*parts).items():
            found[f"{precision} {name}, {how}"] = row = measured(work, args)
            note("engine", found)
            print(precision, name, how, {k: v for k, v in row.items() if k != "longest"}, flush=True)

    makers = {"eager": None, "recorded": Pretended if args.device == "cpu" else OnGpu}
    for precision in ("fp32",) if args.tiny else ("fp32", "tf32", "bf16"):
        for how, maker in makers.items():
            with arithmetic(precision), recording(maker):
                time_all(precision, how)
    with arithmetic("fp32"):  # channels last may be the slower layout there
        time_all("fp32", "contiguous")


def measured(work: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of `work`; on a GPU those of the device, and the kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    row: dict[str, Any] = {"ms": round(1e3 * clock(work, args.device, 3 if args.tiny else 30), 4)}
    if args.device != "cpu":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                work()
            torch.cuda.synchronize()
        events = [event for event in seen.key_averages() if event.self_device_time_total > 0]
        row["device_ms"] = round(sum(event.self_device_time_total for event in events) / 5e3, 4)
        row["kernels"] = sum(event.count for event in events) / 5
        longest = sorted(events, key=lambda event: -event.self_device_time_total)[:8]
        row["longest"] = [[e.key[:80], e.count / 5, round(e.self_device_time_total / 5)] for e in longest]
    return row


def step_recorded(args: argparse.Namespace) -> None:
    """Whole rounds of each method as they stand and recorded: seconds, the largest difference, what was warned of."""
    import warnings

    from fsl_sage.config.presets import preset
    from fsl_sage.experiments.train import train
    from fsl_sage.networks.recording import OnGpu, Pretended, recording

    found: dict[str, Any] = {}
    makers = {"eager": None, "recorded": Pretended if args.device == "cpu" else OnGpu}
    size = {"dataset.name": "fmnist_mini", "dataset.max_train": 6000, "dataset.max_test": 200, "rounds": 3}
    if args.tiny:
        size |= {"dataset.max_train": 120, "model.width": 4, "model.client.batch_size": 8, "num_clients": 2}
    for name in ("fsl_sage", "cse_fsl", "sl_multi_server", "sl_single_server", "fed_avg"):
        passes = {"algorithm.align_epochs": 10 if args.tiny else 100} if name == "fsl_sage" else {}
        run, histories, row = preset("paper", name, precision=args.precision, **size, **passes), [], {}
        for how, maker in makers.items():
            with recording(maker), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                histories.append(train(run, args.device, progress=False))
            row[how] = {"seconds": round(histories[-1].seconds, 2), "warned": [str(w.message) for w in caught]}
        row["far"] = farthest(*histories)
        found[name] = row
        note("recorded", found)
        print(name, row, flush=True)


def steps_per_second(device: str, precision: str, seconds: float, tiny: bool) -> float:
    """Steps through both halves a second, for a while: what one process reaches beside others."""
    from fsl_sage.algorithms.base import whole_step
    from fsl_sage.core import arithmetic

    state, x, y, *_ = parts_of(precision, device, tiny)
    done, start = 0, time.perf_counter()
    with arithmetic(precision):
        while time.perf_counter() - start < seconds or not done:
            if done == 0:
                float(whole_step(state.clients[0], state.servers[0], x, y))  # warms up
                start = time.perf_counter()
            for _ in range(4):
                loss = whole_step(state.clients[0], state.servers[0], x, y)
            float(loss)
            done += 4
    return done / (time.perf_counter() - start)


def step_beside(args: argparse.Namespace) -> None:
    """What several processes reach together: what `--jobs` is worth."""
    from joblib import Parallel, delayed

    found, seconds = {}, 0.2 if args.tiny else 4.0
    for jobs in (1, 2) if args.tiny else (1, 6, 12, 3):
        work = [delayed(steps_per_second)(args.device, args.precision, seconds, args.tiny)] * jobs
        rates = Parallel(jobs)(work)
        found[f"{args.precision}, {jobs} processes"] = {"steps_per_s": round(sum(rates), 1)}
        note("beside", found)
        print(args.precision, jobs, rates, flush=True)


# ----------------------------------------------------------------------------------------------- steps that train


def headline(args: argparse.Namespace) -> list:
    """To 81 %: FSL-SAGE first. FedAvg's own history is SplitFed-MS's; the released one shares a server."""
    from fsl_sage.papers.comparison import headline_run

    released, rounds = {"fed_avg": {"algorithm.share_server": True}}, 3 if args.tiny else 0
    return [headline_run("published", method, rounds, **own(args) | {"seed": seed}, **released.get(method, {}))
            for seed in args.seeds for method in args.methods]  # fmt: skip


def own(args: argparse.Namespace) -> dict[str, Any]:
    """The changes of every run of a visit."""
    return {"precision": args.precision, "seed": args.seeds[0]} | small(args)


def sglr(args: argparse.Namespace) -> list:
    """SGLR with 6, 8 and 10 clients: every `lr_power` of Table 1, then averaging."""
    from fsl_sage.config.presets import preset

    size = {"dataset.name": "fmnist_mini", "dataset.samples_per_client": 20, "dataset.val_size": 50, "rounds": 2,
            "dataset.max_test": 50, "model.width": 4} if args.tiny else {}  # fmt: skip
    settings = [(power, 0) for power in (0, 0.5, 1, 1.5, 2)] + [(1, phi) for phi in (0.5, 1)]
    clients = (2,) if args.tiny else (6, 8, 10)
    return [
        preset("published", "sglr", seed=args.seeds[0], precision=args.precision, num_clients=n, **size,
               **{"algorithm.lr_power": power, "algorithm.active_fraction": phi})
        for n in clients for power, phi in (settings[:1] if args.tiny else settings)
    ]  # fmt: skip


def precisions(args: argparse.Namespace) -> list:
    """bf16 and tf32 against fp32: 30 rounds with three seeds."""
    from fsl_sage.papers.comparison import headline_run

    seeds = (200,) if args.tiny else (200, 201, 202)
    kinds, methods = ("fp32", "tf32", "bf16"), ("sl_single_server", "fsl_sage")
    return [
        headline_run("published", method, 2 if args.tiny else 30, seed=seed, precision=kind, **small(args))
        for method in (methods[:1] if args.tiny else methods) for seed in seeds for kind in kinds
    ]  # fmt: skip


def small(args: argparse.Namespace) -> dict[str, Any]:
    """The changes that make a run of the headline small enough to try the program."""
    size = {"dataset.max_train": 120, "dataset.max_test": 60, "model.width": 8, "num_clients": 2}
    return size | {"model.client.batch_size": 16} if args.tiny else {}


def step_runs(args: argparse.Namespace, experiments: list) -> None:
    """Train what the store does not have, side by side; each run is stored as it finishes."""
    from fsl_sage.experiments.pool import train_missing
    from fsl_sage.experiments.provenance import provenance

    made_with = provenance(args.device) | ({"recorded": True} if args.recorded else {})
    (THERE / "machine.json").write_text(json.dumps(made_with))  # for runs that are cut short
    data, stored = str(THERE / "data"), json.loads((THERE / "data" / "commit.json").read_text())["stored"]
    experiments = [run for run in experiments if run.hash not in stored]
    failed = train_missing(STORE, experiments, args.device, data, True, args.jobs, recorded=args.recorded)
    words = {f"{run.algorithm.name} {run.hash}": f"{type(e).__name__}: {e}" for run, e in failed.items()}
    note(args.name, {"asked": [run.hash for run in experiments], "failed": words})


def step_speed(args: argparse.Namespace) -> None:
    """Seconds of each of 12 rounds at the published settings, alone on the device, as they stand and recorded."""
    import warnings

    from fsl_sage.experiments.callbacks import Callback
    from fsl_sage.experiments.train import train
    from fsl_sage.papers.comparison import headline_run

    class Clock(Callback):
        def __init__(self) -> None:
            self.last, self.took = time.perf_counter(), []

        def round(self, row: dict[str, Any], models: Any) -> None:
            self.took += [round(time.perf_counter() - self.last, 4)]
            self.last = time.perf_counter()

    found: dict[str, Any] = {method: {} for method in args.methods}
    runs = {method: headline_run("published", method, 2 if args.tiny else 12, **own(args)) for method in args.methods}
    histories: dict[str, Any] = {}
    for recorded in (False,) if args.device == "cpu" else (True, False):
        for method, run in runs.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                clock = Clock()
                there = train(run, args.device, str(THERE / "data"), False, callbacks=[clock], recorded=recorded)
            row = {"rounds": clock.took, "warned": [str(warning.message) for warning in caught]}
            found[method]["recorded" if recorded else "eager"] = row
            if method in histories:
                found[method]["far"] = farthest(histories[method], there)
            histories[method] = there
            note("speed", found)
            print(method, "recorded" if recorded else "eager", row, flush=True)


def step_bench(args: argparse.Namespace) -> None:
    """The rows of the benchmark: rounds beside bare compute, and the published settings for two rounds."""
    sys.path[:0] = [str(ROOT / "benchmarks")]
    bench = importlib.import_module("bench")
    words = f"--width 64 --batches 8 --passes 100 --matrix 8192 --precision {args.precision}"
    if args.tiny:
        words = "--width 8 --batches 1 --batch-size 16 --passes 2 --matrix 256 --repeats 1 --only fed_avg fsl_sage"
    bench.main(["--device", args.device, *words.split(), "--many", "--out", str(OUT)])


TRAINING = {"headline": headline, "sglr": sglr, "precision": precisions}  # step → its runs
CHECKS = {  # step → its function, its limit in seconds
    "env": (step_env, 60), "traces": (step_traces, 70), "smoke": (step_smoke, 80), "engine": (step_engine, 80),
    "recorded": (step_recorded, 80), "beside": (step_beside, 80),
}  # fmt: skip
MEASURING = {"speed": step_speed, "bench": step_bench}  # need the data, or the time that is left
TRAINS = {"headline": 420, "speed": 120, "sglr": 300, "precision": 240, "bench": 90}  # step → its limit in seconds


# ---------------------------------------------------------------------------------------------------------- running


def child(words: list[str], limit: float, log: Any, busy: Callable[[], None] = lambda: None) -> str:
    """Run this program with `words`, call `busy` meanwhile; at the limit end it with all that it has started."""
    start, command = time.monotonic(), [sys.executable, str(Path(__file__).resolve()), *words]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    how = None
    while how is None:
        try:
            code = process.wait(2)
            how = "ok" if code == 0 else f"FAILED, exit {code}"
        except subprocess.TimeoutExpired:
            if time.monotonic() - start > limit:
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: only what it has started
                process.wait()
                how = f"stopped at its limit of {limit:.0f} s"
        busy()
    return f"{how}, {time.monotonic() - start:.0f} s"


def die_with_parent() -> None:
    """End this session when the process that started it is gone, even if that one was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def options(args: argparse.Namespace) -> list[str]:
    words = ["--device", args.device, "--precision", args.precision, "--jobs", str(args.jobs)]
    words += ["--seeds", *map(str, args.seeds), "--methods", *args.methods]
    return words + ["--tiny"] * args.tiny + ["--recorded"] * args.recorded


def run_steps(args: argparse.Namespace, limits: dict[str, float], name: str, busy: Callable[[], None]) -> None:
    """One step after the other, as long as there is time; what became of each is in `name`.json."""
    said: dict[str, str] = {}
    with open(OUT / "log.txt", "a") as log:
        for step, limit in limits.items():
            left = args.until - time.monotonic()
            if args.only and step not in args.only:
                continue
            words = ["step", step, *options(args)]
            said[step] = child(words, min(limit * (1 + 3 * args.tiny), left), log, busy) if left > 5 else "no time left"
            print(f"{step}: {said[step]}", flush=True)
            note(name, said)


def check(args: argparse.Namespace) -> None:
    arrive()
    run_steps(args, {step: limit for step, (_, limit) in CHECKS.items()}, "check", lambda: None)


def train(args: argparse.Namespace) -> None:
    arrive()
    print("data:", unpack(THERE / "data"), flush=True)
    run_steps(args, TRAINS, "train", collect)
    collect()


def arrive() -> None:
    """Keep what this transfer has brought where the next one finds it."""
    (THERE / "data").mkdir(parents=True, exist_ok=True)
    for path in CARRIED.glob("*/*"):
        if path.is_file() and not (THERE / "data" / path.name).exists():
            shutil.copy(path, THERE / "data")


def head_of(checkpoint: Path) -> str | None:
    """The rows of an unfinished run, as JSON: a checkpoint's metadata, without its tensors. None: it has just ended."""
    try:
        with open(checkpoint, "rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return None
    return head["__metadata__"]["run"]


def collect() -> None:
    """Write runs.tar.gz: finished runs as folders of the store, of others the rows of their last checkpoint."""
    runs = sorted(path for path in STORE.glob("*") if re.fullmatch("[0-9a-f]{16}(-[0-9a-f]{8})?", path.name))
    heads = {path.stem: head_of(path) for path in sorted((STORE / "progress").glob("*.safetensors"))}
    room = OUT / ".runs.tar.gz"
    with tarfile.open(room, "w:gz") as tar:
        for path in (THERE / "data" / "commit.json", THERE / "machine.json"):
            if path.exists():
                tar.add(path, path.name)
        for folder in runs:
            tar.add(folder, f"runs/{folder.name}")
        for name, text in heads.items():
            if text is None:
                continue
            member = tarfile.TarInfo(f"unfinished/{name}.json")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    room.replace(OUT / "runs.tar.gz")


# ------------------------------------------------------------------------------------------------------------- data


def mosaic(images: Any) -> Any:  # uint8 (n, 32, 32, 3) → (height, width, 3)
    import numpy as np

    n = -(-len(images) // ACROSS) * ACROSS
    whole = np.zeros((n, *images.shape[1:]), np.uint8)
    whole[: len(images)] = images
    _, h, w, c = whole.shape
    return whole.reshape(-1, ACROSS, h, w, c).transpose(0, 2, 1, 3, 4).reshape(-1, ACROSS * w, c)


def tiles(picture: Any) -> Any:  # back again, with the padding
    return picture.reshape(-1, 32, ACROSS, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def unpack(folder: Path) -> str:
    """cifar10.npz from its mosaics; what is there, in words."""
    import numpy as np
    from PIL import Image

    if not (folder / "cifar10.npz").exists():
        arrays = {}
        for split in ("train", "test"):
            labels = folder / f"y_{split}.npy"
            y = np.load(labels) if labels.exists() else np.zeros(1)
            paths = [folder / f"{split}-{i:02}.webp" for i in range(-(-len(y) // MOSAIC))]
            missing = [path.name for path in (*paths, labels) if not path.exists()]
            if missing:
                return f"no CIFAR-10: {', '.join(missing)} not here; did the transfers go to different machines?"
            pictures = [tiles(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
            arrays |= {f"x_{split}": np.concatenate(pictures)[: len(y)], f"y_{split}": y.astype(np.int64)}
        np.savez(folder / "whole.npz", **arrays)
        (folder / "whole.npz").replace(folder / "cifar10.npz")
    return ", ".join(path.name for path in sorted(folder.glob("*.npz")))


# ------------------------------------------------------------------------------------------------------------- home


def pack(args: argparse.Namespace) -> None:
    """Fill .visit/ with what the machine does not have, check the sizes, print the commands."""
    import numpy as np
    from PIL import Image

    shutil.rmtree(CARRIED, ignore_errors=True)
    common = CARRIED / "common"
    common.mkdir(parents=True)
    with np.load(Path(args.data) / "cifar10.npz", allow_pickle=False) as arrays:
        for split in ("train", "test"):
            np.save(common / f"y_{split}.npy", arrays[f"y_{split}"].astype(np.uint8))
        pixels = {split: arrays[f"x_{split}"] for split in ("train", "test")}
    for half, wanted in HALVES.items():
        (CARRIED / half).mkdir()
        for split, i in wanted:
            images = pixels[split][i * MOSAIC : (i + 1) * MOSAIC]
            if len(images):
                path = CARRIED / half / f"{split}-{i:02}.webp"
                Image.fromarray(mosaic(images)).save(path, lossless=True, quality=100, method=4, exact=True)
                assert (tiles(np.asarray(Image.open(path)))[: len(images)] == images).all(), path
    pack_fashion(args.data)
    pack_program(common)
    measure_and_tell()


def pack_fashion(root: str) -> None:
    """Fashion-MNIST for SGLR's step, if it is to be found; it has a transfer of its own."""
    import numpy as np

    from fsl_sage.data.sources import data_root, find_arrays

    try:
        arrays, _ = find_arrays("fmnist", data_root(root), False, None)
    except (OSError, ValueError) as error:
        print(f"Fashion-MNIST stays at home, and the step sglr with it: {error}")
        return
    (CARRIED / "three").mkdir()
    np.savez_compressed(CARRIED / "three" / "fmnist.npz", **arrays)


def pack_program(common: Path) -> None:
    """The one package that is not there, and which commit travels: the machine has no repository."""
    source = Path(importlib.util.find_spec("platformdirs").origin).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, common / "site" / "platformdirs", ignore=ignored)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "--", "fsl_sage"], capture_output=True, text=True).stdout
    if dirty.strip():
        print("fsl_sage has changes that are in no commit: the runs will not say which commit made them")
    packed = {"commit": None if dirty.strip() else commit or None, "stored": stored_here()}
    (common / "commit.json").write_text(json.dumps(packed))


def stored_here() -> list[str]:
    """The runs that need no training there."""
    from fsl_sage.experiments.provenance import store_root

    return sorted(path.name for path in store_root().glob("*") if re.fullmatch("[0-9a-f]{16}", path.name))


def measure_and_tell() -> None:
    """The size of each transfer, and its command."""
    git = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True).stdout.split("\0")
    tree = sum((ROOT / name).stat().st_size for name in set(listed) if name and (ROOT / name).is_file())
    begin = "export PYTHONPATH=$PWD/.visit/common/site PYTHONUNBUFFERED=1; python3 benchmarks/gpu_visit.py"
    tasks = {"one": ("check --seconds 220", 240), "two": ("train --only headline speed bench --seconds 450", 480),
             "three": ("train --only sglr --seconds 280", 300)}  # fmt: skip
    for part, (words, limit) in tasks.items():
        if not (CARRIED / part).is_dir():
            continue
        files = [path for folder in (part, "common") for path in (CARRIED / folder).rglob("*") if path.is_file()]
        carried = sum(path.stat().st_size for path in files)
        fits = "fits" if tree + carried <= LIMIT else "TOO MUCH, see --help"
        print(f"\ntransfer {part}: tree {tree / 2**20:.1f} + carried {carried / 2**20:.1f} of 64 MiB: {fits}")
        print(f"carry .visit/common .visit/{part}, at most {limit} s:\n{begin} {words}")
    print("\nafterwards, with each folder that came back: python benchmarks/gpu_visit.py home FOLDER")


def finish(head: dict[str, Any], made_with: dict[str, Any], folder: Path) -> str:
    """Keep a run that the time cut short as what it is, a run of so many rounds; say what became of it."""
    import pandas as pd

    from fsl_sage.config.experiment import can_be_shorter, from_dict
    from fsl_sage.experiments.history import ALIGNMENT_COLUMNS, History
    from fsl_sage.experiments.store import put_run, run_lock
    from fsl_sage.ledger import Ledger, Transfer

    whole, done, ledger = from_dict(head["experiment"]), head["progress"], Ledger()
    if not can_be_shorter(whole):
        return "dropped: fewer rounds would be another experiment, what a round does follows from their number"
    if not done["rounds"]:
        return "dropped: no round was finished"
    for *fields, n in head["ledger"]:
        for _ in range(n):
            ledger.write(Transfer(*fields))
    short = whole.replace(rounds=len(done["rounds"]), comm_threshold_mb=None)
    tables = pd.DataFrame(done["rounds"]), pd.DataFrame(done["alignments"], columns=ALIGNMENT_COLUMNS)
    with run_lock(folder, short.hash):
        of_part = {"wall_seconds": done["seconds"], "data": done["data"]}
        put_run(folder / short.hash, History(short, *tables, ledger.totals(), "rounds"), made_with | of_part)
    return f"cut short, kept as run {short.hash} of {short.rounds} rounds"


def home(args: argparse.Namespace) -> None:
    """Check the runs that came back, and put them into the store with the commit that made them."""
    from fsl_sage.commands.runs import import_runs
    from fsl_sage.experiments.provenance import store_root
    from fsl_sage.experiments.store import StoreError

    with tempfile.TemporaryDirectory() as room, tarfile.open(Path(args.folder) / "runs.tar.gz") as tar:
        tar.extractall(room, filter="data")
        whole, runs = Path(room), Path(room) / "runs"
        runs.mkdir(exist_ok=True)
        for head in sorted((whole / "unfinished").glob("*.json")):
            made_with = json.loads((whole / "machine.json").read_text())
            print(f"{head.stem}: {finish(json.loads(head.read_text()), made_with, runs)}")
        commit = json.loads((whole / "commit.json").read_text())["commit"] if (whole / "commit.json").exists() else None
        try:
            print(import_runs(store_root(args.store or None), runs, commit))
        except StoreError as error:
            raise SystemExit(str(error)) from error


def step(args: argparse.Namespace) -> None:
    die_with_parent()
    if args.name in TRAINING:
        step_runs(args, TRAINING[args.name](args))
    elif args.name in MEASURING:
        MEASURING[args.name](args)
    else:
        CHECKS[args.name][0](args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, work: Callable[[argparse.Namespace], None]) -> Callable[..., Any]:
        own = commands.add_parser(name, help=(work.__doc__ or "").split("\n")[0])
        own.set_defaults(work=work)
        return own.add_argument

    command("pack", pack)("--data", required=True, metavar="FOLDER", help="folder with cifar10.npz")
    add = command("home", home)
    add("folder", metavar="FOLDER", help="what came back: a folder with runs.tar.gz")
    add("--store", default="", help="the store (default: FSL_SAGE_RUNS, else runs/ of the checkout)")
    for name, work in {"check": check, "train": train, "step": step}.items():
        add = command(name, work)
        if name == "step":
            add("name", choices=[*CHECKS, *TRAINS])
        add("--device", default="cuda")
        add("--precision", default="tf32", help="of the steps headline, sglr and bench (default: %(default)s)")
        add("--seeds", type=int, nargs="+", default=[200], help="of the step headline; others take the first")
        add("--methods", nargs="+", default=list(METHODS), help="of the steps headline and speed")
        add("--recorded", action="store_true", help="play the steps of training from CUDA graphs")
        add("--jobs", type=int, default=6, help="runs at a time (default: %(default)s)")
        add("--tiny", action="store_true", help="everything small, to try the program on a CPU")
        add("--seconds", type=float, default=220, help="for all steps together (default: %(default)s)")
        add("--only", nargs="*", default=[], metavar="STEP", help="only these steps")
    args = parser.parse_args()
    if args.command in ("check", "train", "step"):
        os.environ["GIT_DIR"] = os.devnull  # a repository there says nothing of what was packed; `home` knows it
        args.until = time.monotonic() + args.seconds
        OUT.mkdir(parents=True, exist_ok=True)
        THERE.mkdir(parents=True, exist_ok=True)
    args.work(args)


if __name__ == "__main__":
    main()
