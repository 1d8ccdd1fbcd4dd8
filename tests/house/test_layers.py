"""Areas import only from areas below them: the contract of pyproject.toml holds, and says so when it does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def layers(folder):
    """import-linter's verdict on the package in `folder`."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_areas_import_only_from_areas_below():
    done = layers(ROOT)
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "fsl_sage", tmp_path / "fsl_sage", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("core", "ledger"),
        ("data/images", "networks.cut"),
        ("config/experiment", "algorithms.sage"),
        ("costs/table", "papers.plots"),
    ],
)
def test_an_import_from_above_is_named(copy, below, above):
    module = copy / "fsl_sage" / f"{below}.py"
    module.write_text(f"{module.read_text('utf-8')}\n\ndef late():\n    import fsl_sage.{above}\n", "utf-8")
    done = layers(copy)
    assert done.returncode == 1
    assert f"fsl_sage.{below.replace('/', '.')} -> fsl_sage.{above}" in done.stdout


def test_a_new_area_has_to_take_its_place(copy):
    (copy / "fsl_sage" / "attic").mkdir()
    (copy / "fsl_sage" / "attic" / "__init__.py").touch()
    done = layers(copy)
    assert done.returncode == 1 and "attic" in done.stdout + done.stderr
