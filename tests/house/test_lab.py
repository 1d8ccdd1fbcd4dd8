"""The notebooks where people meet them: JupyterLab, in a real browser."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from fsl_sage.commands.figures import this_python_as_kernel
from tests.support import ROOT

START_SECONDS, RUN_SECONDS, REDRAW_SECONDS = 180, 900, 120  # on two slow cores, and they are shared
NOTEBOOK = "jupyterapp.shell.currentWidget.content"
ALL_CELLS = f"{NOTEBOOK}.model.sharedModel.cells"
CELLS = f"{ALL_CELLS}.filter((cell) => cell.cell_type === 'code')"
CONTEXT = "globalThis.jupyterapp?.shell.currentWidget?.context"
IDLE = f"{CONTEXT}?.sessionContext?.session?.kernel?.status === 'idle'"

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The notebooks and what they show, where JupyterLab may save them."""
    copy = tmp_path_factory.mktemp("lab") / "checkout"
    for folder, unwanted in {"nbs": (".ipynb_checkpoints",), "figures": ("executed", ".ipynb_checkpoints")}.items():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*unwanted))
    shutil.copy(ROOT / "settings.ini", copy)
    return copy


@pytest.fixture(scope="module")
def lab(checkout):
    """JupyterLab on the copy, with settings of its own. Gives the address of a notebook, as a function of its path."""
    settings, port, token = checkout.parent / "settings", free_port(), secrets.token_hex(16)
    page_config = settings / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict.fromkeys(own, str(settings)) | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--expose-app-in-browser", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={checkout}",
    ]  # fmt: skip
    log = checkout.parent / "lab.log"
    with this_python_as_kernel({"OMP_NUM_THREADS": "1"}), open(log, "w") as output:
        server = subprocess.Popen(
            command, env=os.environ | environment, cwd=checkout, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
            yield lambda path: f"http://127.0.0.1:{port}/lab/tree/{path}?token={token}"
        finally:
            server.terminate()  # and its kernels with it
            server.wait(30)


def wait_for(url, server, log):
    """Until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            return urlopen(url, timeout=10).read()
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def opened(browser, lab):
    """Open a notebook and run all its cells; gives the window when the kernel is idle and every cell has been run."""
    windows = []

    def run_all(path):
        window = browser.new_page(viewport={"width": 1280, "height": 1000})
        windows.append(window)
        window.goto(lab(path))
        # JupyterLab may show first what was open the last time, and a notebook before its kernel has answered.
        ready = f"{CONTEXT}?.path === '{path}' && {CONTEXT}.isReady && {CONTEXT}.sessionContext.isReady && {IDLE}"
        window.wait_for_function(ready, timeout=1000 * START_SECONDS)
        window.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        ran = f"{IDLE} && {CELLS}.every((cell) => cell.execution_count || !cell.source.trim())"
        failed = f"{CELLS}.some((cell) => cell.outputs.some((output) => output.output_type === 'error'))"
        window.wait_for_function(f"({ran}) || ({failed})", timeout=1000 * RUN_SECONDS)
        return window

    yield run_all
    for window in windows:
        window.evaluate("jupyterapp.commands.execute('docmanager:save')")  # else leaving it asks a question
        window.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
        window.close()


def outputs(window):
    """Of every code cell: its source and its outputs, from the notebook's model: what is out of sight is not drawn."""
    return window.evaluate(f"{CELLS}.map((cell) => [cell.source, cell.outputs])")


def pictures(window):
    shown = [output.get("data", {}).get("image/png") for _, cell in outputs(window) for output in cell]
    return [picture for picture in shown if picture]


def scroll_to(window, words):
    """Bring the cell whose source has `words` into sight."""
    sources = window.evaluate(f"{ALL_CELLS}.map((cell) => cell.source)")
    (place,) = [i for i, source in enumerate(sources) if words in source]
    window.evaluate(f"(place) => {{ {NOTEBOOK}.activeCellIndex = place }}", place)
    window.evaluate(f"(place) => {NOTEBOOK}.scrollToItem(place, 'start')", place)


def test_start_here_runs_in_jupyterlab(opened, tmp_path):
    window = opened("nbs/index.ipynb")
    cells = outputs(window)
    errors = [output for _, cell in cells for output in cell if output["output_type"] == "error"]
    assert errors == []
    assert not [output for _, cell in cells for output in cell if output.get("name") == "stderr"], "bars are cleared"
    assert len(pictures(window)) == 1
    scroll_to(window, "plot_curves(runs")
    curves = window.locator(".jp-Cell-outputWrapper .jp-RenderedImage img")
    curves.first.wait_for(timeout=1000 * REDRAW_SECONDS)
    assert curves.first.evaluate("(image) => image.complete && image.naturalWidth") > 300
    scroll_to(window, "in one drawing")
    drawing = window.locator(".jp-MarkdownCell img")
    drawing.first.wait_for(timeout=1000 * REDRAW_SECONDS)
    loaded = "document.querySelector('.jp-MarkdownCell img')?.naturalWidth > 300"
    window.wait_for_function(loaded, timeout=1000 * REDRAW_SECONDS)
    window.screenshot(path=tmp_path / "start_here.png")


def test_moving_a_slider_draws_the_picture_again(opened, tmp_path):
    window = opened("nbs/tutorials/what_if.ipynb")
    assert not [output for _, cell in outputs(window) for output in cell if output["output_type"] == "error"]
    before = pictures(window)
    assert len(before) == 2
    scroll_to(window, "plot_cuts(table, cut)")
    slider = window.locator(".widget-slider .noUi-handle").first
    slider.wait_for(timeout=1000 * REDRAW_SECONDS)
    window.screenshot(path=tmp_path / "before.png")
    slider.focus()
    window.keyboard.press("ArrowRight")
    first = "(before) => {0}.flatMap((cell) => cell.outputs).map((o) => o.data?.['image/png']).find(Boolean) !== before"
    window.wait_for_function(first.format(CELLS), arg=before[0], timeout=1000 * REDRAW_SECONDS)
    after = pictures(window)
    assert len(after) == 2 and after[0] != before[0] and after[1] == before[1]
    scroll_to(window, "plot_cuts(table, cut)")
    window.screenshot(path=tmp_path / "after.png")
