"""Adam, SGD and the norm of gradients in PyTorch's own operators: what runs without a GPU.

A step that torch.optim has goes to torch.optim's own function, in the implementation that ``fused`` and ``foreach``
name, and without either in the fastest: torch's fused kernel for Adam.  What torch.optim lacks (L1, fused clipping,
moving average, fp32 master weights, states of another dtype, stochastic rounding) is composed around the same function
on float32 copies:

    g = grad / grad_scale * min(1, max_norm / (total_norm + 1e-6)) + l1 sign(p)
    p, states = torch's step(p, g, states)
    ema = ema + (1 - ema_decay) (p - ema)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from bigkern.ops.adam._plan import is_dense

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FUSED_DEVICES = ("cpu", "cuda")

Update = Callable[[list[Tensor], list[Tensor], dict[str, list], dict[str, Any]], None]


@dataclass
class Step:
    """One parameter group's tensors, and what bigkern's optimizers do beyond torch.optim's.

    ``states`` are lists by torch's names (``exp_avg`` ...) with an entry for each parameter, as are ``masters`` and
    ``emas``; None stands for what a parameter does not have.  ``moment_dtype`` None is the parameter's.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor | None]]
    masters: list[Tensor | None]
    emas: list[Tensor | None]
    moment_dtype: torch.dtype | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    total_norm: Tensor | None
    max_norm: float
    l1: float
    ema_decay: float
    stochastic_rounding: bool
    zero_grads: bool


def unsupported(tensor: Tensor, moment_dtype: torch.dtype | None, request: str) -> str | None:
    """Always None: torch serves whatever the optimizers' checks let through."""
    return None


def fuses(param: Tensor) -> bool:
    """Whether torch's fused optimizers take the parameter; on a CPU they walk over it and its gradient in memory."""
    grad = param.grad
    return (
        param.dtype in _FUSED_DTYPES
        and param.device.type in _FUSED_DEVICES
        and not grad.is_sparse
        and ((param.is_contiguous() and grad.is_contiguous()) or (param.stride() == grad.stride() and is_dense(param)))
    )


def adam_step(step: Step, steps: list[Tensor], options: dict[str, Any]) -> None:
    """Adam and AdamW.  ``options`` are the keyword arguments of torch.optim.adam.adam, ``steps`` the step counters."""

    def update(params: list[Tensor], grads: list[Tensor], states: dict[str, list], scaling: dict[str, Any]) -> None:
        maxima = states["max_exp_avg_sq"] if options["amsgrad"] else []
        adam(params, grads, states["exp_avg"], states["exp_avg_sq"], maxima, steps, **options, **scaling)

    _step(step, update, options)


def sgd_step(step: Step, options: dict[str, Any]) -> None:
    """SGD.  ``options`` are the keyword arguments of torch.optim.sgd.sgd.

    A ``momentum_buffer`` of None is a first step; afterwards the list holds the buffer.
    """
    buffers = step.states["momentum_buffer"]
    absent = sum(buffer is None for buffer in buffers)
    if options["momentum"] != 0 and absent and (absent < len(buffers) or step.found_inf is not None):
        # torch's fused kernel takes all buffers or none, and leaves new ones unwritten when it skips the step.
        options = {**options, "fused": False}

    def update(params: list[Tensor], grads: list[Tensor], states: dict[str, list], scaling: dict[str, Any]) -> None:
        sgd(params, grads, states["momentum_buffer"], **options, **scaling)

    _step(step, update, options)


def grad_norm(grads: list[Tensor], norm_type: float, grad_scale: Tensor | None = None) -> Tensor:
    """The norm of all gradients as one vector, of the gradients over ``grad_scale``."""
    norm = get_total_norm(grads, norm_type)
    if grad_scale is not None:
        norm = norm / grad_scale.to(norm.device)
    return norm


def _step(step: Step, update: Update, options: dict[str, Any]) -> None:
    composed = (
        step.l1 != 0
        or step.total_norm is not None
        or step.stochastic_rounding
        or any(tensor is not None for tensor in (*step.masters, *step.emas))
        or any(
            state is not None and state.dtype != param.dtype
            for states in step.states.values()
            for param, state in zip(step.params, states, strict=True)
        )
        or (step.moment_dtype is not None and any(step.moment_dtype != param.dtype for param in step.params))
    )
    scales = step.grad_scale is not None or step.found_inf is not None
    if composed or (scales and not options["fused"]):
        # Reading found_inf waits for the device.  torch's fused kernel, below, and bigkern's kernels do not.
        if step.found_inf is None or step.found_inf.item() == 0:
            _compose(step, update, options["maximize"])
    else:
        scaling = {"grad_scale": step.grad_scale, "found_inf": step.found_inf} if scales else {}
        update(step.params, step.grads, step.states, scaling)
    if step.zero_grads:
        for grad in step.grads:
            grad.zero_()


def _compose(step: Step, update: Update, maximize: bool) -> None:
    params = [
        _wide(param) if master is None else master for param, master in zip(step.params, step.masters, strict=True)
    ]
    grads = [grad.to(param.dtype) for grad, param in zip(step.grads, params, strict=True)]
    if step.grad_scale is not None:
        grads = [grad * (1.0 / step.grad_scale.to(grad.device)) for grad in grads]
    if step.total_norm is not None:
        coefficient = torch.clamp(step.max_norm / (step.total_norm + 1e-6), max=1.0)
        grads = [grad * coefficient.to(grad.device) for grad in grads]
    if step.l1 != 0:
        # torch's step negates the gradient to maximize; the penalty is minimised all the same.
        l1 = -step.l1 if maximize else step.l1
        grads = [grad.add(torch.sgn(param), alpha=l1) for grad, param in zip(grads, params, strict=True)]
    wide = {
        name: [state if state is None else _wide(state) for state in states] for name, states in step.states.items()
    }
    update(params, grads, wide, {})
    for name, states in step.states.items():
        for i, (state, updated) in enumerate(zip(states, wide[name], strict=True)):
            if state is None and updated is not None:
                states[i] = updated.to(step.moment_dtype or step.params[i].dtype)
            elif state is not updated:
                state.copy_(updated)
    for param, updated, master, ema in zip(step.params, params, step.masters, step.emas, strict=True):
        if step.stochastic_rounding and master is None and param.dtype == torch.bfloat16:
            param.copy_(_round_stochastically(updated))
        elif param is not updated:
            param.copy_(updated)
        if ema is not None:
            ema.lerp_(_wide(param) if master is None else master, 1 - step.ema_decay)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _round_stochastically(values: Tensor) -> Tensor:
    """float32 rounded to bfloat16, up with the probability of the distance from the value below."""
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = torch.where(values.isfinite(), (bits + noise) & -(1 << 16), bits)
    return rounded.view(torch.float32).bfloat16()
