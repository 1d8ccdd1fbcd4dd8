"""Small runs with clients that are asked, in one process: and the simulation that they must equal."""

import json
from collections import Counter

import pandas as pd
import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.participation import asked_clients
from fsl_sage.config.presets import preset
from fsl_sage.costs.clock import Attendance
from fsl_sage.experiments import train as training
from fsl_sage.experiments.setup import client_data, prepare
from fsl_sage.experiments.train import train
from fsl_sage.machines.parties import answer_question

SMALL = {"num_clients": 2, "rounds": 3, "dataset.max_train": 60, "dataset.max_test": 20, "model.width": 8}
SMALL |= {"model.client.batch_size": 16, "dataset.distribution": "noniid_dirichlet"}
OWN = {"fsl_sage": {"algorithm.align_epochs": 2, "algorithm.align_interval": 2, "algorithm.server_update_interval": 2}}
ASKED_ONCE = [name for name, record in ALGORITHMS.items() if record.asked_once]


def small(algorithm, **changes):
    return preset("smoke", algorithm, **SMALL | OWN.get(algorithm, {}) | changes)


TEXTS = {"num_clients": 2, "rounds": 3, "dataset.name": "restaurants", "dataset.max_train": 60, "dataset.max_test": 20}
TEXTS |= {"model.name": "gpt2_tiny", "model.blocks": 2, "model.width": 16, "model.client.batch_size": 8}
TEXTS |= {"dataset.size_spread": 0.5}  # unequal clients
ADAPTED = {"model.adapter": {"rank": 2, "dropout": 0.1}, "model.server.optimizer.name": "adamw"}
ADAPTED |= {"model.client.optimizer.scheduler": {"name": "warmup_linear", "warmup_steps": 2}}


def small_on_texts(algorithm, **changes):
    return preset("smoke", algorithm, **TEXTS | OWN.get(algorithm, {}) | changes)


class Clients:
    """Clients that are asked by function call; each question and each answer can be tampered with."""

    def __init__(self, experiment, folder):
        self.experiment, self.folder, self.asked = experiment, folder, Counter()
        self.data = client_data(experiment, prepare(experiment, torch.device("cpu"))[0])

    def answer(self, i, question):
        return answer_question(self.experiment, i, self.data[i], self.folder, question)

    def __call__(self, questions):
        self.asked.update((question.round, i) for i, question in questions.items())
        return {i: self.answer(i, question) for i, question in questions.items()}


STEPS = {"name": "step", "step_size": 1, "gamma": 0.5}

THREE = {"num_clients": 3, "rounds": 4, "dataset.max_train": 90, "model.client.optimizer.scheduler": STEPS}

_simulated = {}


def simulated(experiment, absent):
    """The history of a simulation; `absent`: round → clients that are not there."""

    def pattern(experiment, samples, costs):
        for rnd in range(experiment.rounds):
            yield Attendance(rnd, [i for i in asked_clients(experiment, rnd) if i not in absent.get(rnd, ())], [])

    key = experiment.hash, json.dumps(absent), torch.get_default_dtype()
    if key not in _simulated:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "attendances", pattern)
            _simulated[key] = train(experiment, "cpu", progress=False)
    return _simulated[key]


def assert_simulated(history, absent):
    """The history is that of the simulation, and says how many took part."""
    n, rounds = history.experiment.num_clients, history.rounds
    if absent and history.experiment.participation == 1:
        assert rounds.participants.tolist() == [n - len(absent.get(rnd, ())) for rnd in rounds["round"]]
        rounds = rounds.drop(columns="participants")
    one = simulated(history.experiment, absent)
    pd.testing.assert_frame_equal(one.rounds, rounds, check_exact=True)
    for table in ("alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(history, table), check_exact=True)
