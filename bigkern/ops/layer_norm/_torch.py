"""Layer norm in PyTorch's own operators: what runs without a GPU, and what is differentiated twice.

:func:`compose` is the backend: plain composites of the fastest operators torch has, so autograd, forward mode and
functorch are torch's.  :func:`forward` and :func:`backward` state the raw ops' mathematics, differentiably and row by
row:

    mean = sum(x) / cols                    (0 for rms_norm)
    rstd = 1 / sqrt(sum((x - mean)^2) / cols + eps)
    normalized = (x - mean) * rstd,         output = normalized * weight + bias
    g = grad_output * weight
    grad_x = rstd * (g - sum(g) / cols - normalized * sum(g * normalized) / cols)     (no sum(g) for rms_norm)
    grad_weight = sum over rows of grad_output * normalized,    grad_bias = sum over rows of grad_output
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops._torch_philox import dropout


def unsupported(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
) -> str | None:
    """Always None: torch serves whatever the argument checks let through."""
    return None


def compose(
    input: Tensor,
    residual: Tensor | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(output, summed) of tensors of any shape; summed is None when there is no residual.

    The dropout mask is drawn from ``philox``, or by torch's own dropout when that is None.

    The operators are called without torch.nn.functional's layers over them, which cost 2 us a call.
    """
    summed = None
    if residual is not None:
        summed = input = _add(input, residual, dropout_p, philox)
    if rms:
        return torch.rms_norm(input, shape, weight, eps), summed
    parameter = bias if weight is None else weight
    if parameter is not None and parameter.dtype != input.dtype and not input.is_cpu:
        # Only torch's CPU operator takes parameters wider than its input.
        return torch.layer_norm(input.to(parameter.dtype), shape, weight, bias, eps).to(input.dtype), summed
    return torch.layer_norm(input, shape, weight, bias, eps), summed


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, summed, mean, rstd) of rows x cols tensors; see _schema.py."""
    summed = None if residual is None else _add(input, residual, dropout_p, philox)
    x = input if summed is None else summed
    mean, rstd = statistics(x, eps, rms)
    output = _normalized(x, mean, rstd, rms)
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    empty = input.new_empty((0,))
    return output.to(input.dtype), empty if summed is None else summed, mean, rstd


def backward(
    grad_output: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_input, grad_residual, grad_weight, grad_bias) of rows x cols tensors; see _schema.py.

    To differentiate the result with respect to ``summed``, ``mean`` and ``rstd`` must come from :func:`statistics` of
    it.
    """
    normalized = _normalized(summed, mean, rstd, rms)
    grad = grad_output.to(normalized.dtype)
    scaled = grad if weight is None else grad * weight
    grad_residual = scaled - normalized * (scaled * normalized).mean(1, keepdim=True)
    if not rms:
        grad_residual = grad_residual - scaled.mean(1, keepdim=True)
    grad_residual = grad_residual * rstd.unsqueeze(1)
    if grad_summed is not None:
        grad_residual = grad_residual + grad_summed
    grad_input = grad_residual if dropout_p == 0 else dropout(grad_residual, dropout_p, philox)
    empty = summed.new_empty((0,))
    parameter = summed.dtype if weight is None else weight.dtype
    return (
        grad_input.to(summed.dtype),
        empty if dropout_p == 0 else grad_residual.to(summed.dtype),
        (grad * normalized).sum(0).to(parameter) if need_weight else empty,
        grad.sum(0).to(parameter) if need_bias else empty,
    )


def statistics(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of each row, in fp32 (fp64 of fp64); mean is (0,) for rms."""
    x = x.to(accumulator(x.dtype))
    if rms:
        return x.new_empty((0,)), torch.rsqrt(x.square().mean(1) + eps)
    mean = x.mean(1, keepdim=True)
    return mean.squeeze(1), torch.rsqrt((x - mean).square().mean(1) + eps)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add(input: Tensor, residual: Tensor, dropout_p: float, philox: Tensor | None) -> Tensor:
    if dropout_p == 0:
        return residual + input
    if philox is None:
        return residual + torch.dropout(input, dropout_p, True)
    accumulate = accumulator(input.dtype)
    return (residual.to(accumulate) + dropout(input.to(accumulate), dropout_p, philox)).to(input.dtype)


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    x = x.to(rstd.dtype)
    return (x if rms else x - mean.unsqueeze(1)) * rstd.unsqueeze(1)
