"""Traces of the authors' released code: their settings and what was measured."""

import json

from tests.support import ROOT

TRACES = sorted((ROOT / "tests" / "traces").glob("*.json"))


def read_trace(name: str) -> tuple[dict, list[dict]]:
    """A trace's settings and what was measured."""
    spec = json.loads((ROOT / "tests" / "traces" / f"{name}.json").read_text())
    return spec, spec.pop("trace")
