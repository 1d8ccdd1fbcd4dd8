"""Every advice in a message can be followed: what the message says is done, and then it works."""

import ast
import configparser
import os
import re
import shutil
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fsl_sage
from fsl_sage.config.experiment import MissingPluginError, from_dict
from fsl_sage.config.presets import preset
from fsl_sage.core import choose_device, one_of, user_path
from fsl_sage.data.sources import load
from fsl_sage.experiments import plugins
from fsl_sage.experiments.callbacks import Callback
from fsl_sage.experiments.history import DivergedError
from fsl_sage.experiments.models import KeepModel, load_model
from fsl_sage.experiments.plugin_files import PluginError, load_plugins
from fsl_sage.experiments.provenance import about_here
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import set_up
from fsl_sage.experiments.store import StoreError, read_whole
from fsl_sage.networks.cut import SplitModel, cut_layers
from fsl_sage.networks.modes import keep_modes
from fsl_sage.networks.trial import try_parts
from fsl_sage.papers.claims import parse_setting
from fsl_sage.papers.plots import new_figure
from fsl_sage.papers.saving import save_figure
from fsl_sage.papers.standing import read_versus
from tests.support import ROOT
from tests.support.refused import refused

TINY = {"num_clients": 2, "rounds": 1, "model.width": 1, "dataset.max_train": 40, "dataset.max_test": 10}
PLAIN = {"dataset.val_size": 0, "dataset.distribution": "iid"}
VERBS = (
    "add ask build call choose crop cut delete detach draw export fix freeze give install keep leave let load lower "
    "make mend move name number pass point put register reinstall rename repeat replace run say see set start take "
    "train try use wait write"
)
VERB = VERBS.replace(" ", "|")
ADVICE = re.compile(rf"(?:^|[;:,.(] |\bor )(?:{VERB})\b| would do|did you mean |installed: pip", re.I)


def template(node):
    """The text of a literal, with {} for what is put in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)  # noqa: PD011
    return ""


def advising(path):
    """The texts of a module that tell what to do, but docstrings and the help of command lines."""
    tree, skipped = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list) and node.body and isinstance(node.body[0], ast.Expr):
            skipped.add(node.body[0].value)
        if isinstance(node, ast.Call):
            helped = [word.value for word in node.keywords if word.arg in ("help", "description", "epilog")]
            skipped |= {below for value in helped for below in ast.walk(value)}
        if isinstance(node, ast.Dict):
            helped = [v for k, v in zip(node.keys, node.values, strict=True) if template(k) == "help"]
            skipped |= {below for value in helped for below in ast.walk(value)}
        if isinstance(node, ast.JoinedStr):
            skipped |= {below for part in node.values for below in ast.walk(part)}  # noqa: PD011
    texts = [template(node) for node in ast.walk(tree) if node not in skipped]
    return [text for text in texts if len(text) > 12 and " " in text and "\n" not in text and ADVICE.search(text)]


MODULES = sorted(path for path in Path(fsl_sage.__file__).parent.rglob("*.py") if path.name != "_modidx.py")
FOUND = sorted({(path.stem, text) for path in MODULES for text in advising(path)})


# ------------------------------------------------------------------------------------------------ files and names


def another_folder(tmp_path):
    from fsl_sage.machines.certificates import make_certificates

    make_certificates(tmp_path / "one", ["localhost"], 1)
    refused("is there already; name another folder", make_certificates, tmp_path / "one", ["localhost"], 1)
    make_certificates(tmp_path / "two", ["localhost"], 1)
    shutil.move(tmp_path / "one", tmp_path / "away")
    make_certificates(tmp_path / "one", ["localhost"], 1)


def another_share(tmp_path):
    from fsl_sage.machines.shares import write_shares

    experiment = preset("smoke", "fed_avg", **TINY)
    write_shares(experiment, tmp_path / "one")
    refused("name another folder", write_shares, experiment, tmp_path / "one")
    write_shares(experiment, tmp_path / "two")


def a_setting(tmp_path):
    refused("name=value", parse_setting, "five clients")
    assert parse_setting("n_clients=5 lr_power=1") == {"n_clients": 5, "lr_power": 1}


def the_closest_name(tmp_path):
    text = refused("did you mean", one_of, "model.name", "resnet81", ("resnet18", "alexnet"))
    assert one_of("model.name", re.search(r"did you mean '(.*)'", text)[1], ("resnet18", "alexnet"))


def the_closest_key(tmp_path):
    from fsl_sage.commands.words import jobs_of

    text = refused("did you mean", jobs_of, ["preset=smoke", "algorithm.align_intervall=5"])
    meant = re.search(r"did you mean ([\w.]+)", text)[1]
    (job,) = jobs_of(["preset=smoke", f"{meant}=5"])
    assert job.experiment.algorithm.align_interval == 5


def several_values(tmp_path):
    from fsl_sage.commands.words import jobs_of

    refused("one value, or use -m", jobs_of, ["preset=smoke", "seed=1,2"])
    assert len(jobs_of(["preset=smoke", "seed=1,2"], multirun=True)) == 2
    assert len(jobs_of(["preset=smoke", "seed=1"])) == 1


def an_extra(tmp_path):
    """Each extra that a message names is there, and brings the module that was missed."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    for extra, module in {
        "tensorboard": "tensorboard",
        "wandb": "wandb",
        "distributed": "flwr",
        "ray": "ray",
        "text": "peft",
    }.items():
        assert module in settings["DEFAULT"][f"{extra}_requirements"]


def a_plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\nfrom fsl_sage import network\n\n\n@network('mine_here', cut='0')\n"
        "def mine(c, k, s, w):\n    return nn.Sequential(nn.Conv2d(c, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(2, k))\n"
    )
    load_plugins([path], installed=False)
    tree = preset("smoke", "fed_avg", **TINY | {"model.name": "mine_here"}).to_dict()
    plugins.forget(str(path))
    with pytest.raises(MissingPluginError, match="load_plugins"):
        from_dict(tree)
    load_plugins([path], installed=False)
    assert from_dict(tree).model.name == "mine_here"
    plugins.forget(str(path))


def another_module_name(tmp_path):
    """A plug-in's module is called like one that this session has from elsewhere."""
    part = "from fsl_sage import dataset\n\n\n@dataset('d_{0}')\n" \
           "def d(root):\n    return {{}}\n"  # fmt: skip
    (tmp_path / "shapes.py").write_text("X = 1\n")
    sys.modules["shapes"] = ModuleType("shapes")  # the session has another of this name

    path = tmp_path / "plug.py"
    path.write_text("import shapes\n" + part.format(1))
    with pytest.raises(PluginError, match="rename the plug-in's module"):
        load_plugins([path], installed=False)
    (tmp_path / "shapes.py").rename(tmp_path / "shapes_mine.py")
    path.write_text("import shapes_mine\n" + part.format(1))
    load_plugins([path], installed=False)
    plugins.forget(str(path))
    del sys.modules["shapes"]


def a_home(tmp_path):
    text = refused("name the folder in full, or as", user_path, "~nobody-here/runs")
    assert user_path(text.split(" or as ")[1]) == tmp_path.cwd() / "~nobody-here/runs"
    assert user_path(tmp_path) == tmp_path


def a_device(tmp_path):
    refused("use 'auto' or 'cpu'", choose_device, "cuda:99")
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda")


def a_larger_picture(tmp_path):
    def draw(words, width):
        figure, axes = new_figure(1, 1, width=width)
        axes[0].set_title(words)
        return figure

    def save(figure):
        save_figure(figure, tmp_path, "named", "a title", about_here("cpu"), preset="smoke", formats=["png"])

    with pytest.warns(UserWarning, match="make the figure larger or its words shorter"):
        save(draw("word " * 40, 3))
    with warnings.catch_warnings(action="error"):
        save(draw("word " * 40, 20))
        save(draw("word", 3))


def a_picture_again(tmp_path):
    from fsl_sage.papers.report import read_picture

    figure = new_figure()[0]
    figure.savefig(tmp_path / "named.png")
    refused("make it again", read_picture, tmp_path / "named.png")
    save_figure(figure, tmp_path, "named", "an empty picture", about_here("cpu"), preset="smoke", formats=["png"])
    assert read_picture(tmp_path / "named.png")["name"] == "named"


def a_figure_again(tmp_path):
    made = sorted((ROOT / "figures" / "gallery").glob("*_paper_versus_ours.csv"))[0]
    old = tmp_path / made.name
    pd.read_csv(made).drop(columns="least").to_csv(old, index=False)
    refused("make the figure again", read_versus, old)
    shutil.copy(made, old)
    assert len(read_versus(old))


# ----------------------------------------------------------------------------------------------------------- data


def arrays(n=12, side=8, labels=2, channels=()):
    x, y = np.zeros((n, side, side, *channels), np.uint8), np.arange(n) % labels
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y}


def a_place_for_data(tmp_path):
    refused("put cifar100.npz", load, "cifar100", tmp_path, download=False, kind=FileNotFoundError)
    np.savez(tmp_path / "cifar100.npz", **arrays(channels=(3,)))
    assert len(load("cifar100", tmp_path, download=False).train) == 12  # put there, or named by data_root
    before = os.environ.get("FSL_SAGE_DATA")
    os.environ["FSL_SAGE_DATA"] = str(tmp_path)
    try:
        assert len(load("cifar100", download=False).train) == 12
    finally:
        del os.environ["FSL_SAGE_DATA"]
        os.environ.update({} if before is None else {"FSL_SAGE_DATA": before})


def a_whole_copy(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"no data")
    refused("replace it by a whole copy, or delete it", load, "mine", tmp_path)
    np.savez(tmp_path / "mine.npz", **arrays())
    assert len(load("mine", tmp_path).train) == 12
    (tmp_path / "fmnist_mini.npz").write_bytes(b"no data")
    refused(r"or delete it \(other places are then searched\)", load, "fmnist_mini", tmp_path)
    (tmp_path / "fmnist_mini.npz").unlink()
    assert len(load("fmnist_mini", tmp_path).train) > 1000


def labels_anew(tmp_path):
    data = arrays()
    odd = {name: value * 1000 if name.startswith("y") else value for name, value in data.items()}
    np.savez(tmp_path / "mine.npz", **odd)
    text = refused("Number them anew", load, "mine", tmp_path)
    anew = eval(text.split("y_train first: ")[1].split(". Mend")[0], {"np": np, **odd})
    odd["y_train"], odd["y_test"] = np.split(anew, [len(odd["y_train"])])
    np.savez(tmp_path / "mine.npz", **odd)
    assert load("mine", tmp_path).num_classes == 2


def another_name_for_data(tmp_path):
    store, mine = RunStore(tmp_path / "runs"), TINY | PLAIN | {"dataset.name": "mine"}
    experiment = preset("smoke", "fed_avg", **mine)
    other = experiment.replace(seed=1)
    for folder, labels, run in (("a", 2, experiment), ("b", 4, other)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "mine.npz", **arrays(40, 28, labels))
        store.get([run], "cpu", str(tmp_path / folder), progress=False)
    refused("rename one of the data sets", store.about, [experiment, other])
    shutil.copy(tmp_path / "b" / "mine.npz", tmp_path / "b" / "yours.npz")
    yours = other.replace(**{"dataset.name": "yours"})
    store.get([yours], "cpu", str(tmp_path / "b"), progress=False)
    assert store.about([experiment, yours])["data"]
    store.get([other], "cpu", str(tmp_path / "a"), progress=False)  # or all on one of them
    assert store.about([experiment, other])["data"]


# ---------------------------------------------------------------------------------------------------------- store


def a_run_anew(tmp_path):
    store, experiment = RunStore(tmp_path), preset("smoke", "fed_avg", **TINY)
    (before,) = store.get([experiment], "cpu", progress=False)
    folder = store.folder(experiment)
    (folder / "rounds.csv").write_text("round\n")
    text = refused(
        "delete the folder .* and the run will be trained again", store.get, [experiment], "cpu", kind=StoreError
    )
    shutil.rmtree(re.search("delete the folder (.*) and the run", text)[1])
    assert store.get([experiment], "cpu", progress=False)[0].rounds.equals(before.rounds)
    about = (folder / "history.json").read_text()
    (folder / "history.json").write_text(about.replace('"format": 1', '"format": 99'))
    text = refused("use the version that wrote it", store.get, [experiment], "cpu", kind=StoreError)
    assert RunStore(tmp_path / "elsewhere").get([experiment], "cpu", progress=False)[0].rounds.equals(before.rounds)


def a_folder_that_can_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    experiment = preset("smoke", "fed_avg", **TINY)
    refused(
        "make it a folder that can be written", RunStore(tmp_path / "runs").get, [experiment], "cpu", kind=StoreError
    )
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    RunStore(tmp_path / "runs").get([experiment], "cpu", progress=False)


def a_diverged_run_again(tmp_path):
    store, experiment = RunStore(tmp_path), preset("smoke", "fed_avg", **TINY | {"rounds": 3})
    wild = experiment.replace(**{"model.client.optimizer.lr": 1e30, "model.server.optimizer.lr": 1e30})
    with pytest.raises(DivergedError):
        store.get([wild], "cpu", progress=False)
    with pytest.raises(DivergedError, match="delete that folder to try again") as error:
        store.get([wild], "cpu", progress=False)
    shutil.rmtree(re.search("its rounds are in (.*);", str(error.value))[1])
    told = []

    class Told(Callback):
        def start(self, at):
            told.append(at.experiment.hash)

    with pytest.raises(DivergedError):
        store.get([wild], "cpu", progress=False, callbacks=[Told()])
    assert told == [wild.hash]  # it was tried again


def a_model_again(tmp_path):
    store, experiment = RunStore(tmp_path), preset("smoke", "fed_avg", **TINY)
    store.get([experiment], "cpu", progress=False, callbacks=[KeepModel(tmp_path)])
    path = tmp_path / "models" / f"{experiment.hash}.safetensors"
    path.write_bytes(b"no model")
    refused("delete it, and train again with save=True", load_model, tmp_path, experiment.hash)
    path.unlink()
    from fsl_sage.commands.train import main

    words = [f"{key}={value}" for key, value in TINY.items()]
    before = os.environ.get("FSL_SAGE_RUNS")
    os.environ["FSL_SAGE_RUNS"] = str(tmp_path)
    try:
        assert main(["preset=smoke", "algorithm=fed_avg", *words, "save=True", "device=cpu"]) == 0
        assert load_model(tmp_path, experiment.hash)
        path.unlink()  # a run with other numbers: moved away, it is trained anew
        folder = store.folder(experiment)
        history, _ = read_whole(folder)
        history.rounds["test_loss"] += 1
        shutil.rmtree(folder)
        store.save(history)
        assert main(["preset=smoke", "algorithm=fed_avg", *words, "save=True", "device=cpu"]) != 0
        shutil.move(folder, tmp_path / "away")
        assert main(["preset=smoke", "algorithm=fed_avg", *words, "save=True", "device=cpu"]) == 0
        assert load_model(tmp_path, experiment.hash)
    finally:
        del os.environ["FSL_SAGE_RUNS"]
        os.environ.update({} if before is None else {"FSL_SAGE_RUNS": before})


# ------------------------------------------------------------------------------------------- networks of one's own


def halves(client, server):
    whole = nn.Sequential(OrderedDict(client=nn.Sequential(*client), server=nn.Sequential(*server)))
    return SplitModel.cut(whole, "client", torch.zeros(2, 1, 8, 8))


def tried(client=None, server=None, aux=None, classes=4):
    client = client or [nn.Conv2d(1, 2, 3)]
    server = server or [nn.Flatten(), nn.Linear(72, classes)]
    return try_parts(halves(client, server), aux and nn.Sequential(*aux), (1, 8, 8), classes, aligned=aux is not None)


class Without(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).detach()


class Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand(1)


class DrawsBackward(nn.Module):
    def forward(self, x):
        return Drawn.apply(x)


class DrawsForward(nn.Module):
    def forward(self, x):
        return x * torch.rand(1)


class Whole(nn.Module):
    def forward(self, x):
        return (x > 0).long()


def weights_that_learn(tmp_path):
    refused("leave out detach and no_grad, or freeze", tried, [Without(1, 2, 3)])
    tried([nn.Conv2d(1, 2, 3)])
    tried([Without(1, 2, 3).requires_grad_(False)])


def something_to_train(tmp_path):
    def net(*more):
        server = nn.Linear(64, 4).requires_grad_(False)
        return [nn.Identity()], [*more, nn.Flatten(), server]

    refused("give one of its halves a layer with weights, or call requires_grad_", tried, *net())
    tried(*net(nn.Conv2d(1, 1, 1)))
    client, server = net()
    server[-1].requires_grad_(True)
    tried(client, server)


def numbers_at_the_cut(tmp_path):
    says, ends = "cut where one tensor of floating-point numbers comes out", [nn.Flatten(), nn.Linear(72, 4)]
    refused(says, try_parts, _by_hand(nn.Sequential(nn.Conv2d(1, 2, 3), Whole()), *ends), None, (1, 8, 8), 4)
    tried([nn.Conv2d(1, 2, 3)])


def enough_outputs(tmp_path):
    refused("build it with num_classes outputs per image", tried, None, [nn.Flatten(), nn.Linear(72, 3)])
    tried(None, [nn.Flatten(), nn.Linear(72, 4)])


def draws_in_the_forward_pass(tmp_path):
    refused("draw them in the forward pass", tried, [nn.Conv2d(1, 2, 3), DrawsBackward()])
    tried([nn.Conv2d(1, 2, 3), DrawsForward()])


def an_auxiliary_of_other_layers(tmp_path):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2

    class OnlyOnce(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    refused("build it of other layers", tried, aux=[nn.Flatten(), OnlyOnce(), nn.Linear(72, 4)])
    tried(aux=[nn.Flatten(), nn.Tanh(), nn.Linear(72, 4)])


def two_images(tmp_path):
    server = [nn.Flatten(), nn.Linear(3, 4)]
    whole = nn.Sequential(nn.Conv2d(1, 2, 3), *server)
    refused("try the network in training on two images", try_parts, _by_hand(*whole), None, (1, 8, 8), 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # shows the same
        whole.train()(torch.zeros(2, 1, 8, 8))


def _by_hand(client, *server):
    return SplitModel(client, nn.Sequential(*server))


class Holds(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def kept_modes(tmp_path):
    net = Holds(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))
    refused("call keep_modes first", SplitModel.cut, net, "1")
    assert not SplitModel.cut(keep_modes(net), "1").train().client.get_submodule("1").training


def a_hook_inside(tmp_path):
    def net(hooked):
        made = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Flatten(), nn.Linear(72, 4))
        (made if hooked is None else made.get_submodule(hooked)).register_forward_hook(lambda *_: None)
        return made

    refused("register them on a layer inside it", SplitModel.cut, net(None), "0")
    SplitModel.cut(net("0"), "0")


def a_layer_that_can_be_traced(tmp_path):
    class Looks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    layers = {"a": Looks(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()), "flat": nn.Flatten(), "fc": nn.Linear(64, 4)}
    net = nn.Sequential(OrderedDict(layers))
    refused("cut after a layer of Looks itself|cut after a layer of Sequential itself", SplitModel.cut, net, "a.0")
    SplitModel.cut(net, "a")
    SplitModel.cut(net, "a", stages=["a", "flat", "fc"])


def one_path(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Flatten()

        def forward(self, x):
            return self.b(self.a(x) if self.training else self.a(x).relu())

    net = Two()
    refused("takes the same path in training and evaluation; or give its stages", SplitModel.cut, net, "a")
    SplitModel.cut(net, "a", stages=["a", "b"])


def inputs_given(tmp_path):
    def net():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(4))

    refused("or pass an image through the network before it is cut", SplitModel.cut, net(), "0")
    passed = net()
    passed(torch.zeros(1, 1, 8, 8))
    SplitModel.cut(passed, "0")
    SplitModel.cut(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), "0")


def a_cut_of_the_explorer(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    assert all(SplitModel.cut(net, name, torch.zeros(2, 1, 8, 8)) for name in cut_layers(net))


def squares(tmp_path):
    def build(channels, classes, size, width):
        return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.Linear(2 * (size - 2) ** 2, classes))

    plugins.network("squares_only", cut="0")(build)
    experiment = preset("smoke", "fed_avg", **TINY | PLAIN | {"model.name": "squares_only", "dataset.name": "wide"})
    data = arrays(40, 10)
    wide = {name: np.repeat(value, 2, axis=2) if name[0] == "x" else value for name, value in data.items()}
    try:
        np.savez(tmp_path / "wide.npz", **wide)
        refused("crop or pad the images to squares", set_up, experiment, str(tmp_path))
        np.savez(tmp_path / "wide.npz", **data)
        set_up(experiment, str(tmp_path))
    finally:
        plugins.forget(plugins.FILES[plugins.PLUGGED["model", "squares_only"]].home)


def fewer_clients(tmp_path):
    few = {"num_clients": 20, "dataset.max_train": 20, "model.name": "resnet18", **PLAIN}
    refused("take fewer clients or more training images", set_up, preset("smoke", "fed_avg", **TINY | few))
    set_up(preset("smoke", "fed_avg", **TINY | few | {"num_clients": 4}))
    set_up(preset("smoke", "fed_avg", **TINY | few | {"dataset.max_train": 80}))


def a_batch_size(tmp_path):
    odd = {"num_clients": 1, "dataset.max_train": 33, "model.name": "resnet18", "model.client.batch_size": 32, **PLAIN}
    text = refused("would do", set_up, preset("smoke", "fed_avg", **TINY | odd))
    fits = int(re.search(r"; (\d+) would do", text)[1])
    set_up(preset("smoke", "fed_avg", **TINY | odd | {"model.client.batch_size": fits}))


# ------------------------------------------------------------------------------------------------------- the table

BY_HAND = "by hand: "
CASES = {  # part of the text → how it is followed: here, by a test elsewhere, or by hand because …
    "{}: is there already; name another folder, or move it away": another_folder,
    "may be in use; name another folder": another_share,
    "name=value, several": a_setting,
    "{}: name those by --only": "test_published.py::test_a_preset_that_a_figure_does_not_have_is_refused",
    "of this version: make the figure again": a_figure_again,
    "did you mean {}? ": the_closest_key,
    " (did you mean {}?)": the_closest_name,
    "one value, or use -m{}": several_values,
    "installed: pip install": an_extra,
    "Move {} away to train it anew": a_model_again,
    "delete it, and train again with save=True": a_model_again,
    "load their files by plugins=[FILE]": a_plugin,
    "use 'auto' or 'cpu'": a_device,
    "name the folder in full, or as ./{}": a_home,
    "make it again": a_picture_again,
    "one whose {} is in the gallery: make it": a_picture_again,
    "make its figures again": "test_texts.py::test_texts_follow_a_gallery_made_on_another_machine",
    "replace it by a whole copy": a_whole_copy,
    "Mend the plug-in's function": BY_HAND + "only its author knows what it should return",
    "Reinstall the package that it belongs to": BY_HAND + "the package's own files cannot be broken here",
    "What to do: put {}.npz": a_place_for_data,
    "What to do: put model.safetensors (": "test_language.py::test_pretrained_weights_are_found_like_data",
    "add adapters where the model is built": "test_decoders.py::test_adapters_of_ones_own_choice",
    "freeze and adapt it in the function that builds it": "test_decoders.py::test_a_network_is_frozen_by_hand",
    "What to do: put one of these there": "test_text.py::test_byte_pairs_from_each_form_and_place",
    "use dataset.vocabulary='gpt2'": BY_HAND + "GPT-2's ranks are no part of the package",
    "set dataset.image_size to resize all": "test_data.py::test_imagefolder_sizes",
    "set dataset.image_size to make all smaller": "test_data.py::test_imagefolder_sizes",
    "Number them anew, those of y_train first": labels_anew,
    "Cut after {}:": a_cut_of_the_explorer,
    "see fsl-sage-federate {} --help": "test_federate.py::test_every_command_has_help",
    "fewer clients or more training images": fewer_clients,
    "{}; {} would do": a_batch_size,
    "draw them from core.generator": "test_draws.py::test_an_algorithm_that_draws_in_its_clients_work",
    "draw from core.generator": "test_draws.py::test_an_algorithm_that_draws_elsewhere_is_refused_between_machines",
    "wait for its end, or use another FSL_SAGE_RUNS": "test_hostile.py::test_two_servers_cannot_share_a_checkpoint",
    "start all with the same words": "test_remote.py::test_clients_that_are_asked_end_with_the_history",
    "to begin again, delete {}": "test_faults.py::test_where_nobody_is_left_the_run_stops_and_can_go_on",
    "{}: delete it, and the run begins anew": "test_hostile.py::test_a_checkpoint_that_no_client_can_follow_says_how",
    "has; choose another one": "test_callbacks.py::test_a_column_that_is_taken_or_no_number_is_refused",
    "see machines.gate": BY_HAND + "another Flower than the pinned one",
    "install the server's version of PyTorch": BY_HAND + "two versions of PyTorch",
    "set both by the network": BY_HAND + "clocks of two machines",
    "set the clocks of both machines by the network": BY_HAND + "clocks of two machines",
    "see --certificates": "test_gate.py::test_why_a_client_is_not_let_in",
    "make new ones with fsl-sage-federate certs": another_folder,
    "is not for this address: use a --host": another_folder,
    "is not for this name: use a --host": another_folder,
    "make the figure larger or its words shorter": a_larger_picture,
    "rename the plug-in's module": another_module_name,
    "see --host and --port": "test_gate.py::test_a_port_that_another_program_has_is_refused_at_once",
    "ask its owner, or point FSL_SAGE_RUNS elsewhere": a_run_anew,
    "delete the folder {} and the run will be trained again": a_run_anew,
    "use the version that wrote it": a_run_anew,
    "make room there": BY_HAND + "a full disk",
    "make it a folder that can be written": a_folder_that_can_be_written,
    "rename one of the data sets": another_name_for_data,
    "make sure that this user may read the store": BY_HAND + "rights that only its owner can give",
    "delete that folder to try again": a_diverged_run_again,
    "such that an alignment fits": "test_alignable.py::test_an_alignment_that_does_not_fit_into_memory_is_refused",
    "or give its stages": one_path,
    "call keep_modes first": kept_modes,
    "register them on a layer inside it": a_hook_inside,
    "or pass an image through the network before it is cut": inputs_given,
    "cut after a layer of {} itself, or give its stages": a_layer_that_can_be_traced,
    "leave them {}; precision=bf16": "test_networks.py::test_advice_for_networks_can_be_followed",
    "crop or pad the images to squares, or ": squares,
    "let a layer inside {} do that": "test_networks.py::test_advice_for_networks_can_be_followed",
    "take those of torch.nn.utils.parametrizations": "test_networks.py::test_advice_for_networks_can_be_followed",
    "give one of its halves a layer with weights": something_to_train,
    "leave out detach and no_grad": weights_that_learn,
    "try the network in training on two images": two_images,
    "build it with num_classes outputs per image": enough_outputs,
    "cut where one tensor of floating-point numbers comes out": numbers_at_the_cut,
    "draw them in the forward pass": draws_in_the_forward_pass,
    "build it of other layers": an_auxiliary_of_other_layers,
    "another distribution for data that": "test_natural.py::test_data_without_owners_have_no_natural_clients",
    "see python -m fsl_sage.commands.ranks --help": "test_cli.py::test_each_command_is_a_module_that_runs",
}
NO_ADVICE = (
    "cut gradients",  # what an attack looks at
    "run {}",
    "train/<class>/ or train/<client>/<class>/, and test/<class>/",
    "trained again to keep it",
    "take in runs that",
    "delete what cannot be used",
    "waiting for it",
)


@pytest.mark.parametrize("case", sorted({one.__name__ for one in CASES.values() if callable(one)}))
@pytest.mark.filterwarnings("ignore")
def test_advice_can_be_followed(case, tmp_path):
    globals()[case](tmp_path)


def test_every_advice_has_a_case():
    known = {part for part in CASES if not part.startswith(NO_ADVICE)}
    lost = [(module, text) for module, text in FOUND if not any(part in text for part in (*known, *NO_ADVICE))]
    assert not lost, f"follow each of these in a test, and put it into CASES: {lost}"
    texts = [text for _, text in FOUND]
    assert not [part for part in known if not any(part in text for text in texts)], "no message says that any more"


def test_the_cases_elsewhere_are_there():
    for where in [one for one in CASES.values() if isinstance(one, str) and not one.startswith(BY_HAND)]:
        file, _, name = where.partition("::")
        assert f"def {name}" in next((ROOT / "tests").rglob(file)).read_text(), where
