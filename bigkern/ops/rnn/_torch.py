"""Recurrent layers in PyTorch's own operators: what runs without a GPU, and what is differentiated twice.

:func:`compose` is the backend: torch's fused rnn_tanh, rnn_relu, lstm and gru.  :func:`forward` and :func:`backward`
state the raw ops' mathematics step by step, differentiably.  With a = W_hh (mask * h), x the projected input, sigma the
logistic function:

    RNN     h' = act(x + a)
    LSTM    i, f, o = sigma(x + a),  g = tanh(x + a),  c' = f c + i g,  h' = o tanh(c')
    GRU     r, z = sigma(x + a),  n = tanh(x + r (a + b_hn)),  h' = (1 - z) n + z h

(Elman, 1990; Hochreiter and Schmidhuber, 1997; Cho et al., arXiv:1406.1078 in torch's form, where the reset gate
multiplies the product.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops.rnn._schema import CELLS, GATES

NORM_EPS = 1e-5

_OPERATORS = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "LSTM": torch.lstm, "GRU": torch.gru}


def unsupported(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mode: str, projected: bool, extras: Sequence[str]
) -> str | None:
    """Always None: torch serves whatever the argument checks let through."""
    return None


def compose(
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
) -> tuple[Tensor, ...]:
    """(output, hn) or (output, hn, cn) of a whole stack of layers, in torch's fused operator."""
    hx = list(states) if mode == "LSTM" else states[0]
    rest = (hx, list(params), has_biases, num_layers, dropout, train, bidirectional)
    if batch_sizes is None:
        return _OPERATORS[mode](input, *rest, batch_first)
    return _OPERATORS[mode](input, batch_sizes, *rest)


def forward(
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    save: bool,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
    norms: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hn, cn, saved); see _schema.py.  fp32 (fp64 of fp64) throughout, rounded at the end.

    What zoneout would add to ``saved`` is not there: its gradient is autograd's.  With ``norms``, for each direction
    what :func:`bigkern.ops.rnn` calls layer_norm, W_hh h is normalised.
    """
    dtype, compute = gates.dtype, accumulator(gates.dtype)
    directions, batch, hidden = h0.shape
    sizes = _sizes(gates.shape[0], batch, offsets)
    steps = gates.to(compute).unflatten(1, (directions, GATES[cell], hidden)).split(sizes)
    blends = [
        [mean] * len(sizes) if weights is None else weights.split(sizes)
        for weights, mean in ((zone, zoneout), (cell_zone, cell_zoneout))
    ]
    zoned = zone is not None or cell_zone is not None or zoneout != 0 or cell_zoneout != 0
    outputs, kept, last_h, last_c = [], [], [], []
    for direction in range(directions):
        weight = weight_hh[direction].to(compute).t()
        bias = None if bias_hn is None else bias_hn[direction].to(compute)
        h = h0[direction].to(compute)
        c = None if c0 is None else c0[direction].to(compute)
        done: dict[int, tuple[Tensor, Tensor]] = {}
        keep = save and CELLS[cell] in ("LSTM", "GRU")
        norm = norms[direction * len(norms) // directions :][: len(norms) // directions]
        units = slice(direction * hidden, (direction + 1) * hidden)
        for t in _order(len(sizes), direction):
            live = sizes[t]
            whole = live == batch  # slices of everything would cost as much as the arithmetic
            old_h, old_c = (h, c) if whole else (h[:live], None if c is None else c[:live])
            read = old_h if mask is None else old_h * mask[direction, :live].to(compute)
            product = normalise(read @ weight, norm[1]) if norm else read @ weight
            a = product.unflatten(1, (GATES[cell], hidden))
            new_h, new_c, values = _cell(cell, steps[t][:, direction], a, bias, old_h, old_c, keep, norm[2:])
            if zoned:
                new_h = _blend(new_h, old_h, blends[0][t], units)
                new_c = new_c if c is None else _blend(new_c, old_c, blends[1][t], units)
            done[t] = new_h, values
            h = new_h if whole else torch.cat((new_h, h[live:]))
            if c is not None:
                c = new_c if whole else torch.cat((new_c, c[live:]))
        outputs.append(_by_rows([done[t][0] for t in range(len(sizes))], gates, hidden))
        if keep:
            kept.append(_by_rows([done[t][1] for t in range(len(sizes))], gates, hidden))
        last_h.append(h)
        last_c.append(c)
    empty = gates.new_empty((0,))
    return (
        torch.cat(outputs, 1).to(dtype),
        torch.stack(last_h).to(dtype),
        empty if c0 is None else torch.stack(last_c).to(dtype),
        torch.cat(kept, 1).to(dtype) if kept else empty,
    )


def backward(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Tensor,
    saved: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_gates, grad_hidden, grad_h0, grad_c0); see _schema.py."""
    dtype, compute = output.dtype, accumulator(output.dtype)
    directions, batch, hidden = h0.shape
    rows = output.shape[0]
    sizes = _sizes(rows, batch, offsets)
    y = output.to(compute).unflatten(1, (directions, hidden)).split(sizes)
    kept = saved.to(compute).unflatten(1, (directions, -1, hidden)).split(sizes) if saved.dim() > 1 else None
    zeros = h0.new_zeros((batch, hidden), dtype=compute)
    dy = None if grad_output is None else grad_output.to(compute).unflatten(1, (directions, hidden)).split(sizes)
    grads, hiddens, firsts_h, firsts_c = [], [], [], []
    for direction in range(directions):
        weight = weight_hh[direction].to(compute)
        dh = zeros if grad_hn is None else grad_hn[direction].to(compute)
        dc = zeros if grad_cn is None else grad_cn[direction].to(compute)
        order = list(_order(len(sizes), direction))
        done: dict[int, tuple[Tensor, Tensor]] = {}
        for i in reversed(range(len(sizes))):
            t = order[i]
            live = sizes[t]
            total = dh[:live] if dy is None else dh[:live] + dy[t][:, direction]
            # Before a sequence's first step stands its initial state: a reverse direction starts at different steps.
            earlier = y[order[i - 1]][:, direction] if i else y[t][:0, direction]
            h_before = torch.cat((earlier[:live], h0[direction, len(earlier) : live].to(compute)))
            c_before = None
            if c0 is not None:
                known = kept[order[i - 1]][:, direction, 4] if i else kept[t][:0, direction, 4]
                c_before = torch.cat((known[:live], c0[direction, len(known) : live].to(compute)))
            values = None if kept is None else kept[t][:, direction]
            grad, grad_hidden, past, dc_before = _cell_backward(
                cell, total, dc[:live], y[t][:, direction], values, h_before, c_before
            )
            done[t] = grad.flatten(1), grad_hidden
            into = torch.cat((grad[:, :2].flatten(1), grad_hidden), 1) if CELLS[cell] == "GRU" else grad.flatten(1)
            reached = into @ weight
            before = reached if mask is None else reached * mask[direction, :live].to(compute)
            before = before + past
            dh = torch.cat((before, dh[live:])) if live < batch else before
            dc = torch.cat((dc_before, dc[live:])) if live < batch else dc_before
        grads.append(torch.cat([done[t][0] for t in range(len(sizes))]))
        if CELLS[cell] == "GRU":
            hiddens.append(torch.cat([done[t][1] for t in range(len(sizes))]))
        firsts_h.append(dh)
        firsts_c.append(dc)
    empty = output.new_empty((0,))
    return (
        torch.cat(grads, 1).to(dtype),
        torch.cat(hiddens, 1).to(dtype) if hiddens else empty,
        torch.stack(firsts_h).to(dtype),
        empty if c0 is None else torch.stack(firsts_c).to(dtype),
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and gates are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer norm of each row, in fp32 (fp64 of fp64)."""
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.layer_norm(x.to(dtype), x.shape[1:], weight.to(dtype), bias, NORM_EPS).to(x.dtype)


def _blend(new: Tensor, old: Tensor, zone: Tensor | float, units: slice) -> Tensor:
    """The new state where ``zone`` is 0, the old one where it is 1."""
    return torch.lerp(new, old, zone[:, units].to(new.dtype) if isinstance(zone, Tensor) else zone)


def _cell(
    cell: int,
    x: Tensor,
    a: Tensor,
    bias_hn: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    keep: bool,
    norm: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(new h, new c, what backward needs) of one step: x and a (batch, G, H), states (batch, H); c's norm, or none."""
    if CELLS[cell] == "GRU":
        reset, update = torch.sigmoid(x[:, :2] + a[:, :2]).unbind(1)
        hidden = a[:, 2] if bias_hn is None else a[:, 2] + bias_hn
        proposal = torch.tanh(torch.addcmul(x[:, 2], reset, hidden))
        values = torch.cat((reset, update, proposal, hidden), 1) if keep else None
        return torch.lerp(proposal, h, update), None, values
    total = x + a
    if CELLS[cell] == "LSTM":
        i, f, g, o = torch.sigmoid(total[:, 0]), torch.sigmoid(total[:, 1]), total[:, 2].tanh(), total[:, 3].sigmoid()
        new_c = torch.addcmul(f * c, i, g)
        reached = normalise(new_c, *norm) if norm else new_c
        return o * reached.tanh(), new_c, torch.cat((i, f, g, o, new_c), 1) if keep else None
    new = torch.tanh(total[:, 0]) if CELLS[cell] == "RNN_TANH" else torch.relu(total[:, 0])
    return new, None, None


def _cell_backward(
    cell: int,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    saved: Tensor | None,
    h_before: Tensor,
    c_before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradient of the gates (batch, G, H), grad_hidden, what of dh passes W_hh by, dc before the step)."""
    none = torch.zeros_like(dh)
    if CELLS[cell] == "GRU":
        reset, update, proposal, hidden = saved.unbind(1)
        dn = dh * (1 - update) * (1 - proposal * proposal)
        dz = dh * (h_before - proposal) * update * (1 - update)
        dr = dn * hidden * reset * (1 - reset)
        return torch.stack((dr, dz, dn), 1), dn * reset, dh * update, dc
    if CELLS[cell] == "LSTM":
        i, f, g, o, c = saved.unbind(1)
        tanh_c = c.tanh()
        d = dc + dh * o * (1 - tanh_c * tanh_c)
        grads = (d * g * i * (1 - i), d * c_before * f * (1 - f), d * i * (1 - g * g), dh * tanh_c * o * (1 - o))
        return torch.stack(grads, 1), none, none, d * f
    grad = dh * (1 - y * y) if CELLS[cell] == "RNN_TANH" else torch.where(y <= 0, 0, dh)
    return grad.unsqueeze(1), none, none, dc


def _sizes(rows: int, batch: int, offsets: Tensor | None) -> list[int]:
    """The number of sequences that are live at each step."""
    if offsets is None:
        return [batch] * (rows // batch)
    bounds = [*offsets.tolist(), rows]
    return [after - before for before, after in itertools.pairwise(bounds)]


def _order(steps: int, direction: int) -> range:
    return range(steps) if direction == 0 else range(steps - 1, -1, -1)


def _by_rows(parts: list[Tensor], like: Tensor, hidden: int) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty((0, hidden))
