"""Refusals that no other test has: each says what was given, what is allowed, or what to do."""

import io
import json
import os
from types import SimpleNamespace
from typing import ClassVar

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fsl_sage
from fsl_sage.algorithms.sage import SageSettings
from fsl_sage.commands import federate, federation, figures, reproduce, runs, schema
from fsl_sage.commands import train as command
from fsl_sage.config.parts import CodecConfig, SchedulerConfig
from fsl_sage.config.presets import preset
from fsl_sage.config.settings import Settings, build
from fsl_sage.core import as_tensors
from fsl_sage.data import files, sources, text, vocabulary
from fsl_sage.data.partition import partition
from fsl_sage.experiments import checkpoint, store
from fsl_sage.experiments.callbacks import Callback, finish
from fsl_sage.experiments.history import CallbackError
from fsl_sage.experiments.models import export_model
from fsl_sage.experiments.plugins import algorithm, network
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.setup import as_rgb32, cuts_in_time
from fsl_sage.experiments.stored import tidy, write_table
from fsl_sage.experiments.train import train
from fsl_sage.ledger import Ledger
from fsl_sage.machines import wire
from fsl_sage.machines.certificates import address
from fsl_sage.machines.messages import MessageError, check, check_numbers
from fsl_sage.machines.remote import check_remote
from fsl_sage.networks import auxiliary, codecs, decoders, gpt2, recording, trial, zoo
from fsl_sage.papers import standing
from fsl_sage.papers.claims import published
from fsl_sage.papers.comparison import as_fed_avg
from fsl_sage.papers.leakage import measure_leakage
from fsl_sage.papers.plots import new_figure, plot_family
from fsl_sage.papers.traffic import observe
from fsl_sage.papers.verdicts import parse_order
from fsl_sage.papers.watch import plot_look
from fsl_sage.papers.widgets import Choice, with_sliders

ONE = torch.zeros(1)
TEXTS = {"model.name": "gpt2_tiny", "dataset.name": "restaurants", "dataset.distribution": "iid", "rounds": 1}
LATE = preset("smoke", **{"clock.deadline": 9.0})
FAMILY = pd.DataFrame({"round": range(9), "test_accuracy": 0.1, "seed": 0, "q": range(9)})
TABLE_6 = published("sglr")
REFUSED = {
    "front door": (lambda: fsl_sage.nothing, "module 'fsl_sage' has no attribute 'nothing'; its names are Callback"),
    "certs": (lambda: federate.certs(None, ["rounds=2"]), "certs='rounds=2': must be without KEY=VALUE"),
    "field": (lambda: runs._field("lr", ["a.lr", "b.lr"]), "field='lr': must be one of a.lr, b.lr"),
    "filter": (lambda: runs.chosen([], ["seed"]), "filter='seed': must be FIELD=VALUE, such as seed=200"),
    "one run": (lambda: runs.compare_runs([None]), "runs=1: must be two or more"),
    "source": (lambda: schema._keys("config.parts", "NOTHING"), "config.parts writes out no NOTHING"),
    "hydra": (lambda: command.run(["hydra.verbose=true"]), "hydra.verbose=true: hydra's own options need -m"),
    "codec": (lambda: CodecConfig(groups=0), "codec.groups=0: must be 1 or more"),
    "whole": (lambda: preset("smoke", rounds=1.5), "rounds=1.5: must be of type int"),
    "list": (lambda: preset("smoke", **{"model.cuts": 3}), "model.cuts=3: must be a list"),
    "table": (lambda: build(dict[str, int], 3, "table"), "table=3: must be a table"),
    "text": (lambda: build(str, 3, "name"), "name=3: must be of type str"),
    "tensors": (lambda: as_tensors(3), "value='int': must be a model, its state dict, a tensor or several"),
    "no tensors": (lambda: as_tensors([3]), "value='list': must be a model, its state dict, a tensor or several"),
    "model file": (
        lambda: export_model("s", "x", "m.pt"),
        "file='m.pt': must be a file whose name ends in .safetensors",
    ),
    "table file": (lambda: write_table(None, "x.csv"), "path='x.csv': must be a file whose name ends in .parquet"),
    "name": (lambda: network("a name", cut="conv1")(nn.Identity), "must be a plain name: letters, digits, _ . -"),
    "cuts": (lambda: cuts_in_time(LATE, []), "cuts=[]: must be one layer or more"),
    "dtype": (
        lambda: check({"z": ONE}, {"z": ONE.double()}),
        "z is torch.float32 (1,), where torch.float64 (1,) was due",
    ),
    "negative": (lambda: check_numbers({"losses": ONE - 1}, 10), "losses has numbers below 0"),
    "count": (lambda: check_numbers({"steps": ONE.long() + 2**62}, 10), "steps has numbers above"),
    "no split": (
        lambda: auxiliary.auxiliary_for("x", ONE),
        "split='str': must be a SplitModel, as SplitModel.cut makes",
    ),
    "no sample": (
        lambda: auxiliary.align(None, auxiliary.AlignmentBuffer(5), ONE, 1, 1),
        "buffer=0: must be filled with one sample at least",
    ),
    "groups": (lambda: codecs._pieces(torch.Size([2, 6]), 3, 2), "codec.groups=2: must be a divisor of the 3 pieces"),
    "leakage": (
        lambda: measure_leakage(preset("smoke", "psl", rounds=1), "cpu", n_test=10**6, n_train=2),
        "n_test=1000000: must be at most 1000, the test images there are",
    ),
    "family": (
        lambda: plot_family(FAMILY, "round", "test_accuracy", "q", new_figure()[1][0]),
        "must be a column of 1 to 8 values",
    ),
    "ours": (
        lambda: standing.compare(TABLE_6, pd.DataFrame({"metric": ["x"]})),
        "must be a table that also has n_clients, lr_power",
    ),
    "order": (lambda: parse_order("fsl_sage"), "order='fsl_sage': must be names with < or , between, each once"),
    "flat": (
        lambda: plot_look(SimpleNamespace(smashed=torch.zeros(2, 3))),
        "smashed=(2, 3): must be activations of shape (batch, channel, height, width), to draw them",
    ),
    "shared half": (
        lambda: check_remote(preset("smoke", "fed_avg", **{"algorithm.share_server": True})),
        "algorithm.share_server=True: must be false between machines: no half can be shared",
    ),
    "loss": (
        lambda: preset("smoke", "sglr", **{"algorithm.per_client_loss": True, "algorithm.mixing_mode": "pooling"}),
        "algorithm.per_client_loss=True: must be false with mixing_mode='pooling'",
    ),
    "in flight": (
        lambda: train(preset("smoke", "psl", rounds=1), "cpu", progress=False, in_flight=1),
        "clients for 'psl', whose steps need them all at once",
    ),
    "alone": (
        lambda: preset("smoke", "centralised", participation=0.5),
        "participation=0.5: must be 1 for 'centralised', which has one client",
    ),
    "warm-up": (lambda: SchedulerConfig("warmup", warmup_steps=-1), "warmup_steps=-1: must be 0 steps or more"),
    "settings": (
        lambda: build(Settings, SageSettings("fed_avg"), "algorithm"),
        "must be FedAvgSettings, the settings of 'fed_avg'",
    ),
    "sizes": (
        lambda: partition(torch.arange(10) % 2, 6, size_spread=1.0),
        "num_clients=6: must be at most 5 with dataset.size_spread=1.0",
    ),
    "rarest": (
        lambda: partition(torch.arange(10) % 2, 6, "balanced"),
        "num_clients=6: must be at most 5 (samples of the rarest class) if balanced",
    ),
    "plug-in": (
        lambda: algorithm("odd", settings=dict)(lambda state, rnd, ledger: None),
        "@algorithm('odd') settings=<class 'dict'>: must be a dataclass derived from config.Settings",
    ),
    "no runs": (lambda: tidy([]), "histories=[]: must be one or more"),
    "graphs": (
        lambda: train(preset("smoke", rounds=1), "cpu", progress=False, recorded=True),
        "recorded=True: must be False on cpu: CUDA graphs need a GPU",
    ),
    "weights": (
        lambda: gpt2.load_hugging_face(gpt2.gpt2(11, 4, 8, 2, 1), {}, "a file"),
        "weights='a file': must be a GPT-2 with 'transformer.wte.weight' of shape (11, 8); it has none",
    ),
    "half": (
        lambda: zoo._tried("mine", nn.Linear(2, 2).half(), "", 3, (8, 8)),
        "has weights of torch.float16; leave them torch.float32; precision=bf16 computes in 16 bits",
    ),
    "small images": (lambda: zoo.split_model("resnet18", image_size=4), "image_size=4: must be at least 8 pixels"),
    "budget": (
        lambda: as_fed_avg(SimpleNamespace(experiment=preset("smoke", "sl_multi_server", comm_threshold_mb=1.0))),
        "comm_threshold_mb=1.0: must be None: FedAvg would reach the budget in another round",
    ),
    "uploads": (
        lambda: observe(preset("smoke", "hosl", rounds=1, **{"dataset.max_train": 60}), "cpu"),
        "algorithm.name='hosl': must be one whose clients upload each batch, or each q-th, once",
    ),
    "texts": (
        lambda: as_rgb32(SimpleNamespace(name="mine", train=SimpleNamespace(is_text=True))),
        "dataset.rgb32=True: must be False for 'mine', which holds texts",
    ),
    "context": (
        lambda: train(preset("smoke", **TEXTS | {"model.context": 4}), "cpu", progress=False),
        "for these texts, or dataset.seq_len at most 4",
    ),
    "slider": (lambda: with_sliders(print, q=Choice([1, 2], 3)), "q=3: must be one of [1, 2]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_a_sentence(case):
    call, words = REFUSED[case]
    with pytest.raises((ValueError, AttributeError)) as refusal:
        call()
    assert words in str(refusal.value)


WORDS = {
    "--jobs 0": "--jobs=0: must be 1 or more",
    "--no-train --force": "--no-train='--force': must be given without --force, which trains again",
    "": "--figures=None: must be given, since this is no checkout of fsl_sage",
}


@pytest.mark.parametrize("words", WORDS)
def test_a_command_says_what_is_wrong_and_ends(words, monkeypatch, capsys):
    if not words:
        monkeypatch.setattr(reproduce, "checkout", lambda *path: None)
    with pytest.raises(SystemExit) as end:
        reproduce.main(words.split())
    assert end.value.code == 2 and WORDS[words] in capsys.readouterr().err


def test_a_host_has_no_port():
    pytest.importorskip("cryptography")
    with pytest.raises(ValueError, match="must be a name or an IP address, without a port"):
        address("server.example:80")


def test_a_client_that_flower_does_not_know_is_named(tmp_path):
    (tmp_path / "client-0.pub").touch()
    silent = SimpleNamespace(communicate=lambda: ("no number", ""))
    here = SimpleNamespace(certificates=tmp_path, nodes={}, flwr=lambda *words, **options: silent)
    with pytest.raises(RuntimeError, match=r"client-0\.pub was not registered"):
        federation.Commands.register(here)


def test_parameters_of_a_figure_are_plain_python(tmp_path):
    cell = nbformat.v4.new_code_cell("x = = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match=r"a\.ipynb: its parameters are not plain Python"):
        figures.parameters_for(tmp_path / "a.ipynb", {}, {})


def test_damaged_data_say_what_is_missing(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks y_train, x_test, y_test \(it must hold x_train, y_train"):
        files.read_npz(tmp_path / "a.npz")
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(files, "PIXELS", 5)
    with pytest.raises(ValueError, match="it has 3 × 2 pixels, more than 5"):
        files.read_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a line of text")
    monkeypatch.setattr(text, "LARGEST_TEXT", 3)
    with pytest.raises(ValueError, match="size=14: must be at most 3 bytes"):
        list(text.lines_of(tmp_path / "a.txt"))
    monkeypatch.setattr(vocabulary, "LARGEST_RANKS", 3)
    with pytest.raises(ValueError, match="size=14: must be at most 3 bytes"):
        vocabulary._text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "largest, words",
    [
        (2**20, "the checksum differs: 5 bytes with MD5 5d41402abc4b2a76b9719d911017c592, not 0"),
        (3, "is longer than 3"),
    ],
)
def test_downloads_are_whole_and_bounded(largest, words, tmp_path, monkeypatch):
    class Answer(io.BytesIO):
        headers: ClassVar[dict] = {}

    monkeypatch.setattr(sources, "urlopen", lambda request, timeout: Answer(b"hello"))
    monkeypatch.setattr(sources, "LARGEST", largest)
    with pytest.raises(OSError, match=f"the answer {words}" if largest == 3 else words):
        sources.download("https://example.org/a", tmp_path / "a", "0")


def test_a_callback_that_fails_at_the_end_is_named():
    class Fails(Callback):
        def end(self, history, models):
            raise RuntimeError("no disk")

    history = SimpleNamespace(experiment=preset("smoke"))
    with pytest.raises(CallbackError, match=r"is complete, but Fails failed \(RuntimeError: no disk\)"):
        finish([Fails()], torch.device("cpu"), history, list)


def test_checkpoints_that_cannot_be_used_say_why(tmp_path):
    experiment, path = preset("smoke"), tmp_path / "run.ckpt"
    state, plain = SimpleNamespace(experiment=experiment, device=torch.device("cpu")), {"format": checkpoint.FORMAT}

    def refused(plain, data="", **others):
        checkpoint.write_tensors(path, {}, {"run": json.dumps(plain | others)})
        with pytest.raises(checkpoint.CheckpointError) as refusal:
            checkpoint.load_checkpoint(path, state, Ledger(), data)
        return str(refusal.value)

    assert "has checkpoint format 99; this version reads" in refused({"format": 99})
    assert "is of another experiment than" in refused(plain, experiment=preset("smoke", rounds=1).to_dict())
    of_data = {"experiment": experiment.to_dict(), "channels_last": [], "progress": {"data": "a"}}
    assert "is of other data than those called" in refused(plain, "b", **of_data)
    save_file({}, path, {"run": json.dumps(plain)})
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged \(no checksum\)"):
        checkpoint.load_checkpoint(path, state, Ledger())
    with pytest.raises(ValueError, match="must be an ordinary file"):
        checkpoint.read_tensors(tmp_path)


def test_files_of_a_store_are_ordinary_and_hold_numbers(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "rounds.csv")
    with pytest.raises(ValueError, match="must be an ordinary file of at most"):
        store._content(tmp_path / "rounds.csv")
    (tmp_path / "rounds.csv").unlink()
    small = preset("smoke", "fed_avg", rounds=1, **{"dataset.max_train": 96, "dataset.max_test": 10})
    folder = RunStore(tmp_path).save(train(small, "cpu", progress=False), device="cpu")
    about = folder / "history.json"
    sealed = about.read_text()
    about.write_text(sealed.replace('"stopped": "rounds"', '"stopped": "budget"'))
    with pytest.raises(store.StoreError, match=r"must be as it was written \(its checksum differs\)"):
        store.read_whole(folder, small)
    about.write_text(sealed)
    monkeypatch.setattr(store, "_read_provenance", lambda *args: {"data": 3})
    with pytest.raises(store.StoreError, match="data=3: must be a text"):
        store.read_whole(folder, small)
    monkeypatch.setattr(store, "table_from_csv", lambda *args: pd.DataFrame({"test_accuracy": ["high"]}))
    with pytest.raises(store.StoreError, match=r"columns=\['test_accuracy'\]: must be numbers"):
        store.read_whole(folder, small)


class Once(torch.autograd.Function):
    """Twice the input; its gradient has no derivative."""

    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class OnceLayer(nn.Module):
    def forward(self, z):
        return Once.apply(z)


def test_networks_that_cannot_be_used_are_named(monkeypatch):
    with pytest.raises(ValueError, match="split: alignment needs second derivatives"):
        auxiliary._require_twice_differentiable(nn.Sequential(nn.Linear(3, 3), OnceLayer()), torch.ones(2, 3))
    loss = (torch.ones(2, requires_grad=True) * 2).sum()
    loss.backward()
    with pytest.raises(ValueError, match=r"mine: .* cannot be differentiated"):
        trial._differentiate("client", "mine", torch.sqrt(ONE.clone().requires_grad_()) * 1, gradient=torch.ones(2))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    with pytest.raises(ValueError, match="cannot be cut: its decoder must keep its 2 blocks in one ModuleList"):
        decoders.list_of_blocks(SimpleNamespace(config=config, get_decoder=lambda: nn.Linear(1, 1)))
    transformers = pytest.importorskip("transformers")
    tiny = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)

    def no_half(*args):
        raise TypeError("no mask")

    monkeypatch.setattr(decoders, "_server_half", lambda *args: SimpleNamespace())
    monkeypatch.setattr(decoders, "SplitModel", lambda *halves: no_half)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be cut after 'h0': no mask"):
        decoders.split_causal_lm(transformers.GPT2LMHeadModel(tiny), "h0")


def test_what_a_codec_gives_back_has_the_shape_that_was_packed(monkeypatch):
    coder = codecs.coders(preset("smoke", **{"codec.smashed.name": "float16"}).codec)["smashed"]
    monkeypatch.setattr(codecs, "_decoded", lambda *args: torch.zeros(1))
    with pytest.raises(ValueError, match=r"must be a codec that gives back \(2, 3\)"):
        coder.unpack({}, torch.zeros(2, 3), 0)
    ledger = Ledger()
    ledger.coders = {"smashed": coder}
    with pytest.raises(MessageError, match="smashed cannot be unpacked"):
        wire.unpack(ledger, 0, {"smashed": torch.zeros(2, 3)}, {})


def test_a_recording_is_not_played_on_moved_memory():
    part = SimpleNamespace(model=nn.Linear(2, 2))
    part.optimizer = torch.optim.SGD(part.model.parameters(), 0.1)
    _, play = recording.Pretended().record(lambda: part.model(torch.ones(1, 2)), part)
    play()
    part.model.weight.data = part.model.weight.data.clone()
    with pytest.raises(RuntimeError, match="a recording was played on memory that has moved"):
        play()


def test_one_number_is_in_one_table(tmp_path, monkeypatch):
    rows = pd.DataFrame({name: ["x"] for name in (*standing.PLACE, "runs", "artefact", "variant")})
    monkeypatch.setattr(standing, "read_versus", lambda path: rows.assign(variant="", figure="f"))
    for name in ("one", "two"):
        (tmp_path / f"{name}{standing.VERSUS}").touch()
        (tmp_path / f"{name}.json").write_text(json.dumps({"hardware": ["a CPU"]}))
    with pytest.raises(ValueError, match="must be in one table"):
        standing.our_numbers(tmp_path)
    claim = SimpleNamespace(paper="sage", artefact=None, metric=None, setting="", by="metric", order="none < other")
    with pytest.raises(ValueError, match="must be about one published number each, not so: none, other"):
        standing.numbers_of(claim)
