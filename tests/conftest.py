"""What the tests share: threads, a browser, traces, a run that is stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from attacks import AREAS

from fsl_sage.experiments import train as training

TRACES = sorted((Path(__file__).parent / "traces").glob("*.json"))


def pytest_collection_modifyitems(items):
    """An attack's area stands beside its outcome in the report of --junitxml, from which `attacks.py` counts."""
    for item in items:
        for mark in item.iter_markers("attack"):
            (area,) = mark.args
            if area not in AREAS:
                raise pytest.UsageError(f"{item.nodeid}: attack({area!r}): must be one of {', '.join(AREAS)}")
            item.user_properties.append(("attack", area))


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


def stopped_after(saved, monkeypatch, experiment, path):
    """Train until so many checkpoints are written; then the power is cut."""
    left, save = [saved], training.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            training.train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0)
