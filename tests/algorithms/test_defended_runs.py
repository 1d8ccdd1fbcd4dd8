"""Runs with defences at the cut: off, they change nothing; on, they act where they say, and resume."""

import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.config.experiment import from_dict
from fsl_sage.config.parts import DefenceConfig
from fsl_sage.config.presets import preset
from fsl_sage.core import refusal
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.networks.defences import DEFENCES, Shield, distance_correlation_of, max_norm
from fsl_sage.papers.attacks import auc, gradient_norms
from fsl_sage.papers.leakage import distance_correlation
from fsl_sage.papers.traffic import observe
from tests.support.runs import assert_same, stopped_after, tiny

ON = {
    "nopeek": {"defence.nopeek": 0.5},
    "max_norm": {"defence.max_norm": True},
    "noise": {"defence.clip": 2.0, "defence.noise": 0.1},
    "drop": {"defence.drop": 0.3},
    "bottleneck": {"defence.bottleneck": 2},
}
CROSSES = [name for name, record in ALGORITHMS.items() if record.cost and "smashed" in record.cost.up]
BACK = [name for name in CROSSES if "forward" not in ALGORITHMS[name].cost.client]
ANSWERED = [name for name in CROSSES if "smashed" in ALGORITHMS[name].cost.down]


def test_there_is_a_run_with_each_defence():
    assert {*ON} == {one.field for one in DEFENCES.values()}
    assert all(getattr(DefenceConfig(), one.field) == one.baseline for one in DEFENCES.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_baselines_are_the_undefended_experiment(name):
    off = {f"defence.{one.field}": one.baseline for one in DEFENCES.values()} | {"defence.clip": 0.0}
    plain = tiny(name)
    assert tiny(name, **off) == plain and tiny(name, **off).hash == plain.hash and "defence" not in plain.to_dict()
    if name not in CROSSES:  # nothing is sent that could be defended
        assert tiny(name, **ON["noise"] | ON["drop"]).hash == plain.hash
    elif name not in ANSWERED:
        assert tiny(name, **ON["max_norm"]).hash == plain.hash
    if name in BACK:
        run = tiny(name, **ON["nopeek"])
        assert run.hash != plain.hash and from_dict(run.to_dict()) == run


@pytest.mark.parametrize("cuts", [("conv1", "layer1"), ("layer1", "layer3")])
def test_dropped_channels_leave_the_gradient_of_the_features_alone(cuts, monkeypatch):
    """In U-shaped training it is of the upper cut, which may have as many channels."""
    seen, unpack = {}, Shield.unpack

    def spy(self, packed, like, client):
        value = unpack(self, packed, like, client)
        seen.setdefault(self.kind, []).append(float((value.flatten(2) == 0).all(2).float().mean()))
        return value

    monkeypatch.setattr(Shield, "unpack", spy)
    network = {"model.name": "resnet18", "model.width": 4, "model.cut": cuts[0], "model.head_cut": cuts[1]}
    train(tiny("sl_single_server", rounds=1, **network, **{"defence.drop": 0.5}), "cpu", progress=False)
    assert max(seen["feature_grad"]) < 0.1 and 0.3 < sum(seen["cut_grad"]) / len(seen["cut_grad"]) < 0.7


@pytest.mark.parametrize("field", ON)
def test_a_defence_changes_the_run_and_only_a_bottleneck_its_bytes(field):
    network = {"model.name": "resnet18", "model.width": 4, "model.cut": "layer1"} if field == "bottleneck" else {}
    plain, defended = (
        train(tiny("sl_single_server", rounds=2, **network, **own), "cpu", progress=False) for own in ({}, ON[field])
    )
    assert plain.rounds.train_loss.iloc[-1] != defended.rounds.train_loss.iloc[-1]
    sent = [h.ledger.query("kind == 'smashed'").bytes.sum() for h in (plain, defended)]
    assert (sent[0] == 2 * sent[1]) if field == "bottleneck" else (sent[0] == sent[1])


@pytest.mark.parametrize("name", ["fsl_sage", "sl_multi_server", "sglr"])
def test_a_defended_run_resumes_to_the_bit(name, tmp_path, monkeypatch):
    all_on = ON["nopeek"] | ON["max_norm"] | ON["noise"] | ON["drop"] | {"codec.smashed.bits": 4}
    experiment = tiny(name, rounds=3, **all_on)
    whole = train(experiment, "cpu", progress=False)
    stopped_after(2, monkeypatch, experiment, tmp_path / "run")
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=tmp_path / "run"))


def test_max_norm_hides_a_known_imbalance():
    gen = torch.Generator().manual_seed(3)
    labels = (torch.rand(4000, generator=gen) < 0.1).long()
    logits = torch.tensor([0.9, 0.1]).log() + 0.2 * torch.randn(4000, 2, generator=gen)
    gradients = (logits.softmax(1) - torch.nn.functional.one_hot(labels, 2)) @ torch.randn(2, 32, generator=gen)
    assert auc(gradient_norms(gradients), labels == 1) > 0.99
    hidden = max_norm(gradients, gen)
    assert auc(gradient_norms(hidden), labels == 1) == pytest.approx(0.5, abs=0.17)
    square = gradient_norms(hidden).square()
    assert square.mean() == pytest.approx(float(gradient_norms(gradients).max() ** 2), rel=0.1)


def test_nopeek_lowers_the_distance_correlation():
    changes = {
        "num_clients": 2,
        "dataset.max_train": 200,
        "dataset.max_test": 50,
        "dataset.augment": False,
        "rounds": 3,
    }
    views = [
        observe(preset("smoke", "sl_single_server", **changes, **{"defence.nopeek": weight}), "cpu")
        for weight in (0.0, 20.0)
    ]
    plain, hidden = (distance_correlation(v.images[: v.batches[0]], v.smashed[: v.batches[0]]) for v in views)
    assert hidden < plain - 0.02


def test_one_distance_correlation_for_all():
    x, y = (torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert distance_correlation(x, y) == float(distance_correlation_of(x, y))
    constant = torch.ones(40, 2, requires_grad=True)
    distance_correlation_of(x, constant).backward()
    assert distance_correlation(x, constant.detach()) == 0 and not constant.grad.any()


def test_a_shield_passes_on_what_it_does_not_change():
    value = torch.randn(3, 4, 2, 2)
    shield = Shield(DefenceConfig(), 0, "smashed")
    assert torch.equal(shield.unpack(shield.pack(value, 0, 0), value, 0), value)
    meta = value.to("meta")
    assert Shield(DefenceConfig(clip=1.0, noise=1.0), 0, "smashed").pack(meta, 0, 0)[""].is_meta


@pytest.mark.parametrize("name", ["cse_fsl", "fsl_sage", "sglr"])
def test_a_bottleneck_is_a_layer_of_both_halves(name):
    changes = {"model.name": "resnet18", "model.width": 4, "model.cut": "layer1", "defence.bottleneck": 3}
    state = set_up(tiny(name, **changes))
    assert "squeeze.weight" in state.clients[0].exchanged() and "expand.weight" in state.servers[0].exchanged()
    assert not len(state.auxes) or "expand.weight" in state.auxes[0].exchanged()
    _, trained = train_state(tiny(name, rounds=1, **changes), "cpu", progress=False)
    before, after = (one.clients[0].exchanged()["squeeze.weight"] for one in (state, trained))
    assert not torch.equal(before, after)


def test_what_cannot_be_defended_is_refused():
    assert "noise without clipping" in refusal(DefenceConfig, noise=1.0)
    assert "do not back-propagate" in refusal(tiny, "ho_sfl", **ON["nopeek"])
    assert "None with model.cuts" in refusal(tiny, "sl_single_server", **{"model.head_cut": "fc1", **ON["bottleneck"]})
    wide = {"model.name": "resnet18", "model.width": 4, "model.cut": "layer1", "defence.bottleneck": 4}
    assert "less than the 4 channels" in refusal(set_up, tiny("sl_single_server", **wide))
