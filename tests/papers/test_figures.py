"""Figure notebooks: each ends in the line that saves its files, and none defines what another has."""

import ast
from collections import defaultdict

import nbformat
import pytest

from tests.support import ROOT

FIGURES = {path.stem: path for path in sorted((ROOT / "figures").glob("*.ipynb"))}
DISPLAYS = ast.Dict, ast.List, ast.Tuple, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp
SMALL = 25  # nodes of a syntax tree: what is smaller is a phrase, not a definition


def statements(name):
    """The top-level statements of a figure's notebook, without its parameters."""
    cells = [cell for cell in nbformat.read(FIGURES[name], 4).cells if cell.cell_type == "code"]
    cells = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", ())]
    return [statement for source in cells for statement in ast.parse(source).body]


def called(tree):
    """The names that are called in it, of methods the last one."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [getattr(function, "id", getattr(function, "attr", None)) for function in functions]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_ends_in_the_line_that_saves_its_files(name):
    *before, last = statements(name)
    assert isinstance(last, ast.Expr) and last.value.func.id == "save_figure"
    assert last.value.args[2].value == name, "the notebook's own picture and its tables come last"
    others = {"to_csv", "save_table", "atomic_path", "savefig", "write_text", "open"}
    assert not others & {word for statement in (*before, last) for word in called(statement)}


def test_the_batch_knows_the_runs_of_each_figure():
    """It finds them in the cell tagged `plan`, and trains them beforehand, side by side."""
    for name, path in FIGURES.items():
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        plans = [cell.source for cell in cells if "plan" in cell.metadata.get("tags", ())]
        if any("store.get(experiments" in cell.source for cell in cells):
            assert any("experiments = " in source for source in plans), name


def definitions(name):
    """What a notebook defines: functions by name and by body, containers that are written out or built by a loop."""
    for node in statements(name):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"def {node.name}"
            yield "a function: " + "; ".join(map(ast.unparse, node.body))
        elif isinstance(node, ast.Assign | ast.AugAssign) and isinstance(node.value, DISPLAYS):
            table = isinstance(node.value, ast.Dict) and len(node.value.keys) > 1
            if table or sum(1 for _ in ast.walk(node.value)) >= SMALL:
                yield ast.unparse(node.value)


def test_no_figure_defines_what_another_has_or_the_package():
    found = defaultdict(set)
    for file in (ROOT / "fsl_sage").rglob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[f"def {node.name}"] = {"fsl_sage"}
    for name in FIGURES:
        for definition in definitions(name):
            found[definition].add(name)
    assert {definition: names for definition, names in found.items() if len(names) > 1} == {}


def test_methods_and_their_limits_are_those_of_the_comparison():
    """No figure lists the five methods of FSL-SAGE, and none says where their runs end."""
    for name in FIGURES:
        for node in (node for statement in statements(name) for node in ast.walk(statement)):
            if isinstance(node, ast.Tuple | ast.List):
                words = {getattr(entry, "value", None) for entry in node.elts if isinstance(entry, ast.Constant)}
                assert not {"fsl_sage", "fed_avg"} <= words, f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Dict):
                keys = {getattr(key, "value", None) for key in node.keys}
                limit = {"rounds", "comm_threshold_mb"} <= keys
                assert not limit, f"{name}: {ast.unparse(node)}"
