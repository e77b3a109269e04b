"""The documents' Transformer classifier."""

from __future__ import annotations

from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers
from bigkern.nn import PositionalEncoding

PADDING = 0  # the token number that fills a short text up to its batch's length


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward layer; after each, dropout, the residual sum and layer norm in one step.

    (N, T, dim) -> (N, T, dim). ``padding`` (N, T) is True where a position is not to be attended to. Post-norm, as in
    the original paper.
    """

    def __init__(
        self, dim: int, heads: int, feed_forward: int, *, dropout: float = 0.1, layers: Layers = BIGKERN
    ) -> None:
        super().__init__()
        self.attention = layers.MultiheadAttention(dim, heads, batch_first=True)
        self.attention_norm = layers.AddLayerNorm(dim, dropout_p=dropout)
        self.feed_forward = nn.Sequential(
            layers.Linear(dim, feed_forward), layers.ReLU(), layers.Linear(feed_forward, dim)
        )
        self.feed_forward_norm = layers.AddLayerNorm(dim, dropout_p=dropout)

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
