"""One engine: streamed, stopped and side by side, every algorithm gives what it gives in one go."""

import json
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import each_client
from fsl_sage.algorithms.fleet import clients_in_flight, part_tensors
from fsl_sage.algorithms.record import IN_STEP
from fsl_sage.core import atomic_path
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train, train_state
from tests.support.runs import assert_same, stopped_after, tiny

TOGETHER = {name for name, record in ALGORITHMS.items() if record.order == IN_STEP} | {"scala"}  # all clients at once
SIDE_BY_SIDE = ["fed_avg", "sl_multi_server", "cse_fsl"]


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(algorithm, tmp_path, monkeypatch):
    experiment, path = tiny(algorithm), tmp_path / "run.safetensors"
    whole = train(experiment, "cpu", progress=False)
    for _ in range(2):  # a run that went on can be stopped again
        stopped_after(1, monkeypatch, experiment, path)
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=path))


@pytest.mark.parametrize("schedule", ["step", "multistep", "cyclic", "fraction", "cosine", "warmup"])
def test_schedules_go_on(schedule, tmp_path, monkeypatch):
    own = {"name": schedule, "milestones": [1, 2], "step_size": 1, "gamma": 0.5, "fraction": 0.5, "warmup_rounds": 2}
    experiment, path = tiny("fed_avg", **{"model.client.optimizer.scheduler": own}), tmp_path / "run.safetensors"
    whole = train(experiment, "cpu", progress=False)
    assert len(set(whole.rounds.client_lr)) > 1
    stopped_after(2, monkeypatch, experiment, path)
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=path))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_clients_streamed_through_one_place_change_nothing(algorithm):
    experiment = tiny(algorithm)
    if algorithm in TOGETHER:
        with pytest.raises(ValueError, match="in_flight=1: must be all 3 clients"):
            train(experiment, "cpu", progress=False, in_flight=1)
    else:
        assert_same(train(experiment, "cpu", progress=False), train(experiment, "cpu", progress=False, in_flight=1))


@pytest.mark.parametrize("algorithm", SIDE_BY_SIDE)
@pytest.mark.parametrize("in_flight", [None, 2])
def test_clients_side_by_side_change_nothing(algorithm, in_flight):
    before, states = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            states.append(train_state(tiny(algorithm), "cpu", progress=False, in_flight=in_flight)[1])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    for one, two in zip(*(state.parts for state in states), strict=True):
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, two.model.state_dict()[name]), name


def test_as_many_threads_as_places_change_nothing():
    """FSL-SAGE aligns in every other round, where the auxiliary models of clients at rest are needed, too."""
    experiment, states = tiny("fsl_sage", num_clients=5, **{"dataset.size_spread": 0.5}), []
    for slots in (None, 2):
        with threads(2):
            states.append(train_state(experiment, "cpu", progress=False, in_flight=slots)[1])
    for group in ("clients", "auxes"):
        for one, other in zip(*(getattr(state, group) for state in states), strict=True):
            tensors = part_tensors(other)
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in part_tensors(one).items())


@pytest.mark.parametrize("slots", [2, 3])
def test_who_takes_a_result_keeps_the_clients_place(slots):
    """Others work meanwhile, and would take the place of the client whose auxiliary model is changed here."""
    with clients_in_flight(slots):
        state = set_up(tiny("fsl_sage", num_clients=6))
    state.present = list(range(6))
    with threads(2):
        for i, _ in zip(state.present, each_client(state, lambda i: state.auxes[i]), strict=True):
            aux = state.auxes[i]
            for _ in range(20):
                next(iter(aux.model.parameters())).data.add_(i)
                time.sleep(0.001)
            assert state.auxes[i] is aux
    firsts = [next(iter(part.model.parameters())).flatten()[0].item() for part in state.auxes]
    assert [round(first - firsts[0]) for first in firsts] == [0, 20, 40, 60, 80, 100]


def test_what_takes_the_clients_results_has_one_thread_until_all_have_worked():
    before, threads = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        state = train_state(tiny("cse_fsl", rounds=1), "cpu", progress=False)[1]
        threads = [torch.get_num_threads() for _ in each_client(state, lambda i: i)]
        assert threads == [1] * len(state.present) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_in_bfloat16_parameters_and_uploads_stay_float32():
    experiment = tiny("fsl_sage", precision="bf16")
    history, state = train_state(experiment, "cpu", progress=False)
    assert {p.dtype for part in state.parts for p in part.model.parameters()} == {torch.float32}
    assert {buffer.smashed.dtype for buffer in state.buffers} == {torch.float32}
    exact = train(experiment.replace(precision="fp32"), "cpu", progress=False)
    assert (history.rounds.paper_bytes == exact.rounds.paper_bytes).all()
    assert 0 < (history.rounds.train_loss - exact.rounds.train_loss).abs().max() < 0.2


def test_a_tolerance_ends_an_alignment_early():
    long = {"algorithm.align_epochs": 40, "rounds": 1}
    made = [train(tiny("fsl_sage", **long, **{"algorithm.align_tolerance": t}), "cpu", progress=False).alignments.passes
            for t in (0.0, 0.9)]  # fmt: skip
    assert (made[0] == 40).all() and made[1].isin([10, 20, 30]).all()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_format_0(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(json.loads(file.read(size))["__metadata__"]["run"])
    with atomic_path(path) as whole:
        save_file(load_file(path), whole, {"run": json.dumps(about | {"format": 0})})


def no_checkpoint_at_all(path):
    path.write_text("hello")


@pytest.mark.parametrize("harm", [truncated, of_format_0, no_checkpoint_at_all])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_run_begins_again(harm, tmp_path, monkeypatch):
    experiment, path = tiny("fed_avg"), tmp_path / "run.safetensors"
    stopped_after(2, monkeypatch, experiment, path)
    harm(path)
    with pytest.warns(UserWarning, match=r"run\.safetensors .*the run begins again"):
        history = train(experiment, "cpu", progress=False, checkpoint=path)
    assert_same(history, train(experiment, "cpu", progress=False))


def test_a_checkpoint_of_another_experiment_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    stopped_after(1, monkeypatch, tiny("fed_avg"), path)
    with pytest.warns(UserWarning, match="another experiment"):
        history = train(tiny("fed_avg", seed=1), "cpu", progress=False, checkpoint=path)
    assert len(history.rounds) == 3
