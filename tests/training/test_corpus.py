from __future__ import annotations

import math

import pytest
import torch

from bigkern.training import corpus


def test_characters_are_the_text_and_files_are_held_out_whole():
    train, held_out = corpus.library_texts()
    read = corpus.library_characters(20_000)
    assert (len(read.train), len(read.held_out)) == (20_000, 2_000)
    assert "".join(read.symbols[number] for number in read.train[:500].tolist() if number) == train[:500]
    assert held_out[:200] not in train
    assert len(train) > 1_000_000 and len(held_out) > len(train) // 20


def test_words_know_the_common_and_not_the_rare():
    read = corpus.library_words(500, words=20_000)
    assert len(read.symbols) == 500 and int(read.train.max()) == 499
    assert read.symbols[1] in set("=.,()'\"")
    assert 0.01 < (read.train == 0).double().mean() < 0.5


def test_windows_are_followed_by_their_targets():
    dataset = corpus.library_windows(32, 10_000)
    assert torch.equal(dataset.train.inputs[:, 1:], dataset.train.targets[:, :-1])
    assert torch.equal(dataset.train.inputs[1:, 0], dataset.train.targets[:-1, -1])
    assert dataset.encoder.length == 32


def test_ngrams_by_hand():
    """a b a b a: after a always b, which was seen 2 times with 1 successor; before that, 3 of 5 are a."""
    train = torch.tensor([0, 1, 0, 1, 0])
    unigram = [(3 + 2 / 3) / 7, (2 + 2 / 3) / 7]  # 5 seen, 2 kinds, uniform over 3 symbols
    bigram = (2 + unigram[1]) / 3
    assert corpus.ngram_bits(train, torch.tensor([0]), 3, 1) == pytest.approx(-math.log2(unigram[0]))
    assert corpus.ngram_bits(train, torch.tensor([0, 1]), 3, 2) == pytest.approx(-math.log2(bigram))
    # a context never seen leaves it to the shorter one
    assert corpus.ngram_bits(train, torch.tensor([2, 1]), 3, 2) == pytest.approx(-math.log2(unigram[1]))


def test_ngrams_are_probabilities():
    tokens = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    for context in ([0, 1], [3, 3]):
        bits = [corpus.ngram_bits(tokens, torch.tensor([*context, symbol]), 4, 3) for symbol in range(4)]
        assert sum(2**-b for b in bits) == pytest.approx(1)


def test_too_long_ngrams_are_refused():
    with pytest.raises(ValueError, match="order: expected 1 or more"):
        corpus.ngram_bits(torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64), 97, 10)
