"""The documentation's site: built without a warning, whole, asking nobody for anything; search works from a file."""

import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fsl_sage
from tests.support import ROOT

NOTEBOOKS = [path for folder in ("nbs", "nbs/tutorials", "figures") for path in sorted((ROOT / folder).glob("*.ipynb"))]
PACKAGE = ROOT / "fsl_sage"
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("[a-z]*.py"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "a b"  # a space: addresses are quoted
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Tags(HTMLParser):
    """What a page links to, what it loads by itself, and the places in it."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.links += [attrs["href"]] if tag == "a" and attrs.get("href") else []
        self.loads += [attrs["src"]] if attrs.get("src") else []
        self.loads += [attrs["href"]] if tag == "link" and attrs.get("rel") != "canonical" else []


@pytest.fixture(scope="module")
def pages(site):
    own = [page for page in site.rglob("*.html") if page.name != "404.html"]  # which links from the server's root
    return {page.resolve(): Tags(page) for page in own}


def test_every_link_leads_somewhere(site, pages):
    assert len(pages) > 2 * len(MODULES)

    def leads(page, link):
        parts = urlsplit(link)
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        ids = pages[target].ids if parts.fragment and target in pages else {unquote(parts.fragment)}
        return bool(parts.scheme) or (target.is_file() and unquote(parts.fragment) in ids)

    links = [(page, link) for page, tags in pages.items() for link in [*tags.links, *tags.loads]]
    assert [(str(page.relative_to(site.resolve())), link) for page, link in links if not leads(page, link)] == []


def test_pages_load_nothing_from_a_network(site, pages):
    loads = {load for tags in pages.values() for load in tags.loads}
    assert [load for load in loads if re.match(r"(?!data:)\w+:|//", load)] == []
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert len(styles) > 10_000 and not re.search(r"url\(\W?(https?:)?//|@import", styles)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_a_page_in_the_navigation(site, pages, notebook):
    page = site / notebook.relative_to(ROOT).with_suffix(".html")
    text = page.read_text("utf-8")
    assert re.search(r"<h1[ >]", text) and "#| " not in text and 'class="arithmatex"' not in text
    assert page.resolve() in {(site / unquote(link)).resolve() for link in pages[site.resolve() / "index.html"].links}
    formulas = re.findall(r"(?<![\\$])\$[^$`\n]+\$", "".join(markdown_of(notebook)))
    assert text.count("<math") >= len(formulas)


def markdown_of(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_exports_is_in_the_api(site, pages, module):
    documented = pages[site.resolve() / "api" / f"{module}.html"].ids
    names = [name for name in import_module(f"fsl_sage.{module}").__all__ if not name.startswith("_")]
    assert [name for name in names if f"fsl_sage.{module}.{name}" not in documented] == []


def test_comments_of_parameters_and_fields_are_tables(site):
    text = "".join(
        (site / f"api/{module}.html").read_text("utf-8") for module in ("config.experiment", "algorithms.sage")
    )
    rows = [re.sub(r"<.*?>|\s+", " ", row) for row in re.findall(r"<tr.*?</tr>", text, re.S)]
    assert any(re.search("align_interval .*int.* rounds between alignments", row) for row in rows)
    assert any(re.search("str .* 16 hexadecimal digits", row) for row in rows), "of what a function returns"


def test_an_example_is_code_after_the_tables(site):
    text = (site / "api/data.partition.html").read_text("utf-8")
    own = text[text.index('id="fsl_sage.data.partition.partition"') :]
    own = re.sub(r"<.*?>", "", own[: own.index("Source code in")])
    said = ["Parameters:", "Returns:", "&gt;&gt;&gt; import torch", "[33, 33, 33]"]
    assert sorted(said, key=own.index) == said


def test_gallery_shows_every_picture(site, pages):
    shown = {Path(load).name for load in pages[site.resolve() / "gallery.html"].loads}
    assert {path.name for path in (ROOT / "figures/gallery").glob("*.png")} <= shown
    assert not re.search(r"<img(?![^>]* alt=\"[^\"])", (site / "gallery.html").read_text("utf-8"))


# ---- in a browser


@pytest.fixture(scope="module")
def served(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def window(browser):
    window = browser.new_page(viewport={"width": 1280, "height": 844}, reduced_motion="reduce", color_scheme="light")
    errors, requests = [], []
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.on("request", lambda request: requests.append(request.url))
    yield window
    window.close()
    assert errors == []
    own = re.compile(r"(file|data|blob|about):|http://127\.0\.0\.1:")
    assert requests and [url for url in requests if not own.match(url)] == []


@pytest.mark.parametrize("how", ["file", "loopback"])
def test_search_finds_a_function_and_leads_to_it(site, served, window, how):
    window.goto(f"{site.as_uri() if how == 'file' else served}/nbs/00_core.html")
    window.locator("[data-md-component=search-query]").click()
    window.keyboard.type("estimate_cut_grad")
    found = window.locator("a.md-search-result__link[href*='#fsl_sage.networks.auxiliary.estimate_cut_grad']")
    found.first.click()
    window.wait_for_url("**/api/networks.auxiliary.html*")
    heading = window.locator("[id='fsl_sage.networks.auxiliary.estimate_cut_grad']")
    assert heading.is_visible() and 0 <= heading.bounding_box()["y"] < 844


def test_an_api_page_has_signature_table_and_source(site, window):
    window.goto((site / "api/networks.auxiliary.html").as_uri())
    own = window.locator("[id='fsl_sage.networks.auxiliary.estimate_cut_grad']")
    part = window.locator(".doc-object", has=own).last
    assert "estimate_cut_grad" in part.locator("pre").first.inner_text()
    row = part.locator("tr", has=window.get_by_text(re.compile("^smashed$"))).first
    assert re.search(r"Tensor.*\(batch", row.inner_text(), re.S)
    source = part.locator("details")
    assert not source.locator("pre").last.is_visible()
    source.locator("summary").click()
    assert "def estimate_cut_grad" in source.locator("pre").last.inner_text()


@pytest.mark.parametrize("words", ["smashed data", "cut layer", "auxiliary network", "straggler"])
def test_search_finds_the_papers_words(site, window, words):
    window.goto(f"{site.as_uri()}/index.html")
    window.locator("[data-md-component=search-query]").click()
    window.keyboard.type(words)
    found = window.locator("a.md-search-result__link")
    found.first.wait_for()
    first_word = words.split()[0]
    assert first_word in window.locator(".md-search-result__list").inner_text().lower()


def test_an_answer_is_folded(site, window):
    window.goto((site / "nbs/34_algorithms.sage.html").as_uri())
    answer = window.locator("details", has=window.get_by_text("Answer 1"))
    assert not answer.locator("pre").first.is_visible()
    answer.locator("summary").click()
    assert "assert" in answer.locator("pre").first.inner_text()


def test_one_page_has_the_front_door_the_fields_and_a_stamp(site):
    text = (site / "one_page.html").read_text("utf-8")
    missing = [name for name in fsl_sage.__all__ if f"<code>{name}</code>" not in text]
    assert not missing and "<code>model.head_cut</code>" in text and "<code>fsl_sage</code>" in text
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert f"fsl_sage {fsl_sage.__version__}, commit {commit}" in text


def test_the_api_begins_with_the_front_door(site):
    text = (site / "api/index.html").read_text("utf-8")
    assert text.index("<code>RunStore</code>") < text.index("<code>algorithms.sage</code>")


PAGES = [
    "one_page",
    "api/index",
    "index",
    "nbs/36_algorithms.sglr",
    "gallery",
    "claims",
    "api/config.experiment",
    "figures/sage_alpha",
]


@pytest.mark.parametrize("page", PAGES)
def test_nothing_sticks_out_on_a_phone(site, window, page):
    window.set_viewport_size({"width": 390, "height": 844})
    window.goto((site / f"{page}.html").as_uri())
    assert window.evaluate("document.documentElement.scrollWidth") <= 390


def test_dark_where_the_system_is(site, window):
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0) / 3"
    page = (site / "nbs/34_algorithms.sage.html").as_uri()
    window.goto(page)
    assert window.evaluate(shade) > 200
    window.emulate_media(color_scheme="dark")
    window.goto(page)
    assert window.evaluate(shade) < 64
