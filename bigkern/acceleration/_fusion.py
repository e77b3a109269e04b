"""Convolution [+ batch norm at inference] [+ activation] [+ max pooling] as one operation, in a Sequential.

A Sequential is the one place where it is certain that a module's output goes to its neighbour and nowhere else.  Its
children stay what they are, at their places and under their names: the class alone says that runs of them are one
operation, and looks at each call whether they still are.  Children that have hooks, were exchanged or are in the wrong
mode are called one by one, as are all of them when the Sequential is sliced or iterated over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import bigkern.nn
from bigkern import backend
from bigkern.ops import conv1d, conv2d


class _Kind(NamedTuple):
    """What goes with a convolution of so many dimensions."""

    convolve: Callable[..., Tensor]
    dimensions: int
    batch_norm: type[nn.Module]
    max_pool: type[nn.Module]


_KINDS: dict[type[nn.Module], _Kind] = {
    bigkern.nn.Conv1d: _Kind(conv1d, 1, nn.BatchNorm1d, nn.MaxPool1d),
    bigkern.nn.Conv2d: _Kind(conv2d, 2, nn.BatchNorm2d, nn.MaxPool2d),
}


class _Run(NamedTuple):
    """Neighbours in a Sequential that are one operation."""

    conv: nn.Module
    batch_norm: nn.Module | None
    activation: str | None
    max_pool: nn.Module | None
    length: int


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential that runs convolutions together with what follows them, where kernels may run.

    A batch norm is folded into weight and bias where it is in evaluation and the parameters of the two need no gradient
    (under torch.no_grad, or frozen); anew at each call, so that loaded weights and moved statistics are seen.
    """

    def forward(self, input):
        # torch's operators gain nothing, and folding would cost.
        if not isinstance(input, Tensor) or backend.uses_torch(input):
            return super().forward(input)
        modules = list(self)
        index = 0
        while index < len(modules):
            run = _find(modules[index:], input.dim()) if isinstance(input, Tensor) else None
            if run is None:
                input = modules[index](input)
                index += 1
            else:
                input = _call(run, input)
                index += run.length
        return input


def runs(sequential: nn.Sequential) -> list[str]:
    """The children that become one operation, ``"0+1+2"``, once the convolutions are bigkern's."""
    names, modules = list(sequential._modules), list(sequential)
    found, index = [], 0
    while index < len(modules):
        run = _find(modules[index:], None)
        if run is not None:
            found.append("+".join(names[index : index + run.length]))
        index += 1 if run is None else run.length
    return found


def _find(modules: Sequence[nn.Module], dimensions: int | None) -> _Run | None:
    """The run that ``modules`` begins with, for an input of so many dimensions; None: whatever the call will be."""
    conv = modules[0]
    kind = _KINDS.get(type(conv))
    planning = dimensions is None
    if kind is None or conv.padding_mode != "zeros" or not (planning or _is_plain(conv)):
        return None
    batch_norm = activation = max_pool = None
    length = 1
    # torch's batch norm reads an unbatched input otherwise than its convolution does.
    batched = planning or dimensions == kind.dimensions + 2
    if batched and len(modules) > length and _folds(conv, modules[length], kind, planning):
        batch_norm = modules[length]
        length += 1
    if len(modules) > length and (planning or _is_plain(modules[length])):
        activation = _activation(modules[length])
        length += activation is not None
    if len(modules) > length and (planning or _is_plain(modules[length])) and _pools(modules[length], kind):
        max_pool = modules[length]
        length += 1
    return None if length == 1 else _Run(conv, batch_norm, activation, max_pool, length)


def _is_plain(module: nn.Module) -> bool:
    """Nobody would notice that it is not called."""
    return "forward" not in vars(module) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _folds(conv: nn.Module, norm: nn.Module, kind: _Kind, planning: bool) -> bool:
    return (
        type(norm) is kind.batch_norm
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and norm.running_mean.dtype in (conv.weight.dtype, torch.float32)
        and (planning or (not norm.training and _is_plain(norm) and not _needs_gradients(conv, norm)))
    )


def _needs_gradients(*modules: nn.Module) -> bool:
    """Their gradients are sums that batch norm forms in higher precision than a convolution does."""
    return torch.is_grad_enabled() and any(
        param is not None and param.requires_grad for module in modules for param in (module.weight, module.bias)
    )


def _activation(module: nn.Module) -> str | None:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def _pools(module: nn.Module, kind: _Kind) -> bool:
    if type(module) is not kind.max_pool or module.return_indices or module.ceil_mode:
        return False
    return module.dilation in (1, (1,), (1, 1))


def _call(run: _Run, input: Tensor) -> Tensor:
    conv, pool = run.conv, run.max_pool
    weight, bias = conv.weight, conv.bias
    if run.batch_norm is not None:
        weight, bias = _fold(conv, run.batch_norm)
    return _KINDS[type(conv)].convolve(
        input,
        weight,
        bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        activation=run.activation,
        max_pool=None if pool is None else (pool.kernel_size, pool.stride, pool.padding),
    )


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution that also does what the batch norm does; :func:`bigkern.nn.fold_batch_norm`.

    By batch norm itself, of the weights: two launches and the zeros, in torch's own arithmetic.
    """
    zeros = torch.zeros_like(norm.running_var)

    def scale(tensor: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
        return F.batch_norm(tensor, mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps)

    weight = scale(conv.weight.reshape(1, conv.out_channels, -1), zeros, None)
    bias = zeros.to(conv.weight.dtype) if conv.bias is None else conv.bias
    bias = scale(bias.view(1, -1), norm.running_mean, norm.bias)
    return weight.view(conv.weight.shape), bias.view(-1)
