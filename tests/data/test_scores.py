"""BLEU, NIST, ROUGE-L and CIDEr against sacrebleu, nltk and plain loops."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.nist_score import corpus_nist
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from fsl_sage.data.grammar import restaurants
from fsl_sage.data.scores import bleu, cider, common, nist, rouge_l, score_words, scores
from fsl_sage.data.text import references

some = settings(deadline=None, max_examples=60, derandomize=True)
sentence = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9)
corpus = st.lists(st.tuples(sentence, st.lists(sentence, min_size=1, max_size=3)), min_size=1, max_size=6)


def split(pairs):
    return [one for one, _ in pairs], [refs for _, refs in pairs]


def described():
    """Sentences of the grammar, each beside other descriptions of the same restaurant; some with another's words."""
    found = list(references(restaurants().test).values())
    rng = random.Random(1)
    written = [texts[0] if rng.random() < 0.5 else rng.choice(found)[1] for texts in found]
    return written, [texts[1:] for texts in found]


@some
@given(st.text(alphabet="ab1 .,-'!?£()\n:/", max_size=40))
def test_words_are_those_of_mteval(text):
    assert score_words(text) == Tokenizer13a()(text.lower().replace("\n", " ").replace("-\n", "")).split()


@some
@given(corpus)
def test_bleu_is_sacrebleus(pairs):
    written, refs = split(pairs)
    most = max(map(len, refs))
    theirs = BLEU(tokenize="none", smooth_method="none", force=True)
    streams = [[" ".join(r[i]) if i < len(r) else None for r in refs] for i in range(most)]
    found = theirs.corpus_score([" ".join(one) for one in written], streams).score / 100
    assert bleu(written, refs) == pytest.approx(found, abs=1e-12)


def test_bleu_of_real_sentences_is_sacrebleus_to_the_last_digit():
    written, refs = described()
    theirs = BLEU(lowercase=True, tokenize="13a", smooth_method="none").corpus_score(
        written, list(zip(*refs, strict=True))
    )
    assert 0.3 < scores(written, refs)["bleu"] < 0.9
    assert scores(written, refs)["bleu"] == pytest.approx(theirs.score / 100, abs=1e-12)


@some
@given(
    st.lists(st.tuples(st.lists(st.sampled_from("abcde"), min_size=5, max_size=9), sentence), min_size=1, max_size=6)
)
def test_nist_is_nltks_where_there_is_one_reference(pairs):
    written, refs = [one for one, _ in pairs], [[ref] for _, ref in pairs]
    assert nist(written, refs) == pytest.approx(corpus_nist(refs, written, n=5), abs=1e-9)


def test_nist_of_several_references_by_hand():
    """Two references of 2 and 4 words: 'a' is 2 of their 6 words, 'a b' 1 of the 2 a's; the mean length is 3."""
    refs = [[["a", "c"], ["a", "b", "d", "e"]]]
    unigrams = (math.log2(6 / 2) + math.log2(6 / 1)) / 2
    assert nist([["a", "b"]], refs, order=2) == pytest.approx(
        (unigrams + math.log2(2 / 1)) * math.exp(math.log(0.5) * (math.log(2 / 3) / math.log(1.5)) ** 2)
    )


@some
@given(sentence, sentence)
def test_longest_common_subsequence(one, other):
    def within(part, whole):
        left = iter(whole)
        return all(word in left for word in part)

    parts = (part for n in range(len(one) + 1) for part in itertools.combinations(one, n))
    assert common(one, other) == max(len(part) for part in parts if within(part, other))


def test_rouge_l_by_hand():
    """3 of 4 words in order in the first reference, of 6; 2 of 4 in the second, of 2."""
    refs = [["a", "b", "x", "y", "z", "d"], ["c", "d"]]
    precision, recall = 3 / 4, 2 / 2
    found = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l([["a", "b", "c", "d"]], [refs]) == pytest.approx(found)
    assert rouge_l([["q"], ["a"]], [[["a"]], [["a"]]]) == 0.5


def cider_plainly(written, refs):
    """As vectors over all n-grams there are."""
    total = 0.0
    for n in range(1, 5):

        def grams(words, n=n):
            return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

        names = sorted({g for one in [*written, *itertools.chain(*refs)] for g in grams(one)})
        seen = np.array([max(1, sum(any(g in grams(r) for r in rs) for rs in refs)) for g in names])
        idf = math.log(len(written)) - np.log(seen)
        for one, rs in zip(written, refs, strict=True):
            ours = np.array([grams(one).count(g) for g in names]) * idf
            for r in rs:
                theirs = np.array([grams(r).count(g) for g in names]) * idf
                norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
                gap = (len(one) - len(r)) ** 2
                total += (np.minimum(ours, theirs) @ theirs / norm if norm else 0) * math.exp(-gap / 72) / len(rs)
    return 10 * total / 4 / len(written)


@some
@given(corpus)
def test_cider_is_that_of_plain_vectors(pairs):
    assert cider(*split(pairs)) == pytest.approx(cider_plainly(*split(pairs)), abs=1e-9)


def test_a_reference_scores_best():
    written, refs = described()
    ours, perfect = scores(written, refs), scores([texts[0] for texts in refs], refs)
    assert all(perfect[name] > ours[name] > 0 for name in ours) and perfect["bleu"] == pytest.approx(1)
