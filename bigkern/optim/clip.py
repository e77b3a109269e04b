"""Clipping of the gradients' norm with torch.nn.utils's signature."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bigkern.ops.adam import TORCH, implementation
from bigkern.ops.adam._plan import Tables, is_dense, pointers
from bigkern.optim._plan import is_distributed


@torch._disable_dynamo
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ in one launch: scale the gradients so that their norm is at most ``max_norm``.

    The norm is that of all gradients as one vector; they are multiplied in place by
    ``min(1, max_norm / (norm + 1e-6))``.  :class:`bigkern.optim.Adam` clips on the way of its step with ``max_norm=``.

    Args:
        parameters: one or more parameters; those without gradient are skipped.
        max_norm: the largest norm that stays as it is.
        norm_type: the p of the p-norm, or ``inf``.
        error_if_nonfinite: raise when the norm is infinite or NaN, before anything is scaled.  It waits for the device
            and takes two launches.
        foreach: torch's implementation where torch runs; of no meaning to the kernels.

    Returns:
        The norm before clipping; from the kernels a float32 tensor, from torch one of the gradients' dtype.

    The kernels take dense gradients in float32, bfloat16 and float16 on one device.  Gradients on several devices are
    normed on each by the kernels, and scaled by torch; DTensors, whose norm must be communicated, are torch's.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
        bigkern.BackendError: the backend that was asked for cannot serve the gradients.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [param.grad for param in parameters if param.grad is not None]
    max_norm, norm_type = float(max_norm), float(norm_type)
    objection = _objection(grads, max_norm, norm_type)
    modules = dict.fromkeys(
        (grad.device, implementation("clip_grads", grad, None, objection)) for grad in _representatives(grads)
    )
    if not grads or any(module is TORCH for _, module in modules):
        # torch's infinity norm refuses empty tensors, of which nothing is to be clipped.
        clipped = [param for param in parameters if param.grad is not None and param.grad.numel() > 0]
        return torch.nn.utils.clip_grad_norm_(clipped, max_norm, norm_type, error_if_nonfinite, foreach)
    tables = [(module, _tables([grad for grad in grads if grad.device == device])) for device, module in modules]
    if len(tables) == 1 and not error_if_nonfinite:
        ((module, table),) = tables
        return module.clip_grads(table.tensors, table.chunk_ends, table.grads, table.scratch, norm_type, max_norm)
    norms = [
        module.grad_norm(table.tensors, table.chunk_ends, table.grads, table.scratch, norm_type, None)
        for module, table in tables
    ]
    norm = torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def _objection(grads: list[Tensor], max_norm: float, norm_type: float) -> str | None:
    if not max_norm > 0:
        return f"max_norm is {max_norm}; the kernels take a positive one"
    if not norm_type > 0 or math.isnan(norm_type):
        return f"norm_type is {norm_type}; the kernels take a positive number or inf"
    for grad in grads:
        if is_distributed(grad):
            return "a gradient is a DTensor, whose norm is communicated between processes"
        if not is_dense(grad):
            return f"a gradient of shape {tuple(grad.shape)} is sparse, or has gaps or overlaps in memory"
    return None


def _representatives(grads: list[Tensor]) -> list[Tensor]:
    """One gradient of each kind that a backend may look at differently."""
    return list({(grad.device, grad.dtype): grad for grad in grads}.values())


def _tables(grads: list[Tensor]) -> Tables:
    tables = Tables(grads, {}, [torch.float32] * len(grads), [0] * len(grads))
    tables.point_at(pointers(grads), [])
    return tables
