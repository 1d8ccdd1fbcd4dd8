"""The published settings on small machines: what is drawn without training, and what side by side means on a GPU."""

import json

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fsl_sage.commands.figures import figure_notebooks, plan, planned, train_planned
from fsl_sage.commands.reproduce import check_preset, claim_seeds, claimed, main
from fsl_sage.costs.estimate import BUNDLES
from fsl_sage.experiments import pool
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import model_of
from fsl_sage.papers.standing import read_versus
from tests.support import ROOT

FIGURES = ROOT / "figures"
SOURCES = {
    "parameters": 'preset: str = "smoke"\ndevice: str = "cpu"\ngallery: str = ""\n',
    "plan": (
        "from fsl_sage.config.presets import preset as of\n"
        'tiny = {"rounds": 1, "dataset.max_train": 60, "dataset.max_test": 20, "num_clients": 2}\n'
        'experiments = [of(preset, name, **tiny) for name in ("fed_avg", "cse_fsl")]'
    ),
    "partly": "from fsl_sage.experiments.runs import RunStore\nstore = RunStore()\n"
    "experiments = experiments if train else store.stored(experiments)",
    "draw": "from pathlib import Path\nfrom fsl_sage.experiments.runs import RunStore\n"
    "store, folder = RunStore(), Path(gallery)\n"
    '(folder / NAME).write_text(str(len(store.get(experiments, "cpu", progress=False))))',
}


def figure(folder, name, *tags, train):
    cells = [new_markdown_cell(f"# {name}")]
    for tag in tags:
        source = SOURCES[tag].replace("NAME", repr(name))
        source += "train: bool = True\n" if train and tag == "parameters" else ""
        cells.append(new_code_cell(source, metadata={"tags": [tag]}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


@pytest.mark.slow
def test_without_training_figures_show_the_runs_that_are_there(tmp_path, monkeypatch, capsys):
    """Nothing is trained; a figure with the parameter `train` shows a part, the other is reported with its lack."""
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    figures, gallery = tmp_path / "figures", tmp_path / "gallery"
    figures.mkdir()
    figure(figures, "all_or_none", "parameters", "plan", "draw", train=False)
    figure(figures, "partly", "parameters", "plan", "partly", "draw", train=True)
    namespace = {"preset": "smoke"}
    exec(SOURCES["plan"], namespace)
    here, missing = namespace["experiments"]
    words = ["--no-train", "--preset", "smoke", "--device", "cpu", "--figures", str(figures), "--gallery", str(gallery)]

    assert main(words) == 1  # nothing is stored
    assert not list(gallery.iterdir()) or not (gallery / "partly").exists()
    RunStore().get([here], "cpu", progress=False)
    capsys.readouterr()
    main(words)
    said = capsys.readouterr().out
    assert (gallery / "partly").read_text() == "1" and not (gallery / "all_or_none").exists()
    assert said.count(f"1 of 2 runs missing: CSE-FSL seed 200 ({missing.hash})") == 2
    assert not RunStore().folder(missing).exists(), "a run was trained"
    assert "1 of 2 figures made, 1 failed" in said


def test_the_batch_keeps_the_models_that_a_figure_reads_and_no_others(tmp_path):
    """A figure of trained models need not train the runs again that another figure shows."""
    source = SOURCES["plan"] + "\nmodels = experiments[:1]"
    cells = [new_code_cell(SOURCES["parameters"], metadata={"tags": ["parameters"]})]
    cells.append(new_code_cell(source, metadata={"tags": ["plan"]}))
    nbformat.write(new_notebook(cells=cells), tmp_path / "of_models.ipynb")
    parameters = {"preset": "smoke", "device": "cpu"}
    figures = planned([tmp_path / "of_models.ipynb"], parameters, [])
    wanted, other = figures[0].experiments
    assert figures[0].models == [wanted]
    store = RunStore(tmp_path / "runs")
    assert not train_planned(figures, store, parameters, 1, force=False)
    assert store.stored([wanted, other]) == [wanted, other]
    assert [model_of(store.root, run.hash).exists() for run in (wanted, other)] == [True, False]


@pytest.mark.parametrize(("cores", "jobs"), [(1, 1), (4, 2), (16, 6)])
def test_runs_go_side_by_side_on_a_gpu(cores, jobs, monkeypatch):
    """One run leaves a GPU idle while the processor prepares its kernels."""
    monkeypatch.setattr(pool, "choose_device", torch.device)
    monkeypatch.setattr(pool, "_cores", lambda: cores)
    assert pool.default_jobs("cuda:0") == jobs and pool.default_jobs("cpu") == cores


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_is_the_papers_experiment(name):
    """Runs of the preset `paper` in all but what the preset `published` may change: evaluations, rounds, a budget."""
    bundle, same = BUNDLES[name], {"rounds": 1, "comm_threshold_mb": None}
    (figure,) = claimed(figure_notebooks(FIGURES, [bundle.figure]), {"preset": "published"}, [name]).values()
    seeds = bundle.parameters.get("seeds", [200])
    paper = plan(FIGURES / f"{bundle.figure}.ipynb", {"preset": "paper", "seeds": seeds})
    assert figure.experiments
    if name == "headline":
        of_paper = {run.replace(**same) for run in paper}
        assert {run.replace(**same) for run in figure.experiments} < of_paper
        assert all(run.eval_every == 1 and run.rounds < 200 for run in figure.experiments)
    else:
        assert {run.replace(eval_every=1) for run in figure.experiments} <= set(paper)
        assert {run.num_clients for run in figure.experiments} >= set(bundle.parameters.get("clients", []))


def test_table_5_is_drawn_from_runs_of_table_2():
    """At n = 6 both show the same experiments, but for φ = 1: none is trained twice."""
    names = ["six_clients", "table_5"]
    notebooks = figure_notebooks(FIGURES, [BUNDLES[name].figure for name in names])
    six, leakage = claimed(notebooks, {"preset": "published"}, names).values()
    (alone,) = set(leakage.experiments) - set(six.experiments)
    assert alone.algorithm.active_fraction == 1 and leakage.models == leakage.experiments


def test_a_preset_that_a_figure_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--preset", "published", "--device", "cpu", "--only", "sage_alpha", "sglr_table_4"])
    said = capsys.readouterr().err
    assert "must be smoke, quick or paper for sage_alpha; published is for sglr_table_4: name those by --only" in said
    assert check_preset(figure_notebooks(FIGURES, ["sglr_table_4"]), "published") is None
    assert claim_seeds("sglr_table_4") == [200] and claim_seeds("sglr_tables_1_to_3") == [200, 201, 202, 203, 204]


@pytest.mark.slow
def test_an_estimate_trains_nothing(tmp_path, monkeypatch, capsys):
    """A row of the table for each bundle; the store is not even made."""
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    assert main(["--estimate", "--device", "cpu", "--claims", "one_client"]) == 0
    said = capsys.readouterr().out
    header, (row,) = said.split("\n")[0].split(), [line for line in said.split("\n") if line.startswith("one_client")]
    assert header == ["runs", "PFLOP", "core_hours", "GB_sent", "GiB_memory"]
    assert float(row.split()[1]) == 10 and all(float(number) > 0 for number in row.split()[1:])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_tables_are_drawn_from_the_runs_of_one_client(tmp_path, monkeypatch, capsys):
    """A bundle is a part of its figure: the rest is left out, and said to be missing. Both losses have verdicts."""
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    asked = plan(FIGURES / "sglr_tables_1_to_3.ipynb", {"preset": "smoke", "clients": [1]})
    RunStore().get(asked, "cpu", progress=False, jobs=1)
    words = ["--no-train", "--preset", "smoke", "--device", "cpu", "--only", "sglr_tables_1_to_3"]
    assert main([*words, "--gallery", str(tmp_path / "gallery")]) == 0
    assert "10 of 12 runs missing" in capsys.readouterr().out
    assert (tmp_path / "gallery" / "sglr_tables_1_to_3.png").exists()
    versus = read_versus(tmp_path / "gallery" / "sglr_tables_1_to_3_paper_versus_ours.csv")
    assert versus[versus.n > 0].groupby("variant").size().nunique() == 1  # as many cells with the one as the other
    assert set(versus.variant) == {"", "binary cross-entropy, as released"}
    about = json.loads((tmp_path / "gallery" / "sglr_tables_1_to_3.json").read_text())
    assert [line.split(":")[0] for line in about["words"][:2]] == [
        "one client, cross entropy", "one client, binary cross entropy",
    ]  # fmt: skip


def test_one_client_is_planned_with_both_losses():
    """The stored runs with cross-entropy keep their addresses; the released code's loss adds as many runs."""
    notebooks = figure_notebooks(FIGURES, ["sglr_tables_1_to_3"])
    (figure,) = claimed(notebooks, {"preset": "published"}, ["one_client"]).values()
    stored = {path.name for path in (FIGURES / "gallery" / "published" / "histories").iterdir()}
    by_loss = {}
    for run in figure.experiments:
        by_loss.setdefault(run.algorithm.loss, []).append(run)
    assert {loss: sorted(run.seed for run in runs) for loss, runs in by_loss.items()} == {
        "cross_entropy": [200, 201, 202, 203, 204], "binary_cross_entropy": [200, 201, 202, 203, 204],
    }  # fmt: skip
    assert {run.hash for run in by_loss["cross_entropy"] if run.seed < 204} < stored
    (six,) = claimed(notebooks, {"preset": "published"}, ["six_clients"]).values()
    assert {run.algorithm.loss for run in six.experiments} == {"cross_entropy"}
