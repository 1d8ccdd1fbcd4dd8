"""Every symbol of a formula stands in the glossary: in its table for the whole house, or in a notebook's own row."""

import re

import nbformat
import pytest

from tests.support import ROOT

GLOSSARY = ROOT / "nbs" / "glossary.ipynb"
NOTEBOOKS = [*sorted((ROOT / "nbs").rglob("*.ipynb")), *sorted((ROOT / "figures").glob("*.ipynb"))]
NOTEBOOKS = [path for path in NOTEBOOKS if path != GLOSSARY and ".ipynb_checkpoints" not in path.parts]
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w`$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.S)
WORDS = re.compile(
    r"\\(?:mathrm|text|operatorname|mathtt)\s*\{[^{}]*\}|\\(?:begin|end)\{[^{}]*\}|`[^`]*`|\\tag\{[^{}]*\}"
)
ACCENT = r"(?:\\(?:hat|bar|overline|tilde)\s*\{?\s*)?"
INDEX = r"(?:_(?:\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z0-9]))?"
SYMBOL = re.compile(rf"{ACCENT}(?:\\[a-zA-Z]+|[A-Za-z])(?:'+)?\}}?{INDEX}")
SIGNS = r"""frac tfrac sum prod cdot times le ge in to infty partial left right lVert rVert lvert rvert mid dots
ldots quad qquad max min log exp lfloor rfloor lceil rceil approx ne sqrt big Big bigl bigr pm mapsto
leftarrow rightarrow top mathcal mathbf mathbb sim subset cup langle rangle odot bmod circ perp
circledast star overline hat bar downarrow uparrow
"""  # what is no name
PART = re.compile(r"_\{?([csabf])(?![A-Za-z])")  # client, server, auxiliary, backward, forward: parts of a name


def name_of(symbol):
    """A symbol without its index: w_{c,i} is w_c, p_2 is p; empty for a sign."""
    accent = re.match(r"\\(hat|bar|overline|tilde)", symbol)
    part = PART.search(symbol)
    bare = re.sub(rf"^{ACCENT}", "", symbol).split("_")[0].strip("}' ")
    if not bare or bare.lstrip("\\") in SIGNS.split():
        return ""
    return (accent[0] + " " if accent else "") + bare + (f"_{part[1]}" if part else "")


def symbols(text):
    """The names in a text's formulas."""
    found = {name_of(m[0]) for math in MATH.finditer(text) for m in SYMBOL.finditer(WORDS.sub(" ", math[1] or math[2]))}
    return found - {""}


def prose(path):
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]


def rows(heading):
    """The rows of the glossary's table below `heading`, each a list of cells."""
    (cell,) = [source for source in prose(GLOSSARY) if source.startswith(f"## {heading}")]
    lines = [line for line in cell.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def known():
    everywhere = set().union(*(symbols(row[0]) for row in rows("Symbols")))
    own = {row[0].strip("`"): symbols(row[1]) for row in rows("Letters of one notebook")}
    return everywhere, own


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_symbol_is_in_the_glossary(path):
    everywhere, own = known()
    unknown = set().union(*map(symbols, prose(path))) - everywhere - own.get(path.stem, set())
    assert not unknown, f"not in nbs/glossary.ipynb: {', '.join(sorted(unknown))}"


def test_the_glossary_names_notebooks_that_there_are():
    """And each of them uses the letters of its row."""
    paths = {path.stem: path for path in NOTEBOOKS}
    everywhere, own = known()
    for name, letters in own.items():
        unused = letters - everywhere - set().union(*map(symbols, prose(paths[name])))
        assert not unused, f"{name} does not use {', '.join(sorted(unused))}"


def test_symbols_are_found_without_their_index():
    text = r"$\hat z_{b,i} = \partial\ell/\partial z_f$, $w_cx$, $$p_2 \le \eta_s\,\lvert C\rvert^{\alpha}$$; $5 or $6"
    assert symbols(text) == {r"\hat z_b", r"\ell", "z_f", "w_c", "x", "p", r"\eta_s", "C", r"\alpha"}
