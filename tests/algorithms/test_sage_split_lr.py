"""FSL-SAGE with SplitLr composes two algorithms: without SplitLr it is the one, and its rate is the other's."""

import pytest
import torch

from fsl_sage.algorithms.sglr import server_rate
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train_state
from tests.support.runs import assert_same, tiny

ALIGNED = {"algorithm.align_interval": 2, "algorithm.align_epochs": 2}
TEXTS = {
    "dataset.name": "restaurants", "dataset.max_train": 60, "model.name": "gpt2_tiny", "model.blocks": 2,
    "model.width": 16, "model.client.batch_size": 8, "model.adapter": {"rank": 2, "dropout": 0.1},
    "model.server.optimizer.scheduler": {"name": "warmup_linear", "warmup_steps": 3},
}  # fmt: skip
VARIANTS = {
    "images": {}, "texts": TEXTS, "jointly": {"algorithm.align_jointly": True}, "warm": {"algorithm.warm_start": True},
    "some clients": {"participation": 0.5}, "released": TEXTS | {"algorithm.language_branch": True},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_power_it_is_fsl_sage_bit_for_bit(variant):
    changes = ALIGNED | VARIANTS[variant]
    (usual, one), (ours, other) = (
        train_state(tiny(name, **changes), "cpu", progress=False) for name in ("fsl_sage", "sage_split_lr")
    )
    assert_same(usual, ours)
    assert len(usual.alignments) > 0
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        for name, tensor in mine.model.state_dict().items():
            assert torch.equal(tensor, theirs.model.state_dict()[name]), name


def test_the_server_learns_at_the_rate_of_sglr_and_nobody_else_does():
    power = {"algorithm.lr_power": 0.5, "num_clients": 4, "participation": 0.5, "model.server.optimizer.lr": 0.7}
    state, sglr = (set_up(tiny(name, **power)) for name in ("sage_split_lr", "sglr"))
    for built in state, sglr:  # two of the four are asked
        assert built.servers[0].lr == server_rate(built.clients[0].lr, 2, 0.5)
    assert {part.lr for part in (*state.clients, *state.auxes)} == {state.experiment.model.client.optimizer.lr}
    history, _ = train_state(state.experiment, "cpu", progress=False)
    assert (history.rounds.server_lr == history.rounds.client_lr * 2**0.5).all()
