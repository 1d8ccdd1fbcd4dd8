"""Averages of models: whole-number buffers are exact, floating-point entries are Σ weight·entry, bit for bit."""

import pytest
import torch

from fsl_sage.core import weighted_average

TENTHS, THIRDS = [0.1] * 10, [1 / 3, 2 / 3]
COUNTERS = [
    (torch.int64, [2**24 + 1] * 10, TENTHS, 2**24 + 1),
    (torch.int64, [2**40 + 1, 2**40 + 1], [0.5, 0.5], 2**40 + 1),
    (torch.int64, [2**62 + 1, 2**62 + 4], THIRDS, 2**62 + 3),
    (torch.int64, [-(2**60) - 1] * 10, TENTHS, -(2**60) - 1),
    (torch.int32, [2**31 - 1] * 10, TENTHS, 2**31 - 1),
    (torch.int32, [2**30 + 1, 2**30 + 4], THIRDS, 2**30 + 3),
    (torch.uint8, [255, 0], THIRDS, 85),
    (torch.int64, [1, 2], [0.5, 0.5], 2),
    (torch.int64, [2, 3], [0.5, 0.5], 2),
    (torch.bool, [True] * 10, TENTHS, True),
    (torch.bool, [True, False], THIRDS, False),
]


@pytest.mark.parametrize(("kind", "values", "weights", "expected"), COUNTERS)
def test_whole_numbers_are_averaged_exactly(kind, values, weights, expected):
    states = ({"buffer": torch.tensor([value, value], dtype=kind)} for value in values)
    average = weighted_average(states, weights)["buffer"]
    assert average.dtype == kind and average.tolist() == [expected, expected]


def test_one_model_that_is_loaded_again_and_again_is_averaged():
    """Models come one at a time and may share their memory."""
    counter = torch.zeros(1, dtype=torch.int64)

    def states():
        for value in (10, 20, 30):
            yield {"counter": counter.fill_(value)}

    assert weighted_average(states(), [0.25, 0.25, 0.5])["counter"].item() == 22  # 22.5, halves to even


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_floating_point_is_a_plain_sum(kind):
    gen = torch.Generator().manual_seed(0)
    entries = [torch.randn(50, generator=gen).to(kind) for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    expected = entries[0] * 0.2 + entries[1] * 0.3 + entries[2] * 0.5
    average = weighted_average(({"entry": entry} for entry in entries), weights)["entry"]
    assert average.dtype == kind and torch.equal(average, expected)
