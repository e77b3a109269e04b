"""Recurrent layers: the tanh and ReLU RNN, LSTM and GRU, with torch's functional signatures.

Elman, "Finding Structure in Time", 1990; Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., "Learning
Phrase Representations using RNN Encoder-Decoder", 2014 (arXiv:1406.1078), in cuDNN's form, where the reset gate
multiplies the product.  Recurrent dropout: Gal, Ghahramani, "A Theoretically Grounded Application of Dropout in
Recurrent Neural Networks", 2016 (arXiv:1512.05287).  Zoneout: Krueger et al., 2016 (arXiv:1606.01305).  Normalised
cells: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigkern import backend
from bigkern.ops.rnn import _cuda, _torch, _triton
from bigkern.ops.rnn._schema import CELLS, GATES

__all__ = ["gru", "lstm", "rnn"]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_SUPPORTED_DTYPES = "float32, bfloat16, float16 or float64"


def rnn(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman layers: ``h' = act(W_ih x + b_ih + W_hh h + b_hh)``; torch.rnn_tanh and torch.rnn_relu.

    Args:
        input: (steps, batch, features), or (batch, steps, features) with ``batch_first``; with ``batch_sizes`` the
            (rows, features) data of a PackedSequence.  float32, bfloat16, float16, or float64 (torch backend only).
        hx: (num_layers * directions, batch, hidden), the initial state.
        params: for each layer, and in it for each direction: W_ih, W_hh, and with ``has_biases`` b_ih, b_hh.
        num_layers: at least 1.
        dropout: probability of an element to be dropped between layers while training.
        train: whether dropouts apply.
        bidirectional: a second direction reads each sequence from its end.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        batch_sizes: a PackedSequence's: int64 on the CPU, how many sequences are live at each step.
        recurrent_dropout: probability of an element of the state that W_hh reads to be dropped while training; one mask
            for each sequence and layer, kept for all steps.  The state that is carried on is not masked.
        zoneout: probability of a unit to keep its state over a step while training, drawn anew at each step; otherwise
            each state is the mean of both, weighted alike.  The CUDA and the torch backend serve it.
        layer_norm: normalise W_ih x and W_hh h over the gates of all units, before the biases are added (eps 1e-5): for
            each layer and direction the factors (gates * hidden,) of the first and of the second.  The torch backend
            alone serves it.

    Returns:
        ``(output, hn)``: (steps, batch, directions * hidden) in the input's layout, and the last state of each layer
        and direction, shaped as ``hx``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not fit, tensors on different devices, probabilities outside [0, 1].
        bigkern.BackendError: the backend that was asked for cannot serve the arguments.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity is {nonlinearity!r}; supported are 'tanh' and 'relu'")
    mode = "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"
    rest = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, recurrent_dropout)
    return run(mode, input, (hx,), params, *rest, (zoneout,), layer_norm)


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    batch_sizes: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers, as torch.gru; arguments, results and errors as :func:`rnn`.

    ``r, z = sigmoid(x + a)``, ``n = tanh(x_n + r (a_n + b_hn))``, ``h' = (1 - z) n + z h``, with x the projected input
    and a = W_hh h; the gates of ``params`` stand in the order r, z, n.
    """
    rest = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, recurrent_dropout)
    return run("GRU", input, (hx,), params, *rest, (zoneout,), layer_norm)


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    batch_sizes: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
    layer_norm: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers, as torch.lstm; arguments and errors as :func:`rnn`, but ``hx`` is ``(h0, c0)``.

    ``i, f, o = sigmoid(x + a)``, ``g = tanh(x + a)``, ``c' = f c + i g``, ``h' = o tanh(c')``, with x the projected
    input and a = W_hh h; the gates of ``params`` stand in the order i, f, g, o.  A fifth (third, without biases)
    parameter of each direction is W_hr, the projection of torch's ``proj_size``, which the torch backend alone serves.

    ``zoneout`` is that of h, ``cell_zoneout`` that of c; h is made of the new c, as the paper has it.  ``layer_norm``
    has two tensors (hidden,) more for each layer and direction, factor and bias of the norm of c' before its tanh.

    Returns:
        ``(output, hn, cn)``.
    """
    rest = (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, recurrent_dropout)
    return run("LSTM", input, tuple(hx), params, *rest, (zoneout, cell_zoneout), layer_norm)


class _Layer(torch.autograd.Function):
    """One layer on a kernel backend.  The projected input is not kept: where the gradient shall be differentiated, the
    layer runs again as torch's composite.
    """

    @staticmethod
    def forward(ctx, implementation, cell, x, h0, c0, mask, offsets, lengths, zone, cell_zone, means, *params):
        zoning = (zone, cell_zone, *means)
        output, hn, cn, saved = _forward(implementation, cell, x, h0, c0, mask, offsets, lengths, params, True, zoning)
        ctx.save_for_backward(output, saved, x, h0, c0, mask, offsets, lengths, zone, cell_zone, *params)
        ctx.set_materialize_grads(False)
        ctx.implementation, ctx.cell, ctx.means = implementation, cell, means
        return (output, hn) if c0 is None else (output, hn, cn)

    @staticmethod
    def backward(ctx, grad_output, grad_hn, grad_cn=None):
        output, saved, x, h0, c0, mask, offsets, lengths, zone, cell_zone, *params = ctx.saved_tensors
        need_x, need_h0, need_c0 = ctx.needs_input_grad[2:5]
        need_params = ctx.needs_input_grad[11:]
        zoning = (zone, cell_zone, *ctx.means)
        # While torch.compile traces a backward it will not be differentiated again, whatever the grad mode says.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (x, h0, c0, *params)
            results = _compose(ctx.cell, x, h0, c0, mask, offsets, lengths, params, zoning)
            grads_out = (grad_output, grad_hn, grad_cn)[: len(results)]
            pairs = [(y, g) for y, g in zip(results, grads_out, strict=True) if g is not None]
            needed = [need_x, need_h0, need_c0, *need_params]
            grads = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    [tensor for tensor, need in zip(inputs, needed, strict=True) if need],
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
            grad_x, grad_h0, grad_c0, *grad_params = (next(grads) if need else None for need in needed)
            return None, None, grad_x, grad_h0, grad_c0, *[None] * 6, *grad_params

        directions = h0.shape[0]
        weights = params[1 :: len(params) // directions]
        grad_gates, grad_hidden, grad_h0, grad_c0 = ctx.implementation.backward(
            None if grad_output is None else grad_output.contiguous(),
            None if grad_hn is None else grad_hn.contiguous(),
            None if grad_cn is None else grad_cn.contiguous(),
            output,
            saved,
            _stack(weights),
            h0,
            c0,
            mask,
            offsets,
            lengths,
            ctx.cell,
            *_given(zoning),
        )
        grad_params = _parameter_gradients(
            ctx.cell, grad_gates, grad_hidden, x, output, h0, mask, offsets, lengths, params, need_params
        )
        grad_x = _input_gradient(grad_gates, params[:: len(params) // directions]) if need_x else None
        return (
            *(None, None, grad_x, grad_h0 if need_h0 else None, grad_c0 if need_c0 else None),
            *([None] * 6),
            *grad_params,
        )


def _input_gradient(grad_gates: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What reaches the layer's input from all directions' gates."""
    if len(weights) == 1 or grad_gates.dtype != torch.float32:
        return grad_gates @ _cat(weights)
    # A product each: one sum over both directions' gates is twice as long, and its error in fp32 was 1.4 times as
    # large (2.8e-7 beside 2.0e-7, H = 37).  In 16 bits the rounding between two products would cost more.
    first, second = grad_gates.chunk(2, 1)
    return first @ weights[0] + second @ weights[1]


def _parameter_gradients(
    cell, grad_gates, grad_hidden, x, output, h0, mask, offsets, lengths, params, needed
) -> list[Tensor | None]:
    """One product over all steps for each weight; what a bias gets is a sum over the rows."""
    directions, _, hidden = h0.shape
    each, gates = len(params) // directions, GATES[cell] * hidden
    found: list[Tensor | None] = [None] * len(params)
    for direction in range(directions):
        first = direction * each
        grad = grad_gates[:, direction * gates : (direction + 1) * gates]
        is_gru = CELLS[cell] == "GRU"
        inner = grad_hidden[:, direction * hidden : (direction + 1) * hidden] if is_gru else None
        if needed[first]:
            found[first] = grad.t() @ x
        if needed[first + 1]:
            states = _previous_states(output, h0, mask, offsets, lengths, direction)
            if is_gru:
                found[first + 1] = torch.cat((grad[:, : 2 * hidden].t() @ states, inner.t() @ states))
            else:
                found[first + 1] = grad.t() @ states
        if each > 2 and (needed[first + 2] or needed[first + 3]):
            total = grad.sum(0)
            found[first + 2] = total if needed[first + 2] else None
            if needed[first + 3]:
                found[first + 3] = torch.cat((total[: 2 * hidden], inner.sum(0))) if is_gru else total.clone()
    return found


def _previous_states(output, h0, mask, offsets, lengths, direction) -> Tensor:
    """(rows, hidden): the state that each row's step read."""
    _, batch, hidden = h0.shape
    states = output[:, direction * hidden : (direction + 1) * hidden]
    rows = states.shape[0]
    if offsets is None:
        parts = (h0[0], states[: rows - batch]) if direction == 0 else (states[batch:], h0[1])
        before = torch.cat(parts)
        if mask is None:
            return before
        return (before.view(-1, batch, hidden) * mask[direction]).view(rows, hidden)
    row = torch.arange(rows, device=states.device)
    step = torch.searchsorted(offsets, row, right=True) - 1
    sequence = row - offsets[step]
    if direction == 0:
        index = torch.where(step > 0, offsets[(step - 1).clamp_min(0)] + sequence, rows + sequence)
    else:
        after = (step + 1).clamp_max(offsets.shape[0] - 1)
        index = torch.where(step + 1 < lengths[sequence], offsets[after] + sequence, rows + sequence)
    before = torch.cat((states, h0[direction])).index_select(0, index)
    return before if mask is None else before * mask[direction].index_select(0, sequence)


def run(
    mode: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    recurrent_dropout: float,
    zoneout: tuple[float, ...],
    layer_norm: Sequence[Tensor] | None,
    checked: bool = False,
) -> tuple[Tensor, ...]:
    """The whole stack on the backend that :func:`backend.select` names; ``checked`` says that a module has looked at
    the shapes, which torch's operators take unseen.
    """
    whole = (input, batch_sizes, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    extras = [name for name, given in (("zoneout", any(zoneout)), ("layer_norm", layer_norm is not None)) if given]
    stepwise = bool(extras) or (train and recurrent_dropout != 0)
    # Forward mode and functorch need operators that torch can differentiate itself, which its fused ones are not all.
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if checked and backend.uses_torch(input) and not stepwise and not transformed:
        return _torch.compose(mode, *whole)
    projected = _check(mode, *whole, recurrent_dropout)
    _check_extras(mode, input, params, zoneout, layer_norm, num_layers * (2 if bidirectional else 1))
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        input = input.to(dtype)
        states, params = [state.to(dtype) for state in states], [param.to(dtype) for param in params]
    implementation = backend.select("rnn", _IMPLEMENTATIONS, input, states, params, mode, projected, extras)
    empty = batch_sizes is None and states[0].shape[1] == 0
    if empty or (implementation is _torch and not stepwise and not transformed):
        results = _torch.compose(mode, input, batch_sizes, states, params, *whole[4:])
        if layer_norm is None:
            return results
        # No step reads the norms; as torch's parameters do, they get zeros for gradients, not None.
        nothing = sum(tensor[:0].sum() for tensor in layer_norm)
        return tuple(result + nothing for result in results)
    if projected:
        raise ValueError(
            "lstm: the parameters hold a projection (proj_size), which goes with none of recurrent_dropout, zoneout, "
            "layer_norm, forward mode and functorch: use proj_size=0"
        )

    directions, batch = 2 if bidirectional else 1, states[0].shape[1]
    offsets = lengths = None
    x = input
    if batch_sizes is not None:
        offsets, lengths = _layout(batch_sizes, batch, input.device)
    else:
        x = input.transpose(0, 1) if batch_first else input
        x = x.reshape(-1, x.shape[2])
    each = directions * (4 if has_biases else 2)
    finals = []
    for layer in range(num_layers):
        of_layer = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = states[0][of_layer].contiguous(), states[1][of_layer].contiguous() if mode == "LSTM" else None
        dropping = train and recurrent_dropout != 0
        mask = torch.dropout(torch.ones_like(h0), recurrent_dropout, True) if dropping else None
        weights = params[layer * each : (layer + 1) * each]
        zoning = _zoning(x, directions * h0.shape[2], zoneout, train) if extras else _NO_ZONES
        arguments = (CELLS.index(mode), x, h0, c0, mask, offsets, lengths, weights, zoning)
        if layer_norm is not None:
            x, *final = _compose(*arguments, _of_layer(layer_norm, num_layers, layer))
        else:
            x, *final = _layer(implementation, transformed, *arguments)
        finals.append(final)
        if train and dropout > 0 and layer + 1 < num_layers:
            x = torch.dropout(x, dropout, True)
    if batch_sizes is None:
        x = x.view(-1, batch, x.shape[1])
        x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.cat(parts) if num_layers > 1 else parts[0] for parts in zip(*finals, strict=True))


def _layer(implementation, transformed, cell, x, h0, c0, mask, offsets, lengths, params, zoning) -> tuple[Tensor, ...]:
    """(output, hn) or (output, hn, cn) of one layer."""
    if implementation is _torch or transformed:
        return _compose(cell, x, h0, c0, mask, offsets, lengths, params, zoning)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *params)):
        zones, means = zoning[:2], zoning[2:]
        return _Layer.apply(implementation, cell, x, h0, c0, mask, offsets, lengths, *zones, means, *params)
    output, hn, cn, _ = _forward(implementation, cell, x, h0, c0, mask, offsets, lengths, params, False, zoning)
    return (output, hn) if c0 is None else (output, hn, cn)


def _compose(cell, x, h0, c0, mask, offsets, lengths, params, zoning, norms=()) -> tuple[Tensor, ...]:
    """A layer in operators that torch can differentiate as often as asked."""
    output, hn, cn, _ = _forward(_torch, cell, x, h0, c0, mask, offsets, lengths, params, False, zoning, norms)
    return (output, hn) if c0 is None else (output, hn, cn)


# Zoneout of h and of the LSTM's c as the raw ops take it: the weight of the old state at each (row, unit), or where
# there is no such tensor one number for all.
_NO_ZONES = (None, None, 0.0, 0.0)


def _zoning(x: Tensor, width: int, zoneout: tuple[float, ...], train: bool) -> tuple[Tensor | float | None, ...]:
    """A draw for each state while training, else its mean."""
    if not train:
        return (None, None, *zoneout, *[0.0] * (2 - len(zoneout)))
    drawn = [x.new_empty((x.shape[0], width)).bernoulli_(p) for p in zoneout]
    return (*drawn, *[None] * (2 - len(drawn)), 0.0, 0.0)


def _given(zoning: tuple[Tensor | float | None, ...]) -> tuple[Tensor | float | None, ...]:
    """Nothing where there is no zoneout: not every backend has a place for it."""
    return zoning if any(isinstance(value, Tensor) or value for value in zoning) else ()


def _of_layer(tensors: Sequence[Tensor] | None, layers: int, layer: int) -> Sequence[Tensor]:
    each = 0 if tensors is None else len(tensors) // layers
    return tensors[layer * each : (layer + 1) * each] if each else ()


def _forward(implementation, cell, x, h0, c0, mask, offsets, lengths, params, save, zoning, norms=()):
    """The input projection of all steps in one product, then the sequential part; norms are torch's alone."""
    directions, _, hidden = h0.shape
    each = len(params) // directions
    weight, weight_hh, bias, bias_hn = _cat(params[::each]), _stack(params[1::each]), None, None
    if each > 2:
        biases = list(zip(params[2::each], params[3::each], strict=True))
        if CELLS[cell] == "GRU":
            # Only r's and z's part of b_hh adds to the input's projection: n's is multiplied by r.
            pad = [torch.nn.functional.pad(b_hh[: 2 * hidden], (0, hidden)) for _, b_hh in biases]
            bias = _cat([b_ih + padded for (b_ih, _), padded in zip(biases, pad, strict=True)])
            bias_hn = _stack([b_hh[2 * hidden :] for _, b_hh in biases])
        else:
            bias = _cat([b_ih + b_hh for b_ih, b_hh in biases])
    if norms:
        factors = norms[:: len(norms) // directions]
        gates = torch.cat(list(map(_torch.normalise, (x @ weight.t()).chunk(directions, 1), factors)), 1)
        gates = gates if bias is None else gates + bias
        arguments = (gates, weight_hh, bias_hn, h0, c0, mask, offsets, lengths, cell, save)
        return _torch.forward(*arguments, *_given(zoning), norms=norms)
    gates = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    arguments = (gates, weight_hh, bias_hn, h0, c0, mask, offsets, lengths, cell, save)
    return implementation.forward(*arguments, *_given(zoning))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(list(tensors))


def _layout(batch_sizes: Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A packed batch as kernels read it: the first row of each step, and the length of each sequence."""
    offsets = batch_sizes.cumsum(0) - batch_sizes
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    if device.type == "cpu":
        return offsets, lengths
    # One copy, which does not wait for the GPU.
    both = torch.cat((offsets, lengths)).pin_memory().to(device, non_blocking=True)
    return both[: offsets.shape[0]], both[offsets.shape[0] :]


def _check(
    mode: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    recurrent_dropout: float,
) -> bool:
    """Refuse what no backend serves; whether the parameters hold a projection."""
    op = {"LSTM": "lstm", "GRU": "gru"}.get(mode, "rnn")
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input is a {type(input).__name__}; expected a torch.Tensor")
    if input.dtype not in _DTYPES:
        raise TypeError(f"{op}: input has dtype {input.dtype}; supported are {_SUPPORTED_DTYPES}: convert it")
    for name, value in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} is {value}; it is a probability and must be in [0, 1]")
    wanted_dim = 3 if batch_sizes is None else 2
    if input.dim() != wanted_dim:
        kind = "(steps, batch, features)" if batch_sizes is None else "(rows, features) of a packed batch"
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}; expected {kind}, {wanted_dim} dimensions")
    wanted_states = 2 if mode == "LSTM" else 1
    if len(states) != wanted_states:
        raise ValueError(f"{op}: hx holds {len(states)} tensors; expected {wanted_states}")
    directions = 2 if bidirectional else 1
    plain = 4 if has_biases else 2
    if num_layers < 1:
        raise ValueError(f"{op}: num_layers is {num_layers}; it must be at least 1")
    cells = num_layers * directions
    projected = mode == "LSTM" and len(params) == cells * (plain + 1)
    if len(params) != cells * plain and not projected:
        raise ValueError(
            f"{op}: params holds {len(params)} tensors; {num_layers} layers of {directions} directions "
            f"{'with' if has_biases else 'without'} biases have {cells * plain}"
        )
    hidden = params[1].shape[0] // GATES[CELLS.index(mode)]
    for name, tensor in [*(("hx", state) for state in states), *((f"params[{i}]", p) for i, p in enumerate(params))]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and input on {input.device}; move one with .to()")
        if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype} and input {input.dtype}; convert one with .to()")
    batch = _batch(op, input, states, batch_sizes, batch_first)
    each = len(params) // cells
    state = params[1].shape[1]
    for i in range(cells):
        features = input.shape[-1] if i < directions else state * directions
        shapes = [(GATES[CELLS.index(mode)] * hidden, width) for width in (features, state)]
        shapes += [(GATES[CELLS.index(mode)] * hidden,)] * 2 if has_biases else []
        shapes += [(state, hidden)] if projected else []
        for j, shape in enumerate(shapes):
            if tuple(params[i * each + j].shape) != shape:
                raise ValueError(
                    f"{op}: params[{i * each + j}] has shape {tuple(params[i * each + j].shape)}; expected {shape}"
                )
    for tensor, width in zip(states, (state, hidden)[: len(states)], strict=True):
        if tuple(tensor.shape) != (cells, batch, width):
            raise ValueError(f"{op}: hx has shape {tuple(tensor.shape)}; expected {(cells, batch, width)}")
    return projected


def _check_extras(
    mode: str,
    input: Tensor,
    params: Sequence[Tensor],
    zoneout: tuple[float, ...],
    layer_norm: Sequence[Tensor] | None,
    cells: int,
) -> None:
    """Refuse what torch's operators have no place for and is not right."""
    op = {"LSTM": "lstm", "GRU": "gru"}.get(mode, "rnn")
    for name, value in zip(("zoneout", "cell_zoneout"), zoneout, strict=False):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} is {value}; it is a probability and must be in [0, 1]")
    if layer_norm is None:
        return
    rows = params[1].shape[0]
    shapes = [(rows,), (rows,), *([(rows // 4,)] * 2 if mode == "LSTM" else [])]
    if len(layer_norm) != cells * len(shapes):
        raise ValueError(
            f"{op}: layer_norm holds {len(layer_norm)} tensors; expected {cells * len(shapes)}, {len(shapes)} for each "
            "layer and direction"
        )
    for i, tensor in enumerate(layer_norm):
        shape = shapes[i % len(shapes)]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: layer_norm[{i}] is {found}; expected a tensor of shape {shape}")
        if tensor.device != input.device:
            raise ValueError(
                f"{op}: layer_norm[{i}] is on {tensor.device} and input on {input.device}; move one with .to()"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: layer_norm[{i}] has dtype {tensor.dtype}; expected {_SUPPORTED_DTYPES}")


def _batch(op: str, input: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None, batch_first: bool) -> int:
    if batch_sizes is None:
        steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
        if steps == 0:
            raise ValueError(f"{op}: input has shape {tuple(input.shape)}, no steps; expected at least one")
        return batch
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        raise ValueError(
            f"{op}: batch_sizes is {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)} on {batch_sizes.device}; "
            "expected a PackedSequence's: one dimension of int64 on the CPU"
        )
    if torch.compiler.is_compiling():
        return states[0].shape[1]
    sizes = batch_sizes.tolist()
    if not sizes or min(sizes) < 1 or sorted(sizes, reverse=True) != sizes or sum(sizes) != input.shape[0]:
        raise ValueError(
            f"{op}: batch_sizes is {sizes} for {input.shape[0]} rows; expected positive numbers that do not rise and "
            "add up to the rows, as pack_padded_sequence makes them"
        )
    return sizes[0]
