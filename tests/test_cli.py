"""`fsl-sage`: the authors' words, one store with the notebooks, sweeps in processes, and what a user may get wrong."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fsl_sage import runs
from fsl_sage.cli import explained, jobs_of, main
from fsl_sage.config import preset
from fsl_sage.runs import RunStore, checkpoint_of, model_of
from fsl_sage.split import resnet

ROOT = Path(__file__).parent.parent
SMALL = ["preset=smoke", "rounds=1", "device=cpu"]
PARTS = """
from torch import nn
from fsl_sage.plugins import split_model

@split_model("flat", cut="0")
def flat(in_channels, num_classes, image_size, width):
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), pool, nn.Flatten(), nn.Linear(16, num_classes))
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FSL_SAGE_DATA", raising=False)
    return RunStore()


def in_a_process(code_or_words, folder, **environment):
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONWARNINGS"} | path | environment
    return subprocess.run([sys.executable, *code_or_words], cwd=folder, env=environment, capture_output=True, text=True)


def test_help_needs_no_torch(tmp_path):
    code = "import sys\nfrom fsl_sage.cli import main\nassert main(['--help']) == 0\nassert 'torch' not in sys.modules"
    done = in_a_process(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("algorithm=", "dataset.alpha", "comm_threshold_mb", "save", "export", "preset=quick"):
        assert word in done.stdout


def test_help_shows_the_real_defaults():
    shown = {name: default for name, default, _ in explained("config", "Experiment")}
    assert shown["model.client.optimizer.weight_decay"] == "0.0001" and shown["rounds"] == "200"
    assert "plugins" not in shown and shown["model.client.optimizer.scheduler"] == "null"


def test_the_authors_command_is_the_published_experiment():
    command = (
        "model=resnet18 algorithm=cse_fsl dataset=cifar100 dataset.distribution=noniid_dirichlet dataset.alpha=1 "
        "rounds=200 num_clients=10 comm_threshold_mb=204800 seed=200 device=cuda save=True"
    )
    (job,) = jobs_of(command.split())
    distribution = {"dataset.distribution": "noniid_dirichlet", "dataset.alpha": 1.0, "dataset.name": "cifar100"}
    assert job.experiment == preset("paper", "cse_fsl", comm_threshold_mb=204800.0, **distribution)
    assert (job.options.device, job.options.save, job.options.resume) == ("cuda", True, True)


def test_sglr_readme_command_has_its_equivalent():
    command = (
        "preset=paper algorithm=sglr dataset=fmnist num_clients=9 rounds=250 model.client.batch_size=64 "
        "dataset.samples_per_client=5000 algorithm.loss=binary_cross_entropy algorithm.mixing_mode=concat_batch "
        "algorithm.lr_power=1 algorithm.active_fraction=1 algorithm.average_phase=initial "
        "algorithm.average_fraction=0.5 model.client.optimizer.scheduler.early=1"
    )
    shown = (ROOT / "docs" / "how_to" / "3_command_line.md").read_text("utf-8").replace("\\\n", " ")
    assert " ".join(command.split()) in " ".join(shown.split())
    (job,) = jobs_of(command.split())
    assert job.experiment.algorithm.average_fraction == 0.5 and job.experiment.dataset.rgb32
    assert job.experiment.model.client.optimizer.scheduler.early == 1


def test_without_arguments_it_begins_with_what_is_here(store, tmp_path):
    (job,) = jobs_of([f"data_root={tmp_path}"])
    assert job.experiment == preset("quick", "fsl_sage") and "cifar10 is not on this machine" in job.note
    (tmp_path / "cifar10.npz").touch()
    (job,) = jobs_of([f"data_root={tmp_path}"])
    assert job.experiment == preset("paper", "fsl_sage") and job.note == ""


def test_one_store_with_the_notebooks(store, capsys, monkeypatch):
    assert main([*SMALL, "algorithm=fed_avg"]) == 0
    assert store.find(preset("smoke", "fed_avg", rounds=1)) is not None
    monkeypatch.setattr(runs, "train", None)  # whoever trains now, fails
    assert main([*SMALL, "algorithm=fed_avg"]) == 0
    printed = capsys.readouterr()
    assert "1 run: 1 in the store" in printed.err and preset("smoke", "fed_avg", rounds=1).hash in printed.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algorithm=fedavg"], "did you mean 'fed_avg'"),
        (["model=resnet81"], "resnet18"),
        (["dataset=cifar"], "cifar10"),
        (["datset=cifar10"], "did you mean dataset"),
        (["dataset.alfa=1"], "dataset.alpha"),
        (["align_interval=5"], "algorithm.align_interval"),
        (["rounds=many"], "rounds=many"),
        (["rounds=0"], "at least 1"),
        (["rounds=1,2"], "use -m"),
        (["-m", "rounds=1,many"], "rounds=many"),
        (["dataset.distribution=dirichlet"], "noniid_dirichlet"),
        (["preset=paper2"], "smoke, quick, paper"),
        (["log=[tensorbord]"], "did you mean 'tensorboard'"),
        (["plugins=[nowhere.py]"], "nowhere.py"),
        (["+new=1"], "+new=1"),
        (["rounds"], "'rounds' is not KEY=VALUE"),
        (["--verbose"], "--verbose"),
        (["hydra.launcher.n_jobs=2"], "need -m"),
        ([*SMALL, "device=gpu"], "device='gpu'"),
        (["export", "0123", "model.safetensors"], "fsl-sage-runs list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_a_line(store, capsys, words, says):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.strip().splitlines()[-1].startswith("fsl-sage: ")
    assert "Traceback" not in printed.err and not list(store.root.glob("[0-9a-f]*"))


def test_export_gives_the_uncut_network(store, capsys, tmp_path):
    experiment, file = preset("smoke", "fed_avg", rounds=1), tmp_path / "model.safetensors"
    assert main([*SMALL, "algorithm=fed_avg"]) == 0
    assert main(["export", experiment.hash, str(file)]) == 2 and "save=True" in capsys.readouterr().err
    files = {path.name: path.read_bytes() for path in store.folder(experiment).iterdir()}
    assert main([*SMALL, "algorithm=fed_avg", "save=True"]) == 0 and "trained again" in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in store.folder(experiment).iterdir()}
    assert main(["export", experiment.hash[:6], str(file)]) == 0
    resnet((2, 2, 2, 2), in_channels=1, width=8).load_state_dict(load_file(file))
    model_of(store.root, experiment.hash).write_bytes(b"torn")
    assert main(["export", experiment.hash, str(file)]) == 2 and "damaged" in capsys.readouterr().err


def test_resume_false_begins_anew(store):
    file = checkpoint_of(store.root, preset("smoke", "fed_avg", rounds=1).hash)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a checkpoint")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is damaged")
        assert main([*SMALL, "algorithm=fed_avg", "resume=False"]) == 0


def test_a_run_that_fails_does_not_stop_the_others(store, capfd, caplog):
    words = ["-m", *SMALL, "algorithm=fed_avg", "model.client.optimizer.lr=1e30,1e-3", "hydra.launcher.n_jobs=1"]
    own = logging.getLogger("somebody's own")  # Hydra is not to silence the program that calls it
    assert main(words) == 1
    own.warning("still heard")
    assert caplog.messages == ["still heard"]
    printed = capfd.readouterr()
    assert "1 of 2 runs failed" in printed.out and "diverged" in printed.err
    assert store.find(preset("smoke", "fed_avg", rounds=1)) is not None


def test_sweep_in_processes_with_parts_of_ones_own(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    words = ["-m", *SMALL, "plugins=[parts.py]", "model=flat", "algorithm=fed_avg,psl", "hydra.launcher.n_jobs=2"]
    done = in_a_process(["-m", "fsl_sage", *words], tmp_path, FSL_SAGE_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "fed_avg" in done.stdout and "psl" in done.stdout and "2 runs: 0 in the store" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.py", "runs"]  # no outputs/, no multirun/
    assert len(list((tmp_path / "runs").glob("[0-9a-f]" * 16))) == 2
