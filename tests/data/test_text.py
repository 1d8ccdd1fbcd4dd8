"""Text as data: vocabularies against tiktoken, damaged files, masks, packing, partitions, addresses."""

import base64
import csv
import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsl_sage.config.experiment import Experiment
from fsl_sage.core import refusal
from fsl_sage.data import sources, vocabulary
from fsl_sage.data.batches import ClientData, trimmed
from fsl_sage.data.sources import load
from fsl_sage.data.text import Pair, Texts, masked, packed, read_pairs, with_bars
from fsl_sage.data.vocabulary import byte_pairs, find_ranks, word_vocabulary
from fsl_sage.experiments.digests import data_digest
from fsl_sage.experiments.setup import client_data, prepare

some = settings(deadline=None, max_examples=80, derandomize=True)
CPU = torch.device("cpu")
JOINS = ("t h", "th e", "Ġ the", "i n")  # the pairs of a small vocabulary, in the form of vocab.bpe


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No data set of this machine gets into a test unless it asks for one."""
    monkeypatch.delenv("FSL_SAGE_DATA", raising=False)
    monkeypatch.setattr(sources, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)


def write_ranks(folder, form):
    """A vocabulary of 256 bytes and four pairs, in one of the three forms."""
    characters = vocabulary._bytes_of_characters()
    names = [*characters, *(join.replace(" ", "") for join in JOINS)]
    pieces = [bytes(characters[c] for c in name) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    if form == "lines":
        rows = (f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
        (folder / "gpt2.tiktoken").write_text("".join(rows))
    else:
        first, second = {"openai": ("vocab.bpe", "encoder.json"), "hub": ("merges.txt", "vocab.json")}[form]
        (folder / first).write_text("#version: 0.2\n" + "\n".join(JOINS) + "\n", encoding="utf-8")
        (folder / second).write_text(json.dumps({name: rank for rank, name in enumerate(names)}))
    return hashlib.sha256(b"\n".join(map(base64.b64encode, pieces))).hexdigest()


@pytest.mark.parametrize("form", ["lines", "openai", "hub"])
@pytest.mark.parametrize("where", ["", "gpt2", "gpt2-medium"])
def test_byte_pairs_from_each_form_and_place(tmp_path, monkeypatch, form, where):
    monkeypatch.setattr(vocabulary, "GPT2_RANKS", write_ranks(tmp_path / where, form))
    words = byte_pairs(tmp_path)
    the = 256 + JOINS.index("Ġ the")
    assert words.encode(" the in")[0] == the and words.encode(" the in")[-1] == 256 + JOINS.index("i n")
    text = "the thin\n\n  café, £20 <|endoftext|>"
    assert words.decode([*words.encode(text), words.end, the]) == text and max(words.encode(text)) < words.end
    assert (words.size, words.end) == (50257, 50256)


def test_a_missing_or_foreign_vocabulary_is_a_search_report(tmp_path, monkeypatch):
    report = refusal(find_ranks, tmp_path, kind=FileNotFoundError)
    for word in ("gpt2.tiktoken", "vocab.bpe and encoder.json", str(tmp_path / "gpt2"), "FSL_SAGE_DATA"):
        assert word in report
    write_ranks(tmp_path, "openai")
    assert "that are not GPT-2's" in refusal(find_ranks, tmp_path)
    (tmp_path / "encoder.json").write_text('{"!": 7}')
    assert "does not number the pieces" in refusal(find_ranks, tmp_path)
    (tmp_path / "gpt2.tiktoken").write_bytes(bytes(vocabulary.LARGEST_RANKS + 1))
    assert "at most" in refusal(find_ranks, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert "pip install 'fsl_sage[text]'" in refusal(byte_pairs, tmp_path, kind=ModuleNotFoundError)


@some
@given(st.lists(st.text(max_size=30), max_size=6), st.text(max_size=30))
def test_words_are_read_back(texts, other):
    words = word_vocabulary(texts)
    for text in texts:
        tokens = words.encode(text)
        assert 1 not in tokens and words.encode(words.decode(tokens)) == tokens
    assert all(0 < token < words.size for token in words.encode(other))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("name", "content", "said"), [
    ("train.csv", "meaning,text\n", "first line='meaning,text'"),
    ("train.csv", "mr,ref\nThe Mill,A pub.\n", "is no meaning representation"),
    ("train.csv", 'mr,ref\n"name[A],"b\n', "line 2: "),
    ("train.csv", "mr,ref\n", "holds no text"),
    ("train.jsonl", "{}\n", "must have the same two"),
    ("train.jsonl", '{"a": "1", "b": ["2"]}\n', "line 1 is no object of texts"),
    ("train.jsonl", '["a", "b"]\n', "line 1 is no object of texts"),
    ("train.jsonl", "not JSON\n", "line 1 is no JSON"),
    ("train.jsonl", "[" * 10**5, "cannot be read"),
    ("train.jsonl", '{"a": "1", "b": "2"}\n{"a": "1", "c": "2"}\n', "line 2 has the fields a, c"),
    ("train.txt", "a || b\nc\n", "line 2 has no ||"),
    ("train.txt", "caf\udce9", "codec can't decode"),
    ("train.txt", "x" * (2**20 + 1), "a line has more than"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    message = refusal(read_pairs, path)
    assert str(path) in message and said in message and message.endswith(".")


@some
@given(st.binary(max_size=200), st.sampled_from(["train.csv", "train.jsonl", "train.txt"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        assert all(isinstance(part, str) for pair in read_pairs(path) for part in pair)
    except ValueError as error:
        assert str(path) in str(error)


def test_all_forms_of_files_hold_the_same_pairs(tmp_path):
    pairs = [("name[The Mill], eatType[pub]", "A pub, The Mill."), ("name[Oven], priceRange[£20-25]", 'An "oven".')]
    with open(tmp_path / "train.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *pairs])
    rows = [
        {"mr": with_bars(mr), "ref": ref, "who": name}
        for (mr, ref), name in zip(pairs, ("The Mill", "Oven"), strict=True)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = "".join(f"{row['mr']}||{row['ref']}\r\n" for row in rows)
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + lora.encode())
    found = {read_pairs(tmp_path / name) for name in ("train.csv", "train.jsonl", "train.txt")}
    ((first, second),) = found
    assert first == ("name : The Mill | Type : pub", "A pub, The Mill.", "The Mill")
    assert second == ("name : Oven | price : £20-25", 'An "oven".', "Oven")


def folder_of(root, name="own", test="a||b\n", **files):
    (root / name).mkdir(parents=True)
    for stem, content in ({"train": "a||b c\nd||e\n", "test": test} | files).items():
        (root / name / f"{stem}.txt").write_text(content)
    return root


def test_a_folder_of_text_is_found_by_name_and_addressed_by_what_it_says(tmp_path):
    data = load("own", folder_of(tmp_path), download=False)
    assert data.train.x.shape == (2, 5) and data.digest == data_digest("own", tmp_path) == data.texts.digest
    (tmp_path / "own" / "train.txt").write_text("a||b d\nd||e\n")
    assert data_digest("own", tmp_path) == load("own", tmp_path).digest != data.digest
    (tmp_path / "own" / "test.txt").unlink()
    assert data_digest("own", tmp_path) is None
    report = refusal(load, "e2e", tmp_path, kind=FileNotFoundError)
    assert "testset_w_refs.csv" in report and str(tmp_path / "e2e") in report


def test_a_changed_file_of_text_is_noticed_though_its_digest_is_kept(tmp_path, monkeypatch):
    """The files' stamp is part of what is kept: a folder of text once had none, and any two looked alike."""
    from fsl_sage.experiments import digests

    monkeypatch.setattr(digests, "user_cache_dir", lambda name: str(tmp_path / "kept"))
    monkeypatch.setattr(digests, "SETTLED", 0.0)
    first = data_digest("own", folder_of(tmp_path))
    assert data_digest("own", tmp_path) == first
    (tmp_path / "own" / "test.txt").write_text("a||c\n")
    assert data_digest("own", tmp_path) != first


@pytest.mark.slow
def test_one_long_line_among_many_does_not_fill_memory(tmp_path):
    folder_of(tmp_path, train="a||b\n" * 300_000 + f"a||{'b ' * 600}\n")
    assert "times as many" in refusal(load, "own", tmp_path)
    assert load("own", tmp_path, seq_len=8).train.x.shape == (300_001, 8)


# ---------------------------------------------------------------- tokens, targets, masks


def plainly(context, completion, seq_len, objective):
    """The table of the notebook, position by position."""
    tokens, n = context + completion, len(context)
    rows = []
    for i in range(min(seq_len, len(tokens))):
        last = i == len(tokens) - 1
        counts = not last and (objective == "jlm" or i >= n - 1)
        rows.append((tokens[i], 0 if last else tokens[i + 1], int(counts)))
    return [list(column) for column in zip(*rows, strict=True)]


tokens = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@some
@given(st.lists(st.integers(1, 50), max_size=8), tokens, st.integers(2, 20), st.sampled_from(["clm", "jlm"]))
def test_masks_are_those_of_the_table(context, completion, seq_len, objective):
    assert masked(context, completion, seq_len, objective).tolist() == plainly(context, completion, seq_len, objective)


def test_masks_are_those_of_the_released_code():
    """The first and third sample of client 0 in the traces of the released code: 12 tokens, context 3 and 5."""
    first = masked([16, 65, 29], [90, 94, 30, 9, 74, 1, 41, 37], 12)
    assert first[1].tolist() == [65, 29, 90, 94, 30, 9, 74, 1, 41, 37, 0]
    assert first[2].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    cut = masked([1, 2, 3, 4, 5], [6, 7, 8, 9, 13, 66, 32, 58], 12)
    assert cut[0][-3:].tolist() == [13, 66, 32] and cut[1][-3:].tolist() == [66, 32, 58]
    assert cut[2].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


@some
@given(st.lists(tokens, min_size=1, max_size=12), st.integers(2, 9))
def test_packed_text_predicts_each_token_once(paragraphs, seq_len):
    samples = list(packed(paragraphs, seq_len))
    whole = [token for paragraph in paragraphs for token in paragraph]
    assert [int(t) for s in samples for t in s[1][s[2] == 1]] == whole[1:]
    assert all(s.shape[1] == seq_len for s in samples[:-1]) and all(s.shape[1] <= seq_len for s in samples)


@some
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6))
def test_trimmed_batches_lose_nothing_that_counts(pairs):
    rows = [masked(*pair, 30) for pair in pairs]
    x, y = np.zeros((len(rows), 30), np.int32), np.zeros((len(rows), 2, 30), np.int32)
    for i, row in enumerate(rows):
        x[i, : row.shape[1]], y[i, :, : row.shape[1]] = row[0], row[1:]
    short, labels = trimmed(torch.from_numpy(x), torch.from_numpy(y))
    assert labels[:, 1].sum() == y[:, 1].sum() and short.dtype == labels.dtype == torch.int64
    assert labels[:, 1, -1].any() or not y[:, 1].any()
    assert torch.equal(short, torch.from_numpy(x)[:, : short.shape[1]].long())


# ---------------------------------------------------------------- clients


def federation(**changes):
    words = {"model.name": "gpt2_tiny", "dataset.name": "restaurants", "num_clients": 5}
    return Experiment().replace(**words | changes)


@pytest.mark.parametrize("distribution", ["iid", "by_length", "by_key", "noniid_dirichlet", "noniid"])
def test_text_is_shared_out(distribution):
    experiment = federation(**{"dataset.distribution": distribution, "dataset.shard_num": 2, "dataset.val_size": 100})
    dataset, validation = prepare(experiment, CPU)
    clients = client_data(experiment, dataset)
    assert len(validation) == 100 and 1850 <= sum(map(len, clients)) <= 1900
    rows = [tuple(row.tolist()) for client in clients for row in client.images.x]
    assert len(set(rows)) == len(rows)
    if distribution == "by_key":
        owners = [set(client.images.keys.tolist()) for client in clients]
        assert not any(one & other for one, other in pairwise(owners)) and set.union(*owners) == set(range(20))
    x, y = next(clients[0].batches(0))
    assert x.shape == (256, y.shape[2]) and y.shape[:2] == (256, 2)


def test_seeds_of_text_are_those_of_images():
    """The order of an epoch depends on seed, client, round and epoch alone."""
    food = load("restaurants", max_train=64)
    make = [ClientData(food.train, food.mean, food.std, food.num_classes, 64, seed=7, client=c) for c in (0, 0, 1)]
    one, again, other = (next(data.batches(3))[0] for data in make)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(("changes", "said"), [
    ({"dataset.distribution": "by_key", "num_clients": 21}, "num_clients=21: must be at most 20, the number of keys"),
    ({"dataset.rgb32": True}, "dataset.rgb32=True: must be False for 'restaurants'"),
    ({"dataset.vocabulary": "word"}, "did you mean 'words'"),
    ({"dataset.objective": "mlm"}, "dataset.objective='mlm': must be one of clm, jlm"),
    ({"dataset.seq_len": 1}, "dataset.seq_len=1: must be at least 2"),
    ({"dataset.seq_len": 4}, "dataset.seq_len=4: must be so large that"),
    ({"model.name": "resnet18", "dataset.name": "fmnist_mini", "dataset.distribution": "by_length"}, "images, which"),
])  # fmt: skip
def test_wishes_that_cannot_be_met(changes, said):
    def run():
        experiment = federation(**changes)
        client_data(experiment, prepare(experiment, CPU)[0])

    assert said in refusal(run)


def test_settings_of_text_are_part_of_the_address_and_the_old_ones_are_left_out():
    experiment = federation()
    assert {"vocabulary", "seq_len", "objective"}.isdisjoint(experiment.to_dict()["dataset"])
    changed = [{"dataset.vocabulary": "gpt2"}, {"dataset.seq_len": 64}, {"dataset.objective": "jlm"}]
    assert len({experiment.hash, *(experiment.replace(**change).hash for change in changed)}) == 4


def test_tokens_may_come_as_arrays(tmp_path):
    """A plug-in's own tokenizer gives arrays; what the tokens mean is not known."""
    rows = np.array([[5, 6, 2, 7, 2, 0]] * 3)
    labels = np.stack([np.roll(rows, -1, 1), np.array([[0, 0, 1, 1, 0, 0]] * 3)], 1)
    np.savez(tmp_path / "own.npz", x_train=rows, y_train=labels, x_test=rows[:1], y_test=labels[:1])
    data = load("own", tmp_path)
    assert data.train.is_text and data.num_classes == 8 and data.vocabulary is None and data.mean == ()
    assert data.digest == data_digest("own", tmp_path)


def test_a_data_set_may_be_made_of_texts(monkeypatch):
    texts = Texts((Pair("a", "b c"), Pair("d", "e")), (Pair("a", "b"),))
    monkeypatch.setitem(sources.MADE, "made", lambda root: texts)
    assert load("made").digest == texts.digest == data_digest("made")
    monkeypatch.setitem(sources.MADE, "made", lambda root: Texts((), ()))
    assert "or Texts" in refusal(load, "made")
