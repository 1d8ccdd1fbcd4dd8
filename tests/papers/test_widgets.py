"""A picture to play with, where there are no widgets and where there are; in a browser: test_lab.py."""

import sys

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure

from fsl_sage.papers.widgets import Choice, sliders, when_watched, with_sliders

drawn = []


def draw(power):
    figure, ax = plt.subplots()
    ax.set_title(f"{power}")
    drawn.append(power)
    return figure


@pytest.fixture(autouse=True, scope="module")
def shell():
    InteractiveShell.instance()


@pytest.mark.parametrize("widgets", [True, False], ids=["with ipywidgets", "without"])
def test_the_picture_is_there_with_and_without_widgets(widgets, monkeypatch):
    if not widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it fails
    drawn.clear()
    open_before = plt.get_fignums()
    with capture_output() as shown:
        with_sliders(draw, power=Choice([1, 2, 3], 2))
    note, picture = (output.data for output in shown.outputs)
    assert "sliders for: power" in note["text/html"] and "Figure" in picture["text/plain"]
    assert drawn == [2] and plt.get_fignums() == open_before


def test_sliders_say_and_give_values():
    heard = []
    choices = {"rate": Choice([0.5, 2.0], 2.0, lambda rate: f"{rate:g} MB/s"), "cut_layer": Choice(["a", "b"], "a")}
    rate, cut_layer = sliders(lambda **values: heard.append(values), choices).children
    assert [rate.label, rate.description, cut_layer.description] == ["2 MB/s", "rate", "cut layer"]
    cut_layer.value = "b"
    rate.value = 0.5
    assert heard == [{"rate": 2.0, "cut_layer": "b"}, {"rate": 0.5, "cut_layer": "b"}]


def test_nobody_watches_where_no_browser_is():
    happened = []
    when_watched(lambda: happened.append(True))
    assert happened == []


@pytest.mark.parametrize(
    ("choices", "says"),
    [({"power": Choice([1, 2], 7)}, r"power=7: must be one of \[1, 2\]"), ({}, "choices={}: must be at least one")],
)
def test_mistakes(choices, says):
    with pytest.raises(ValueError, match=says):
        with_sliders(lambda **_: Figure(), **choices)
