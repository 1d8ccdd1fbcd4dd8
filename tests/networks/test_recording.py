"""Recorded steps: with `Pretended` in the place of CUDA graphs a run is the same to the last bit with and without."""

from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.experiments.train import train
from fsl_sage.networks.recording import Pretended, recording
from tests.support.runs import assert_same, tiny

SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "scheduler": {"name": "cyclic", "step_size": 2}}
CASES = {name: (name, {}, {}) for name in ALGORITHMS} | {
    "joint alignment": ("fsl_sage", {"algorithm.align_jointly": True}, {}),
    "alignment by tolerance": ("fsl_sage", {"algorithm.align_tolerance": 0.2, "algorithm.align_epochs": 20}, {}),
    "alignment in batches": ("fsl_sage", {"algorithm.align_batch_size": 20}, {}),
    "bf16": ("fsl_sage", {"precision": "bf16"}, {}),
    "rates that change": ("fed_avg", {"model.client.optimizer": SGD}, {}),
    "shared server": ("fed_avg", {"algorithm.share_server": True}, {}),
    "some clients": ("cse_fsl", {"participation": 0.5}, {}),
    "one place for all clients": ("cse_fsl", {}, {"in_flight": 1}),
    "packed": ("sl_multi_server", {"codec.smashed.bits": 4, "codec.cut_grad.name": "top_k"}, {}),
    "corrected": (
        "sl_single_server",
        {f"codec.smashed.{k}": v for k, v in (("name", "product"), ("correction", 0.1))},
        {},
    ),
    "packed and aligned": ("fsl_sage", {"codec.smashed.bits": 4, "codec.smashed.stochastic": True}, {}),
    "mixed channels": ("sglr", {"algorithm.mixing_mode": "concat_channels"}, {}),
}


class Counting(Pretended):
    """Counts what is recorded and played."""

    seen: ClassVar[Counter] = Counter()

    def record(self, work, part):
        out, play = super().record(work, part)
        self.seen["recorded"] += 1

        def counted():
            self.seen["played"] += 1
            play()

        return out, counted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error:.*is not recorded")
def test_a_recorded_run_is_the_same_run(case):
    algorithm, changes, options = CASES[case]
    experiment = tiny(algorithm, **changes)
    eager = train(experiment, "cpu", progress=False, **options)
    Counting.seen.clear()
    with recording(Counting):
        played = train(experiment, "cpu", progress=False, **options)
    assert_same(eager, played)
    assert Counting.seen["played"] > Counting.seen["recorded"] > 0


def test_an_optimiser_that_counts_in_python_is_not_recorded():
    """A CUDA graph would repeat the bias correction of the step that was recorded; `Pretended` could not show it."""
    from fsl_sage.algorithms.optimisers import make_part
    from fsl_sage.config.parts import OptimizerConfig

    with recording(Pretended):
        players = {name: make_part(nn.Linear(2, 2), OptimizerConfig(name)).player for name in ("adam", "sgd", "adamw")}
        assert None not in players.values()
        assert make_part(nn.Linear(2, 2), OptimizerConfig("adamw_released")).player is None


def test_parts_that_draw_are_done_as_they_stand():
    from fsl_sage.algorithms.optimisers import make_part
    from fsl_sage.networks.part import Draws

    config = tiny("fed_avg").model.client.optimizer
    with recording(Pretended):
        part = make_part(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), config)
    assert part.player is not None
    part.draws = Draws(0, torch.device("cpu"))
    assert part.player is None


def test_recording_needs_a_gpu():
    with pytest.raises(ValueError, match="recorded=True: must be False on cpu"):
        train(tiny("fed_avg"), "cpu", progress=False, recorded=True)
