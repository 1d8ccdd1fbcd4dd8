"""What the tests share: threads, and small experiments."""

import json
from pathlib import Path

import pytest
import torch

TRACES = sorted((Path(__file__).parent / "traces").glob("*.json"))


@pytest.fixture(autouse=True, scope="session")
def threads():
    """One thread: sums do not depend on the machine's cores, and the workers of pytest-xdist do not fight for them."""
    torch.set_num_threads(1)


def read_trace(name: str) -> tuple[dict, list[dict]]:
    """A trace's settings and what was measured."""
    spec = json.loads((Path(__file__).parent / "traces" / f"{name}.json").read_text())
    return spec, spec.pop("trace")
