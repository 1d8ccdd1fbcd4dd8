"""Stored runs keep their addresses: the hash of every experiment that a figure plans, at the presets people store."""

import json
from pathlib import Path

import pytest

from fsl_sage.commands.figures import plan, planned
from tests.support import ROOT

HASHES = json.loads((Path(__file__).parent / "hashes.json").read_text())


@pytest.mark.parametrize(("figure", "preset"), [(name, preset) for name in HASHES for preset in HASHES[name]])
def test_planned_runs_keep_their_addresses(figure, preset):
    """A figure may plan more runs than before; what somebody has stored for it is still found."""
    planned = {experiment.hash for experiment in plan(ROOT / "figures" / f"{figure}.ipynb", {"preset": preset})}
    assert [stored for stored in HASHES[figure][preset].split() if stored not in planned] == []


@pytest.mark.parametrize(("preset", "given", "seeds"), [
    ("quick", [], [200, 201, 202]), ("quick", [7], [7]), ("smoke", [], [200]), ("paper", [], [200]),
])  # fmt: skip
def test_quick_makes_each_run_with_three_seeds(preset, given, seeds):
    (figure,) = planned([ROOT / "figures" / "sage_latency.ipynb"], {"preset": preset}, given)
    assert list(dict.fromkeys(run.seed for run in figure.experiments)) == seeds
