"""Results per client and class: what the columns say, which runs have them, and that nothing else has changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fsl_sage.config.presets import preset
from fsl_sage.config.settings import record_of
from fsl_sage.core import arithmetic
from fsl_sage.data.batches import eval_batches
from fsl_sage.data.partition import partition
from fsl_sage.experiments.history import CLIENT_COLUMNS
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import prepare
from fsl_sage.experiments.stored import tidy
from fsl_sage.experiments.train import train, train_state

SMALL = {"rounds": 1, "dataset.max_train": 240, "dataset.max_test": 60, "model.width": 8, "num_clients": 4}
UNEQUAL = SMALL | {"dataset.distribution": "noniid_dirichlet", "dataset.alpha": 0.3}


def by_hand(experiment, state):
    """Each client's accuracy, image by image: the share of its labels times the chance that its model knows them."""
    dataset, _ = prepare(experiment, torch.device("cpu"))
    n, config, models = experiment.num_clients, experiment.dataset, record_of(experiment).evaluation_models(state)
    parts = partition(dataset.train.y, n, config.distribution, experiment.partition_seed, config.alpha)
    found = []
    for i, part in enumerate(parts):
        model = (models[i] if len(models) > 1 else models[0]).eval()
        with arithmetic("fp32"), torch.no_grad():
            batches = eval_batches(dataset.test, dataset.mean, dataset.std)
            guesses = torch.cat([model(x).argmax(1) for x, _ in batches]).numpy()
        truth, accuracy = dataset.test.y.numpy(), 0.0
        for label in dataset.train.y[part].tolist():
            accuracy += (guesses[truth == label] == label).mean() / len(part)
        found.append(accuracy)
    return np.array(found)


@pytest.mark.parametrize("algorithm", ["fsl_sage", "fed_avg", "sglr"])  # the last: a model for each client
def test_each_client_is_judged_on_its_own_mixture_of_labels(algorithm):
    experiment = preset("smoke", algorithm, **UNEQUAL)
    history, state = train_state(experiment, "cpu", progress=False)
    own, row = by_hand(experiment, state), history.rounds.iloc[-1]
    assert len(set(own.round(6))) > 1
    expected = own.mean(), own.min(), np.quantile(own, 0.1), own.std()
    np.testing.assert_allclose([row[name] for name in CLIENT_COLUMNS], expected, atol=1e-12)


def test_with_equal_mixtures_all_clients_see_the_accuracy_of_their_classes():
    experiment = preset("smoke", "fed_avg", **SMALL | {"dataset.distribution": "balanced", "dataset.max_train": None})
    row = train(experiment, "cpu", progress=False).rounds.iloc[-1]
    assert row.client_accuracy_deviation == pytest.approx(0, abs=1e-12)
    assert row.client_accuracy_worst == pytest.approx(row.client_accuracy_mean)


def test_rounds_without_evaluation_have_none_and_texts_have_no_columns():
    sparse = train(preset("smoke", "fed_avg", **UNEQUAL | {"rounds": 2, "eval_every": 2}), "cpu", progress=False)
    assert sparse.rounds.client_accuracy_worst.isna().tolist() == [True, False]
    text = {"dataset.name": "restaurants", "model.name": "gpt2_tiny", "dataset.max_train": 24, "dataset.max_test": 6}
    told = train(preset("smoke", "fed_avg", rounds=1, num_clients=2, **text), "cpu", progress=False)
    assert not {*CLIENT_COLUMNS} & {*told.rounds}


def test_stored_runs_without_the_columns_are_read_and_stand_beside_new_ones(tmp_path):
    store = RunStore(tmp_path)
    new, old = (train(preset("smoke", "fed_avg", **UNEQUAL, seed=seed), "cpu", progress=False) for seed in (0, 1))
    store.save(replace(old, rounds=old.rounds.drop(columns=list(CLIENT_COLUMNS))), 1.0, "cpu")
    store.save(new, 1.0, "cpu")
    found = store.get([new.experiment, old.experiment], "cpu", progress=False)
    assert not {*CLIENT_COLUMNS} & {*found[1].rounds}
    assert tidy(found).client_accuracy_worst.isna().tolist() == [False, True]
    assert store.frame().client_accuracy_tenth.notna().sum() == 1
