"""Decoding on Triton: what it supports, how its kernels are launched, and their registration as a raw op.

The kernels are in _triton_kernels.py.  Tile sizes are chosen here, in Python, from the shape: an autotuner would cost
more per call than a step takes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.ops import _triton_support as support
from bigkern.ops.attention_decode import _schema  # noqa: F401  (declares the op implemented here)

MAX_HEAD_DIM = 256

# Positions are int32, and differ by sums of a few of these.
_MAX_CAPACITY = 2**29
_NO_LIMIT = 2**30

# A part has this many tiles of keys at least: less is not worth its share of the combining.
_MIN_TILES = 4

_loaded_kernels = None


def unsupported(query: Tensor, key_cache: Tensor, value_cache: Tensor, *options) -> str | None:
    """Why these arguments cannot be served, in plain words, or None.  Arguments as :func:`forward`."""
    reason = support.unsupported_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    if reason is not None:
        return reason
    if max(query.shape[3], value_cache.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head_dim is {query.shape[3]} and the value's {value_cache.shape[3]}; the Triton kernels take up to "
            f"{MAX_HEAD_DIM}"
        )
    if max(query.shape[2], key_cache.shape[2]) > _MAX_CAPACITY:
        return (
            f"there are {query.shape[2]} queries and {key_cache.shape[2]} rows; the Triton kernels take up to "
            f"{_MAX_CAPACITY}"
        )
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
) -> tuple[Tensor, Tensor]:
    """(output, lse), and key and value in the caches; see _schema.py."""
    return torch.ops.bigkern_triton.attention_decode_forward.default(
        query,
        key_cache,
        value_cache,
        key,
        value,
        cache_seqlens,
        cache_starts,
        alibi_slopes,
        window_left,
        window_right,
        softcap,
        scale,
        splits,
    )


def _kernels():
    global _loaded_kernels
    if _loaded_kernels is None:
        from bigkern.ops.attention_decode import _triton_kernels

        _loaded_kernels = _triton_kernels
    return _loaded_kernels


class Tile(NamedTuple):
    """Pairs of a query and a head, and keys, that a program works on at a time; its warps; tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


def _tile(dim: int, dtype: torch.dtype, pairs: int) -> Tile:
    """dim is the padded one.  Bound by registers: tests/triton/test_attention_aot.py watches.

    Tiles of 16 KB of keys and values, three in flight, leave room for two programs a multiprocessor and more; fp32
    products in three parts have registers for 16 keys.
    """
    rows = 32 if pairs > 16 and dim <= 128 and dtype != torch.float32 else 16
    if support.INTERPRETED:  # which has no registers, and takes its time by the tile
        return Tile(rows, 64, 4, 1)
    width = dim * dtype.itemsize
    if dtype == torch.float32:
        return Tile(rows, 16, 4 if dim <= 128 else 8, 3 if dim <= 128 else 2)
    return Tile(rows, 8192 // width, 4, 3)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """All but the last; 0 where there is only one element, whose stride may be anything."""
    return (0, 0, 0) if x is None else tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in range(3))


def _parts(programs: int, keys: int, tile: Tile, device: torch.device) -> int:
    """Into how many a sequence is cut: as many as the GPU holds at once, two programs a multiprocessor."""
    room = 2 * support.multiprocessors(device) // programs
    return max(1, min(room, keys // (_MIN_TILES * tile.keys), 1024))


def _forward(
    query, key_cache, value_cache, key, value, cache_seqlens, cache_starts, alibi_slopes,
    window_left, window_right, softcap, scale, splits,
):  # fmt: skip
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, capacity, value_dim = key_cache.shape[1], key_cache.shape[2], value_cache.shape[3]
    rows = batch * heads * seqlen_q
    output = query.new_empty((batch, seqlen_q, heads, value_dim))
    lse = query.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    group = heads // kv_heads
    block_d, block_v = support.padded(head_dim), support.padded(value_dim)
    tile = _tile(max(block_d, block_v), query.dtype, seqlen_q * group)
    tiles = support.ceil_div(seqlen_q * group, tile.rows)
    programs = batch * kv_heads * tiles
    if splits == 0:
        keys = capacity if window_left < 0 else min(capacity, window_left + seqlen_q)
        splits = _parts(programs, keys, tile, query.device)
    parts, lse_parts = output, lse
    if splits > 1:
        parts, lse_parts = lse.new_empty((splits, *output.shape)), lse.new_empty((splits, *lse.shape))
    seqlen_new = 0 if key is None else key.shape[2]
    if seqlen_new == 0:
        key = value = None
    strides = [stride for x in (query, key_cache, value_cache, key, value) for stride in _strides(x)]
    align = support.alignment(*strides)
    exact = query.dtype == torch.float32
    kernels = _kernels()
    with support.device_guard(query.device):
        kernels.attention_decode_kernel[(programs * splits,)](
            query,
            key_cache,
            value_cache,
            key,
            value,
            cache_seqlens,
            cache_starts,
            alibi_slopes,
            parts,
            lse_parts,
            heads,
            group,
            seqlen_q,
            seqlen_new,
            capacity,
            tiles,
            splits,
            rows,
            *(_NO_LIMIT if side < 0 else min(side, _NO_LIMIT) for side in (window_left, window_right)),
            scale,
            softcap,
            *(stride // align for stride in strides),
            heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_D=block_d,
            BLOCK_V=block_v,
            ALIGN=align,
            SOFTCAP=softcap > 0.0,
            EXACT=exact,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
        if splits > 1:
            combined = max(1, 1024 // block_v)
            kernels.attention_decode_combine_kernel[(support.ceil_div(rows, combined),)](
                parts,
                lse_parts,
                output,
                lse,
                heads,
                seqlen_q,
                splits,
                rows,
                VALUE_DIM=value_dim,
                BLOCK_V=block_v,
                EXACT=exact,
                ROWS=combined,
                num_warps=4,
            )
    return output.transpose(1, 2), lse


support.register("attention_decode_forward", _forward)
