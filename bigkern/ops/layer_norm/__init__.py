"""Layer norm, RMS norm, and layer norm fused with the residual sum (and dropout) before it.

Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450); Zhang, Sennrich, "Root Mean Square Layer
Normalization", 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigkern import backend
from bigkern.ops._torch_philox import dropout
from bigkern.ops.layer_norm import _cuda, _torch, _triton

__all__ = ["add_layer_norm", "layer_norm", "rms_norm"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_SUPPORTED_DTYPES = "float32, bfloat16, float16 or float64"


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the last dimensions: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        input: any shape that ends in ``normalized_shape``; float32, bfloat16, float16, or float64 (torch backend only).
            Any strides; a copy is made when rows cannot be addressed by one stride or their elements are apart.
        normalized_shape: the sizes of the dimensions to normalise over.
        weight, bias: ``normalized_shape``; the input's dtype, or float32 under a bfloat16 or float16 input.
        eps: added to the variance; positive.

    Returns:
        A tensor of the input's shape and dtype.  Under autocast on CUDA it is float32, as torch's.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not fit, tensors on different devices, ``eps <= 0``.
        bigkern.BackendError: the backend that was asked for cannot serve the arguments.
    """
    if eps > 0 and _is_plain(input, normalized_shape, weight, bias):
        try:
            return torch.layer_norm(input, normalized_shape, weight, bias, eps)
        except (RuntimeError, ValueError):
            pass  # what follows says which shape is wrong
    shape = _check("layer_norm", input, normalized_shape, weight, bias, eps)
    if backend.uses_torch(input):
        return _torch.compose(input, None, shape, weight, bias, eps, False, 0.0, None)[0]
    if torch.is_autocast_enabled(input.device.type):
        input, _, weight, bias = _autocast(input, None, weight, bias)
    return _dispatch(input, None, shape, weight, bias, eps, False, 0.0, None)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS norm over the last dimensions: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        input: as in :func:`layer_norm`.
        normalized_shape: the sizes of the dimensions to normalise over.
        weight: ``normalized_shape``; any of the dtypes that ``input`` may have.
        eps: added to the mean square; positive.  None is torch's default: the machine epsilon of float32 (of float64
            for float64 inputs).

    Returns and Raises as in :func:`layer_norm`.
    """
    if (eps is None or eps > 0) and _is_plain(input, normalized_shape, weight, None):
        try:
            return torch.rms_norm(input, normalized_shape, weight, eps)
        except (RuntimeError, ValueError):
            pass  # what follows says which shape is wrong
    shape = _check("rms_norm", input, normalized_shape, weight, None, 1.0 if eps is None else eps)
    if backend.uses_torch(input):
        return torch.rms_norm(input, shape, weight, eps)
    if eps is None:
        eps = torch.finfo(_torch.accumulator(input.dtype)).eps
    if torch.is_autocast_enabled(input.device.type):
        input, _, weight, _ = _autocast(input, None, weight, None)
    if weight is not None and weight.dtype != input.dtype:
        weight = weight.to(_torch.accumulator(input.dtype))
    return _dispatch(input, None, shape, weight, None, eps, True, 0.0, None)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    philox: Tensor | None = None,
    return_philox: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]:
    """``summed = residual + dropout(input)`` and its layer norm, in one pass over memory.

    Args:
        input: what a sublayer returned; shape and dtype as in :func:`layer_norm`.
        residual: the residual stream; the input's shape and dtype (under autocast the dtypes may differ).
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        dropout_p: probability of an element of ``input`` to be dropped, in [0, 1]; the others are scaled by
            ``1 / (1 - dropout_p)``.
        training: no dropout when False.
        philox: int64 tensor [seed, offset] on the input's device that fixes the dropout mask, equal on every backend.
            None draws one from torch's generator.  Unused when nothing is dropped.
        return_philox: also return the philox that the mask was drawn from (None when nothing was dropped).

    Returns:
        ``(output, summed)`` or ``(output, summed, philox)``; output and summed have the input's shape and dtype.  Under
        autocast both have the wider dtype of input and residual, and on CUDA float32.

    Raises:
        As :func:`layer_norm`; ValueError also for ``dropout_p`` outside [0, 1] and a residual or philox of another
        shape.
    """
    if (
        eps > 0
        and (dropout_p == 0 or (not training and 0 <= dropout_p <= 1))
        and philox is None
        and not return_philox
        and _is_plain(input, normalized_shape, weight, bias)
        and getattr(residual, "dtype", None) is input.dtype
        and residual.is_cpu
        and residual.shape == input.shape
    ):
        summed = residual + input
        try:
            return torch.layer_norm(summed, normalized_shape, weight, bias, eps), summed
        except (RuntimeError, ValueError):
            pass  # what follows says which shape is wrong
    shape = _check("add_layer_norm", input, normalized_shape, weight, bias, eps)
    _check_add(input, residual, dropout_p, philox)
    if (input.is_cuda or residual.dtype != input.dtype) and torch.is_autocast_enabled(input.device.type):
        input, residual, weight, bias = _autocast(input, residual, weight, bias)
    if not training or dropout_p == 0:
        dropout_p, philox = 0.0, None
    on_torch = backend.uses_torch(input)
    if dropout_p > 0 and philox is None and (return_philox or not on_torch):
        philox = torch.randint(2**63 - 1, (2,), device=input.device)
    call = _torch.compose if on_torch else _dispatch
    results = call(input, residual, shape, weight, bias, eps, False, dropout_p, philox)
    return (*results, philox) if return_philox else results


class _LayerNorm(torch.autograd.Function):
    """A kernel backend's forward and backward.  Where the gradient shall be differentiated, it is torch's composite."""

    @staticmethod
    def forward(ctx, input, residual, weight, bias, implementation, shape, eps, rms, dropout_p, philox):
        output, summed, mean, rstd = _forward(
            implementation, input, residual, weight, bias, shape, eps, rms, dropout_p, philox
        )
        ctx.save_for_backward(input if residual is None else summed, mean, rstd, weight, philox)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.implementation, ctx.shape, ctx.eps, ctx.rms, ctx.dropout_p = implementation, shape, eps, rms, dropout_p
        return output if residual is None else (output, summed)

    @staticmethod
    def backward(ctx, grad_output, grad_summed=None):
        summed, mean, rstd, weight, philox = ctx.saved_tensors
        need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if grad_output is None:
            if grad_summed is None:
                return (None,) * 10
            grad_input = _drop(grad_summed, ctx.dropout_p, philox) if need_input else None
            return (grad_input, grad_summed if need_residual else None, *(None,) * 8)

        cols = math.prod(ctx.shape)
        implementation, rows = ctx.implementation, _rows(summed, cols)
        # While torch.compile traces a backward it will not be differentiated again, whatever the grad mode says.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            implementation = _torch
            mean, rstd = _torch.statistics(rows, ctx.eps, ctx.rms)
        grad_input, grad_residual, grad_weight, grad_bias = implementation.backward(
            _rows(grad_output, cols),
            None if grad_summed is None else _rows(grad_summed, cols),
            rows,
            mean,
            rstd,
            _vector(weight, cols),
            ctx.rms,
            ctx.dropout_p,
            philox,
            need_weight,
            need_bias,
        )
        grad_input = grad_input.view(summed.shape)
        # Without dropout both get the same tensor, not two views of it: autograd adds to a gradient in place when
        # nothing else holds the tensor, and looks at the tensor only, not at its storage.
        grad_residual = grad_input if ctx.dropout_p == 0 else grad_residual.view(summed.shape)
        return (
            grad_input if need_input else None,
            grad_residual if need_residual else None,
            grad_weight.view(ctx.shape) if need_weight else None,
            grad_bias.view(ctx.shape).to(ctx.bias_dtype) if need_bias else None,
            *(None,) * 6,
        )


def _dispatch(
    input: Tensor,
    residual: Tensor | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(output, summed) on the backend that :func:`backend.select` names; arguments as :func:`_torch.compose`."""
    implementation = backend.select("layer_norm", _IMPLEMENTATIONS, input, residual, weight, bias, eps, rms, dropout_p)
    # Nothing to launch on no elements; forward mode and functorch need operators that torch can differentiate itself.
    if (
        implementation is _torch
        or input.numel() == 0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return _torch.compose(input, residual, shape, weight, bias, eps, rms, dropout_p, philox)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, residual, weight, bias)
    ):
        results = _LayerNorm.apply(input, residual, weight, bias, implementation, shape, eps, rms, dropout_p, philox)
        return (results, None) if residual is None else results
    output, summed, _, _ = _forward(implementation, input, residual, weight, bias, shape, eps, rms, dropout_p, philox)
    return output, summed


def _forward(implementation, input, residual, weight, bias, shape, eps, rms, dropout_p, philox):
    cols = math.prod(shape)
    output, summed, mean, rstd = implementation.forward(
        _rows(input, cols),
        None if residual is None else _rows(residual, cols),
        _vector(weight, cols),
        _vector(bias, cols),
        eps,
        rms,
        dropout_p,
        philox,
    )
    return output.view(input.shape), None if residual is None else summed.view(input.shape), mean, rstd


def _rows(x: Tensor, cols: int) -> Tensor:
    """``x`` as rows x cols with unit inner stride: a view where there is one."""
    x = x.reshape(-1, cols)
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _vector(parameter: Tensor | None, cols: int) -> Tensor | None:
    return None if parameter is None else parameter.reshape(cols).contiguous()


def _drop(grad: Tensor, dropout_p: float, philox: Tensor | None) -> Tensor:
    if dropout_p == 0:
        return grad
    return dropout(grad.to(_torch.accumulator(grad.dtype)), dropout_p, philox).to(grad.dtype)


def _autocast(input, residual, weight, bias):
    """The tensors as autocast hands them to layer norm: in fp32 on CUDA; elsewhere a sum takes its wider dtype."""
    if input.is_cuda:
        return tuple(
            tensor.to(torch.float32)
            if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
            else tensor
            for tensor in (input, residual, weight, bias)
        )
    if residual is not None and residual.dtype != input.dtype:
        wider = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(wider), residual.to(wider)
    return input, residual, weight, bias


def _is_plain(input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch serves the call and only shapes are left to refuse, which torch's operators look at themselves.

    :func:`_check` would say the same, more slowly: a look at a tensor costs 0.1 us warm, and several times that between
    the operators, out of the 3 us that a call on a CPU may cost more than torch.nn's.
    """
    # getattr refuses what is not a tensor, at less than isinstance of a torch.nn.Parameter.
    return (
        isinstance(input, Tensor)
        and input.is_cpu
        and backend._requested in (None, "torch")
        and (dtype := input.dtype) in _DTYPES
        and (weight is None or (getattr(weight, "dtype", None) is dtype and weight.is_cpu))
        and (bias is None or (getattr(bias, "dtype", None) is dtype and bias.is_cpu))
        and type(shape) is tuple
    )


def _check(
    op: str, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[int, ...]:
    """Refuse what no backend serves; the normalized shape as a tuple."""
    shape = normalized_shape if type(normalized_shape) is tuple else _as_tuple(normalized_shape)
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input is a {type(input).__name__}; expected a torch.Tensor")
    # Slicing a torch.Size takes half a microsecond, which the usual single dimension need not pay.
    sizes, dims = input.shape, len(shape)
    if not (sizes and sizes[-1] == shape[0] if dims == 1 else dims and sizes[-dims:] == shape):
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}, which does not end in normalized_shape {shape}; "
            "normalized_shape is the sizes of the input's last dimensions, at least one"
        )
    dtype, device = input.dtype, input.device
    if dtype not in _DTYPES:
        raise TypeError(
            f"{op}: input has dtype {dtype}; supported are {_SUPPORTED_DTYPES}: convert it with input.float()"
        )
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}; it must be positive, such as 1e-5, or constant rows would divide by 0")
    # Anything but a parameter of the input's own dtype is looked at more closely.
    if weight is not None and not (
        isinstance(weight, Tensor) and weight.dtype == dtype and weight.shape == shape and weight.device == device
    ):
        _check_parameter(op, "weight", weight, input, shape)
    if bias is not None and not (
        isinstance(bias, Tensor) and bias.dtype == dtype and bias.shape == shape and bias.device == device
    ):
        _check_parameter(op, "bias", bias, input, shape)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"{op}: weight has dtype {weight.dtype} and bias {bias.dtype}; they must have the same")
    return shape


def _as_tuple(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _check_parameter(op: str, name: str, parameter: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{op}: {name} is a {type(parameter).__name__}; expected a torch.Tensor or None")
    if parameter.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}; it must be normalized_shape, {shape}")
    if parameter.device != input.device:
        raise ValueError(
            f"{op}: {name} is on {parameter.device} and input on {input.device}; move one with .to(device)"
        )
    if parameter.dtype == input.dtype:
        return
    if op == "rms_norm" or torch.is_autocast_enabled(input.device.type):
        taken, supported = parameter.dtype in _DTYPES, _SUPPORTED_DTYPES
    else:
        taken = parameter.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        supported = f"the input's dtype, {input.dtype}, or float32 under a bfloat16 or float16 input"
    if not taken:
        raise TypeError(
            f"{op}: {name} has dtype {parameter.dtype}; supported is {supported}: "
            f"convert it with {name}.to(input.dtype)"
        )


def _check_add(input: Tensor, residual: Tensor, dropout_p: float, philox: Tensor | None) -> None:
    op = "add_layer_norm"
    if not isinstance(residual, Tensor):
        raise TypeError(f"{op}: residual is a {type(residual).__name__}; expected a torch.Tensor")
    if residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)} and input {tuple(input.shape)}; "
            "they must be the same: expand the smaller one"
        )
    if residual.dtype != input.dtype and not (
        residual.dtype in _DTYPES and torch.is_autocast_enabled(input.device.type)
    ):
        raise TypeError(
            f"{op}: residual has dtype {residual.dtype} and input {input.dtype}; they must be the same: "
            "convert one with .to(dtype), or run under torch.autocast"
        )
    if residual.device != input.device:
        raise ValueError(
            f"{op}: residual is on {residual.device} and input on {input.device}; move one with .to(device)"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it is a probability and must be in [0, 1]")
    if philox is not None:
        if not isinstance(philox, Tensor) or philox.dtype != torch.int64 or philox.shape != (2,):
            got = (
                f"{philox.dtype} of shape {tuple(philox.shape)}"
                if isinstance(philox, Tensor)
                else type(philox).__name__
            )
            raise ValueError(
                f"{op}: philox is {got}; it must be an int64 tensor [seed, offset], as return_philox=True returns"
            )
        if philox.device != input.device:
            raise ValueError(
                f"{op}: philox is on {philox.device} and input on {input.device}; move it with .to(device)"
            )
