"""A server and its clients in one process, which test_faults.py kills. Arguments: FOLDER EXPERIMENT.json"""

import json
import sys
from pathlib import Path

import torch

from fsl_sage.config.experiment import from_dict
from fsl_sage.experiments.runs import RunStore
from fsl_sage.machines.parties import ask_clients
from fsl_sage.machines.remote import line
from tests.support.asking import Clients

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, experiment = Path(sys.argv[1]), from_dict(json.loads(Path(sys.argv[2]).read_text()))
    history = ask_clients(experiment, Clients(experiment, folder), folder / "server", each_round=line)
    RunStore(folder / "store").save(history)
