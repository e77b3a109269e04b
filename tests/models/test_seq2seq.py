"""The encoder-decoder Transformer: teacher forcing, greedy and beam decoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bigkern.models import BIGKERN, TORCH, Seq2SeqTransformer
from bigkern.models.seq2seq import END, START

VOCABULARY = 7


def small(**arguments):
    model = Seq2SeqTransformer(11, VOCABULARY, **{**dict(dim=16, feed_forward=24, max_length=12), **arguments})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # as drawn at first, it would repeat itself
    return model.eval()


def source(*shape):
    return torch.randint(3, 11, shape, generator=torch.Generator().manual_seed(1))


def target(*shape):
    text = torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
    text[:, 0] = START
    return text


def step_by_step(model, text, limit):
    """Greedy decoding as it is told: the likeliest next token of each text, until its end."""
    rows = []
    for row in text.unsqueeze(1):
        written = [START]
        while len(written) <= limit and written[-1] != END:
            logits = model(row, torch.tensor([written]))[0, -1]
            logits[[0, START]] = -math.inf
            written.append(int(logits.argmax()))
        rows.append(written[1:])
    return rows


def score(model, text, written):
    """The sum of the logarithms of the chances of ``written``, up to its end."""
    written = [*itertools.takewhile(lambda token: token not in (0, END), written), *([END] if END in written else [])]
    with torch.no_grad():
        logits = model(text, torch.tensor([[START, *written[:-1]]]))[0]
    return float(logits.log_softmax(-1)[range(len(written)), written].sum())


def test_greedy_is_the_likeliest_token_at_each_step():
    model, text = small(), source(5, 6)
    text[1, 4:] = 0
    written = model.greedy(text)
    expected = step_by_step(model, text, 12)
    assert written.shape[1] == max(map(len, expected))
    assert [row[: len(e)] for row, e in zip(written.tolist(), expected, strict=True)] == expected
    assert all(not any(row[len(e) :]) for row, e in zip(written.tolist(), expected, strict=True))
    assert torch.equal(model.greedy(text, 3), written[:, :3])


def test_beams():
    model, text = small(), source(5, 6)
    one, four = model.beam(text, 1), model.beam(text, 4)
    assert torch.equal(one.tokens[:, 0], model.greedy(text))
    assert four.tokens.shape[:2] == four.scores.shape == (5, 4)
    assert (four.scores.diff() <= 0).all()
    assert (four.scores[:, 0] >= one.scores[:, 0] - 1e-5).all()
    assert not torch.equal(four.tokens[:, 0, : one.tokens.shape[2]], one.tokens[:, 0])
    for row, beams, scores in zip(text, four.tokens.tolist(), four.scores.tolist(), strict=True):
        assert len(set(map(tuple, beams))) == 4
        for written, found in zip(beams, scores, strict=True):
            assert score(model, row[None], written) == pytest.approx(found, abs=1e-3)


def check_cache(model, text):
    text[1, 3:] = 0
    text[2] = 0  # no word at all
    assert torch.equal(model.greedy(text, 5), model.greedy(text, 5, use_cache=False))
    with_cache, without = model.beam(text, 3, 6), model.beam(text, 3, 6, use_cache=False)
    assert torch.equal(with_cache.tokens, without.tokens)
    torch.testing.assert_close(with_cache.scores, without.scores, rtol=1e-4, atol=1e-4)


def test_the_cache_changes_no_token(backend, device):
    check_cache(small().to(device), source(3, 6).to(device))


def test_the_cache_of_a_model_of_torchs_layers():
    model, text = small(layers=TORCH, decoder_blocks=3), source(4, 6)
    check_cache(model, text)
    assert torch.equal(model.greedy(text), model.greedy(text, use_cache=False))


def test_enough_beams_find_the_best_of_all():
    model, text = small(), source(3, 4)
    for row in text:
        every = itertools.product(range(2, VOCABULARY), repeat=3)
        cut = {tuple(itertools.takewhile(lambda t: t != END, e)) for e in every}
        best = max(score(model, row[None], [*e, *([END] if len(e) < 3 else [])]) for e in cut)
        assert float(model.beam(row[None], 25, 3).scores[0, 0]) == pytest.approx(best, abs=1e-3)


def test_teacher_forcing_sees_no_target_ahead():
    for layers in (BIGKERN, TORCH):
        model, text, written = small(layers=layers), source(3, 6), target(3, 8)
        other = written.clone()
        other[:, 5:] = 6
        torch.testing.assert_close(model(text, written)[:, :5], model(text, other)[:, :5])
        assert not torch.allclose(model(text, written)[:, 5:], model(text, other)[:, 5:])


def test_padding_changes_nothing():
    model, text, written = small(), source(3, 6), target(3, 6)
    padded = torch.nn.functional.pad(torch.stack([text, written], 1), (0, 3))
    torch.testing.assert_close(model(padded)[:, :6], model(text, written), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.greedy(padded[:, 0]), model.greedy(text))


def test_the_edges():
    model, text = small(), source(2, 6)
    assert model.beam(text[:0], 2).scores.shape == (0, 2)
    assert torch.isfinite(model(torch.zeros_like(text), target(2, 4))).all()
    model.train()
    model.greedy(text)
    assert model.training
    for call, message in (
        (lambda: model.beam(text, 0), "beams: expected 1 or more, got 0"),
        (lambda: model.greedy(text, 13), "max_length: expected 1 to 12, got 13"),
        (lambda: model(text), r"source: shape \(2, 6\); expected \(N, 2, T\)"),
        (lambda: model.greedy(source(1, 13)), "13 positions, but max_len is 12"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
