"""The documents' encoder-decoder Transformer: it reads one sequence and writes another, token by token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers
from bigkern.models.transformer import PADDING, hidden_positions
from bigkern.nn import PositionalEncoding

# The first of the target's tokens, after PADDING.
START, END = 1, 2


class Beams(NamedTuple):
    """tokens (N, beams, T), the best first, ``PADDING`` after ``END``; scores (N, beams): of each, the sum of the
    logarithms of its tokens' chances."""

    tokens: Tensor
    scores: Tensor


class Seq2SeqTransformer(nn.Module):
    """Encoder and decoder of the original paper over the embeddings of two vocabularies, then a dense layer.

    Tokens are numbers: ``PADDING`` (0) fills up; of the target, ``START`` (1) and ``END`` (2) stand around a text.

    Args:
        source_vocabulary, target_vocabulary: how many tokens each side has, those above included.
        dim, heads, feed_forward, dropout: of every layer.
        encoder_blocks, decoder_blocks: how many layers each side has.
        max_length: the longest text of either side; of the target, ``START`` or ``END`` included.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        *,
        dim: int = 64,
        heads: int = 4,
        encoder_blocks: int = 2,
        decoder_blocks: int = 2,
        feed_forward: int = 256,
        dropout: float = 0.0,
        max_length: int = 128,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.source = layers.Embedding(source_vocabulary, dim)
        self.target = layers.Embedding(target_vocabulary, dim)
        self.position = PositionalEncoding(dim, dropout, max_length, batch_first=True)
        sizes = (dim, heads, feed_forward, dropout)
        # Of its own, because torch's would warn that it has no use for nested tensors here.
        encoder = layers.TransformerEncoder(
            layers.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True),
            encoder_blocks,
            layers.LayerNorm(dim),
            enable_nested_tensor=False,
        )
        self.transformer = layers.Transformer(
            dim,
            heads,
            num_decoder_layers=decoder_blocks,
            dim_feedforward=feed_forward,
            dropout=dropout,
            custom_encoder=encoder,
            batch_first=True,
            norm_first=True,
        )
        self.output = layers.Linear(dim, target_vocabulary)
        # True where a position may not look: what lies ahead.
        ahead = torch.ones(max_length, max_length, dtype=torch.bool).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        """Teacher forcing: source (N, S), target (N, T) that begins with ``START`` -> (N, T, target_vocabulary) logits
        of the target's next token at each of its positions.

        The two may come as one (N, 2, T) tensor, both filled up to one length.
        """
        if target is None:
            if source.dim() != 3 or source.shape[1] != 2:
                raise ValueError(f"source: shape {tuple(source.shape)}; expected (N, 2, T) where no target is given")
            source, target = source.unbind(1)
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, S) -> what the decoder looks at: (memory (N, S, dim), where it has no words (N, S))."""
        padding = hidden_positions(source == PADDING)
        hidden = self.position(self.source(source))
        if hidden.numel():  # torch's attention cannot reshape no texts at all
            hidden = self.transformer.encoder(hidden, src_key_padding_mask=padding)
        return hidden, padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """(N, T) that begins with ``START`` -> (N, T, target_vocabulary) logits.

        What fills up a target stands behind its words, where none of them looks, so it needs no mask.
        """
        length = target.shape[1]
        hidden = self.position(self.target(target))
        if hidden.numel():
            hidden = self.transformer.decoder(
                hidden,
                memory,
                tgt_mask=self.ahead[:length, :length],
                memory_key_padding_mask=padding,
                tgt_is_causal=True,
            )
        return self.output(hidden)

    def greedy(self, source: Tensor, max_length: int | None = None) -> Tensor:
        """(N, S) -> (N, T): the likeliest token at each step, up to and with ``END``, ``PADDING`` after it.

        T is at most ``max_length`` (None: the model's); a text may be cut there, without ``END``.
        """
        best = self.beam(source, 1, max_length)
        return best.tokens[:, 0]

    def beam(self, source: Tensor, beams: int, max_length: int | None = None) -> Beams:
        """(N, S) -> the ``beams`` likeliest targets that are found by keeping so many at each step.

        In evaluation mode and without gradients. A beam that has ended keeps its score and its place.
        """
        limit = self.max_length if max_length is None else max_length
        if beams < 1:
            raise ValueError(f"beams: expected 1 or more, got {beams}")
        if not 1 <= limit <= self.max_length:
            raise ValueError(f"max_length: expected 1 to {self.max_length}, got {max_length}")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self._beam(source, beams, limit)
        finally:
            self.train(was_training)

    def _beam(self, source: Tensor, beams: int, limit: int) -> Beams:
        batch, device = source.shape[0], source.device
        memory, padding = self.encode(source)
        memory = memory.repeat_interleave(beams, 0)
        padding = None if padding is None else padding.repeat_interleave(beams, 0)
        tokens = torch.full((batch, beams, 1), START, dtype=torch.int64, device=device)
        # All beams begin alike: only the first counts at the first step.
        scores = torch.full((batch, beams), -math.inf, device=device)
        scores[:, 0] = 0
        ended = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        while tokens.shape[2] <= limit and not ended.all():
            logits = self.decode(tokens.flatten(0, 1), memory, padding)[:, -1]
            chances = logits.float().log_softmax(-1).unflatten(0, (batch, beams))
            symbols = chances.shape[2]
            # A beam that has ended goes on with PADDING, for nothing. No other writes it, nor a second START.
            chances[..., [PADDING, START]] = -math.inf
            chances = chances.masked_fill(ended.unsqueeze(2), -math.inf)
            chances[..., PADDING] = torch.where(ended, 0.0, chances[..., PADDING])
            scores, kept = (scores.unsqueeze(2) + chances).flatten(1).topk(beams)
            from_beam, token = kept // symbols, kept % symbols
            tokens = torch.cat([tokens.gather(1, from_beam.unsqueeze(2).expand_as(tokens)), token.unsqueeze(2)], 2)
            ended = ended.gather(1, from_beam) | (token == END)
        return Beams(tokens[:, :, 1:], scores)
