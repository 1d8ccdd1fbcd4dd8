"""What README and docs/ promise a newcomer."""

import re
import shlex

import pytest

from fsl_sage.algorithms.all import ALGORITHMS, cost_words
from fsl_sage.commands.train import main
from fsl_sage.config.experiment import PLUGGED
from fsl_sage.config.settings import algorithms
from fsl_sage.data.partition import DISTRIBUTIONS
from fsl_sage.data.sources import KNOWN
from fsl_sage.networks.zoo import MODELS
from tests.support import ROOT

OWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
TEXTS = [*OWN, *sorted((ROOT / "docs").rglob("*.md"))]


def code_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def test_the_ten_lines_run(capsys):
    (code,) = code_of(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"fsl_sage: accuracy 0\.\d\d after \d+\.\d MiB", printed) and "cut_grad" in printed


def test_code_of_the_documentation_runs(capsys):
    examples = [code for path in TEXTS[1:] for code in code_of(path)]
    assert examples
    for code in examples:
        exec(compile(code, "docs", "exec"), {})
    assert "torch.Size" in capsys.readouterr().out


def test_commands_that_only_show_an_experiment_work(capsys):
    page = (ROOT / "docs" / "how_to" / "3_command_line.md").read_text("utf-8")
    commands = re.findall(r"^fsl-sage (--cfg .*)$", page, re.M)
    shown = {command: [main(shlex.split(command, comments=True)), capsys.readouterr().out] for command in commands}
    assert len(commands) == 4 and all(status == 0 for status, _ in shown.values())
    table, reference, sweep, text = (out for _, out in shown.values())
    assert "epoch: 2" in table and "batch_size: 50" in table and "align_interval: 7" in reference
    assert re.findall(r"^seed: (\d+)$", sweep, re.M) == ["200", "201", "202"] and "name: a,b\n" in text


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(text):
    places = re.findall(r"\]\((?!https?:)([^)#]+)\)", text.read_text("utf-8"))
    assert [place for place in places if not (text.parent / place).exists()] == []


def test_every_library_notebook_is_in_the_reading_path():
    listed = (ROOT / "docs" / "reading_path.md").read_text("utf-8")
    assert [path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb") if f"`{path.stem}`" not in listed] == []


def own(kind, names):
    """Names that are not a plug-in's, which another test in this process may have loaded."""
    return [name for name in names if (kind, name) not in PLUGGED]


def test_what_there_is_is_listed():
    listed = (ROOT / "docs" / "algorithms.md").read_text("utf-8")
    names = [*own("algorithm", algorithms()), *own("model", MODELS), *own("dataset", KNOWN), *DISTRIBUTIONS]
    assert [name for name in names if f"`{name}`" not in listed] == []


PROMISES = {  # words of README → what holds them
    "come out to a relative 1e-7 or better": "test_traces.py::test_trace",
    "The totals are those of the released code at the headline settings": "test_properties.py::test_published_bytes",
    "the released code's 2.613, 40.078 and 8.029 MiB": "nbs/20_networks.zoo.ipynb::== 2.613",
    "SGLR's Table 6 follows from the ledger": "test_sglr.py::test_ledger_is_table_6",
    "**Same seed, same history**": "test_properties.py::test_same_seed_same_history",
    "also when a run is killed and resumed": "test_runs.py::test_killed_many_times_the_history_is_the_same",
    "trains *one shared* upper half": "test_properties.py::test_shared_server_is_another_algorithm",
    "`DEVICE=cpu|cuda|auto`": "Makefile::--device $(DEVICE)",
    "as a site that needs no network": "test_docs.py::test_pages_load_nothing_from_a_network",
    "`pip install .`": "test_wheel.py::Requires-Python",
    "## Ten lines": "test_readme.py::test_the_ten_lines_run",
    "The error for a wrong name or value lists the right ones": "test_bad_input.py::test_configuration",
    "the words are those of the authors' code": "test_cli.py::test_the_authors_command_is_the_published",
    "fsl-sage-federate local --clients 2": "test_federate.py::test_processes_end_with_the_history",
    "any other, cut after any layer that alone feeds the layers above": "test_cut.py::test_listed_cuts_can_be_made",
    "the store of runs by its digest": "test_plugins.py::test_two_files_with_one_name_are_two_experiments",
    "put `cifar10.npz` into a folder": "test_advice.py::a_place_for_data",
    "give the same command again: it resumes": "test_faults.py::test_a_finished_run_is_not_run_again",
    "`run nbdev_export`, `run nbdev_clean`": "test_packaging.py::run nbdev_",
}


def test_each_promise_has_what_holds_it():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert [words for words in PROMISES if words not in readme] == []
    for place in PROMISES.values():
        file, _, what = place.partition("::")
        path = next((ROOT / "tests").rglob(file)) if file.startswith("test_") else ROOT / file
        assert what in path.read_text("utf-8"), place


def test_the_table_lists_what_there_is():
    rows = re.findall(r"^\| (algorithms|networks|data sets) \| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    listed = {kind: re.findall(r"`([a-z]\w*)`", text) for kind, text in rows}
    assert sorted(listed["algorithms"]) == sorted(own("algorithm", algorithms()))
    with_stem = [f"{name}_cifar" for name in ("resnet18", "resnet50", "resnet152")]
    assert sorted(listed["networks"] + with_stem) == sorted(own("model", MODELS))
    assert set(listed["data sets"]) == set(own("dataset", KNOWN)) - {"imagefolder"}  # folders of pictures


def test_the_table_of_costs_is_what_the_records_say():
    text = (ROOT / "docs" / "algorithms.md").read_text("utf-8")
    for name in own("algorithm", ALGORITHMS):
        record = ALGORITHMS[name]
        words = cost_words(record)
        cells = (f"`{name}`", *(words[what] for what in ("client", "server", "up", "down")), record.order)
        assert f"| {' | '.join(cells)} |" in text
