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
from bigkern import backend, ops

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# make(*shape) is a tensor of the dtype and on the device of a module's weights.
_Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Rule:
    """How modules of one exact type are swapped.

    ``call(module, make)`` calls the op as the module's forward would, on the least input; None: a container, which runs
    nothing itself.  ``attributes`` are those that bigkern's class has beyond torch's.  ``note`` is what the user should
    know of a module that is swapped.
    """

    ours: type[nn.Module]
    call: Callable[[nn.Module, _Make], Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def backend(self, module: nn.Module, default: Tensor) -> tuple[str, str]:
        """(the backend that will run, why not a better one), for an input of the weights' dtype on their device.

        ``default`` stands for the weights of a module that has none.
        """
        if self.call is None:
            return "", ""
        weight = next((param for param in module.parameters(recurse=False) if param.is_floating_point()), default)
        if backend.uses_torch(weight):
            if backend.requested() == "torch":
                return "torch", "torch was asked for"
            return "torch", f"the weights are on {weight.device}; kernels run on CUDA devices"

        def make(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

        try:
            with torch.no_grad():
                name, reasons = backend.explain(lambda: self.call(module, make))
        except (TypeError, ValueError) as error:
            return "none", str(error)
        return name or "none", "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


def _layer_norm(module: nn.LayerNorm, make: _Make) -> Tensor:
    shape = module.normalized_shape
    return ops.layer_norm(make(1, *shape), shape, module.weight, module.bias, module.eps)


def _rms_norm(module: nn.RMSNorm, make: _Make) -> Tensor:
    shape = module.normalized_shape
    return ops.rms_norm(make(1, *shape), shape, module.weight, module.eps)


def _conv(module: nn.Conv1d | nn.Conv2d, make: _Make) -> Tensor:
    convolve = ops.conv1d if isinstance(module, nn.Conv1d) else ops.conv2d
    sizes = zip(module.dilation, module.kernel_size, strict=True)
    image = make(1, module.in_channels, *(dilation * (size - 1) + 1 for dilation, size in sizes))
    return convolve(image, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)


def _layer(module: nn.RNNBase, make: _Make) -> tuple[Tensor, ...]:
    params = [getattr(module, name) for name in module._flat_weights_names]
    shape = (module.num_layers, module.bidirectional, module.proj_size)
    return _recurrent(module, make, module.mode, params, *shape)


def _cell(module: nn.RNNCellBase, make: _Make) -> tuple[Tensor, ...]:
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(type(module)) or f"RNN_{module.nonlinearity.upper()}"
    params = [module.weight_ih, module.weight_hh, *([module.bias_ih, module.bias_hh] if module.bias else [])]
    return _recurrent(module, make, mode, params, 1, False, 0)


def _recurrent(
    module: nn.Module, make: _Make, mode: str, params: list[Tensor], layers: int, bidirectional: bool, projected: int
) -> tuple[Tensor, ...]:
    cells = layers * (2 if bidirectional else 1)
    input, h, c = make(1, 1, module.input_size), make(cells, 1, projected or module.hidden_size), None
    arguments = (params, module.bias, layers, 0.0, False, bidirectional, False)
    if mode == "LSTM":
        c = make(cells, 1, module.hidden_size)
        return ops.lstm(input, (h, c), *arguments)
    if mode == "GRU":
        return ops.gru(input, h, *arguments)
    return ops.rnn(input, h, *arguments, nonlinearity=mode.removeprefix("RNN_").lower())


def _attention(module: nn.MultiheadAttention, make: _Make) -> Tensor:
    return ops.attention(*(make(1, module.num_heads, 1, module.head_dim) for _ in range(3)))


def _recurrent_layer(ours: type[nn.Module], theirs: type[nn.Module]) -> Rule:
    # Whatever options bigkern's layer has beyond torch's, at their defaults, by which they do nothing.
    has = vars(theirs(1, 1, device="meta"))
    added = {name: value for name, value in vars(ours(1, 1, device="meta")).items() if name not in has}
    return Rule(ours, _layer, added, "is no longer an instance of torch.nn's class")


_IN_ONE_PASS = "residual sum and norm in one pass"

RULES: dict[type[nn.Module], Rule] = {
    nn.LayerNorm: Rule(bigkern.nn.LayerNorm, _layer_norm),
    nn.RMSNorm: Rule(bigkern.nn.RMSNorm, _rms_norm),
    nn.Conv1d: Rule(bigkern.nn.Conv1d, _conv),
    nn.Conv2d: Rule(bigkern.nn.Conv2d, _conv),
    nn.RNN: _recurrent_layer(bigkern.nn.RNN, nn.RNN),
    nn.LSTM: _recurrent_layer(bigkern.nn.LSTM, nn.LSTM),
    nn.GRU: _recurrent_layer(bigkern.nn.GRU, nn.GRU),
    nn.RNNCell: Rule(bigkern.nn.RNNCell, _cell),
    nn.LSTMCell: Rule(bigkern.nn.LSTMCell, _cell),
    nn.GRUCell: Rule(bigkern.nn.GRUCell, _cell),
    nn.MultiheadAttention: Rule(
        bigkern.nn.MultiheadAttention,
        _attention,
        note="a query that sees no key gives 0, not NaN; need_weights=True runs torch's operators",
    ),
    nn.TransformerEncoderLayer: Rule(bigkern.nn.TransformerEncoderLayer, note=_IN_ONE_PASS),
    nn.TransformerDecoderLayer: Rule(bigkern.nn.TransformerDecoderLayer, note=_IN_ONE_PASS),
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
