"""GPT: a Transformer decoder that goes on with a text, from scratch or with GPT-2's weights.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; the choice among the likeliest tokens whose
chances sum to ``top_p``: Holtzman et al., 2019 (arXiv:1904.09751).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigkern.models import pretrained
from bigkern.models.layers import BIGKERN, Layers
from bigkern.models.pretrained import Source, layer_sources
from bigkern.models.transformer import TransformerBlock, initial_spread
from bigkern.ops import attention, attention_decode

# What a configuration may say beside its sizes. The first is what it means when it does not say.
_SUPPORTED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_OPTIONS = {
    "vocabulary": "vocab_size",
    "dim": "n_embd",
    "heads": "n_head",
    "blocks": "n_layer",
    "max_length": "n_positions",
    "activation": "activation_function",
    "dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "eps": "layer_norm_epsilon",
}

# (block, what it reads) -> what attention makes of it
_Attend = Callable[["PreNormBlock", Tensor], Tensor]


class PreNormBlock(TransformerBlock):
    """A block that reads what is normed already: (normed, stream) -> (normed, stream), the next block's two inputs.

    Each sum with the residual stream is followed by a norm, of this block or of the next, and both are one pass: the
    norms of a pre-norm Transformer, moved up by one.
    """

    def forward(self, normed: Tensor, stream: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """``attended`` is attention's output for ``normed``."""
        normed, stream = self.attention_norm(attended, stream)
        return self.feed_forward_norm(self.feed_forward(normed), stream)


class KVCache:
    """Each block's keys and values of the tokens read so far, with room for ``capacity``."""

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        block = model.blocks[0].attention
        weight = model.tokens.weight
        shape = (2, len(model.blocks), batch, block.num_heads, capacity, block.head_dim)
        self.keys, self.values = weight.new_empty(shape).unbind()
        self.capacity = capacity
        self.used = 0  # of the longest text
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)  # of each, where the kernels read
        self.even = True  # whether all texts are as long

    def advance(self, tokens: int, lengths: Tensor | None = None) -> None:
        """By so many tokens; with ``lengths`` (N,), by so many of each text's."""
        self.used += tokens
        self.lengths += tokens if lengths is None else lengths
        self.even = self.even and lengths is None


class GPT(nn.Module):
    """GPT-2's architecture: token and position embeddings, pre-norm blocks, a last norm, the token embedding again.

    Args:
        vocabulary, dim, heads, blocks, max_length: sizes; ``max_length`` counts the positions that have an embedding.
        feed_forward: None is ``4 * dim``.
        activation: "gelu_new" is GPT-2's.
        dropout, embedding_dropout, attention_dropout: of what a sublayer adds, of the embeddings (None: ``dropout``),
            of the attention's weights.
        eps: of the norms.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 96,
        heads: int = 3,
        blocks: int = 3,
        feed_forward: int | None = None,
        max_length: int = 256,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.tokens = layers.Embedding(vocabulary, dim)
        self.positions = layers.Embedding(max_length, dim)
        self.dropout = layers.Dropout(dropout if embedding_dropout is None else embedding_dropout)
        self.norm = layers.LayerNorm(dim, eps=eps)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                dim,
                heads,
                4 * dim if feed_forward is None else feed_forward,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation=activation,
                eps=eps,
                layers=layers,
            )
            for _ in range(blocks)
        )
        # True where a position may not look: what lies ahead.
        ahead = torch.ones(max_length, max_length, dtype=torch.bool).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as GPT-2: normal with spread 0.02 at 768 features, less where a block adds to the stream.

        See :func:`initial_spread` for fewer features.
        """
        spread = initial_spread(self.tokens.embedding_dim)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
            else:
                adds = name.endswith(("out_proj.weight", "feed_forward.2.weight"))
                nn.init.normal_(parameter, std=spread / math.sqrt(2 * len(self.blocks)) if adds else spread)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token numbers -> (N, T, vocabulary) logits of the token that follows each.

        No position sees what lies ahead, so texts of different length may be filled up at their end with any token.
        """
        length = tokens.shape[1]
        self._check_length(length)
        mask = self.ahead[:length, :length]

        def attend(block: PreNormBlock, normed: Tensor) -> Tensor:
            if not normed.numel():
                return normed  # torch's attention cannot reshape no texts at all
            return block.attention(normed, normed, normed, need_weights=False, attn_mask=mask, is_causal=True)[0]

        return self._logits(self._hidden(tokens, 0, attend))

    def read_on(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """(N, T) tokens that follow those in the cache -> (N, vocabulary) logits of the one that follows; no gradient.

        Their keys and values join the cache. ``lengths`` (N,), from 1 to T, says how many of each row's tokens are
        text, where the others only fill up; for the first tokens of a cache. The kernels are
        :func:`bigkern.ops.attention` for the text that comes first and :func:`bigkern.ops.attention_decode` for what
        follows, whatever ``layers`` the model is made of.
        """
        length = tokens.shape[1]
        self._check_length(cache.used + length)
        if cache.used + length > cache.capacity:
            raise ValueError(f"cache: room for {cache.capacity} tokens, {cache.used} are used and {length} are to join")
        if lengths is not None and cache.used:
            raise ValueError("lengths: only the first texts of a cache may differ in length")
        numbers = {block: number for number, block in enumerate(self.blocks)}

        def attend(block: PreNormBlock, normed: Tensor) -> Tensor:
            own = block.attention
            projected = functional.linear(normed, own.in_proj_weight, own.in_proj_bias)
            query, key, value = (
                part.unflatten(2, (own.num_heads, own.head_dim)).transpose(1, 2) for part in projected.chunk(3, 2)
            )
            keys, values = cache.keys[numbers[block]], cache.values[numbers[block]]
            if cache.used:
                attended = attention_decode(query, keys, values, key, value, cache.lengths)
            else:
                keys[:, :, :length], values[:, :, :length] = key, value
                attended = attention(query, key, value, is_causal=True)
            return own.out_proj(attended.transpose(1, 2).flatten(2))

        with torch.no_grad():
            hidden = self._hidden(tokens, cache.used if cache.even else cache.lengths, attend)
            cache.advance(length, lengths)
            return self._logits(_last(hidden, lengths))

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        use_cache: bool = True,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(N, T) texts, of T >= 1 tokens each, with up to ``max_new_tokens`` more; in evaluation mode.

        Args:
            lengths: (N,), integers from 1 to T: how many tokens each text has, where those behind them only fill up.
                What is generated follows each text's own last token, as if it stood alone, and rows are filled up at
                their end with ``eos``, without one with 0. None: T.
            temperature, top_k, top_p, do_sample, generator: see :func:`choose`.
            eos: the token that ends a text. A text that has ended is filled up with it, and when all have ended,
                generation ends.
            use_cache: False reads the whole text anew for each token, which gives the same tokens, slower.

        Raises:
            ValueError: ``T + max_new_tokens`` is above ``max_length``; a number out of range.
        """
        new = self.stream(
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
            generator=generator,
            eos=eos,
            use_cache=use_cache,
            lengths=lengths,
        )
        if lengths is None:
            return torch.cat([tokens, *(token.unsqueeze(1) for token in new)], 1)
        added = torch.cat([tokens[:, :0], *(token.unsqueeze(1) for token in new)], 1)
        place = torch.arange(tokens.shape[1] + added.shape[1], device=tokens.device)
        lengths = lengths.to(tokens.device, torch.int64).unsqueeze(1)
        texts = functional.pad(tokens, (0, added.shape[1]))
        texts = texts.masked_fill(place >= lengths, 0 if eos is None else eos)
        return texts.scatter(1, lengths + place[: added.shape[1]], added)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        use_cache: bool = True,
        lengths: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """What :meth:`generate` adds, (N,) token by token as it comes."""
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected (N, T) with T of 1 or more, got {tuple(tokens.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
        self._check_length(tokens.shape[1] + max_new_tokens)
        if lengths is not None:
            lengths = _checked_lengths(lengths, tokens)
        was_training = self.training
        self.eval()
        try:
            # The last token is never read, so the cache needs no room for it.
            cache = KVCache(self, tokens.shape[0], tokens.shape[1] + max_new_tokens - 1) if use_cache else None
            ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            unread, unread_lengths = tokens, lengths
            for _ in range(max_new_tokens):
                with torch.no_grad():
                    if cache is None:
                        logits = _last(self(unread), unread_lengths)
                    else:
                        logits = self.read_on(unread, cache, unread_lengths)
                    token = choose(logits, temperature, top_k, top_p, do_sample, generator)
                    if eos is not None:
                        token = token.masked_fill(ended, eos)
                        ended |= token == eos
                yield token
                if eos is not None and ended.all():
                    return
                added = token.unsqueeze(1)
                if cache is not None:
                    unread, unread_lengths = added, None
                elif lengths is None:
                    unread = torch.cat([unread, added], 1)
                else:
                    unread = functional.pad(unread, (0, 1)).scatter(1, unread_lengths.unsqueeze(1), added)
                    unread_lengths = unread_lengths + 1
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, layers: Layers = BIGKERN) -> GPT:
        """The model in a folder that Hugging Face's ``save_pretrained`` wrote, in evaluation mode and float32.

        config.json and model.safetensors (whole or in parts), or pytorch_model.bin, of a GPT2LMHeadModel or GPT2Model.

        Raises:
            ValueError: another architecture, an option or activation that is not supported, tensors that are missing,
                left over or of another shape, a damaged file.
        """
        config = pretrained.read_config(directory, "gpt2")
        pretrained.check_options(directory, config, _SUPPORTED)
        arguments = pretrained.options(directory, config, _OPTIONS)
        if arguments["dim"] % arguments["heads"]:
            raise ValueError(f"{directory}: n_embd {arguments['dim']} is no multiple of n_head, {arguments['heads']}")
        weights = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in pretrained.read_weights(directory).items()
            # the causal masks that old files hold
            if not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights.get("transformer.wte.weight", head)):
            raise ValueError(f"{directory}: lm_head.weight is not the tokens' embedding; this model ties the two")
        model = cls(feed_forward=config.get("n_inner"), layers=layers, **arguments)
        pretrained.load(model, weights, weight_sources(len(model.blocks)), where=directory)
        return model.eval()

    def _hidden(self, tokens: Tensor, start: int | Tensor, attend: _Attend) -> Tensor:
        """(N, T, dim) after the last norm, of tokens that stand at ``start`` and after; (N,) where texts differ."""
        length = tokens.shape[1]
        if isinstance(start, Tensor):
            positions = self.positions(start.unsqueeze(1) + torch.arange(length, device=start.device))
        else:
            positions = self.positions.weight[start : start + length]
        stream = self.dropout(self.tokens(tokens) + positions)
        normed = self.norm(stream)
        for block in self.blocks:
            normed, stream = block(normed, stream, attend(block, normed))
        return normed

    def _logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.tokens.weight)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"tokens: {length} positions, but max_length is {self.max_length}; shorten the text")


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(N, T, ...) -> (N, ...): each text's last."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1]


def _checked_lengths(lengths: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError("lengths: expected an int32 or int64 tensor, one length for each text")
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths: expected shape ({tokens.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[1]:
        raise ValueError(f"lengths: expected numbers from 1 to {tokens.shape[1]}, got {lengths.tolist()}")
    return lengths.to(tokens.device, torch.int64)


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(N, vocabulary) logits -> (N,) tokens: the likeliest ones, or with ``do_sample`` drawn by their chances.

    Args:
        temperature: above 0; the logits are divided by it before chances are made of them.
        top_k: draw from so many likeliest tokens; None: from all.
        top_p: draw from the likeliest tokens that together have at least this chance, in (0, 1]; None: from all.
        generator: of torch, on the logits' device, draws; None: torch's own.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}; do_sample=False takes no chances")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a chance in (0, 1], got {top_p}")
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        chances, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # Left out is a token before which the others have the chance already; the first never is.
        enough = chances.cumsum(-1) - chances >= top_p
        logits = logits.masked_fill(enough.scatter(1, order, enough), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def weight_sources(blocks: int) -> dict[str, Source]:
    """Where each parameter of a GPT of so many blocks comes from. GPT-2 keeps its matrices transposed."""
    sources = {
        "tokens.weight": Source(("transformer.wte.weight",)),
        "positions.weight": Source(("transformer.wpe.weight",)),
        **layer_sources("norm", "transformer.h.0.ln_1"),
    }
    for number in range(blocks):
        ours, theirs = f"blocks.{number}", f"transformer.h.{number}"
        following = f"transformer.h.{number + 1}.ln_1" if number + 1 < blocks else "transformer.ln_f"
        sources[f"{ours}.attention.in_proj_weight"] = Source((f"{theirs}.attn.c_attn.weight",), transposed=True)
        sources[f"{ours}.attention.in_proj_bias"] = Source((f"{theirs}.attn.c_attn.bias",))
        sources |= layer_sources(f"{ours}.attention.out_proj", f"{theirs}.attn.c_proj", transposed=True)
        sources |= layer_sources(f"{ours}.attention_norm", f"{theirs}.ln_2")
        sources |= layer_sources(f"{ours}.feed_forward.0", f"{theirs}.mlp.c_fc", transposed=True)
        sources |= layer_sources(f"{ours}.feed_forward.2", f"{theirs}.mlp.c_proj", transposed=True)
        sources |= layer_sources(f"{ours}.feed_forward_norm", following)
    return sources
