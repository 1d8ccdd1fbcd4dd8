"""All networks: numbers of classes, sizes of images, and their auxiliary models in training."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fsl_sage.algorithms.all import ALGORITHMS
from fsl_sage.algorithms.state import FixedData, init_parts
from fsl_sage.config.experiment import PLUGGED
from fsl_sage.config.presets import preset
from fsl_sage.experiments import plugins
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.train import train, train_state
from fsl_sage.networks.auxiliary import AUXILIARIES, auxiliary_model, estimate_cut_grad, true_cut_grad
from fsl_sage.networks.part import Part
from fsl_sage.networks.zoo import MODELS, BasicBlock, Padding, resnet, split_model

SMASHED = {
    "resnet18": (128, 28, 28), "resnet50": (512, 28, 28), "resnet152": (512, 28, 28),
    "resnet18_cifar": (128, 112, 112), "resnet50_cifar": (512, 112, 112), "resnet152_cifar": (512, 112, 112),
    "resnet56": (16, 224, 224), "resnet110": (16, 224, 224), "resnet16": (32, 112, 112),
}  # of an image of 224 × 224 pixels  # fmt: skip
IMAGES = [name for name, network in MODELS.items() if network.reads == "images"]
PAIRS = [(name, size) for name in IMAGES if name in AUXILIARIES for size in AUXILIARIES[name][1]]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", SMASHED)
def test_imagenet_forward_and_backward_without_computing(name):
    """224 pixels, 1000 classes, as published: on the meta device only shapes are worked out."""
    split = split_model(name, num_classes=1000, image_size=224).to("meta")
    smashed = split.client(torch.empty(2, 3, 224, 224, device="meta"))
    assert smashed.shape == (2, *SMASHED[name])
    logits = split.server(smashed)
    F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
    assert logits.shape == (2, 1000)
    assert all(parameter.grad.shape == parameter.shape for parameter in split.parameters())


@pytest.mark.parametrize(("classes", "size"), [(10, 32), (100, 32), (200, 64), (1000, 64)])
@pytest.mark.parametrize("name", IMAGES)
def test_classes_and_image_sizes(name, classes, size):
    split = split_model(name, 3, classes, size, width=2)
    smashed = split.client(torch.randn(2, 3, size, size))
    assert split.server(smashed).shape == (2, classes)
    for of, aux_size in PAIRS:
        if of == name:
            assert auxiliary_model(name, split, aux_size)(smashed).shape == (2, classes)


def test_parameters_as_published():
    """0.85 and 1.7 million in He et al., Table 6; for 1000 classes torchvision documents 25,557,032 and 60,192,808."""
    million = {name: count(split_model(name)) / 1e6 for name in ("resnet56", "resnet110")}
    assert round(million["resnet56"], 2) == 0.85 and round(million["resnet110"], 1) == 1.7
    assert count(split_model("resnet50", num_classes=1000)) == 25_557_032
    assert count(split_model("resnet152", num_classes=1000)) == 60_192_808


def test_width_is_relative_to_the_published_network():
    """FSL-SAGE's code offers 64 instead of 16 channels for the CIFAR ResNets: width 256."""
    for width, channels in {64: 16, 256: 64, 1: 1}.items():
        first = split_model("resnet56", width=width).client.layer1[0]
        assert isinstance(first, BasicBlock) and first.conv1.out_channels == channels
    with pytest.raises(ValueError, match="stem='imagenett': must be one of imagenet, cifar"):
        resnet((1,), stem="imagenett")


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_auxiliary_is_the_servers_first_stage(name, size):
    """One rule for all: as many BasicBlocks as the server has in its first stage, their inner channels and shortcut."""
    split = split_model(name, width=8)
    aux = auxiliary_model(name, split, size)
    if size == "server_copy":
        assert {k: v.shape for k, v in aux.state_dict().items()} == {
            k: v.shape for k, v in split.server.state_dict().items()
        }
    elif name != "simple_conv":
        stage_name, theirs = next(split.server.named_children())
        ours = getattr(aux, stage_name, [])
        assert len(ours) == {"linear": 0, "one_block": 1, "default": len(theirs)}[size]
        assert all(isinstance(block, BasicBlock) for block in ours)
        for block in ours:
            assert block.conv2.out_channels == theirs[0].conv2.out_channels
        if ours:
            assert isinstance(ours[0].downsample, Padding) == isinstance(theirs[0].downsample, Padding)
            assert ours[0].conv1.stride == (2, 2)


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_the_estimate_moves_all_of_the_client(name, size):
    torch.manual_seed(0)
    split = split_model(name, width=16 if name in ("resnet56", "resnet110") else 4)  # 4 channels in the first stage
    client = Part(split.client, torch.optim.SGD(split.client.parameters(), lr=0.1))
    before = deepcopy(client.model.state_dict())
    smashed = client.model(torch.randn(6, 3, 32, 32))
    client.step(smashed, estimate_cut_grad(auxiliary_model(name, split, size), smashed, torch.arange(6))[0])
    assert not [key for key, parameter in client.model.named_parameters() if torch.equal(before[key], parameter)]


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_second_derivatives_are_finite_differences(name, size):
    """What alignment descends, |estimate - truth|², changes along its gradient g by |g|² a unit."""
    torch.manual_seed(0)
    split = split_model(name, width=8).double()
    aux = auxiliary_model(name, split, size).double()
    smashed, labels = split.client(torch.randn(4, 3, 32, 32).double()).detach(), torch.arange(4)
    cut_grad = true_cut_grad(split.server, smashed, labels)

    def distance(create_graph: bool = False) -> torch.Tensor:
        return (estimate_cut_grad(aux, smashed, labels, create_graph)[0] - cut_grad).square().sum()

    gradient = torch.autograd.grad(distance(create_graph=True), list(aux.parameters()))
    slope = sum(g.square().sum() for g in gradient)
    step, found = 1e-9 / slope.sqrt(), []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter, g in zip(aux.parameters(), gradient, strict=True):
                parameter += move * g
            with torch.enable_grad():
                found.append(distance())
    torch.testing.assert_close((found[0] - found[1]) / (2 * step), slope, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["resnet50", "resnet110", "resnet18_cifar"])
def test_training(name):
    """A round of FSL-SAGE, configured by name."""
    changes = {"model.name": name, "model.width": 4, "rounds": 1, "num_clients": 2, "dataset.max_train": 64}
    history = train(preset("smoke", "fsl_sage", **changes, **{"model.auxiliary.size": "one_block"}), "cpu", False)
    assert len(history.alignments) == 2 and history.rounds.test_loss.notna().all()


@pytest.fixture
def network():
    """A network of one's own, by name; it is forgotten after the test."""
    names = []

    def add(build, cut="0"):
        names.append(f"own{len(names)}")
        plugins.network(names[-1], cut=cut)(build)
        return names[-1]

    yield add
    for home in {plugins.home_of(tag) for tag in PLUGGED.values()}:
        plugins.forget(home)


def lines(*layers, first=None):
    """A builder of a small network: `first`, a pool, a flattening and `layers`, all functions of the arguments."""

    def build(channels, classes, size, width):
        head = [make(width, classes) for make in layers] or [nn.Linear(4 * width, classes)]
        start = first(channels, width) if first else nn.Conv2d(channels, width, 3)
        return nn.Sequential(start, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)

    return build


def own(name, algorithm="fed_avg", **changes):
    aux = {"model.auxiliary.size": "first_layers"} if ALGORITHMS[algorithm].auxiliary else {}
    small = {"dataset.max_train": 60, "dataset.val_size": 0, "dataset.max_test": 20, "rounds": 1, "model.width": 4}
    small |= {"dataset.distribution": "iid", "model.name": name}
    return preset("smoke", algorithm, **small | aux | changes)


class Counts(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Coin(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x if torch.rand(1).item() < 0.5 else 2 * x


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def hooked(*args):
    net = lines()(*args)
    net.register_forward_pre_hook(lambda module, x: (x[0] * 0,))
    return net


REFUSED = {
    "lazy": (lines(lambda w, k: nn.LazyLinear(k)), r"layer '3' \(LazyLinear\) of the server's half has no weights yet"),
    "weight_norm": (lines(first=lambda c, w: nn.utils.weight_norm(nn.Conv2d(c, w, 3))),
                    r"layer '0' .* of the client's half keeps 'weight'.*parametrizations"),
    "spectral_norm": (lines(lambda w, k: nn.utils.spectral_norm(nn.Linear(4 * w, k))),
                      r"layer '3' .* of the server's half keeps 'weight'.*parametrizations"),
    "half": (lines(first=lambda c, w: nn.Conv2d(c, w, 3).half()),
             r"layer '0' .* of the client's half .*float16; leave"),
    "double": (lines(lambda w, k: nn.Linear(4 * w, k).double()), r"layer '3' .* of the server's half .*float64; leave"),
    "few outputs": (lines(lambda w, k: nn.Linear(4 * w, k - 1)),
                    r"layer '3' \(Linear\) of the server's half gives \(2, 9\) .* 10 classes; build it"),
    "wrong inputs": (lines(lambda w, k: nn.Linear(3, k)), r"layer '3' .* of the server's half cannot take its input"),
    "nothing to train": (lambda *args: lines()(*args).requires_grad_(False), "nothing to train; give one"),
    "detached": (lines(first=lambda c, w: Detached(c, w, 3)), "output of the client's half does not depend on its"),
    "hook": (hooked, "would lose the hooks of Sequential; register them on a layer"),
    "counter": (lambda *args: Counts(*lines()(*args)), "changes the attribute 'calls' of Counts.*let a layer inside"),
    "coin": (lambda *args: Coin(*lines()(*args)), "draws random numbers outside its layers.*let a layer inside"),
}  # fmt: skip


class Detached(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_network_of_ones_own_cannot_do_is_named_before_the_first_round(network, kind):
    build, message = REFUSED[kind]
    name = network(build)
    with pytest.raises(ValueError, match=f"model.name='{name}'.*{message}"):
        set_up(own(name))


def test_advice_for_networks_can_be_followed(network):
    parametrized = lambda c, w: nn.utils.parametrizations.weight_norm(nn.Conv2d(c, w, 3))  # noqa: E731

    def passed_through(channels, classes, size, width):
        net = lines(lambda w, k: nn.LazyLinear(k))(channels, classes, size, width)
        net(torch.zeros(1, channels, size, size))
        return net

    for build in (lines(first=parametrized), passed_through, lines(lambda w, k: nn.Linear(4 * w, k))):
        assert len(train(own(network(build)), "cpu", progress=False).rounds) == 1


def test_a_view_of_a_map_needs_the_ordinary_layout(network):
    def build(channels, classes, size, width):
        conv = nn.Conv2d(width, width, 3, 2)
        layers = [conv, nn.AdaptiveAvgPool2d(2), View(), nn.Linear(4 * width, classes)]
        return nn.Sequential(nn.Conv2d(channels, width, 3), *layers)

    assert len(train(own(network(build)), "cpu", progress=False).rounds) == 1


HALVES = {"client": "0", "server": "3"}


@pytest.mark.parametrize("frozen", HALVES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_frozen_half_stays_and_the_other_is_trained(network, algorithm, frozen):
    def build(*args):
        net = lines()(*args)
        net.get_submodule(HALVES[frozen]).requires_grad_(False)
        return net

    experiment = own(network(build), algorithm)
    states = [set_up(experiment), (done := train_state(experiment, "cpu", progress=False))[1]]
    parts = [{"client": state.clients[0].model, "server": state.servers[0].model} for state in states]
    for half in HALVES:
        before, after = (model[half].state_dict() for model in parts)
        stays = half == frozen or (half == "client" and algorithm == "frozen_client")
        assert all(torch.equal(before[name], after[name]) for name in before) == stays, half
    answered = "smashed" in ALGORITHMS[algorithm].cost.down
    assert ("cut_grad" in set(done[0].ledger.kind)) == (frozen == "server" and answered)


@pytest.mark.parametrize("algorithm", ["fed_avg", "sl_single_server", "sglr", "cse_fsl", "fsl_sage"])
def test_a_half_without_parameters(network, algorithm, tmp_path):
    def lower(channels, classes, size, width):
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes))

    def upper(channels, classes, size, width):
        return nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    for build in lower, upper:
        experiment = own(network(build), algorithm, rounds=2)
        assert train(experiment, "cpu", progress=False, in_flight=3).rounds.test_loss.notna().all()


def test_layers_that_the_builder_or_train_keeps_in_evaluation_stay_there(network):
    class Keeps(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    def normed(kind, *args):
        net = lines()(*args)
        return kind(net[0], nn.BatchNorm2d(args[3]), *net[1:])

    def built(*args):
        net = normed(nn.Sequential, *args)
        net[1].eval()
        return net

    counted = []
    for build in (lambda *args: normed(Keeps, *args), built, lambda *args: normed(nn.Sequential, *args)):
        _, state = train_state(own(network(build, "1"), rounds=2), "cpu", progress=False)
        counted.append(state.clients[0].model.state_dict()["1.num_batches_tracked"].item())
    assert counted[:2] == [0, 0] and counted[2] > 0


def test_images_that_are_not_square(network):
    data = [FixedData(torch.randn(4, 1, 12, 16), torch.arange(4), 4)] * 3
    whole = "model.name='simple_conv': layer 'fc1' .* of the server's half cannot take .* 1 × 12 × 16.*crop or pad"
    with pytest.raises(ValueError, match=whole):
        init_parts(own("simple_conv"), data)
    for name in "resnet18", network(lines()):
        assert len(init_parts(own(name), data)["clients"]) == 3
