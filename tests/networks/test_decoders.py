"""Causal language models of transformers: cut at every block, adapted, trained by the same rounds as all others."""

from copy import deepcopy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from fsl_sage import Experiment, RunStore, decoder, load_plugins, train, vocabulary
from fsl_sage.core import refusal, tensor_bytes
from fsl_sage.experiments.plugins import forget
from fsl_sage.experiments.train import train_state
from fsl_sage.networks.decoders import (
    add_adapters,
    count_blocks,
    cuts_of,
    decoder_auxiliary,
    positions_of,
    split_causal_lm,
)
from fsl_sage.networks.gpt2 import Adapter
from fsl_sage.networks.part import NextToken, Part, server_step

V, LENGTH = 48, 9
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "pad_token_id": 0,
         "max_position_embeddings": 32}  # fmt: skip
WIDE = SIZES | {"intermediate_size": 24}
GROUPED = WIDE | {"num_key_value_heads": 1, "head_dim": 8}
KINDS = {
    "GPT2": {"vocab_size": V, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "GPTNeoX": WIDE, "OPT": SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}, "Bloom": {
        "vocab_size": V, "hidden_size": 16, "n_layer": 3, "n_head": 2}, "Llama": GROUPED, "Mistral": GROUPED,
    "Qwen2": GROUPED | {"tie_word_embeddings": True}, "Qwen3": GROUPED, "Gemma": GROUPED,
    "Gemma2": GROUPED | {"sliding_window": 4}, "Phi": WIDE, "CTRL": {
        "vocab_size": V, "n_embd": 16, "n_layer": 3, "n_head": 2, "dff": 24, "n_positions": 32},
    "OpenAIGPT": {"vocab_size": V, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "Bert": WIDE | {"is_decoder": True}, "Cohere": GROUPED, "Olmo2": GROUPED,
}  # fmt: skip
LORA = ["GPT2", "Llama", "Qwen2", "Mistral", "Gemma"]


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**KINDS[kind]))
    for name, parameter in model.named_parameters():  # nothing is 0 or 1, so a layer that is missing shows
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name or "ln" in name), std=0.1)
    return model.eval()


def a_batch(n=2):
    x = torch.randint(V, (n, LENGTH), generator=torch.Generator().manual_seed(1))
    return x, torch.stack([x.roll(-1, 1), torch.ones_like(x)], 1)


def logits_of(model, x):
    plain = deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        return plain(input_ids=x, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_are_the_whole_at_every_cut(kind):
    model, (x, _) = model_of(kind), a_batch()
    whole, before = logits_of(model, x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for cut in cuts_of(model):
        split = split_causal_lm(model, cut).eval()
        with torch.no_grad():
            assert torch.equal(split(x), whole), cut
        named = [half.named_parameters(remove_duplicate=False) for half in (model, split.client, split.server)]
        due, *halves = ({name for name, _ in one} for one in named)
        assert halves[0] | halves[1] == due and not halves[0] & halves[1], cut
        aux = decoder_auxiliary(split.server, min(1, count_blocks(split.server)))
        assert aux(split.client(x)).shape == (2, LENGTH, V)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Gemma2"])
def test_gradients_over_the_cut_are_those_of_the_whole(kind):
    model, (x, labels) = model_of(kind).double(), a_batch()
    torch.set_default_dtype(torch.double)
    try:
        model.set_attn_implementation("eager")
        logits = model(input_ids=x, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 0].flatten(), reduction="sum") / (x.numel() + 1e-4)
        loss.backward()
        due = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        split = split_causal_lm(model, "h1").eval()
        split.zero_grad()
        server = Part(split.server, torch.optim.SGD(split.server.parameters(), lr=1e-9))
        smashed = split.client(x)
        own, cut_grad = server_step(server, smashed, labels, criterion=NextToken())
        smashed.backward(cut_grad)
    finally:
        torch.set_default_dtype(torch.float)
    torch.testing.assert_close(own, loss.detach())
    tied = "lm_head.weight" not in due  # then its gradient is the sum of both ends'
    for half in (split.client, split.server):
        for name, parameter in half.named_parameters():
            if not (tied and ("wte" in name or "embed_tokens" in name or "lm_head" in name)):
                torch.testing.assert_close(parameter.grad, due[name])


@pytest.mark.parametrize("kind", LORA)
def test_adapters_change_nothing_at_first_and_alone_are_trained(kind):
    model, (x, _) = model_of(kind), a_batch()
    whole = logits_of(model, x)
    adapted = add_adapters(deepcopy(model), Adapter(rank=2))
    for cut in cuts_of(model)[1:]:
        split = split_causal_lm(adapted, cut).eval()
        with torch.no_grad():
            assert torch.equal(split(x), whole)
        for half in (split.client, split.server):
            assert all(p.requires_grad == (".lora_" in name) for name, p in half.named_parameters())


def test_an_auxiliary_model_of_all_blocks_is_the_server_and_a_random_one_is_not():
    split, (x, _) = split_causal_lm(add_adapters(model_of("Llama"), Adapter()), "h0"), a_batch()
    smashed = split.client(x).detach()
    with torch.no_grad():
        assert torch.equal(decoder_auxiliary(split.server, 2, "server")(smashed), split.server(smashed))
        assert not torch.equal(decoder_auxiliary(split.server, 2)(smashed), split.server(smashed))
    aux = decoder_auxiliary(split.server, 1)
    frozen = {name for name, parameter in aux.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".base_layer." in name or name.startswith("lm_head") for name in frozen)
    assert not [name for name, p in aux.named_parameters() if ".lora_B." in name and p.abs().max() > 0]


def bad_models():
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    yield transformers.T5ForConditionalGeneration(t5), "h0", "a decoder without an encoder"
    yield nn.Linear(2, 2), "h0", "a causal language model of transformers"
    yield model_of("Llama").model, "h0", "a causal language model of transformers"
    yield model_of("Llama"), "h7", "must be one of embed, h0, h1, h2"
    yield model_of("Llama").bfloat16(), "h0", "dtype=torch.float32 where it is loaded"


@pytest.mark.parametrize(("model", "cut", "said"), [*bad_models()], ids=["t5", "linear", "base", "cut", "bf16"])
def test_what_cannot_be_cut_is_refused(model, cut, said):
    assert said in refusal(split_causal_lm, model, cut)


def test_more_blocks_than_the_server_has_are_refused():
    split = split_causal_lm(model_of("Llama"), "h1")
    assert "at most the 1 blocks of the server" in refusal(decoder_auxiliary, split.server, 2)
    assert positions_of(split.client) == 32


def test_adapters_of_ones_own_choice():
    odd, (x, _) = model_of("Llama"), a_batch()
    odd.config.model_type = "unheard_of"
    assert "peft names no layers" in refusal(add_adapters, odd, Adapter())
    odd.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["gate_proj"]), odd)
    split = split_causal_lm(odd, "h0").eval()
    trained = [name for half in (split.client, split.server) for name, p in half.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 and all("gate_proj.lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(split(x), logits_of(odd, x))


PLUGIN = """
from fsl_sage import decoder, vocabulary
from transformers import AutoModelForCausalLM, Qwen2Config


@decoder("small_qwen", cut="h0")
def small_qwen(vocabulary, width, blocks, heads, context):
    return AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks or 3,
        num_attention_heads=heads or 4, num_key_value_heads=2, max_position_embeddings=context or 128,
    ))


@vocabulary("letters")
class Letters:
    def __init__(self, texts, root):
        self.letters = sorted({letter for text in texts for letter in text})
        self.tokens = {letter: token for token, letter in enumerate(self.letters, 2)}
        self.size, self.end = len(self.letters) + 2, 1

    def encode(self, text):
        return [self.tokens[letter] for letter in text if letter in self.tokens]

    def decode(self, tokens):
        return "".join(self.letters[token - 2] for token in tokens if token > 1)
"""


@pytest.fixture
def plugged(tmp_path):
    path = tmp_path / "own_text.py"
    path.write_text(PLUGIN)
    load_plugins([path], installed=False)
    yield path
    forget(str(path))


def small(algorithm, **changes):
    short = {"algorithm.align_epochs": 2} if algorithm == "fsl_sage" else {}
    return Experiment(num_clients=1 if algorithm == "centralised" else 2, rounds=2).replace(**{
        "dataset.name": "restaurants", "dataset.max_train": 24, "dataset.max_test": 8, "model.name": "small_qwen",
        "model.width": 16, "model.client.batch_size": 8, "algorithm.name": algorithm, **short, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    "algorithm", ["centralised", "fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage"]
)
def test_every_algorithm_trains_a_decoder_of_a_plugin(plugged, algorithm):
    run = small(algorithm, **{"model.adapter": {"rank": 2}})
    assert run.plugins[0].startswith("own_text@")
    history, state = train_state(run, "cpu", progress=False)
    assert history.rounds.test_loss.notna().all()
    for part in [*state.clients, *state.servers]:
        assert all(".lora_" in name for name in part.exchanged())
    if algorithm == "fed_avg":
        each = tensor_bytes(state.clients[0].exchanged()) + tensor_bytes(state.servers[0].exchanged())
        assert history.rounds.paper_bytes.iloc[-1] == 2 * 2 * 2 * each


def test_a_cut_and_a_vocabulary_are_words_like_any_other(plugged, tmp_path):
    runs = [small("fsl_sage", **{"model.cut": cut, "dataset.vocabulary": "letters", "dataset.seq_len": 250,
                                 "model.context": 250}) for cut in (None, "h1", "embed")]  # fmt: skip
    assert len({run.hash for run in runs}) == 3
    store = RunStore(tmp_path / "runs")
    histories = store.get(runs, "cpu", progress=False, jobs=2)  # in other processes
    assert [len(history.rounds) for history in histories] == [2, 2, 2]
    sizes = [history.rounds.paper_bytes.iloc[-1] for history in histories]
    assert len(set(sizes)) == 3  # the clients' models differ


def test_own_words_are_checked(plugged):
    too_long = small("fed_avg", **{"model.context": 8})
    assert "model.context" in refusal(train, too_long, "cpu", progress=False)
    assert "loads its weights" in refusal(small, "fed_avg", **{"model.pretrained": True})
    assert "must take (vocabulary, width, blocks, heads, context)" in refusal(
        decoder("short", cut="h0"), lambda size: None
    )
    assert "must take (texts, root)" in refusal(vocabulary("short"), lambda: None)


def test_a_vocabulary_that_is_none_is_refused(tmp_path):
    @vocabulary("nothing")
    def nothing(texts, root):
        return object()

    @vocabulary("too_high")
    class TooHigh:
        size, end = 3, 2

        def __init__(self, texts, root): ...

        def encode(self, text):
            return [7]

        def decode(self, tokens):
            return ""

    try:
        for name, said in {"nothing": "size, end, encode and decode", "too_high": "it gives 7"}.items():
            run = small("fed_avg", **{"model.name": "gpt2_tiny", "dataset.vocabulary": name})
            assert said in refusal(train, run, "cpu", progress=False)
    finally:
        forget("session")


def test_a_network_of_ones_own_layers_is_cut_by_its_layers():
    @decoder("bag", cut="vectors")
    def bag(vocabulary, width, blocks, heads, context):
        model = nn.Sequential()
        for name, layer in {"vectors": nn.Embedding(vocabulary, width), "head": nn.Linear(width, vocabulary)}.items():
            model.add_module(name, layer)
        return model

    @decoder("short", cut="vectors")
    def short(vocabulary, width, blocks, heads, context):
        return bag(vocabulary - 1, width, blocks, heads, context)

    try:
        history = train(small("sl_single_server", **{"model.name": "bag"}), "cpu", progress=False)
        assert history.rounds.test_loss.iloc[-1] > 0
        said = refusal(train, small("sl_single_server", **{"model.name": "short"}), "cpu", progress=False)
        assert "a network from tokens (2, 4) to logits (2, 4," in said
        said = refusal(train, small("fsl_sage", **{"model.name": "bag"}), "cpu", progress=False)
        assert "an auxiliary model of your own" in said
        adapter = small("fed_avg", **{"model.name": "bag", "model.adapter": {"rank": 2}})
        assert "none of transformers' models" in refusal(train, adapter, "cpu", progress=False)
    finally:
        forget("session")


def test_a_network_is_frozen_by_hand():
    @decoder("frozen", cut="vectors")
    def frozen(vocabulary, width, blocks, heads, context):
        model = nn.Sequential()
        model.add_module("vectors", nn.Embedding(vocabulary, width).requires_grad_(False))
        model.add_module("added", nn.Linear(width, width))
        model.add_module("head", nn.Linear(width, vocabulary).requires_grad_(False))
        return model

    try:
        _, state = train_state(small("sl_single_server", **{"model.name": "frozen"}), "cpu", progress=False)
        assert [*state.servers[0].exchanged()] == ["added.weight", "added.bias"]
        assert not state.clients[0].exchanged()
    finally:
        forget("session")


def test_a_part_takes_all_that_is_exchanged_and_nothing_else():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = Part(layer, torch.optim.SGD(layer.parameters(), lr=0.1), fixed=frozenset({"0.weight"}))
    state = {name: torch.ones_like(tensor) for name, tensor in part.exchanged().items()}
    before = layer[0].weight.clone()
    part.load(state)
    assert layer[1].weight.eq(1).all() and torch.equal(layer[0].weight, before)
    assert "1.bias" in refusal(part.load, {name: tensor for name, tensor in state.items() if name != "1.bias"})
    assert "0.weight" in refusal(part.load, state | {"0.weight": before})
