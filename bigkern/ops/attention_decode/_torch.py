"""Decoding in PyTorch's own operators: the reference, and what runs without a GPU.

For query i of batch element b, at position ``p = end_b - seqlen_q + i`` of its ``end_b`` rows:

    s_j = scale q_i . k_j;     s = softcap tanh(s / softcap);     s -= slope |p - j|
    output_i = sum over the rows j that i may see of softmax(s)_j v_j, 0 where it sees none;  lse_i = log(sum exp(s_j))

in fp32 for 16-bit inputs.  Rows of the caches that hold nothing are never multiplied: they may be NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(*args) -> str | None:
    """Always None: torch serves whatever the argument checks let through."""
    return None


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_starts: Tensor | None,
    alibi_slopes: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    splits: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(output, lse), and key and value in the caches; see _schema.py.  lse is None unless needed."""
    seqlen_q, capacity = query.shape[2], key_cache.shape[2]
    ends = None
    if cache_seqlens is not None:
        seqlen_new = 0 if key is None else key.shape[2]
        lengths = cache_seqlens.long().clamp(0, capacity)
        if seqlen_new > 0:
            _append(key_cache, value_cache, key, value, lengths)
        ends = (lengths + seqlen_new).clamp(max=capacity)
        if readable(ends):
            # Rows behind the longest sequence need not be looked at; where all are as long, there is nothing to mask.
            shortest, longest = (int(bound) for bound in ends.aminmax()) if ends.numel() > 0 else (0, 0)
            key_cache, value_cache, capacity = key_cache[:, :, :longest], value_cache[:, :, :longest], longest
            ends = None if shortest == longest else ends

    rows = torch.arange(capacity, device=query.device)
    end = capacity if ends is None else ends.view(-1, 1, 1, 1)
    visible = None if ends is None else rows < end
    if cache_starts is not None:
        visible = _both(visible, rows >= cache_starts.view(-1, 1, 1, 1))
    if visible is not None:
        # A weight of 0 times what memory happened to hold may be NaN.
        filled = visible.transpose(2, 3)
        key_cache, value_cache = (torch.where(filled, cache, 0) for cache in (key_cache, value_cache))
    offset = None
    # A single query is the last: it sees to the end, whatever the limit to its right.
    if window_left >= 0 or alibi_slopes is not None or (window_right >= 0 and seqlen_q > 1):
        offset = rows - (end - seqlen_q + torch.arange(seqlen_q, device=query.device).view(-1, 1))
        if window_left >= 0:
            visible = _both(visible, offset >= -window_left)
        if window_right >= 0:
            visible = _both(visible, offset <= window_right)
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(accumulator(query.dtype)).unsqueeze(-1).unsqueeze(-1) * offset.abs()
    if need_lse or softcap > 0:
        return _written_out(query, key_cache, value_cache, visible, bias, softcap, scale)
    mask = visible if bias is None else bias
    if bias is not None and visible is not None:
        mask = bias.masked_fill(~visible, -torch.inf)
    enable_gqa = key_cache.shape[1] != query.shape[1]
    output = F.scaled_dot_product_attention(query, key_cache, value_cache, mask, scale=scale, enable_gqa=enable_gqa)
    return output, None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def readable(tensor: Tensor) -> bool:
    """Whether its numbers can be had at once: on a CPU, while nothing traces or transforms the call."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _append(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Each batch element's new rows from its length on; those beyond the capacity are dropped."""
    seqlen_new, capacity = key.shape[2], key_cache.shape[2]
    if capacity == 0:
        return
    batch = torch.arange(lengths.shape[0], device=lengths.device).unsqueeze(1)
    # A dropped row writes what the last row gets anyway: several writes to one place must agree.
    wanted = torch.arange(seqlen_new, device=lengths.device)
    source = torch.minimum(wanted, capacity - 1 - lengths.unsqueeze(1))
    place = (lengths.unsqueeze(1) + source).clamp(max=capacity - 1)
    for cache, new in ((key_cache, key), (value_cache, value)):
        rows = cache.transpose(1, 2)
        new = new.transpose(1, 2)[batch, source.clamp(min=0)]
        full = (source < 0).view(*source.shape, 1, 1)
        rows[batch, place] = torch.where(full, rows[batch, place], new)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    query, key, value = (tensor.to(accumulator(dtype)) for tensor in (query, key, value))
    group = query.shape[1] // max(key.shape[1], 1)
    # Queries of the heads that share a key head side by side: the cache is not repeated.
    scores = (query.unflatten(1, (-1, group)).flatten(2, 3) @ key.transpose(2, 3)) * scale
    scores = scores.view(*query.shape[:3], key.shape[2])
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    empty = (scores == -torch.inf).all(3, keepdim=True)  # also where there is no row at all
    weights = torch.softmax(scores.masked_fill(empty, 0), 3).masked_fill(empty, 0)
    lse = scores.new_full(scores.shape[:3], -torch.inf) if key.shape[2] == 0 else torch.logsumexp(scores, 3)
    weights = weights.unflatten(1, (-1, group)).flatten(2, 3)
    output = (weights @ value).view(*query.shape[:3], value.shape[3])
    return output.to(dtype), lse


def _both(visible: Tensor | None, other: Tensor) -> Tensor:
    return other if visible is None else visible & other
