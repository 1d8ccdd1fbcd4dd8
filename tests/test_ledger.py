"""The ledger of claims, from the gallery that is committed: no number from another experiment."""

import re
from pathlib import Path

import pandas as pd
import pytest

from fsl_sage.claims import COUNTED, KEY, OWNERS, VERSUS, gather, settings_tested, values_of

GALLERY = Path(__file__).parent.parent / "figures" / "gallery"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    copy = tmp_path_factory.mktemp("gallery")
    for path in (*GALLERY.glob(f"*{VERSUS}"), *GALLERY.glob("*.json")):
        (copy / path.name).write_bytes(path.read_bytes())
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


def test_the_readme_counts_as_the_ledger_does(ledger):
    text = (GALLERY.parent.parent / "README.md").read_text("utf-8")
    pattern = r"Of (\d+) published numbers (\d+) are tested at .*: (\d+) hold, (\d+) differ, (\d+) are undecided"
    settings = settings_tested(ledger)
    words = settings.value_counts()
    tested = [int(words.get(word, 0)) for word in ("holds", "differs", "undecided")]
    assert [int(n) for n in re.search(pattern, text).groups()] == [len(settings), sum(tested), *tested]


FIGURES = {  # words in docs/results.md before a text with numbers → the figures it speaks of
    "## FSL-SAGE's headline figure": "sage_accuracy_vs_communication",
    "| accuracy over Dirichlet": "sage_alpha",
    "| size of the auxiliary": "sage_auxiliary_size",
    "| alignment interval": "sage_align_interval",
    "| how good is the estimated": "sage_gradient_quality sage_auxiliary_size sage_align_interval",
    "| can an alignment be shorter": "sage_fast_alignment",
    "| FedAvg, correct": "fed_avg_shared_server",
    "| half of the clients": "sage_participation",
    "| Fig. 2, Table 1": "sglr_convergence",
    "| Fig. 4, Table 5": "sglr_activations_and_leakage",
}
QUOTED = re.compile(r"(?<![\d.])0\.\d{3}(?!\d)")


def quoted_numbers():
    """Each decimal fraction of README's table and docs/results.md, and the figures it must come from."""
    headline = "sage_accuracy_vs_communication"
    for line in (GALLERY.parent.parent / "README.md").read_text("utf-8").splitlines():
        if line.startswith("|"):
            yield from ((number, headline, False) for number in QUOTED.findall(line))
    figures = ""
    for line in (GALLERY.parent.parent / "docs" / "results.md").read_text("utf-8").splitlines():
        figures = next((names for words, names in FIGURES.items() if line.startswith(words)), figures)
        yield from ((number, figures, not line.startswith("|")) for number in QUOTED.findall(line))


def test_quoted_numbers_stand_in_the_tables_of_their_figures():
    quoted = list(quoted_numbers())
    assert len(quoted) > 40
    wrong = []
    for number, figures, in_prose in quoted:
        paths = [path for name in figures.split() for path in GALLERY.glob(f"{name}_*.csv")]
        tables = [pd.read_csv(path) for path in paths if in_prose or "curves" not in path.stem]
        keys = [(table, key) for table in tables for key in ("label", "active_fraction") if key in table]
        tables += [table.groupby(key).mean(numeric_only=True) for table, key in keys]  # over seeds, over decoders
        columns = [table[column] for table in tables for column in table.select_dtypes("number")]
        there = {f"{abs(value):.3f}" for column in columns for value in column.dropna()}
        wrong += [] if number in there else [(number, figures)]
    assert not wrong
