"""Fewer clients on the device at a time, from the command lines: what to do when memory runs out."""

import pytest

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
])  # fmt: skip
def test_a_number_that_cannot_be_is_refused(asked, word, said, capsys):
    assert main([*WORDS.split(), *word.split()]) in (1, 2)
    assert said in capsys.readouterr().err


def test_the_batch_passes_it_on(asked, tmp_path, monkeypatch, capsys):
    from fsl_sage.config.presets import preset

    run = preset("smoke", "cse_fsl", rounds=1, num_clients=2, **{"dataset.max_train": 60, "dataset.max_test": 20})
    figure = Figure(ROOT / "figures" / "sage_table.ipynb", {}, [run])
    assert not train_planned([figure], RunStore(), {"device": "cpu"}, 1, False, in_flight=1) and asked == [1]

    calls = []
    monkeypatch.setattr(batch, "reproduce", lambda *args: calls.append(args) or True)
    monkeypatch.setattr(batch, "train_claims", lambda *args: calls.append(args))
    monkeypatch.setattr(batch, "_pages", lambda *args: True)
    words = ["--device", "cpu", "--gallery", str(tmp_path / "gallery"), "--in-flight", "3"]
    assert batch.main([*words, "--only", "sage_table"]) == 0 and calls[0][-1] == 3
    assert batch.main([*words, "--claims", "one_client"]) == 0 and calls[1][-1] == 3
    with pytest.raises(SystemExit):
        batch.main([*words[:-1], "0"])
    assert "--in-flight=0: must be 1 or more" in capsys.readouterr().err
