"""What all tests have: one thread, a browser, the areas of attacks. What they import is in `tests.support`."""

import os
import shutil

import pytest

from tests.support.attacks import AREAS

# Here and in each process that a test starts, read when PyTorch is imported: sums do not depend on the machine's cores,
# and tests side by side do not fight for them.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """An attack's area stands beside its outcome in the report of --junitxml, from which `attacks.py` counts."""
    for item in items:
        for mark in item.iter_markers("attack"):
            (area,) = mark.args
            if area not in AREAS:
                raise pytest.UsageError(f"{item.nodeid}: attack({area!r}): must be one of {', '.join(AREAS)}")
            item.user_properties.append(("attack", area))


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
