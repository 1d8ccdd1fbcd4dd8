"""What a resumed run computes with lies in memory as a fresh run's does: products may differ in the last bit else."""

import torch

from fsl_sage.experiments.checkpoint import Progress, load_checkpoint, save_checkpoint
from fsl_sage.experiments.setup import set_up
from fsl_sage.ledger import Ledger
from tests.support.runs import tiny


def test_tensors_of_a_checkpoint_begin_at_boundaries_of_memory(tmp_path):
    path, experiment = tmp_path / "run.ckpt", tiny("fsl_sage")
    state = set_up(experiment)
    for buffer in state.buffers:
        buffer.add(torch.randn(5, 2, 3, 3), torch.arange(5))
    state.own = {"one": torch.randn(7), "two": [torch.randn(3), torch.randn(1)]}
    save_checkpoint(path, state, Ledger(), Progress(0))
    load_checkpoint(path, again := set_up(experiment), Ledger())
    found = [again.own["one"], *again.own["two"], *(buffer.smashed for buffer in again.buffers)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found)
    assert all(torch.equal(one.smashed, other.smashed) for one, other in zip(state.buffers, again.buffers, strict=True))
