"""One engine: streamed, stopped and side by side, every algorithm gives what it gives in one go."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import each_client
from fsl_sage.algorithms.record import IN_STEP
from fsl_sage.core import atomic_path
from fsl_sage.experiments.train import train, train_state
from tests.support.runs import assert_same, stopped_after, tiny

TOGETHER = {name for name, record in ALGORITHMS.items() if record.order == IN_STEP} | {"scala"}  # all clients at once
SIDE_BY_SIDE = ["fed_avg", "sl_multi_server", "cse_fsl"]


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
