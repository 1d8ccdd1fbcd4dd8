"""Mistakes in a user's own parts are told with the file and the line, and end a command with 1."""

import pytest

from fsl_sage.commands.runs import main as runs
from fsl_sage.commands.train import main
from fsl_sage.experiments.plugins import forget

ROUND = """
import numpy, torch
from fsl_sage.algorithms.base import Metrics, whole_step
from fsl_sage.experiments.plugins import algorithm, codec

@codec("bare", decode=lambda packed, shape, config: packed)
def bare(numbers, config, stream):
    return numbers

@algorithm("mine", label="Mine")
def mine(state, rnd, ledger):
    metrics = Metrics()
    for i in state.present:
        for s, x, y in state.batches(i, rnd):
            metrics.loss(i, s, whole_step(state.clients[i], state.servers[0], x, y))
    {own}
    return metrics
"""
SMALL = ["preset=smoke", "rounds=1", "device=cpu", "dataset.max_train=60", "dataset.max_test=20", "plugins=[mine.py]"]


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """The exit status and the last line of a run of a round with this line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))

    def of(own, *words):
        (tmp_path / "mine.py").write_text(ROUND.replace("{own}", own))
        status = main([*SMALL, *(words or ["algorithm=mine"])])
        return status, capsys.readouterr().err.strip().splitlines()[-1]

    yield of
    forget(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ("torch.ones(3) + torch.ones(4)", "RuntimeError: The size of tensor a (3)"),
        ("int('abc')", "ValueError: invalid literal for int()"),
        ("open('/nowhere/at/all')", "FileNotFoundError: [Errno 2]"),
        ("metrics.nothing", "AttributeError: 'Metrics' object has no attribute 'nothing'"),
    ],
)
def test_an_error_in_a_round_is_told_with_its_line(told, own, says):
    status, last = told(own)
    line = ROUND.splitlines().index("    {own}") + 1
    assert status == 1 and f"mine.py, line {line}: {says}" in last


def test_a_round_without_a_result_is_refused(told):
    status, last = told("return")
    assert status == 2 and "must be Metrics: a round of 'mine' ends with `return metrics`" in last


def test_what_no_checkpoint_holds_is_refused_after_the_first_round(told):
    status, last = told("state.seen = numpy.arange(3)")
    assert status == 2 and "state.seen='ndarray': must be a tensor without gradient" in last
    assert told("state.seen = torch.arange(3)")[0] == 0


def test_a_codec_is_named_by_its_settings(told):
    status, last = told("pass", "algorithm=sl_single_server", "codec.smashed.name=bare")
    assert status == 2 and "codec.smashed.name='bare': must be a codec that encodes a tensor as a dict" in last
    status, last = told("pass", "algorithm=sl_single_server", "codec.smashed.name=product", "codec.smashed.pieces=7")
    assert status == 2 and "codec.smashed.pieces=7: must be a divisor" in last


def test_a_network_with_first_layers_as_auxiliary_model(told, capsys):
    words = ["--cfg", "preset=smoke", "algorithm=fsl_sage", "model.auxiliary.size=first_layers", "model=resnet16"]
    assert main(words) == 0 and "size: first_layers" in capsys.readouterr().out


def test_a_store_that_is_no_folder_is_not_an_empty_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        runs(["list", "--runs", str(tmp_path / "misspelt")])
    assert ended.value.code == 2 and "must be a folder with runs" in capsys.readouterr().err


def test_an_imported_run_brings_its_model(told, tmp_path, capsys):
    assert told("pass", "algorithm=fed_avg", "save=true")[0] == 0
    (model,) = (tmp_path / "runs" / "models").iterdir()
    store = tmp_path / "other"
    store.mkdir()
    assert runs(["import", str(tmp_path / "runs"), "--runs", str(store)]) == 0
    assert (store / "models" / model.name).is_file() and not model.exists()
    with pytest.raises(SystemExit):
        runs(["show", model.stem, "--rounds", "0", "--runs", str(store)])
    assert "--rounds=0: must be at least 1" in capsys.readouterr().err
