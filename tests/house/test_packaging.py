"""What is written down twice says the same: requirements, version, notebooks and the package exported from them."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fsl_sage
from tests.support import ROOT

BIN = Path(sys.executable).parent
LIBRARY = sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "tutorials").glob("*.ipynb")])
FIGURES = sorted((ROOT / "figures").glob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge calls a package otherwise
ONLY_FOR_NOTEBOOKS = (
    "nbdev", "execnb", "fastcore", "IPython", "ipykernel", "ipywidgets", "jupyter_client", "nbformat", "papermill",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_environment_yml_asks_for_what_settings_ini_asks_for(settings):
    def conda_name(requirement):
        name = re.match(r"[\w.-]+", requirement)[0]
        return CONDA_NAMES.get(name, name) + requirement[len(name) :]

    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    from_conda = [entry for entry in dependencies if isinstance(entry, str)]
    from_pip = [requirement for entry in dependencies if isinstance(entry, dict) for requirement in entry["pip"]]
    asked = [*settings["requirements"].split(), *settings["dev_requirements"].split()]
    python = re.search(r'python_requires=f"(.*)"', (ROOT / "setup.py").read_text("utf-8"))[1]
    python = "python" + python.replace("{settings['min_python']}", settings["min_python"])
    assert python in from_conda
    first, last = re.fullmatch(r"python>=3\.(\d+),<3\.(\d+)", python).groups()
    for name in ("README.md", "Makefile", "docs/troubleshooting.md"):
        assert f"Python 3.{first} to 3.{int(last) - 1} is needed" in (ROOT / name).read_text("utf-8")
    given = {*from_conda, *map(conda_name, from_pip)} - {python, "pip"}
    assert given == set(map(conda_name, asked))


def test_bounds_of_dependencies_are_those_of_the_table(settings):
    """docs/dependencies.md says which release mended which hole: a bound below it fails here."""
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| (\S+) \| `(\S+)` \|.*\| (\S+) \|$", page)
    table = {name + bound for name, bound, _ in rows}
    asked = {r for key, value in settings.items() if key.endswith("requirements") for r in value.split()}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    assert table == asked | set(build) and len(rows) == len(table)
    assert all(date == "–" or date >= "2026-11-26" for _, _, date in rows)


def locked_versions(text):
    """What a lock file holds: name → versions; a name has several for different platforms or Pythons."""
    versions = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        requirement = Requirement(entry.split(" \\\n")[0])
        (exact,) = requirement.specifier
        assert exact.operator == "==" and re.search(r"\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:60]
        versions.setdefault(canonicalize_name(requirement.name), []).append(exact.version)
    return versions


def out_of_step(versions, asked):
    """Requirements that a lock file does not meet."""
    needed = [Requirement(one) for one in asked]
    held = {one: versions.get(canonicalize_name(one.name), []) for one in needed}
    return [str(one) for one, found in held.items() if not found or not all(map(one.specifier.contains, found))]


def test_the_lock_file_is_in_step_with_settings_ini(settings):
    """Each requirement has a version that fits, each version a hash, and no address or path is in the file."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    asked = [*settings["requirements"].split(), *settings["dev_requirements"].split(), *build]
    versions = locked_versions(text)
    assert len(versions) > 100 and not out_of_step(versions, asked), "run make lock"
    assert "://" not in text and "/" not in text and not re.search("(?m)^(-|#)", text)
    assert out_of_step(versions, ["numpy>=99", "no-such-package", "torch"]) == ["numpy>=99", "no-such-package"]
    with pytest.raises(AssertionError):
        locked_versions(text + "\nnumpy==2.4.6")  # without a hash


@pytest.mark.parametrize(
    ("package", "holed"),
    [
        ("pillow", "12.3.0"), ("tqdm", "4.66.2"), ("jinja2", "3.1.5"), ("jupyterlab", "4.6.3"), ("ray", "2.55.0"),
        ("setuptools", "82.0.1"), ("hydra-core", "1.3.6"), ("nbconvert", "7.17.0"), ("pyarrow", "23.0.0"),
        ("joblib", "1.4.2"), ("pytest", "9.0.2"), ("torch", "2.10.0"), ("filelock", "3.20.2"),
    ],
)  # fmt: skip
def test_releases_with_known_holes_are_excluded(settings, package, holed):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    asked = [r for key, value in settings.items() if key.endswith("requirements") for r in value.split()]
    requirements = [r for r in map(Requirement, [*asked, *build]) if r.name == package]
    assert requirements and not any(r.specifier.contains(holed) for r in requirements)


def test_version_and_licence_are_the_same_everywhere(settings):
    assert fsl_sage.__version__ == settings["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (settings["version"], "MIT")
    assert "MIT License" in (ROOT / "LICENSE").read_text("utf-8")


def test_package_imports_without_nbdev_and_jupyter():
    package = ROOT / "fsl_sage"
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in package.rglob("[a-z]*.py")]
    assert "fsl_sage.experiments.train" in modules
    forbid = f"import sys; sys.modules.update(dict.fromkeys({ONLY_FOR_NOTEBOOKS!r}))"  # None there: ImportError
    code = f"{forbid}\nimport importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "fsl_sage").mkdir()
    for by_hand in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "fsl_sage" / by_hand, tmp_path / "fsl_sage")
    done = subprocess.run([BIN / "nbdev_export"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = tmp_path / "fsl_sage", ROOT / "fsl_sage"
    exported, ours = ({path.relative_to(package).as_posix() for path in package.rglob("*.py")} for package in packages)
    assert exported == ours
    _, differ, errors = filecmp.cmpfiles(*packages, exported, shallow=False)
    assert not differ + errors, "run nbdev_export"


@pytest.mark.parametrize("folder", ["nbs", "figures"])
def test_notebooks_are_clean(folder, tmp_path):
    notebooks = sorted((ROOT / folder).glob("**/*.ipynb"))
    notebooks = [path for path in notebooks if not {"executed", ".ipynb_checkpoints"} & set(path.parts)]
    shutil.copy(ROOT / "settings.ini", tmp_path)
    copies = tmp_path / folder
    for path in notebooks:
        copy = copies / path.relative_to(ROOT / folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    copies.mkdir(exist_ok=True)
    done = subprocess.run([BIN / "nbdev_clean", "--fname", copies], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = [p.name for p in notebooks if p.read_bytes() != (copies / p.relative_to(ROOT / folder)).read_bytes()]
    assert not changed, "run nbdev_clean"


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda path: path.stem)
def test_stored_outputs_are_for_every_reader(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    unwanted = [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not unwanted, "warnings, progress bars or errors among the stored outputs"
    views = [output for output in outputs if any("widget" in kind for kind in output.get("data", ()))]
    assert not views, "a widget, which nobody could see without a kernel: store what nbconvert --execute makes"
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not re.search(r"/(home|root|tmp|Users)/|\x1b\[", "".join(map("".join, texts))), "a machine's path"


@pytest.mark.parametrize("notebook", FIGURES, ids=lambda path: path.stem)
def test_figure_notebooks_have_parameters_and_no_outputs(notebook):
    cells = code_cells(notebook)
    assert all(not cell["outputs"] for cell in cells)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    assert {"preset", "device", "gallery"} <= set(papermill.inspect_notebook(str(notebook)))
