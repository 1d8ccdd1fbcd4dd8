"""The ledger of claims, from the gallery that is committed: no number from another experiment."""

import re

import pandas as pd
import pytest
from scipy import stats

from fsl_sage.commands.figures import plan
from fsl_sage.costs.estimate import estimate
from fsl_sage.papers.claims import published
from fsl_sage.papers.standing import (
    A_CORE,
    COUNTED,
    ESTIMATES,
    KEY,
    OWNERS,
    PUBLISHED,
    VERSUS,
    compare,
    gather,
    settings_tested,
    values_of,
)
from fsl_sage.papers.verdicts import AS_PUBLISHED
from tests.support import ROOT

GALLERY = ROOT / "figures" / "gallery"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    copy = tmp_path_factory.mktemp("gallery")
    (copy / PUBLISHED).mkdir()
    for folder in ("", PUBLISHED):
        for path in (p for end in (f"*{VERSUS}", "*.json", ESTIMATES) for p in (GALLERY / folder).glob(end)):
            (copy / folder / path.name).write_bytes(path.read_bytes())
    return gather(copy)


def test_fed_avg_in_the_ledger_is_the_headline_figures(ledger):
    summary = pd.read_csv(GALLERY / "sage_accuracy_vs_communication_summary.csv")
    ours = ledger[(ledger.metric == "test_accuracy_at_200_GiB") & (ledger.variant == "") & (ledger.kind == "number")]
    for label, name in {"FedAvg": "fed_avg", "FSL-SAGE": "fsl_sage", "CSE-FSL": "cse_fsl"}.items():
        expected = summary[summary.label == label].final_accuracy.mean()
        assert ours[ours.setting == f"algorithm={name}"].ours.item() == pytest.approx(expected, abs=1e-12)


def test_each_number_has_one_place_and_one_experiment(ledger):
    ran = ledger[(ledger.kind == "number") & (ledger.n > 0)]
    assert not ran.duplicated([*KEY, "preset", "experiment", "variant"]).any()
    owned = ran[(ran.variant == "") & ran.artefact.isin(OWNERS)]
    assert (owned.figure == owned.artefact.map(OWNERS)).all()
    for _, rows in ran[ran.variant == ""].groupby(["artefact", "preset"]):
        assert len(set(rows.experiment)) == 1


def test_only_counts_hold_without_a_run_at_the_published_setting(ledger):
    decided = ledger[ledger.verdict.isin(["holds", "differs", "reversed"])]
    assert len(decided) > 30 and (decided.preset.isin(["paper", "published"])).all()
    assert (decided[decided.n == 1].metric.isin(COUNTED)).all()


def test_a_deviation_stands_where_two_seeds_are(ledger):
    for path in GALLERY.glob(f"*{VERSUS}"):
        for row in pd.read_csv(path, keep_default_na=False, na_values={"n": ""}).itertuples():
            assert len(values_of(row.runs)) == int(row.n)


def test_a_number_is_judged_by_what_is_known_of_it(ledger):
    """The spread of means over clients is not that of one client; a count of unprinted samples decides nothing."""
    numbers = ledger[(ledger.kind == "number") & ledger.preset.isin(AS_PUBLISHED)]
    work = numbers[(numbers.artefact == "Table 4") & (numbers.metric == "compute_per_client")]
    assert len(work) == 5 and set(work.verdict) == {"undecided"} and work.note.str.contains("not printed").all()
    alone = numbers[(numbers.artefact == "Table 1") & (numbers.variant == "")].iloc[0]  # with one client
    least, most = (float(text) for text in re.findall(r"[\d.]+", alone.note)[:2])
    half = stats.t.ppf(0.975, alone.n - 1) * alone.deviation * (1 + 1 / alone.n) ** 0.5
    assert most - least == pytest.approx(2 * half, 1e-2)


def test_the_readme_counts_as_the_ledger_does(ledger):
    text = (GALLERY.parent.parent / "README.md").read_text("utf-8")
    pattern = r"Of (\d+) numbers (\d+) are tested at .*: (\d+) hold, (\d+) differ, (\d+) are undecided"
    assert re.search(pattern, "\n".join(text.splitlines()[:14])), "on the first screen"
    settings = settings_tested(ledger)
    words = settings.verdict.value_counts()
    tested = [int(words.get(word, 0)) for word in ("holds", "differs", "undecided")]
    assert [int(n) for n in re.search(pattern, text).groups()] == [len(settings), sum(tested), *tested]


def test_runs_of_the_published_gallery_decide_claims(tmp_path):
    """Its figures have the same names; one setting that the tables print in 23 cells is one decided number."""
    for path in (*GALLERY.glob(f"*{VERSUS}"), *GALLERY.glob("*.json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = settings_tested(gather(tmp_path)).verdict
    cells = published("sglr", "Table 2", "test_accuracy").query("n_clients == 1")
    five = [cells.assign(value=82.4 + seed / 100, seed=seed, preset="published") for seed in range(5)]
    (tmp_path / "published").mkdir()
    ours = pd.concat(five)[["metric", "value", "preset", "seed", "n_clients", "lr_power", "active_fraction"]]
    compare(cells, ours).to_csv(tmp_path / "published" / f"sglr_tables_1_to_3{VERSUS}", index=False)
    facts = (GALLERY / "sglr_tables_1_to_3.json").read_bytes()
    (tmp_path / "published" / "sglr_tables_1_to_3.json").write_bytes(facts)
    after = settings_tested(gather(tmp_path)).verdict
    assert (after != before).sum() == 1 and after[after != before].item() in ("holds", "undecided")


def test_what_is_not_run_says_what_it_would_take(ledger):
    """And the hours are those of the figure that owns the number, counted from its own runs."""
    for row in ledger[ledger.verdict == "not run"].itertuples():
        assert re.match(r"[\d,]+ core-hours at 75 GFLOP/s a core for the \d+ runs of ", row.note), row
        assert row.note.endswith(OWNERS[row.artefact])
    needed = pd.read_csv(GALLERY / ESTIMATES).set_index("figure")
    name = "sage_participation"
    counted = estimate({name: plan(ROOT / "figures" / f"{name}.ipynb", {"preset": "paper"})}).loc[name]
    assert (needed.runs[name], needed.PFLOP[name]) == (counted.runs, pytest.approx(counted.PFLOP, abs=0.005))
    hours = needed.PFLOP["sage_alpha"] * 1e15 / A_CORE / 3600
    assert f"{hours:,.0f} core-hours" in ledger[ledger.artefact.str.contains("alpha")].note.str.cat(sep=";")
