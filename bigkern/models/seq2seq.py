"""The documents' encoder-decoder Transformer: it reads one sequence and writes another, token by token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigkern.models.layers import BIGKERN, Layers
from bigkern.models.transformer import PADDING, hidden_positions
from bigkern.nn import PositionalEncoding
from bigkern.ops import attention, attention_decode

# The first of the target's tokens, after PADDING.
START, END = 1, 2


class Beams(NamedTuple):
    """tokens (N, beams, T), the best first, ``PADDING`` after ``END``; scores (N, beams): of each, the sum of the
    logarithms of its tokens' chances."""

    tokens: Tensor
    scores: Tensor


class DecoderCache:
    """Each decoder block's keys and values: of the memory, and of the ``capacity`` tokens that ``beams`` texts a memory
    may read."""

    def __init__(
        self, model: Seq2SeqTransformer, memory: Tensor, padding: Tensor | None, beams: int, capacity: int
    ) -> None:
        blocks = model.transformer.decoder.layers
        own = blocks[0].self_attn
        batch = memory.shape[0]
        self.beams, self.used = beams, 0
        self.lengths = torch.zeros(batch * beams, dtype=torch.int32, device=memory.device)
        shape = (2, len(blocks), batch * beams, own.num_heads, capacity, own.head_dim)
        self.keys, self.values = memory.new_empty(shape).unbind()
        self.visible = None if padding is None else ~padding[:, None, None]
        dim = own.embed_dim
        self.memory = []
        for block in blocks:
            other = block.multihead_attn
            projected = functional.linear(memory, other.in_proj_weight[dim:], other.in_proj_bias[dim:])
            self.memory.append(tuple(_heads(part, other) for part in projected.chunk(2, 2)))

    def reorder(self, texts: Tensor) -> None:
        """Text i goes on from what was text ``texts[i]``."""
        for rows in (self.keys, self.values):
            rows[:, :, :, : self.used] = rows[:, texts, :, : self.used]


def _heads(x: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """(N, T, dim) -> (N, heads, T, head_dim), a view."""
    return x.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)


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

    def read_on(self, token: Tensor, cache: DecoderCache) -> Tensor:
        """(N,) tokens that follow those in the cache -> (N, target_vocabulary) logits of the one that follows.

        As :meth:`decode` in evaluation mode, but a text's keys and values are computed once, and the memory's too, by
        the cache. The kernels are :func:`bigkern.ops.attention_decode` and :func:`bigkern.ops.attention`, whatever
        ``layers`` the model is made of. No gradient.
        """
        place, beams = cache.used, cache.beams
        with torch.no_grad():
            hidden = self.target(token).unsqueeze(1)
            hidden = hidden + self.position.table[place].to(hidden.dtype)
            for number, block in enumerate(self.transformer.decoder.layers):
                own, other = block.self_attn, block.multihead_attn
                projected = functional.linear(block.norm1(hidden), own.in_proj_weight, own.in_proj_bias)
                query, key, value = (_heads(part, own) for part in projected.chunk(3, 2))
                attended = attention_decode(query, cache.keys[number], cache.values[number], key, value, cache.lengths)
                hidden = hidden + own.out_proj(attended.transpose(1, 2).flatten(2))
                dim = other.embed_dim
                query = functional.linear(block.norm2(hidden), other.in_proj_weight[:dim], other.in_proj_bias[:dim])
                # A memory's texts are the rows of one query: its keys are read once for all of them.
                query = _heads(query.view(-1, beams, dim), other)
                attended = attention(query, *cache.memory[number], cache.visible)
                hidden = hidden + other.out_proj(attended.transpose(1, 2).reshape(hidden.shape))
                hidden = hidden + block.linear2(block.activation(block.linear1(block.norm3(hidden))))
            cache.used += 1
            cache.lengths += 1
            return self.output(self.transformer.decoder.norm(hidden).squeeze(1))

    def greedy(self, source: Tensor, max_length: int | None = None, *, use_cache: bool = True) -> Tensor:
        """(N, S) -> (N, T): the likeliest token at each step, up to and with ``END``, ``PADDING`` after it.

        T is at most ``max_length`` (None: the model's); a text may be cut there, without ``END``. ``use_cache`` as in
        :meth:`beam`.
        """
        best = self.beam(source, 1, max_length, use_cache=use_cache)
        return best.tokens[:, 0]

    def beam(self, source: Tensor, beams: int, max_length: int | None = None, *, use_cache: bool = True) -> Beams:
        """(N, S) -> the ``beams`` likeliest targets that are found by keeping so many at each step.

        In evaluation mode and without gradients. A beam that has ended keeps its score and its place. ``use_cache``
        False reads the whole text anew for each token, which gives the same tokens, slower.
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
                return self._beam(source, beams, limit, use_cache)
        finally:
            self.train(was_training)

    def _beam(self, source: Tensor, beams: int, limit: int, use_cache: bool) -> Beams:
        batch, device = source.shape[0], source.device
        memory, padding = self.encode(source)
        cache = None
        if use_cache:
            cache = DecoderCache(self, memory, padding, beams, limit)
        else:
            memory = memory.repeat_interleave(beams, 0)
            padding = None if padding is None else padding.repeat_interleave(beams, 0)
        tokens = torch.full((batch, beams, 1), START, dtype=torch.int64, device=device)
        # All beams begin alike: only the first counts at the first step.
        scores = torch.full((batch, beams), -math.inf, device=device)
        scores[:, 0] = 0
        ended = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        while tokens.shape[2] <= limit and not ended.all():
            if cache is None:
                logits = self.decode(tokens.flatten(0, 1), memory, padding)[:, -1]
            else:
                logits = self.read_on(tokens[:, :, -1].flatten(), cache)
            chances = logits.float().log_softmax(-1).unflatten(0, (batch, beams))
            symbols = chances.shape[2]
            # A beam that has ended goes on with PADDING, for nothing. No other writes it, nor a second START.
            chances[..., [PADDING, START]] = -math.inf
            chances = chances.masked_fill(ended.unsqueeze(2), -math.inf)
            chances[..., PADDING] = torch.where(ended, 0.0, chances[..., PADDING])
            scores, kept = (scores.unsqueeze(2) + chances).flatten(1).topk(beams)
            from_beam, token = kept // symbols, kept % symbols
            tokens = torch.cat([tokens.gather(1, from_beam.unsqueeze(2).expand_as(tokens)), token.unsqueeze(2)], 2)
            if cache is not None and beams > 1:
                cache.reorder((from_beam + beams * torch.arange(batch, device=device).unsqueeze(1)).flatten())
            ended = ended.gather(1, from_beam) | (token == END)
        return Beams(tokens[:, :, 1:], scores)
