"""Convolution in PyTorch's own operators: what runs without a GPU, and what is differentiated twice.

:func:`compose` is the backend: torch's convolution, activation and pooling one after the other, so autograd, forward
mode and functorch are torch's.  With x padded by zeros, s the stride and d the dilation, channel k of group g:

    conv[n, k, p, q] = bias[k] + sum over c, i, j of weight[k, c, i, j] * x[n, g * C / groups + c, s p + d i, s q + d j]
    output = max over the window of activation(conv), or, without pooling, activation(conv + residual)

:func:`gradients` is the backward pass where it must itself be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d}
_POOLS = {1: torch.max_pool1d, 2: torch.max_pool2d}


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
    """Always None: torch serves whatever the argument checks let through."""
    return None


def compose(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: int | Sequence | None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of ``rank`` spatial dimensions, the activation, and the maxima; arguments as in the public op.

    The operators are called without torch.nn.functional's layers over them, which cost microseconds a call.
    """
    output = _CONVOLUTIONS[rank](input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        output = output + residual
    if activation == "relu":
        output = torch.relu(output)
    elif activation == "silu":
        output = torch._C._nn.silu(output)
    elif activation is not None:
        output = torch._C._nn.gelu(output, approximate="tanh" if activation == "gelu_tanh" else "none")
    if max_pool is not None:
        kernel_size, stride, padding = (max_pool, None, 0) if isinstance(max_pool, int) else max_pool
        output = _POOLS[rank](output, kernel_size, () if stride is None else stride, padding)
    return output


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: Sequence | None,
    residual: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a two-dimensional :func:`compose` that are ``needed`` of (input, weight, bias, residual),
    differentiable with respect to the tensors given, grad_output among them."""
    with torch.enable_grad():
        output = compose(2, input, weight, bias, stride, padding, dilation, groups, activation, max_pool, residual)
    wanted = [tensor for tensor, need in zip((input, weight, bias, residual), needed, strict=True) if need]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(found) if need else None for need in needed]
