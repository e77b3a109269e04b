"""The raw ops of attention: functional, without autograd, one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/attention.cpp, ``bigkern_triton`` by
_triton.py.  query is (batch, heads, seqlen_q, head_dim), key (batch, kv_heads, seqlen_k, head_dim), value (batch,
kv_heads, seqlen_k, value_dim), each with unit inner stride; kv_heads divides heads.  Packed sequences are one batch of
(1, heads, total, head_dim) with int32 ``cu_seqlens``, (sequences + 1,), and the longest lengths.

attn_mask is 4-D, each size that of the scores (sequences, heads, seqlen_q, seqlen_k) or 1: bool, float32 or the query's
dtype.  alibi_slopes is float32, (heads,) or (batch, heads).

Query i sits at key position ``p = i``, or ``i + seqlen_k - seqlen_q`` with ``bottom_right``; it sees the keys from
``p - window_left`` to ``p + window_right``, without a limit where that is negative.  Causal attention is
``window_right = 0``.  ``softcap`` 0 is none.  ``tf32`` permits a backend to round fp32 factors to tf32.

Results lie in memory as (batch, seqlen, heads, dim), so that the heads can be joined without a copy.  lse is float32,
(batch, heads, seqlen_q).  grad_mask has attn_mask's shape and dtype, grad_slopes alibi_slopes'; where it is not needed,
each is an empty (0,) tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

_OPTIONS = (
    "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, int window_left, int window_right, bool bottom_right, float softcap, float scale,"
    " float dropout_p, Tensor? philox, bool tf32"
)
_FORWARD = f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor output, Tensor lse)"
_BACKWARD = (
    "(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse,"
    f" {_OPTIONS}, bool need_grad_mask, bool need_grad_slopes, bool deterministic)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_slopes)"
)


def _rows_first(like: Tensor, batch: int, heads: int, seqlen: int, dim: int) -> Tensor:
    return like.new_empty((batch, seqlen, heads, dim)).transpose(1, 2)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *options) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q, _ = query.shape
    return (
        _rows_first(query, batch, heads, seqlen_q, value.shape[3]),
        query.new_empty((batch, heads, seqlen_q), dtype=torch.float32),
    )


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, need_grad_mask, need_grad_slopes, _ = options
    return (
        *(_rows_first(tensor, *tensor.shape) for tensor in (query, key, value)),
        attn_mask.new_empty(attn_mask.shape) if need_grad_mask else query.new_empty((0,)),
        alibi_slopes.new_empty(alibi_slopes.shape) if need_grad_slopes else query.new_empty((0,), dtype=torch.float32),
    )


for _namespace in NAMESPACES:
    for _name, _signature, _fake in (
        ("attention_forward", _FORWARD, _forward_fake),
        ("attention_backward", _BACKWARD, _backward_fake),
    ):
        torch.library.define(f"{_namespace}::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
