"""A session's settings do not reach a run's numbers, and are as before when the run has ended."""

from contextlib import contextmanager

import pandas as pd
import pytest
import torch

from fsl_sage.config.presets import preset
from fsl_sage.core import arithmetic
from fsl_sage.costs import table
from fsl_sage.experiments import history
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.papers import leakage, watch
from fsl_sage.papers.oracle import replay
from tests.support.traces import read_trace

TINY = {
    "rounds": 1, "model.name": "simple_conv", "model.client.batch_size": 8, "num_clients": 2, "dataset.max_train": 32,
    "dataset.max_test": 20,
}  # fmt: skip
B = torch.backends
SWITCHES = {
    "matmul": B.cuda.matmul, "conv": B.cudnn.conv, "rnn": B.cudnn.rnn,
    "onednn.matmul": B.mkldnn.matmul, "onednn.conv": B.mkldnn.conv, "onednn.rnn": B.mkldnn.rnn,
}  # fmt: skip


def read(get):
    try:
        return get()
    except RuntimeError:
        return "mixed"


def settings():
    """All that a session can set; PyTorch refuses to read an old switch where a new one says otherwise."""
    return {
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "onednn": B.mkldnn.enabled,
        "autocast": torch.is_autocast_enabled("cpu"), "cache": torch.is_autocast_cache_enabled(),
        "old matmul": read(torch.get_float32_matmul_precision), "old conv": read(lambda: B.cudnn.allow_tf32),
        "all": B.fp32_precision, **{name: place.fp32_precision for name, place in SWITCHES.items()},
    }  # fmt: skip


@contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def switch(place, value):
    return changed(lambda: place.fp32_precision, lambda value: setattr(place, "fp32_precision", value), value)


SESSIONS = {
    "medium": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "oneDNN in bfloat16": lambda: switch(B.mkldnn.matmul, "bf16"),
    "oneDNN's convolutions": lambda: switch(B.mkldnn.conv, "bf16"),
    "all in TF32": lambda: switch(B, "tf32"),
    "products in TF32": lambda: switch(B.cuda.matmul, "tf32"),
    "no oneDNN": lambda: changed(lambda: B.mkldnn.enabled, lambda value: setattr(B.mkldnn, "enabled", value), False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "meta": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(autouse=True)
def nothing_stays():
    """The old switches and the new are what they were; `changed` alone would leave what PyTorch cannot read."""
    yield
    for place in (B, *SWITCHES.values()):
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    B.cudnn.allow_tf32 = True


def rows(experiment):
    return train(experiment, "cpu", progress=False).rounds


@pytest.mark.parametrize(("session", "precision"), [*((name, "fp32") for name in SESSIONS), ("autocast", "bf16")])
def test_a_run_is_the_same_in_every_session(session, precision):
    experiment = preset("smoke", "fsl_sage", **TINY, precision=precision)
    usual = rows(experiment)
    with SESSIONS[session]():
        before = settings()
        pd.testing.assert_frame_equal(rows(experiment), usual, check_exact=True)
        assert settings() == before


def plain():
    """float32 is float32, in the old switches and in the new."""
    now = settings()
    new = {now[name] for name in SWITCHES}
    return new <= {"none", "ieee"} and not now["autocast"] and now["grad"] and now["dtype"] == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_evaluation_and_callbacks_are_float32(precision, monkeypatch):
    seen, normalise = [], history.eval_batches

    def batches(*args):
        seen.append(("evaluation", plain() or settings()))
        return normalise(*args)

    class Looks(Callback):
        def round(self, row, models):
            seen.append(("callback", plain() or settings()))

    monkeypatch.setattr(history, "eval_batches", batches)
    with SESSIONS["all in TF32"]():
        train(preset("smoke", "fed_avg", **TINY, precision=precision), "cpu", progress=False, callbacks=[Looks()])
    assert dict(seen) == {"evaluation": True, "callback": True}


def test_a_look_costs_and_leakage_are_float32(monkeypatch):
    _, state = train_state(preset("smoke", "fsl_sage", **TINY), "cpu", progress=False)
    seen = []
    for module, name in ((watch, "true_cut_grad"), (table, "tensor_bytes"), (leakage, "prepare")):
        function = getattr(module, name)

        def spy(*args, name=name, function=function):
            seen.append((name, plain() or settings()))
            return function(*args)

        monkeypatch.setattr(module, name, spy)
    usual, costs = watch.look(state, 0, 0), table.costs_of(state)
    tiny = preset("smoke", "sglr", rounds=1, num_clients=2, **{"dataset.samples_per_client": 20})
    for session in ("oneDNN in bfloat16", "autocast", "no gradients", "float64"):
        with SESSIONS[session]():
            again = watch.look(state, 0, 0)
            assert torch.equal(again.cut_grad, usual.cut_grad) and torch.equal(again.est_cut_grad, usual.est_cut_grad)
            assert table.costs_of(state) == costs
            assert len(set_up(preset("smoke", "fsl_sage", **TINY)).clients) == 2
    with SESSIONS["all in TF32"]():
        leakage.measure_leakage(tiny, "cpu", n_train=50, n_test=50, epochs=1, decoder_seeds=(1,))
    assert all(fine is True for _, fine in seen) and {name for name, _ in seen} >= {"true_cut_grad", "prepare"}


def test_a_trace_does_not_depend_on_the_session():
    spec, _ = read_trace("simple_conv-sl_single_server")
    usual = replay(spec | {"rounds": 1})
    with SESSIONS["no gradients"](), SESSIONS["float64"](), SESSIONS["no oneDNN"]():
        assert replay(spec | {"rounds": 1}) == usual


def test_tf32_is_said_to_the_old_switches_and_the_new():
    for session in ("medium", "all in TF32", "products in TF32"):
        with SESSIONS[session]():
            before = settings()
            with arithmetic("tf32"):
                inside = settings()
                with arithmetic("fp32"):
                    assert plain()
                assert settings() == inside
            assert [inside[name] for name in ("matmul", "conv", "rnn")] == ["tf32"] * 3
            assert {inside[name] for name in SWITCHES if "onednn" in name} <= {"none", "ieee"}
            assert settings() == before


def test_a_switch_that_follows_its_parent_still_does():
    with switch(B, "tf32"):
        with arithmetic("fp32"):
            assert plain()
        B.fp32_precision = "ieee"
        assert B.mkldnn.conv.fp32_precision == B.cuda.matmul.fp32_precision == "ieee"
    with arithmetic("fp32"):
        assert B.cudnn.allow_tf32 is False and torch.get_float32_matmul_precision() == "highest"
    assert B.cudnn.allow_tf32 is True


def test_the_generators_of_a_gpu_are_left_alone(monkeypatch):
    """`torch.manual_seed` seeds them too, and `fork_rng(devices=[])` does not put them back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    set_up(preset("smoke", "fsl_sage", **TINY))
    set_up(preset("smoke", "sglr", **{"algorithm.mixing_mode": "concat_channels"}))
    leakage.train_decoder(torch.zeros(4, 2, 4, 4), torch.zeros(4, 1, 8, 8), epochs=1)
    assert seeded == []
