"""The documents' Transformers: the classifier of texts and the one that reads a sequence of features."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers
from bigkern.nn import PositionalEncoding

PADDING = 0  # the token number that fills a short text up to its batch's length

# Activations by the names that configurations of pretrained models use.
_ACTIVATIONS = {
    "relu": ("ReLU", {}),
    "gelu": ("GELU", {}),
    "gelu_new": ("GELU", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("GELU", {"approximate": "tanh"}),
    "silu": ("SiLU", {}),
    "swish": ("SiLU", {}),
}


def feed_forward_layers(dim: int, hidden: int, activation: str, layers: Layers) -> nn.Sequential:
    """Dense ``hidden``, the activation of that name, dense ``dim``."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    layer, arguments = _ACTIVATIONS[activation]
    return nn.Sequential(layers.Linear(dim, hidden), getattr(layers, layer)(**arguments), layers.Linear(hidden, dim))


def initial_spread(dim: int) -> float:
    """The spread of BERT's and GPT-2's first weights: 0.02 at their 768 features, and with fewer features as much more
    as keeps the layers' outputs of one size.

    With 0.02 at 64 features attention looks everywhere alike, and the first hundreds of steps of a GPT learn no more
    than pairs of characters tell: 3.48 bits a character after 200,000 characters of the library; so 3.26.
    """
    return 0.02 * math.sqrt(768 / dim)


def hidden_positions(padding: Tensor) -> Tensor | None:
    """``padding`` (N, T), True where there is no word, as attention's key_padding_mask.

    A text without a single word still needs positions to look at: softmax over none is NaN in torch. And torch's
    attention cannot reshape the mask of no texts at all.
    """
    return padding & ~padding.all(1, keepdim=True) if padding.numel() else None


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward layer; after each, dropout, the residual sum and layer norm in one step.

    (N, T, dim) -> (N, T, dim). ``padding`` (N, T) is True where a position is not to be attended to. Post-norm, as in
    the original paper.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feed_forward: int,
        *,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation: str = "relu",
        eps: float = 1e-5,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        norm = partial(layers.AddLayerNorm, dim, eps=eps, dropout_p=dropout)
        self.attention = layers.MultiheadAttention(dim, heads, dropout=attention_dropout, batch_first=True)
        self.attention_norm = norm()
        self.feed_forward = feed_forward_layers(dim, feed_forward, activation, layers)
        self.feed_forward_norm = norm()

    def forward(self, inputs: Tensor, padding: Tensor | None = None) -> Tensor:
        attended, _ = self.attention(inputs, inputs, inputs, key_padding_mask=padding, need_weights=False)
        normed, _ = self.attention_norm(attended, inputs)
        output, _ = self.feed_forward_norm(self.feed_forward(normed), normed)
        return output


class TransformerClassifier(nn.Module):
    """The documents' Transformer classifier: embedding 64, block of 8 heads and feed-forward 512, dense ``classes``.

    Between embedding and block stands the positional encoding, and between block and dense layer the mean over the
    positions that hold text (the document names neither; without the first the order of the words is lost).
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        dim: int = 64,
        heads: int = 8,
        feed_forward: int = 512,
        blocks: int = 1,
        dropout: float = 0.1,
        max_length: int = 512,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        self.embedding = layers.Embedding(vocabulary, dim)
        self.position = PositionalEncoding(dim, dropout, max_length, batch_first=True)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, feed_forward, dropout=dropout, layers=layers) for _ in range(blocks)
        )
        self.output = layers.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token numbers, ``PADDING`` where a text has ended -> (N, classes) logits."""
        padding = tokens == PADDING
        # A text without a single word still needs a position to look at: softmax over none is NaN.
        padding[:, :1] = False
        # torch's attention cannot reshape the mask of no texts at all.
        mask = padding if tokens.numel() else None
        hidden = self.position(self.embedding(tokens))
        for block in self.blocks:
            hidden = block(hidden, mask)
        kept = (~padding).unsqueeze(2).to(hidden.dtype)
        return self.output((hidden * kept).sum(1) / kept.sum(1))


class FeatureTransformer(nn.Module):
    """The documents' feature Transformer: a linear embedding of features, positions, attention, a linear output.

    ``n_layers`` layers of multi-head attention with dropout 0.1, each followed by dropout, the residual sum and layer
    norm; the document names neither, and without them the second layer hardly sees the features. Its example is
    ``FeatureTransformer(100, 20, 256, 2, 4)`` with sequences of up to 10 steps.

    Raises:
        ValueError: ``hidden_dim`` is no multiple of ``n_heads``; a call with other features, or with more steps than
            ``max_length``.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        n_layers: int,
        n_heads: int,
        *,
        dropout: float = 0.1,
        max_length: int = 10,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        if hidden_dim % n_heads:
            raise ValueError(f"hidden_dim: {hidden_dim} is no multiple of n_heads, {n_heads}; each head has as many")
        self.input_dim = input_dim
        self.embedding = layers.Linear(input_dim, hidden_dim)
        self.position = PositionalEncoding(hidden_dim, dropout, max_length, batch_first=True)
        self.attention = nn.ModuleList(
            layers.MultiheadAttention(hidden_dim, n_heads, dropout=dropout, batch_first=True) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(layers.AddLayerNorm(hidden_dim, dropout_p=dropout) for _ in range(n_layers))
        self.output = layers.Linear(hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, input_dim) -> (N, T, output_dim), an answer at each step that has seen all of them."""
        if features.dim() != 3 or features.shape[2] != self.input_dim:
            raise ValueError(f"features: expected (N, T, {self.input_dim}), got {tuple(features.shape)}")
        hidden = self.position(self.embedding(features))
        for attention, norm in zip(self.attention, self.norms, strict=True):
            attended, _ = attention(hidden, hidden, hidden, need_weights=False)
            hidden, _ = norm(attended, hidden)
        return self.output(hidden)
