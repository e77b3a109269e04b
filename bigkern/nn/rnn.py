"""RNN, LSTM and GRU and their cells, as modules.

The layers are not subclasses of torch.nn.RNN, LSTM and GRU, which torch.compile refuses to trace, but of their base,
torch.nn.RNNBase: constructor, parameters, initial values, keys and repr are torch's, and a state_dict goes both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bigkern import backend
from bigkern.ops import gru, lstm, rnn
from bigkern.ops.rnn import run

_States = tuple[Tensor, ...]


class _Recurrent(torch.nn.RNNBase):
    """What the three layers share: states, packed and unbatched input, and the call of the functional op."""

    _norm_names: tuple[str, ...] = ()

    def __init__(
        self,
        mode: str,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        cell_zoneout: float = 0.0,
        layer_norm: bool = False,
        **kwargs: Any,
    ):
        chances = {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout, "cell_zoneout": cell_zoneout}
        for name, value in chances.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} should be a probability in [0, 1], got {value}")
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(layer_norm).__name__}")
        super().__init__(mode, *args, **kwargs)
        if self.proj_size and (recurrent_dropout or zoneout or cell_zoneout or layer_norm):
            raise ValueError(
                "proj_size goes with none of recurrent_dropout, zoneout, cell_zoneout and layer_norm: use proj_size=0"
            )
        self.recurrent_dropout, self.zoneout, self.cell_zoneout = recurrent_dropout, zoneout, cell_zoneout
        if layer_norm:
            self._add_norms()

    def _add_norms(self) -> None:
        """The layer norms' factors and, of c's, biases, beside torch's parameters of each layer and direction."""
        rows = self.weight_hh_l0.shape[0]
        sizes = {"weight_ln_ih": rows, "weight_ln_hh": rows}
        if self.mode == "LSTM":
            sizes |= {"weight_ln_c": self.hidden_size, "bias_ln_c": self.hidden_size}
        found = []
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]:
                for name, size in sizes.items():
                    found.append(f"{name}_l{layer}{suffix}")
                    self.register_parameter(found[-1], torch.nn.Parameter(self.weight_hh_l0.new_empty(size)))
        self._norm_names = tuple(found)
        self._reset_norms()

    def _reset_norms(self) -> None:
        for name in self._norm_names:
            torch.nn.init.constant_(getattr(self, name), float(name.startswith("weight")))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_norms()

    def flatten_parameters(self) -> None:
        """Nothing: parameters stay tensors of their own, and no buffer behind them is copied, shared or pickled."""

    def _run(self, input: Tensor | PackedSequence, states: _States | None):
        batch_sizes = sorted_indices = unsorted_indices = None
        batched, batch_dim = True, 0 if self.batch_first else 1
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            batch = int(batch_sizes[0])
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"{self._name()}: Expected input to be 2D or 3D, got {input.dim()}D instead")
            batched = input.dim() == 3
            data = input if batched else input.unsqueeze(batch_dim)
            batch = data.shape[batch_dim]
            if states is not None and any(state.dim() != (3 if batched else 2) for state in states):
                kind = (
                    "batched 3-D input, hx should also be 3-D" if batched else "unbatched 2-D input, hx should be 2-D"
                )
                raise RuntimeError(f"For {kind} but got {', '.join(f'{state.dim()}-D' for state in states)}")
        self.check_input(data, batch_sizes)
        cells = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        if states is None:
            states = tuple(torch.zeros(cells, batch, n, dtype=data.dtype, device=data.device) for n in widths)
        else:
            if not batched:
                states = tuple(state.unsqueeze(1) for state in states)
            for state, width in zip(states, widths, strict=True):
                self.check_hidden_size(state, (cells, batch, width))
            states = _reordered(states, sorted_indices)
        output, *last = run(
            self.mode,
            data,
            states,
            [getattr(self, name) for name in self._flat_weights_names],
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first and batch_sizes is None,
            batch_sizes,
            self.recurrent_dropout,
            (self.zoneout, self.cell_zoneout)[: len(states)],
            [getattr(self, name) for name in self._norm_names] or None,
            checked=True,
        )
        if batch_sizes is not None:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        elif not batched:
            output, last = output.squeeze(batch_dim), [state.squeeze(1) for state in last]
        return output, _reordered(tuple(last), unsorted_indices)

    def _name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        names = [name for name in ("recurrent_dropout", "zoneout", "cell_zoneout") if getattr(self, name)]
        added = [f"{name}={getattr(self, name)}" for name in names] + ["layer_norm=True"] * bool(self._norm_names)
        return ", ".join([super().extra_repr(), *added])


class RNN(_Recurrent):
    """torch.nn.RNN on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    Args:
        recurrent_dropout, zoneout: keyword only; see :func:`bigkern.ops.rnn`, as for dtypes and errors.
        layer_norm: keyword only; adds the factors of its normalised products as parameters, ``weight_ln_ih_l0``, ...
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            layer_norm=layer_norm,
        )
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None):
        output, last = self._run(input, None if hx is None else (hx,))
        return output, last[0]


class LSTM(_Recurrent):
    """torch.nn.LSTM on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    Args:
        proj_size: torch's projected LSTM; the torch backend alone serves it.
        recurrent_dropout, zoneout, cell_zoneout: keyword only; see :func:`bigkern.ops.lstm`, as for dtypes and errors.
        layer_norm: keyword only; adds the parameters of its norms, ``weight_ln_ih_l0``, ``weight_ln_hh_l0``,
            ``weight_ln_c_l0``, ``bias_ln_c_l0``, ...
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None):
        return self._run(input, None if hx is None else tuple(hx))


class GRU(_Recurrent):
    """torch.nn.GRU on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    Args:
        recurrent_dropout, zoneout: keyword only; see :func:`bigkern.ops.gru`, as for dtypes and errors.
        layer_norm: keyword only; adds the factors of its normalised products as parameters, ``weight_ln_ih_l0``, ...
    """

    def __init__(self, *args: Any, **kwargs: Any):
        for name, place in (("proj_size", "LSTM, not RNN or GRU"), ("cell_zoneout", "LSTM, which has a cell state")):
            if name in kwargs:
                raise ValueError(f"{name} argument is only supported for {place}")
        super().__init__("GRU", *args, **kwargs)

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None):
        output, last = self._run(input, None if hx is None else (hx,))
        return output, last[0]


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell on bigkern's kernels: one step; same constructor, parameters, initial values, keys and repr."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if backend.uses_torch(input):
            return super().forward(input, hx)
        return _step(self, rnn, input, None if hx is None else (hx,), nonlinearity=self.nonlinearity)[0]


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell on bigkern's kernels: one step; same constructor, parameters, initial values, keys and repr."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if backend.uses_torch(input):
            return super().forward(input, hx)
        return _step(self, lstm, input, None if hx is None else tuple(hx))


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell on bigkern's kernels: one step; same constructor, parameters, initial values, keys and repr."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if backend.uses_torch(input):
            return super().forward(input, hx)
        return _step(self, gru, input, None if hx is None else (hx,))[0]


def _step(
    cell: torch.nn.RNNCell | torch.nn.LSTMCell | torch.nn.GRUCell,
    op: Callable[..., _States],
    input: Tensor,
    states: _States | None,
    **options: Any,
) -> _States:
    """A sequence of one step; the new states."""
    name = type(cell).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for state in states or ():
        if state.dim() != input.dim():
            raise ValueError(f"{name}: Expected hx to be {input.dim()}D as input, got {state.dim()}D instead")
    batched = input.dim() == 2
    rows = input if batched else input.unsqueeze(0)
    if states is None:
        zeros = torch.zeros(rows.shape[0], cell.hidden_size, dtype=input.dtype, device=input.device)
        states = (zeros, zeros) if op is lstm else (zeros,)
    elif not batched:
        states = tuple(state.unsqueeze(0) for state in states)
    params = [cell.weight_ih, cell.weight_hh, *([cell.bias_ih, cell.bias_hh] if cell.bias else [])]
    states = tuple(state.unsqueeze(0) for state in states)
    hx = states if op is lstm else states[0]
    _, *last = op(rows.unsqueeze(0), hx, params, cell.bias, 1, 0.0, cell.training, False, False, **options)
    return tuple(state[0] if batched else state[0, 0] for state in last)


def _reordered(states: _States, indices: Tensor | None) -> _States:
    return states if indices is None else tuple(state.index_select(1, indices) for state in states)
