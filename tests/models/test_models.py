"""All models: shapes, the torch.nn twin with the same weights, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bigkern
from bigkern.models import (
    CNN,
    GPT,
    MODELS,
    TORCH,
    AttentionClassifier,
    Autoencoder,
    BERTForSequenceClassification,
    ConvAutoencoder,
    FeatureTransformer,
    GRUModel,
    LogSoftmaxCNN,
    LSTMModel,
    MLPNet,
    RNNModel,
    SelfAttentionClassifier,
    Seq2SeqTransformer,
    SmallCNN,
    TransformerClassifier,
    layer_kinds,
    layer_runs,
)
from bigkern.training.metrics import training_loss


def images(*shape):
    return torch.rand(shape)


def tokens(*shape, below=11):
    return torch.randint(1, below, shape)


# Without dropout, so that so few steps suffice.
SMALL_BERT = {"dim": 16, "heads": 2, "blocks": 1, "feed_forward": 32, "dropout": 0.0, "attention_dropout": 0.0}
FEATURES = {"input_dim": 5, "output_dim": 3, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0}
PAIRS = {"source_vocabulary": 11, "target_vocabulary": 7, "dim": 32, "feed_forward": 64}

# model, arguments, inputs, shape of the logits
CASES = {
    "cnn": (CNN, {"input_shape": (3, 21, 19), "classes": 5}, images(4, 3, 21, 19), (4, 5)),
    "cnn-small": (SmallCNN, {}, images(4, 1, 28, 28), (4, 10)),
    "cnn-log-softmax": (LogSoftmaxCNN, {"input_shape": (1, 9, 8)}, images(4, 1, 9, 8), (4, 10)),
    "gru": (GRUModel, {"vocabulary": 11, "classes": 7}, tokens(4, 9), (4, 9, 7)),
    "gru-tagger": (GRUModel, {"vocabulary": 11, "classes": 7}, tokens(4, 9), (4, 9, 7)),
    "rnn": (RNNModel, {"features": 12, "classes": 5}, images(4, 2, 9, 6), (4, 5)),
    "lstm": (LSTMModel, {"vocabulary": 11}, tokens(4, 9), (4, 11)),
    "transformer": (TransformerClassifier, {"vocabulary": 11, "classes": 3}, tokens(4, 9), (4, 3)),
    "attention-classifier": (AttentionClassifier, {"vocabulary": 11, "classes": 3}, tokens(4, 9), (4, 3)),
    "self-attention-classifier": (SelfAttentionClassifier, {"vocabulary": 11, "classes": 3}, tokens(4, 9), (4, 3)),
    "autoencoder": (Autoencoder, {"input_shape": (2, 5, 6)}, images(4, 2, 5, 6), (4, 2, 5, 6)),
    "autoencoder-conv": (ConvAutoencoder, {"input_shape": (2, 9, 6)}, images(4, 2, 9, 6), (4, 2, 9, 6)),
    "mlp": (MLPNet, {}, torch.randn(4, 10), (4, 1)),
    "feature-transformer": (FeatureTransformer, FEATURES, torch.randn(4, 9, 5), (4, 9, 3)),
    "seq2seq": (Seq2SeqTransformer, PAIRS, tokens(4, 2, 9, below=7), (4, 9, 7)),
    "bert": (BERTForSequenceClassification, {"vocabulary": 11, "classes": 3, **SMALL_BERT}, tokens(4, 9), (4, 3)),
    "gpt": (GPT, {"vocabulary": 11, "dim": 16, "heads": 2, "blocks": 2}, tokens(4, 9), (4, 9, 11)),
}
every_model = pytest.mark.parametrize("name", CASES)
# What they learn: numbers, not classes.
NUMBERS = {"autoencoder", "autoencoder-conv", "mlp"}


def test_every_model_has_a_case():
    assert CASES.keys() == MODELS.keys()


@every_model
def test_outputs_have_the_documents_shape(name):
    model, arguments, inputs, shape = CASES[name]
    logits = model(**arguments)(inputs)
    assert logits.shape == shape
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@every_model
def test_empty_batch(name):
    model, arguments, inputs, shape = CASES[name]
    assert model(**arguments).eval()(inputs[:0]).shape == (0, *shape[1:])


@every_model
def test_twin_of_torch_gives_the_same_outputs_and_gradients(name):
    model, arguments, inputs, _ = CASES[name]
    ours = model(**arguments).eval()
    twin = model(**arguments, layers=TORCH).eval()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours(inputs), twin(inputs))
    twin.load_state_dict(ours.state_dict())
    assert set(layer_kinds(twin).values()) == {"torch"}
    assert layer_kinds(twin).keys() == layer_kinds(ours).keys()
    torch.testing.assert_close(ours(inputs), twin(inputs), rtol=1e-5, atol=1e-6)
    for side in (ours, twin):
        side(inputs).square().mean().backward()
    for (key, mine), theirs in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)
    # and back again: the weights belong to neither side
    ours.load_state_dict(twin.state_dict())


@every_model
def test_overfits_a_small_batch(name):
    model, arguments, inputs, shape = CASES[name]
    if name in NUMBERS:
        targets = torch.randn(shape) if name == "mlp" else inputs
    elif len(shape) == 3:
        # Of its own position, the token or, where inputs are no tokens, a number made up for it.
        steps = inputs if inputs.shape == shape[:2] else torch.arange(shape[0] * shape[1]).view(shape[:2])
        targets = steps % shape[-1]
    else:
        targets = torch.arange(shape[0]) % shape[-1]
    trained = model(**arguments)
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    losses = []
    for _ in range(300 if name in NUMBERS else 60):
        loss = training_loss(trained(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if name not in NUMBERS:
        assert (trained.eval()(inputs).argmax(-1) == targets).all()


def test_layers_that_bigkern_has_come_from_bigkern():
    kinds = layer_kinds(TransformerClassifier(vocabulary=11, classes=3))
    own = {kind: origin for kind, origin in kinds.items() if hasattr(bigkern.nn, kind)}
    assert own == {"MultiheadAttention": "bigkern", "AddLayerNorm": "bigkern"}
    assert all(origin == "torch" for kind, origin in kinds.items() if not hasattr(bigkern.nn, kind))
    assert layer_kinds(CNN((1, 8, 8), 10, padding=1))["ConvBlock2d"] == "bigkern"
    assert layer_kinds(AttentionClassifier(vocabulary=11, classes=3))["Conv1d"] == "bigkern"
    # attention's own projection is a part of it, not another layer of the model
    assert "NonDynamicallyQuantizableLinear" not in kinds


def test_layer_kinds_follow_the_layers_not_the_model():
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(bigkern.nn.RMSNorm(4)), nn.ReLU())
    assert layer_kinds(model) == {"LayerNorm": "torch", "RMSNorm": "bigkern", "ReLU": "torch"}


def test_layer_runs_names_the_backend_that_ran(backend):
    model = TransformerClassifier(vocabulary=11, classes=3).eval()
    runs = layer_runs(model, tokens(2, 5))
    assert str(runs["MultiheadAttention"]) == str(runs["AddLayerNorm"]) == f"bigkern ({backend})"
    assert str(runs["Linear"]) == "torch.nn"
    runs = layer_runs(CNN((1, 8, 8), 3, padding=1), images(2, 1, 8, 8))
    assert str(runs["ConvBlock2d"]) == f"bigkern ({backend})"


def test_layer_runs_leaves_no_hooks():
    model = TransformerClassifier(vocabulary=11, classes=3).eval()
    with pytest.raises(ValueError, match="max_len is 512"):
        layer_runs(model, tokens(1, 600))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_names_what_is_missing():
    with pytest.raises(AttributeError, match="'torch' has no layer 'Convolution'"):
        TORCH.Convolution  # noqa: B018
