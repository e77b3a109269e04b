"""The optimizers' steps and the gradients' norm on the compiled CUDA kernels (csrc/torch/adam.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops import _extension
from bigkern.ops.adam import _schema  # noqa: F401  (declares the ops that the extension implements)

# At import, not at the first call: torch.compile may be tracing that call.
_extension.load()

# The states beside each type of parameter.
_STATES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def unsupported(param: Tensor, moment_dtype: torch.dtype | None, request: str) -> str | None:
    """Why ``param`` (or a gradient) with states of ``moment_dtype`` cannot be served by the raw op, or None."""
    reason = _extension.unsupported_tensors(request, param=param)
    if reason is not None:
        return reason
    if moment_dtype is not None and moment_dtype not in _STATES[param.dtype]:
        served = " and ".join(str(dtype) for dtype in _STATES[param.dtype])
        return (
            f"the states are {moment_dtype} and the parameter {param.dtype}; beside it the CUDA kernels take {served}"
        )
    return None


def adam_step(
    tensors: Tensor,
    chunk_ends: Tensor,
    grads: Tensor,
    hyper: Tensor,
    scratch: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    total_norm: Tensor | None,
    max_norm: float,
    zero_grads: bool,
    philox: Tensor | None,
) -> None:
    """One step of Adam or AdamW over the tables of _plan.py."""
    torch.ops.bigkern_cuda.adam_step.default(
        tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm, zero_grads, philox
    )


def sgd_step(
    tensors: Tensor,
    chunk_ends: Tensor,
    grads: Tensor,
    hyper: Tensor,
    scratch: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    total_norm: Tensor | None,
    max_norm: float,
    zero_grads: bool,
    philox: Tensor | None,
) -> None:
    """One step of SGD over the tables of _plan.py."""
    torch.ops.bigkern_cuda.sgd_step.default(
        tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm, zero_grads, philox
    )


def grad_norm(
    tensors: Tensor,
    chunk_ends: Tensor,
    grads: Tensor,
    scratch: Tensor,
    norm_type: float,
    grad_scale: Tensor | None,
) -> Tensor:
    """The norm of all gradients as one vector, fp32."""
    return torch.ops.bigkern_cuda.grad_norm.default(tensors, chunk_ends, grads, scratch, norm_type, grad_scale)


def clip_grads(
    tensors: Tensor, chunk_ends: Tensor, grads: Tensor, scratch: Tensor, norm_type: float, max_norm: float
) -> Tensor:
    """The same norm; the gradients are scaled in place where it is beyond ``max_norm``."""
    return torch.ops.bigkern_cuda.clip_grads.default(tensors, chunk_ends, grads, scratch, norm_type, max_norm)
