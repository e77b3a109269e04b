"""One step's launches: which backend serves which parameter, over tables that are rebuilt when they must be.

A launch works on addresses, and tensors move: gradients are reallocated after ``zero_grad()``, parameters by
``.data =`` and ``.to()``, states by ``load_state_dict`` and by those who park them on the CPU between steps.  So each
step reads every address again and compares it, with dtypes, shapes and strides, before it launches anything.

That is most of a step's time on the host: 0.98 ms for Adam on 1,000 tensors, where torch's fused step takes 4.2 ms
(both with the launch left out; torch 2.13, one core).  Of 1,000 tensors the addresses are read in 69 us and the layouts
in 85 us, and Adam has four such lists.  A list of tensors handed to an op of the extension, which would read both,
costs 209 us before it returns: the stable ABI wraps each one.  Tensors that the extension kept from step to step would
be read in 29 us; but ``torch.utils.swap_tensors``, and ``Module.to`` where it swaps, refuse a tensor that something
else holds.  So the check stays in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_, itemgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bigkern import backend
from bigkern.ops.adam import TORCH, implementation
from bigkern.ops.adam._plan import Column, Layouts, Tables, gradient, is_dense, pointers
from bigkern.ops.adam._torch import Step

if TYPE_CHECKING:
    from bigkern.optim._optimizer import Optimizer


class Plan:
    """Valid as long as :meth:`collect` says so."""

    def __init__(self, optimizer: Optimizer):
        self._chosen_by = _backend_choice()
        self._structures = [optimizer._structure(group) for group in optimizer.param_groups]
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._idle: list[Tensor] = []
        self._launches: list[_Launch] = []
        self._torch_groups: list[tuple[int, list[Tensor]]] = []
        self._assign(optimizer)
        for launch in self._launches:
            launch.build(optimizer)
        self._state = optimizer.state
        self._states = list(optimizer.state.values())

    def _assign(self, optimizer: Optimizer) -> None:
        """Find each parameter's backend.  Whatever is refused is refused here or in :meth:`collect`."""
        active = []
        for index, params in enumerate(self._params):
            for param in params:
                if param.grad is None:
                    self._idle.append(param)
                    continue
                if param.grad.is_sparse and (refusal := optimizer._sparse_refusal()) is not None:
                    raise RuntimeError(refusal)
                active.append((index, param))
        chosen: dict[tuple, ModuleType] = {}
        launches: dict[tuple, _Launch] = {}
        torch_groups: dict[int, list[Tensor]] = {}
        for index, param in active:
            group = optimizer.param_groups[index]
            here, moment = local(param), optimizer._state_dtype("exp_avg", param)
            objection = _objection(param, here) or optimizer._objection(group, here)
            kind = here.device, here.dtype, moment, objection
            if kind not in chosen:
                chosen[kind] = implementation(optimizer._request, here, moment, objection)
            module = chosen[kind]
            if module is TORCH:
                torch_groups.setdefault(index, []).append(param)
                continue
            launch = launches.setdefault((here.device, module), _Launch(module))
            launch.params.append(param)
            launch.groups.append(index)
            launch.moments.append(moment)
        self._launches, self._torch_groups = list(launches.values()), list(torch_groups.items())

    def collect(self, optimizer: Optimizer) -> bool:
        """Take this step's gradients; False when the plan no longer fits the optimizer, and another must be made.

        Raises:
            RuntimeError, TypeError, ValueError: a gradient that does not fit its parameter.
        """
        if (
            self._chosen_by != _backend_choice()
            or len(self._params) != len(optimizer.param_groups)
            or self._structures != [optimizer._structure(group) for group in optimizer.param_groups]
            or not all(_same(a, group["params"]) for a, group in zip(self._params, optimizer.param_groups, strict=True))
            or any(grad is not None for grad in map(gradient, self._idle))
            or any(gradient(param) is None for _, params in self._torch_groups for param in params)
            or (self._launches and not self._holds_states(optimizer))
        ):
            return False
        return all(launch.collect(optimizer) for launch in self._launches)

    def _holds_states(self, optimizer: Optimizer) -> bool:
        return optimizer.state is self._state and _same(self._states, optimizer.state.values())

    def run(self, optimizer: Optimizer) -> None:
        """The step on the gradients that :meth:`collect` took."""
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        total_norm = None
        if optimizer.max_norm is not None:
            total_norm = self._total_norm(optimizer, grad_scale)
        for launch in self._launches:
            launch.run(optimizer, _on(launch.device, grad_scale), _on(launch.device, found_inf), total_norm)
        for index, params in self._torch_groups:
            group = optimizer.param_groups[index]
            step = Step(
                params=params,
                grads=list(map(gradient, params)),
                states={},
                masters=[],
                emas=[],
                moment_dtype=None,
                grad_scale=grad_scale,
                found_inf=found_inf,
                total_norm=total_norm,
                max_norm=optimizer.max_norm or 0.0,
                l1=optimizer._extra(group, "l1"),
                ema_decay=optimizer._extra(group, "ema_decay") or 0.0,
                stochastic_rounding=optimizer.stochastic_rounding,
                zero_grads=optimizer.zero_grads,
            )
            optimizer._torch_step(step, group)
            if not group["differentiable"]:
                _changed(params)
        # Torch groups keep no tables; but the first step gave them states.
        self._states = list(optimizer.state.values()) if self._torch_groups and self._launches else self._states

    def _total_norm(self, optimizer: Optimizer, grad_scale: Tensor | None) -> Tensor | None:
        """The norm over all gradients of the optimizer, on the device of the first; None where there are none."""
        norms = []
        sharded = [param.grad for launch in self._launches if launch.distributed for param in launch.params]
        for launch in self._launches:
            if not launch.distributed:
                norms.append(launch.grad_norm(_on(launch.device, grad_scale)))
        plain = []
        for grad in (param.grad for _, params in self._torch_groups for param in params):
            (sharded if is_distributed(grad) else plain).append(grad)
        if plain:
            norms.append(TORCH.grad_norm(plain, 2.0, grad_scale))
        if sharded:
            # The shards of the other processes count too: torch's own norm, which communicates.
            norms.append(TORCH.grad_norm(sharded, 2.0, grad_scale).full_tensor())
        if len(norms) < 2:
            return norms[0] if norms else None
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has been captured that replays these launches."""
        return any(launch.tables.captured for launch in self._launches)


class _Launch:
    """The parameters of one device that one kernel backend serves."""

    def __init__(self, module: ModuleType):
        self._module = module
        self.params: list[Tensor] = []
        self.groups: list[int] = []
        self.moments: list[torch.dtype] = []

    def build(self, optimizer: Optimizer) -> None:
        """Create the states that are missing, and the tables."""
        self.distributed = any(map(is_distributed, self.params))
        self._locals = self._local(self.params)
        self.device = self._locals[0].device
        columns: dict[Column, list[Tensor | None]] = {column: [] for column in optimizer._columns().values()}
        created, by_names = [], {}
        for param, index in zip(self.params, self.groups, strict=True):
            names = optimizer._state_names(optimizer.param_groups[index], param)
            values = {name: optimizer._ensure_state(name, param) for name in names}
            created.append(any(new for _, new in values.values()))
            for name, column in optimizer._columns().items():
                columns[column].append(local(values[name][0]) if name in values else None)
            if names:
                by_names.setdefault(names, []).append(optimizer.state[param])
        counters = optimizer._counters(self.params, self.groups, created, self.device)
        self._watched = [tensor for tensors in columns.values() for tensor in tensors if tensor is not None]
        self._watched_pointers = pointers(self._watched)
        self._param_pointers = pointers(self._locals)
        self._layouts = Layouts(self._locals)
        self._grad_layouts: Layouts | None = None
        self._counters = counters  # kept: the tables hold their addresses
        self._states: list[tuple[list[dict], Callable, list]] = []
        for names, states in by_names.items():
            keys = ["step", *names] if "step" in states[0] else names
            getter = itemgetter(*keys) if len(keys) > 1 else itemgetter(*keys, *keys)
            self._states.append((states, getter, list(chain.from_iterable(map(getter, states)))))
        columns[Column.PARAM], columns[Column.STEP] = self._locals, counters
        self.tables = Tables(self._locals, columns, self.moments, self.groups)

    def collect(self, optimizer: Optimizer) -> bool:
        grads = list(map(gradient, self.params))
        locals_ = self._locals
        try:
            if self.distributed:
                grads, locals_ = self._local(grads), self._local(self.params)
            addresses = pointers(grads)
        except (TypeError, RuntimeError):  # None, or sparse
            return False
        if (
            pointers(locals_) != self._param_pointers
            or not self._layouts.match(locals_)
            or pointers(self._watched) != self._watched_pointers
        ):
            return False
        for states, getter, values in self._states:
            try:
                if not all(map(is_, chain.from_iterable(map(getter, states)), values)):
                    return False
            except KeyError:
                return False
        self._locals = locals_
        self._strided: list[tuple[Tensor, Tensor]] = []
        if self._grad_layouts is None or not self._grad_layouts.match(grads):
            if self._fit(grads):
                addresses = pointers(grads)
            else:
                self._grad_layouts = Layouts(grads)
        hyper = [value for group in optimizer.param_groups for value in optimizer._hyper(group, self.device)]
        self._pending = addresses, hyper
        return True

    def _fit(self, grads: list[Tensor]) -> bool:
        """Put a copy in the parameter's strides in the place of each gradient with others; whether there was one."""
        for i, (grad, param) in enumerate(zip(grads, self._locals, strict=True)):
            check_gradient(grad, param)
            if grad.stride() != param.stride():
                copy = torch.empty_like(param, requires_grad=False).copy_(grad.detach())
                self._strided.append((grad, copy))
                grads[i] = copy
        return bool(self._strided)

    def grad_norm(self, grad_scale: Tensor | None) -> Tensor:
        tables = self._point()
        return self._module.grad_norm(tables.tensors, tables.chunk_ends, tables.grads, tables.scratch, 2.0, grad_scale)

    def run(
        self, optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None, total_norm: Tensor | None
    ) -> None:
        tables = self._point()
        philox = None
        if optimizer.stochastic_rounding:
            philox = torch.randint(2**63 - 1, (2,), device=self.device)
        getattr(self._module, optimizer._request)(
            tables.tensors,
            tables.chunk_ends,
            tables.grads,
            tables.hyper,
            tables.scratch,
            grad_scale,
            found_inf,
            _on(self.device, total_norm),
            optimizer.max_norm or 0.0,
            optimizer.zero_grads,
            philox,
        )
        if optimizer.zero_grads:
            for grad, _ in self._strided:
                grad.detach().zero_()
        self._strided = []
        _changed(self._locals)

    def _point(self) -> Tables:
        self.tables.point_at(*self._pending)
        return self.tables

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self.distributed else tensors


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    if type(tensor) is Tensor or not is_distributed(tensor):
        return tensor
    held = tensor._local_tensor
    return held.wait() if hasattr(held, "wait") else held


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "device_mesh")


def check_gradient(grad: Tensor, param: Tensor) -> None:
    """Refuse a gradient that is not its parameter's: autograd makes none such, but hands can."""
    if grad.dtype != param.dtype:
        raise TypeError(
            f"a gradient has dtype {grad.dtype} and its parameter {param.dtype}; they must be the same: "
            "convert one with .to(dtype)"
        )
    if grad.device != param.device:
        raise ValueError(
            f"a gradient is on {grad.device} and its parameter on {param.device}; move one with .to(device)"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"a gradient has shape {tuple(grad.shape)} and its parameter {tuple(param.shape)}; they must be the same"
        )


def _objection(param: Tensor, here: Tensor) -> str | None:
    """Why no kernel can serve the parameter, whatever the optimizer."""
    if here.is_complex():
        return f"a parameter is {here.dtype}; the kernels take real numbers: optimize torch.view_as_real of it"
    if param.grad.is_sparse:
        return "a gradient is sparse; the kernels take dense ones"
    if is_traceable_wrapper_subclass(here):
        return f"a parameter is a {type(here).__name__}, whose elements are not where the kernels look for them"
    if not is_dense(here):
        return f"a parameter of shape {tuple(here.shape)} has strides {here.stride()}, with gaps or overlaps"
    return None


def _changed(params: list[Tensor]) -> None:
    """autograd shall notice when a backward pass needs the values from before.  torch's fused steps do not tell it."""
    torch.autograd.graph.increment_version(params)


def _same(a: list, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """The scalar as the kernels read it: float32 on the device."""
    return scalar if scalar is None else scalar.to(device, torch.float32, non_blocking=True)


def _backend_choice() -> tuple:
    return backend.requested(), backend.quarantined()
