"""From the command lines: fewer clients on the device at a time, and steps from CUDA graphs."""

import pytest
import torch

from fsl_sage.commands import reproduce as batch
from fsl_sage.commands.figures import Figure, train_planned
from fsl_sage.commands.train import main
from fsl_sage.experiments import train as training
from fsl_sage.experiments.runs import RunStore
from tests.support import ROOT

WORDS = "preset=smoke algorithm=fed_avg rounds=1 dataset.max_train=60 dataset.max_test=20 num_clients=2 device=cpu"
SGLR_DATA = "dataset.val_size=0 dataset.samples_per_client=10"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """How many clients each run was allowed; its store is empty at first."""
    real, seen = training.clients_in_flight, []
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    monkeypatch.setattr(training, "clients_in_flight", lambda n: seen.append(n) or real(n))
    return seen


def test_fsl_sage_lets_clients_wait_on_disk(asked, tmp_path, monkeypatch, capsys):
    """The run and its address are those without the word."""
    assert main([*WORDS.split(), "in_flight=1"]) == 0 and asked == [1]
    (one,) = [folder for folder in tmp_path.iterdir() if (folder / "config.json").exists()]
    capsys.readouterr()
    assert main([*WORDS.split(), "in_flight=1"]) == 0 and asked == [1]
    assert "in_flight=1: has no effect on stored runs" in capsys.readouterr().err
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "all"))
    assert main(WORDS.split()) == 0 and asked == [1, None]
    again = tmp_path / "all" / one.name
    assert (again / "rounds.csv").read_text() == (one / "rounds.csv").read_text()


@pytest.mark.parametrize(("word", "said"), [
    ("in_flight=0", "in_flight=0: must be at least 1, or None"),
    ("in_flight=two", "in_flight=two"),
    (f"algorithm=psl {SGLR_DATA} in_flight=1", "in_flight=1: must be all 2 clients for 'psl'"),
    ("recorded=true", "recorded=True: must be False on cpu: CUDA graphs need a GPU"),
])  # fmt: skip
def test_what_cannot_be_is_refused(asked, word, said, capsys):
    assert main([*WORDS.split(), *word.split()]) in (1, 2)
    assert said in capsys.readouterr().err


def test_the_batch_passes_it_on(asked, tmp_path, monkeypatch, capsys):
    from fsl_sage.config.presets import preset

    run = preset("smoke", "cse_fsl", rounds=1, num_clients=2, **{"dataset.max_train": 60, "dataset.max_test": 20})
    figure = Figure(ROOT / "figures" / "sage_table.ipynb", {}, [run])
    assert not train_planned([figure], RunStore(), {"device": "cpu"}, 1, False, in_flight=1) and asked == [1]

    calls = []
    monkeypatch.setattr(batch, "reproduce", lambda *args, **how: calls.append(how) or True)
    monkeypatch.setattr(batch, "train_claims", lambda *args, **how: calls.append(how))
    monkeypatch.setattr(batch, "_pages", lambda *args: True)
    words = ["--device", "cpu", "--gallery", str(tmp_path / "gallery")]
    on_three = {"in_flight": 3, "recorded": False}
    assert batch.main([*words, "--in-flight", "3", "--only", "sage_table"]) == 0 and calls == [on_three]
    assert batch.main([*words, "--in-flight", "3", "--claims", "one_client"]) == 0 and calls[1] == on_three
    for wrong, said in {
        "--in-flight 0": "--in-flight=0: must be 1 or more",
        "--recorded": "--recorded=True: must be left out on cpu: CUDA graphs need a GPU",
    }.items():
        with pytest.raises(SystemExit):
            batch.main([*words, *wrong.split()])
        assert said in capsys.readouterr().err


def test_recorded_reaches_the_training(monkeypatch, tmp_path):
    """On a GPU that is pretended, both command lines ask `train_missing` for recorded steps."""
    from fsl_sage.commands import figures, train
    from fsl_sage.experiments import runs

    seen, gpu = [], torch.device("cuda")
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    for module in figures, runs:
        monkeypatch.setattr(module, "train_missing", lambda *args, **how: seen.append(how["recorded"]) or {})
    monkeypatch.setattr(batch, "choose_device", lambda name: gpu)
    monkeypatch.setattr(batch, "_pages", lambda *args: True)
    monkeypatch.setattr(figures, "execute_all", lambda asked, *args: asked)
    words = ["--device", "cpu", "--gallery", str(tmp_path / "gallery"), "--preset", "smoke", "--only", "sage_table"]
    for more in [], ["--recorded"]:
        assert batch.main([*words, *more]) == 0
    for more in [], ["recorded=true"]:
        train.main([*WORDS.split(), *more])
    assert seen == [False, True] * 2
