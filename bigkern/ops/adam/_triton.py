"""The optimizers' steps and the gradients' norm on Triton: what it supports, and how its kernels are launched.

The kernels are in _triton_kernels.py.  They read the tables that the CUDA kernels read (_plan.py).  Counting the steps,
and what follows a norm, are launches of their own: Triton has no way for the blocks of one to meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops import _triton_support as support
from bigkern.ops.adam import _schema  # noqa: F401  (declares the ops implemented here)
from bigkern.ops.adam._plan import CHUNK, SCRATCH_WORDS

_STATES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

# Programs a multiprocessor; a program that finds no chunk ends at once.
_RESIDENT = 8
_WARPS = 8

# Tensors whose step one program counts.
_COUNTED = 1024

_MAX_PROGRAMS = SCRATCH_WORDS - 2

_loaded_kernels = None


def unsupported(param: Tensor, moment_dtype: torch.dtype | None, request: str) -> str | None:
    """Why ``param`` (or a gradient) with states of ``moment_dtype`` cannot be served by the raw op, or None."""
    reason = support.unsupported_tensors(param=param)
    if reason is not None:
        return reason
    if moment_dtype is not None and moment_dtype not in _STATES[param.dtype]:
        served = " and ".join(map(str, _STATES[param.dtype]))
        return (
            f"the states are {moment_dtype} and the parameter {param.dtype}; beside it Triton's kernels take {served}"
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
    torch.ops.bigkern_triton.adam_step.default(
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
    torch.ops.bigkern_triton.sgd_step.default(
        tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm, zero_grads, philox
    )


def grad_norm(
    tensors: Tensor, chunk_ends: Tensor, grads: Tensor, scratch: Tensor, norm_type: float, grad_scale: Tensor | None
) -> Tensor:
    """The norm of all gradients as one vector, fp32."""
    return torch.ops.bigkern_triton.grad_norm.default(tensors, chunk_ends, grads, scratch, norm_type, grad_scale)


def clip_grads(
    tensors: Tensor, chunk_ends: Tensor, grads: Tensor, scratch: Tensor, norm_type: float, max_norm: float
) -> Tensor:
    """The same norm; the gradients are scaled in place where it is beyond ``max_norm``."""
    return torch.ops.bigkern_triton.clip_grads.default(tensors, chunk_ends, grads, scratch, norm_type, max_norm)


def _kernels():
    global _loaded_kernels
    if _loaded_kernels is None:
        from bigkern.ops.adam import _triton_kernels

        _loaded_kernels = _triton_kernels
    return _loaded_kernels


def _programs(device: torch.device) -> int:
    return min(_MAX_PROGRAMS, _RESIDENT * support.multiprocessors(device))


def _step(rule: str):
    def launch(
        tensors, chunk_ends, grads, hyper, scratch, grad_scale, found_inf, total_norm, max_norm, zero_grads, philox
    ):
        count, kernels = tensors.shape[0], _kernels()
        with support.device_guard(tensors.device):
            kernels.step_kernel[(_programs(tensors.device),)](
                tensors,
                chunk_ends,
                grads,
                hyper,
                grad_scale,
                found_inf,
                total_norm,
                philox,
                count,
                max_norm,
                RULE=rule,
                ZERO_GRADS=zero_grads,
                CHUNK=CHUNK,
                num_warps=_WARPS,
            )
            kernels.count_steps_kernel[(-(-count // _COUNTED),)](
                tensors, found_inf, count, BLOCK=_COUNTED, num_warps=_WARPS
            )

    return launch


def _norm(tensors, chunk_ends, grads, scratch, norm_type, grad_scale, kernels):
    norm = torch.empty((), dtype=torch.float32, device=tensors.device)
    programs = _programs(tensors.device)
    # 1, 2 and infinity have loops of their own; 0 stands for another power.
    kind = int(norm_type) if norm_type in (1.0, 2.0) else -1 if norm_type == float("inf") else 0
    kernels.grad_norm_partial_kernel[(programs,)](
        tensors, chunk_ends, grads, scratch, tensors.shape[0], norm_type, KIND=kind, CHUNK=CHUNK, num_warps=_WARPS
    )
    kernels.grad_norm_finish_kernel[(1,)](
        scratch, grad_scale, norm, programs, norm_type, KIND=kind, BLOCK=_MAX_PROGRAMS, num_warps=_WARPS
    )
    return norm


def _grad_norm(tensors, chunk_ends, grads, scratch, norm_type, grad_scale):
    with support.device_guard(tensors.device):
        return _norm(tensors, chunk_ends, grads, scratch, norm_type, grad_scale, _kernels())


def _clip_grads(tensors, chunk_ends, grads, scratch, norm_type, max_norm):
    kernels = _kernels()
    with support.device_guard(tensors.device):
        norm = _norm(tensors, chunk_ends, grads, scratch, norm_type, None, kernels)
        kernels.scale_grads_kernel[(_programs(tensors.device),)](
            tensors, chunk_ends, grads, norm, tensors.shape[0], max_norm, CHUNK=CHUNK, num_warps=_WARPS
        )
    return norm


support.register("adam_step", _step("adam"))
support.register("sgd_step", _step("sgd"))
support.register("grad_norm", _grad_norm)
support.register("clip_grads", _clip_grads)
