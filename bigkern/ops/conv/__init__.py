"""Convolution of one or two spatial dimensions, fused with bias, residual, activation and max pooling.

Three dimensions are torch.nn.functional.conv3d's: the kernels' tiles walk over height and width, and images are only
counted.

LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998; the kernels are
implicit matrix products: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014 (arXiv:1410.0759).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigkern import backend
from bigkern.ops.conv import _cuda, _torch, _triton
from bigkern.ops.conv._schema import ACTIVATIONS, conv_size

__all__ = ["conv1d", "conv2d"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_SUPPORTED_DTYPES = "float32, bfloat16, float16 or float64"
_SHAPES = {1: "(N, C, L) or (C, L)", 2: "(N, C, H, W) or (C, H, W)"}
_WEIGHT_SHAPES = {1: "(out_channels, in_channels / groups, S)", 2: "(out_channels, in_channels / groups, R, S)"}

# An int, or one int for each spatial dimension.
Size = int | Sequence[int]
# The window's size and stride; or kernel_size, stride and padding.
MaxPool = int | tuple[Size, Size | None, Size]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    max_pool: MaxPool | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Two-dimensional convolution, plus a residual, then an activation, then max pooling, in one pass over memory.

    Args:
        input: (N, C, H, W), or (C, H, W) unbatched; float32, bfloat16, float16, or float64 (torch backend only).  Any
            strides; channels_last is what the kernels work on, another layout costs a copy unless there are at most 4
            channels.
        weight: (K, C / groups, R, S); the input's dtype.
        bias: (K,); the input's dtype.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d: ints or one for each dimension; ``padding``
            also "valid" (none) or "same" (with stride 1: the output is as large as the input).
        activation: None, "relu", "gelu", "gelu_tanh" (gelu's approximation by tanh) or "silu".
        max_pool: None; an int, the window's size and stride; or (kernel_size, stride, padding) as
            torch.nn.functional.max_pool2d has them, each an int or a pair.
        residual: of the output's shape and the input's dtype, added before the activation, as at the end of a residual
            block; not together with ``max_pool``.  The output's memory format is read as it is, another one copied.

    Returns:
        (N, K, P, Q), unbatched (K, P, Q), of the input's dtype; channels_last where the input or the weight is.  Under
        autocast, of autocast's dtype.

    Products of float32 are of float32, unless ``torch.backends.cudnn`` allows its convolutions TF32 (torch's default on
    CUDA).  Equal inputs give equal bits, gradients too.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ; an argument of another type.
        ValueError: shapes that do not fit, tensors on different devices, a stride, padding, dilation, groups,
            activation or max_pool that has no meaning; a residual beside a max_pool.
        bigkern.BackendError: the backend that was asked for cannot serve the arguments.
    """
    if residual is None and _is_plain(input, weight, bias, activation):
        try:
            return _torch.compose(2, input, weight, bias, stride, padding, dilation, groups, activation, max_pool)
        except (RuntimeError, TypeError, ValueError):
            pass  # what follows says which argument is wrong
    return _convolve(
        "conv2d", 2, input, weight, bias, stride, padding, dilation, groups, activation, max_pool, residual
    )


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    max_pool: MaxPool | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """One-dimensional convolution, plus a residual, then an activation, then max pooling, in one pass over memory.

    Args:
        input: (N, C, L), or (C, L) unbatched.  Any strides; a transposed (N, L, C) is read as it is.
        weight: (K, C / groups, S).
        bias, stride, padding, dilation, groups, activation, max_pool, residual: as in :func:`conv2d`, for one
            dimension.

    Returns:
        (N, K, Q), unbatched (K, Q), contiguous; otherwise as :func:`conv2d`, as are the errors raised.
    """
    if residual is None and _is_plain(input, weight, bias, activation):
        try:
            return _torch.compose(1, input, weight, bias, stride, padding, dilation, groups, activation, max_pool)
        except (RuntimeError, TypeError, ValueError):
            pass  # what follows says which argument is wrong
    return _convolve(
        "conv1d", 1, input, weight, bias, stride, padding, dilation, groups, activation, max_pool, residual
    )


class _Conv(torch.autograd.Function):
    """A kernel backend's forward and backward, in two dimensions.

    Where the gradient shall be differentiated, it is torch's composite.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, residual, implementation, geometry, activation, window, tf32, formats):
        output, preactivation, argmax = implementation.forward(
            input, weight, bias, *geometry, ACTIVATIONS.index(activation), window, tf32, formats[0], True, residual
        )
        # relu's mask is its own output; the others' derivatives follow from what they were given.
        kept = output if activation == "relu" else preactivation
        # The residual itself is read only where the gradient is differentiated again.
        ctx.save_for_backward(input, weight, bias, residual, kept, argmax)
        ctx.implementation, ctx.geometry, ctx.activation, ctx.window = implementation, geometry, activation, window
        ctx.tf32, ctx.formats = tf32, formats
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, residual, kept, argmax = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual = needed = ctx.needs_input_grad[:4]
        # While torch.compile traces a backward it will not be differentiated again, whatever the grad mode says.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            window = ctx.window
            max_pool = (window[:2], window[2:4], window[4:]) if window else None
            grads = _torch.gradients(
                grad_output, input, weight, bias, *ctx.geometry, ctx.activation, max_pool, residual, needed
            )
            return (*grads, *(None,) * 6)

        implementation, kernel_size = ctx.implementation, weight.shape[2:]
        grad_conv = grad_output
        if ctx.activation is not None or ctx.window:
            empty = input.new_empty((0,))
            output, preactivation = (kept, empty) if ctx.activation == "relu" else (empty, kept)
            size = conv_size(input.shape[2:], kernel_size, *ctx.geometry[:3])
            grad_conv = implementation.backward_epilogue(
                grad_output, output, preactivation, argmax, size, ACTIVATIONS.index(ctx.activation), ctx.window
            )
        grad_input = grad_weight = grad_bias = None
        if need_input:
            grad_input = implementation.backward_input(
                grad_conv, weight, input.shape[2:], *ctx.geometry, ctx.tf32, ctx.formats[0]
            )
        if need_weight:
            grad_weight, grad_bias = implementation.backward_weight(
                grad_conv, input, kernel_size, *ctx.geometry, ctx.tf32, ctx.formats[1], need_bias
            )
        elif need_bias:
            grad_bias = grad_conv.sum((0, 2, 3))
        grad_residual = grad_conv if need_residual else None
        return grad_input, grad_weight, grad_bias if need_bias else None, grad_residual, *(None,) * 6


def _convolve(
    op: str,
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    activation: str | None,
    max_pool: MaxPool | None,
    residual: Tensor | None,
) -> Tensor:
    """The public functions for any arguments: refuse the bad ones, choose a backend, and run it."""
    stride, padding, dilation, max_pool = _check(
        op, rank, input, weight, bias, stride, padding, dilation, groups, activation, max_pool, residual
    )
    if backend.uses_torch(input):
        return _torch.compose(
            rank, input, weight, bias, stride, padding, dilation, groups, activation, max_pool, residual
        )
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # As torch's own autocast, which leaves float64 alone.
        input, weight, bias, residual = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (input, weight, bias, residual)
        )
    batched = input.dim() == rank + 2
    if not batched:
        input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    input, padding = _pad(input, weight, padding, dilation)
    if rank == 1:
        # A convolution of height 1.  As torch, which makes the input contiguous, this gives a contiguous output.
        output = _dispatch(
            input.unsqueeze(2),
            weight.unsqueeze(2),
            bias,
            ((1, *stride), (0, *padding), (1, *dilation), groups),
            activation,
            max_pool and tuple((usual, *sizes) for usual, sizes in zip((1, 1, 0), max_pool, strict=True)),
            None if residual is None else residual.unsqueeze(2),
            (False, False),
        ).squeeze(2)
    else:
        weight_format = _is_channels_last(weight)
        output = _dispatch(
            input,
            weight,
            bias,
            (stride, padding, dilation, groups),
            activation,
            max_pool,
            residual,
            (weight_format or _is_channels_last(input), weight_format),
        )
    return output if batched else output.squeeze(0)


def _dispatch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    activation: str | None,
    max_pool: tuple[tuple[int, ...], ...] | None,
    residual: Tensor | None,
    formats: tuple[bool, bool],
) -> Tensor:
    """A two-dimensional convolution on the backend that :func:`backend.select` names.

    ``geometry`` is (stride, padding, dilation, groups); ``formats`` whether output and grad_input, and whether
    grad_weight, are channels_last.
    """
    window = () if max_pool is None else sum(max_pool, ())  # as the raw ops have it
    implementation = backend.select(
        "conv", _IMPLEMENTATIONS, input, weight, bias, *geometry, activation, window, residual
    )
    # Nothing to launch on no elements; forward mode and functorch need operators that torch can differentiate itself.
    if (
        implementation is _torch
        or input.numel() == 0
        or weight.numel() == 0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return _torch.compose(2, input, weight, bias, *geometry, activation, max_pool, residual)
    tf32 = input.dtype == torch.float32 and _allows_tf32()
    given = (input, weight, bias, residual)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return _Conv.apply(*given, implementation, geometry, activation, window, tf32, formats)
    index = ACTIVATIONS.index(activation)
    return implementation.forward(input, weight, bias, *geometry, index, window, tf32, formats[0], False, residual)[0]


def _allows_tf32() -> bool:
    """Whether torch's own convolutions may round float32 products to TF32."""
    if torch.compiler.is_compiling():
        return torch.backends.cudnn.allow_tf32  # what torch.compile can trace, and guards on
    # torch.backends.cudnn.allow_tf32 raises where convolutions and recurrent layers have been set apart.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch would give a convolution's output channels_last for this operand: ``suggest_memory_format`` of
    c10/core/MemoryFormat.h, by which a tensor whose strides fit both formats is contiguous."""
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * sizes[dim]
    return True


def _pad(
    input: Tensor, weight: Tensor, padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and its padding as ints: "same" may need one column more on the right than on the left."""
    if padding == "valid":
        return input, (0,) * len(dilation)
    if padding != "same":
        return input, padding
    totals = [step * (taps - 1) for step, taps in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        extra = [side for total in reversed(totals) for side in (0, total % 2)]
        input = torch.constant_pad_nd(input, extra)
    return input, tuple(total // 2 for total in totals)


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether torch serves the call and what is left to refuse torch's operators refuse themselves.

    :func:`_check` would say the same, more slowly: it costs more than the 3 us that a call on a CPU may cost more than
    torch.nn's.
    """
    # getattr refuses what is not a tensor, at less than isinstance of a torch.nn.Parameter.
    return (
        isinstance(input, Tensor)
        and input.is_cpu
        and backend._requested in (None, "torch")
        and input.dtype in _DTYPES
        and getattr(weight, "is_cpu", False)
        and (bias is None or getattr(bias, "is_cpu", False))
        and activation in ACTIVATIONS
    )


def _check(
    op: str,
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    activation: str | None,
    max_pool: MaxPool | None,
    residual: Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...] | str, tuple[int, ...], tuple[tuple[int, ...], ...] | None]:
    """Refuse what no backend serves; stride, padding, dilation and max_pool as tuples (padding may stay a string)."""
    _check_tensors(op, input, weight, bias, residual)
    if input.dim() not in (rank + 1, rank + 2):
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}; it must be {_SHAPES[rank]}")
    if weight.dim() != rank + 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; it must be {_WEIGHT_SHAPES[rank]}")
    if not isinstance(groups, int):
        raise TypeError(f"{op}: groups is a {type(groups).__name__}; expected an int")
    out_channels, group_channels, *kernel_size = weight.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(
            f"{op}: groups is {groups}; it must be at least 1 and divide weight's {out_channels} output channels"
        )
    channels = input.shape[-rank - 1]
    if channels != group_channels * groups:
        raise ValueError(
            f"{op}: input has {channels} channels, but weight of shape {tuple(weight.shape)} with groups={groups} "
            f"takes {group_channels * groups}: weight.shape[1] must be the input's channels / groups"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be ({out_channels},), one per channel")
    if min(kernel_size) < 1:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; its kernel must be at least 1 in each dimension"
        )

    stride = _sizes(op, "stride", stride, rank, 1)
    dilation = _sizes(op, "dilation", dilation, rank, 1)
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"{op}: padding is {padding!r}; as a string it must be 'valid' or 'same'")
        if padding == "same" and stride != (1,) * rank:
            raise ValueError(
                f"{op}: padding='same' with stride {stride}; it has a meaning for stride 1 only: give ints"
            )
    else:
        padding = _sizes(op, "padding", padding, rank, 0)

    size = list(input.shape[-rank:])
    if padding != "same":
        around = (0,) * rank if padding == "valid" else padding
        size = conv_size(size, kernel_size, stride, around, dilation)
        if min(size) < 1:
            raise ValueError(
                f"{op}: kernel of {tuple(kernel_size)} with dilation {dilation} is larger than the input of "
                f"{tuple(input.shape[-rank:])} with padding {around}: pad more, or give a larger input"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; supported are {', '.join(map(repr, ACTIVATIONS))}")
    if residual is not None:
        if max_pool is not None:
            raise ValueError(
                f"{op}: residual with max_pool={max_pool}; only one of them can follow a convolution: add the residual "
                "without max_pool and pool with torch.nn.functional"
            )
        shape = (*input.shape[: -rank - 1], out_channels, *size)
        if residual.shape != shape:
            raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; it must be the output's, {shape}")
    return stride, padding, dilation, _check_pool(op, rank, max_pool, size)


def _check_tensors(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input is a {type(input).__name__}; expected a torch.Tensor")
    dtype = input.dtype
    if dtype not in _DTYPES:
        raise TypeError(
            f"{op}: input has dtype {dtype}; supported are {_SUPPORTED_DTYPES}: convert it with input.float()"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None and name != "weight":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.device != input.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and input on {input.device}; move one with .to(device)"
            )
        if tensor.dtype != dtype and not (tensor.dtype in _DTYPES and torch.is_autocast_enabled(input.device.type)):
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype} and input {dtype}; they must be the same: "
                f"convert one with .to(dtype), or run under torch.autocast"
            )


def _check_pool(
    op: str, rank: int, max_pool: MaxPool | None, size: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """``max_pool`` as (kernel sizes, strides, paddings); None for None.  ``size`` is the convolution's."""
    if max_pool is None:
        return None
    if isinstance(max_pool, int):
        kernel_size, stride, padding = max_pool, None, 0
    elif isinstance(max_pool, (tuple, list)):
        if len(max_pool) != 3:
            raise ValueError(
                f"{op}: max_pool is {max_pool}; it must be an int or have three parts, (kernel_size, stride, padding)"
            )
        kernel_size, stride, padding = max_pool
    else:
        raise TypeError(
            f"{op}: max_pool is a {type(max_pool).__name__}; expected None, an int or (kernel_size, stride, padding)"
        )
    kernel = _sizes(op, "max_pool's kernel_size", kernel_size, rank, 1)
    strides = kernel if stride is None else _sizes(op, "max_pool's stride", stride, rank, 1)
    around = _sizes(op, "max_pool's padding", padding, rank, 0)
    if any(2 * pad > taps for pad, taps in zip(around, kernel, strict=True)):
        raise ValueError(f"{op}: max_pool's padding is {around}; it may be at most half of its kernel_size {kernel}")
    if min(conv_size(size, kernel, strides, around, (1,) * rank)) < 1:
        raise ValueError(
            f"{op}: max_pool's kernel_size {kernel} is larger than the convolution's output of {tuple(size)} with "
            f"padding {around}: pool less, or give a larger input"
        )
    return kernel, strides, around


def _sizes(op: str, name: str, value: Size, rank: int, least: int) -> tuple[int, ...]:
    """``value`` as a tuple of ``rank`` ints, none of them below ``least``."""
    if isinstance(value, int):
        sizes = (value,) * rank
    elif isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value):
        sizes = tuple(value) * rank if len(value) == 1 else tuple(value)
    else:
        raise TypeError(f"{op}: {name} is {value!r}; expected an int or {rank} of them")
    if len(sizes) != rank:
        raise ValueError(f"{op}: {name} is {value}; expected an int or {rank} of them")
    if min(sizes) < least:
        raise ValueError(f"{op}: {name} is {value}; it must be at least {least}")
    return sizes
