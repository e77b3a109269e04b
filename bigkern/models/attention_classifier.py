"""The documents' attention classifier: as printed, and with the attention that its name promises."""

from __future__ import annotations

from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers
from bigkern.models.transformer import PADDING

_KERNEL = 3


class AttentionClassifier(nn.Module):
    """As printed: Conv1d 64 with kernel 3 and ReLU, global max pool, dense 64 with ReLU, dense ``classes``.

    Before it stands an embedding, for the document's input is a sequence of vectors. The convolution is padded by one,
    so that a text of a single word has a place to read, and positions without a word are never the maximum.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        dim: int = 64,
        channels: int = 64,
        hidden: int = 64,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        self.embedding = layers.Embedding(vocabulary, dim, padding_idx=PADDING)
        self.conv = layers.Conv1d(dim, channels, _KERNEL, padding=_KERNEL // 2)
        self.activation = layers.ReLU()
        self.classifier = nn.Sequential(layers.Linear(channels, hidden), layers.ReLU(), layers.Linear(hidden, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token numbers, ``PADDING`` where a text has ended -> (N, classes) logits."""
        padding = tokens == PADDING
        # (N, T, dim) seen as (N, dim, T): the convolution reads it as it lies in memory.
        features = self.activation(self.conv(self.embedding(tokens).transpose(1, 2))).transpose(1, 2)
        features = self.attend(features, padding)
        # A text without a single word has the maximum 0.
        longest = features.masked_fill(padding.unsqueeze(2), float("-inf")).amax(1)
        return self.classifier(longest.masked_fill(padding.all(1, keepdim=True), 0.0))

    def attend(self, features: Tensor, padding: Tensor) -> Tensor:
        """What the pooling sees of (N, T, channels) features: here the features themselves."""
        return features


class SelfAttentionClassifier(AttentionClassifier):
    """The attention classifier with self-attention between convolution and pooling.

    Each position sees all words of the text, weighted; the result is added to the features and normed.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        dim: int = 64,
        channels: int = 64,
        hidden: int = 64,
        heads: int = 4,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__(vocabulary, classes, dim=dim, channels=channels, hidden=hidden, layers=layers)
        self.attention = layers.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = layers.AddLayerNorm(channels)

    def attend(self, features: Tensor, padding: Tensor) -> Tensor:
        if not features.numel():
            return features  # torch's attention cannot reshape the mask of no texts at all
        # A text without a single word still needs a position to look at: softmax over none is NaN.
        mask = padding.clone()
        mask[:, :1] = False
        attended, _ = self.attention(features, features, features, key_padding_mask=mask, need_weights=False)
        return self.norm(attended, features)[0]
