"""Decoding's Triton kernels.  Imported by _triton.py when the first one is launched: importing this imports Triton.

For query row i at position p of a sequence of ``end`` rows, those in use before and the new ones:

    s_ij = scale q_i . k_j      softcap: s = softcap tanh(s / softcap)      s -= slope |p - j|
    output_i = sum over the rows j that i may see of exp(s_ij - lse_i) v_j      lse_i = log(sum over j of exp(s_ij))

Floor: the bytes of the rows in use, batch kv_heads rows (head_dim + value_dim) of them, read once.

A program owns ROWS (query, head) pairs that share a key head, and one of ``splits`` parts of the sequence's keys, by
its length on the device; it walks over them KEYS at a time.  Its part's output and lse are combined by a second kernel
in the parts' order; a single part writes the results itself.

Append, in the same launch: new rows are read from ``key`` and ``value``, never from the caches, so that it does not
matter when they are written there; the programs of the first rows do, each its share.

Sums and statistics are fp32.  Weights are rounded to the dtype of the inputs for the product; an fp32 product is three
of TF32.  Rows are padded to BLOCK_D and BLOCK_V columns, powers of two, by masked loads.  Strides come in units of
ALIGN elements (_triton_support.alignment says why).  Offsets are int64.
"""

import triton
import triton.language as tl

from bigkern.ops._triton_math import exponential, tanh

_LOG2E = tl.constexpr(1.4426950408889634)

# What changes from call to call without a change in the code.
_VARYING = [
    "heads", "group", "seqlen_q", "seqlen_new", "capacity", "tiles", "splits", "all_rows", "window_left",
    "window_right", "query_batch", "query_head", "query_row", "key_cache_batch", "key_cache_head", "key_cache_row",
    "value_cache_batch", "value_cache_head", "value_cache_row", "key_batch", "key_head", "key_row", "value_batch",
    "value_head", "value_row", "slopes_batch",
]  # fmt: skip


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _VARYING if name in names])


@triton.jit
def _head_start(tensor, batch, head, stride_batch, stride_head, ALIGN: tl.constexpr):
    return tensor + (batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head) * ALIGN


@triton.jit
def _load_rows(
    cache, cache_row, fresh, fresh_row, row, length, inside, NEW: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, first_col=0
):  # fmt: skip
    """BLOCK columns of a head's rows, zeros where not ``inside``; where NEW, those from ``length`` on are new ones."""
    col = (first_col + tl.arange(0, BLOCK))[None, :]
    inside = inside[:, None] & (col < DIM)
    start = cache + row.to(tl.int64)[:, None] * cache_row * ALIGN
    if NEW:
        # Two loads: one from selected addresses would be narrow, for all that the compiler knows.
        old = row[:, None] < length
        new = fresh + (row - length).to(tl.int64)[:, None] * fresh_row * ALIGN
        held = tl.load(start + col, mask=inside & old, other=0.0)
        return tl.where(old, held, tl.load(new + col, mask=inside & (row[:, None] >= length), other=0.0))
    else:
        return tl.load(start + col, mask=inside, other=0.0)


@triton.jit
def _append(
    cache, cache_row, fresh, fresh_row, length, count, part, parts,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Writes a part of the new rows to the cache."""
    col = tl.arange(0, BLOCK)[None, :]
    for block in range(part, tl.cdiv(count, ROWS), parts):
        row = (block * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < count) & (col < DIM)
        values = tl.load(fresh + row.to(tl.int64) * fresh_row * ALIGN + col, mask=inside)
        tl.store(cache + (length + row).to(tl.int64) * cache_row * ALIGN + col, values, mask=inside)


@_jit
def attention_decode_kernel(
    query,  # batch x heads x seqlen_q x HEAD_DIM, strides query_* (times ALIGN), 1
    key_cache,  # batch x kv_heads x capacity x HEAD_DIM
    value_cache,  # batch x kv_heads x capacity x VALUE_DIM
    key,  # batch x kv_heads x seqlen_new x HEAD_DIM; or None
    value,
    cache_seqlens,  # or None: capacity
    cache_starts,  # or None
    slopes,  # fp32, by head, batches slopes_batch apart; or None
    output,  # splits x batch x seqlen_q x heads x VALUE_DIM
    lse,  # fp32, splits x batch x heads x seqlen_q
    heads,
    group,  # heads a key head
    seqlen_q,
    seqlen_new,
    capacity,
    tiles,  # of ROWS in seqlen_q * group
    splits,
    all_rows,  # batch * heads * seqlen_q
    window_left,
    window_right,
    scale,
    softcap,
    query_batch,
    query_head,
    query_row,
    key_cache_batch,
    key_cache_head,
    key_cache_row,
    value_cache_batch,
    value_cache_head,
    value_cache_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    slopes_batch,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,  # fp32
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    place = tl.program_id(0)
    split = place % splits
    tile = place // splits % tiles
    kv_heads = heads // group
    kv_head = place // splits // tiles % kv_heads
    batch = place // splits // tiles // kv_heads

    # Whatever the numbers, rows stay within the tensors.
    length, start = capacity, 0
    if cache_seqlens is not None:
        length = tl.minimum(tl.maximum(tl.load(cache_seqlens + batch), 0), capacity).to(tl.int32)
    if cache_starts is not None:
        start = tl.minimum(tl.maximum(tl.load(cache_starts + batch), 0), capacity).to(tl.int32)
    end = tl.minimum(length + seqlen_new, capacity)
    k_start = _head_start(key_cache, batch, kv_head, key_cache_batch, key_cache_head, ALIGN)
    v_start = _head_start(value_cache, batch, kv_head, value_cache_batch, value_cache_head, ALIGN)
    k_fresh, v_fresh = None, None
    if key is not None:
        k_fresh = _head_start(key, batch, kv_head, key_batch, key_head, ALIGN)
        v_fresh = _head_start(value, batch, kv_head, value_batch, value_head, ALIGN)
        if tile == 0:
            _append(
                k_start, key_cache_row, k_fresh, key_row, length, end - length, split, splits,
                HEAD_DIM, BLOCK_D, ALIGN, KEYS
            )  # fmt: skip
            _append(
                v_start, value_cache_row, v_fresh, value_row, length, end - length, split, splits,
                VALUE_DIM, BLOCK_V, ALIGN, KEYS
            )  # fmt: skip

    pair = tile * ROWS + tl.arange(0, ROWS)
    inside = pair < seqlen_q * group
    row, head = pair // group, kv_head * group + pair % group
    position = end - seqlen_q + row
    first_position = end - seqlen_q + tile * ROWS // group
    last_position = end - seqlen_q + (tl.minimum((tile + 1) * ROWS, seqlen_q * group) - 1) // group
    begin = tl.maximum(start, first_position - window_left)
    stop = tl.minimum(end, last_position + window_right + 1)
    first = begin // KEYS
    count = tl.where(stop > begin, tl.cdiv(tl.maximum(stop, 0), KEYS) - first, 0)
    part = tl.cdiv(count, splits)

    # Wide fp32 rows in parts would not fit the registers at once: there, CHUNK columns at a time come from memory.
    CHUNK: tl.constexpr = 32 if EXACT and BLOCK_D > 128 else BLOCK_D
    col = tl.arange(0, CHUNK)[None, :]
    q_start = query + (batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head)[:, None] * ALIGN
    q_start += row.to(tl.int64)[:, None] * query_row * ALIGN + col
    q = tl.load(q_start, mask=inside[:, None] & (col < HEAD_DIM), other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_batch + head, mask=inside, other=0.0)[:, None]
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    NEW_TILES: tl.constexpr = 0 if key is None else 1
    from_tile, to_tile = tl.minimum(split * part, count), tl.minimum((split + 1) * part, count)
    # Tiles of rows that the caches hold, then those with new rows among them.
    held_tiles = tl.minimum(tl.maximum(length // KEYS - first, from_tile), to_tile) if NEW_TILES else to_tile
    for new in tl.static_range(0, NEW_TILES + 1):
        # New rows are few: what they had in flight would only take shared memory.
        for index in tl.range(
            held_tiles if new else from_tile, to_tile if new else held_tiles, num_stages=1 if new else STAGES
        ):
            j = (first + index) * KEYS + tl.arange(0, KEYS)
            held = (j >= begin) & (j < stop)
            v = _load_rows(
                v_start, value_cache_row, v_fresh, value_row, j, length, held, new, VALUE_DIM, BLOCK_V, ALIGN
            )  # fmt: skip
            k = _load_rows(k_start, key_cache_row, k_fresh, key_row, j, length, held, new, HEAD_DIM, CHUNK, ALIGN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            for first_col in tl.range(CHUNK, BLOCK_D, CHUNK, num_stages=1):
                q_part = tl.load(
                    q_start + first_col, mask=inside[:, None] & (first_col + col < HEAD_DIM), other=0.0
                )  # fmt: skip
                k_part = _load_rows(
                    k_start, key_cache_row, k_fresh, key_row, j, length, held, new, HEAD_DIM, CHUNK, ALIGN, first_col
                )  # fmt: skip
                scores += tl.dot(q_part, tl.trans(k_part), input_precision=PRECISION)
            scores *= scale
            if SOFTCAP:
                scores = softcap * tanh(scores / softcap)
            distance = j[None, :] - position[:, None]
            if slope is not None:
                scores -= slope * tl.abs(distance.to(tl.float32))
            seen = held[None, :] & (distance >= -window_left) & (distance <= window_right)
            scores = tl.where(seen, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that sees nothing yet: its sums stay 0 whatever they are multiplied with.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = exponential(scores - base[:, None], _LOG2E, EXACT)
            rescale = exponential(top - base, _LOG2E, EXACT)
            total = total * rescale + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            top = new_top

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    out_col = tl.arange(0, BLOCK_V)[None, :]
    from_part = split.to(tl.int64) * all_rows
    out_row = from_part + (batch.to(tl.int64) * seqlen_q + row) * heads + head
    tl.store(
        output + out_row[:, None] * VALUE_DIM + out_col,
        (acc / total[:, None]).to(output.dtype.element_ty),
        mask=inside[:, None] & (out_col < VALUE_DIM),
    )
    lse_row = from_part + (batch.to(tl.int64) * heads + head) * seqlen_q + row
    tl.store(lse + lse_row, tl.where(blind, -float("inf"), top + tl.log(total)), mask=inside)


@_jit
def attention_decode_combine_kernel(
    parts,  # fp32, splits x batch x seqlen_q x heads x VALUE_DIM
    lse_parts,  # fp32, splits x batch x heads x seqlen_q
    output,  # batch x seqlen_q x heads x VALUE_DIM
    lse,  # fp32, batch x heads x seqlen_q
    heads,
    seqlen_q,
    splits,
    all_rows,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of the output: each part's, weighed by its share of the exponentials' sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < all_rows
    col = tl.arange(0, BLOCK_V)[None, :]
    place = row[:, None] * VALUE_DIM + col
    lse_row = (row // heads // seqlen_q * heads + row % heads) * seqlen_q + row // heads % seqlen_q
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in tl.range(0, splits, num_stages=2):
        before = (row * 0 + split) * all_rows
        part_lse = tl.load(lse_parts + before + lse_row, mask=inside, other=-float("inf"))
        values = tl.load(
            parts + before[:, None] * VALUE_DIM + place, mask=inside[:, None] & (col < VALUE_DIM), other=0.0
        )
        new_top = tl.maximum(top, part_lse)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = exponential(part_lse - base, _LOG2E, EXACT)
        rescale = exponential(top - base, _LOG2E, EXACT)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + values * weight[:, None]
        top = new_top
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    tl.store(
        output + place,
        (acc / total[:, None]).to(output.dtype.element_ty),
        mask=inside[:, None] & (col < VALUE_DIM),
    )
    tl.store(lse + lse_row, tl.where(blind, -float("inf"), top + tl.log(total)), mask=inside)
