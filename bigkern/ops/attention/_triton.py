"""Attention on Triton: what it supports, how its kernels are launched, and their registration as raw ops.

The kernels are in _triton_kernels.py.  Tile sizes are chosen here, in Python, from the shape: an autotuner would cost
more per call than a small attention takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.ops import _triton_support as support
from bigkern.ops.attention import _schema  # noqa: F401  (declares the ops implemented here)

MAX_HEAD_DIM = 256

# Positions are int32, and differ by sums of a few of these.
_MAX_SEQLEN = 2**29
_NO_LIMIT = 2**30

# Columns of fp32 factors in registers at a time.
_CHUNK = 16

_LOG2E = 1.4426950408889634

_loaded_kernels = None


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options,
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None.  Arguments as :func:`forward`."""
    reason = support.unsupported_tensors(query=query, key=key, value=value)
    if reason is not None:
        return reason
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head_dim is {query.shape[3]} and the value's {value.shape[3]}; the Triton kernels take up to "
            f"{MAX_HEAD_DIM}"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}; the Triton kernels take bool, float32 and the query's dtype"
    if max(max_seqlen_q, max_seqlen_k) > _MAX_SEQLEN:
        return f"the sequences are {max_seqlen_q} and {max_seqlen_k} long; the Triton kernels take up to {_MAX_SEQLEN}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """(output, lse); see _schema.py."""
    return torch.ops.bigkern_triton.attention_forward.default(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        bottom_right,
        softcap,
        scale,
        dropout_p,
        philox,
        tf32,
    )


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tf32: bool,
    need_grad_mask: bool,
    need_grad_slopes: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask, grad_slopes); see _schema.py."""
    return torch.ops.bigkern_triton.attention_backward.default(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        attn_mask,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        bottom_right,
        softcap,
        scale,
        dropout_p,
        philox,
        tf32,
        need_grad_mask,
        need_grad_slopes,
        deterministic,
    )


def _kernels():
    global _loaded_kernels
    if _loaded_kernels is None:
        from bigkern.ops.attention import _triton_kernels

        _loaded_kernels = _triton_kernels
    return _loaded_kernels


class Tile(NamedTuple):
    """What a program works on at a time, its warps, and how many tiles are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def _tile(kernel: str, dim: int, dtype: torch.dtype, plain: bool) -> Tile:
    """For "forward", or backward's "keys", "queries" or "mask"; dim is the padded one.

    Bound by registers: larger ones spill where features come together (tests/triton/test_attention_aot.py watches).
    """
    if support.INTERPRETED:  # which has none, and takes its time by the tile
        return Tile(64, 64, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32 if dim <= 128 else 16, 4 if kernel != "keys" and dim != 128 else 8, 2)
    if kernel == "forward":
        if dim > 128:
            return Tile(64 if plain else 32, 32, 8, 2)
        return Tile(128, 64 if dim <= 64 or plain else 32, 8, 3)
    if kernel == "mask" and dim > 128:
        return Tile(16, 32, 4, 1)
    if dim <= 64 and plain:
        return Tile(64, 64, 4, 2)
    if dim <= 64 and kernel == "keys":
        return Tile(16, 64, 8, 2)
    if dim <= 64 or (dim <= 128 and (plain or kernel != "keys")):
        return Tile(32, 64, 8, 2) if kernel == "keys" else Tile(64, 32, 8, 2)
    return Tile(32, 32, 8, 2)


def _fitting(tile: Tile, seqlen_q: int, seqlen_k: int) -> Tile:
    """The tile, smaller where it would be mostly empty."""
    return tile._replace(
        queries=min(tile.queries, support.padded(seqlen_q)), keys=min(tile.keys, support.padded(seqlen_k))
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """All but the last; 0 where there is only one element, whose stride may be anything."""
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in range(3))


class _Call:
    """What every kernel is given of one call's arguments."""

    def __init__(
        self, query, key, value, attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        window_left, window_right, bottom_right, softcap, scale, dropout_p, philox, tf32, grad_output=None,
    ):  # fmt: skip
        if dropout_p == 0.0:
            philox = None
        self.packed = cu_seqlens_q is not None
        self.batch = cu_seqlens_q.shape[0] - 1 if self.packed else query.shape[0]
        self.heads, self.kv_heads = query.shape[1], key.shape[1]
        self.seqlen_q, self.seqlen_k = max_seqlen_q, max_seqlen_k
        self.total_q, self.total_k = query.shape[2], key.shape[2]
        self.head_dim, self.value_dim = query.shape[3], value.shape[3]
        self.dtype = query.dtype
        exact = self.dtype == torch.float32 and not tf32
        featured = attn_mask is not None or alibi_slopes is not None or softcap > 0.0 or philox is not None
        self.plain = not featured and scale > 0.0 and not exact
        self.empty = 0 in (
            self.batch, self.seqlen_q, self.seqlen_k, query.numel(), key.numel(), value.numel()
        )  # fmt: skip
        # Results that no program writes: of rows in no sequence, or where there is nothing to compute.
        self.untouched = self.packed or self.empty

        tensors = [query, key, value] + ([] if grad_output is None else [grad_output])
        strides = [stride for tensor in tensors for stride in _strides(tensor)]
        align = support.alignment(*strides)
        mask_strides, mask_align = (0, 0, 0, 0), 1
        if attn_mask is not None:
            mask_col = attn_mask.stride(3) if attn_mask.shape[3] > 1 else 0
            mask_align = support.alignment(*_strides(attn_mask)) if mask_col == 1 else 1
            mask_strides = (*(stride // mask_align for stride in _strides(attn_mask)), mask_col)
            if attn_mask.dtype == torch.bool:
                attn_mask = attn_mask.view(torch.uint8)
        slopes_batch = self.heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0

        self.tensors = (query, key, value, attn_mask, alibi_slopes)
        self.cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
        self.philox = philox
        self.group = self.heads // max(self.kv_heads, 1)
        self.windows = tuple(_NO_LIMIT if side < 0 else min(side, _NO_LIMIT) for side in (window_left, window_right))
        self.factors = (scale, _LOG2E * scale if self.plain else _LOG2E)
        self.dropout = (dropout_p, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
        self.softcap = softcap
        self.strides = (*(stride // align for stride in strides), *mask_strides, slopes_batch)
        self.constants = dict(
            HEAD_DIM=self.head_dim,
            VALUE_DIM=self.value_dim,
            BLOCK_D=support.padded(self.head_dim),
            BLOCK_V=support.padded(self.value_dim),
            ALIGN=align,
            MASK_ALIGN=mask_align,
            BOTTOM_RIGHT=bottom_right,
            SOFTCAP=softcap > 0.0,
            QUADS=max_seqlen_k % 4 == 0,
            PRECISION="ieee" if exact else "tf32",
            CHUNK=min(_CHUNK, support.padded(self.head_dim), support.padded(self.value_dim)),
        )

    def tile(self, kernel: str) -> Tile:
        dim = max(self.constants["BLOCK_D"], self.constants["BLOCK_V"])
        return _fitting(_tile(kernel, dim, self.dtype, self.plain), self.seqlen_q, self.seqlen_k)

    def result(self, like: Tensor, heads: int, rows: int, dim: int) -> Tensor:
        """(batch, heads, rows, dim), with rows outermost but for the batch in memory."""
        new = like.new_zeros if self.untouched else like.new_empty
        return new((like.shape[0], rows, heads, dim)).transpose(1, 2)


def _blocks(tile: Tile) -> dict[str, int]:
    return dict(QUERIES=tile.queries, KEYS=tile.keys, STAGES=tile.stages, num_warps=tile.warps)


def _forward(query, key, value, *options):
    call = _Call(query, key, value, *options)
    output = call.result(query, call.heads, call.total_q, call.value_dim)
    lse = query.new_empty((query.shape[0], call.heads, call.total_q), dtype=torch.float32)
    if call.untouched:
        lse.fill_(-math.inf)
    if call.empty:
        return output, lse
    tile = call.tile("forward")
    tiles = support.ceil_div(call.seqlen_q, tile.queries)
    with support.device_guard(query.device):
        _kernels().attention_forward_kernel[(tiles * call.heads * call.batch,)](
            *call.tensors,
            *call.cu_seqlens,
            call.philox,
            output,
            lse,
            call.heads,
            call.group,
            call.seqlen_q,
            call.seqlen_k,
            call.total_q,
            call.total_k,
            tiles,
            *call.windows,
            *call.factors,
            call.softcap,
            *call.dropout,
            *call.strides,
            **call.constants,
            PLAIN=call.plain,
            **_blocks(tile),
        )
    return output, lse


def _backward(grad_output, grad_lse, query, key, value, output, lse, attn_mask, alibi_slopes, *options):
    *options, need_grad_mask, need_grad_slopes, _ = options
    call = _Call(query, key, value, attn_mask, alibi_slopes, *options, grad_output=grad_output)
    grad_query = call.result(query, call.heads, call.total_q, call.head_dim)
    grad_key = call.result(key, call.kv_heads, call.total_k, call.head_dim)
    grad_value = call.result(value, call.kv_heads, call.total_k, call.value_dim)
    grad_mask, grad_slopes = query.new_empty((0,)), query.new_empty((0,), dtype=torch.float32)
    if need_grad_mask:
        grad_mask = (attn_mask.new_zeros if call.empty else attn_mask.new_empty)(attn_mask.shape)
    if need_grad_slopes and call.empty:
        grad_slopes = torch.zeros_like(alibi_slopes)
    if call.empty:
        return grad_query, grad_key, grad_value, grad_mask, grad_slopes

    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    kernels = _kernels()
    with support.device_guard(query.device):
        rows = max(16, 8192 // call.constants["BLOCK_V"])
        row_tiles = support.ceil_div(call.total_q, rows)
        row_strides = (*_strides(grad_output), *_strides(output))
        align = support.alignment(*row_strides)
        kernels.attention_backward_rows_kernel[(row_tiles * call.heads * query.shape[0],)](
            grad_output,
            output,
            lse,
            grad_lse,
            base,
            delta,
            call.heads,
            call.total_q,
            row_tiles,
            *(stride // align for stride in row_strides),
            VALUE_DIM=call.value_dim,
            BLOCK_V=call.constants["BLOCK_V"],
            ALIGN=align,
            PLAIN=call.plain,
            QUERIES=rows,
            num_warps=8,
        )
        tile = call.tile("keys")
        tiles = support.ceil_div(call.seqlen_k, tile.keys)
        numbers = (call.heads, call.group, call.seqlen_q, call.seqlen_k)
        rest = (*call.windows, *call.factors, call.softcap, *call.dropout, *call.strides)
        kernels.attention_backward_keys_kernel[(tiles * call.kv_heads * call.batch,)](
            *call.tensors,
            *call.cu_seqlens,
            call.philox,
            grad_output,
            base,
            delta,
            grad_key,
            grad_value,
            *numbers,
            call.total_q,
            call.total_k,
            tiles,
            *rest,
            **call.constants,
            PLAIN=call.plain,
            **_blocks(tile),
        )
        tile = call.tile("queries")
        tiles = support.ceil_div(call.seqlen_q, tile.queries)
        # Zeros: of a packed sequence that is shorter than the longest, the last programs write nothing.
        slope_parts = lse.new_zeros((call.batch, call.heads, tiles)) if need_grad_slopes else None
        kernels.attention_backward_queries_kernel[(tiles * call.heads * call.batch,)](
            *call.tensors,
            *call.cu_seqlens,
            call.philox,
            grad_output,
            base,
            delta,
            grad_query,
            slope_parts,
            *numbers,
            call.total_q,
            call.total_k,
            tiles,
            *rest,
            **call.constants,
            PLAIN=call.plain,
            **_blocks(tile),
        )
        if need_grad_slopes:
            grad_slopes = slope_parts.sum(2 if alibi_slopes.dim() == 2 else (0, 2)).to(alibi_slopes.dtype)
        if need_grad_mask:
            batch, heads, *sizes = attn_mask.shape
            per_query, per_key = (
                size == length for size, length in zip(sizes, (call.seqlen_q, call.seqlen_k), strict=True)
            )
            tile = call.tile("mask")
            tiles_q, tiles_k = support.ceil_div(call.seqlen_q, tile.queries), support.ceil_div(call.seqlen_k, tile.keys)
            shared_q, shared_k = 1 if per_query else tiles_q, 1 if per_key else tiles_k
            kernels.attention_backward_mask_kernel[(batch * heads * (tiles_q // shared_q) * (tiles_k // shared_k),)](
                *call.tensors,
                call.philox,
                grad_output,
                base,
                delta,
                grad_mask,
                *numbers,
                call.batch // batch,
                call.heads // heads,
                shared_q,
                shared_k,
                *call.windows,
                *call.factors,
                call.softcap,
                *call.dropout,
                *call.strides,
                MASK_QUERIES=per_query,
                MASK_KEYS=per_key,
                **call.constants,
                QUERIES=tile.queries,
                KEYS=tile.keys,
                num_warps=tile.warps,
            )
    return grad_query, grad_key, grad_value, grad_mask, grad_slopes


support.register("attention_forward", _forward)
support.register("attention_backward", _backward)
