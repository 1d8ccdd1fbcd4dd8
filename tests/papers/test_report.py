"""The gallery's page: what is on it, and that it works in a real browser."""

import io
import json
import re
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fsl_sage.experiments.provenance import about_here
from fsl_sage.papers.claims import published
from fsl_sage.papers.report import build_report, mathml, render
from fsl_sage.papers.saving import save_figure
from fsl_sage.papers.standing import VERSUS, compare
from fsl_sage.papers.verdicts import VERDICTS
from tests.support import ROOT

NOTEBOOKS = ROOT / "figures"
HOSTILE = """# <img src=x onerror="alert(1)"> & </article>

**Claim** <script>alert(2)</script> [x](javascript:alert(3)) 

$\\text{<script>ran=5</script>}$

$$\\text{<img onerror=ran=6>} a<b$$

$$\\color{red" onclick="ran=7}{c}$$
"""


def save_picture(gallery, name, preset="quick", alt="A made-up line rises."):
    figure = Figure(figsize=(6.75, 3))
    figure.subplots().plot([0, 1], [0, 1])
    return save_figure(figure, gallery, name, alt, about_here("cpu") | {"seeds": [1], "runs": ["f00d"]}, preset=preset)


def write_notebook(path, first_cell):
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [first_cell]}]}), "utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of the real figure notebooks, a hostile one, and one whose figure was not made, with made-up pictures."""
    folder = tmp_path_factory.mktemp("report")
    gallery = folder / "figures" / "gallery"
    shutil.copytree(NOTEBOOKS, folder / "figures", ignore=shutil.ignore_patterns("gallery", "executed", ".*"))
    for notebook in (folder / "figures").glob("*.ipynb"):
        save_picture(gallery, notebook.stem)
    write_notebook(folder / "figures" / "hostile.ipynb", HOSTILE)
    write_notebook(folder / "figures" / "sage_not_made.ipynb", "# Not made\n\n**Claim**: of a data set nobody has.")
    save_picture(gallery, "hostile", preset="paper", alt='A line"><script>alert(4)</script>')
    (gallery / "hostile_50 % & more.csv").write_text("a\n1\n")
    claims = published("sglr", "Table 4")
    ours = claims.assign(preset=claims.metric.map({"compute_per_client": "paper", "test_accuracy": "quick"}), seed=0)
    compare(claims, ours).to_csv(gallery / f"sglr_table_4{VERSUS}", index=False)
    return build_report(gallery, folder / "figures")


class Tags(HTMLParser):
    """Every opening tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def values(self, attribute, tag=None):
        return [attrs[attribute] for name, attrs in self.tags if attribute in attrs and tag in (None, name)]


def test_every_picture_is_in_the_page_with_words(page):
    images = [attrs for tag, attrs in Tags(page.read_text("utf-8")).tags if tag == "img"]
    assert {unquote(image["src"]) for image in images} == {png.name for png in page.parent.glob("*.png")}
    assert all(image["alt"] and int(image["width"]) > 100 and int(image["height"]) > 100 for image in images)


def test_links_and_anchors_resolve(page):
    tags = Tags(page.read_text("utf-8"))
    ids, links = tags.values("id"), tags.values("href", "a")
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors <= set(ids) and {path.stem for path in page.parent.parent.glob("*.ipynb")} <= anchors
    named = [*tags.values("aria-labelledby"), *tags.values("for")]
    assert set(named) <= set(ids)
    missing = [link for link in links if link[0] != "#" and not (page.parent / unquote(link)).is_file()]
    assert missing == [] and "hostile_50%20%25%20%26%20more.csv" in links


def test_page_asks_only_for_the_pictures_beside_it(page):
    text = page.read_text("utf-8")
    tags = Tags(text)
    assert all((page.parent / unquote(source)).is_file() for source in tags.values("src"))
    assert all(value.startswith("data:") for value in tags.values("href", "link"))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)


@pytest.mark.attack("page")
def test_hostile_text_is_shown_not_obeyed(page):
    tags = Tags(page.read_text("utf-8"))
    assert not tags.values("onerror") and not tags.values("onclick")
    assert not [link for link in tags.values("href") if "javascript" in link]
    assert len([tag for tag, _ in tags.tags if tag == "script"]) == 2  # the page's own
    assert 'A line"><script>alert(4)</script>' in tags.values("alt")


WORDS = ["<script>window.ran = 1</script>", "<img src=x onerror=1>", "</math><b>", "&lt;script&gt;", "&#60;script&#62;"]


@pytest.mark.attack("page")
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("tex", [r"\text{%s}", r"\mbox{%s}", r"\operatorname{%s}", r"\mathrm{%s}", r"\color{%s}{x}"])
def test_words_in_a_formula_are_escaped(tex, words):
    """On the gallery's page, and on the documentation's, which draw formulas by the same function."""
    try:
        drawn = [mathml(tex % words), mathml(tex % words, "block"), render(f"${tex % words}$", inline=True)]
    except Exception as error:  # a formula that cannot be read is not drawn
        assert "latex2mathml" in type(error).__module__
        return
    for tag, attributes in Tags("".join(drawn)).tags:
        assert tag not in ("script", "img", "b") and not [name for name in attributes if name.startswith("on")]


def test_formulas_keep_their_signs():
    assert "<mo><</mo>" not in mathml("a < b") and "<mo>&lt;</mo>" in mathml("a < b")
    assert "∂" in mathml(r"\partial") and "≤" in mathml(r"\leq")


def test_a_formulas_number_stands_apart():
    assert re.search(r'<mi>b</mi><mspace width="2em" /><mtext>\(3a\)</mtext>', mathml(r"a=b \tag{3a}", "block"))


@pytest.mark.parametrize("change", [{"alt": " "}, {"alt": None}, None], ids=["blank", "none", "no file"])
def test_picture_without_words_is_refused(tmp_path, change):
    beside = save_picture(tmp_path, "demo")[-1]
    facts = json.loads(beside.read_text("utf-8"))
    if change is None:
        beside.unlink()
    else:
        beside.write_text(json.dumps(facts | change), "utf-8")
    with pytest.raises(ValueError, match=r"demo\.json.*make it again"):
        build_report(tmp_path, NOTEBOOKS)
    assert not (tmp_path / "index.html").exists()


def test_presets_are_told_apart(page):
    text = page.read_text("utf-8")
    articles = dict(re.findall(r'<article id="(\w+)"(.*?)</article>', text, re.DOTALL))
    assert '<span class="badge other">preset quick</span>' in articles["sglr_convergence"]
    assert '<span class="badge">preset paper</span>' in articles["hostile"]
    assert "There is no picture of it" in articles["sage_not_made"]
    versus = re.findall(r"preset (\w+)</span></td><td>.*?</span> ([a-z ]+)</span>", articles["sglr_table_4"])
    assert set(versus) == {("quick", "order only"), ("paper", "holds")}


def test_stored_page_is_of_the_stored_gallery(tmp_path):
    """A figure that is made again needs the page made again, too: `report.build_report`, or `make figures`."""
    folder = shutil.copytree(NOTEBOOKS, tmp_path / "figures", ignore=shutil.ignore_patterns("executed", ".*"))
    for gallery in (folder / "gallery", folder / "gallery" / "published"):
        stored = (gallery / "index.html").read_text("utf-8")
        assert build_report(gallery, folder).read_text("utf-8") == stored


# ---- in a browser


@contextmanager
def opened(browser, page, width=1280, scheme="light"):
    """The page in a new window; at the end: no error on the console, no request but for itself and its pictures."""
    reduced = {"reduced_motion": "reduce", "color_scheme": scheme}
    window = browser.new_page(viewport={"width": width, "height": 844}, **reduced)
    errors, requests = [], []
    window.on("console", lambda message: errors.append(message.text) if message.type != "log" else None)
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.on("request", lambda request: requests.append(request.url))
    window.goto(page.as_uri())
    yield window
    window.close()
    assert errors == []
    pictures = {picture.as_uri() for picture in page.parent.glob("*.png")}
    assert {url for url in requests if not url.startswith("data:")} - pictures == {page.as_uri()}


def background(window):
    return window.evaluate("getComputedStyle(document.body).backgroundColor")


def shade(color):  # 0 to 255
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3


def test_page_loads_and_is_not_blank(browser, page):
    with opened(browser, page) as window:
        for image in window.locator("img").all():
            image.scroll_into_view_if_needed()
        window.wait_for_function("[...document.images].every((image) => image.complete)")
        widths = window.evaluate("[...document.images].map((image) => image.naturalWidth)")
        window.evaluate("scrollTo(0, 0)")
        assert len(widths) == len(list(page.parent.glob("*.png"))) and all(width > 100 for width in widths)
        screen = Image.open(io.BytesIO(window.screenshot())).convert("L")
        picture = Image.open(io.BytesIO(window.locator("img").first.screenshot())).convert("L")
    for image in (screen, picture):
        dark = sum(image.histogram()[:128]) / (image.width * image.height)
        assert 0.001 < dark < 0.5, "blank"


def test_contents_lead_to_every_figure(browser, page):
    with opened(browser, page) as window:
        links = window.locator("nav a")
        assert links.count() > len(list(page.parent.parent.glob("*.ipynb")))
        for i in range(links.count()):
            links.nth(i).click()
            target = window.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
            assert -1 < target < 844, links.nth(i).get_attribute("href")
        files = window.evaluate("[...document.querySelectorAll('main a')].map((a) => a.href)")
        paths = [Path(unquote(link.removeprefix("file://"))) for link in files if "#" not in link]
        assert len(paths) > 20 and all(path.is_file() for path in paths)


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_sticks_out(browser, page, width):
    with opened(browser, page, width) as window:
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        scrolls = window.locator("#ledger").evaluate("e => e.parentElement.scrollWidth > e.parentElement.clientWidth")
        assert scrolls or width > 390, "on a phone the ledger scrolls in its own box"
        outside = f"e => e.getBoundingClientRect().right > {width + 1} && !e.closest('.scroll')"
        all_of = window.locator("main *")
        assert all_of.evaluate_all(f"all => all.filter({outside}).map((e) => e.outerHTML)") == []


@pytest.mark.attack("page")
def test_no_script_but_the_page_s_own_runs(browser, page, tmp_path):
    """Even if a text got past every escape."""
    text = page.read_text("utf-8")
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', text)
    (scripts,) = re.findall("script-src (.*?);", policy)
    assert "unsafe" not in scripts and scripts.count("sha256-") == 2
    broken_in = tmp_path / "page.html"
    inline = "<script>ran = 1</script><img src=x onerror='ran = 2'><a id=bad href='javascript:ran = 3'>x</a>"
    broken_in.write_text(text.replace("</header>", f"{inline}</header>"), "utf-8")
    window = browser.new_page()
    window.goto(broken_in.as_uri())
    window.locator("#bad").click()
    assert window.evaluate("window.ran") is None and window.locator("#theme").is_visible()
    window.close()


@pytest.mark.attack("page")
def test_hostile_text_does_not_run(browser, page):
    with opened(browser, page) as window:
        assert window.evaluate("window.ran") is None
        assert "ran=5" in window.locator("#hostile").inner_text()


def test_light_and_dark(browser, page):
    with opened(browser, page) as window:
        light = background(window)
        window.get_by_role("button", name="Dark theme").click()
        assert shade(background(window)) < 64 < 192 < shade(light)
        assert shade(window.evaluate("getComputedStyle(document.body).color")) > 192
        window.reload()
        assert shade(background(window)) < 64, "the choice is remembered"
        window.get_by_role("button", name="Light theme").click()
        assert background(window) == light
    with opened(browser, page, scheme="dark") as window:
        assert shade(background(window)) < 64, "the system's theme, without a click"


def test_keyboard(browser, page):
    with opened(browser, page) as window:
        window.keyboard.press("Tab")
        skip = window.locator(":focus")
        assert skip.inner_text() == "Skip to the figures" and skip.bounding_box()["y"] >= 0
        window.keyboard.press("Enter")
        assert window.evaluate("document.activeElement.id") == "main"
        boxes = window.locator(".scroll").evaluate_all("all => all.map((e) => [e.tabIndex, e.role])")
        assert boxes and all(box == [0, "region"] for box in boxes), "tables that scroll can be reached"


def test_claims_are_filtered(browser, page):
    with opened(browser, page) as window:
        rows = window.locator("#ledger tbody tr")
        total = rows.count()
        seen = 0
        for verdict in VERDICTS:
            window.get_by_role("radio", name=verdict).check()
            visible = window.locator("#ledger tbody tr:visible")
            assert set(visible.evaluate_all("rows => rows.map((row) => row.dataset.verdict)")) <= {verdict}
            assert window.get_by_role("status").inner_text() == f"{visible.count()} of {total} claims"
            seen += visible.count()
        assert seen == total > 250
        window.get_by_role("radio", name="all").check()
        window.get_by_role("searchbox").fill("sglr compute")
        assert window.locator("#ledger tbody tr:visible").count() == 8
        window.locator(".tiles a").first.click()
        assert window.get_by_role("radio", name="holds").is_checked()
