"""One loop: who calls an algorithm's round, and what its bar shows."""

import ast
import re
from pathlib import Path

import pytest

from fsl_sage.experiments.train import train
from tests.support.runs import tiny

PACKAGE = Path(__file__).parents[2] / "fsl_sage"


def callers(names):
    """Module and function of each call of a method or function of these names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names:
                    yield path.relative_to(PACKAGE).with_suffix("").as_posix(), function.name


@pytest.mark.parametrize(
    ("names", "function"),
    [
        ({"run_round", "round_at"}, "rounds"),
        ({"take_part"}, "rounds"),
        ({"require_only_present"}, "rounds"),
        ({"step_schedule"}, "step_schedules"),
    ],
)
def test_one_loop_makes_all_rounds(names, function):
    found = [one for one in callers(names) if not one[0].startswith("algorithms/")]
    assert found == [("experiments/loop", function)]


def test_the_bar_keeps_the_last_accuracy_that_was_measured(capsys):
    history = train(tiny("fed_avg", rounds=4, eval_every=2), "cpu")
    shown = re.findall(r"accuracy=([\w.]+)", capsys.readouterr().err)
    assert set(shown) <= {f"{accuracy:.3f}" for accuracy in history.rounds.test_accuracy.dropna()}
    assert shown[-1] == f"{history.rounds.test_accuracy.iloc[-1]:.3f}"
