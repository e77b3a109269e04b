from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from bigkern.models import AttentionClassifier, SelfAttentionClassifier

both = pytest.mark.parametrize("make", [AttentionClassifier, SelfAttentionClassifier])


def test_the_documents_sizes():
    model = AttentionClassifier(100, 5)
    assert (model.conv.out_channels, model.conv.kernel_size) == (64, (3,))
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [(64, 64), (64, 5)]


def test_it_is_what_is_printed():
    model = AttentionClassifier(11, 3)
    text = torch.randint(1, 11, (2, 7))
    features = functional.relu(
        functional.conv1d(model.embedding(text).mT, model.conv.weight, model.conv.bias, padding=1)
    )
    torch.testing.assert_close(model(text), model.classifier(features.amax(2)))


@both
def test_padding_changes_nothing(make):
    model = make(11, 3)
    text = torch.randint(1, 11, (2, 5))
    padded = torch.cat([text, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(text), model(padded), rtol=1e-4, atol=1e-5)


@both
def test_a_text_without_words_gives_numbers_not_nan(make):
    model = make(11, 3)
    logits = model(torch.zeros(2, 4, dtype=torch.int64))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_attention_sees_beyond_the_convolution():
    """A word far away changes what a position gives to the pooling: through attention alone."""
    text, other = torch.ones(1, 12, dtype=torch.int64), torch.ones(1, 12, dtype=torch.int64)
    other[0, 11] = 5
    for make, sees in ((AttentionClassifier, False), (SelfAttentionClassifier, True)):
        model, seen = make(11, 3), []
        attend = model.attend
        model.attend = lambda features, padding, attend=attend, seen=seen: (
            seen.append(attend(features, padding)) or seen[-1]
        )
        for tokens in (text, other):
            model(tokens)
        assert (not torch.equal(seen[0][0, 0], seen[1][0, 0])) == sees
