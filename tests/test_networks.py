"""All networks: numbers of classes, sizes of images, and their auxiliary models in training."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from fsl_sage.auxiliary import AUXILIARIES, auxiliary_model, estimate_cut_grad, true_cut_grad
from fsl_sage.config import preset
from fsl_sage.split import MODELS, BasicBlock, Padding, Part, resnet, split_model
from fsl_sage.training import train

SMASHED = {
    "resnet18": (128, 28, 28), "resnet50": (512, 28, 28), "resnet152": (512, 28, 28),
    "resnet18_cifar": (128, 112, 112), "resnet50_cifar": (512, 112, 112), "resnet152_cifar": (512, 112, 112),
    "resnet56": (16, 224, 224), "resnet110": (16, 224, 224), "resnet16": (32, 112, 112),
}  # of an image of 224 × 224 pixels  # fmt: skip
PAIRS = [(name, size) for name, (_, sizes) in AUXILIARIES.items() for size in sizes]


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
@pytest.mark.parametrize("name", MODELS)
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
