"""`oracle.replay` against the traces of the authors' released code, at a relative 1e-7 (see tests/traces/README.md)."""

import pytest

from fsl_sage.papers.oracle import deviations, replay
from tests.support.traces import TRACES, read_trace

TOLERANCE = 1e-7


@pytest.mark.parametrize("name", [path.stem for path in TRACES])
def test_trace(name):
    spec, trace = read_trace(name)
    ours = replay(spec)
    worst, where = max(deviations(ours, trace))
    assert worst < TOLERANCE, f"{name}: {where} deviates by {worst:.2e}"
    for mine, theirs in zip(ours, trace, strict=True):
        assert mine.get("comm_bytes") == theirs.get("comm_bytes")


def test_a_wrong_number_is_noticed():
    spec, trace = read_trace("simple_conv-fsl_sage")
    trace[0]["server"]["fc1.weight"][2] *= 1 + 1e-4
    assert max(deviations(replay(spec | {"rounds": 1}), trace[:1]))[0] > TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [9, 17, 8, 30]},
        {"local_epochs": 2},
        {"server_update_interval": 1, "align_interval": 1},
        {"server_update_interval": 3, "align_interval": 3, "align_epochs": 1},
        {"max_dataset_size": 5},  # a buffer smaller than a batch
        {"batch_size": 7, "sizes": [24]},
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", ["fsl_sage", "cse_fsl", "fed_avg", "sl_multi_server"])
def test_other_settings(algorithm, change):
    """Any spec of that form runs; settings an algorithm does not use do not change it, those it uses do."""
    spec, _ = read_trace(f"simple_conv-{algorithm}")
    plain, changed = (replay(s | {"rounds": 2, "image_size": 8}) for s in (spec, spec | change))
    used = {
        "fsl_sage": change.keys(),
        "cse_fsl": change.keys() - {"align_interval", "align_epochs", "max_dataset_size"},
    }.get(algorithm, change.keys() & {"sizes", "local_epochs", "batch_size"})
    assert (plain != changed) == bool(used)


def test_unknown_algorithm():
    spec, _ = read_trace("simple_conv-fsl_sage")
    with pytest.raises(ValueError, match="fsl_sagee"):
        replay(spec | {"algorithm": "fsl_sagee"})
