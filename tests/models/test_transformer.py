from __future__ import annotations

import pytest
import torch

from bigkern.models import TransformerClassifier


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="600 positions, but max_len is 512"):
        TransformerClassifier(11, 3)(torch.ones(1, 600, dtype=torch.int64))


def test_the_documents_sizes():
    model = TransformerClassifier(100, 2)
    assert model.embedding.weight.shape == (100, 64)
    (block,) = model.blocks
    assert block.attention.num_heads == 8
    assert block.feed_forward[0].out_features == 512


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    model = TransformerClassifier(11, 3, dropout=0.0).train(training)
    text = torch.randint(1, 11, (2, 5))
    padded = torch.cat([text, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(text), model(padded), rtol=1e-4, atol=1e-5)


def test_the_order_of_words_matters():
    model = TransformerClassifier(11, 3).eval()
    text = torch.arange(1, 9).unsqueeze(0)
    assert not torch.allclose(model(text), model(text.flip(1)), atol=1e-3)


def test_a_text_without_words_gives_numbers_not_nan():
    model = TransformerClassifier(11, 3)
    logits = model(torch.zeros(2, 4, dtype=torch.int64))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
