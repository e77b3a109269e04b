"""Recurrent layers in Triton, and their raw ops: a product and a fused cell for each step; of small 16-bit layers
all steps in one launch, a program for each sixteen sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigkern.ops import _triton_support
from bigkern.ops.rnn import _schema
from bigkern.ops.rnn._schema import GATES, SAVED

_BLOCK = 256
_ROWS = 16


def _fits(cell: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether one program holds a layer without a spill (tests/triton): LSTM to H = 64, the others to 128; not fp32,
    whose products are no tensor core's.
    """
    return dtype != torch.float32 and GATES[cell] * _units(hidden) <= 384


def _units(hidden: int) -> int:
    """Hidden units rounded up to a power of two, at least what a tensor core multiplies."""
    return max(16, 1 << (hidden - 1).bit_length())


def unsupported(
    input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mode: str, projected: bool, extras: Sequence[str]
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None."""
    reason = _triton_support.unsupported_tensors(input=input, h0=states[0], weight=params[0])
    if reason is not None:
        return reason
    if projected:
        return "proj_size is not 0; the Triton kernels carry the hidden state as it is, without a projection"
    if extras:
        return f"{' and '.join(extras)} given; the Triton kernels have no such cells, torch runs them step by step"
    for tensor in (*states, *params):
        if tensor.dtype != input.dtype:
            return f"input is {input.dtype} and a state or weight {tensor.dtype}; the Triton kernels take one dtype"
    return None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hn, cn, saved); see _schema.py."""
    return torch.ops.bigkern_triton.rnn_forward.default(
        gates, weight_hh, bias_hn, h0, c0, mask, offsets, lengths, cell, save, 0
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
    return torch.ops.bigkern_triton.rnn_backward.default(
        grad_output, grad_hn, grad_cn, output, saved, weight_hh.mT.contiguous(), h0, c0, mask, offsets, lengths, cell, 0
    )


def _forward(
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
    variant: int,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_zoneout(zone, cell_zone, zoneout, cell_zoneout)
    rows, (directions, _, hidden) = gates.shape[0], h0.shape
    kept = SAVED[cell] if save else 0
    output = gates.new_empty((rows, directions * hidden))
    saved = gates.new_empty((rows, directions * kept * hidden)) if kept else gates.new_empty((0,))
    if _runs_whole(variant, cell, hidden, gates.dtype):
        from bigkern.ops.rnn._triton_kernels import sequence_forward

        hn, cn = torch.empty_like(h0), gates.new_empty((0,)) if c0 is None else torch.empty_like(c0)
        last = (hn, None if c0 is None else cn, saved if kept else None)
        given = (gates, weight_hh, bias_hn, h0, c0, mask, offsets, lengths)
        _launch_whole(sequence_forward, 8, rows, h0, cell, offsets, *given, output, *last)
        return output, hn, cn, saved
    return output, *_forward_steps(gates, weight_hh, bias_hn, h0, c0, mask, offsets, cell, output, saved), saved


def _forward_steps(
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    cell: int,
    output: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills output and saved, two launches a step; (hn, cn)."""
    from bigkern.ops.rnn._triton_kernels import cell_forward

    rows, (directions, batch, hidden) = gates.shape[0], h0.shape
    width, kept = GATES[cell] * hidden, SAVED[cell] if saved.dim() > 1 else 0
    h = h0.to(torch.float32, copy=True)
    c = None if c0 is None else c0.to(torch.float32, copy=True)
    operand = h0.clone() if mask is None else h0 * mask
    firsts, lives = _steps(rows, batch, offsets)
    with _triton_support.device_guard(gates.device):
        for direction in range(directions):
            weight = weight_hh[direction].t()
            for step in _order(len(lives), direction):
                first, live = firsts[step], lives[step]
                product = operand[direction, :live] @ weight
                cell_forward[_grid(live * hidden)](
                    gates[first:, direction * width :],
                    product,
                    None if bias_hn is None else bias_hn[direction],
                    h[direction],
                    None if c is None else c[direction],
                    None if mask is None else mask[direction],
                    operand[direction],
                    output[first:, direction * hidden :],
                    saved[first:, direction * kept * hidden :] if kept else None,
                    live * hidden,
                    hidden,
                    directions * width,
                    directions * hidden,
                    directions * kept * hidden,
                    CELL=cell,
                    GATES=GATES[cell],
                    BLOCK=_BLOCK,
                )
    dtype = gates.dtype
    return h.to(dtype), gates.new_empty((0,)) if c is None else c.to(dtype)


def _backward(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Tensor,
    saved: Tensor,
    weight_t: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    variant: int,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_zoneout(zone, cell_zone, zoneout, cell_zoneout)
    rows, (directions, _, hidden) = output.shape[0], h0.shape
    is_gru = _schema.CELLS[cell] == "GRU"
    grad_gates = output.new_empty((rows, directions * GATES[cell] * hidden))
    grad_hidden = output.new_empty((rows, directions * hidden)) if is_gru else output.new_empty((0,))
    if _runs_whole(variant, cell, hidden, output.dtype):
        from bigkern.ops.rnn._triton_kernels import sequence_backward

        grads = (grad_output, grad_hn, None if c0 is None else grad_cn)
        grad_h0, grad_c0 = torch.empty_like(h0), output.new_empty((0,)) if c0 is None else torch.empty_like(c0)
        given = (output, saved if SAVED[cell] else None, weight_t, h0, c0, mask, offsets, lengths)
        found = (grad_gates, grad_hidden if is_gru else None, grad_h0, None if c0 is None else grad_c0)
        _launch_whole(sequence_backward, 16, rows, h0, cell, offsets, *grads, *given, *found)
        return grad_gates, grad_hidden, grad_h0, grad_c0
    firsts = _backward_steps(
        grad_output, grad_hn, grad_cn, output, saved, weight_t, h0, c0, mask, offsets, cell, grad_gates, grad_hidden
    )
    return grad_gates, grad_hidden, *firsts


def _backward_steps(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Tensor,
    saved: Tensor,
    weight_t: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    cell: int,
    grad_gates: Tensor,
    grad_hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills grad_gates and grad_hidden, two launches a step; (grad_h0, grad_c0)."""
    from bigkern.ops.rnn._triton_kernels import cell_backward

    rows, (directions, batch, hidden) = output.shape[0], h0.shape
    width, kept, is_gru = GATES[cell] * hidden, SAVED[cell], _schema.CELLS[cell] == "GRU"
    dh = torch.zeros_like(h0, dtype=torch.float32) if grad_hn is None else grad_hn.to(torch.float32, copy=True)
    dc = None
    if c0 is not None:
        dc = torch.zeros_like(c0, dtype=torch.float32) if grad_cn is None else grad_cn.to(torch.float32, copy=True)
    operand = output.new_empty((batch, width))
    firsts, lives = _steps(rows, batch, offsets)
    with _triton_support.device_guard(output.device):
        for direction in range(directions):
            weight = weight_t[direction].t()
            order = list(_order(len(lives), direction))
            at_hidden, at_saved = direction * hidden, direction * kept * hidden
            for i in reversed(range(len(order))):
                first, live = firsts[order[i]], lives[order[i]]
                live_before, before = 0, None
                if i > 0 and kept:
                    live_before, start = lives[order[i - 1]], firsts[order[i - 1]]
                    before = output[start:, at_hidden:] if is_gru else saved[start:, at_saved + 4 * hidden :]
                cell_backward[_grid(live * hidden)](
                    None if grad_output is None else grad_output[first:, at_hidden:],
                    dh[direction],
                    None if dc is None else dc[direction],
                    output[first:, at_hidden:],
                    saved[first:, at_saved:] if kept else None,
                    before,
                    None if not kept else (h0 if is_gru else c0)[direction],
                    operand,
                    grad_gates[first:, direction * width :],
                    grad_hidden[first:, at_hidden:] if is_gru else None,
                    live_before,
                    live * hidden,
                    hidden,
                    directions * width,
                    directions * hidden,
                    directions * kept * hidden,
                    directions * (hidden if is_gru else kept * hidden),
                    CELL=cell,
                    GATES=GATES[cell],
                    BLOCK=_BLOCK,
                )
                reached = operand[:live] @ weight
                dh[direction, :live] += reached if mask is None else reached * mask[direction, :live]
    dtype = output.dtype
    return dh.to(dtype), output.new_empty((0,)) if dc is None else dc.to(dtype)


def _refuse_zoneout(*zoning: Tensor | float | None) -> None:
    if any(isinstance(given, Tensor) or given for given in zoning):
        raise ValueError("rnn: a zone or a zoneout was given; the Triton kernels have no zoneout")


def _refuse_grid(variant: int) -> None:
    name = _schema.VARIANTS[variant]
    if name in ("grid", "flags"):
        raise ValueError(f"rnn: variant is '{name}'; the Triton kernels have 'auto', 'block' and 'step'")


def _runs_whole(variant: int, cell: int, hidden: int, dtype: torch.dtype) -> bool:
    _refuse_grid(variant)
    name = _schema.VARIANTS[variant]
    if name == "block" and not _fits(cell, hidden, dtype):
        raise ValueError(f"rnn: variant is 'block'; no program holds {hidden} hidden units in {dtype}")
    return name == "block" or (name == "auto" and _fits(cell, hidden, dtype))


def _launch_whole(
    kernel: Callable, warps: int, rows: int, h0: Tensor, cell: int, offsets: Tensor | None, *tensors: Tensor | None
) -> None:
    """All steps of either pass in one launch.  A packed batch is not waited for: its lengths stay on the GPU.

    ``warps`` is for cells of several gates: what registers hold without a spill.
    """
    directions, batch, hidden = h0.shape
    with _triton_support.device_guard(h0.device):
        kernel[(-(-batch // _ROWS), directions)](
            *tensors,
            rows // batch if offsets is None else offsets.shape[0],
            batch,
            hidden,
            CELL=cell,
            GATES=GATES[cell],
            SAVED=SAVED[cell],
            ROWS=_ROWS,
            UNITS=_units(hidden),
            num_warps=4 if GATES[cell] == 1 else warps,
            num_stages=1,  # the weights come from L1 and L2: copies ahead would not fit shared memory
        )


def _steps(rows: int, batch: int, offsets: Tensor | None) -> tuple[list[int], list[int]]:
    """Each step's first row, and how many sequences are live in it.  Of a packed batch this waits for the GPU."""
    firsts = list(range(0, rows, batch)) if offsets is None else offsets.tolist()
    return firsts, [after - before for before, after in zip(firsts, [*firsts[1:], rows], strict=True)]


def _order(steps: int, direction: int) -> range:
    return range(steps) if direction == 0 else range(steps - 1, -1, -1)


def _grid(count: int) -> tuple[int]:
    return (-(-count // _BLOCK),)


_triton_support.register("rnn_forward", _forward)
_triton_support.register("rnn_backward", _backward)
