"""The pages that are not in docs/: README, notebooks, figures with their pictures, the API. And where links go."""

import inspect
import re
import subprocess
from html import unescape
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
import pandas as pd
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

import fsl_sage
from fsl_sage.algorithms.all import ALGORITHMS, cost_words
from fsl_sage.commands.schema import explained
from fsl_sage.papers.report import PAPERS, by_paper, mathml, measured, number, read_figures
from fsl_sage.papers.texts import Gallery, cost_table, costs

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "figures" / "gallery"
START = sorted((ROOT / "nbs").glob("index.ipynb"))
ORDER = "".join(path.read_text("utf-8") for path in START)  # "Start here" names the tutorials in the order of reading
LEARN = [*ROOT.glob("nbs/from_scratch*.ipynb"), ROOT / "nbs" / "glossary.ipynb", *ROOT.glob("nbs/tutorials/*.ipynb")]
TUTORIALS = sorted(LEARN, key=lambda path: (len(ORDER.partition(path.name)[0]), path))
LIBRARY = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
OF_GALLERY = Gallery(GALLERY, ROOT / "figures")
FIGURES = {figure["name"]: figure for figure in read_figures(GALLERY, ROOT / "figures") if figure["notebook"]}


# ---- what is where


def address(path: Path) -> str:
    "Where a file of the repository is on the site: README and docs/ at the top, the rest as it is, notebooks as pages."
    docs = ROOT / "docs"
    place = path.relative_to(docs if path.is_relative_to(docs) else ROOT).as_posix()
    own = {"README.md": "index.md", "SECURITY.md": "promises.md"}  # security.md is in docs/
    return own.get(place) or re.sub(r"\.ipynb$", ".md", place)


NOTEBOOKS = [*START, *TUTORIALS, *LIBRARY, *(ROOT / "figures" / f"{name}.ipynb" for name in FIGURES)]
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "CITATION.cff")
AS_THEY_ARE = (
    *TEXTS,
    "figures/gallery/*.*",
    "figures/gallery/published/*.*",
    "benchmarks/*.csv",
    "benchmarks/*.json",
    "benchmarks/*.png",
)
TABLES = set(GALLERY.rglob("*.md"))  # to be put into texts; as pages of the site they would say nothing else
FILES = [path for pattern in AS_THEY_ARE for path in ROOT.glob(pattern) if path not in TABLES]
ADDRESSES = {path: address(path) for path in [*NOTEBOOKS, *FILES, *(ROOT / "docs").rglob("*.md")]}
ORIGINS = {uri: path for path, uri in ADDRESSES.items()}


def link(path: Path, page: str) -> str:
    "From a page of the site to a file of the repository."
    return relpath(ADDRESSES[path], Path(page).parent)


def follow_links(markdown: str, page: str) -> str:
    "Links between files of the repository lead to their pages; what is not on the site is left for mkdocs to report."

    def moved(match: re.Match) -> str:
        path, hash, anchor = unquote(match[1]).partition("#")
        target = (ORIGINS[page].parent / path).resolve()
        return f"]({link(target, page)}{hash}{anchor})" if target in ADDRESSES else match[0]

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", moved, markdown) if page in ORIGINS else markdown


# ---- notebooks


def said(notebook: Path) -> tuple[str, str]:  # title, description
    "What the first cell says: `# title`, and `> description` if there is one."
    text = nbformat.read(notebook, 4).cells[0].source
    return re.search("^# (.*)", text)[1], "".join(re.findall("^> (.*)", text, re.M)[:1])


def for_python(text: str) -> str:
    "What Jupyter takes and Python's Markdown does not: lists, formulas right after a line, bars in a table's formulas."

    def row(match: re.Match) -> str:
        return re.sub(r"\$[^$]+\$", lambda formula: re.sub(r"(?<!\\)\|", r"\\vert{}", formula[0]), match[0])

    text = re.sub(r"(?m)^(?!\s|[-*+] |\d+\. )(.+)\n(?=[-*+] |\d+\. )", r"\1\n\n", text)
    text = re.sub(r"(?ms)^(\$\$.*?\$\$)$", r"\n\1\n", text)
    return re.sub(r"(?m)^\|.*$", row, text)


def for_readers(cell: NotebookNode) -> NotebookNode | None:  # None: not for readers
    "A cell without nbdev's directives; an exercise's answer is folded."
    hidden = re.search(r"^#\| *(hide|default_exp)", cell.source, re.M)
    if "answer" in cell.metadata.get("tags", []):
        title, code = re.match(r"# (Answer \d+)", cell.source)[1], f"```python\n{cell.source}\n```"
        folded = f'<details markdown="1"><summary>{title}</summary>\n\n{code}\n\n</details>'
        return nbformat.v4.new_markdown_cell(folded)
    if cell.cell_type == "code":
        cell.source = re.sub(r"(?m)^#\|.*\n?", "", cell.source).strip()
    else:
        cell.source = for_python(cell.source)
    return cell if cell.source and not hidden else None


def pictures_of(figure: dict[str, Any]) -> str:
    "A figure notebook has no outputs: its pictures and tables are in the gallery."
    page = f"figures/{figure['name']}.md"
    images = [f"![{p['alt']}]({link(GALLERY / (p['name'] + '.png'), page)})" for p in figure["pictures"]]
    tables = [f"[{name}](gallery/{file})" for name, file in figure["tables"].items()]
    presets = {picture["preset"] for picture in figure["pictures"]}
    note = [f"Made with preset `{'`, `'.join(sorted(presets))}`. Tables: {', '.join(tables)}."] if tables else []
    return "\n\n".join(images + note)


EXPORTER = MarkdownExporter()


def as_markdown(notebook: Path) -> tuple[str, dict[str, bytes]]:  # the page, and its pictures by address
    "A notebook with the outputs that are stored in it; nothing is executed."
    node = nbformat.read(notebook, 4)
    node.metadata.language_info = {"name": "python"}
    node.cells = [cell for cell in map(for_readers, node.cells) if cell]
    if notebook.stem in FIGURES:
        node.cells.insert(1, nbformat.v4.new_markdown_cell(pictures_of(FIGURES[notebook.stem])))
    resources = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    text, resources = EXPORTER.from_notebook_node(node, resources)
    text = text.replace("![png](", "![What the cell above draws](")
    text = re.sub(r"<style scoped>.*?</style>|( border=\"1\")? class=\"dataframe\"", "", text, flags=re.S)
    folder = Path(address(notebook)).parent
    return text, {(folder / name).as_posix(): data for name, data in resources["outputs"].items()}


# ---- lists that docs/ asks for, as <!-- name -->


def tutorials() -> str:
    "What there is to begin with."
    told = [(*said(path), path.relative_to(ROOT).as_posix()) for path in [*START, *TUTORIALS]]
    return "\n".join(f"- [{title}](../{path}): {text}" for title, text, path in told)


def gallery() -> str:
    "Every figure: title, claim, pictures."
    parts = []
    for paper, figures in by_paper(FIGURES.values()).items():
        parts.append(f"## {paper}")
        for figure in figures:
            parts += [f"### [{figure['intro'].title}](../figures/{figure['name']}.ipynb)", figure["intro"].text]
            parts += [f"![{p['alt']}](../figures/gallery/{p['name']}.png)" for p in figure["pictures"]]
    return "\n\n".join(parts)


def claims() -> str:
    "Every published number and order beside ours, a table for each table or figure of a paper."
    parts = []
    for (paper, artefact), claims in OF_GALLERY.ledger.groupby(["paper", "artefact"], sort=False):
        parts += [f"## {PAPERS[paper]}: {artefact}", verdicts(claims)]
    return "\n\n".join(parts)


def verdicts(claims: pd.DataFrame) -> str:
    "A table of claims, some rows of the ledger."
    rows = ["| claim | published | ours | verdict |", "|---|---|---|---|"]
    same = claims.groupby(["kind", "metric", "value", "variant", "ours", "deviation", "n"], dropna=False).ngroup()
    cells = same.where(claims.deviation.notna(), -1 - claims.index)  # those of one setting have the same runs
    for place, claim in claims[~cells.duplicated()].to_dict("index").items():
        order, more = claim["kind"] == "order", int((cells == cells[place]).sum()) - 1
        statement = claim["statement"] or f"{claim['metric'].replace('_', ' ')} at `{claim['setting']}`"
        statement += f" and {more} more cells of one setting" if more else ""
        statement += f" ({claim['variant']})" if claim["variant"] else ""
        value = "" if order else f"{number(claim['value'])} {claim['unit']}"
        ours = "" if order else measured(claim["ours"], claim["deviation"], claim["n"])
        verdict = f"**{claim['verdict']}**" + (f": {claim['note']}" if claim["note"] else "")
        rows.append(f"| {statement} | {value} | {ours} | {verdict} |")
    return "\n".join(rows)


def with_verdict(*words: str) -> str:
    "The claims of which the ledger says one of `words`, by artefact."
    found = OF_GALLERY.ledger[OF_GALLERY.ledger.verdict.isin(words)]
    parts = [f"**{PAPERS[paper]}, {artefact}**\n\n{verdicts(claims)}"
             for (paper, artefact), claims in found.groupby(["paper", "artefact"], sort=False)]  # fmt: skip
    return "\n\n".join(parts) or "None so far."


def not_as_published() -> str:
    "Claims that ours contradicts, at the published setting or in the order of another one."
    other = OF_GALLERY.ledger[OF_GALLERY.ledger.note.str.contains("its order is reversed")]
    seen = verdicts(other) if len(other) else "None."
    other_way = "In another experiment, where a step of the order is significantly the other way round:"
    other_way = "In another experiment, where a step of the order is significantly the other way round:"
    return f"{with_verdict('differs', 'reversed')}\n\n{other_way}\n\n{seen}"


def expected() -> str:
    "What each figure takes, then the numbers it gives."
    total = costs(OF_GALLERY)
    parts = [cost_table(OF_GALLERY, lambda name: f"[{OF_GALLERY.title(name)}](../figures/{name}.ipynb)")]
    parts.append(f"{total['runs']} runs in all, each counted once: {total['core_seconds']:,.0f} core-seconds, and "
                 f"{total['notebook_seconds']:,.0f} in the notebooks.")  # fmt: skip
    for name in OF_GALLERY.figures():
        tables = [f"*{table.replace('_', ' ')}*\n\n{text}" for table, text in OF_GALLERY.tables(name).items()]
        if tables:
            heading = f"## {OF_GALLERY.title(name)} {{ id={name} }}"
            parts += [heading, f"[Notebook](../figures/{name}.ipynb)", *tables]
    return "\n\n".join(parts)


def front_door() -> str:
    "The names of `from fsl_sage import …`, by area, each with what its docstring says first."
    rows = ["| name | what it is |", "|---|---|"]
    for module, names in fsl_sage._HOMES.items():
        for name in names.split():
            about = inspect.getdoc(getattr(fsl_sage, name)).splitlines()[0].replace("|", "\\|")
            rows.append(f"| [`{name}`](/api/{module}.md#fsl_sage.{module}.{name}) | {about} |")
    return "\n".join(rows)


def algorithms() -> str:
    "Each record's name, its label, and what a client's round sends."
    rows = ["| name | label | a client sends up | and gets down |", "|---|---|---|---|"]
    for name, record in ALGORITHMS.items():
        words = cost_words(record)
        rows.append(f"| `{name}` | {record.label or name} | {words['up']} | {words['down']} |")
    return "\n".join(rows)


def fields() -> str:
    "The fields of an experiment, as `fsl-sage --help` explains them."
    rows = ["| field | default | what it is |", "|---|---|---|"]
    shown = [(name, default, about.replace("|", "\\|")) for name, default, about in explained("config", "Experiment")]
    return "\n".join([*rows, *(f"| `{name}` | `{default}` | {about} |" for name, default, about in shown)])


LISTS = {
    "front_door": front_door, "algorithms": algorithms, "fields": fields, "tutorials": tutorials,
    "gallery": gallery, "claims": claims, "expected": expected,
    "not_as_published": not_as_published, "undecided": lambda: with_verdict("undecided"),
}  # fmt: skip


# ---- what mkdocs calls

HOME = ("speed.md", "security.md", "promises.md", "troubleshooting.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    "The navigation; titles are the pages' own."
    pages = {path.stem: ADDRESSES[path] for path in NOTEBOOKS}
    howto = sorted(ADDRESSES[path] for path in (ROOT / "docs" / "how_to").glob("*.md"))
    figures = [{paper: [pages[f["name"]] for f in group]} for paper, group in by_paper(FIGURES.values()).items()]
    config.nav = [
        {"Home": ["index.md", "one_page.md", "results.md", "expected.md", "not_reproduced.md", *HOME]},
        {"Learn": ["reading_path.md", *(ADDRESSES[path] for path in [*START, *TUTORIALS]), "algorithms.md"]},
        {"How to": [*howto, "dependencies.md", "CONTRIBUTING.md", "CHANGELOG.md"]},
        {"Library": [ADDRESSES[path] for path in LIBRARY]},
        {"Gallery": ["gallery.md", *figures, "claims.md"]},
        {"API": ["api/index.md", *(f"api/{module}.md" for module in MODULES)]},
    ]
    config.copyright = stamp()
    return config


def stamp() -> str:
    "Which state of the repository the site is of."
    done = subprocess.run(["git", "log", "-1", "--format=%h of %cs"], cwd=ROOT, capture_output=True, text=True)
    commit = f", commit {done.stdout.strip()}" if done.returncode == 0 else ""
    return f"fsl_sage {fsl_sage.__version__}{commit}"


MODULES = {
    re.search(r"^#\| *default_exp ([\w.]+)", cell.source)[1]: path
    for path in LIBRARY
    for cell in nbformat.read(path, 4).cells
    if cell.source.startswith("#| default_exp")
}


def modules() -> str:
    "All modules, by area, in the order in which they import each other."
    rows = ["## Modules", "| module | what it is |", "|---|---|"]
    rows += [f"| [`{module}`](/api/{module}.md) | {said(path)[1]} |" for module, path in MODULES.items()]
    return "\n".join([rows[0], "", *rows[1:]])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    "Add what is not in docs/."
    about = "The names to import from `fsl_sage`, then all modules by area."
    made = {"api/index.md": f"# The package\n\n{about}\n\n{front_door()}\n\n{modules()}\n"}
    for path in NOTEBOOKS:
        made[ADDRESSES[path]], pictures = as_markdown(path)
        made |= pictures
    for module, path in MODULES.items():
        source = f"Explained and tested in [{said(path)[0]}](../{ADDRESSES[path]})."
        made[f"api/{module}.md"] = f"# {module}\n\n{source}\n\n::: fsl_sage.{module}\n"
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    for path in FILES:
        files.append(File.generated(config, ADDRESSES[path], abs_src_path=str(path)))
    for path in ROOT.glob("figures/*.ipynb"):  # the gallery's own page leads to them
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    uri = page.file.src_uri
    markdown = re.sub(r"<!-- (\w+) -->", lambda match: LISTS[match[1]](), markdown)
    markdown = re.sub(
        r"\]\(/([^)\s]+)\)", lambda match: f"]({relpath(match[1], Path(uri).parent)})", markdown
    )  # of the site
    return follow_links(markdown, uri)


def on_page_content(html: str, **_: Any) -> str:
    "Formulas as MathML, which browsers draw by themselves."

    def formula(match: re.Match) -> str:
        inline = match[2] == "("
        drawn = mathml(unescape(match[3]).strip(), "inline" if inline else "block")
        return drawn if inline else f'<div class="formula">{drawn}</div>'

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', formula, html, flags=re.S)
