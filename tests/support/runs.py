"""Tiny runs, runs that are stopped, and runs that must be the same in every bit."""

from pathlib import Path

import pandas as pd
import pytest

from fsl_sage.config.presets import preset
from fsl_sage.experiments import train as training


def tiny(algorithm: str, **changes):
    own = {"algorithm.align_interval": 2, "algorithm.align_epochs": 2} if algorithm == "fsl_sage" else {}
    small = {"dataset.max_train": 150, "dataset.val_size": 30, "dataset.max_test": 20}
    small |= {"dataset.distribution": "iid", "rounds": 3}
    return preset("smoke", algorithm, **(small | own | changes))


def stopped_after(saved, monkeypatch, experiment, path, **how):
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
            training.train_state(experiment, "cpu", progress=False, checkpoint=path, checkpoint_seconds=0, **how)


def assert_same(one, other):
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert one.stopped == other.stopped


def sessions_in(folder):
    """By offline session of Weights & Biases: the run's id and the steps with their rounds, as its own format says."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = {}
    for file in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        data, i, whole, ids, steps = file.read_bytes(), 7, b"", [], []
        while i + 7 <= len(data):  # blocks of 32 KiB, records with checksum, length and kind: LevelDB's log
            if 32768 - i % 32768 < 7:
                i += 32768 - i % 32768
                continue
            length, kind = int.from_bytes(data[i + 4 : i + 6], "little"), data[i + 6]
            whole += data[i + 7 : i + 7 + length]
            i += 7 + length
            if kind not in (1, 4):  # goes on
                continue
            record, whole = proto.Record.FromString(whole), b""
            ids += [record.run.run_id] if record.WhichOneof("record_type") == "run" else []
            if record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                steps.append((record.history.step.num, int(row["round"])))
        found[file.parent.name] = ids, steps
    return found
