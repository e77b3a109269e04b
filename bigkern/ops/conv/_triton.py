"""Convolution on Triton: what it supports, how its kernels are launched, and their registration as raw ops.

The kernels are in _triton_kernels.py.  Tile sizes are chosen here, in Python, from the shape: an autotuner would cost
more per call than a small convolution takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops import _triton_support as support
from bigkern.ops.conv import _schema

# The second and third axes of a CUDA grid.
_MAX_GRID = 65535

# Below so many channels a tap is too little for a step of its own, and taps and channels are summed as one.
_MIN_TAP_CHANNELS = 32

# Up to so many channels in and out of a group, tensor cores would multiply mostly zeros.
_MAX_CHANNELWISE = 4

_NO_POOL = (1, 1, 1, 1, 0, 0)

_loaded_kernels = None


def unsupported(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: Sequence[int],
    residual: Tensor | None = None,
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None."""
    reason = support.unsupported_tensors(
        input=input, weight=weight, bias=bias, residual=residual
    ) or _schema.unsupported_window(max_pool)
    if reason is not None:
        return reason
    if stride[0] * stride[1] > _MAX_GRID:
        return f"stride is {tuple(stride)}; the Triton kernels take strides with a product of at most {_MAX_GRID}"
    return None


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    max_pool: Sequence[int],
    tf32: bool,
    channels_last: bool,
    need_backward: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, preactivation, argmax); see _schema.py."""
    return torch.ops.bigkern_triton.conv_forward.default(
        input, weight, bias, stride, padding, dilation, groups, activation, max_pool, tf32, channels_last,
        need_backward, residual
    )  # fmt: skip


def backward_epilogue(
    grad_output: Tensor,
    output: Tensor,
    preactivation: Tensor,
    argmax: Tensor,
    conv_size: Sequence[int],
    activation: int,
    max_pool: Sequence[int],
) -> Tensor:
    """grad_conv; see _schema.py."""
    return torch.ops.bigkern_triton.conv_backward_epilogue.default(
        grad_output, output, preactivation, argmax, conv_size, activation, max_pool
    )


def backward_input(
    grad_conv: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tf32: bool,
    channels_last: bool,
) -> Tensor:
    """grad_input; see _schema.py."""
    return torch.ops.bigkern_triton.conv_backward_input.default(
        grad_conv, weight, input_size, stride, padding, dilation, groups, tf32, channels_last
    )


def backward_weight(
    grad_conv: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tf32: bool,
    channels_last: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_weight, grad_bias); see _schema.py."""
    return torch.ops.bigkern_triton.conv_backward_weight.default(
        grad_conv, input, kernel_size, stride, padding, dilation, groups, tf32, channels_last, need_bias
    )


def _kernels():
    global _loaded_kernels
    if _loaded_kernels is None:
        from bigkern.ops.conv import _triton_kernels

        _loaded_kernels = _triton_kernels
    return _loaded_kernels


def _tile(extent: int, most: int) -> int:
    """The smallest power of two that holds ``extent``, from 16 (what tl.dot takes) to ``most``."""
    return min(most, max(16, 1 << (extent - 1).bit_length()))


def _readable(x: Tensor) -> Tensor:
    """``x`` with its channels side by side in memory: itself where they are."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Between images, rows and columns; 0 where there is only one, whose stride may be anything."""
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (0, 2, 3))


def _units(x: Tensor, align: int) -> tuple[int, int, int, int]:
    """The strides of images, channels, rows and columns; all but the channels' in units of ``align``."""
    images, rows, columns = (stride // align for stride in _strides(x))
    return images, x.stride(1), rows, columns


def _is_long(count: int, block: int) -> bool:
    return count + block >= 2**31


def _precision(x: Tensor, tf32: bool) -> str:
    return "tf32" if tf32 or x.dtype != torch.float32 else "ieee"


def _is_channelwise(groups: int, reds: int, outs: int) -> bool:
    return groups > 1 and max(reds, outs) <= _MAX_CHANNELWISE


def _launch_conv(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    grid_size: Sequence[int],
    conv_size: Sequence[int],
    reds: int,
    outs: int,
    step: Sequence[int],
    delta: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    pool: Sequence[int],
    tf32: bool,
    channels_last: bool,
    transposed: bool,
) -> None:
    """Launches conv_kernel; its arguments are explained there."""
    kernels = _kernels()
    output = results[0]
    # In memory (K, R, S, C / groups).
    weight = weight.contiguous(memory_format=torch.channels_last)
    strides = _strides(source)
    channelwise = _is_channelwise(groups, reds, outs)
    red_width, out_width = (groups * reds, groups * outs) if channelwise else (reds, outs)
    align, out_align = support.alignment(red_width, *strides), support.alignment(out_width)
    count = source.shape[0] * grid_size[0] * grid_size[1]
    half = source.dtype != torch.float32
    if channelwise:
        traversal, rows, cols, block, warps, stages = "channelwise", 16, _tile(out_width, 64), 16, 4, 1
        col_tiles = support.ceil_div(out_width, cols)
    else:
        # The maximum so far, where it was and what it came from take registers beside the sums.
        wide = half and pool == _NO_POOL
        cols = _tile(outs, 128 if wide else 64)
        col_tiles = groups * support.ceil_div(outs, cols)
        rows = (
            128 if wide and support.ceil_div(count, 128) * col_tiles >= support.multiprocessors(source.device) else 64
        )
        if reds < _MIN_TAP_CHANNELS:
            traversal, block = "flat", 32
        else:
            traversal, block = "taps", 64 if half and reds >= 64 else 32
        # With four warps the TF32 kernel spills: on sm_80 with three stages, on sm_100 with two.
        warps, stages = 8 if tf32 or rows * cols > 8192 else 4, 3
    classes = stride[0] * stride[1] if transposed else 1
    kernels.conv_kernel[(support.ceil_div(count, rows) * col_tiles, classes)](
        source,
        weight,
        bias,
        residual,
        *results,
        count,
        *output.shape[2:],
        *grid_size,
        *conv_size,
        *source.shape[2:],
        red_width // align,
        out_width // out_align,
        groups,
        *weight.shape[2:],
        *step,
        *delta,
        *stride,
        *padding,
        *dilation,
        *(s // align for s in strides),
        *pool,
        ACTIVATION=activation,
        TRANSPOSED=transposed,
        TRAVERSAL=traversal,
        GROUP_REDS=reds if channelwise else None,
        GROUP_OUTS=outs if channelwise else None,
        PRECISION=_precision(source, tf32),
        CHANNELS_LAST=channels_last,
        ALIGN=align,
        OUT_ALIGN=out_align,
        LONG=_is_long(count, rows),
        ROWS=rows,
        COLS=cols,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
    )


def _forward(
    input, weight, bias, stride, padding, dilation, groups, activation, max_pool, tf32, channels_last, need_backward,
    residual=None
):  # fmt: skip
    images, channels, activation = input.shape[0], weight.shape[0], _schema.ACTIVATIONS[activation]
    size = _schema.conv_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (images, channels, *_schema.pooled_size(size, max_pool))
    output = _schema.new_tensor(input, shape, channels_last)
    preactivation = argmax = None
    if need_backward and activation not in (None, "relu"):
        preactivation = _schema.new_tensor(input, shape, channels_last)
    if need_backward and max_pool:
        argmax = _schema.new_tensor(input, shape, channels_last, torch.uint8)
    results = (output, preactivation, argmax)

    pool = tuple(max_pool) or _NO_POOL
    # Places that two windows share would be convolved twice: those are pooled from memory instead.
    overlapping = pool[0] > pool[2] or pool[1] > pool[3]
    with support.device_guard(input.device):
        conv = _schema.new_tensor(input, (images, channels, *size), True) if overlapping else None
        _launch_conv(
            _readable(input),
            weight,
            bias,
            _schema.as_output(residual, channels_last),
            (conv, None, None) if overlapping else results,
            size if overlapping else shape[2:],
            size,
            weight.shape[1],
            channels // groups,
            (1, 1),
            dilation,
            stride,
            padding,
            dilation,
            groups,
            None if overlapping else activation,
            _NO_POOL if overlapping else pool,
            tf32,
            overlapping or channels_last,
            False,
        )
        if overlapping:
            count, rows, cols = output.numel() // channels, 32, _tile(channels, 64)
            align = support.alignment(channels)
            _kernels().conv_pool_kernel[(support.ceil_div(count, rows), support.ceil_div(channels, cols))](
                conv,
                *results,
                count,
                channels // align,
                *shape[2:],
                *size,
                *pool,
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                ALIGN=align,
                LONG=_is_long(count, rows),
                ROWS=rows,
                COLS=cols,
                num_warps=4,
            )
    return (
        output,
        input.new_empty((0,)) if preactivation is None else preactivation,
        input.new_empty((0,), dtype=torch.uint8) if argmax is None else argmax,
    )


def _backward_epilogue(grad_output, output, preactivation, argmax, conv_size, activation, max_pool):
    images, channels, *size = grad_output.shape
    activation = _schema.ACTIVATIONS[activation]
    grad_conv = _schema.new_tensor(grad_output, (images, channels, *conv_size), True)
    kept = {None: None, "relu": output}.get(activation, preactivation)
    if not max_pool:
        argmax = None
    elif kept is not None and kept.stride() != argmax.stride():
        kept, argmax = (x.contiguous(memory_format=torch.channels_last) for x in (kept, argmax))
    kept_like = argmax if kept is None else kept
    align = 1
    if grad_output.stride(1) == kept_like.stride(1) == 1:
        align = support.alignment(channels, *_strides(grad_output), *_strides(kept_like))
    count, rows, cols = images * conv_size[0] * conv_size[1], 32, _tile(channels, 64)
    with support.device_guard(grad_output.device):
        _kernels().conv_backward_epilogue_kernel[(support.ceil_div(count, rows), support.ceil_div(channels, cols))](
            grad_output,
            kept,
            argmax,
            grad_conv,
            count,
            channels // align,
            *size,
            *conv_size,
            *_units(grad_output, align),
            *_units(kept_like, align),
            *(max_pool or _NO_POOL),
            ACTIVATION=activation,
            ALIGN=align,
            LONG=_is_long(count, rows),
            ROWS=rows,
            COLS=cols,
            num_warps=4,
        )
    return grad_conv


def _backward_input(grad_conv, weight, input_size, stride, padding, dilation, groups, tf32, channels_last):
    outs = weight.shape[1]
    shape = (grad_conv.shape[0], outs * groups, *input_size)
    grad_input = _schema.new_tensor(grad_conv, shape, channels_last)
    shared = [math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    grid_size = [support.ceil_div(extent, s) for extent, s in zip(input_size, stride, strict=True)]
    with support.device_guard(grad_conv.device):
        _launch_conv(
            _readable(grad_conv),
            weight,
            None,
            None,
            (grad_input, None, None),
            grid_size,
            input_size,
            grad_conv.shape[1] // groups,
            outs,
            [s // g for s, g in zip(stride, shared, strict=True)],
            [-(d // g) for d, g in zip(dilation, shared, strict=True)],
            stride,
            padding,
            dilation,
            groups,
            None,
            _NO_POOL,
            tf32,
            channels_last,
            True,
        )
    return grad_input


def _backward_weight(grad_conv, input, kernel_size, stride, padding, dilation, groups, tf32, channels_last, need_bias):
    device = input.device
    images, channels, *conv_size = grad_conv.shape
    outs, reds, taps = channels // groups, input.shape[1] // groups, kernel_size[0] * kernel_size[1]
    grad_weight = _schema.new_tensor(input, (channels, reds, *kernel_size), channels_last)
    grad_bias = input.new_empty((channels,) if need_bias else (0,))
    grad_conv, input = _readable(grad_conv), _readable(input)
    grad_strides, strides = _strides(grad_conv), _strides(input)
    channelwise = _is_channelwise(groups, reds, outs)
    red_width, out_width = (groups * reds, channels) if channelwise else (reds, outs)
    align, out_align = support.alignment(red_width, *strides), support.alignment(out_width, *grad_strides)

    count = images * conv_size[0] * conv_size[1]
    if channelwise:
        rows, cols, block = _tile(channels, 32), 1, 64
        tiles = support.ceil_div(channels, rows) * taps * reds
    else:
        rows, cols, block = _tile(outs, 64), _tile(taps * reds, 64), 64 if input.dtype != torch.float32 else 32
        tiles = groups * support.ceil_div(outs, rows) * support.ceil_div(taps * reds, cols)
    # Enough programs to fill the GPU several times over, but none with less than a few steps.
    splits = min(
        support.ceil_div(4 * support.multiprocessors(device), tiles), support.ceil_div(count, 4 * block), _MAX_GRID
    )
    span = support.ceil_div(support.ceil_div(count, splits), block) * block
    splits = support.ceil_div(count, span)
    kernels = _kernels()
    with support.device_guard(device):
        partial_weight = torch.empty((splits, channels, taps * reds), dtype=torch.float32, device=device)
        partial_bias = torch.empty((splits, channels), dtype=torch.float32, device=device) if need_bias else None
        kernels.conv_backward_weight_kernel[(tiles, splits)](
            grad_conv,
            input,
            partial_weight,
            partial_bias,
            count,
            span,
            *conv_size,
            *input.shape[2:],
            red_width // align,
            out_width // out_align,
            groups,
            *kernel_size,
            *stride,
            *padding,
            *dilation,
            *(s // out_align for s in grad_strides),
            *(s // align for s in strides),
            CHANNELWISE=channelwise,
            GROUP_REDS=reds if channelwise else None,
            GROUP_OUTS=outs if channelwise else None,
            PRECISION=_precision(input, tf32),
            ALIGN=align,
            OUT_ALIGN=out_align,
            LONG=_is_long(count, block),
            ROWS=rows,
            COLS=cols,
            BLOCK=block,
            STAGES=1 if channelwise else 3,
            num_warps=4,
        )
        for partial, total, width in ((partial_weight, grad_weight, reds), (partial_bias, grad_bias, 1)):
            if partial is not None:
                kernels.conv_finish_kernel[(support.ceil_div(total.numel(), 256),)](
                    partial,
                    total,
                    splits,
                    total.numel(),
                    width,
                    taps,
                    CHANNELS_LAST=channels_last or total.dim() == 1,
                    BLOCK=256,
                    num_warps=2,
                )
    return grad_weight, grad_bias


support.register("conv_forward", _forward)
support.register("conv_backward_epilogue", _backward_epilogue)
support.register("conv_backward_input", _backward_input)
support.register("conv_backward_weight", _backward_weight)
