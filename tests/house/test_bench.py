"""What the benchmark says of starting the package."""

import importlib.util

import matplotlib
import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_package_and_its_help_start_without_pytorch(monkeypatch):
    """Processor time of new processes: each takes a fraction of what PyTorch alone takes."""
    monkeypatch.setattr(matplotlib, "use", lambda backend: None)  # of the whole process, for other tests
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = {name: bench.start_up(name, 2) for name in bench.STARTS}
    seconds = {name: row["cpu_seconds"] for name, row in rows.items()}
    assert 0 < seconds["python"] < seconds["fsl-sage --help"]
    assert max(seconds["import fsl_sage"], seconds["fsl-sage --help"]) < seconds["import torch"] / 2
