"""What a client holds, against what PyTorch's own accounting says of real steps."""

from copy import deepcopy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.base import Metrics, whole_step
from fsl_sage.algorithms.baselines import u_shaped_step
from fsl_sage.algorithms.sage import client_steps
from fsl_sage.config.presets import preset
from fsl_sage.core import tensor_bytes
from fsl_sage.costs.memory import client_memory
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train
from fsl_sage.networks.part import server_step

NETWORKS = {
    "resnet18": {},
    "one stage above": {"model.cut": "layer3", "model.auxiliary.size": "one_block", "model.width": 16},
    "simple_conv": {"model.name": "simple_conv"},
    "momentum": {f"model.{part}.optimizer": {"name": "sgd", "momentum": 0.9} for part in ("client", "server")},
}
OWN = {"dataset.max_train": 200, "dataset.distribution": "iid", "dataset.augment": False}


def fed_avg(state, batches):
    for x, y in batches:
        whole_step(state.clients[0], state.servers[0], x, y)


def splitfed(state, batches):
    for x, _ in batches:
        smashed = state.clients[0].forward(x)
        state.clients[0].backward(smashed, torch.ones_like(smashed))


def cse_fsl(state, batches):
    for x, y in batches:
        smashed = state.clients[0].forward(x)
        _, cut_grad = server_step(state.auxes[0], smashed.detach(), y, True)
        state.clients[0].backward(smashed, cut_grad)


def sage(state, batches):
    state.batches = lambda i, rnd: ((s, x, y) for s, (x, y) in enumerate(batches))
    for _ in client_steps(state, 0, 1, Metrics()):
        pass


STEPS = {"fed_avg": fed_avg, "sl_single_server": splitfed, "cse_fsl": cse_fsl, "fsl_sage": sage}


def fresh(algorithm, network, device="cpu", **changes):
    """A federation, three batches of its first client, and what it holds before its first step."""
    experiment = preset("smoke", algorithm, **OWN | NETWORKS[network] | changes)
    state = set_up(experiment)
    parts = state.clients[0], *(state.servers[:1] if algorithm == "fed_avg" else [*state.auxes[:1]])
    for part in parts:
        part.model.to(device)
    batches = [(x.clone().to(device), y.clone().to(device)) for _, x, y in state.batches(0, 0)][:1] * 3
    before = sum(tensor_bytes(part.model) for part in parts) + tensor_bytes(dict(enumerate(batches[0])))
    return state, parts, batches, before


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algorithm", STEPS)
def test_the_peak_is_what_a_profiler_sees(algorithm, network):
    """From fresh optimisers on, so that the profiler sees moments and gradients come."""
    told = client_memory(set_up(preset("smoke", algorithm, **OWN | NETWORKS[network])))
    state, _, batches, before = fresh(algorithm, network)
    assert told.peak == pytest.approx(before + most_allocated(STEPS[algorithm], state, batches), rel=0.05)


def most_allocated(make, *args):
    """The most bytes above the start that PyTorch's profiler sees, as `make` works."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        make(*args)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


class EmptyServer:
    """Gives zeros for features and for the gradient at the cut, and holds nothing."""

    def __init__(self, shape):
        self.shape = shape

    def __call__(self, smashed):
        self.smashed = smashed
        return torch.zeros(self.shape)

    def step(self, features, gradient):
        self.smashed.grad = torch.zeros_like(self.smashed)


class Nothing:
    """A link between two places that are one."""

    def up(self, **one):
        (tensor,) = one.values()
        return tensor.detach()

    down = up


@pytest.mark.parametrize("network", ["resnet18", "simple_conv"])
def test_the_peak_of_both_ends_is_what_a_profiler_sees(network):
    head = {"resnet18": "layer4", "simple_conv": "relu3"}[network]
    told = client_memory(
        set_up(preset("smoke", "sl_single_server", **OWN | NETWORKS[network], **{"model.head_cut": head}))
    )
    state, (client,), batches, before = fresh("sl_single_server", network, **{"model.head_cut": head})
    shape = deepcopy(state.servers[0].model)(deepcopy(client.model)(batches[0][0])).shape

    def three_steps():
        for x, y in batches:
            u_shaped_step(client, EmptyServer(shape), Nothing(), x, y, state.criterion)

    assert told.peak == pytest.approx(before + most_allocated(three_steps), rel=0.05)
    plain = client_memory(set_up(preset("smoke", "sl_single_server", **OWN | NETWORKS[network])))
    assert told.models > plain.models and told.waiting >= plain.waiting


@pytest.mark.parametrize("algorithm", ["sl_multi_server", "fsl_sage"])
def test_of_own_cuts_the_most_loaded_client_counts(algorithm):
    fields = OWN | {"num_clients": 3, "model.width": 16, "model.auxiliary.size": "first_layers"}
    told = {cuts: client_memory(set_up(preset("smoke", algorithm, **fields, **{"model.cuts": list(cuts)})))
            for cuts in (("layer1",) * 3, ("layer3",) * 3, ("layer3", "layer1", "layer1"))}  # fmt: skip
    shallow, deep, mixed = told.values()
    assert mixed in (shallow, deep) and mixed.peak == max(shallow.peak, deep.peak) and shallow != deep


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algorithm", STEPS)
def test_its_parts_are_those_of_real_steps(algorithm, network):
    """What autograd saves, storage by storage, and what models, optimisers and gradients have after it."""
    told = client_memory(set_up(preset("smoke", algorithm, **OWN | NETWORKS[network])))
    state, parts, batches, _ = fresh(algorithm, network)
    own = {t.untyped_storage().data_ptr() for part in parts for t in (*part.model.parameters(), *part.model.buffers())}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        STEPS[algorithm](state, batches[:1])
    assert told.held == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.05)
    moments = [t for part in parts for entry in part.optimizer.state.values() for t in entry.values()]
    assert told.models == sum(tensor_bytes(part.model) for part in parts)
    assert told.moments == sum(t.nbytes for t in moments if isinstance(t, torch.Tensor))
    gradients = [p.grad for part in parts for p in part.model.parameters() if p.grad is not None]
    assert told.gradients == sum(gradient.nbytes for gradient in gradients)
    assert told.models + told.moments + told.gradients + told.held <= told.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", STEPS)
def test_the_peak_is_what_a_gpu_counts(algorithm):
    """With maps that are large beside the blocks of 512 bytes in which a GPU's memory is given out."""
    changes = {"model.width": 64, "model.client.batch_size": 100}
    state, _, batches, before = fresh(algorithm, "resnet18", "cuda", **changes)
    on_gpu = set_up(state.experiment)
    for group in (on_gpu.clients, on_gpu.servers, on_gpu.auxes):
        for part in group:
            part.model.to("cuda")
    told, others = client_memory(on_gpu), torch.cuda.memory_allocated() - before
    STEPS[algorithm](state, batches[:1])
    torch.cuda.reset_peak_memory_stats()
    STEPS[algorithm](state, batches)
    assert told.peak == pytest.approx(torch.cuda.max_memory_allocated() - others, rel=0.05)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_clients_that_get_a_gradient_wait(algorithm):
    experiment = preset("smoke", algorithm, rounds=1, **{"dataset.max_train": 60})
    if algorithm in ("sglr", "psl", "sfl", "ssl"):
        experiment = preset("smoke", algorithm, rounds=1)
    told, history = client_memory(set_up(experiment)), train(experiment, "cpu", progress=False)
    answered = {"cut_grad", "mean_cut_grad"} & set(history.ledger[history.ledger.direction == "down"].kind)
    assert (told.waiting > 0) == bool(answered) and told.waiting <= told.peak


def test_counting_leaves_the_state_and_the_streams_alone():
    state = set_up(preset("smoke", "fsl_sage", **OWN))
    before = [part.model.state_dict() for part in state.parts]
    copies = [{name: tensor.clone() for name, tensor in model.items()} for model in before]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    client_memory(state)
    assert torch.equal(torch.rand(2), expected)
    for one, other in zip(before, copies, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(part.optimizer.state for part in state.parts)


def test_what_an_algorithm_without_costs_needs_is_not_known(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "fed_avg", ALGORITHMS["fed_avg"]._replace(cost=None))
    assert client_memory(set_up(preset("smoke", "fed_avg", **OWN))) is None


def test_adapters_have_gradients_and_the_rest_has_none():
    texts = {"dataset.name": "restaurants", "dataset.max_train": 40, "model.name": "gpt2_tiny", "model.blocks": 2}
    texts |= {"model.width": 16, "model.client.batch_size": 8, "num_clients": 2, "dataset.distribution": "iid"}
    whole, few = (
        client_memory(set_up(preset("smoke", "sl_single_server", **texts, **adapter)))
        for adapter in ({}, {"model.adapter": {"rank": 2, "dropout": 0.1}})
    )
    assert few.gradients < 0.1 * whole.gradients and few.moments < 0.1 * whole.moments
    assert few.models > whole.models
