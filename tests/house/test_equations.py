"""A displayed equation has a number, and the line of code that computes it bears the same; methods have pictures."""

import base64
import io
import re
import tokenize

import nbformat
import pytest

from fsl_sage.papers.report import mathml
from tests.support import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
METHODS = [
    "14_networks.cut",
    "21_networks.auxiliary",
    "33_algorithms.baselines",
    "34_algorithms.sage",
    "36_algorithms.sglr",
    "36b_algorithms.sage_split_lr",
    "36c_algorithms.zeroth",
    "36h_algorithms.asynchronous",
    "68_papers.leakage",
    "from_scratch",
    "from_scratch_sglr",
]  # those that teach a method: equations with numbers and a picture are a must
EQUATION = re.compile(r"\$\$(.+?)\$\$", re.S)
TAG = re.compile(r"\\tag\{(\d+[a-z]?)\}")
MARK = re.compile(r"#((?: \(\d+[a-z]?\),?)+)")  # of a comment that begins with numbers: # (1), (2)
LARGEST = 60_000  # bytes of a stored picture


def cells(name, kind):
    return [cell for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == kind]


def equations(name):
    return [equation for cell in cells(name, "markdown") for equation in EQUATION.findall(cell.source)]


def comments(source):
    """Those of a cell's code; none of a cell that is no Python, such as one with a magic."""
    if source.startswith(("%", "!")):
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def marks(source):
    """The numbers at the beginning of its comments."""
    found = [MARK.match(comment) for comment in comments(source)]
    return {number for mark in found if mark for number in re.findall(r"\d+[a-z]?", mark[1])}


def pictures(name):
    outputs = [output for cell in cells(name, "code") for output in cell.outputs]
    data = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(picture) for picture in data]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_equations_and_code_have_the_same_numbers(name):
    numbers = [number for equation in equations(name) for number in TAG.findall(equation)]
    assert len(numbers) == len(set(numbers)), f"a number twice: {numbers}"
    assert set(numbers) == set().union(*(marks(cell.source) for cell in cells(name, "code")))


@pytest.mark.parametrize("name", METHODS)
def test_each_displayed_equation_of_a_method_has_a_number(name):
    assert equations(name)
    for equation in equations(name):
        (number,) = TAG.findall(equation)
        assert f"({number})" in mathml(equation, "block"), "the docs site draws it, with its number"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_small_picture(name):
    assert pictures(name) and max(map(len, pictures(name))) < LARGEST


def test_marks_are_found_at_the_beginning_of_a_comment():
    source = "a = 1  # (1), (2b)\nb = 2  # (3); the sum\n# client (4) has one\nc = '# (5)'"
    assert marks(source) == {"1", "2b", "3"} and not marks("%matplotlib inline  # (1)")
