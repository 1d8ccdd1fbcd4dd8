"""Small runs with clients that are asked, in one process: for test_remote.py, test_faults.py and faults_program.py."""

from collections import Counter

import pandas as pd
import torch

from fsl_sage.config import preset
from fsl_sage.experiments.train import client_data, prepare
from fsl_sage.machines.flower import answer

SMALL = {"num_clients": 2, "rounds": 3, "dataset.max_train": 60, "dataset.max_test": 20, "model.width": 8}
SMALL |= {"model.client.batch_size": 16, "dataset.distribution": "noniid_dirichlet"}
OWN = {"fsl_sage": {"algorithm.align_epochs": 2, "algorithm.align_interval": 2, "algorithm.server_update_interval": 2}}


def small(algorithm, **changes):
    return preset("smoke", algorithm, **SMALL | OWN.get(algorithm, {}) | changes)


class Clients:
    """Clients that are asked by function call; each question and each answer can be tampered with."""

    def __init__(self, experiment, folder):
        self.experiment, self.folder, self.asked = experiment, folder, Counter()
        self.data = client_data(experiment, prepare(experiment, torch.device("cpu"))[0])

    def answer(self, i, question):
        return answer(self.experiment, i, self.data[i], self.folder, question)

    def __call__(self, questions):
        self.asked.update((question.round, i) for i, question in questions.items())
        return {i: self.answer(i, question) for i, question in questions.items()}


def assert_same(one, other):
    for table in ("rounds", "alignments", "ledger"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    assert one.stopped == other.stopped
