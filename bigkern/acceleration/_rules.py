"""Which type becomes which, when it may not, and what its op is called with: the table behind ``accelerate``.

A module changes its class and nothing else: it stays the same object with the same parameters, buffers, hooks, mode and
place, so that optimizers, tied weights, tied modules and references to it from anywhere stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer, Parameter, UninitializedTensorMixin
from torch.nn.utils import parametrize

import bigkern.nn
from bigkern import backend
from bigkern.ops.attention import _IMPLEMENTATIONS as _ATTENTION
from bigkern.ops.conv import _IMPLEMENTATIONS as _CONV
from bigkern.ops.layer_norm import _IMPLEMENTATIONS as _LAYER_NORM
from bigkern.ops.rnn import _IMPLEMENTATIONS as _RNN

_IMPLEMENTATIONS = {"attention": _ATTENTION, "conv": _CONV, "layer_norm": _LAYER_NORM, "rnn": _RNN}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Rule:
    """How modules of one exact type are swapped.

    ``arguments(module, make)`` are those that the op's backends are asked about; ``make(*shape)`` is a tensor of the
    dtype and on the device of the module's weights.  None: a container, which runs nothing itself.
    ``attributes`` are those that bigkern's class has beyond torch's.
    ``note`` is what the user should know of a module that is swapped.
    """

    ours: type[nn.Module]
    op: str | None = None
    arguments: Callable[[nn.Module, Callable[..., Tensor]], tuple] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def backend(self, module: nn.Module, default: Tensor) -> tuple[str, str]:
        """(the backend that will run, why not a better one), for an input of the weights' dtype on their device.

        ``default`` stands for the weights of a module that has none.
        """
        if self.arguments is None:
            return "", ""
        weight = next((param for param in module.parameters(recurse=False) if param.is_floating_point()), default)

        def make(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=weight.dtype, device=weight.device)

        name, reasons = backend.explain(self.op, _IMPLEMENTATIONS[self.op], *self.arguments(module, make))
        if name == "torch" and not reasons:
            if backend.requested() == "torch":
                return name, "torch was asked for"
            return name, f"the weights are on {weight.device}; kernels run on CUDA devices"
        return name or "none", "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


def _norm_arguments(rms: bool) -> Callable[[nn.Module, Callable[..., Tensor]], tuple]:
    def arguments(module: nn.Module, make: Callable[..., Tensor]) -> tuple:
        bias = getattr(module, "bias", None)
        return make(1, *module.normalized_shape), None, module.weight, bias, module.eps, rms, 0.0

    return arguments


def _conv_arguments(module: nn.Conv1d | nn.Conv2d, make: Callable[..., Tensor]) -> tuple:
    # The raw ops know two dimensions; one is the second of them.
    one = (1,) * (2 - len(module.kernel_size))
    weight = make(module.out_channels, module.in_channels // module.groups, *one, *module.kernel_size)
    bias = None if module.bias is None else make(module.out_channels)
    dilation = (*one, *module.dilation)
    extent = [d * (size - 1) + 1 for d, size in zip(dilation, weight.shape[2:], strict=True)]
    image = make(1, module.in_channels, *extent)
    return image, weight, bias, (*one, *module.stride), (0, 0), dilation, module.groups, None, ()


def _layer_arguments(module: nn.RNNBase, make: Callable[..., Tensor]) -> tuple:
    return _recurrent_arguments(module, make, module.mode, bool(module.proj_size))


def _cell_arguments(module: nn.RNNCellBase, make: Callable[..., Tensor]) -> tuple:
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(type(module))
    return _recurrent_arguments(module, make, mode or f"RNN_{module.nonlinearity.upper()}", False)


def _recurrent_arguments(module: nn.Module, make: Callable[..., Tensor], mode: str, projected: bool) -> tuple:
    states = [make(1, 1, module.hidden_size)] * (2 if mode == "LSTM" else 1)
    return make(1, 1, module.input_size), states, list(module.parameters(recurse=False)), mode, projected


def _attention_arguments(module: nn.MultiheadAttention, make: Callable[..., Tensor]) -> tuple:
    q, k, v = (make(1, module.num_heads, 1, module.head_dim) for _ in range(3))
    scale = module.head_dim**-0.5
    return q, k, v, None, None, None, None, 1, 1, -1, -1, False, 0.0, scale, 0.0, None, False


def _recurrent_layer(ours: type[nn.Module], theirs: type[nn.Module]) -> Rule:
    # Whatever options bigkern's layer has beyond torch's, at their defaults, by which they do nothing.
    has = vars(theirs(1, 1, device="meta"))
    added = {name: value for name, value in vars(ours(1, 1, device="meta")).items() if name not in has}
    return Rule(ours, "rnn", _layer_arguments, added, "is no longer an instance of torch.nn's class")


RULES: dict[type[nn.Module], Rule] = {
    nn.LayerNorm: Rule(bigkern.nn.LayerNorm, "layer_norm", _norm_arguments(False)),
    nn.RMSNorm: Rule(bigkern.nn.RMSNorm, "layer_norm", _norm_arguments(True)),
    nn.Conv1d: Rule(bigkern.nn.Conv1d, "conv", _conv_arguments),
    nn.Conv2d: Rule(bigkern.nn.Conv2d, "conv", _conv_arguments),
    nn.RNN: _recurrent_layer(bigkern.nn.RNN, nn.RNN),
    nn.LSTM: _recurrent_layer(bigkern.nn.LSTM, nn.LSTM),
    nn.GRU: _recurrent_layer(bigkern.nn.GRU, nn.GRU),
    nn.RNNCell: Rule(bigkern.nn.RNNCell, "rnn", _cell_arguments),
    nn.LSTMCell: Rule(bigkern.nn.LSTMCell, "rnn", _cell_arguments),
    nn.GRUCell: Rule(bigkern.nn.GRUCell, "rnn", _cell_arguments),
    nn.MultiheadAttention: Rule(
        bigkern.nn.MultiheadAttention,
        "attention",
        _attention_arguments,
        note="a query that sees no key gives 0, not NaN; need_weights=True runs torch's operators",
    ),
    nn.TransformerEncoderLayer: Rule(bigkern.nn.TransformerEncoderLayer, note="residual sum and norm in one pass"),
    nn.TransformerDecoderLayer: Rule(bigkern.nn.TransformerDecoderLayer, note="residual sum and norm in one pass"),
    nn.TransformerEncoder: Rule(
        bigkern.nn.TransformerEncoder, note="padded positions are computed in evaluation too, where torch gives 0"
    ),
    nn.TransformerDecoder: Rule(bigkern.nn.TransformerDecoder),
    nn.Transformer: Rule(bigkern.nn.Transformer),
}


def objection(module: nn.Module) -> str | None:
    """Why ``module``, of a type of the table or made from one, must stay as it is; None when it may be swapped."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted by TorchScript"
    if parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"
    kind = type(module)
    if kind.__name__.startswith("FSDP"):
        return "sharded by fully_shard: accelerate the model first, then shard it"
    if kind not in RULES:
        parent = next(base for base in kind.__mro__ if base in RULES)
        return f"a subclass of torch.nn.{parent.__name__}, whose forward may differ"
    replaced = sorted(name for name in vars(module) if callable(getattr(kind, name, None)))
    if replaced:
        return f"{', '.join(replaced)} of this instance was replaced"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for quantization (qconfig): torch.ao finds its modules by type"
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None:
            continue
        if isinstance(tensor, UninitializedTensorMixin):
            return f"{name} is not initialised yet: run the model once first"
        if type(tensor) not in (Tensor, Parameter, Buffer):
            return f"{name} is a {type(tensor).__name__}, which the kernels do not know"
        if name in module._parameters and tensor.dtype not in _FLOATS:
            return f"{name} is {tensor.dtype}; supported are float32, bfloat16, float16 and float64"
    return None
