"""The package as others get it: built from what is committed, installed where there is nothing else, and used there."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import ROOT

UV = Path(sys.executable).parent / "uv"
pytestmark = pytest.mark.slow


def run(*command, cwd):
    """A command that knows nothing of this checkout and of the environment the tests run in."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "FSL_SAGE_DATA", "FSL_SAGE_RUNS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files git knows, and those it would not ignore: a clean clone after the next commit."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git repository: what belongs to the package is not known")
    folder = tmp_path_factory.mktemp("clone")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone):
    """By way of the source distribution, so that this is whole, too."""
    run(UV, "build", "--quiet", cwd=clone)
    (wheel,) = (clone / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def metadata(wheel):
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_wheel_is_small_and_has_the_package_only(wheel):
    assert wheel.stat().st_size <= 5 * 2**20
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"fsl_sage", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    package = ROOT / "fsl_sage"
    files = [package / "py.typed", *(package / "embedded").iterdir(), *package.rglob("*.py")]
    in_package = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if name.startswith("fsl_sage/")} == in_package
    assert any(name.endswith("/LICENSE") for name in names)


def test_source_distribution_has_no_pictures(clone, wheel):
    (source,) = (clone / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert source.stat().st_size <= 5 * 2**20


def test_metadata_is_complete(metadata, settings):
    for field in ("Summary", "Author-email", "License-Expression", "License-File", "Keywords", "Requires-Python"):
        assert metadata[field], field
    assert (metadata["Name"], metadata["Version"]) == (settings["lib_name"], settings["version"])
    assert metadata["Summary"] == settings["description"]
    assert metadata["Requires-Python"] in (f">={settings['min_python']},<3.15", f"<3.15,>={settings['min_python']}")
    assert metadata["Description-Content-Type"] == "text/markdown" and "## Ten lines" in metadata.get_payload()
    assert len(metadata.get_all("Classifier")) >= 5 and metadata.get_all("Project-URL")
    extras = {name.removesuffix("_requirements") for name in settings if name.endswith("_requirements")}
    assert set(metadata.get_all("Provides-Extra")) == extras
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(plain) == len(settings["requirements"].split())


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """An environment with the wheel and what it asks for: no extras, no checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(UV, "venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    run(UV, "pip", "install", "--quiet", "--python", folder / "env/bin/python", wheel, cwd=folder)
    return folder


def test_the_ten_lines_run_elsewhere(elsewhere):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    code += "\nimport fsl_sage; print(fsl_sage.__file__)"
    printed = run(elsewhere / "env/bin/python", "-c", code, cwd=elsewhere)
    assert re.search(r"fsl_sage: accuracy 0\.\d\d after \d+\.\d MiB", printed)
    assert Path(printed.splitlines()[-1]).is_relative_to(elsewhere / "env")


@pytest.mark.parametrize("command", ["fsl-sage", "fsl-sage-runs", "fsl-sage-reproduce", "fsl-sage-federate"])
def test_commands_answer_elsewhere(elsewhere, command, settings):
    assert command in settings["console_scripts"]
    assert command in run(elsewhere / "env/bin" / command, "--help", cwd=elsewhere)


def test_a_clean_clone_can_be_installed(clone, elsewhere):
    """`pip install .`, over the wheel's dependencies."""
    python = elsewhere / "env/bin/python"
    run(UV, "pip", "install", "--quiet", "--python", python, "--reinstall", "--no-deps", ".", cwd=clone)
    assert run(python, "-c", "import fsl_sage; print(fsl_sage.__version__)", cwd=elsewhere).strip()
