"""What every notebook that teaches owes its reader: an opening, demonstrations between the code, two exercises."""

import ast
import re

import nbformat
import pytest

from tests.support import ROOT

NBS = ROOT / "nbs"
LIBRARY = sorted(NBS.glob("[0-9]*.ipynb"))
LEARN = [*sorted(NBS.glob("from_scratch*.ipynb")), *sorted(NBS.glob("tutorials/*.ipynb"))]
OPENING = re.compile(r"^\*\*Answers:\*\* (.+\?)\n\*\*Read before:\*\* (.+)\n\*\*Time:\*\* (\d+) minutes?", re.M)
MOST_IN_A_ROW = 4  # exported cells without a demonstration
LONGEST = 45  # lines of a cell that is not one class
EXPORT = re.compile(r"^#\|\s*exporti?\b", re.M)
HIDE = re.compile(r"^#\|\s*hide\b", re.M)


def read(path):
    return nbformat.read(path, 4).cells


def minutes(cells):
    """A reader's time: 180 words or 25 lines of code per minute; what is hidden or an answer is not read."""
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    shown = [
        cell for cell in cells if cell.cell_type == "code" and not HIDE.search(cell.source) and not is_answer(cell)
    ]
    return words / 180 + sum(len(cell.source.splitlines()) for cell in shown) / 25


def is_answer(cell):
    return "answer" in cell.metadata.get("tags", [])


def one_class(source):
    """Is that cell one class, with at most its imports and constants?"""
    kinds = [
        type(node) for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)
    ]
    return kinds == [ast.ClassDef]


@pytest.mark.parametrize("path", [*LIBRARY, *LEARN], ids=lambda path: path.stem)
def test_opening_says_what_it_answers_needs_and_takes(path):
    cells = read(path)
    opening = OPENING.search(cells[0].source)
    assert opening, "the first cell needs three lines: **Answers:** …? **Read before:** … **Time:** N minutes …"
    needed = re.findall(r"\]\(([^)#]+\.ipynb)\)", opening[2])
    assert needed or opening[2].startswith("nothing"), opening[2]
    assert all((path.parent / one).is_file() for one in needed), needed
    stated, counted = int(opening[3]), minutes(cells)
    assert counted / 1.5 - 2 <= stated <= counted * 1.5 + 2, f"{stated} minutes stated, {counted:.0f} counted"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_code_is_demonstrated(path):
    row, worst = 0, 0
    for cell in read(path):
        if cell.cell_type == "code" and not cell.source.startswith("#| default_exp"):
            row = row + 1 if EXPORT.search(cell.source) else row if HIDE.search(cell.source) else 0
            worst = max(worst, row)
    assert worst <= MOST_IN_A_ROW, f"{worst} exported cells in a row without a demonstration"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_cells_are_short(path):
    long = [cell.source for cell in read(path) if cell.cell_type == "code" and len(cell.source.splitlines()) > LONGEST]
    assert not [source[:200] for source in long if not one_class(source)]


@pytest.mark.parametrize("path", [*LIBRARY, *LEARN], ids=lambda path: path.stem)
def test_ends_with_two_exercises_and_answers_that_run(path):
    *_, task, first, second = [cell for cell in read(path) if cell.source.strip()]
    assert task.source.startswith("## Exercises") and re.findall(r"^(\d)\. ", task.source, re.M) == ["1", "2"]
    for number, cell in enumerate((first, second), 1):
        assert is_answer(cell) and cell.metadata.get("jupyter", {}).get("source_hidden"), (
            "an answer is folded and tagged"
        )
        assert cell.source.startswith(f"# Answer {number}") and "assert" in cell.source
        assert not re.search(r"^#\|\s*eval:\s*false", cell.source, re.M), "answers are run by the tests"
