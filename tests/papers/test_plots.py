"""Figures can be read: by the colour-blind, in grey, in a paper's column, and to their edges."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from fsl_sage.algorithms.all import LABELS
from fsl_sage.data.partition import plot_labels_per_client
from fsl_sage.papers.explore import plot_cuts
from fsl_sage.papers.plots import (
    COLUMN,
    FAMILY_MARKERS,
    OTHERS,
    STACK,
    STYLES,
    TEXT,
    legend_below,
    level,
    mark_target,
    new_figure,
    paired,
    plot_curves,
    plot_family,
    points,
    spread_words,
)
from fsl_sage.papers.saving import DPI, save_figure, stamp, sticks_out
from tests.support import ROOT

GALLERY = sorted((ROOT / "figures" / "gallery").glob("*.png"))
WORDS = {"alt": "Made-up curves.", "about": {}, "preset": "quick"}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def runs(labels, seeds=(1, 2)):
    rounds = np.arange(20)
    for i, label in enumerate(labels):
        for seed in seeds:
            accuracy = 0.9 - np.exp(-(rounds + 1 + seed) / (3 + i))
            axes = {"round": rounds, "gigabytes": (rounds + 1) * (i + 1), "test_accuracy": accuracy}
            yield pd.DataFrame({"label": label, "phi": i / 8, "seed": seed, **axes})


FRAME = pd.concat(runs(STYLES))


def curves():
    figure, (left, right) = new_figure(1, 2)
    plot_curves(FRAME, "gigabytes", "test_accuracy", left)
    mark_target(left, FRAME[FRAME.test_accuracy >= 0.7].groupby("label").gigabytes.min().to_dict(), 0.7)
    plot_curves(FRAME, "round", "test_accuracy", right)
    level(right, 0.95)
    legend_below(figure, left)
    stamp(figure, "preset quick: seeds 200, 201, 202; AMD EPYC, 1 thread; torch 2.15.0")
    return figure


def test_a_method_that_no_paper_has_is_drawn_and_keeps_its_look():
    """In both axes, at its level and at its target; the package's own SGLR too."""
    _, (left, right) = new_figure(1, 2)
    frame = pd.concat(runs(["drop_in", "FSL-SAGE", "sglr", "mine"]))
    plot_curves(frame, "gigabytes", "test_accuracy", left)
    plot_curves(frame[frame.label == "mine"], "round", "test_accuracy", right)
    drawn = {line.get_label(): line.get_color() for line in left.lines}
    assert list(drawn) == ["FSL-SAGE", "sglr", "drop_in", "mine"] and len(set(drawn.values())) == 4
    assert [line.get_color() for line in right.lines] == [drawn["mine"]]
    level(right, 0.95, "drop_in")
    assert right.lines[-1].get_color() == drawn["drop_in"]
    mark_target(left, {"mine": 3.0, "psl": 4.0}, 0.7)
    assert {line.get_color() for line in left.lines[-4:]} == {drawn["mine"], STYLES["psl"]["color"]}


def test_more_methods_than_looks_begin_the_cycle_again():
    names = [f"method {i}" for i in range(len(OTHERS) + 2)]
    _, (left, right) = new_figure(1, 2)
    plot_curves(pd.concat(runs(names)), "round", "test_accuracy", left)
    drawn = {line.get_label(): line.get_color() for line in left.lines}
    assert list(drawn) == names, "no method is left out"
    assert [drawn[name] for name in names] == [look["color"] for look in (*OTHERS, *OTHERS)][: len(names)]
    plot_curves(pd.concat(runs(names[3:5])), "round", "test_accuracy", right)
    assert {line.get_label(): line.get_color() for line in right.lines} == {name: drawn[name] for name in names[3:5]}


def test_bands_are_t_intervals_over_seeds_and_one_seed_has_none():
    frame = pd.concat(runs(["FSL-SAGE"], seeds=(1, 2, 3)))
    _, (many, one) = new_figure(1, 2)
    plot_curves(frame, "round", "test_accuracy", many)
    plot_curves(frame[frame.seed == 1], "round", "test_accuracy", one)
    assert len(many.collections) == 1 and not one.collections
    first = frame[frame["round"] == 0].test_accuracy
    low, high = many.collections[0].get_paths()[0].get_extents().y0, 4.3027 * first.std() / 3**0.5
    assert abs(low - (first.mean() - high)) < 1e-5, "the band is widest in the first round"
    points(one, [0], [[0.5]], color="black", marker="o")
    assert not one.containers and not one.collections, "an error bar of length zero"
    assert "one seed" in spread_words([200, 200]) and "5 seeds" in spread_words(range(5))


def test_a_mean_ends_with_its_shortest_run():
    """A run that goes on alone would bend the curve of the others."""
    frame = pd.concat(runs(["FSL-SAGE"], seeds=(1, 2, 3)))
    frame = frame[(frame.seed > 1) | (frame["round"] < 8)]
    _, axes = new_figure(1, 2)
    for ax, x in zip(axes, ("round", "gigabytes"), strict=True):
        plot_curves(frame, x, "test_accuracy", ax)
        assert len(ax.lines[0].get_xdata()) == 8


def test_seeds_with_bytes_of_their_own_are_averaged_round_by_round():
    frame = pd.concat(runs(["FSL-SAGE"], seeds=(1, 2)))
    frame["gigabytes"] *= frame.seed
    _, (ax,) = new_figure()
    plot_curves(frame, "gigabytes", "test_accuracy", ax)
    assert ax.lines[0].get_xdata().tolist() == [1.5 * (rnd + 1) for rnd in range(20)]


def test_a_target_that_some_seeds_miss_says_so():
    """The mean over the seeds that got there would praise a method that seldom does."""
    _, (ax,) = new_figure()
    plot_curves(FRAME, "gigabytes", "test_accuracy", ax)
    mark_target(ax, {"FSL-SAGE": [1.0, 3.0, np.nan], "CSE-FSL": [2.0, np.nan, np.nan], "FedAvg": [4.0, 4.0, 4.0]}, 0.7)
    assert [text.get_text() for text in ax.texts] == ["3 GB (2 of 3)", "4 GB"]


def test_pairs_are_of_one_seed():
    rows = [("FSL-SAGE", 1, 0.6), ("CSE-FSL", 1, 0.5), ("FSL-SAGE", 2, 0.4), ("CSE-FSL", 2, 0.2), ("FSL-SAGE", 3, 0.9)]
    table = pd.DataFrame(rows, columns=["label", "seed", "best"])
    (row,) = paired(table, "best", "label", "CSE-FSL").itertuples()
    assert (row.label, row.n, row.differences) == ("FSL-SAGE", 2, [0.1, 0.2])
    with pytest.raises(ValueError, match="reference='FedAvg'"):
        paired(table, "best", "label", "FedAvg")


def family():
    figure, (ax,) = new_figure(width=COLUMN)
    plot_family(pd.concat(runs("abcdefgh")), "round", "test_accuracy", "phi", ax, name="φ = ")
    legend_below(figure, ax)
    return figure


def stacked():
    figure, axes = new_figure(1, 2)
    table = pd.DataFrame({"client models": [3, 2], "smashed data": 1, "auxiliary models": [1, 4]}, ["l = 2", "l = 3"])
    table.plot.bar(stacked=True, ax=axes[0], rot=0, **STACK)
    table.plot.barh(stacked=True, ax=axes[1], **STACK)
    return figure


def labels():
    figure, axes = new_figure(1, 2)
    for ax in axes:
        plot_labels_per_client(torch.arange(100).view(10, 10), ax=ax)
    return figure


def cuts():
    columns = ["client_params", "client_flops", "held_bytes", "smashed_bytes", *LABELS]
    numbers = np.geomspace(1e4, 1e9, 5 * len(columns)).reshape(5, -1)
    return plot_cuts(pd.DataFrame(numbers, [f"layer{i}.0.downsample" for i in range(5)], columns))


KINDS = [curves, family, stacked, labels, cuts]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_figure_is_whole_and_of_its_size(kind, tmp_path):
    figure = kind()
    width, height = figure.get_size_inches()
    png = save_figure(figure, tmp_path, "demo", **WORDS)[0]  # which refuses what sticks out
    with Image.open(png) as image:
        assert image.size == (round(width * DPI), round(height * DPI))
        assert_whole(np.asarray(image.convert("L")))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_letters_are_of_the_papers_size(kind):
    figure = kind()
    figure.draw_without_rendering()
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(sizes) > 5 and min(sizes) >= 5 and max(sizes) <= 10, "points on the page, where captions have 9"


def assert_whole(gray):
    edge = np.concatenate([gray[:2].ravel(), gray[-2:].ravel(), gray[:, :2].ravel(), gray[:, -2:].ravel()])
    assert edge.min() > 250, "something touches the picture's edge"
    assert 0.01 < (gray < 250).mean() < 0.9, "blank, or black"


@pytest.mark.parametrize("png", GALLERY, ids=lambda path: path.stem)
def test_stored_pictures_are_whole_and_fit_the_page(png):
    with Image.open(png) as image:
        assert COLUMN * DPI <= image.width <= round(TEXT * DPI) and image.height <= 9 * DPI
        assert_whole(np.asarray(image.convert("L")))


def test_small_letters_fit_in_the_resolution_in_which_they_are_saved(tmp_path):
    figure, (ax,) = new_figure(height=1.4)
    ax.set_yticks([0, 1], ["α = 0, φ = 0.5", "α = 1, φ = 0.75"])
    ax.tick_params(labelsize=7.5, length=0)
    png = save_figure(figure, tmp_path, "demo", **WORDS)[0]
    with Image.open(png) as image:
        assert_whole(np.asarray(image.convert("L")))


@pytest.mark.parametrize("side", ["xlabel", "ylabel"])
def test_cut_text_is_named(tmp_path, side):
    figure, (ax,) = new_figure(width=COLUMN)
    ax.set(**{side: "words that go on and on " * 4})
    with pytest.warns(UserWarning, match=r"figure demo: \d\.\d\d inches"):
        save_figure(figure, tmp_path, "demo", **WORDS)
    assert sticks_out(figure) > 0.1


# How the three kinds of colour blindness see linear RGB (Machado, Oliveira, Fernandes, 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(color, matrix):
    """The colour in CIELAB, as the eye described by `matrix` sees it."""
    rgb = np.asarray(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = to_xyz @ np.clip(matrix @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    root = np.cbrt
    return np.array([116 * root(y) - 16, 500 * (root(x) - root(y)), 200 * (root(y) - root(z))])


@pytest.mark.parametrize("eye", BLINDNESS)
def test_methods_are_told_apart_without_colour_vision(eye):
    """By colour where there is enough of it, and always by marker and dash."""
    looks = STYLES | {f"other {i}": style for i, style in enumerate(OTHERS)}
    colors = {label: seen(to_rgb(style["color"]), BLINDNESS[eye]) for label, style in looks.items()}
    pairs = list(combinations(looks, 2))
    near = [pair for pair in pairs if np.linalg.norm(colors[pair[0]] - colors[pair[1]]) < 10]
    assert near == []
    assert all(looks[a][look] != looks[b][look] for a, b in pairs for look in ("marker", "linestyle"))
    assert max(lab[0] for lab in colors.values()) < 75, "too pale on white paper"


def test_ramps_and_stacks_keep_their_order_in_grey():
    lightness = [seen(color, BLINDNESS["none"])[0] for color in STACK["color"]]
    assert np.diff(lightness).min() > 15
    figure = family()
    lines = figure.axes[0].lines
    lightness = [seen(line.get_color(), BLINDNESS["none"])[0] for line in lines]
    assert np.diff(lightness).min() > 4 and len({line.get_marker() for line in lines}) == len(FAMILY_MARKERS)
