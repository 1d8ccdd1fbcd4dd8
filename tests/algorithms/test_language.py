"""Language models train by the same rounds as image networks: what travels, what is counted, what is kept."""

import pytest
import torch

from fsl_sage import Callback, Experiment, train
from fsl_sage.algorithms.fleet import part_tensors
from fsl_sage.config.experiment import from_dict
from fsl_sage.core import tensor_bytes
from fsl_sage.experiments.attempt import RunDigests
from fsl_sage.experiments.callbacks import StopRun
from fsl_sage.experiments.checkpoint import write_tensors
from fsl_sage.experiments.train import train_state
from fsl_sage.networks.gpt2 import gpt2
from fsl_sage.papers.oracle import replay
from tests.support.traces import read_trace

V, W, BLOCKS, RANK, CONTEXT = 139, 32, 3, 2, 128  # V: words of the embedded grammar's first 64 training pairs
BLOCK = 12 * W * W + 13 * W + 2 * RANK * W + 2 * W * RANK  # numbers of a block with its adapter
ADAPTER = 4 * RANK * W  # numbers of one block that are trained
STEPS = {"scheduler.name": "warmup_linear", "scheduler.warmup_steps": 3}


def small(algorithm, rounds=2, **changes):
    return Experiment(num_clients=1 if algorithm == "centralised" else 2, rounds=rounds).replace(**{
        "dataset.name": "restaurants", "dataset.max_train": 64, "dataset.max_test": 20, "model.name": "gpt2_tiny",
        "model.blocks": BLOCKS, "model.width": W, "model.client.batch_size": 16, "algorithm.name": algorithm,
        "model.adapter": {"rank": RANK}, **changes,
    })  # fmt: skip


def released(parts, head):
    """Bytes of so many blocks, with masks, and of what comes with them."""
    return 4 * (parts * (BLOCK + CONTEXT**2) + head)


def test_fed_avg_sends_adapters_alone_and_the_released_code_counts_all():
    ledger = train(small("fed_avg", rounds=3), "cpu", progress=False)
    last = ledger.rounds.iloc[-1]
    assert last.paper_bytes == 3 * 2 * 2 * 4 * BLOCKS * ADAPTER
    whole = released(BLOCKS, V * W + CONTEXT * W + 2 * W)  # the head is the token table
    assert last.released_bytes == 3 * 2 * 2 * whole
    start = ledger.ledger.query("phase == 'start' and kind == 'client_model'").bytes.sum()
    assert start == 2 * 4 * (BLOCK + V * W + CONTEXT * W)  # once, all of it


@pytest.mark.parametrize(("algorithm", "with_aux"), [("sl_single_server", 0), ("fsl_sage", 1), ("cse_fsl", 1)])
def test_keys_and_values_are_counted_beside_each_upload(algorithm, with_aux):
    table = train(small(algorithm), "cpu", progress=False).ledger.query("phase == 'round'")
    sent = table.groupby("kind").bytes.sum()
    uploads = 2 * 2 * (2 if algorithm == "sl_single_server" else 1)  # rounds, clients, steps that upload
    assert sent["kv"] == 2 * (1 + with_aux) * sent["smashed"] + 16 * uploads
    down = table.query("kind == 'client_model' and direction == 'down'").bytes.tolist()
    assert down == [2 * 4 * ADAPTER] * 2


def test_what_is_frozen_is_in_memory_once_and_in_no_checkpoint():
    _, state = train_state(small("fsl_sage", rounds=1), "cpu", progress=False)
    one, two = (client.model.get_submodule("embed").wte.weight for client in state.clients)
    assert one.data_ptr() == two.data_ptr() and "embed.wte.weight" in state.clients[0].fixed
    assert not [name for name in part_tensors(state.clients[0]) if "wte" in name or name.endswith("c_fc.weight")]
    assert tensor_bytes(state.clients[0]) == 4 * ADAPTER
    assert sorted(state.auxes[0].fixed) == ["h0.attn.c_attn.weight", "head.weight"]


@pytest.mark.parametrize("algorithm", ["fed_avg", "sl_single_server", "cse_fsl", "fsl_sage"])
def test_a_run_that_was_stopped_goes_on_to_the_byte(algorithm, tmp_path):
    own = {"algorithm.align_epochs": 2, "algorithm.align_interval": 2, "algorithm.language_branch": True}
    own |= {"algorithm.max_dataset_size": 20}  # the ring wraps
    parts = {"client": "adamw_released", "server": "adamw", "auxiliary": "adamw_released"}
    steps = {f"model.{part}.optimizer.{field}": value for part in parts for field, value in STEPS.items()}
    steps |= {f"model.{part}.optimizer.name": name for part, name in parts.items()}
    changes = steps | {"model.adapter.dropout": 0.1, "algorithm.label_smooth": 0.1}
    run = small(algorithm, 4, **changes, **(own if algorithm == "fsl_sage" else {}))
    assert from_dict(run.to_dict()) == run
    whole, file = train(run, "cpu", progress=False), tmp_path / "checkpoint"

    class Stop(Callback):
        def round(self, row, models):
            if row["round"] == 1:
                raise StopRun("here")

    first, _ = train_state(run, "cpu", progress=False, checkpoint=file, checkpoint_seconds=0, callbacks=[Stop()])
    assert first.stopped == "callback" and len(first.rounds) == 2
    again = train(run, "cpu", progress=False, checkpoint=file)
    assert again.rounds.equals(whole.rounds) and again.ledger.equals(whole.ledger)
    assert again.alignments.equals(whole.alignments)
    streamed = train(run, "cpu", progress=False, in_flight=1)
    assert streamed.rounds.equals(whole.rounds)


def test_client_schedules_end_with_their_own_clients_last_step():
    rates = {f"model.{part}.optimizer.{field}": v for part in ("client", "server") for field, v in STEPS.items()}
    _, state = train_state(small("sl_single_server", **rates), "cpu", progress=False)
    assert [part.lr for part in (*state.clients, *state.servers)] == [0, 0, 0]
    assert [int(part.schedule.made) for part in (*state.clients, *state.servers)] == [4, 4, 8]


def test_split_learning_with_a_server_each_is_federated_averaging():
    spec, _ = read_trace("gpt2-fed_avg_true")
    spec |= {"sizes": [14, 14], "n_auxiliary_layer": 1}
    whole, cut = replay(spec), replay(spec | {"algorithm": "sl_multi_server"})
    for one, other in zip(whole, cut, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-12)
    assert whole[-1]["comm_bytes"] != cut[-1]["comm_bytes"]


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [9, 17]}, {"batch_size": 4}, {"local_epochs": 2}, {"n_client_layer": 1, "n_server_layer": 3},
        {"max_dataset_size": 8, "align_batch_size": 3}, {"objective": "jlm"}, {"server_update_interval": 1},
        {"aux_warmup_steps": 1}, {"n_auxiliary_layer": 3}, {"seq_len": 8},
    ],
    ids=str,
)  # fmt: skip
def test_other_specs_of_the_form_replay(change):
    spec, _ = read_trace("gpt2-fsl_sage")
    plain, changed = (replay(s | {"rounds": 1}) for s in (spec, spec | change))
    assert changed != plain and all(torch.isfinite(torch.tensor(row["nll"])) for row in changed)


def test_what_a_trace_tells_of_the_released_code():
    """As configured the auxiliary model's rate is 0, and nothing is aligned; with a constant rate it is."""
    error = {}
    for name in ("gpt2-fsl_sage-as_configured", "gpt2-fsl_sage"):
        (first, *_), *_ = (row["alignments"] for row in read_trace(name)[1] if "alignments" in row)
        error[name] = first["error_after"] / first["error_before"]
    assert error["gpt2-fsl_sage-as_configured"] == 1 > error["gpt2-fsl_sage"]


@pytest.mark.parametrize("algorithm", ["sglr", "psl", "sfl"])
def test_algorithms_for_images_say_why(algorithm):
    with pytest.raises(ValueError, match=f"network that reads images for '{algorithm}': its .* train language models"):
        small(algorithm)


def test_networks_and_data_must_fit():
    for changes in ({"model.name": "resnet18"}, {"dataset.name": "fmnist_mini"}, {"model.context": 20}):
        with pytest.raises(ValueError, match=r"model\.(name|context)=.*(dataset\.name|seq_len)"):
            train(small("fed_avg", **changes), "cpu", progress=False)


def test_pretrained_weights_are_found_like_data(tmp_path):
    run = small("centralised", rounds=1, **{"model.pretrained": True})
    with pytest.raises(
        FileNotFoundError, match=r"weights of 'gpt2_tiny' not found; looked at .*model\.safetensors.*put"
    ):
        train(run, "cpu", tmp_path, progress=False)
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = gpt2(V, CONTEXT, W, 4, BLOCKS)
        write_tensors(tmp_path / "gpt2_tiny" / "model.safetensors", base.state_dict(), {})
        history, state = train_state(run, "cpu", tmp_path, progress=False)
        table = state.clients[0].model.get_submodule("embed").wte.weight
        assert torch.equal(table, base.get_submodule("embed").wte.weight)
        digests.append(history.data)
        assert RunDigests(tmp_path).of(run) == history.data
    assert len({*digests, train(small("centralised", rounds=1), "cpu", progress=False).data}) == 3
