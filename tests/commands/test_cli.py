"""`fsl-sage`: the authors' words, one store with the notebooks, sweeps in processes, and what a user may get wrong."""

import importlib
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
from safetensors.torch import load_file

from fsl_sage.commands import reproduce
from fsl_sage.commands import runs as runs_cli
from fsl_sage.commands.schema import explained
from fsl_sage.commands.train import main
from fsl_sage.commands.words import jobs_of
from fsl_sage.config.presets import preset
from fsl_sage.experiments import attempt
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import checkpoint_of, model_of
from fsl_sage.networks.zoo import resnet
from tests.support import ROOT

SMALL = ["preset=smoke", "rounds=1", "device=cpu"]
PARTS = """
from torch import nn
from fsl_sage import network

@network("flat", cut="0")
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
    code = "import sys\nfrom fsl_sage.commands.train import main\nassert main(['--help']) == 0\n"
    code += "assert 'torch' not in sys.modules"
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
    monkeypatch.setattr(attempt, "train", None)  # whoever trains now, fails
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
        (["plugins=[~no-such-user/my.py]"], "~no-such-user/my.py: there is no home folder ~no-such-user"),
        ([*SMALL, "data_root=~no-such-user"], "~no-such-user: there is no home folder ~no-such-user; name"),
        (["+new=1"], "+new=1"),
        (["~seed"], "~seed"),
        (["=3"], "'=3'"),
        (["dataset@x=mnist"], "dataset@x=mnist"),
        (["model.client={epok:2}"], "did you mean model.client.epoch"),
        (["seed=-1"], "fsl-sage: seed=-1: must be a whole number, 0 or more"),
        (["seed=18446744073709551616"], "fsl-sage: seed=18446744073709551616: must be at most 2**63 - 1"),
        (["preset=smoke", "rounds=${nothing}"], "rounds=${nothing}: Interpolation key 'nothing' not found"),
        (["-m", "seed=interval(1,3)"], "seed=interval(1,3): must be values between commas, or range(START,STOP)"),
        (["-m", "algorithm=glob(s*)"], "algorithm=glob(s*): must be values between commas"),
        (["-m", "seed=range(1,9,0)"], "seed=range(1,9,0): must be values between commas"),
        (["-m", "seed=range(1,9,0.0)"], "seed=range(1,9,0.0): must be values between commas"),
        (["-m", "seed=range(4,1)"], "seed='range(4,1)': must be a sweep over 1 to 1000 values"),
        (["-m", "seed=range(1,1000000)"], "must be a sweep over 1 to 1000 values"),
        (["-m", "seed=shuffle(range(1,1000000000000))"], "must be a sweep over 1 to 1000 values"),
        (["-m", "seed=range(0,100)", "rounds=range(1,100)"], "'9900 runs': must be 1000 runs or fewer"),
        (["-m", "plugins=[a.py],[b.py]"], "plugins='[a.py],[b.py]': must be the same for all runs"),
        (["-m", "device=cpu,cuda"], "device='cpu,cuda': must be the same for all runs"),
        (["-m", *SMALL, "seed=1,2", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: ValueError"),
        (["-m", *SMALL, "seed=1,2", "hydra/launcher=nothere"], "hydra/launcher=nothere: "),
        (["-m", *SMALL, "seed=1,2", "hydra.launcher.nothing=3"], "hydra.launcher.nothing=3: "),
        (["-m", *SMALL, "seed=1,2", "hydra.sweeper=3"], "hydra.sweeper=3: "),
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


def shown(*words):
    (job,) = jobs_of(words)
    return job.experiment


def test_the_preset_comes_before_the_words():
    """References and tables see the preset's values, not those of the classes."""
    assert shown("preset=quick", "algorithm.align_interval=${rounds}").algorithm.align_interval == 7
    assert shown("preset=smoke", "algorithm=fed_avg", "rounds=${model.width}").rounds == 8
    assert shown("preset=quick", "num_clients=${rounds}").num_clients == 7
    assert shown("preset=quick", "clock.seed=${seed}", "clock.spread=1", "seed=5").clock.seed == 5
    assert shown("preset=smoke", "init_seed=${partition_seed}", "seed=5").init_seed == 5
    client = shown("preset=smoke", "algorithm=sglr", "model.client={epoch:2}").model.client
    assert (client.epoch, client.batch_size, client.optimizer.scheduler.name) == (2, 16, "fraction")
    words = "preset=smoke", "algorithm={name:sglr}", "model={width:4,client:{optimizer:{lr:0.5}}}", "clock={}"
    changes = {"model.width": 4, "model.client.optimizer.lr": 0.5, "clock": {}}
    assert shown(*words) == preset("smoke", "sglr", **changes)
    assert shown("preset=smoke", "model.client.optimizer.scheduler={name:step}") == preset(
        "smoke", **{"model.client.optimizer.scheduler.name": "step"}
    )
    assert shown("preset=smoke", "algorithm=sglr", "model.client.optimizer.scheduler=null") == preset(
        "smoke", "sglr", **{"model.client.optimizer.scheduler": None}
    )


NAMES = ["1_000", "1e3", "true", "null", "2024", "mnist", "données", "run=3", "~x", "a (1)", "b'"]


@pytest.mark.parametrize("name", NAMES)
def test_text_stays_text_with_quotes_and_without(tmp_path, name):
    (tmp_path / f"{name}.npz").touch()
    quoted = "'" + name.replace("'", "\\'") + "'"
    for word in (f"dataset.name={name}", f"dataset.name={quoted}", f"dataset={name}", f"dataset={quoted}"):
        assert shown("preset=smoke", f"data_root={tmp_path}", word).dataset.name == name
    for text in (f"/data/{name}", f"'/data/{quoted[1:]}"):
        (job,) = jobs_of(["preset=smoke", f"data_root={text}"])
        assert job.options.data_root == f"/data/{name}"
    one, two = jobs_of(["preset=smoke", f"data_root={tmp_path}", f"dataset={quoted},fmnist_mini"], multirun=True)
    assert [one.experiment.dataset.name, two.experiment.dataset.name] == [name, "fmnist_mini"]
    again = jobs_of(one.words)  # as in another process
    assert again[0].experiment == one.experiment


def advised(capsys, *words):
    """The words between double quotes that the message advises."""
    assert main(list(words)) == 2
    return re.findall('"(.*?)"', capsys.readouterr().err)[-1]


def test_the_advice_to_quote_works(store, capsys, tmp_path):
    assert advised(capsys, "preset=smoke", f"data_root={tmp_path}/a,b") == "data_root='a,b'"
    (job,) = jobs_of(["preset=smoke", "data_root='a,b'"])
    assert job.options.data_root == "a,b"
    assert advised(capsys, "preset=smoke", "dataset={name:é}") == "KEY='text'"
    here = f"data_root={tmp_path}"
    for name in ("é", "1e3"):
        (tmp_path / f"{name}.npz").touch()
    assert shown("preset=smoke", here, "dataset={name:'é'}").dataset.name == "é"
    assert main(["preset=smoke", "dataset={name:1e3}"]) == 2 and "needs quotes of its own" in capsys.readouterr().err
    assert shown("preset=smoke", here, "dataset={name:'1e3'}").dataset.name == "1e3"
    assert main(["-m", "preset=smoke", "dataset.name=choice(1e3,2)"]) == 2 and "quotes" in capsys.readouterr().err
    sweep = jobs_of(["preset=smoke", "dataset.name=choice('1e3','2')"], multirun=True)
    assert [job.experiment.dataset.name for job in sweep] == ["1e3", "2"]


def test_sweeps_through_the_launcher_keep_their_text(store, tmp_path, capsys):
    experiment = preset("smoke", "fed_avg", rounds=1)
    images, classes = np.zeros((600, 28, 28), np.uint8), np.arange(600) % 10
    arrays = {"x_train": images, "y_train": classes, "x_test": images, "y_test": classes}
    np.savez(tmp_path / "1_000.npz", **arrays)
    words = ["-m", *SMALL, "rounds=${eval_every}", f"data_root={tmp_path}", "algorithm=fed_avg"]
    assert main([*words, "dataset=1_000,fmnist_mini", "hydra.launcher.n_jobs=1"]) == 0, capsys.readouterr().err
    for name in ("1_000", "fmnist_mini"):
        assert store.find(experiment.replace(**{"dataset.name": name})) is not None


COMMANDS = "train", "runs", "reproduce", "federate", "ranks"


def test_all_commands_are_named():
    """Each module of the area that has a `main`."""
    modules = [path.stem for path in (ROOT / "fsl_sage" / "commands").glob("*.py")]
    has_main = [name for name in modules if hasattr(importlib.import_module(f"fsl_sage.commands.{name}"), "main")]
    assert sorted(has_main) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_module_that_runs(tmp_path, name):
    """`python -m` of it says how it is used, and how it is not."""
    module = f"fsl_sage.commands.{name}"
    asked = in_a_process(["-m", module, "--help"], tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "") and "usage" in asked.stdout.lower()
    wrong = in_a_process(["-m", module, "--no-such-option"], tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr and "Traceback" not in wrong.stderr


def test_a_module_that_a_command_is_named_after_says_so(tmp_path):
    done = in_a_process(["-m", "fsl_sage.machines.ranks"], tmp_path)
    assert done.returncode == 1 and "-m fsl_sage.commands.ranks" in done.stderr and "Traceback" not in done.stderr


def test_a_sweep_leaves_hydras_own_command_line_alone(store, capsys, monkeypatch):
    """Python 3.14's argparse refuses a help text of its parser."""

    def refused():
        raise ValueError("badly formed help string")

    monkeypatch.setattr(importlib.import_module("hydra.main"), "get_args_parser", refused)
    words = ["-m", *SMALL, "algorithm=fed_avg", "seed=1,2", "hydra.launcher.n_jobs=1", "hydra.mode=RUN"]
    assert main(words) == 0, capsys.readouterr().err
    assert all(store.find(preset("smoke", "fed_avg", rounds=1, seed=seed)) for seed in (1, 2))


WORDS = ("commands.train", "--help"), ("commands.train", "--cfg", "preset=smoke"), ("commands.runs", "list")


@pytest.mark.parametrize("words", WORDS)
def test_a_closed_pipe_ends_a_command_quietly(tmp_path, words):
    code = f"import sys\nfrom fsl_sage.{words[0]} import main\nsys.exit(main({words[1:]}))"
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "FSL_SAGE_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_on_a_terminal_that_lacks_letters(tmp_path):
    done = in_a_process(["-m", "fsl_sage", "--help"], tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == "" and "?" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_output_that_cannot_be_written(tmp_path):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "fsl_sage", "--help"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("the output cannot be written: ")
    assert done.stderr.count("\n") == 1


def test_a_plug_in_that_prints_or_ends_the_program(store, capsys, tmp_path):
    (tmp_path / "loud.py").write_text(PARTS + "print('loud')\n")
    (tmp_path / "leaves.py").write_text("\nraise SystemExit(3)\n")
    assert main(["--cfg", "preset=smoke", f"plugins=[{tmp_path}/loud.py]"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("loud\n") and "loud" not in printed.out
    assert "model=flat" in printed.err  # the way to use what was loaded for nothing
    assert main(["--cfg", "preset=smoke", f"plugins=[{tmp_path}/leaves.py]"]) == 2
    assert "leaves.py, line 2: SystemExit: 3" in capsys.readouterr().err


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


TYPED = """
from pathlib import Path
from typing import Literal
preset: str = "quick"
device: str = "auto"
gallery: str = "gallery"
size: int | None = None
kind: Literal["one", "two"] = "one"
place: Path = Path()
shape: tuple[int, ...] = ()
counts: dict[str, int] = {}
"""
CHECKED = """
from fsl_sage.config.presets import check_parameters
check_parameters(globals())
print((size, kind, place, shape, counts))
"""


def test_every_command_names_a_home_that_is_nobodys(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", "~no-such-user/runs")
    figures = typed_figure(tmp_path / "figures")
    for command, words in ((runs_cli.main, ["list"]), (reproduce.main, figures)):
        with pytest.raises(SystemExit) as end:
            command(words)
        assert end.value.code == 2
        assert "error: ~no-such-user/runs: there is no home folder ~no-such-user; name" in capsys.readouterr().err
    assert main(SMALL) == 2


def typed_figure(folder):
    folder.mkdir()
    parameters, check = nbformat.v4.new_code_cell(TYPED.strip()), nbformat.v4.new_code_cell(CHECKED.strip())
    parameters.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, check], metadata=kernel), folder / "own.ipynb")
    return ["--figures", str(folder), "--preset", "smoke", "--gallery", str(folder / "gallery"), "--device", "cpu"]


def test_a_figure_in_a_folder_with_braces_has_parameters_of_any_type(store, tmp_path, capfd):
    words = typed_figure(tmp_path / "a {b} {preset}")
    values = {"size": "3", "kind": "two", "place": "a/b", "shape": "[1, 2]", "counts": '{"a": 3}'}
    reproduce.main([*words, *(word for name, value in values.items() for word in ("-p", name, value))])
    printed = capfd.readouterr()
    assert "1 of 1 figures made" in printed.out, printed
    executed = nbformat.read(tmp_path / "a {b} {preset}" / "executed" / "own.ipynb", 4)
    said = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", ()))
    assert said == "(3, 'two', PosixPath('a/b'), (1, 2), {'a': 3})\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-p", "preset", "smok"], "-p preset='smok': must be given by --preset"),
        (["-p", "gallery", "elsewhere"], "-p gallery='elsewhere': must be given by --gallery"),
        (["-p", "device", "gpu"], "-p device='gpu': must be given by --device"),
        (["-p", "seeds", "[1]"], "-p seeds='[1]': must be given by --seeds"),
        (["--seeds", "-1"], "--seeds=[-1]: must be from 0 to 2**63 - 1"),
        (["--seeds", str(2**64)], "must be from 0 to 2**63 - 1"),
        (["-p", "kinds", "one"], "must be one of preset, device, gallery, size, kind, place, shape, counts"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said_in_a_line(store, tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as end:
        reproduce.main([*typed_figure(tmp_path / "figures"), *words])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fsl-sage-reproduce: error: ") and says in last
