"""Convolutions as modules, one that ends in an activation and max pooling, and the folding of batch norm into them."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import conv1d, conv2d
from bigkern.ops.conv import ACTIVATIONS, MaxPool, Size

_Conv = TypeVar("_Conv", bound=torch.nn.Module)


def _pad(module: torch.nn.Module, input: Tensor) -> tuple[Tensor, str | tuple[int, ...] | int]:
    """The input and the padding that is left to the convolution: zeros are its own affair, other modes are not."""
    if module.padding_mode == "zeros":
        return input, module.padding
    return F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0


class Conv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    See :func:`bigkern.ops.conv1d` for dtypes, memory formats and errors.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _pad(self, input)
        return conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    See :func:`bigkern.ops.conv2d` for dtypes, memory formats and errors.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _pad(self, input)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvBlock2d(Conv2d):
    """Convolution, bias, activation and max pooling as one operation: ``max_pool(activation(conv(input)))``.

    It stands for ``torch.nn.Conv2d``, ``ReLU`` and ``MaxPool2d`` in a row.  Parameters and keys are those of
    torch.nn.Conv2d, so a state_dict goes both ways.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as torch.nn.Conv2d.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        max_pool: None; an int, the window's size and stride; or (kernel_size, stride, padding) as
            torch.nn.MaxPool2d has them.

    Call with (N, C, H, W) or (C, H, W), and without ``max_pool`` also with a residual of the output's shape, which is
    added before the activation; see :func:`bigkern.ops.conv2d` for dtypes, memory formats and errors.

    Raises:
        ValueError: an unknown activation; a ``max_pool`` of other than three parts.

    Example::

        stem = bigkern.nn.ConvBlock2d(3, 64, 7, stride=2, padding=3, activation="relu", max_pool=(3, 2, 1))
    """

    __constants__ = [*Conv2d.__constants__, "activation", "max_pool"]  # noqa: RUF012  (torch's convention)
    activation: str | None
    max_pool: MaxPool | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "relu",
        max_pool: MaxPool | None = None,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"ConvBlock2d: activation is {activation!r}; supported are {', '.join(map(repr, ACTIVATIONS))}"
            )
        if max_pool is not None and not isinstance(max_pool, int) and len(max_pool) != 3:
            raise ValueError(
                f"ConvBlock2d: max_pool is {max_pool}; it must be an int or have three parts, "
                "(kernel_size, stride, padding)"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation, self.max_pool = activation, max_pool

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        input, padding = _pad(self, input)
        return conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            max_pool=self.max_pool,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, max_pool={self.max_pool}"


def fold_batch_norm(conv: _Conv, bn: torch.nn.Module) -> _Conv:
    """A copy of ``conv`` that does what ``bn`` does after it: one operation fewer at inference.

    With the running statistics of ``bn``, ``scale = bn.weight / sqrt(bn.running_var + bn.eps)``:

        weight = conv.weight * scale,    bias = (conv.bias - bn.running_mean) * scale + bn.bias

    computed in float64.  In a :class:`ConvBlock2d` the batch norm stands between convolution and activation.

    Args:
        conv: Conv1d, Conv2d, ConvBlock2d, or torch.nn's; it is not changed.
        bn: torch.nn.BatchNorm1d or BatchNorm2d in eval mode, with running statistics of conv's output channels.

    Raises:
        TypeError: another kind of module.
        ValueError: ``bn`` is in training mode, has no running statistics, or another number of channels.
    """
    if not isinstance(conv, (torch.nn.Conv1d, torch.nn.Conv2d)):
        raise TypeError(f"fold_batch_norm: conv is a {type(conv).__name__}; expected a Conv1d or Conv2d")
    expected = torch.nn.BatchNorm1d if isinstance(conv, torch.nn.Conv1d) else torch.nn.BatchNorm2d
    if not isinstance(bn, expected):
        raise TypeError(f"fold_batch_norm: bn is a {type(bn).__name__}; after this conv stands a {expected.__name__}")
    if bn.training:
        raise ValueError(
            "fold_batch_norm: bn is in training mode, where its statistics are each batch's: call bn.eval()"
        )
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_batch_norm: bn has no running statistics (track_running_stats=False), so none to fold")
    if bn.num_features != conv.out_channels:
        raise ValueError(
            f"fold_batch_norm: bn has {bn.num_features} features and conv {conv.out_channels} output channels; "
            "they must be the same"
        )
    folded = copy.deepcopy(conv)
    with torch.no_grad():
        scale = (bn.running_var.double() + bn.eps).rsqrt()
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        bias = -bn.running_mean.double() if conv.bias is None else conv.bias.double() - bn.running_mean.double()
        bias = bias * scale
        if bn.bias is not None:
            bias = bias + bn.bias.double()
        weight = conv.weight.double() * scale.view(-1, *(1,) * (conv.weight.dim() - 1))
        folded.weight.copy_(weight)
        folded.bias = torch.nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    return folded
