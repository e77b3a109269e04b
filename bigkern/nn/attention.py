"""Multi-head attention, the sine and cosine of the positions, and the Transformers made of them, as modules.

Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bigkern import backend
from bigkern.nn.layer_norm import LayerNorm
from bigkern.ops import add_layer_norm, attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    ``need_weights=False`` runs :func:`bigkern.ops.attention`, dropout included; see there for dtypes and errors.
    ``need_weights=True``, torch's default, needs the matrix that the kernels never store: torch's operators compute it.
    A query that sees no key attends to nothing, and its weights are 0; torch.nn's are NaN.

    With ``is_causal`` the mask itself is not read where the kernels can leave out what it hides.  torch.nn's modules
    call kernels of torch's own in evaluation: put this one into :class:`TransformerEncoderLayer`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "MultiheadAttention: query, key or value is a nested tensor; pad it with .to_padded_tensor(0.0) and "
                "pass key_padding_mask, or call bigkern.ops.attention_varlen"
            )
        batched = functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        _check_masks(key_padding_mask, attn_mask, is_causal)
        batch_first = self.batch_first or not batched
        if not batched:
            # One tensor stays one tensor: the projection below looks at that.
            own = (query is key, key is value)
            query = query.unsqueeze(0)
            key = query if own[0] else key.unsqueeze(0)
            value = key if own[1] else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check_shapes(query, key, value, key_padding_mask, attn_mask, batch_first)

        q, k, v = self._project(query, key, value)
        added = 0
        if self.bias_k is not None:
            shape = (k.shape[0], 1, -1) if batch_first else (1, k.shape[1], -1)
            added, along = 1, 1 if batch_first else 0
            k = torch.cat((k, self.bias_k.expand(shape)), along)
            v = torch.cat((v, self.bias_v.expand(shape)), along)
        if self.add_zero_attn:
            added += 1
            k, v = (functional.pad(x, (0, 0, 0, 1) if batch_first else (0, 0, 0, 0, 0, 1)) for x in (k, v))
        if added:
            attn_mask, key_padding_mask = (
                None if mask is None else functional.pad(mask, (0, added)) for mask in (attn_mask, key_padding_mask)
            )
        q, k, v = (self._heads(x, batch_first) for x in (q, k, v))

        dropout_p = self.dropout if self.training else 0.0
        # torch joins causal mask and padding whatever is hinted; the kernels leave out what the window hides.
        # Everybody sees the keys that are added, which the mask says and the hint does not.
        hinted = is_causal and not need_weights and not added
        if hinted and key_padding_mask is not None:
            hinted = not backend.uses_torch(q)
        mask = _merge_masks(None if hinted else attn_mask, key_padding_mask, q)
        if need_weights:
            output, weights = _explicit(q, k, v, mask, dropout_p)
            if average_attn_weights:
                weights = weights.mean(1)
            if not batched:
                weights = weights.squeeze(0)
        else:
            window = (-1, 0) if hinted and mask is not None else None
            output, weights = attention(q, k, v, mask, dropout_p, hinted and mask is None, window=window), None
        # (batch, heads, length, head_dim) back to the input's order.
        output = output.permute(0, 2, 1, 3) if batch_first else output.permute(2, 0, 1, 3)
        output = functional.linear(output.reshape(query.shape), self.out_proj.weight, self.out_proj.bias)
        return output if batched else output.squeeze(0), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """As few products as there are different tensors; the results are views of theirs."""
        dim, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is not value:
            weights = weight.chunk(3)
        elif query is key:
            return functional.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = (None, None) if bias is None else bias.split((dim, 2 * dim))
            q, kv = map(functional.linear, (query, key), weight.split((dim, 2 * dim)), biases)
            return q, *kv.chunk(2, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(functional.linear, (query, key, value), weights, biases))

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(batch, heads, length, head_dim), a view."""
        x = x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim)
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch_first: bool,
    ) -> None:
        """Of 3-D tensors; torch's errors."""
        if query.shape[2] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[2]}")
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        elif key.shape[:2] != value.shape[:2]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
            )
        (batch, rows), (key_batch, cols) = (x.shape[:2] if batch_first else x.shape[1::-1] for x in (query, key))
        if key_batch != batch:
            raise RuntimeError(
                f"MultiheadAttention: key has a batch of {key_batch} and query of {batch}; they must be the same "
                f"(batch_first is {self.batch_first})"
            )
        if attn_mask is not None:
            wanted = (rows, cols) if attn_mask.dim() == 2 else (batch * self.num_heads, rows, cols)
            if attn_mask.shape != wanted:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {wanted}."
                )
        if key_padding_mask is not None:
            for dim, wanted in enumerate((batch, cols)):
                if key_padding_mask.shape[dim] != wanted:
                    raise AssertionError(
                        f"Expected key_padded_mask.shape[{dim}] to be {wanted}, but got {key_padding_mask.shape[dim]}"
                    )


class PositionalEncoding(torch.nn.Module):
    """Adds to each position its sine and cosine (section 3.5 of the paper), then drops:

    PE(position, 2i) = sin(angle), PE(position, 2i + 1) = cos(angle), angle = position / 10000^(2i / d_model).

    Args:
        d_model: number of features; an odd one has one cosine less.
        dropout: probability of an element of the sum to be dropped while training.
        max_len: the longest sequence there will be.
        batch_first: input is (batch, length, d_model), else (length, batch, d_model); (length, d_model) is one text.
        device, dtype: of the table, which is no part of the state_dict.

    Raises:
        ValueError: a sequence longer than ``max_len``, or of another number of features.
    """

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.1,
        max_len: int = 5000,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.max_len, self.batch_first = d_model, max_len, batch_first
        self.dropout = torch.nn.Dropout(dropout)
        # In float64: at position 5000 a float32 angle is off by 2e-4.
        position = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
        angle = position * torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
        table = torch.empty(max_len, d_model, dtype=dtype, device=device)
        table[:, 0::2] = torch.sin(angle)
        table[:, 1::2] = torch.cos(angle[:, : d_model // 2])
        self.register_buffer("table", table, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (2, 3) or input.shape[-1] != self.d_model:
            raise ValueError(
                f"PositionalEncoding: input has shape {tuple(input.shape)}; it must have 2 or 3 dimensions and end in "
                f"d_model, {self.d_model}"
            )
        length = input.shape[1 if self.batch_first and input.dim() == 3 else 0]
        if length > self.max_len:
            raise ValueError(f"PositionalEncoding: input has {length} positions, but max_len is {self.max_len}")
        table = self.table[:length].to(input.dtype)
        return self.dropout(input + (table if self.batch_first or input.dim() == 2 else table.unsqueeze(1)))

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"


class _Layer:
    """What the two layers share: the constructor, and the feed-forward network."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        # What torch has just built becomes bigkern's: building it anew would draw other initial values.
        for module in self.children():
            module.__class__ = _OURS.get(type(module), type(module))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


_OURS = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.LayerNorm: LayerNorm}


class TransformerEncoderLayer(_Layer, torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on bigkern's kernels: same constructor, parameters, initial values and keys.

    Attention is :class:`MultiheadAttention`; dropout, residual sum and the layer norm after it are one pass
    (:func:`bigkern.ops.add_layer_norm`), with ``norm_first`` those between attention and feed-forward network.  A norm
    or dropout that is exchanged for another module, or has hooks, is called as it is.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_key_padding_mask, False, src_mask, True, is_causal)
        if self.norm_first:
            normed = self.norm1(src)
            normed, x = _add_norm(self.self_attn(normed, normed, normed, *masks)[0], src, self.dropout1, self.norm2)
            return x + self.dropout2(self._feed_forward(normed))
        x, _ = _add_norm(self.self_attn(src, src, src, *masks)[0], src, self.dropout1, self.norm1)
        return _add_norm(self._feed_forward(x), x, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(_Layer, torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on bigkern's kernels: same constructor, parameters, initial values and keys.

    See :class:`TransformerEncoderLayer` for what is fused.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (tgt_key_padding_mask, False, tgt_mask, True, tgt_is_causal)
        memory_masks = (memory_key_padding_mask, False, memory_mask, True, memory_is_causal)
        if self.norm_first:
            normed = self.norm1(tgt)
            normed, x = _add_norm(self.self_attn(normed, normed, normed, *masks)[0], tgt, self.dropout1, self.norm2)
            attended = self.multihead_attn(normed, memory, memory, *memory_masks)[0]
            normed, x = _add_norm(attended, x, self.dropout2, self.norm3)
            return x + self.dropout3(self._feed_forward(normed))
        x, _ = _add_norm(self.self_attn(tgt, tgt, tgt, *masks)[0], tgt, self.dropout1, self.norm1)
        x, _ = _add_norm(self.multihead_attn(x, memory, memory, *memory_masks)[0], x, self.dropout2, self.norm2)
        return _add_norm(self._feed_forward(x), x, self.dropout3, self.norm3)[0]


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder of layers that are called one by one: same constructor, parameters and keys.

    ``enable_nested_tensor`` and ``mask_check`` concern nested tensors, which are never used: padding is masked.
    Under torch.compile a mask is taken as it is; pass ``is_causal=True`` to say that it is causal.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.Module,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        is_causal = _is_causal(mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder, same constructor, parameters and keys; causal masks as in the encoder."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal)
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer on bigkern's kernels: same constructor, parameters, initial values and keys."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = functional.relu,
        custom_encoder: torch.nn.Module | None = None,
        custom_decoder: torch.nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        norm = {"eps": layer_norm_eps, "bias": bias, "device": device, "dtype": dtype}
        # In torch's order, so that equal seeds draw equal weights.
        if custom_encoder is None:
            layer = TransformerEncoderLayer(d_model, nhead, *options)
            custom_encoder = TransformerEncoder(layer, num_encoder_layers, LayerNorm(d_model, **norm))
        if custom_decoder is None:
            layer = TransformerDecoderLayer(d_model, nhead, *options)
            custom_decoder = TransformerDecoder(layer, num_decoder_layers, LayerNorm(d_model, **norm))
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )


def _add_norm(hidden: Tensor, stream: Tensor, dropout: torch.nn.Module, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed), summed = stream + dropout(hidden); in one pass where nobody can see the steps."""
    if (
        type(norm) is LayerNorm
        and type(dropout) is torch.nn.Dropout
        and not (_is_watched(norm) or _is_watched(dropout))
    ):
        return add_layer_norm(
            hidden, stream, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout.p, dropout.training
        )
    summed = stream + dropout(hidden)
    return norm(summed), summed


def _is_watched(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """The hint, or without one whether the mask is the causal one."""
    if hint is not None or mask is None:
        return bool(hint)
    # A look at the values waits for the GPU, and cannot be traced.
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    rows = mask.shape[0]
    if mask.shape != (rows, rows):
        return False
    return torch.equal(mask, torch.nn.Transformer.generate_square_subsequent_mask(rows, mask.device, mask.dtype))


def _check_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> None:
    """torch's errors, and its warning."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=3,
        )


def _merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """One mask in :func:`bigkern.ops.attention`'s sense, each of its four dimensions as long as needed or 1."""
    if attn_mask is not None:
        shape = (1, 1) if attn_mask.dim() == 2 else query.shape[:2]
        attn_mask = attn_mask.view(*shape, *attn_mask.shape[-2:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(key_padding_mask.shape[0], 1, 1, key_padding_mask.shape[1])
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
        return mask if mask is None or mask.is_floating_point() else ~mask
    if attn_mask.is_floating_point() and key_padding_mask.is_floating_point():
        return attn_mask + key_padding_mask
    if attn_mask.is_floating_point():
        return attn_mask.masked_fill(key_padding_mask, -torch.inf)
    if key_padding_mask.is_floating_point():
        return key_padding_mask.masked_fill(attn_mask, -torch.inf)
    return ~(attn_mask | key_padding_mask)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(output, weights after dropout), as torch.nn.MultiheadAttention computes them when it must return the weights."""
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    if mask is None:
        weights = torch.softmax(scores, 3)
    else:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
        empty = (scores == -torch.inf).all(3, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0), 3).masked_fill(empty, 0)
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    return weights @ value, weights
