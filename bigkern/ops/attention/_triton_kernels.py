"""Attention's Triton kernels.  Imported by _triton.py when the first one is launched: importing this imports Triton.

For query row i and key row j that i may see:

    s_ij = scale q_i . k_j      softcap: s = softcap tanh(s / softcap)      s += mask_ij - slope |position_i - j|
    p_ij = exp(s_ij - lse_i)    lse_i = log(sum over j of exp(s_ij))        output_i = sum over j of drop(p_ij) v_j

and backward, with g = grad_output and drop's mask and factor m_ij, 0 or 1 / (1 - dropout_p):

    delta_i = g_i . output_i - grad_lse_i            ds_ij = p_ij (m_ij g_i . v_j - delta_i)      grad_mask = ds
    grad_v_j = sum over i of m_ij p_ij g_i           c_ij = 1, or 1 - tanh^2 under softcap
    grad_q_i = scale sum over j of ds_ij c_ij k_j    grad_k_j = scale sum over i of ds_ij c_ij q_i
    grad_slope = -sum over i and j of ds_ij |position_i - j|

Floors: forward 4 B H Sq Sk d FLOP, backward 2.5 times that, half of each if causal.  Backward here does 3.5 times that:
grad_query has a kernel of its own, which computes the scores once more, so that every sum has one owner and a fixed
order, without atomics and without fp32 copies of grad_query.  So has the mask's gradient, where it is wanted (two more
products): a program owns a tile of it and adds up all that a broadcast mask was added to.  The slopes' gradient is
summed beside grad_query's, a number a program, which the host adds up.

A program owns QUERIES rows of a head (or KEYS keys of a key head) and walks over tiles of the others.  Tiles that the
window hides from all rows are skipped.  Those that every row sees whole come first, without a comparison; then those
that a limit or the end of the sequence cuts.  Rows with the most keys start first.

PLAIN is attention by tensor cores with nothing but windows and a positive scale: the scores stay q . k, and the factor
that takes them to powers of two scales them too; backward, in one fused multiplication.  Otherwise they are scaled as
written above, and the difference from lse, as forward the one from the maximum, is taken first, which rounds less.

Sums and statistics are fp32.  p and ds are rounded to the inputs' dtype for the products; fp32 products are fp32 or
TF32 as PRECISION says.  Rows are padded to BLOCK_D and BLOCK_V columns, powers of two, by masked loads.

Results lie in memory as (batch, rows, heads, dim).  Packed sequences are one batch of ``total`` rows; without them
``total`` is seqlen.  Strides come in units of ALIGN elements (_triton_support.alignment says why).  Offsets are int64.
"""

import triton
import triton.language as tl

from bigkern.ops._triton_math import exponential, tanh
from bigkern.ops._triton_philox import dropout_keep

_LOG2E = tl.constexpr(1.4426950408889634)

# What changes from call to call, or from layer to layer, without a change in the code.
_VARYING = [
    "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "tiles", "window_left", "window_right", "shared_b",
    "shared_h", "shared_q", "shared_k", "query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row",
    "value_batch", "value_head", "value_row", "output_batch", "output_head", "output_row", "grad_batch", "grad_head",
    "grad_row", "mask_batch", "mask_head", "mask_row", "slopes_batch",
]  # fmt: skip


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _VARYING if name in names])


@triton.jit
def _sequence(
    batch, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, total_q, total_k, BOTTOM_RIGHT: tl.constexpr
):  # fmt: skip
    """One sequence: queries, keys, the rows before them in packed tensors, query 0's position, place in the batch."""
    queries, keys, first_q, first_k, home = seqlen_q, seqlen_k, batch * 0, batch * 0, batch
    if cu_seqlens_q is not None:
        # Whatever the numbers, rows stay within the tensors.
        first_q = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + batch), 0), total_q)
        end_q = tl.minimum(tl.load(cu_seqlens_q + batch + 1), total_q)
        queries = tl.minimum(tl.maximum(end_q - first_q, 0), seqlen_q)
        first_k = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + batch), 0), total_k)
        end_k = tl.minimum(tl.load(cu_seqlens_k + batch + 1), total_k)
        keys = tl.minimum(tl.maximum(end_k - first_k, 0), seqlen_k)
        home = batch * 0
    shift = keys - queries if BOTTOM_RIGHT else batch * 0
    return queries, keys, first_q, first_k, shift, home


@triton.jit
def _head_start(tensor, batch, head, first, stride_batch, stride_head, stride_row, ALIGN: tl.constexpr):
    """Where row ``first`` of a head of a strided tensor begins."""
    offset = batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_row
    return tensor + offset * ALIGN


@triton.jit
def _load_rows(
    start, row, rows, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, first_col=0
):  # fmt: skip
    """BLOCK columns of rows of a head, zeros beyond the last row and beyond DIM columns."""
    col = (first_col + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (col < DIM)
    return tl.load(start + row.to(tl.int64)[:, None] * stride * ALIGN + col, mask=inside, other=0.0)


@triton.jit
def _products(
    a, a_start, a_row, a_rows, a_stride, b, b_start, b_row, b_rows, b_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """a b^T of two tiles of rows.

    Without tensor cores each thread would hold all that it multiplies in registers, where it does not fit: there, CHUNK
    columns at a time come from memory.  Their sums are added up apart, which rounds less than one long sum.
    """
    if PRECISION == "ieee":
        result = tl.zeros((a_row.shape[0], b_row.shape[0]), tl.float32)
        for first in tl.range(0, BLOCK, CHUNK, num_stages=1):
            a_part = _load_rows(a_start, a_row, a_rows, a_stride, DIM, CHUNK, ALIGN, first)
            b_part = _load_rows(b_start, b_row, b_rows, b_stride, DIM, CHUNK, ALIGN, first)
            result += tl.dot(a_part, tl.trans(b_part), input_precision=PRECISION)
        return result
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def _store_rows(
    tensor, values, batch, head, first, row, rows, total, heads, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows of a head of a result."""
    col = tl.arange(0, BLOCK)[None, :]
    place = (batch.to(tl.int64) * total + first + row[:, None]) * heads + head
    inside = (row < rows)[:, None] & (col < DIM)
    tl.store(tensor + place * DIM + col, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _key_tiles(
    row0, queries, keys, shift, window_left, window_right, WHOLE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The tiles of keys that rows from row0 on may see: the first, how many; and of those that each sees whole.

    Those are not told apart unless WHOLE.
    """
    last = tl.minimum(row0 + QUERIES, queries) - 1
    begin = tl.maximum(row0 + shift - window_left, 0)
    end = tl.minimum(keys, last + shift + window_right + 1)
    first = begin // KEYS
    count = tl.where(end > begin, tl.cdiv(tl.maximum(end, 0), KEYS) - first, 0)
    whole_first = tl.maximum(tl.cdiv(tl.maximum(last + shift - window_left, 0), KEYS), first)
    whole_end = tl.minimum(keys, tl.maximum(row0 + shift + window_right + 1, 0)) // KEYS
    whole = tl.maximum(whole_end - whole_first, 0) if WHOLE else 0
    return first, count, whole_first, whole


@triton.jit
def _query_tiles(
    key0, queries, keys, shift, window_left, window_right, WHOLE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The same of the tiles of queries that may see keys from key0 on; rows beyond the last query count as seeing."""
    last = tl.minimum(key0 + KEYS, keys) - 1
    begin = tl.maximum(key0 - shift - window_right, 0)
    end = tl.minimum(queries, last - shift + window_left + 1)
    first = begin // QUERIES
    count = tl.where(end > begin, tl.cdiv(tl.maximum(end, 0), QUERIES) - first, 0)
    whole_first = tl.maximum(tl.cdiv(tl.maximum(last - shift - window_right, 0), QUERIES), first)
    limit = tl.maximum(key0 - shift + window_left + 1, 0)
    whole_end = tl.where(limit >= queries, tl.cdiv(queries, QUERIES), limit // QUERIES)
    whole = tl.where(count > 0, tl.maximum(whole_end - whole_first, 0), 0) if WHOLE else 0
    return first, count, whole_first, whole


@triton.jit
def _tile(index, first, whole_first, whole, CUT: tl.constexpr):
    """The number of the index-th tile that is seen whole, or that is CUT."""
    if CUT:
        return first + index + tl.where(first + index >= whole_first, whole, 0)
    else:
        return whole_first + index


@triton.jit
def _seen(scores, query, key, keys, shift, window_left, window_right):
    distance = key - query - shift
    return tl.where((distance >= -window_left) & (distance <= window_right) & (key < keys), scores, -float("inf"))


@triton.jit
def _scores(
    products, query, key, queries, keys, shift, mask, mask_row, mask_col, slope, scale, softcap,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, MASK_ALIGN: tl.constexpr
):  # fmt: skip
    """From q . k to the scores, and their derivative by scale q . k; both as they are where PLAIN.

    query, key: the tile's rows and columns, or the other way round.  mask: where the head's begins, or None.
    """
    scores, derivative = products, 1.0
    if not PLAIN:
        scores = products * scale
        if SOFTCAP:
            squashed = tanh(scores / softcap)
            scores, derivative = softcap * squashed, 1.0 - squashed * squashed
        if mask is not None:
            place = mask + query.to(tl.int64) * mask_row * MASK_ALIGN + key.to(tl.int64) * mask_col
            values = tl.load(place, mask=(query < queries) & (key < keys), other=0)
            if mask.dtype.element_ty == tl.uint8:
                scores = tl.where(values != 0, scores, -float("inf"))
            else:
                scores += values.to(tl.float32)
        if slope is not None:
            scores -= slope * tl.abs((query + shift - key).to(tl.float32))
    return scores, derivative


@triton.jit
def _weights(scores, base, factor, PLAIN: tl.constexpr, PRECISION: tl.constexpr):
    """The weights of a row, or column, whose ``base`` attention_backward_rows_kernel computed."""
    if PLAIN:
        return tl.exp2(tl.fma(scores, factor, -base))
    else:
        return exponential(scores - base, factor, PRECISION == "ieee")


@triton.jit
def _mask_start(mask, batch, head, mask_batch, mask_head, MASK_ALIGN: tl.constexpr):
    if mask is None:
        return None
    else:
        return mask + (batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head) * MASK_ALIGN


@triton.jit
def _slope(slopes, batch, head, slopes_batch):
    if slopes is None:
        return None
    else:
        return tl.load(slopes + batch * slopes_batch + head)


@triton.jit
def _kept(
    philox, batch, head, heads, query, key0, seqlen_q, seqlen_k, dropout_p,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, QUADS: tl.constexpr
):  # fmt: skip
    """Which weights of a QUERIES x KEYS tile dropout keeps, numbered in (sequences, heads, seqlen_q, seqlen_k)."""
    first = ((batch.to(tl.int64) * heads + head) * seqlen_q + query[:, None]) * seqlen_k + key0
    return dropout_keep(philox, first, dropout_p, QUERIES, KEYS, QUADS)


@_jit
def attention_forward_kernel(
    query,  # batch x heads x total_q x HEAD_DIM, strides query_* (times ALIGN), 1
    key,  # batch x kv_heads x total_k x HEAD_DIM
    value,  # batch x kv_heads x total_k x VALUE_DIM
    mask,  # strides mask_* (times MASK_ALIGN), mask_col; uint8 for bool; or None
    slopes,  # fp32, by head, batches slopes_batch apart; or None
    cu_seqlens_q,
    cu_seqlens_k,
    philox,  # or None: no dropout
    output,  # batch x total_q x heads x VALUE_DIM
    lse,  # fp32, batch x heads x total_q
    heads,
    group,  # heads a key head
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    tiles,  # of QUERIES in seqlen_q
    window_left,
    window_right,
    scale,
    factor,  # log2(e), times the scale where PLAIN
    softcap,
    dropout_p,
    dropout_scale,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_col,
    slopes_batch,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = tl.program_id(0)
    row0 = (tiles - 1 - place % tiles) * QUERIES
    head = place // tiles % heads
    batch = place // tiles // heads
    queries, keys, first_q, first_k, shift, home = _sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, total_q, total_k, BOTTOM_RIGHT
    )
    if row0 >= queries:
        return
    row = row0 + tl.arange(0, QUERIES)
    q_start = _head_start(query, home, head, first_q, query_batch, query_head, query_row, ALIGN)
    k_start = _head_start(key, home, head // group, first_k, key_batch, key_head, key_row, ALIGN)
    v_start = _head_start(value, home, head // group, first_k, value_batch, value_head, value_row, ALIGN)
    mask = _mask_start(mask, batch, head, mask_batch, mask_head, MASK_ALIGN)
    slope = _slope(slopes, batch, head, slopes_batch)
    WHOLE: tl.constexpr = PRECISION != "ieee"  # otherwise a comparison costs little beside the products
    first, count, whole_first, whole = _key_tiles(
        row0, queries, keys, shift, window_left, window_right, WHOLE, QUERIES, KEYS
    )  # fmt: skip

    q = _load_rows(q_start, row, queries, query_row, HEAD_DIM, BLOCK_D, ALIGN)
    acc = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for cut in tl.static_range(0 if WHOLE else 1, 2):
        for index in tl.range(0, count - whole if cut else whole, num_stages=STAGES):
            key0 = _tile(index, first, whole_first, whole, cut) * KEYS
            col = key0 + tl.arange(0, KEYS)
            k = _load_rows(k_start, col, keys, key_row, HEAD_DIM, BLOCK_D, ALIGN)
            products = _products(
                q, q_start, row, queries, query_row, k, k_start, col, keys, key_row,
                HEAD_DIM, BLOCK_D, ALIGN, PRECISION, CHUNK
            )  # fmt: skip
            scores, _ = _scores(
                products, row[:, None], col[None, :], queries, keys, shift, mask, mask_row, mask_col, slope, scale,
                softcap, PLAIN, SOFTCAP, MASK_ALIGN
            )  # fmt: skip
            if cut:
                scores = _seen(scores, row[:, None], col[None, :], keys, shift, window_left, window_right)
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that sees nothing yet: its sums stay 0 whatever they are multiplied with.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = exponential(scores - base[:, None], factor, PRECISION == "ieee")
            rescale = exponential(top - base, factor, PRECISION == "ieee")
            total = total * rescale + tl.sum(weights, 1)
            if philox is not None:
                keep = _kept(
                    philox, batch, head, heads, row, key0, seqlen_q, seqlen_k, dropout_p, QUERIES, KEYS, QUADS
                )  # fmt: skip
                weights = tl.where(keep, weights, 0.0)
            v = _load_rows(v_start, col, keys, value_row, VALUE_DIM, BLOCK_V, ALIGN)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            top = new_top

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    if PRECISION == "ieee":  # rounded once; a reciprocal would round once more
        result = tl.div_rn(acc * dropout_scale, tl.broadcast_to(total[:, None], acc.shape))
    else:
        result = acc * (dropout_scale / total)[:, None]
    _store_rows(output, result, home, head, first_q, row, queries, total_q, heads, VALUE_DIM, BLOCK_V)
    row_lse = (top * scale if PLAIN else top) + tl.log(total)
    row_lse = tl.where(blind, -float("inf"), row_lse)
    lse_place = (home.to(tl.int64) * heads + head) * total_q + first_q + row
    tl.store(lse + lse_place, row_lse, mask=row < queries)


@_jit
def attention_backward_rows_kernel(
    grad_output,  # batch x heads x total_q x VALUE_DIM, strides grad_* (times ALIGN), 1
    output,  # the same, strides output_*
    lse,
    grad_lse,  # or None
    base,  # of the exponentials: lse, times log2(e) where PLAIN; infinite where a row sees nothing
    delta,
    heads,
    total_q,
    tiles,
    grad_batch,
    grad_head,
    grad_row,
    output_batch,
    output_head,
    output_row,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    PLAIN: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Each row's statistics."""
    place = tl.program_id(0)
    row = place % tiles * QUERIES + tl.arange(0, QUERIES)
    head = place // tiles % heads
    batch = place // tiles // heads
    none = batch * 0
    g_start = _head_start(grad_output, batch, head, none, grad_batch, grad_head, grad_row, ALIGN)
    o_start = _head_start(output, batch, head, none, output_batch, output_head, output_row, ALIGN)
    g = _load_rows(g_start, row, total_q, grad_row, VALUE_DIM, BLOCK_V, ALIGN)
    o = _load_rows(o_start, row, total_q, output_row, VALUE_DIM, BLOCK_V, ALIGN)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    statistic = (batch.to(tl.int64) * heads + head) * total_q + row
    inside = row < total_q
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + statistic, mask=inside, other=0.0)
    row_lse = tl.load(lse + statistic, mask=inside, other=0.0)
    row_base = row_lse * _LOG2E if PLAIN else row_lse
    tl.store(base + statistic, tl.where(row_lse == -float("inf"), float("inf"), row_base), mask=inside)
    tl.store(delta + statistic, row_delta, mask=inside)


@_jit
def attention_backward_keys_kernel(
    query,
    key,
    value,
    mask,
    slopes,
    cu_seqlens_q,
    cu_seqlens_k,
    philox,
    grad_output,
    base,
    delta,
    grad_key,  # batch x total_k x kv_heads x HEAD_DIM
    grad_value,  # batch x total_k x kv_heads x VALUE_DIM
    heads,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    tiles,  # of KEYS in seqlen_k
    window_left,
    window_right,
    scale,
    factor,
    softcap,
    dropout_p,
    dropout_scale,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_col,
    slopes_batch,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_key and grad_value.  Scores are transposed: their rows are the program's keys."""
    place = tl.program_id(0)
    key0 = place % tiles * KEYS
    kv_heads = heads // group
    kv_head = place // tiles % kv_heads
    batch = place // tiles // kv_heads
    queries, keys, first_q, first_k, shift, home = _sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, total_q, total_k, BOTTOM_RIGHT
    )
    if key0 >= keys:
        return
    row = key0 + tl.arange(0, KEYS)
    k_start = _head_start(key, home, kv_head, first_k, key_batch, key_head, key_row, ALIGN)
    v_start = _head_start(value, home, kv_head, first_k, value_batch, value_head, value_row, ALIGN)
    WHOLE: tl.constexpr = PRECISION != "ieee"  # otherwise a comparison costs little beside the products
    first, count, whole_first, whole = _query_tiles(
        key0, queries, keys, shift, window_left, window_right, WHOLE, QUERIES, KEYS
    )  # fmt: skip

    k = _load_rows(k_start, row, keys, key_row, HEAD_DIM, BLOCK_D, ALIGN)
    v = _load_rows(v_start, row, keys, value_row, VALUE_DIM, BLOCK_V, ALIGN)
    grad_k = tl.zeros((KEYS, BLOCK_D), tl.float32)
    grad_v = tl.zeros((KEYS, BLOCK_V), tl.float32)
    for cut in tl.static_range(0 if WHOLE else 1, 2):
        steps = count - whole if cut else whole
        for index in tl.range(0, steps * group, num_stages=STAGES):
            head = kv_head * group + index // steps
            query0 = _tile(index % steps, first, whole_first, whole, cut) * QUERIES
            col = query0 + tl.arange(0, QUERIES)
            q_start = _head_start(query, home, head, first_q, query_batch, query_head, query_row, ALIGN)
            g_start = _head_start(grad_output, home, head, first_q, grad_batch, grad_head, grad_row, ALIGN)
            q = _load_rows(q_start, col, queries, query_row, HEAD_DIM, BLOCK_D, ALIGN)
            g = _load_rows(g_start, col, queries, grad_row, VALUE_DIM, BLOCK_V, ALIGN)
            statistic = (home.to(tl.int64) * heads + head) * total_q + first_q + col
            row_base = tl.load(base + statistic, mask=col < queries, other=float("inf"))
            row_delta = tl.load(delta + statistic, mask=col < queries, other=0.0)

            if PRECISION == "ieee":  # as forward multiplies, or else the scores would round differently from lse's
                products = tl.trans(
                    _products(
                        q, q_start, col, queries, query_row, k, k_start, row, keys, key_row,
                        HEAD_DIM, BLOCK_D, ALIGN, PRECISION, CHUNK
                    )
                )  # fmt: skip
            else:
                products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores, derivative = _scores(
                products, col[None, :], row[:, None], queries, keys, shift,
                _mask_start(mask, batch, head, mask_batch, mask_head, MASK_ALIGN), mask_row, mask_col,
                _slope(slopes, batch, head, slopes_batch), scale, softcap, PLAIN, SOFTCAP, MASK_ALIGN
            )  # fmt: skip
            if cut:
                scores = _seen(scores, col[None, :], row[:, None], keys, shift, window_left, window_right)
            weights = _weights(scores, row_base[None, :], factor, PLAIN, PRECISION)
            grads = _products(
                v, v_start, row, keys, value_row, g, g_start, col, queries, grad_row,
                VALUE_DIM, BLOCK_V, ALIGN, PRECISION, CHUNK
            )  # fmt: skip
            kept_weights = weights
            if philox is not None:
                keep = tl.trans(
                    _kept(philox, batch, head, heads, col, key0, seqlen_q, seqlen_k, dropout_p, QUERIES, KEYS, QUADS)
                )
                kept_weights = tl.where(keep, weights, 0.0)
                grads = tl.where(keep, grads * dropout_scale, 0.0)
            grad_v = tl.dot(kept_weights.to(g.dtype), g, grad_v, input_precision=PRECISION)
            grads = weights * (grads - row_delta[None, :]) * derivative
            grad_k = tl.dot(grads.to(q.dtype), q, grad_k, input_precision=PRECISION)

    _store_rows(grad_key, grad_k * scale, home, kv_head, first_k, row, keys, total_k, kv_heads, HEAD_DIM, BLOCK_D)
    _store_rows(
        grad_value, grad_v * dropout_scale, home, kv_head, first_k, row, keys, total_k, kv_heads, VALUE_DIM, BLOCK_V
    )


@triton.jit
def _grad_scores(
    q, q_start, query_row, g, g_start, grad_row, k, k_start, key_row, v, v_start, value_row,
    row_base, row_delta, row, col, key0, batch, head, heads, queries, keys, shift, seqlen_q, seqlen_k,
    mask, mask_row, mask_col, slope, philox, window_left, window_right, scale, factor, softcap, dropout_p,
    dropout_scale, CUT: tl.constexpr, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    QUADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """ds of a QUERIES x KEYS tile, and the derivative c."""
    products = _products(
        q, q_start, row, queries, query_row, k, k_start, col, keys, key_row,
        HEAD_DIM, BLOCK_D, ALIGN, PRECISION, CHUNK
    )  # fmt: skip
    scores, derivative = _scores(
        products, row[:, None], col[None, :], queries, keys, shift, mask, mask_row, mask_col, slope, scale, softcap,
        PLAIN, SOFTCAP, MASK_ALIGN
    )  # fmt: skip
    if CUT:
        scores = _seen(scores, row[:, None], col[None, :], keys, shift, window_left, window_right)
    weights = _weights(scores, row_base[:, None], factor, PLAIN, PRECISION)
    grads = _products(
        g, g_start, row, queries, grad_row, v, v_start, col, keys, value_row,
        VALUE_DIM, BLOCK_V, ALIGN, PRECISION, CHUNK
    )  # fmt: skip
    if philox is not None:
        keep = _kept(philox, batch, head, heads, row, key0, seqlen_q, seqlen_k, dropout_p, QUERIES, KEYS, QUADS)
        grads = tl.where(keep, grads * dropout_scale, 0.0)
    return weights * (grads - row_delta[:, None]), derivative


@_jit
def attention_backward_queries_kernel(
    query,
    key,
    value,
    mask,
    slopes,
    cu_seqlens_q,
    cu_seqlens_k,
    philox,
    grad_output,
    base,
    delta,
    grad_query,  # batch x total_q x heads x HEAD_DIM
    grad_slopes,  # fp32, sequences x heads x tiles: each program's part; or None
    heads,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    tiles,  # of QUERIES in seqlen_q
    window_left,
    window_right,
    scale,
    factor,
    softcap,
    dropout_p,
    dropout_scale,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_col,
    slopes_batch,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = tl.program_id(0)
    row0 = (tiles - 1 - place % tiles) * QUERIES
    head = place // tiles % heads
    batch = place // tiles // heads
    queries, keys, first_q, first_k, shift, home = _sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, total_q, total_k, BOTTOM_RIGHT
    )
    if row0 >= queries:
        return
    row = row0 + tl.arange(0, QUERIES)
    q_start = _head_start(query, home, head, first_q, query_batch, query_head, query_row, ALIGN)
    g_start = _head_start(grad_output, home, head, first_q, grad_batch, grad_head, grad_row, ALIGN)
    k_start = _head_start(key, home, head // group, first_k, key_batch, key_head, key_row, ALIGN)
    v_start = _head_start(value, home, head // group, first_k, value_batch, value_head, value_row, ALIGN)
    mask = _mask_start(mask, batch, head, mask_batch, mask_head, MASK_ALIGN)
    slope = _slope(slopes, batch, head, slopes_batch)
    WHOLE: tl.constexpr = PRECISION != "ieee"  # otherwise a comparison costs little beside the products
    first, count, whole_first, whole = _key_tiles(
        row0, queries, keys, shift, window_left, window_right, WHOLE, QUERIES, KEYS
    )  # fmt: skip

    q = _load_rows(q_start, row, queries, query_row, HEAD_DIM, BLOCK_D, ALIGN)
    g = _load_rows(g_start, row, queries, grad_row, VALUE_DIM, BLOCK_V, ALIGN)
    statistic = (home.to(tl.int64) * heads + head) * total_q + first_q + row
    row_base = tl.load(base + statistic, mask=row < queries, other=float("inf"))
    row_delta = tl.load(delta + statistic, mask=row < queries, other=0.0)
    grad_q = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    grad_slope = tl.zeros((QUERIES,), tl.float32)
    for cut in tl.static_range(0 if WHOLE else 1, 2):
        for index in tl.range(0, count - whole if cut else whole, num_stages=STAGES):
            key0 = _tile(index, first, whole_first, whole, cut) * KEYS
            col = key0 + tl.arange(0, KEYS)
            k = _load_rows(k_start, col, keys, key_row, HEAD_DIM, BLOCK_D, ALIGN)
            v = _load_rows(v_start, col, keys, value_row, VALUE_DIM, BLOCK_V, ALIGN)
            grads, derivative = _grad_scores(
                q, q_start, query_row, g, g_start, grad_row, k, k_start, key_row, v, v_start, value_row,
                row_base, row_delta, row, col, key0, batch, head, heads, queries, keys, shift, seqlen_q, seqlen_k,
                mask, mask_row, mask_col, slope, philox, window_left, window_right, scale, factor, softcap,
                dropout_p, dropout_scale, cut, SOFTCAP, PLAIN, MASK_ALIGN, QUADS, HEAD_DIM, VALUE_DIM, BLOCK_D,
                BLOCK_V, ALIGN, PRECISION, CHUNK, QUERIES, KEYS
            )  # fmt: skip
            if grad_slopes is not None:
                grad_slope -= tl.sum(grads * tl.abs((row[:, None] + shift - col[None, :]).to(tl.float32)), 1)
            grad_q = tl.dot((grads * derivative).to(k.dtype), k, grad_q, input_precision=PRECISION)
    _store_rows(grad_query, grad_q * scale, home, head, first_q, row, queries, total_q, heads, HEAD_DIM, BLOCK_D)
    if grad_slopes is not None:
        part = (batch.to(tl.int64) * heads + head) * tiles + row0 // QUERIES
        tl.store(grad_slopes + part, tl.sum(grad_slope, 0))


@_jit
def attention_backward_mask_kernel(
    query,
    key,
    value,
    mask,
    slopes,
    philox,
    grad_output,
    base,
    delta,
    grad_mask,  # contiguous
    heads,
    group,
    seqlen_q,
    seqlen_k,
    shared_b,  # how many batches, heads, tiles of queries and of keys have one element of the mask together
    shared_h,
    shared_q,
    shared_k,
    window_left,
    window_right,
    scale,
    factor,
    softcap,
    dropout_p,
    dropout_scale,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_col,
    slopes_batch,
    MASK_QUERIES: tl.constexpr,  # whether the mask has a row for each query, and a column for each key
    MASK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of the mask's gradient, which is the sum of ds over all that share it."""
    tiles_q, tiles_k = tl.cdiv(seqlen_q, QUERIES), tl.cdiv(seqlen_k, KEYS)
    mask_tiles_q, mask_tiles_k = tiles_q // shared_q, tiles_k // shared_k
    place = tl.program_id(0)
    tile_k = place % mask_tiles_k
    tile_q = place // mask_tiles_k % mask_tiles_q
    mask_h = place // mask_tiles_k // mask_tiles_q % (heads // shared_h)
    mask_b = place // mask_tiles_k // mask_tiles_q // (heads // shared_h)
    shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else place * 0

    acc = tl.zeros((QUERIES, KEYS), tl.float32)
    for index in range(shared_b * shared_h * shared_q * shared_k):
        key0 = (tile_k + index % shared_k) * KEYS
        row0 = (tile_q + index // shared_k % shared_q) * QUERIES
        head = mask_h + index // shared_k // shared_q % shared_h
        batch = mask_b + index // shared_k // shared_q // shared_h
        last_row, last_key = row0 + QUERIES - 1, key0 + KEYS - 1
        if (last_key >= row0 + shift - window_left) & (key0 <= last_row + shift + window_right):
            row, col = row0 + tl.arange(0, QUERIES), key0 + tl.arange(0, KEYS)
            none = batch * 0
            q_start = _head_start(query, batch, head, none, query_batch, query_head, query_row, ALIGN)
            g_start = _head_start(grad_output, batch, head, none, grad_batch, grad_head, grad_row, ALIGN)
            k_start = _head_start(key, batch, head // group, none, key_batch, key_head, key_row, ALIGN)
            v_start = _head_start(value, batch, head // group, none, value_batch, value_head, value_row, ALIGN)
            q = _load_rows(q_start, row, seqlen_q, query_row, HEAD_DIM, BLOCK_D, ALIGN)
            g = _load_rows(g_start, row, seqlen_q, grad_row, VALUE_DIM, BLOCK_V, ALIGN)
            k = _load_rows(k_start, col, seqlen_k, key_row, HEAD_DIM, BLOCK_D, ALIGN)
            v = _load_rows(v_start, col, seqlen_k, value_row, VALUE_DIM, BLOCK_V, ALIGN)
            statistic = (batch.to(tl.int64) * heads + head) * seqlen_q + row
            row_base = tl.load(base + statistic, mask=row < seqlen_q, other=float("inf"))
            row_delta = tl.load(delta + statistic, mask=row < seqlen_q, other=0.0)
            grads, _ = _grad_scores(
                q, q_start, query_row, g, g_start, grad_row, k, k_start, key_row, v, v_start, value_row,
                row_base, row_delta, row, col, key0, batch, head, heads, seqlen_q, seqlen_k, shift, seqlen_q, seqlen_k,
                _mask_start(mask, batch, head, mask_batch, mask_head, MASK_ALIGN), mask_row, mask_col,
                _slope(slopes, batch, head, slopes_batch), philox, window_left, window_right, scale, factor, softcap,
                dropout_p, dropout_scale, True, SOFTCAP, False, MASK_ALIGN, QUADS, HEAD_DIM, VALUE_DIM, BLOCK_D,
                BLOCK_V, ALIGN, PRECISION, CHUNK, QUERIES, KEYS
            )  # fmt: skip
            acc += grads

    ROWS: tl.constexpr = QUERIES if MASK_QUERIES else 1
    COLS: tl.constexpr = KEYS if MASK_KEYS else 1
    rows, cols = seqlen_q if MASK_QUERIES else 1, seqlen_k if MASK_KEYS else 1
    if not MASK_QUERIES:
        acc = tl.sum(acc, 0, keep_dims=True)
    if not MASK_KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
    row = (tile_q * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tile_k * COLS + tl.arange(0, COLS))[None, :]
    place = ((mask_b.to(tl.int64) * (heads // shared_h) + mask_h) * rows + row) * cols + col
    tl.store(grad_mask + place, acc.to(grad_mask.dtype.element_ty), mask=(row < rows) & (col < cols))
