"""Stored runs keep their addresses: the hash of every experiment that a figure plans, at the presets people store."""

import json
from pathlib import Path

import pytest

from fsl_sage.reproduce import plan

ROOT = Path(__file__).parent.parent
HASHES = json.loads((Path(__file__).parent / "hashes.json").read_text())


@pytest.mark.parametrize(("figure", "preset"), [(name, preset) for name in HASHES for preset in HASHES[name]])
def test_planned_runs_keep_their_addresses(figure, preset):
    """A figure may plan more runs than before; what somebody has stored for it is still found."""
    planned = {experiment.hash for experiment in plan(ROOT / "figures" / f"{figure}.ipynb", {"preset": preset})}
    assert [stored for stored in HASHES[figure][preset].split() if stored not in planned] == []
