"""The style sheet of the house's English (CONTRIBUTING.md, *Prose*): what a reader would stumble over is refused."""

import ast
import re

import nbformat
import pytest

from tests.support import ROOT

LONGEST = 35  # words of a sentence
COUNTED = r"\d+(?:[.,]\d+)*|once|twice|times|seconds?|bytes?|steps?|batch(?:es)?|samples?|rounds?|row|bits|cell|message"
UNITS = "round|client|second|step|batch|sample|epoch|pass|run|seed|method|figure|class|core|upload|channel|row|layer"
REFUSED = {
    "name who acts": r"\b(nobody|whoever|who wants|somebody|anybody)\b",
    "say who says it": r"\b(it is (said|understood)|is said to)\b",
    "write per": rf"\b({COUNTED}) an? ({UNITS})\b",
}  # what to do → pattern
RESULTS = r"<!-- gallery: .*?<!-- /gallery -->"  # written by templates
NO_PROSE = re.compile(rf"{RESULTS}|```.*?```|^\|.*?$|\$\$.*?\$\$|<!--.*?-->|^\s*#\|.*?$", re.S | re.M)
NOTEBOOKS = sorted(path for folder in ("nbs", "figures") for path in (ROOT / folder).rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if not {"executed", ".ipynb_checkpoints"} & set(path.parts)]
FILES = [*NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fsl_sage").rglob("*.py")]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]


def docstrings(source):
    """Those of a module and all that is in it, without their examples."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text.split(">>>")[0] for text in found if text]


def texts(path):
    """What people read in a file."""
    if path.suffix == ".ipynb":
        return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    content = path.read_text("utf-8")
    return docstrings(content) if path.suffix == ".py" else [content]


def sentences(text):
    """A text's sentences, without what is no prose; a link is its words."""
    apart = re.sub(r"^#.*$", "\\g<0>\n", NO_PROSE.sub("", text), flags=re.M)  # a heading is no part of a sentence
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#>]|\d+\.) )", apart):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph).replace("\n", " ").replace("**", "")
        yield from re.split(r"(?<=[.!?])\s+", words)


def faults(text):
    """What the style sheet refuses, each with what to do."""
    plain = NO_PROSE.sub("", text)
    found = [f"{what}: {m[0]}" for what, rule in REFUSED.items() for m in re.finditer(rule, plain, re.I)]
    long = [one for one in sentences(text) if len(one.split()) > LONGEST]
    return found + [f"cut in two: {one[:80]} … ({len(one.split())} words)" for one in long]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_prose_is_plain(path):
    found = [fault for text in texts(path) for fault in faults(text)]
    assert not found, "\n".join(found)


def test_the_checker_sees_what_it_should():
    assert faults("Nobody waits. It is said that bytes are sent; 3 seconds a round.") == [
        "name who acts: Nobody", "say who says it: It is said", "write per: seconds a round",
    ]  # fmt: skip
    assert faults(" ".join(["word"] * 36) + ".") and not faults(" ".join(["word"] * 35) + ".")
    assert not faults("```\nnobody\n```\n| nobody | 3 seconds a round |\nThe server waits 3 seconds per round.")
