"""What a language model writes, what training takes of a client, and what one method's numbers are less the others'."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from fsl_sage import preset
from fsl_sage.core import tensor_bytes
from fsl_sage.experiments.callbacks import RunStart
from fsl_sage.experiments.models import whole_state
from fsl_sage.experiments.runs import RunStore
from fsl_sage.experiments.store import model_of
from fsl_sage.experiments.train import train_state
from fsl_sage.networks.gpt2 import Adapter
from fsl_sage.networks.zoo import split_decoder
from fsl_sage.papers.written import (
    Writes,
    as_pretrained,
    beside,
    client_memory,
    keep_model,
    less_others,
    text_dataset,
    trained_decoder,
    verdict_on,
)

TEXT = {
    "dataset.name": "restaurants", "dataset.max_train": 48, "dataset.max_test": 12, "model.name": "gpt2_tiny",
    "model.blocks": 2, "model.width": 32,
}  # fmt: skip
FACTS = ("name : A | food : B", "name : C | food : D")
SAID = {FACTS[0]: ["A serves good B food .", "At A there is B ."], FACTS[1]: ["C serves very good D food ."]}


def run_of(**changes):
    return preset("smoke", "centralised", rounds=1, num_clients=1, **TEXT).replace(**changes)


class Parrot(nn.Module):
    """Writes what it is told to after each context, and nothing after others."""

    def __init__(self, dataset, said):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))  # says on which device it is
        self.words = dataset.vocabulary
        self.next = {}
        for context, text in said.items():
            tokens = [*self.words.encode(context), self.words.end]
            for token in (*self.words.encode(text), self.words.end):
                self.next[tuple(tokens)] = token
                tokens.append(token)

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.words.size)
        for row, line in zip(logits, tokens.tolist(), strict=True):
            for j, scores in enumerate(row):
                scores[self.next.get(tuple(line[: j + 1]), self.words.end)] = 9.0
        return logits


@pytest.fixture
def small(tmp_path):
    """A data set of two meaning representations, three descriptions."""
    lines = [f"{context}||{text}\n" for context, texts in SAID.items() for text in texts]
    for name in ("train.txt", "test.txt"):
        (tmp_path / "two" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "two" / name).write_text("".join(lines))
    run = run_of(**{"dataset.name": "two", "dataset.max_train": None, "dataset.max_test": None})
    return run, tmp_path, text_dataset(run, tmp_path)


def told(run, root, *models, **options):
    """The columns that `Writes` adds for these models."""
    callback = Writes(root=root, **options)
    callback.start(RunStart(run, run.hash, 0, []))
    return callback.round({"round": 0, "test_loss": 1.0}, lambda: list(models))


def test_who_writes_a_reference_has_full_marks(small):
    run, root, dataset = small
    found = told(run, root, Parrot(dataset, {context: texts[0] for context, texts in SAID.items()}))
    assert found["bleu"] == found["rouge_l"] == 1 and list(found) == ["bleu", "nist", "rouge_l", "cider"]


def test_scores_are_means_over_the_global_models(small):
    """One model writes the references, one nothing: half of everything."""
    run, root, dataset = small
    parrot, mute = (Parrot(dataset, said) for said in ({c: texts[0] for c, texts in SAID.items()}, {}))
    both, one = told(run, root, parrot, mute), told(run, root, parrot)
    assert both == pytest.approx({name: value / 2 for name, value in one.items()})
    assert told(run, root, mute) == dict.fromkeys(one, 0.0)


def test_scores_of_a_half_right_model_by_hand(small):
    """Six words, one of them wrong, and nothing of the other context, whose references have six words."""
    run, root, dataset = small
    found = told(run, root, Parrot(dataset, {FACTS[1]: "C serves very good A food"}), contexts=2)
    assert told(run, root, Parrot(dataset, {FACTS[0]: "B"}), contexts=1)["bleu"] == 0
    precisions = 5 / 6 * 3 / 5 * 2 / 4 * 1 / 3  # of one to four words in a row
    assert found["bleu"] == pytest.approx(precisions**0.25 * math.exp(1 - (7 + 6) / 6))


def test_only_so_many_contexts_and_tokens(small):
    run, root, dataset = small
    parrot = Parrot(dataset, {FACTS[0]: SAID[FACTS[0]][0]})
    assert told(run, root, parrot, contexts=1)["rouge_l"] == 1
    assert told(run, root, parrot, contexts=2)["rouge_l"] == 0.5
    assert told(run, root, parrot, contexts=1, most=3)["rouge_l"] < 1


def test_nothing_is_written_of_images_nor_in_a_round_without_evaluation(small):
    run, root, _ = small
    callback = Writes(root=root)
    callback.start(RunStart(run, run.hash, 0, []))
    assert callback.round({"round": 0, "test_loss": math.nan}, lambda: pytest.fail("no model is asked for")) is None
    images = preset("smoke", "fed_avg")
    callback.start(RunStart(images, images.hash, 0, []))
    assert callback.round({"round": 0, "test_loss": 1.0}, lambda: pytest.fail("no model is asked for")) is None


def test_texts_without_contexts_have_nothing_to_answer(tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / "plain" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_text("a b c d\n" * 4)
    plain = run_of(**{"dataset.name": "plain", "dataset.max_train": None, "dataset.max_test": None})
    with pytest.raises(ValueError, match=r"dataset\.name='plain': must be a data set of contexts and completions"):
        text_dataset(plain, tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.name='fmnist_mini'"):
        text_dataset(preset("smoke"))


def test_a_table_of_what_was_written_beside_all_references(small):
    _, _, dataset = small
    table = beside(Parrot(dataset, {FACTS[0]: "A is B ."}), dataset)
    assert table.context.tolist() == list(FACTS) and table.written.tolist() == ["A is B.", ""]
    assert table.references.tolist() == ["A serves good B food . | At A there is B .", "C serves very good D food ."]
    assert len(beside(Parrot(dataset, {}), dataset, contexts=1)) == 1


def test_memory_of_a_client_by_hand():
    """A table of 10 × 4 numbers, a linear layer back to 10: 6 tokens are kept, what went into the layer, its logits."""
    table, linear = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    assert client_memory([table, linear], tokens) == {
        "weights": 4 * 80, "training": 3 * 4 * 80, "activations": 8 * 6 + 4 * 6 * 4 + 4 * 6 * 10,
    }  # fmt: skip
    assert client_memory([table], tokens) == {"weights": 160, "training": 480, "activations": 48}
    for parameter in (*table.parameters(), *linear.parameters()):
        parameter.requires_grad_(False)
    assert client_memory([table], tokens) == {"weights": 160, "training": 0, "activations": 0}


def test_with_adapters_a_client_keeps_moments_of_adapters_alone():
    split = split_decoder("gpt2_tiny", vocabulary=30, width=32, blocks=2, adapter=Adapter(rank=2))
    found = client_memory([split.client], torch.zeros(2, 5, dtype=torch.long))
    assert found["training"] == 3 * 4 * (2 * 2 * 32 + 2 * 32 * 2)  # A and B of queries and values, one block
    assert found["weights"] == tensor_bytes(split.client) and found["activations"] > 0


def test_a_kept_model_is_that_of_the_run(tmp_path):
    """Kept while it is trained; and trained again where the run was stored without it."""
    run, store = run_of(), RunStore(tmp_path)
    history, state = train_state(run, "cpu", progress=False)
    store.save(history, device="cpu")
    name = keep_model(run, store, "cpu")
    assert name == run.hash and model_of(store.root, name).is_file()
    split = nn.ModuleDict({"client": state.clients[0].model, "server": state.servers[0].model})
    kept = whole_state(trained_decoder(run, store, "cpu"))
    for key, tensor in whole_state(split).items():
        assert torch.equal(kept[key], tensor), key


def test_a_run_begins_with_what_another_has_learnt(tmp_path):
    """Its network is the base; its address has the base's digest; a figure may show both."""
    base, store = run_of(), RunStore(tmp_path)
    tuned = run_of(**{"model.pretrained": True, "model.adapter": {"rank": 1}, "rounds": 1})
    with as_pretrained(base, store, "cpu") as root:
        (history,) = store.get([tuned], "cpu", root, progress=False, jobs=1)
        _, state = train_state(tuned, "cpu", root, progress=False)
    numbers = whole_state(trained_decoder(base, store, "cpu"))
    for part in (*state.clients, *state.servers):
        for key, tensor in part.model.state_dict().items():
            assert ".lora_" in key or torch.equal(tensor, numbers[key]), key
    (first,) = store.get([base], "cpu", progress=False)
    assert history.data != first.data and list(tmp_path.glob("fsl_sage-*")) == []
    digests = store.about([base, tuned])["data"]
    assert digests == {"restaurants": first.data, "restaurants, gpt2_tiny pretrained": history.data}


def test_adapters_alone_are_no_base(tmp_path):
    adapted = run_of(**{"model.adapter": {"rank": 1}})
    with (
        pytest.raises(ValueError, match=r"model\.adapter=.*: must be None: a base is trained as a whole"),
        as_pretrained(adapted, RunStore(tmp_path), "cpu"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_difference_decides_if_its_interval_leaves_zero_out():
    assert [verdict_on(1.0, half, -1) for half in (0.9, 1.0, math.nan)] == ["worse", "undecided", "one seed"]
    assert [verdict_on(mean, 0.5, 1) for mean in (1.0, -1.0)] == ["better", "worse"]


def test_differences_are_taken_within_a_seed():
    """Seeds differ by 10, methods by about 1: only pairs show it. t(2, 97.5 %) = 4.3027."""
    runs = [("FSL-SAGE", seed, 10.0 * seed + 1, 0.5) for seed in (1, 2, 3)]
    runs += [("FedAvg", seed, 10.0 * seed + off, 0.5) for seed, off in ((1, 0.0), (2, 0.1), (3, -0.1))]
    table = pd.DataFrame(runs, columns=["label", "seed", "test_perplexity", "bleu"])
    gaps = less_others(table, {"test_perplexity": -1, "bleu": 1}).set_index("value")
    assert gaps.label.tolist() == ["FedAvg"] * 2 and gaps.n.tolist() == [3, 3]
    row = gaps.loc["test_perplexity"]
    assert row.differences == pytest.approx([1.0, 0.9, 1.1]) and row["mean"] == pytest.approx(1.0)
    assert row.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6) and row.verdict == "worse"
    assert gaps.loc["bleu"].verdict == "undecided"
