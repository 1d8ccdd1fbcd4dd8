"""The tutorial's algorithm with a state and settings of its own does all that the package's algorithms do."""

import json
import os
import subprocess
import sys

import pytest

from fsl_sage import RunStore, load_plugins, preset, train
from fsl_sage.config.experiment import PLUGGED, from_dict
from fsl_sage.config.settings import settings_of
from fsl_sage.experiments.origins import FILES
from fsl_sage.experiments.plugin_files import PluginError
from fsl_sage.experiments.plugins import forget
from tests.support import ROOT

TUTORIAL = ROOT / "nbs" / "tutorials" / "own_parts.ipynb"
WORDS = {"dataset.name": "stripes", "model.name": "mini", "rounds": 2, "num_clients": 2}
WORDS |= {"dataset.max_train": 120, "dataset.max_test": 40}


@pytest.fixture
def parts(tmp_path):
    """The tutorial's file."""
    cells = ["".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text("utf-8"))["cells"]]
    texts: dict[str, str] = {}
    for cell in cells:
        if cell.split(" = '''")[0].isupper():
            exec(cell, texts)
    path = tmp_path / "parts.py"
    path.write_text("\n".join(text for name, text in texts.items() if name.isupper()))
    yield path
    for source in list(FILES.values()):
        forget(source.home)
    assert not PLUGGED


def command(tmp_path, *words):
    environment = os.environ | {"FSL_SAGE_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_line_sweeps_its_own_field(parts, tmp_path):
    words = [f"{name}={value}" for name, value in WORDS.items()]
    asked = ["preset=smoke", "algorithm=stale", "algorithm.upload_every=1,2", "device=cpu", f"plugins=['{parts}']"]
    command(tmp_path, "-m", "fsl_sage", "-m", *words, *asked)
    load_plugins([parts])
    runs = RunStore(tmp_path / "runs").frame().groupby("hash").last()
    often, seldom = (preset("smoke", "stale", **WORDS, **{"algorithm.upload_every": q}).hash for q in (1, 2))
    assert set(runs.index) == {often, seldom}
    assert runs.paper_bytes[often] > runs.paper_bytes[seldom]


@pytest.mark.slow
def test_ranks_make_the_run_of_the_simulation(parts, tmp_path):
    words = [f"{name}={value}" for name, value in WORDS.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "fsl_sage.commands.ranks"]
    command(tmp_path, *torchrun, *words, "preset=smoke", "algorithm=stale", "device=cpu", f"plugins=['{parts}']")
    load_plugins([parts])
    experiment = preset("smoke", "stale", **WORDS)
    between = RunStore(tmp_path / "runs").find(experiment)
    assert between.rounds.equals(train(experiment, "cpu", progress=False).rounds)


def test_its_field_is_a_field_like_any_other(parts):
    load_plugins([parts])
    experiment = preset("smoke", "stale", **WORDS)
    often = experiment.replace(**{"algorithm.upload_every": 1})
    assert often.hash != experiment.hash and from_dict(often.to_dict()) == often
    assert "upload_every" not in experiment.to_dict()["algorithm"] and often.to_dict()["algorithm"]["upload_every"] == 1
    assert often.replace(**{"algorithm.name": "fed_avg"}) == preset("smoke", "fed_avg", **WORDS)
    wrongs = {"at least 1": {"upload_every": 0}, "from 0 to 1": {"decay": 2.0}, "of type float": {"decay": "x"}}
    for says, wrong in wrongs.items():
        with pytest.raises(ValueError, match=says):
            settings_of("stale", **wrong)
    with pytest.raises(ValueError, match=r"did you mean 'upload_every'"):
        settings_of("stale", upload_evry=2)
    with pytest.raises(ValueError, match="at least 1"):
        settings_of("fed_avg", upload_every=0)  # wrong even where it does not matter
    assert "upload_every" not in preset("smoke", "fsl_sage").to_dict()["algorithm"]


@pytest.mark.parametrize(("line", "says"), [
    ("upload_every: int = setting(0, 1)", "upload_every=0"),
    ("upload_every: int = setting('often', among=('often',))", "of type int"),
])  # fmt: skip
def test_settings_whose_defaults_are_wrong_are_refused_when_they_are_loaded(parts, line, says):
    text = parts.read_text()
    parts.write_text(text.replace("upload_every: int = setting(2, 1)", line))
    with pytest.raises(PluginError, match=says):
        load_plugins([parts])
    assert not PLUGGED
