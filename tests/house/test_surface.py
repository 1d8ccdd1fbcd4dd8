"""What strangers meet first: workflows, hooks, templates and CONTRIBUTING name what there is."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
VARIABLES = set(re.findall(r"^([A-Z_]+) =", MAKEFILE, re.M))


def unknown(command):
    """What a `make` command names that the Makefile does not have."""
    program, *words = shlex.split(command)
    assert program == "make", command
    names = [word.partition("=")[::2] for word in words]
    return [name for name, value in names if name not in (VARIABLES if value else TARGETS)]


def steps_of(workflow):
    jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"]
    return {job: [step["run"] for step in facts["steps"] if "run" in step] for job, facts in jobs.items()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_the_makefile_has(workflow):
    steps = steps_of(workflow)
    assert steps and all(steps.values())
    commands = [command for runs in steps.values() for command in runs if command != "bash .ci/run"]
    assert [command for command in commands if unknown(command)] == []
    assert unknown("make chekc PYTHON=x SPEED=2") == ["chekc", "SPEED"]


def test_ci_runs_what_the_makefile_has():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    commands = re.findall(r"^make .*$", script, re.M)
    assert len(commands) >= 3 and [command for command in commands if unknown(command)] == []


def test_workflows_check_test_document_and_build_with_every_python():
    jobs = {job: runs for workflow in WORKFLOWS for job, runs in steps_of(workflow).items()}
    commands = " ".join(command for runs in jobs.values() for command in runs)
    assert all(f"make {target}" in commands for target in ("check", "test", "docs", "wheel"))
    (matrix,) = re.findall(r"matrix: \{python: (\[.*\])\}", "".join(path.read_text("utf-8") for path in WORKFLOWS))
    first, last = re.search(r"Needs python3 \(3\.(\d+) to 3\.(\d+)\)", MAKEFILE).groups()
    assert yaml.safe_load(matrix) == [f"3.{minor}" for minor in range(int(first), int(last) + 1)]


def test_every_target_is_in_the_help_and_the_other_way_round():
    said = set(re.findall(r"@echo 'make ([a-z-]+)", MAKEFILE))
    assert said == TARGETS - {"help"}
    assert {target for target in TARGETS if not re.search(rf"^{target}:", MAKEFILE, re.M)} == set()


def hooks_of():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    return {hook["id"]: hook for hook in repo["hooks"]}


def test_hooks_are_programs_of_the_environment():
    hooks = {name: hook for name, hook in hooks_of().items() if hook["language"] == "system"}
    assert set(hooks) == {"nbdev-clean", "nbdev-export", "ruff", "ruff-format", "layers"}
    programs = [Path(hook["entry"].split()[0]) for hook in hooks.values()]
    assert all(path.parts[:2] == (".venv", "bin") for path in programs)
    assert [path.name for path in programs if not shutil.which(path.name, path=Path(sys.executable).parent)] == []


@pytest.mark.parametrize(
    ("message", "fine"),
    [
        ("ledger: price a copy once\n", True),
        ("front door: give each name an example\n\nReason.\n", True),
        ("Price a copy once\n", False),
        ("ledger: price a copy once.\n", False),
        ("ledger: " + "a" * 65 + "\n", False),
        ("ledger: price a copy once\nReason without a line between.\n", False),
    ],
)
def test_the_hook_for_messages_knows_the_form(message, fine):
    hook = hooks_of()["message"]
    assert (hook["language"], hook["stages"], hook["args"]) == ("pygrep", ["commit-msg"], ["--negate", "--multiline"])
    assert bool(re.search(hook["entry"], message, re.MULTILINE | re.DOTALL)) is fine


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_have_a_name_and_a_purpose(template):
    _, head, body = template.read_text("utf-8").split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"name", "about"} and body.count("**") >= 6


def test_there_is_a_template_for_each_kind_of_report():
    assert {path.stem for path in TEMPLATES} == {"bug", "reproduction", "algorithm"}
    for name in ("CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", ".github/pull_request_template.md"):
        assert (ROOT / name).stat().st_size > 300


def test_contributing_names_the_areas_and_commands_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    areas = {path.name for path in (ROOT / "fsl_sage").iterdir() if (path / "__init__.py").exists()}
    assert areas | {"core", "ledger", "config"} == set(re.findall(r"^\| `([a-z]+)` \|", text, re.M))
    commands = re.findall(r"^(make [^#\n]*?) *(?:#.*)?$", text, re.M)
    assert "make check" in commands and [command for command in commands if unknown(command)] == []
