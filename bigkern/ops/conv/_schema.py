"""The raw ops of convolution: functional, without autograd, one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/conv.cpp, ``bigkern_triton`` by _triton.py.
They are two-dimensional: a one-dimensional convolution is one of height 1.  Shapes: input (N, C, H, W), weight
(K, C / groups, R, S), bias (K,), the convolution (N, K, P, Q), and output, which is the convolution after the
activation, or its maxima over the pooling windows.  Any strides; all tensors of one dtype, none of them empty.

* ``activation`` is an index into ``ACTIVATIONS``; ``max_pool`` is [] or [kernel_h, kernel_w, stride_h, stride_w,
  padding_h, padding_w], with at most ``MAX_POOL_WINDOW`` places in a window.
* ``argmax`` (uint8): the place in the window, row by row, of the first maximum; of the last NaN where there is one.
* ``preactivation``: for the activations but relu, what the activation was given where output comes from.  The backward
  pass reads it and ``argmax``, and for relu ``output``; it takes an empty tensor for what it does not read.
* ``residual``: added to the convolution before the activation; of its shape, and for ``bigkern_cuda`` laid out as
  output (:func:`as_output`).  Not together with ``max_pool``.
* ``channels_last``: the memory format of what is returned (output, preactivation and argmax; grad_input; grad_weight).
  ``grad_conv`` is always channels_last.
* ``tf32``: whether products of fp32 may be rounded to TF32.

A result that does not apply is an empty (0,) tensor, because a functional op may not return one of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
MAX_POOL_WINDOW = 255

_FORWARD = (
    "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups,"
    " int activation, int[] max_pool, bool tf32, bool channels_last, bool need_backward, Tensor? residual=None)"
    " -> (Tensor output, Tensor preactivation, Tensor argmax)"
)
_BACKWARD_EPILOGUE = (
    "(Tensor grad_output, Tensor output, Tensor preactivation, Tensor argmax, int[2] conv_size, int activation,"
    " int[] max_pool) -> Tensor grad_conv"
)
_BACKWARD_INPUT = (
    "(Tensor grad_conv, Tensor weight, int[2] input_size, int[2] stride, int[2] padding, int[2] dilation, int groups,"
    " bool tf32, bool channels_last) -> Tensor grad_input"
)
_BACKWARD_WEIGHT = (
    "(Tensor grad_conv, Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups,"
    " bool tf32, bool channels_last, bool need_bias) -> (Tensor grad_weight, Tensor grad_bias)"
)


def conv_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(P, Q): how many places a kernel finds in an image of ``size`` (H, W)."""
    return [
        (extent + 2 * pad - step * (taps - 1) - 1) // stride + 1
        for extent, taps, stride, pad, step in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def pooled_size(size: Sequence[int], max_pool: Sequence[int]) -> list[int]:
    """The spatial size of the output of a convolution of ``size``."""
    if not max_pool:
        return list(size)
    return conv_size(size, max_pool[:2], max_pool[2:4], max_pool[4:], (1, 1))


def unsupported_window(max_pool: Sequence[int]) -> str | None:
    """Why the raw ops cannot pool over such a window, or None: argmax counts its places in a byte."""
    if max_pool and max_pool[0] * max_pool[1] > MAX_POOL_WINDOW:
        return (
            f"max_pool's window has {max_pool[0]} x {max_pool[1]} places; the kernels take up to {MAX_POOL_WINDOW}, "
            "pool larger ones with torch.nn.functional.max_pool2d"
        )
    return None


def new_tensor(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, on the device and by default of the dtype of ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def as_output(residual: Tensor | None, channels_last: bool) -> Tensor | None:
    """The residual in the memory format of the output: itself where it is."""
    if residual is None:
        return None
    return residual.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _forward_fake(
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
    size = pooled_size(conv_size(input.shape[2:], weight.shape[2:], stride, padding, dilation), max_pool)
    shape = (input.shape[0], weight.shape[0], *size)
    keeps_preactivation = need_backward and ACTIVATIONS[activation] not in (None, "relu")
    return (
        new_tensor(input, shape, channels_last),
        new_tensor(input, shape, channels_last) if keeps_preactivation else input.new_empty((0,)),
        new_tensor(input, shape, channels_last, torch.uint8)
        if need_backward and max_pool
        else input.new_empty((0,), dtype=torch.uint8),
    )


def _backward_epilogue_fake(
    grad_output: Tensor,
    output: Tensor,
    preactivation: Tensor,
    argmax: Tensor,
    conv_size: Sequence[int],
    activation: int,
    max_pool: Sequence[int],
) -> Tensor:
    return new_tensor(grad_output, (*grad_output.shape[:2], *conv_size), True)


def _backward_input_fake(
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
    return new_tensor(grad_conv, (grad_conv.shape[0], weight.shape[1] * groups, *input_size), channels_last)


def _backward_weight_fake(
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
    shape = (grad_conv.shape[1], input.shape[1] // groups, *kernel_size)
    return new_tensor(input, shape, channels_last), input.new_empty((grad_conv.shape[1],) if need_bias else (0,))


for _namespace in NAMESPACES:
    for _name, _signature, _fake in (
        ("conv_forward", _FORWARD, _forward_fake),
        ("conv_backward_epilogue", _BACKWARD_EPILOGUE, _backward_epilogue_fake),
        ("conv_backward_input", _BACKWARD_INPUT, _backward_input_fake),
        ("conv_backward_weight", _BACKWARD_WEIGHT, _backward_weight_fake),
    ):
        torch.library.define(f"{_namespace}::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
