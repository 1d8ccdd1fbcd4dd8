"""What the tests share: threads, and small experiments."""

import json
import shutil
from pathlib import Path

import pytest
import torch

TRACES = sorted((Path(__file__).parent / "traces").glob("*.json"))


@pytest.fixture(autouse=True, scope="session")
def threads():
    """One thread: sums do not depend on the machine's cores, and the workers of pytest-xdist do not fight for them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium")
    if not executable:
        pytest.skip("no executable 'chromium': pages are not tested in a browser (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pages are not tested in a browser")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=executable, args=flags)
        yield chromium
        chromium.close()


def read_trace(name: str) -> tuple[dict, list[dict]]:
    """A trace's settings and what was measured."""
    spec = json.loads((Path(__file__).parent / "traces" / f"{name}.json").read_text())
    return spec, spec.pop("trace")
