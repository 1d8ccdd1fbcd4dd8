"""What README and docs/ promise a newcomer."""

import re
import shlex
from pathlib import Path

import pytest

from fsl_sage.cli import main
from fsl_sage.config import ALGORITHM_FIELDS
from fsl_sage.data import DISTRIBUTIONS, KNOWN
from fsl_sage.split import MODELS

ROOT = Path(__file__).parent.parent
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


def test_what_there_is_is_listed():
    listed = (ROOT / "docs" / "algorithms.md").read_text("utf-8")
    names = [*ALGORITHM_FIELDS, *MODELS, *KNOWN, *DISTRIBUTIONS]
    assert [name for name in names if f"`{name}`" not in listed] == []
