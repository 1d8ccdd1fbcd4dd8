"""Any network, cut anywhere: both halves together are the whole, to the bit."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import nn

from fsl_sage.config.presets import preset
from fsl_sage.core import tensor_bytes
from fsl_sage.experiments.train import train
from fsl_sage.networks.auxiliary import AlignmentBuffer, _plain_copy, align, auxiliary_for, true_cut_grad
from fsl_sage.networks.cut import SplitModel, cut_layers
from fsl_sage.networks.part import Part


class Own(nn.Module):
    """A user's network: sizes asked of the input, dropout as a function, a layer with two outputs, in-place steps."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Conv2d(3, 8, 4, 4), nn.GRU(8, 8, batch_first=True)
        self.body, self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)), nn.Linear(8, 5)

    def forward(self, x):
        n, _, height, width = x.shape
        x = F.dropout(self.embed(x), 0.3, self.training)
        x = x.permute(0, 2, 3, 1).reshape(n, (height // 4) * (width // 4), 8)
        x = self.body(self.gru(x)[0])
        x *= 0.5
        return self.fc(F.dropout(x.mean(1), p=0.5, training=self.training))


NETWORKS = {
    "resnet18": (zoo.resnet18, ["relu", "layer1.0", "layer2"]),
    "resnet50": (zoo.resnet50, ["bn1", "layer3.2"]),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, ["features.1", "features.4", "classifier.0"]),
    "efficientnet_b0": (zoo.efficientnet_b0, ["features.0.0", "features.3"]),
    "vgg11": (zoo.vgg11, ["features.7"]),
    "densenet121": (zoo.densenet121, ["features.transition1.norm", "features"]),
    "vit_b_16": (partial(zoo.vit_b_16, image_size=32), ["conv_proj", "encoder.layers.encoder_layer_3"]),
    "convnext_tiny": (zoo.convnext_tiny, ["features.0", "features.3"]),
    "own": (Own, ["embed", "gru", "body"]),
}
IMAGES = {"own": torch.Size([3, 3, 16, 16])}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """Its name, the network, its cuts and a batch."""
    build, cuts = NETWORKS[request.param]
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return request.param, build(), cuts, torch.randn(IMAGES.get(request.param, (2, 3, 32, 32)))


def step(module, backward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradients of all parameters by name."""
    module.zero_grad()
    torch.manual_seed(1)  # dropout and stochastic depth draw the same
    output = backward()
    return output, {name: parameter.grad for name, parameter in module.named_parameters()}


def statistics(module) -> dict[str, torch.Tensor]:
    """BatchNorm's."""
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


def in_one(module, x) -> torch.Tensor:
    """The output, after a backward pass."""
    output = module(x)
    output.square().sum().backward()
    return output


def in_two(split, x) -> torch.Tensor:
    """The same, with the smashed data and its gradient sent over the cut."""
    smashed = split.client(x)
    at_server = smashed.detach().requires_grad_()
    output = in_one(split.server, at_server)
    smashed.backward(at_server.grad)
    return output


def test_halves_are_the_whole(network):
    _, module, cuts, x = network
    for training in True, False:
        module.train(training)
        fresh = statistics(module)
        output, expected = step(module, partial(in_one, module, x))
        moved = statistics(module)
        for at in cuts:
            module.load_state_dict(fresh, strict=False)
            split = SplitModel.cut(module, at, x)
            split.train(training)
            found_output, found = step(module, partial(in_two, split, x))
            assert torch.equal(output, found_output), (at, training)
            assert not [name for name, grad in expected.items() if not torch.equal(grad, found[name])], (at, training)
            assert not [name for name, tensor in statistics(module).items() if not torch.equal(tensor, moved[name])]


def test_names_are_the_networks(network):
    """Each parameter is in one half, under its own name and as the same object; other batch sizes do."""
    _, module, cuts, x = network
    own = dict(module.named_parameters())
    for at in cuts:
        split = SplitModel.cut(module, at, x)
        client, server = dict(split.client.named_parameters()), dict(split.server.named_parameters())
        assert client and server and not set(client) & set(server)
        assert own.keys() == client.keys() | server.keys()
        assert all(own[name] is parameter for name, parameter in {**client, **server}.items())
        assert module.state_dict().keys() == split.client.state_dict().keys() | split.server.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(split.eval()(x[:1]), module.eval()(x[:1]))


def test_listed_cuts_can_be_made(network):
    name, module, cuts, x = network
    found = cut_layers(module)
    for at in found[::4]:
        SplitModel.cut(module, at, x if name == "own" or at == "conv_proj" else None)  # sizes cross
    assert {at for at in cuts if at != "gru"} <= set(found), found


def test_an_auxiliary_model_for_its_last_cut_can_be_aligned(network):
    """It fits the budget, uses more of the server where it may, and a step of alignment moves all of it."""
    name, module, cuts, x = network
    split = SplitModel.cut(module.train(), cuts[-1], x)
    small, large = (auxiliary_for(split, x, budget) for budget in (4.0, 12.0))
    assert tensor_bytes(small) <= 4 * 2**20 and tensor_bytes(large) <= 12 * 2**20
    assert tensor_bytes(large) >= tensor_bytes(small) > 0
    assert ("features.layer3.1.conv2.weight" in large.state_dict()) == (name == "resnet18")
    buffer, before = AlignmentBuffer(), {name: p.clone() for name, p in large.named_parameters()}
    buffer.add(split.client(x).detach(), torch.arange(len(x)))
    target = true_cut_grad(split.server, buffer.smashed, buffer.labels)
    assert align(Part(large, torch.optim.SGD(large.parameters(), lr=1e-3)), buffer, target, 1, 10) == 1
    assert all(parameter.isfinite().all() for parameter in large.parameters())
    assert [name for name, p in large.named_parameters() if not torch.equal(before[name], p)]


def test_what_cannot_be_differentiated_twice_is_computed_plainly():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    torch.testing.assert_close(_plain_copy(attention)(x, x, x)[0], attention(x, x, x)[0])
    assert _plain_copy(attention)(x, x, x, need_weights=False)[1] is None
    wide = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(_plain_copy(nn.Hardsigmoid())(wide), nn.Hardsigmoid()(wide))
    assert type(attention) is nn.MultiheadAttention
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), Direct(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"second derivatives \(derivative for .* is not implemented\)"):
        auxiliary_for(SplitModel.cut(hidden, "0"), torch.randn(2, 3, 2, 2))


class Direct(nn.Module):
    def forward(self, x):
        return F.hardsigmoid(x)


def test_a_budget_too_small_for_anything():
    split = SplitModel.cut(Own(), "body", torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"budget_mb=1e-05: must be at least 0.000172, for a linear layer alone"):
        auxiliary_for(split, torch.randn(2, 3, 16, 16), 1e-5)


@pytest.mark.parametrize(
    ("build", "at", "crossing"),
    [
        (zoo.resnet18, "layer1.0.conv1", ["maxpool", "layer1.0.conv1"]),
        (zoo.densenet121, "features.denseblock1.denselayer2", ["features.pool0", "features.denseblock1.denselayer1"]),
        (partial(zoo.vit_b_16, image_size=32), "encoder.layers.encoder_layer_0.ln_1", ["encoder.dropout"]),
    ],
)
def test_what_crosses_is_named(build, at, crossing):
    with torch.device("meta"):
        module = build()
    with pytest.raises(ValueError, match="one tensor crosses") as error:
        SplitModel.cut(module, at)
    assert [name for name in crossing if f"'{name}'" not in str(error.value)] == []


def test_sizes_that_cross_need_an_example():
    with pytest.raises(ValueError, match=r"sizes cross it \(\['getitem', 'getitem_2', 'getitem_3'\]\)"):
        SplitModel.cut(Own(), "embed")


def test_modes_of_single_layers_stay():
    module = zoo.resnet18().train()
    module.bn1.eval()
    SplitModel.cut(module, "layer2", torch.randn(2, 3, 32, 32))
    assert module.training and not module.bn1.training and module.layer1.training


def test_halves_can_be_copied():
    module, x = Own().eval(), torch.randn(3, 3, 16, 16)
    split = SplitModel.cut(module, "embed", x)
    copy = deepcopy(split)
    assert torch.equal(copy(x), module(x)) and torch.equal(copy(x[:2]), module(x[:2]))
    assert not torch.equal(copy.train()(x), copy(x))


class Shared(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.tied = tied
        if tied:
            self.three.weight = self.one.weight

    def forward(self, x):
        x = self.two(self.one(x))
        return self.three(x) if self.tied else self.one(x)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.one(x)
        return self.two(x) if self.training else self.two(x) * 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_on_both_sides_is_refused(tied):
    with pytest.raises(ValueError, match=r"no layer below is used again; here .*weight"):
        SplitModel.cut(Shared(tied), "two")
    assert cut_layers(Shared(tied)) == []


def test_another_path_in_training_is_refused():
    with pytest.raises(ValueError, match="same path in training and evaluation; or give its stages"):
        SplitModel.cut(TwoPaths(), "one")


def test_stages_that_are_not_the_network():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4)
    with pytest.raises(ValueError, match="same output as the whole"):
        SplitModel.cut(module, "0", x, stages=["0", "2"])
    with pytest.raises(ValueError, match="stages='3': must be one of 0, 1, 2"):
        SplitModel.cut(module, "0", x, stages=["0", "3"])
    with pytest.raises(ValueError, match=r"stages: the network cannot take a tensor of shape \(2, 4\)"):
        SplitModel.cut(module, "0", x, stages=["0", "2", "2"])
    with pytest.raises(ValueError, match="that the forward pass calls"):
        SplitModel.cut(module, "1", x, stages=["0", F.relu, "2"])


def test_another_image_size_than_the_example():
    """Sizes other than the batch's are those of the example."""
    split = SplitModel.cut(Own().eval(), "embed", torch.randn(2, 3, 16, 16))
    with pytest.raises(RuntimeError):
        split(torch.randn(2, 3, 32, 32))


def test_a_network_without_a_published_auxiliary_model_gets_one_by_its_budget():
    """ResNet-16, SGLR's: FSL-SAGE trains it with the server's first layers, as many as the configuration pays for."""
    sent = {}
    for budget in (0.005, 0.1):
        own = {"model.name": "resnet16", "model.auxiliary.size": "first_layers", "model.auxiliary.budget_mb": budget}
        history = train(preset("smoke", "fsl_sage", rounds=1, **own), "cpu", progress=False)
        sent[budget] = history.ledger.query("kind == 'aux_model' and phase == 'round'").bytes.sum() / 3
        assert 0 < sent[budget] <= budget * 2**20 and history.rounds.train_loss.notna().all()
    assert sent[0.1] > 2 * sent[0.005]
