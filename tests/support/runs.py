"""Tiny runs, runs that are stopped, and runs that must be the same in every bit."""

import pandas as pd
import pytest

from fsl_sage.config import preset
from fsl_sage.experiments import train as training


def tiny(algorithm: str, **changes):
    own = {"algorithm.align_interval": 2, "algorithm.align_epochs": 2} if algorithm == "fsl_sage" else {}
    small = {"dataset.max_train": 150, "dataset.val_size": 30, "dataset.max_test": 20}
    small |= {"dataset.distribution": "iid", "rounds": 3}
    return preset("smoke", algorithm, **(small | own | changes))


def stopped_after(saved, monkeypatch, experiment, path):
    """Train until so many checkpoints are written; then the power is cut."""
    left, save = [saved], training.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            training.train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0)


def assert_same(one, other):
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert one.stopped == other.stopped
