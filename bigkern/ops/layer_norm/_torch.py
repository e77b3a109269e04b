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

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


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


def dropout(x: Tensor, dropout_p: float, philox: Tensor) -> Tensor:
    """``x`` (fp32 or fp64) with the mask drawn from ``philox``, the kept elements times 1 / (1 - dropout_p)."""
    scale = 0.0 if dropout_p == 1 else 1.0 / (1.0 - dropout_p)
    keep = _uniform(x.numel(), philox).view(x.shape) > dropout_p
    return torch.where(keep, x * scale, 0.0)


def philox4x32_10(seed: Tensor, subsequence: Tensor, offset: Tensor) -> Tensor:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011) for each subsequence, as an int64 (..., 4)
    tensor.

    The counter is {offset, subsequence} and the key the seed, low words first, as in csrc/device/philox.cuh.  Sums and
    products are taken modulo 2^64, which int64 does, and cut to 32 bits.
    """
    offset, seed = offset.expand_as(subsequence), seed.expand_as(subsequence)
    c0, c1 = offset & _WORD, (offset >> 32) & _WORD
    c2, c3 = subsequence & _WORD, (subsequence >> 32) & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def _add(input: Tensor, residual: Tensor, dropout_p: float, philox: Tensor | None) -> Tensor:
    if dropout_p == 0:
        return residual + input
    if philox is None:
        return residual + torch.dropout(input, dropout_p, True)
    accumulate = accumulator(input.dtype)
    return (residual.to(accumulate) + dropout(input.to(accumulate), dropout_p, philox)).to(input.dtype)


def _uniform(count: int, philox: Tensor) -> Tensor:
    """fp32 in (0, 1] for elements 0..count-1: element i takes word i % 4 of subsequence i // 4."""
    words = philox4x32_10(philox[0], torch.arange((count + 3) // 4, device=philox.device), philox[1])
    return words.view(-1)[:count].to(torch.float32) * 2.0**-32 + 2.0**-33


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    x = x.to(rstd.dtype)
    return (x if rms else x - mean.unsqueeze(1)) * rstd.unsqueeze(1)
