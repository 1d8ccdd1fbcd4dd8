"""What an algorithm is stands in its record: no other module knows its name."""

import ast

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.config.settings import DEFAULT
from tests.support import ROOT

PACKAGE = ROOT / "fsl_sage"
MAY = ("algorithms", "papers")  # areas that speak of algorithms by name


def test_no_module_outside_algorithms_and_papers_names_an_algorithm():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_modidx.py" or path.relative_to(PACKAGE).parts[0] in MAY:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and node.value in set(ALGORITHMS) - {DEFAULT}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value}")
    assert found == []
