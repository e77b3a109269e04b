"""Convolution's Triton kernels.  Imported by _triton.py when the first one is launched: importing this imports Triton.

Forward and grad_input are one implicit matrix product.  Its rows are pixels (image, y, x) of the result, its columns
the result's channels in a group (``outs`` of them), and it sums over taps of the kernel and the source's channels in
the group (``reds``):

    result[pixel, o] = sum over taps (r, s) and channels c of source[image, y_r, x_s, c] * weight(o, c, r, s)

Forward has y_r = y * stride - padding + r * dilation.  For grad_input the source is grad_conv, and the pixels are taken
apart by their remainders modulo the stride: within one such class y = i * stride + remainder, the same taps
r = first, first + step, ... reach a pixel of grad_conv, and y_r = i + constant - t * (dilation / gcd) for the t-th of
them.  No multiplication by a hole between the pixels is done.  Both have the form

    y_r = i * SCALE + offset + t * delta,    r = first + t * step

and differ in these numbers only.  The sum is traversed in one of three ways:

* "taps": a block of channels of one tap at a time;
* "flat": taps and channels as one index, where channels are few (the first layer of a network);
* "channelwise": without tensor cores, where groups are so small that a tile would be mostly empty (depthwise).

The source is channels_last, with any strides between images, rows and columns; weights are (K, R, S, C / groups) in
memory; results are contiguous in either format.  Widths and strides come in units of ALIGN elements
(_triton_support.alignment says why).  Offsets from a tensor's start are int64; pixels are numbered in int64 where there
are more than 2^31 of them (LONG).  Sums are fp32, products of fp32 are fp32 or TF32 as PRECISION says.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_CUBIC = tl.constexpr(0.044715)
_THRICE_TANH_CUBIC = tl.constexpr(0.134145)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # Not maximum, which on a GPU turns NaN into 0.
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        x = x * tl.sigmoid((x + x * x * x * _TANH_CUBIC) * _TWO_SQRT_2_OVER_PI)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at what it was given; for relu at what it gave."""
    if ACTIVATION == "relu":
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # 1 - sigmoid(u) is sigmoid(-u), which keeps its digits where u is large.
        argument = (x + x * x * x * _TANH_CUBIC) * _TWO_SQRT_2_OVER_PI
        share = tl.sigmoid(argument)
        slope = share + x * share * tl.sigmoid(-argument) * (x * x * _THRICE_TANH_CUBIC + 1.0) * _TWO_SQRT_2_OVER_PI
    else:
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * tl.sigmoid(-x))
    return slope


@triton.jit
def _pixels(first, count, height, width, BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Of the pixels first, first + 1, ...: image (int64), y, x, and whether it is one of the count there are."""
    if not LONG:
        first = first.to(tl.int32)
    pixel = first + tl.arange(0, BLOCK)
    image = pixel // (height * width)
    rest = (pixel - image * (height * width)).to(tl.int32)
    y = rest // width
    return image.to(tl.int64), y, rest - y * width, pixel < count


@triton.jit
def _place(image, y, x, channel, height, width, channels, CHANNELS_LAST: tl.constexpr):
    """The int64 offset of [rows, 1] pixels' [1, cols] channels in a contiguous tensor of either format."""
    if CHANNELS_LAST:
        return ((image * height + y) * width + x) * channels + channel
    else:
        return ((image * channels + channel) * height + y) * width + x


@triton.jit
def _first_tap(remainder, padding, dilation, stride, step):
    """The smallest r below step with r * dilation = remainder + padding modulo the stride; huge if there is none."""
    first = remainder * 0 + 1_000_000_000
    for r in range(step):
        hit = (remainder + padding - r * dilation) % stride == 0
        first = tl.where(hit & (r < first), r, first)
    return first


@triton.jit
def _convolve(
    source, weight, source_base, base_y, base_x, row_inside,
    group, col, col_inside,
    height, width, reds, outs, taps_r, taps_s, kernel_s, weight_row,
    first_r, first_s, step_r, step_s, delta_y, delta_x, stride_y, stride_x,
    TRANSPOSED: tl.constexpr, TRAVERSAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The fp32 sums of a ROWS x COLS tile.

    source_base: [ROWS] int64, the offset of each row's pixel for tap 0; base_y, base_x: [ROWS] its coordinates.
    group: the columns' group, a scalar, or [COLS] when CHANNELWISE; col: [COLS] int64, numbers within the group.
    weight_row: elements of one output channel of the weight (R * S * channels of a group).
    """
    if TRANSPOSED:  # the weight's rows are the channels summed over
        col_offset = group.to(tl.int64) * reds * weight_row + col
        channels = outs
    else:
        col_offset = (group * outs + col) * weight_row
        channels = reds
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if TRAVERSAL == "channelwise":
        for index in range(taps_r * taps_s * reds):
            tap = index // reds
            red = index - tap * reds
            r = tap // taps_s
            s = tap - r * taps_s
            y = base_y + r * delta_y
            x = base_x + s * delta_x
            inside = row_inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            shift = (r * delta_y).to(tl.int64) * stride_y + (s * delta_x).to(tl.int64) * stride_x
            from_source = (source_base + shift)[:, None] + (group * reds + red)[None, :]
            values = tl.load(source + from_source, mask=inside[:, None] & col_inside[None, :], other=0.0)
            tap_offset = ((first_r + r * step_r) * kernel_s + first_s + s * step_s) * channels
            from_weight = col_offset + tap_offset + red * (weight_row if TRANSPOSED else 1)
            factors = tl.load(weight + from_weight, mask=col_inside, other=0.0)
            acc += values.to(tl.float32) * factors[None, :].to(tl.float32)
    else:
        blocks = tl.cdiv(reds, BLOCK)
        steps = taps_r * taps_s * blocks if TRAVERSAL == "taps" else tl.cdiv(taps_r * taps_s * reds, BLOCK)
        for index in tl.range(0, steps, num_stages=STAGES):
            lane = tl.arange(0, BLOCK)
            if TRAVERSAL == "taps":
                tap = index // blocks
                red = (index - tap * blocks) * BLOCK + lane
                red_inside = red < reds
            else:
                tap = (index * BLOCK + lane) // reds
                red = index * BLOCK + lane - tap * reds
                red_inside = tap < taps_r * taps_s
            r = tap // taps_s
            s = tap - r * taps_s
            if TRAVERSAL == "taps":
                y = (base_y + r * delta_y)[:, None]
                x = (base_x + s * delta_x)[:, None]
            else:
                y = base_y[:, None] + (r * delta_y)[None, :]
                x = base_x[:, None] + (s * delta_x)[None, :]
            inside = row_inside[:, None] & (y >= 0) & (y < height) & (x >= 0) & (x < width) & red_inside[None, :]
            shift = (r * delta_y).to(tl.int64) * stride_y + (s * delta_x).to(tl.int64) * stride_x + red
            from_source = source_base[:, None] + (group * reds + shift)[None, :]
            values = tl.load(source + from_source, mask=inside, other=0.0)
            tap_offset = ((first_r + r * step_r) * kernel_s + first_s + s * step_s) * channels
            red_offset = tap_offset + red.to(tl.int64) * (weight_row if TRANSPOSED else 1)
            factors = tl.load(
                weight + red_offset[:, None] + col_offset[None, :],
                mask=red_inside[:, None] & col_inside[None, :],
                other=0.0,
            )
            acc = tl.dot(values, factors, acc, input_precision=PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "count", "result_height", "result_width", "grid_height", "grid_width", "conv_height", "conv_width", "height",
        "width", "red_units", "out_units", "groups", "kernel_r", "kernel_s", "step_r", "step_s", "delta_y", "delta_x",
        "conv_stride_y", "conv_stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x",
        "stride_n", "stride_y", "stride_x",
    ]
)  # fmt: skip
def conv_kernel(
    source,  # N x height x width x (groups * reds), strides stride_n, stride_y, stride_x (times ALIGN), 1
    weight,  # (groups * outs) x R x S x reds, contiguous; TRANSPOSED: (groups * reds) x R x S x outs
    bias,  # groups * outs, or None
    residual,  # as output, or None, and always so where it pools
    output,  # N x result_height x result_width x (groups * outs), contiguous in its format
    preactivation,  # the same, or None
    argmax,  # the same, uint8, or None
    count,  # pixels: N * grid_height * grid_width
    result_height,
    result_width,
    grid_height,  # the result's, or of one of its classes of pixels when TRANSPOSED
    grid_width,
    conv_height,  # the convolution's, of which the result is the maxima; else the result's
    conv_width,
    height,
    width,
    red_units,  # of ALIGN
    out_units,  # of OUT_ALIGN; of all groups together when channelwise
    groups,
    kernel_r,
    kernel_s,
    step_r,
    step_s,
    delta_y,
    delta_x,
    conv_stride_y,
    conv_stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    stride_n,
    stride_y,
    stride_x,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_Y: tl.constexpr,
    POOL_STRIDE_X: tl.constexpr,
    POOL_PADDING_Y: tl.constexpr,
    POOL_PADDING_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TRAVERSAL: tl.constexpr,
    GROUP_REDS: tl.constexpr,  # reds and outs when channelwise
    GROUP_OUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The convolution with its epilogue, or (TRANSPOSED) grad_input.

    Where it pools (POOL_H * POOL_W > 1), a row is a window: its places are convolved one after another, and the
    largest value is kept, so that what is pooled away is never written.
    """
    if TRAVERSAL == "channelwise":
        reds = GROUP_REDS
        outs = GROUP_OUTS
        channels = out_units * OUT_ALIGN
        col_tiles = tl.cdiv(channels, COLS)
        tile_col = tl.program_id(0) % col_tiles
        channel = (tile_col * COLS + tl.arange(0, COLS)).to(tl.int64)
        group = channel // outs
        col = channel - group * outs
        col_inside = channel < channels
    else:
        reds = red_units * ALIGN
        outs = out_units * OUT_ALIGN
        channels = groups * outs
        group_tiles = tl.cdiv(outs, COLS)
        col_tiles = groups * group_tiles
        tile_col = tl.program_id(0) % col_tiles
        group = tile_col // group_tiles
        col = ((tile_col - group * group_tiles) * COLS + tl.arange(0, COLS)).to(tl.int64)
        channel = group * outs + col
        col_inside = col < outs
    first = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS
    image, y, x, row_inside = _pixels(first, count, grid_height, grid_width, ROWS, LONG)

    if TRANSPOSED:
        remainder_y = tl.program_id(1) // conv_stride_x
        remainder_x = tl.program_id(1) % conv_stride_x
        first_r = _first_tap(remainder_y, padding_y, dilation_y, conv_stride_y, step_r)
        first_s = _first_tap(remainder_x, padding_x, dilation_x, conv_stride_x, step_s)
        taps_r = tl.maximum(tl.cdiv(kernel_r - first_r, step_r), 0)
        taps_s = tl.maximum(tl.cdiv(kernel_s - first_s, step_s), 0)
        # Without taps the offset is of no use, and could overflow.
        offset_y = tl.where(taps_r > 0, (remainder_y + padding_y - first_r * dilation_y) // conv_stride_y, 0)
        offset_x = tl.where(taps_s > 0, (remainder_x + padding_x - first_s * dilation_x) // conv_stride_x, 0)
        scale_y = 1
        scale_x = 1
        weight_row = kernel_r * kernel_s * outs
        result_y = y * conv_stride_y + remainder_y
        result_x = x * conv_stride_x + remainder_x
    else:
        first_r = 0
        first_s = 0
        taps_r = kernel_r
        taps_s = kernel_s
        offset_y = -padding_y
        offset_x = -padding_x
        scale_y = conv_stride_y
        scale_x = conv_stride_x
        weight_row = kernel_r * kernel_s * reds
        result_y = y
        result_x = x
    row_inside = row_inside & (result_y < result_height) & (result_x < result_width)
    inside = row_inside[:, None] & col_inside[None, :]

    best = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    best_given = tl.zeros((ROWS, COLS), tl.float32)
    # A window of one place is pooling too, if its stride is larger.
    best_place = tl.full((ROWS, COLS), -1 if POOL_H * POOL_W > 1 else 0, tl.int32)
    for place in range(POOL_H * POOL_W):
        conv_y = y * POOL_STRIDE_Y - POOL_PADDING_Y + place // POOL_W
        conv_x = x * POOL_STRIDE_X - POOL_PADDING_X + place % POOL_W
        present = row_inside
        if POOL_H * POOL_W > 1:
            present = present & (conv_y >= 0) & (conv_y < conv_height) & (conv_x >= 0) & (conv_x < conv_width)
        base_y = conv_y * scale_y + offset_y
        base_x = conv_x * scale_x + offset_x
        unit = image * stride_n + base_y.to(tl.int64) * stride_y + base_x.to(tl.int64) * stride_x
        given = _convolve(
            source, weight, unit * ALIGN, base_y, base_x, present,
            group, col, col_inside,
            height, width, reds, outs, taps_r, taps_s, kernel_s, weight_row,
            first_r, first_s, step_r, step_s, delta_y, delta_x, stride_y * ALIGN, stride_x * ALIGN,
            TRANSPOSED, TRAVERSAL, PRECISION, ROWS, COLS, BLOCK, STAGES,
        )  # fmt: skip
        if bias is not None:
            given += tl.load(bias + channel, mask=col_inside, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            added = _place(
                image[:, None], result_y[:, None], result_x[:, None], channel[None, :],
                result_height, result_width, channels, CHANNELS_LAST,
            )  # fmt: skip
            given += tl.load(residual + added, mask=inside, other=0.0).to(tl.float32)
        value = _activate(given, ACTIVATION)
        if POOL_H * POOL_W > 1:
            # The first place always counts, lest a window of -inf have none.
            better = present[:, None] & ((value > best) | (value != value) | (best_place < 0))
            best = tl.where(better, value, best)
            best_given = tl.where(better, given, best_given)
            best_place = tl.where(better, place, best_place)
        else:
            best = value
            best_given = given

    offset = _place(
        image[:, None], result_y[:, None], result_x[:, None], channel[None, :],
        result_height, result_width, channels, CHANNELS_LAST,
    )  # fmt: skip
    tl.store(output + offset, best.to(output.dtype.element_ty), mask=inside)
    if preactivation is not None:
        tl.store(preactivation + offset, best_given.to(preactivation.dtype.element_ty), mask=inside)
    if argmax is not None:
        tl.store(argmax + offset, best_place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["count", "channel_units", "height", "width", "conv_height", "conv_width"])
def conv_pool_kernel(
    conv,  # N x conv_height x conv_width x channels, contiguous
    output,  # N x height x width x channels, contiguous in its format
    preactivation,  # the same, or None
    argmax,  # the same, uint8, or None
    count,  # N * height * width
    channel_units,  # of ALIGN
    height,
    width,
    conv_height,
    conv_width,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_Y: tl.constexpr,
    POOL_STRIDE_X: tl.constexpr,
    POOL_PADDING_Y: tl.constexpr,
    POOL_PADDING_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Activation and maxima of a convolution in memory, where windows overlap."""
    channels = channel_units * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS
    image, y, x, row_inside = _pixels(first, count, height, width, ROWS, LONG)
    channel = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = row_inside[:, None] & (channel < channels)
    best = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    best_given = tl.zeros((ROWS, COLS), tl.float32)
    best_place = tl.full((ROWS, COLS), -1, tl.int32)
    for place in range(POOL_H * POOL_W):
        conv_y = (y * POOL_STRIDE_Y - POOL_PADDING_Y + place // POOL_W)[:, None]
        conv_x = (x * POOL_STRIDE_X - POOL_PADDING_X + place % POOL_W)[:, None]
        present = inside & (conv_y >= 0) & (conv_y < conv_height) & (conv_x >= 0) & (conv_x < conv_width)
        offset = _place(image[:, None], conv_y, conv_x, channel, conv_height, conv_width, channels, True)
        given = tl.load(conv + offset, mask=present, other=0.0).to(tl.float32)
        value = _activate(given, ACTIVATION)
        better = present & ((value > best) | (value != value) | (best_place < 0))
        best = tl.where(better, value, best)
        best_given = tl.where(better, given, best_given)
        best_place = tl.where(better, place, best_place)
    offset = _place(image[:, None], y[:, None], x[:, None], channel, height, width, channels, CHANNELS_LAST)
    tl.store(output + offset, best.to(output.dtype.element_ty), mask=inside)
    if preactivation is not None:
        tl.store(preactivation + offset, best_given.to(preactivation.dtype.element_ty), mask=inside)
    if argmax is not None:
        tl.store(argmax + offset, best_place.to(tl.uint8), mask=inside)


@triton.jit(
    do_not_specialize=[
        "count", "channel_units", "height", "width", "conv_height", "conv_width", "grad_stride_n", "grad_stride_y",
        "grad_stride_x", "kept_stride_n", "kept_stride_y", "kept_stride_x",
    ]
)  # fmt: skip
def conv_backward_epilogue_kernel(
    grad_output,  # N x height x width x channels, these strides (times ALIGN, but for c)
    kept,  # relu: the output; else the preactivation; None without activation.  Strides alike
    argmax,  # uint8, strides as kept's; None without pooling
    grad_conv,  # N x conv_height x conv_width x channels, contiguous
    count,  # N * conv_height * conv_width
    channel_units,  # of ALIGN
    height,
    width,
    conv_height,
    conv_width,
    grad_stride_n,
    grad_stride_c,
    grad_stride_y,
    grad_stride_x,
    kept_stride_n,
    kept_stride_c,
    kept_stride_y,
    kept_stride_x,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    POOL_STRIDE_Y: tl.constexpr,
    POOL_STRIDE_X: tl.constexpr,
    POOL_PADDING_Y: tl.constexpr,
    POOL_PADDING_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each pixel of the convolution asks the windows over it whether they took it: no two programs write one place."""
    channels = channel_units * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS
    image, conv_y, conv_x, row_inside = _pixels(first, count, conv_height, conv_width, ROWS, LONG)
    channel = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = row_inside[:, None] & (channel < channels)
    over_y: tl.constexpr = (POOL_H + POOL_STRIDE_Y - 1) // POOL_STRIDE_Y
    over_x: tl.constexpr = (POOL_W + POOL_STRIDE_X - 1) // POOL_STRIDE_X
    total = tl.zeros((ROWS, COLS), tl.float32)
    for over in range(over_y * over_x):
        y = (conv_y + POOL_PADDING_Y) // POOL_STRIDE_Y - over // over_x
        x = (conv_x + POOL_PADDING_X) // POOL_STRIDE_X - over % over_x
        place_y = conv_y + POOL_PADDING_Y - y * POOL_STRIDE_Y
        place_x = conv_x + POOL_PADDING_X - x * POOL_STRIDE_X
        covers = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (place_y < POOL_H) & (place_x < POOL_W)
        taken = inside & covers[:, None]
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        units = image * grad_stride_n + y * grad_stride_y + x * grad_stride_x
        from_grad = (units * ALIGN)[:, None] + channel * grad_stride_c
        units = image * kept_stride_n + y * kept_stride_y + x * kept_stride_x
        from_kept = (units * ALIGN)[:, None] + channel * kept_stride_c
        grad = tl.load(grad_output + from_grad, mask=taken, other=0.0).to(tl.float32)
        if kept is not None:
            grad *= _derivative(tl.load(kept + from_kept, mask=taken, other=0.0).to(tl.float32), ACTIVATION)
        if argmax is not None:
            # Not part of the mask: that would make one access of each element.
            place = tl.load(argmax + from_kept, mask=taken, other=0).to(tl.int32)
            taken = taken & (place == (place_y * POOL_W + place_x)[:, None])
        total += tl.where(taken, grad, 0.0)
    offset = _place(image[:, None], conv_y[:, None], conv_x[:, None], channel, conv_height, conv_width, channels, True)
    tl.store(grad_conv + offset, total.to(grad_conv.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "count", "span", "conv_height", "conv_width", "height", "width", "red_units", "out_units", "groups",
        "kernel_r", "kernel_s", "conv_stride_y", "conv_stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x",
        "grad_stride_n", "grad_stride_y", "grad_stride_x", "stride_n", "stride_y", "stride_x",
    ]
)  # fmt: skip
def conv_backward_weight_kernel(
    grad_conv,  # N x conv_height x conv_width x (groups * outs), these strides (times OUT_ALIGN), 1
    source,  # N x height x width x (groups * reds), these strides (times ALIGN), 1
    partial_weight,  # splits x (groups * outs) x R x S x reds, fp32
    partial_bias,  # splits x (groups * outs), fp32; None when not needed
    count,  # N * conv_height * conv_width
    span,  # pixels of one split, a multiple of BLOCK
    conv_height,
    conv_width,
    height,
    width,
    red_units,
    out_units,  # of all groups together when CHANNELWISE
    groups,
    kernel_r,
    kernel_s,
    conv_stride_y,
    conv_stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    grad_stride_n,
    grad_stride_y,
    grad_stride_x,
    stride_n,
    stride_y,
    stride_x,
    CHANNELWISE: tl.constexpr,
    GROUP_REDS: tl.constexpr,  # reds and outs when CHANNELWISE
    GROUP_OUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split's share of grad_weight: rows are output channels, columns taps and channels, the sum is over pixels.

    CHANNELWISE (small groups): rows are the output channels of all groups, and a program has one column.
    """
    if CHANNELWISE:
        reds = GROUP_REDS
        channels = out_units * OUT_ALIGN
        weight_row = kernel_r * kernel_s * reds
        col_tiles = weight_row
        channel = (tl.program_id(0) // col_tiles) * ROWS + tl.arange(0, ROWS)
        row_inside = channel < channels
        group = channel // GROUP_OUTS
        col = tl.program_id(0) % col_tiles
        col_inside = col < weight_row
    else:
        reds = red_units * ALIGN
        outs = out_units * OUT_ALIGN
        channels = groups * outs
        weight_row = kernel_r * kernel_s * reds
        col_tiles = tl.cdiv(weight_row, COLS)
        row_tiles = tl.cdiv(outs, ROWS)
        tile_row = tl.program_id(0) // col_tiles
        group = tile_row // row_tiles
        row = (tile_row - group * row_tiles) * ROWS + tl.arange(0, ROWS)
        row_inside = row < outs
        channel = group * outs + row
        col = (tl.program_id(0) % col_tiles) * COLS + tl.arange(0, COLS)
        col_inside = col < weight_row
    tap = col // reds
    red = col - tap * reds
    r = tap // kernel_s
    s = tap - r * kernel_s
    shift_y = r * dilation_y - padding_y
    shift_x = s * dilation_x - padding_x
    col_offset = (shift_y.to(tl.int64) * stride_y + shift_x.to(tl.int64) * stride_x) * ALIGN + group * reds + red

    split = tl.program_id(1).to(tl.int64)
    last = tl.minimum((split + 1) * span, count)
    acc = tl.zeros((BLOCK, ROWS) if CHANNELWISE else (ROWS, COLS), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for index in tl.range(0, tl.cdiv(last - split * span, BLOCK).to(tl.int32), num_stages=STAGES):
        image, y, x, present = _pixels(split * span + index * BLOCK, last, conv_height, conv_width, BLOCK, LONG)
        from_grad = image * grad_stride_n + y.to(tl.int64) * grad_stride_y + x.to(tl.int64) * grad_stride_x
        grad = tl.load(
            grad_conv + (from_grad * OUT_ALIGN)[:, None] + channel[None, :],
            mask=present[:, None] & row_inside[None, :],
            other=0.0,
        )
        source_y = y * conv_stride_y
        source_x = x * conv_stride_x
        unit = image * stride_n + source_y.to(tl.int64) * stride_y + source_x.to(tl.int64) * stride_x
        if CHANNELWISE:
            tap_y = (source_y + shift_y)[:, None]
            tap_x = (source_x + shift_x)[:, None]
            inside = present[:, None] & row_inside[None, :]
        else:
            tap_y = source_y[:, None] + shift_y[None, :]
            tap_x = source_x[:, None] + shift_x[None, :]
            inside = present[:, None] & col_inside[None, :]
        inside = inside & (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
        values = tl.load(source + (unit * ALIGN)[:, None] + col_offset[None, :], mask=inside, other=0.0)
        if CHANNELWISE:
            acc += grad.to(tl.float32) * values.to(tl.float32)
        else:
            acc = tl.dot(tl.trans(grad), values, acc, input_precision=PRECISION)
        if partial_bias is not None:
            sums += tl.sum(grad.to(tl.float32), axis=0)

    row_offset = split * channels + channel
    if CHANNELWISE:
        tl.store(partial_weight + row_offset * weight_row + col, tl.sum(acc, axis=0), mask=row_inside)
    else:
        tl.store(
            partial_weight + (row_offset * weight_row)[:, None] + col[None, :],
            acc,
            mask=row_inside[:, None] & col_inside[None, :],
        )
    if partial_bias is not None:
        # Every program of these rows has the sums; the first writes them.
        tile_col = tl.zeros((ROWS,), tl.int32) + tl.program_id(0) % col_tiles
        tl.store(partial_bias + row_offset, sums, mask=row_inside & (tile_col == 0))


@triton.jit(do_not_specialize=["splits", "count", "channels", "taps"])
def conv_finish_kernel(
    partial,  # splits x count, fp32
    total,  # count; for a weight that is contiguous, in another order than the partial sums
    splits,
    count,
    channels,
    taps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the splits' partial sums, always in the same order.  The partial sums are (K, taps, channels)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(partial + split * count.to(tl.int64) + element, mask=inside, other=0.0)
    target = element
    if not CHANNELS_LAST:
        pair = element // channels
        channel = element - pair * channels
        row = pair // taps
        target = (row * channels + channel) * taps + pair - row * taps
    tl.store(total + target, sums.to(total.dtype.element_ty), mask=inside)
