"""The raw op of decoding: it writes to the caches, has no autograd, and one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/attention_decode.cpp, ``bigkern_triton`` by
_triton.py.  query is (batch, heads, seqlen_q, head_dim), key_cache (batch, kv_heads, capacity, head_dim), value_cache
(batch, kv_heads, capacity, value_dim), key and value (batch, kv_heads, seqlen_new, head_dim or value_dim), all with
unit inner stride; kv_heads divides heads.  cache_seqlens and cache_starts are int32 or int64, (batch,).

key and value become the caches' rows from ``cache_seqlens[b]`` on; without them nothing is written.  With ``end =
cache_seqlens[b] + seqlen_new``, without cache_seqlens the capacity, query i stands at ``p = end - seqlen_q + i`` and
sees the rows from ``max(cache_starts[b], p - window_left)`` to ``min(end - 1, p + window_right)``, without a limit
where a side is negative.  alibi_slopes is float32, (heads,) or (batch, heads).  ``softcap`` 0 is none.  ``splits`` is
the number of parts of each sequence that blocks of their own take, 0 as the backend likes.

output lies in memory as (batch, seqlen_q, heads, value_dim); lse is float32, (batch, heads, seqlen_q).
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

_FORWARD = (
    "(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? key, Tensor? value, Tensor? cache_seqlens,"
    " Tensor? cache_starts, Tensor? alibi_slopes, int window_left, int window_right, float softcap, float scale,"
    " int splits) -> (Tensor output, Tensor lse)"
)


def _forward_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *options) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q, _ = query.shape
    return (
        query.new_empty((batch, seqlen_q, heads, value_cache.shape[3])).transpose(1, 2),
        query.new_empty((batch, heads, seqlen_q), dtype=torch.float32),
    )


for _namespace in NAMESPACES:
    torch.library.define(f"{_namespace}::attention_decode_forward", _FORWARD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"{_namespace}::attention_decode_forward", _forward_fake)
