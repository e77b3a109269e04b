"""Layer norm's Triton kernels.  Imported by _triton.py when the first one is launched: importing this imports Triton.

Every tensor is rows x cols.  With x = residual + dropout(input), rounded to the input's dtype, and d = cols:

    mean = sum(x) / d                          (0 for RMS norm)
    rstd = 1 / sqrt(sum((x - mean)^2) / d + eps)
    x^   = (x - mean) * rstd
    output = x^ * weight + bias

and, for g = grad_output * weight,

    grad_x = rstd * (g - x^ * sum(g * x^) / d - sum(g) / d) + grad_summed       (no sum(g) term for RMS norm)
    grad_weight = sum over rows of grad_output * x^,  grad_bias = sum over rows of grad_output

A program holds a tile of ROWS whole rows, padded to BLOCK columns, in registers: one read, one write.  A row too wide
for that is split over several programs, which meet in a small tensor of partial results: forward then reads its input
twice, backward both its inputs twice.  The second reading is fast where the tensor fits in the L2 cache.

Widths and strides come in units of ALIGN elements (_triton_support.alignment says why).  Offsets are int64: row is, and
comes first in every product.
"""

import triton
import triton.language as tl

from bigkern.ops._triton_philox import dropout_keep


@triton.jit
def _sum_input(
    x, residual_tile, summed, philox, row, col, inside, cols, dropout_p, dropout_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """residual + dropout(x), rounded to and stored in summed's dtype; returns the rounded sum in fp32.

    residual_tile points to the residual's elements of the tile.
    """
    if DROPOUT:
        first = row * cols + tl.program_id(1) * BLOCK
        keep = dropout_keep(philox, first, dropout_p, ROWS, BLOCK, ALIGN % 4 == 0)
        x = tl.where(keep, x * dropout_scale, 0.0)
    other = tl.load(residual_tile, mask=inside, other=0.0, eviction_policy="evict_first")
    rounded = (x + other.to(tl.float32)).to(summed.dtype.element_ty)
    tl.store(summed + row * cols + col, rounded, mask=inside)
    return rounded.to(tl.float32)


@triton.jit
def _centre(x, inside, width):
    """Each row's mean over width elements, and x less it; zeros outside.

    The sum of a row far from zero rounds by more than the row's small differences need.  Those, from the mean so found,
    are exact or small: their own mean is what it lacks.
    """
    mean = tl.div_rn(tl.sum(x, axis=1, keep_dims=True), width)
    centred = tl.where(inside, x - mean, 0.0)
    correction = tl.div_rn(tl.sum(centred, axis=1, keep_dims=True), width)
    return mean + correction, tl.where(inside, centred - correction, 0.0)


@triton.jit(do_not_specialize=["rows", "col_units", "input_stride", "residual_stride"])
def layer_norm_forward_kernel(
    input,  # rows x cols, stride input_stride * ALIGN
    residual,  # the same, or None
    weight,  # cols, or None
    bias,  # cols, or None
    output,  # rows x cols, contiguous
    summed,  # rows x cols, contiguous; None without residual
    mean,  # rows; None for RMS norm
    rstd,  # rows
    philox,  # [seed, offset]; None without dropout
    split_mean,  # rows x splits: the mean of each split of the row; None for RMS norm, or when a tile holds whole rows
    split_squares,  # rows x splits: the squared deviations from that mean; None when a tile holds whole rows
    rows,
    col_units,
    input_stride,
    residual_stride,
    eps,
    dropout_p,
    dropout_scale,
    RMS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two >= the number of splits
):
    cols = col_units * ALIGN
    row = (tl.arange(0, ROWS).to(tl.int64) + tl.program_id(0) * ROWS)[:, None]
    col = (tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK)[None, :]
    inside = (row < rows) & (col < cols)
    input_tile = input + row * input_stride * ALIGN + col
    x = tl.load(input_tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if residual is not None:
        x = _sum_input(
            x, residual + row * residual_stride * ALIGN + col, summed, philox, row, col, inside, cols,
            dropout_p, dropout_scale, ROWS, BLOCK, philox is not None, ALIGN
        )  # fmt: skip

    width = cols.to(tl.float32)
    if split_squares is None:
        if RMS:
            centred = x
        else:
            centre, centred = _centre(x, inside, width)
        squares = tl.sum(centred * centred, axis=1, keep_dims=True)
    else:
        # ROWS is 1 here, and the splits' values are reduced to scalars: Triton 3.6 moves a broadcast [1, 1] tensor from
        # their layout to x's through shared memory, element by element.
        split = tl.arange(0, SPLITS)
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split
        present = split < tl.num_programs(1)
        part_squares = tl.load(split_squares + part, mask=present, other=0.0)
        if RMS:
            centred = x
        else:
            # Chan, Golub and LeVeque: deviations within the splits, plus those of their means from the row's mean.
            count = tl.maximum(tl.minimum(cols - split * BLOCK, BLOCK), 0).to(tl.float32)
            part_mean = tl.load(split_mean + part, mask=present, other=0.0)
            centre = tl.div_rn(tl.sum(part_mean * count, axis=0), width)
            centre += tl.div_rn(tl.sum((part_mean - centre) * count, axis=0), width)
            part_squares += count * (part_mean - centre) * (part_mean - centre)
            centred = x - centre
        squares = tl.sum(part_squares, axis=0)
    scale = tl.rsqrt(tl.div_rn(squares, width) + eps)

    if tl.program_id(1) == 0:
        if not RMS:
            tl.store(mean + row, centre, mask=row < rows)
        tl.store(rstd + row, scale, mask=row < rows)

    result = centred * scale
    in_row = col < cols
    if weight is not None:
        result *= tl.load(weight + col, mask=in_row, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if bias is not None:
        result += tl.load(bias + col, mask=in_row, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(output + row * cols + col, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "col_units", "input_stride", "residual_stride"])
def layer_norm_split_statistics_kernel(
    input,  # rows x cols, stride input_stride * ALIGN
    residual,  # the same, or None
    summed,  # rows x cols, contiguous; None without residual
    philox,  # [seed, offset]; None without dropout
    split_mean,  # rows x splits; None for RMS norm
    split_squares,  # rows x splits
    rows,
    col_units,
    input_stride,
    residual_stride,
    dropout_p,
    dropout_scale,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = col_units * ALIGN
    row = (tl.arange(0, 1).to(tl.int64) + tl.program_id(0))[:, None]
    col = (tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK)[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(input + row * input_stride * ALIGN + col, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        x = _sum_input(
            x, residual + row * residual_stride * ALIGN + col, summed, philox, row, col, inside, cols,
            dropout_p, dropout_scale, 1, BLOCK, philox is not None, ALIGN
        )  # fmt: skip
    part = row * tl.num_programs(1) + tl.program_id(1)
    if split_mean is not None:
        count = tl.minimum(cols - tl.program_id(1) * BLOCK, BLOCK).to(tl.float32)
        centre, x = _centre(x, inside, count)
        tl.store(split_mean + part, centre)
    tl.store(split_squares + part, tl.sum(x * x, axis=1, keep_dims=True))


@triton.jit
def _load_gradient_tile(grad_output_tile, summed_tile, mean, rstd, weight_tile, row, in_rows, inside):
    """A tile's rstd, x^, grad_output and grad_output * weight, in fp32; zeros outside the tensor.

    grad_output_tile and summed_tile point to the tile's elements; weight_tile is the loaded [1, BLOCK] weight, or None.
    """
    grad = tl.load(grad_output_tile, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(summed_tile, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=in_rows, other=0.0)
    if mean is not None:
        x -= tl.load(mean + row, mask=in_rows, other=0.0)
    weighted = grad
    if weight_tile is not None:
        weighted = grad * weight_tile.to(tl.float32)
    return scale, x * scale, grad, weighted


@triton.jit(do_not_specialize=["rows", "col_units", "grad_output_stride", "summed_stride"])
def layer_norm_split_sums_kernel(
    grad_output,  # rows x cols, stride grad_output_stride * ALIGN
    summed,  # rows x cols, stride summed_stride * ALIGN
    mean,  # rows; None for RMS norm
    rstd,  # rows
    weight,  # cols, or None
    split_products,  # rows x splits: sum(g * x^) of each split
    split_gradients,  # rows x splits: sum(g); None for RMS norm
    rows,
    col_units,
    grad_output_stride,
    summed_stride,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = col_units * ALIGN
    row = (tl.arange(0, 1).to(tl.int64) + tl.program_id(0))[:, None]
    col = (tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK)[None, :]
    weight_tile = None
    if weight is not None:
        weight_tile = tl.load(weight + col, mask=col < cols, other=0.0, eviction_policy="evict_last")
    _, normalised, _, weighted = _load_gradient_tile(
        grad_output + row * grad_output_stride * ALIGN + col, summed + row * summed_stride * ALIGN + col,
        mean, rstd, weight_tile, row, row < rows, (row < rows) & (col < cols)
    )  # fmt: skip
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(split_products + part, tl.sum(weighted * normalised, axis=1, keep_dims=True))
    if split_gradients is not None:
        tl.store(split_gradients + part, tl.sum(weighted, axis=1, keep_dims=True))


@triton.jit(
    do_not_specialize=["rows", "col_units", "splits", "grad_output_stride", "grad_summed_stride", "summed_stride"]
)
def layer_norm_backward_kernel(
    grad_output,  # rows x cols, stride grad_output_stride * ALIGN
    grad_summed,  # rows x cols, stride grad_summed_stride * ALIGN; or None
    summed,  # rows x cols, stride summed_stride * ALIGN
    mean,  # rows; None for RMS norm
    rstd,  # rows
    weight,  # cols, or None
    philox,  # [seed, offset]; None without dropout
    split_products,  # rows x splits: sum(g * x^) of each split; None when a tile holds whole rows
    split_gradients,  # rows x splits: sum(g); None for RMS norm
    grad_input,  # rows x cols, contiguous
    grad_residual,  # the same; None without dropout, when it would equal grad_input
    partial_weight,  # programs x cols, fp32; None when not needed
    partial_bias,  # programs x cols, fp32; None when not needed
    rows,
    col_units,
    splits,
    grad_output_stride,
    grad_summed_stride,
    summed_stride,
    dropout_p,
    dropout_scale,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two >= splits
    STAGES: tl.constexpr,
):
    cols = col_units * ALIGN
    col = (tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK)[None, :]
    weight_tile = None
    if weight is not None:
        weight_tile = tl.load(weight + col, mask=col < cols, other=0.0)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (tl.arange(0, ROWS).to(tl.int64) + first)[:, None]
        inside = (row < rows) & (col < cols)
        scale, normalised, grad, weighted = _load_gradient_tile(
            grad_output + row * grad_output_stride * ALIGN + col, summed + row * summed_stride * ALIGN + col,
            mean, rstd, weight_tile, row, row < rows, inside
        )  # fmt: skip
        if split_products is None:
            products = tl.sum(weighted * normalised, axis=1, keep_dims=True)
            gradients = tl.sum(weighted, axis=1, keep_dims=True)
        else:
            split = tl.arange(0, SPLITS)[None, :]
            present = (row < rows) & (split < splits)
            part = row * splits + split
            products = tl.sum(tl.load(split_products + part, mask=present, other=0.0), axis=1, keep_dims=True)
            if mean is not None:
                gradients = tl.sum(tl.load(split_gradients + part, mask=present, other=0.0), axis=1, keep_dims=True)
        weighted -= normalised * (products / cols)
        if mean is not None:
            weighted -= gradients / cols
        result = weighted * scale
        if grad_summed is not None:
            grad_summed_tile = grad_summed + row * grad_summed_stride * ALIGN + col
            result += tl.load(grad_summed_tile, mask=inside, other=0.0).to(tl.float32)
        if grad_residual is not None:
            tl.store(grad_residual + row * cols + col, result.to(grad_residual.dtype.element_ty), mask=inside)
        if philox is not None:
            first_element = row * cols + tl.program_id(1) * BLOCK
            keep = dropout_keep(philox, first_element, dropout_p, ROWS, BLOCK, ALIGN % 4 == 0)
            result = tl.where(keep, result * dropout_scale, 0.0)
        tl.store(grad_input + row * cols + col, result.to(grad_input.dtype.element_ty), mask=inside)
        if partial_weight is not None:
            sum_weight += grad * normalised
        if partial_bias is not None:
            sum_bias += grad
    partial = tl.program_id(0).to(tl.int64) * cols + col
    if partial_weight is not None:
        tl.store(partial_weight + partial, tl.sum(sum_weight, axis=0, keep_dims=True), mask=col < cols)
    if partial_bias is not None:
        tl.store(partial_bias + partial, tl.sum(sum_bias, axis=0, keep_dims=True), mask=col < cols)


@triton.jit
def _store_column_sums(partial, total, programs, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = (tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, programs, ROWS):
        row = (tl.arange(0, ROWS) + first)[:, None]
        inside = (row < programs) & (col < cols)
        sums += tl.load(partial + row.to(tl.int64) * cols + col, mask=inside, other=0.0)
    tl.store(total + col, tl.sum(sums, axis=0, keep_dims=True).to(total.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["programs", "col_units"])
def layer_norm_finish_kernel(
    partial_weight,  # programs x cols, fp32; None when not needed
    partial_bias,  # the same
    grad_weight,  # cols; None when not needed
    grad_bias,  # cols; None when not needed
    programs,
    col_units,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the programs' partial sums, always in the same order."""
    if grad_weight is not None:
        _store_column_sums(partial_weight, grad_weight, programs, col_units * ALIGN, ROWS, BLOCK)
    if grad_bias is not None:
        _store_column_sums(partial_bias, grad_bias, programs, col_units * ALIGN, ROWS, BLOCK)
