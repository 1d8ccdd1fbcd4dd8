"""Sweeps on more than this process: Ray, with a node that is lost on the way, and submitit's local executor."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fsl_sage.config.presets import preset
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.stored import read_all
from tests.support import ROOT

ALONE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]  # a network with loopback only


def in_a_process(words, **environment):
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs fsl_sage[ray]")
def test_a_sweep_survives_the_loss_of_a_node(tmp_path):
    try:
        if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
            pytest.skip("no network of its own for Ray (unshare -rn, ip)")
    except FileNotFoundError as missing:
        pytest.skip(f"no network of its own for Ray ({missing.filename})")
    for attempt in range(3):  # the sweep may be over before a node is lost: then it has shown nothing, and begins again
        store = tmp_path / str(attempt)
        program = [sys.executable, "-m", "tests.support.ray_program", str(store), "5"]
        done = in_a_process([*ALONE, *program], RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["jobs"] == 2 and not result["failed"] and result["found"] == [True] * 5
        assert len(read_all(store)) == 5 and all(run.history for run in read_all(store))
        if result["lost"]:
            return
    raise AssertionError(f"no node was lost while it worked: {done.stderr[-3000:]}")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="needs fsl_sage[slurm]")
def test_a_sweep_by_submitit(tmp_path):
    words = ["-m", "preset=smoke", "rounds=1", "device=cpu", "seed=1,2", "hydra/launcher=submitit_local"]
    done = in_a_process([sys.executable, "-m", "fsl_sage", *words], FSL_SAGE_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore(tmp_path)
    assert all(store.find(preset("smoke", "fsl_sage", rounds=1, seed=seed)) for seed in (1, 2))
