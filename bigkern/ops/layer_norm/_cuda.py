"""Layer norm on the compiled CUDA kernels: what they support, and their raw ops (csrc/torch/layer_norm.cpp)."""

from __future__ import annotations

import torch

from bigkern.ops import _extension
from bigkern.ops.layer_norm import _schema  # noqa: F401  (declares the ops that the extension implements)

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()


def unsupported(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None."""
    reason = _extension.unsupported_tensors(
        "layer_norm_forward", input=input, residual=residual, weight=weight, bias=bias
    )
    if reason is not None:
        return reason
    if residual is not None and residual.dtype != input.dtype:
        return f"residual is {residual.dtype} and input {input.dtype}; the CUDA kernel adds tensors of one dtype"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight is {weight.dtype} and bias {bias.dtype}; the CUDA kernel takes parameters of one dtype"
    parameter = bias if weight is None else weight
    if parameter is not None and parameter.dtype not in (input.dtype, torch.float32):
        return f"parameters are {parameter.dtype} and input {input.dtype}; the CUDA kernel takes the same, or float32"
    if residual is None and dropout_p > 0:
        return "the CUDA kernel applies dropout only before adding a residual"
    if rms and bias is not None:
        return "the CUDA kernel's RMS norm has no bias"
    return None


def forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    philox: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, summed, mean, rstd) of rows x cols tensors; see _schema.py."""
    return torch.ops.bigkern_cuda.layer_norm_forward.default(input, residual, weight, bias, eps, rms, dropout_p, philox)


def backward(
    grad_output: torch.Tensor | None,
    grad_summed: torch.Tensor | None,
    summed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    rms: bool,
    dropout_p: float,
    philox: torch.Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_input, grad_residual, grad_weight, grad_bias) of rows x cols tensors; see _schema.py."""
    return torch.ops.bigkern_cuda.layer_norm_backward.default(
        grad_output, grad_summed, summed, mean, rstd, weight, rms, dropout_p, philox, need_weight, need_bias
    )
