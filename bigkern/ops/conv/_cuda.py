"""Convolution on the compiled CUDA kernels: what they support, and their raw ops (csrc/torch/conv.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.conv import _schema

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()


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
    reason = _extension.unsupported_tensors("conv_forward", input=input, weight=weight, bias=bias, residual=residual)
    if reason is not None:
        return reason
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != input.dtype:
            return f"{name} is {tensor.dtype} and input {input.dtype}; the CUDA kernels take tensors of one dtype"
    return _schema.unsupported_window(max_pool)


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
    return torch.ops.bigkern_cuda.conv_forward.default(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation,
        max_pool,
        tf32,
        channels_last,
        need_backward,
        _schema.as_output(residual, channels_last),
    )


def backward_epilogue(
    grad_output: Tensor,
    output: Tensor,
    preactivation: Tensor,
    argmax: Tensor,
    conv_size: Sequence[int],
    activation: int,
    max_pool: Sequence[int],
) -> Tensor:
    """The gradient of the plain convolution, channels_last; see _schema.py."""
    return torch.ops.bigkern_cuda.conv_backward_epilogue.default(
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
    return torch.ops.bigkern_cuda.conv_backward_input.default(
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
    return torch.ops.bigkern_cuda.conv_backward_weight.default(
        grad_conv, input, kernel_size, stride, padding, dilation, groups, tf32, channels_last, need_bias
    )
