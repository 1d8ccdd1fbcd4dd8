"""Warm-up and cosine: the rates are those of torch's own schedulers, and go on after a stop."""

import pytest
import torch

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.optimisers import make_part
from fsl_sage.commands.train import main
from fsl_sage.config.parts import OptimizerConfig, SchedulerConfig
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.train import train, train_state
from tests.support.runs import assert_same, stopped_after, tiny


def rates(schedule, rounds=9):
    """Of AdamW in each round of a run."""
    torch.manual_seed(0)
    part, found = make_part(torch.nn.Linear(3, 2), OptimizerConfig("adamw", lr=0.2, scheduler=schedule), rounds), []
    for _ in range(rounds):
        found.append(part.lr)
        part.step(part(torch.ones(4, 3)).square().sum())
        part.step_schedule()
    return found


def of_torch(warmup, gamma, rounds=9, cosine=True):
    """The same by `SequentialLR` of `LinearLR` and `CosineAnnealingLR`."""
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.2)
    kinds = torch.optim.lr_scheduler
    rise = kinds.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
    fall = kinds.CosineAnnealingLR(optimizer, rounds - warmup, 0.2 * gamma)
    scheduler = kinds.SequentialLR(optimizer, [rise, fall], [warmup]) if cosine else rise
    found = []
    for _ in range(rounds):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [1, 4])
def test_cosine_with_warmup_is_that_of_torch(warmup, gamma):
    found = rates(SchedulerConfig("cosine", gamma=gamma, warmup_rounds=warmup))
    assert found == pytest.approx(of_torch(warmup, gamma), rel=1e-9)
    assert max(found) == found[warmup] == 0.2


def test_cosine_alone_begins_at_the_full_rate():
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.2)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9, 0.02)
    found = rates(SchedulerConfig("cosine"))
    for rate in found:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step(), expected.step()


def test_warmup_rises_and_stays():
    assert rates(SchedulerConfig("warmup", warmup_rounds=3)) == pytest.approx(of_torch(3, 0, cosine=False), rel=1e-12)


def test_fields_of_other_schedules_are_forgotten_and_ranges_are_told():
    assert SchedulerConfig("cosine", step_size=3, milestones=(1,)) == SchedulerConfig("cosine")
    assert SchedulerConfig("warmup", gamma=0.5, warmup_rounds=2) == SchedulerConfig("warmup", warmup_rounds=2)
    assert SchedulerConfig("step", warmup_rounds=2) == SchedulerConfig("step")
    with pytest.raises(ValueError, match=r"scheduler\.warmup_rounds=-1: must be 0 rounds or more"):
        SchedulerConfig("cosine", warmup_rounds=-1)
    with pytest.raises(ValueError, match=r"scheduler\.gamma=0\.0: must be greater than 0"):
        SchedulerConfig("step", gamma=0.0)


OPTIMIZER = {"name": "adamw", "lr": 2e-3, "scheduler": {"name": "cosine", "gamma": 0.0, "warmup_rounds": 1}}


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage"])
def test_a_stopped_run_goes_on_with_the_same_rates(algorithm, tmp_path, monkeypatch):
    changes = {f"model.{part}.optimizer": OPTIMIZER for part in ("client", "server", "auxiliary")}
    experiment, path = tiny(algorithm, **changes, rounds=4), tmp_path / "run"
    whole = train(experiment, "cpu", progress=False)
    assert whole.rounds.client_lr.tolist() == pytest.approx([1e-3, 2e-3, 1.5e-3, 0.5e-3])
    stopped_after(2, monkeypatch, experiment, path)
    assert_same(whole, train(experiment, "cpu", progress=False, checkpoint=path))


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FSL_SAGE_RUNS", str(tmp_path))
    words = "preset=smoke algorithm=fed_avg rounds=3 dataset.max_train=60 dataset.max_test=20 device=cpu"
    words += " model.client.optimizer.name=adamw model.client.optimizer.scheduler.name=cosine"
    words += " model.client.optimizer.scheduler.warmup_rounds=1 model.client.optimizer.scheduler.gamma=0"
    assert main(words.split()) in (0, None)
    assert RunStore(tmp_path).frame().client_lr.tolist() == pytest.approx([0.5e-3, 1e-3, 0.5e-3])


LINEAR = {f"model.{part}.optimizer.scheduler": {"name": "warmup_linear"} for part in ("client", "server", "auxiliary")}
WARM = {"algorithm.warm_start": True}
UNKNOWN = ("async_splitfed", "gas", "cycle_psl", "cycle_sfl")  # their servers' steps follow from paces or from a pool


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [(name, {}) for name in ALGORITHMS if name not in (*UNKNOWN, "scaffold")] + [("fsl_sage", WARM)],
)
def test_a_rate_that_falls_in_steps_is_zero_at_the_parts_last_step(algorithm, changes):
    state = train_state(tiny(algorithm, **LINEAR | changes), "cpu", progress=False)[1]
    made = [(part.schedule.made, part.schedule.total, part.lr) for part in state.parts if part.schedule.made]
    assert made and all(steps == total and rate == 0 for steps, total, rate in made)


@pytest.mark.parametrize("algorithm", UNKNOWN)
def test_where_the_steps_are_not_known_they_must_be_given(algorithm):
    with pytest.raises(ValueError, match=r"server\.optimizer\.scheduler\.total_steps=None: must be a number for"):
        train(tiny(algorithm, **LINEAR), "cpu", progress=False)
    given = LINEAR | {"model.server.optimizer.scheduler": {"name": "warmup_linear", "total_steps": 4}}
    assert train(tiny(algorithm, **given), "cpu", progress=False).rounds.server_lr.iloc[-1] == 0
