"""What Adam and SGD share: torch.optim.Optimizer with one launch for each device, and options beyond torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bigkern.ops.adam._plan import Column, Flag, pointer_bits
from bigkern.ops.adam._torch import Step, fuses
from bigkern.optim._plan import Plan, local

_EXTRAS = ("max_norm", "zero_grads", "ema_decay", "master_weights", "moment_dtype", "stochastic_rounding", "l1")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
_MASTER, _EMA = "master_param", "ema_param"


class Optimizer(torch.optim.Optimizer):
    """The base of bigkern's optimizers.  A subclass says which states it has and what the kernels' options are."""

    # GradScaler then leaves unscaling, and the decision to skip a step, to the launch.
    _step_supports_amp_scaling = True

    # The raw op, and the column of each state that it moves.
    _request: str
    _moments: dict[str, Column]

    # Whether torch's own first step makes the moments.
    _torch_makes_moments = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_norm: float | None,
        zero_grads: bool,
        ema_decay: float | None,
        master_weights: bool,
        moment_dtype: torch.dtype | None,
        stochastic_rounding: bool,
        l1: float,
    ):
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"Invalid max_norm value: {max_norm}; it must be positive, or None for no clipping")
        if moment_dtype is not None and moment_dtype not in _KERNEL_DTYPES:
            raise ValueError(
                f"Invalid moment_dtype value: {moment_dtype}; supported are float32, bfloat16 and float16, "
                "or None for the parameter's dtype (float32 with master_weights)"
            )
        _check_group({"l1": l1, "ema_decay": ema_decay})
        self.max_norm, self.zero_grads, self.ema_decay = max_norm, zero_grads, ema_decay
        self.master_weights, self.moment_dtype = master_weights, moment_dtype
        self.stochastic_rounding, self.l1 = stochastic_rounding, l1
        self._reset()
        if defaults["differentiable"]:
            used = [name for name in _EXTRAS if getattr(self, name) not in (None, False, 0)]
            if used:
                raise ValueError(
                    f"differentiable=True runs torch's own for-loop, which has no {', '.join(used)}: leave one out"
                )
        super().__init__(params, defaults)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step: one launch for each device (two with ``max_norm``).

        Under torch.compile this is a graph break: the step runs as it does without.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a sparse gradient where the optimizer takes none.
            TypeError, ValueError: a gradient of another dtype, device or shape than its parameter.
            bigkern.BackendError: the backend that was asked for cannot serve a parameter.

        Whatever is refused is refused before a parameter is changed.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if self._plan is None or not self._plan.collect(self):
                self._forget_plan()
                plan = Plan(self)
                if not plan.collect(self):
                    raise RuntimeError("step: the optimizer's tensors changed while it looked at them")
                self._plan = plan
            self._plan.run(self)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.  A group may have its own ``l1`` and ``ema_decay``."""
        if isinstance(param_group, dict):
            _check_group(param_group)
        super().add_param_group(param_group)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the parameters hold their moving averages, as for evaluation.

        Raises:
            ValueError: the optimizer was made without ``ema_decay``.
        """
        averaged = [(param, state[_EMA]) for param, state in self.state.items() if _EMA in state]
        if not averaged and all(self._extra(group, "ema_decay") is None for group in self.param_groups):
            raise ValueError("ema_weights: this optimizer keeps no moving average; make it with ema_decay=0.999")
        with torch.no_grad():
            weights = [param.clone() for param, _ in averaged]
            for param, average in averaged:
                param.copy_(average)
            try:
                yield
            finally:
                for (param, _), weight in zip(averaged, weights, strict=True):
                    param.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: its keys, and ``step`` on the CPU unless the group is fused or capturable."""
        found = super().state_dict()
        moving: dict[torch.device, list[dict[str, Any]]] = {}
        for group in found["param_groups"]:
            if group.get("fused") or group.get("capturable"):
                continue
            for index in group["params"]:
                step = found["state"].get(index, {}).get("step")
                if isinstance(step, Tensor) and not step.is_cpu:
                    found["state"][index] = dict(found["state"][index])
                    moving.setdefault(step.device, []).append(found["state"][index])
        for states in moving.values():
            steps = torch.stack([state["step"] for state in states]).cpu()
            for state, step in zip(states, steps, strict=True):
                state["step"] = step.clone()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, from either package.  States with a dtype of their own keep it.

        Raises:
            ValueError: the state is another model's: other groups, or states of another shape than their parameters.
                Nothing is loaded then.
        """
        loaded: dict[str, Any] = {}

        def check(optimizer: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._check_states(final)
            loaded.update(final)

        # The last of the hooks, so that it sees what the others made of the state_dict.
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for param, state in self._saved_states(loaded):
            for name in self._columns():
                value = state.get(name)
                # torch casts all states to the parameter's dtype.
                if isinstance(value, Tensor) and self._state_dtype(name, param) != param.dtype:
                    self.state[param][name] = value.to(param.device, self._state_dtype(name, param), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _EXTRAS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_plan" in self.__dict__:
            self._forget_plan()
        else:
            self._reset()

    def _reset(self) -> None:
        self._plan: Plan | None = None
        # A captured CUDA graph goes on reading the tables it was captured with.
        self._captured_plans: list[Plan] = []

    def _forget_plan(self) -> None:
        if self._plan is not None and self._plan.captured:
            self._captured_plans.append(self._plan)
        self._plan = None

    # What a subclass says.

    def _hyper(self, group: dict[str, Any], device: torch.device) -> list[float]:
        """The group's row of ``hyper`` for a launch on the device."""
        raise NotImplementedError

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments that the group's parameters have."""
        raise NotImplementedError

    def _counters(
        self, params: list[Tensor], groups: list[int], created: list[bool], device: torch.device
    ) -> list[Tensor | None]:
        """For each parameter its float32 step counter on the device, or None; ``created``: its moments are new."""
        raise NotImplementedError

    def _torch_step(self, step: Step, group: dict[str, Any]) -> None:
        """The step of one group on the torch backend."""
        raise NotImplementedError

    def _sparse_refusal(self) -> str | None:
        """torch's words against sparse gradients, or None when torch takes them."""
        raise NotImplementedError

    # What they share.

    def _extra(self, group: dict[str, Any], name: str) -> Any:
        return group.get(name, getattr(self, name))

    def _columns(self) -> dict[str, Column]:
        return {**self._moments, _MASTER: Column.MASTER, _EMA: Column.EMA}

    def _state_names(self, group: dict[str, Any], param: Tensor) -> tuple[str, ...]:
        names = self._moment_names(group)
        if self.master_weights and param.dtype in NARROW:
            names = (*names, _MASTER)
        if self._extra(group, "ema_decay") is not None:
            names = (*names, _EMA)
        return names

    def _structure(self, group: dict[str, Any]) -> tuple:
        """Whatever decides on backends and states; a change makes a new plan."""
        return (
            self._moment_names(group),
            self._extra(group, "ema_decay") is None,
            self._option_objection(group),
            _tensor_kind(group["lr"]),
        )

    def _option_objection(self, group: dict[str, Any]) -> str | None:
        """Why no kernel can serve the group's options."""
        if group["differentiable"]:
            return "differentiable=True needs autograd through the step, which only torch's for-loop has"
        for name, value in (("lr", group["lr"]), ("weight_decay", group["weight_decay"])):
            if isinstance(value, Tensor) and value.requires_grad:
                return f"{name} requires grad, for which only torch's for-loop has autograd"
        if isinstance(group["weight_decay"], Tensor) and not group["weight_decay"].is_cpu:
            return f"weight_decay is a tensor on {group['weight_decay'].device}; the kernels take a number"
        return None

    def _objection(self, group: dict[str, Any], param: Tensor) -> str | None:
        """Why no kernel can serve the parameter with the group's options."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and not lr.is_cpu and (lr.device != param.device or lr.dtype != torch.float32):
            return (
                f"lr is a {lr.dtype} tensor on {lr.device} and a parameter is on {param.device}; "
                "the kernels read a float32 lr on the parameter's device, or a number"
            )
        return self._option_objection(group)

    def _learning_rate(self, group: dict[str, Any], device: torch.device) -> tuple[float, float]:
        """(LR, LR_POINTER): a tensor on the launch's device is read there, so that a replayed CUDA graph follows it."""
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return float(lr), 0.0
        if lr.device == device and lr.dtype == torch.float32:
            return 0.0, pointer_bits(lr.data_ptr())
        return lr.item(), 0.0

    def _flags(self, group: dict[str, Any]) -> Flag:
        flags = Flag.MAXIMIZE if group["maximize"] else Flag(0)
        return flags | Flag.STOCHASTIC_ROUNDING if self.stochastic_rounding else flags

    def _state_dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.dtype not in _KERNEL_DTYPES:
            return param.dtype
        if name in (_MASTER, _EMA):
            return torch.float32
        if self.moment_dtype is not None:
            return self.moment_dtype
        return torch.float32 if self.master_weights else param.dtype

    def _ensure_state(self, name: str, param: Tensor) -> tuple[Tensor, bool]:
        """(state, whether it is new), in the dtype and layout and on the device that it shall have."""
        state, dtype = self.state[param], self._state_dtype(name, param)
        value = state.get(name)
        if value is None:
            if name in (_MASTER, _EMA):
                state[name] = param.detach().to(dtype, copy=True)
            else:
                state[name] = torch.zeros_like(
                    param, memory_format=torch.preserve_format, dtype=dtype, requires_grad=False
                )
            return state[name], True
        if value.dtype != dtype or value.device != param.device or local(value).stride() != local(param).stride():
            state[name] = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
        return state[name], False

    def _fill(self, step: Step, group: dict[str, Any]) -> None:
        """Give the torch backend's step the states of its parameters; None for moments that are not there yet."""
        states: list[dict[str, Tensor | None]] = []
        for param in step.params:
            present = {}
            for name in self._state_names(group, param):
                if self._torch_makes_moments and name in self._moments and self.state[param].get(name) is None:
                    continue
                present[name] = self._ensure_state(name, param)[0]
            states.append(present)
        step.states = {name: [state.get(name) for state in states] for name in self._moments}
        step.masters = [state.get(_MASTER) for state in states]
        step.emas = [state.get(_EMA) for state in states]
        if self.moment_dtype is not None or self.master_weights:
            step.moment_dtype = self._state_dtype("", step.params[0])

    def _torch_implementation(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, bool | None]:
        """torch's arguments ``foreach`` and ``fused``: what was asked for, or else the fused kernels where they can."""
        foreach, fused = group["foreach"], group["fused"]
        if foreach is None and fused is None and self._option_objection(group) is None:
            fused = None if any(isinstance(group[name], Tensor) for name in ("lr", "weight_decay")) else True
        if fused and not all(map(fuses, params)):
            fused = None
        return {"foreach": foreach, "fused": fused}

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=False):  # torch refuses another number, in better words
            state = state_dict["state"].get(index)
            if isinstance(state, dict):
                yield param, state

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        for number, (param, state) in enumerate(self._saved_states(state_dict)):
            for name in self._columns():
                value = state.get(name)
                if isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"loaded state dict has a state {name} of shape {tuple(value.shape)} where the optimizer's "
                        f"parameter {number} has shape {tuple(param.shape)}: it is another model's, or the parameters "
                        "were given in another order"
                    )


def _tensor_kind(value: Any) -> tuple | None:
    return (value.dtype, value.device) if isinstance(value, Tensor) else None


def _check_group(group: dict[str, Any]) -> None:
    l1, ema_decay = group.get("l1", 0), group.get("ema_decay")
    if not l1 >= 0:
        raise ValueError(f"Invalid l1 value: {l1}; it must not be negative")
    if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"Invalid ema_decay value: {ema_decay}; it must be in [0, 1), or None for no average")
