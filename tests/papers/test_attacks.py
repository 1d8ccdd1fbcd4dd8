"""Attacks get what theory says they get, and see only what was sent."""

import pytest
import torch
import torch.nn.functional as F

from fsl_sage.config.presets import preset
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.papers.attacks import ATTACKS, attacked, auc, gradient_norms, nearest_label
from fsl_sage.papers.inversion import hijack
from fsl_sage.papers.leakage import decoder
from fsl_sage.papers.traffic import Tap, observe

TINY = {"num_clients": 2, "dataset.max_train": 140, "dataset.max_test": 60, "dataset.augment": False, "rounds": 1}


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_norm_attack_on_linear_logits_with_known_imbalance(share):
    gen = torch.Generator().manual_seed(1)
    labels = (torch.rand(3000, generator=gen) < share).long()
    logits = torch.tensor([1 - share, share]).log() + 0.2 * torch.randn(3000, 2, generator=gen)
    gradients = (logits.softmax(1) - F.one_hot(labels, 2)) @ torch.randn(2, 24, generator=gen)  # at a linear layer
    assert auc(gradient_norms(gradients), labels == 1) > 0.99
    assert nearest_label(gradients, labels) > 0.99
    assert 0.45 < auc(torch.randn(3000, generator=gen), labels == 1) < 0.55


def test_auc_counts_pairs():
    gen = torch.Generator().manual_seed(2)
    scores, positive = torch.randint(0, 5, (40,), generator=gen).float(), torch.rand(40, generator=gen) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(float(sum(pairs)) / len(pairs))
    with pytest.raises(ValueError, match="samples of both kinds"):
        auc(scores, torch.ones(40, dtype=torch.bool))


@pytest.mark.parametrize("algorithm", ["sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage", "sglr"])
def test_a_tapped_round_is_the_round_that_would_have_come(algorithm):
    sgl = {"dataset.samples_per_client": 20, "dataset.max_train": 400, "algorithm.active_fraction": 1.0}
    own = TINY | (sgl if algorithm == "sglr" else {})
    view = observe(preset("smoke", algorithm, **own), "cpu")
    two = train(preset("smoke", algorithm, **own | {"rounds": 2}), "cpu", progress=False)
    one = view.history.rounds
    assert two.rounds.iloc[0].equals(one.iloc[0])  # so the run before the tap is a run as any other
    assert len(view.images) == len(view.labels) == len(view.smashed) == sum(view.batches)
    assert (view.cut_grads is None) == (algorithm in ("cse_fsl", "fsl_sage"))
    assert (view.model is None) == (algorithm == "sglr") and (view.aux is None) == (view.estimates is None)
    assert view.images.min() + 1e-6 >= 0 and view.images.max() <= 1 + 1e-6
    rows, _ = attacked(view, [name for name in ATTACKS if ATTACKS[name].measure != "SSIM"])
    needed = {name for name in rows.attack for field in ATTACKS[name].needs if getattr(view, field) is None}
    assert not needed and rows.value.between(0, 1).all()


def test_a_tap_counts_what_a_ledger_counts():
    z, tap, ledger = torch.randn(3, 4), Tap(), Ledger()
    for records in (tap, ledger):
        records.link(0, 1).up(smashed=z, labels=torch.arange(3))
        records.multicast(0, [0, 1], mean_cut_grad=z)
    assert tap.transfers == ledger.transfers and [seen.kind for seen in tap.seen] == [
        "smashed", "labels", "mean_cut_grad", "mean_cut_grad",
    ]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage"])
def test_a_hijacked_federation_sends_what_an_honest_one_sends(algorithm):
    experiment = preset("smoke", algorithm, **TINY | {"rounds": 2, "model.cut": "layer1"})
    taken, honest = hijack(experiment, 2, "cpu"), train(experiment, "cpu", progress=False)
    assert taken["ledger"].bytes("wire") == honest.rounds.wire_bytes.iloc[-1]
    true = hijack(experiment, 2, "cpu", honest=True)
    assert true["ledger"].bytes("wire") == honest.rounds.wire_bytes.iloc[-1]
    assert not torch.equal(true["guess"], taken["guess"])
    for name in ("cse_fsl", "scala", "gas", "ssl"):  # whose rounds are others
        with pytest.raises(ValueError, match=f"algorithm.name='{name}'"):
            hijack(experiment.replace(**{"algorithm.name": name}), 1, "cpu")


@pytest.mark.parametrize("algorithm", ["sl_single_server", "fsl_sage"])
@pytest.mark.parametrize("changes", [{"defence.drop": 0.5}, {"codec.smashed.bits": 2}, {"hostile.clients": [1]}])
def test_no_hijacked_run_stands_for_one_with_defences(algorithm, changes):
    """The hijacker's rounds pack nothing: their pictures would be those of the undefended run."""
    experiment = preset("smoke", algorithm, **TINY | {"rounds": 1, "model.cut": "layer1"} | changes)
    with pytest.raises(ValueError, match=f"a run with {next(iter(changes)).split('.')[0]}"):
        hijack(experiment, 1, "cpu")
    table, pictures = attacked(observe(experiment, "cpu"), ["fsha", "fsha_aligned"])
    assert not len(table) and not pictures


@pytest.mark.parametrize(
    ("low", "high"), [((2, 2), (28, 28)), ((4, 4), (28, 28)), ((7, 7), (28, 28)), ((8, 6), (8, 6))]
)
def test_a_decoder_enlarges_to_any_size(low, high):
    assert decoder((5, *low), (3, *high))(torch.zeros(1, 5, *low)).shape == (1, 3, *high)
