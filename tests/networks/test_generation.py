"""Greedy and beam search against brute force and transformers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from fsl_sage.core import generator
from fsl_sage.data.sources import load
from fsl_sage.networks.generation import BEAM, answers, next_token, repeating, write

some = settings(deadline=None, max_examples=40, derandomize=True)


def random_table(seed, words):
    return torch.rand(words, words, generator=generator(seed, "table"), dtype=torch.double).softmax(1)


def every_output(table, context, most, alpha, no_repeat):
    """All outputs there are, with their scores; token 0 ends one."""
    for n in range(1, most + 1):
        for output in itertools.product(range(len(table)), repeat=n):
            whole = n == most or output[-1] == 0
            if whole and 0 not in output[:-1]:
                if any(output[i] in repeating(list(output[:i]), no_repeat) for i in range(n)):
                    continue
                chain = [context[-1], *output]
                logs = sum(math.log(table[a, b]) for a, b in itertools.pairwise(chain))
                yield logs / n**alpha, [token for token in output if token]


@some
@given(st.integers(0, 999), st.sampled_from([0.0, 0.8, 1.5]), st.sampled_from([0, 1, 2]))
def test_with_beams_enough_the_best_of_all_outputs_is_found(seed, alpha, no_repeat):
    table = random_table(seed, 4)
    found = write(next_token(table), [[1], [2, 3]], [0], 4, 256, alpha, no_repeat)
    for context, output in zip(([1], [2, 3]), found, strict=True):
        outputs = list(every_output(table, context, 4, alpha, no_repeat))
        best = max(score for score, _ in outputs)  # the same words in another order may score the same
        assert max(score for score, one in outputs if one == output) == pytest.approx(best, abs=1e-5)


@some
@given(st.integers(0, 999), st.integers(1, 8))
def test_greedy_takes_the_likeliest_token_each_time(seed, most):
    table, token, expected = random_table(seed, 6), 3, []
    while len(expected) < most and (token := int(table[token].argmax())):
        expected.append(token)
    assert write(next_token(table), [[3]], [0], most) == [expected]


def tiny(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "vocab_size": 30,
            "n_positions": 40,
            "n_embd": 16,
            "n_head": 2,
            "n_layer": 2,
            "initializer_range": 0.5,
        }
        return GPT2LMHeadModel(GPT2Config(**config | changes, bos_token_id=0, eos_token_id=0)).eval()


def test_contexts_of_unequal_length_beside_each_other_are_as_alone():
    model = tiny()
    contexts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 3]]
    for options in ({}, BEAM):
        together = write(lambda x: model(x).logits, contexts, [0], 12, **options)
        alone = [write(lambda x: model(x).logits, [context], [0], 12, **options)[0] for context in contexts]
        assert together == alone and any(len(output) > 3 for output in together)


def test_greedy_is_that_of_transformers():
    model = tiny()
    for context in ([5, 6, 7], [8], [9, 10, 11]):
        theirs = model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        ours = write(lambda x: model(x).logits, [context], [0], 12)[0]
        assert ours == [token for token in theirs[len(context) :].tolist() if token]


def test_no_sequence_is_repeated():
    model = tiny()
    plain, careful = (write(lambda x: model(x).logits, [[4, 4]], [], 30, no_repeat=k)[0] for k in (0, 2))

    def pairs(output):
        return list(itertools.pairwise(output))

    assert len(set(pairs(plain))) < 29 and len(set(pairs(careful))) == 29 == len(pairs(careful))


def test_answers_are_texts_and_leave_the_model_as_it_was():
    words = load("restaurants", max_train=10, max_test=10).vocabulary

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(words.size, words.size))

        def forward(self, x):
            assert not self.training
            return self.table[x]

    model = Model().train()
    with torch.no_grad():
        chain = [words.end, *words.encode("Stone Oven is a pub."), words.end]
        for a, b in itertools.pairwise(chain):
            model.table[a, b] = 20.0
    said = answers(model, words, ["name : Stone Oven", "Type : pub"], at_once=3, beams=2)
    assert said == ["Stone Oven is a pub."] * 2 and model.training


@pytest.mark.parametrize(("changes", "said"), [
    ({"beams": 0}, "beams=0"), ({"most": 0}, "most=0"), ({"length_penalty": -1}, "length_penalty=-1"),
    ({"no_repeat": 1.5}, "no_repeat=1.5"), ({"contexts": [[]]}, "contexts="),
])  # fmt: skip
def test_settings_out_of_range(changes, said):
    with pytest.raises(ValueError, match=said):
        write(next_token(random_table(0, 3)), **({"contexts": [[1]], "ends": [0]} | changes))
