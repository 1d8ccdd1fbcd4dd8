"""What the README promises a newcomer."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"fsl_sage: accuracy 0\.\d\d after \d+\.\d MiB", printed) and "cut_grad" in printed


def test_links_and_pictures_exist():
    places = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert places and all((ROOT / place).exists() for place in places), places


def test_every_library_notebook_is_listed():
    stems = [path.stem for path in (ROOT / "nbs").glob("*.ipynb")]
    assert [stem for stem in stems if f"`{stem}`" not in README] == []
