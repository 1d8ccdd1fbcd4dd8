"""Texts that quote results: blocks are as the gallery's tables say, and outside of blocks no result is quoted."""

import json
import re

import nbformat
import pandas as pd
import pytest

from fsl_sage.papers.claims import all_published
from fsl_sage.papers.texts import BLOCK, TEXTS, Gallery, render_texts, rendered
from tests.support import ROOT

FILES = [path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))]
WITH_BLOCKS = [path for path in FILES if "<!-- gallery:" in path.read_text("utf-8")]
RESULTS = [ROOT / "README.md", ROOT / "docs" / "results.md"]  # texts about what came out
FIGURES = sorted((ROOT / "figures").glob("*.ipynb"))
QUOTED = re.compile(r"(?<![\w.,/])\d+\.\d+(?![\w.]*\d)(?: ?%)?|(?<![\w.,/])\d+ (?:%|points?\b)")  # 0.753, 88.6 %, 12 %
FENCES = re.compile(  # no results
    r"```.*?```|`[^`\n]*`|\]\([^)]*\)|\$[^$]+\$|arXiv [\d.]+|Sec\. [\d.]+|Python [\d.]+ to [\d.]+", re.S
)
ARITHMETIC = {"683.1", "95.49994", "3.4"}  # follow from published numbers: a count, a formula, a difference
EARLIER = {"0.011", "0.036"}  # between two processors, measured with the former `quick`; its runs are not kept


@pytest.fixture(scope="module")
def gallery():
    return Gallery(ROOT / "figures" / "gallery", ROOT / "figures")


def published_numbers():
    """Every published number as texts may write it: 0.588, 58.8 %, 12.20, 12.2; and thresholds, "81 %"."""
    claims = all_published()
    words = {number for text in claims.setting for number in re.findall(r"\d+(?:\.\d+)?", text)}
    for value in claims.value:
        for scaled in (value, 100 * value):
            words |= {f"{scaled:.{digits}f}" for digits in range(4)} | {f"{scaled:g}"}
    return words | {number for text in claims.metric for number in re.findall(r"\d+", text)}


def of_processors():
    """What results.md says of capped instruction sets, from the runs in benchmarks/processor.csv."""
    table = pd.read_csv(ROOT / "benchmarks" / "processor.csv")
    accuracy = table.pivot_table("test_accuracy", ["algorithm", "seed", "round"], "kernels")
    last = accuracy.xs(table["round"].max(), level="round")
    spread = last["as chosen"].groupby("algorithm").std()
    numbers = [*spread, (accuracy["AVX2"] - accuracy["as chosen"]).abs().max()]
    for kernels in ("AVX2", "SSE 4.1"):
        apart = last[kernels] - last["as chosen"]
        numbers += [(apart**2).mean() ** 0.5, apart.abs().max()]
    return {f"{number:.{digits}f}" for number in numbers for digits in (2, 3)} | {"4.1"}


def foreign(prose, allowed):
    """Decimal numbers and percentages of a text that are not among `allowed`."""
    found = QUOTED.findall(FENCES.sub(" ", prose))
    return [word for word in found if re.match(r"[\d.]+", word)[0] not in allowed]


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=lambda path: path.name)
def test_blocks_say_what_the_gallery_says(path, gallery):
    text = path.read_text("utf-8")
    assert rendered(text, gallery, ROOT / "docs" / "texts") == text, "run fsl-sage-reproduce --texts"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_outside_of_blocks_no_result_is_quoted(path):
    assert path in WITH_BLOCKS
    allowed = published_numbers() | (of_processors() | EARLIER if path.name == "results.md" else set())
    assert not foreign(BLOCK.sub("", path.read_text("utf-8")), allowed)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_prose_of_figure_notebooks_quotes_no_result(path):
    """Numbers in prose are published ones, or settings that stand in the notebook's own code."""
    cells = nbformat.read(path, 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    allowed = published_numbers() | ARITHMETIC | set(re.findall(r"\d+(?:\.\d+)?", code))
    wrong = {i: foreign(cell.source, allowed) for i, cell in enumerate(cells) if cell.cell_type == "markdown"}
    assert not {i: words for i, words in wrong.items() if words}


def test_a_number_that_no_table_has_is_found(gallery, tmp_path):
    """In a block, in the prose around it, and when the table changes."""
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    block = next(match for match in BLOCK.finditer(text) if match[2] == "headline")
    number = re.search(r"\d\.\d{3}", block[0])
    at = block.start() + number.start() + 4
    false = text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :]
    assert rendered(false, gallery, ROOT / "docs" / "texts") == text != false
    said = foreign("FSL-SAGE reaches 0.7534 here, 76.31 % of it; lr is `0.123`.", published_numbers())
    assert said == ["0.7534", "76.31 %"]


def test_texts_follow_a_gallery_made_on_another_machine(tmp_path):
    """All numbers of a figure change: the texts change with them, and nothing of the old ones is left."""
    for path in (*RESULTS, *(ROOT / "docs" / "texts").glob("*.j2"), *FIGURES):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "figures" / "gallery" / "published").mkdir(parents=True)
    gallery = ROOT / "figures" / "gallery"
    for path in (*gallery.glob("*.*"), *gallery.glob("published/*.*")):
        if path.suffix in (".csv", ".json", ".md"):
            (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    assert render_texts(tmp_path) == []
    summary = tmp_path / "figures" / "gallery" / "sage_accuracy_vs_communication_summary.csv"
    old = json.loads(summary.with_name("sage_accuracy_vs_communication.json").read_text("utf-8"))
    summary.with_name("sage_accuracy_vs_communication.json").write_text(json.dumps(old | {"hardware": ["a VAX"]}))
    rows = [line.split(",") for line in summary.read_text("utf-8").splitlines()]
    at = rows[0].index("final_accuracy")
    for row in rows[1:]:
        row[at] = "0.1234567"
    summary.write_text("\n".join(map(",".join, rows)))
    assert [path.name for path in render_texts(tmp_path)] == ["README.md", "results.md"]
    for path in RESULTS:
        text = (tmp_path / path.relative_to(ROOT)).read_text("utf-8")
        block = next(match[0] for match in BLOCK.finditer(text) if match[2] == "headline")
        assert "a VAX" in block and "0.123" in block
        assert not re.search(r"\| 0\.(?!123)\d{3}( ± [\d.]+)? \|$", block, re.M)


@pytest.mark.parametrize("path", sorted((ROOT / "figures" / "gallery").glob("*.json")), ids=lambda path: path.stem)
def test_each_picture_says_what_a_reviewer_asks(path):
    """Command, parameters, versions, machine, cost; of its runs also data, processor time and memory."""
    facts = json.loads(path.read_text("utf-8"))
    notebook = max((one.stem for one in FIGURES if path.stem.startswith(one.stem)), key=len)
    assert facts["command"].startswith("fsl-sage-reproduce --only ") and notebook in facts["command"]
    assert {"preset", "device"} <= set(facts["parameters"])
    assert facts["preset"] in (facts["parameters"]["preset"], "paper")  # drawn or counted: as published
    assert not any(str(value).startswith("/") for value in facts["parameters"].values())
    assert {"python", "numpy", "pandas", "matplotlib"} <= set(facts["drawn"]) and facts["drawn"]["core_seconds"] > 0
    assert {"python", "torch", "numpy", "pandas", "fsl_sage"} <= set(facts["versions"])
    assert facts["torch_builds"] and facts["instruction_sets"] and facts["cores"] and facts["hardware"]
    if facts["runs"]:
        assert len(facts["core_seconds_of_runs"]) == len(facts["runs"]) and facts["peak_bytes"] > 2**26
        assert facts["core_seconds"] == pytest.approx(sum(facts["core_seconds_of_runs"]))
        assert facts["jobs"] and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in facts["data"].values())
