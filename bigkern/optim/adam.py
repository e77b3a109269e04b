"""Adam and AdamW with torch.optim's signatures and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bigkern.ops.adam import TORCH
from bigkern.ops.adam._plan import Column, Flag
from bigkern.ops.adam._torch import Step
from bigkern.optim._optimizer import Optimizer, _tensor_kind

# Marks a parameter that has made no step; shared, and so never counted on.
_NO_STEPS = torch.zeros(())


class Adam(Optimizer):
    """torch.optim.Adam on bigkern's kernels: same arguments, param-group keys and state, one launch a step.

    Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015 (arXiv:1412.6980); ``amsgrad``: Reddi, Kale, Kumar,
    2018 (arXiv:1904.09237).  In float32, with g the gradient::

        g = g / grad_scale * min(1, max_norm / (norm of all g + 1e-6)),  negative to maximize
        g += l1 sign(p) + weight_decay p     (decoupled_weight_decay: p *= 1 - lr weight_decay instead)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    A ``state_dict`` goes both ways between torch.optim and this class, in the middle of training.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, decoupled_weight_decay: as torch's.
            weight_decay is L2 regularisation: the gradient of ``weight_decay / 2 * sum(p^2)`` is added.  A tensor lr
            on the parameters' device is read by the kernel, so that a replayed CUDA graph follows it.
        foreach, fused: choose, as in torch.optim, among torch's implementations where the torch backend runs; both
            None is its fastest, the fused one where it can.  The kernels are one launch whatever they say.
            ``fused=True`` or ``capturable=True`` keep ``step`` on the device in a state_dict, as torch's do.
        differentiable: runs torch's for-loop, which autograd sees; the kernels refuse it.
        max_norm: clip the gradients' norm, over all groups, on the way, as :func:`bigkern.optim.clip_grad_norm_` would
            before the step.  What stands in ``.grad`` is not scaled.  None: no clipping.
        zero_grads: set the gradients to zero in the same pass, also when ``found_inf`` skips the step.  They stay
            allocated, so no ``zero_grad()`` is needed.
        ema_decay: keep a float32 moving average of each parameter, ``ema = ema_decay ema + (1 - ema_decay) p``, in
            its state as ``ema_param``; see :meth:`ema_weights`.  A group may have its own.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters in their state as ``master_param``, and
            update that; the parameter is its rounding.  Moments are then float32 too.  Values written into a parameter
            from outside are overwritten by the next step: load weights before the first.
        moment_dtype: dtype of the moments of float32, bfloat16 and float16 parameters: float32 or bfloat16, or float16
            under float16 parameters.  None: the parameter's, as in torch.optim.
        stochastic_rounding: round bfloat16 parameters without master weights up or down at random, by their distance;
            the seed comes from torch's generator.
        l1: L1 regularisation: the gradient of ``l1 * sum(|p|)``, which is ``l1 sign(p)``, is added.  A group may have
            its own.

    Which backend serves a parameter is chosen as everywhere in bigkern (:func:`bigkern.use_backend`).  The kernels take
    real, dense float32, bfloat16 and float16 parameters; torch takes the others.

    Raises:
        ValueError, TypeError: as torch.optim.Adam, and for extra options out of range.

    Example::

        optimizer = bigkern.optim.AdamW(model.parameters(), lr=3e-4, max_norm=1.0, ema_decay=0.999)
    """

    _request = "adam_step"
    _moments = {  # noqa: RUF012
        "exp_avg": Column.EXP_AVG,
        "exp_avg_sq": Column.EXP_AVG_SQ,
        "max_exp_avg_sq": Column.MAX_EXP_AVG_SQ,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        # torch's own constructor refuses what torch refuses, in its words, and says what the group's keys are.
        defaults = torch.optim.Adam([torch.empty(0)], **options).defaults
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
        # Of checkpoints older than an option; as torch.optim.Adam, with the default of this optimizer's own making.
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                group.setdefault(name, None if name in ("foreach", "fused") else False)
            group.setdefault("decoupled_weight_decay", False)
            for param in group["params"]:
                step = self.state.get(param, {}).get("step")
                if step is not None and not isinstance(step, Tensor):
                    self.state[param]["step"] = torch.tensor(float(step), dtype=torch.float32)

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return tuple(self._moments) if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _structure(self, group: dict[str, Any]) -> tuple:
        return (*super()._structure(group), *map(_tensor_kind, group["betas"]))

    def _option_objection(self, group: dict[str, Any]) -> str | None:
        for i, beta in enumerate(group["betas"]):
            if isinstance(beta, Tensor) and (not beta.is_cpu or beta.requires_grad):
                return f"betas[{i}] is a tensor on {beta.device}; the kernels take numbers, or tensors on the CPU"
        return super()._option_objection(group)

    def _hyper(self, group: dict[str, Any], device: torch.device) -> list[float]:
        lr, lr_pointer = self._learning_rate(group, device)
        beta1, beta2 = group["betas"]
        flags = self._flags(group)
        if group["decoupled_weight_decay"]:
            flags |= Flag.DECOUPLED
        return [
            lr, lr_pointer, float(beta1), float(beta2), group["eps"], float(group["weight_decay"]),
            self._extra(group, "l1"), self._extra(group, "ema_decay") or 0.0, 0.0, 0.0, float(flags)
        ]  # fmt: skip

    def _ensure_state(self, name: str, param: Tensor) -> tuple[Tensor, bool]:
        self.state[param].setdefault("step", _NO_STEPS)
        return super()._ensure_state(name, param)

    def _counters(
        self, params: list[Tensor], groups: list[int], created: list[bool], device: torch.device
    ) -> list[Tensor | None]:
        """The states ``step``; those that are elsewhere, or another's too, move to the device together."""
        seen: set[int] = set()
        moving: list[Tensor] = []
        for param in params:
            step = self.state[param]["step"]
            address = step.data_ptr()
            if step is _NO_STEPS or step.dtype != torch.float32 or step.device != device or address in seen:
                moving.append(param)
            seen.add(address)
        if moving:
            steps = [self.state[param]["step"] for param in moving]
            if all(step is _NO_STEPS for step in steps):
                counters = torch.zeros(len(steps), device=device)
            else:
                counters = torch.tensor([float(step) for step in steps], dtype=torch.float32, device=device)
            for param, counter in zip(moving, counters.unbind(), strict=True):
                self.state[param]["step"] = counter
        return [self.state[param]["step"] for param in params]

    def _torch_step(self, step: Step, group: dict[str, Any]) -> None:
        self._fill(step, group)
        implementation = self._torch_implementation(group, step.params)
        on_device = implementation["fused"] or group["capturable"]
        steps = []
        for param in step.params:
            state = self.state[param]
            device = param.device if on_device else state["step"].device
            if state["step"] is _NO_STEPS or state["step"].device != device:
                state["step"] = state["step"].to(device, torch.float32, copy=True)
            steps.append(state["step"])
        TORCH.adam_step(
            step,
            steps,
            {
                "has_complex": any(param.is_complex() for param in step.params),
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                **{
                    name: group[name]
                    for name in (
                        "lr", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable",
                        "decoupled_weight_decay"
                    )
                },
                **implementation,
            },
        )  # fmt: skip

    def _sparse_refusal(self) -> str | None:
        return "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(Adam):
    """torch.optim.AdamW on bigkern's kernels: :class:`Adam` with decoupled weight decay, ``p *= 1 - lr weight_decay``.

    Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101).  Arguments as
    torch.optim.AdamW, and the keyword-only ones of :class:`Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
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
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
