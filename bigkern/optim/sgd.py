"""SGD with torch.optim's signature and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bigkern.ops.adam import TORCH
from bigkern.ops.adam._plan import Column, Flag
from bigkern.ops.adam._torch import Step
from bigkern.optim._optimizer import NARROW, Optimizer


class SGD(Optimizer):
    """torch.optim.SGD on bigkern's kernels: same arguments, param-group keys and state, one launch a step.

    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", 2013, in
    torch's form.  In float32, with g the gradient::

        g += l1 sign(p) + weight_decay p
        buffer = momentum buffer + (1 - dampening) g        (the first step: buffer = g)
        p -= lr buffer                                      (nesterov: lr (g + momentum buffer))

    ``momentum=0`` is plain gradient descent, without a state.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, differentiable: as torch.optim.SGD.
            weight_decay is L2 regularisation.
        foreach, fused, max_norm, zero_grads, ema_decay, master_weights, moment_dtype, stochastic_rounding, l1: as
            :class:`bigkern.optim.Adam`.

    Sparse gradients are served by torch.

    Raises:
        ValueError, TypeError: as torch.optim.SGD, and for extra options out of range.
    """

    _request = "sgd_step"
    _moments = {"momentum_buffer": Column.EXP_AVG}  # noqa: RUF012
    _torch_makes_moments = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        zero_grads: bool = False,
        ema_decay: float | None = None,
        master_weights: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        l1: float = 0.0,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        defaults = torch.optim.SGD([torch.empty(0)], **options).defaults
        super().__init__(
            params,
            defaults,
            max_norm=max_norm,
            zero_grads=zero_grads,
            ema_decay=ema_decay,
            master_weights=master_weights,
            moment_dtype=moment_dtype,
            stochastic_rounding=stochastic_rounding,
            l1=l1,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._first_steps.clear()
        for group in self.param_groups:
            for name in ("nesterov", "maximize", "differentiable", "foreach", "fused"):
                group.setdefault(name, None if name == "foreach" else False)

    def _reset(self) -> None:
        super()._reset()
        # Counters of parameters whose buffer may not have been written yet: the first step takes no dampening.
        self._first_steps: dict[Tensor, Tensor] = {}

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _hyper(self, group: dict[str, Any], device: torch.device) -> list[float]:
        lr, lr_pointer = self._learning_rate(group, device)
        flags = self._flags(group)
        if group["nesterov"]:
            flags |= Flag.NESTEROV
        return [
            lr, lr_pointer, 0.0, 0.0, 0.0, float(group["weight_decay"]), self._extra(group, "l1"),
            self._extra(group, "ema_decay") or 0.0, float(group["momentum"]), float(group["dampening"]), float(flags)
        ]  # fmt: skip

    def _counters(
        self, params: list[Tensor], groups: list[int], created: list[bool], device: torch.device
    ) -> list[Tensor | None]:
        """Only a new buffer has one: a first step without dampening is the formula's, from a buffer of zeros."""
        for param, new in zip(params, created, strict=True):
            if new and "momentum_buffer" in self.state[param]:
                self._first_steps[param] = torch.zeros((), device=device)
        return [self._first_steps.get(param) for param in params]

    def _torch_step(self, step: Step, group: dict[str, Any]) -> None:
        self._fill(step, group)
        buffers = step.states["momentum_buffer"]
        TORCH.sgd_step(
            step,
            {
                "has_sparse_grad": any(grad.is_sparse for grad in step.grads),
                **{
                    name: group[name]
                    for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
                },
                **self._torch_implementation(group, step.params),
            },
        )
        if group["momentum"] != 0:
            for param, buffer in zip(step.params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _torch_implementation(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, bool | None]:
        chosen = super()._torch_implementation(group, params)
        # torch's fused SGD is wrong for 16-bit parameters on the CPU, by whole steps (seen in torch 2.13).
        if chosen["fused"] and any(param.is_cpu and param.dtype in NARROW for param in params):
            chosen["fused"] = False
        return chosen

    def _sparse_refusal(self) -> str | None:
        return None
