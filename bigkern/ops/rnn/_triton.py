"""Recurrent layers in Triton, and their raw ops: a product and a fused cell for each step; of small 16-bit layers
all of the forward pass in one, a program for each sixteen sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bigkern.ops.rnn._triton_kernels import cell_forward

    if _runs_whole(variant, cell, h0.shape[2], gates.dtype):
        return _forward_whole(gates, weight_hh, bias_hn, h0, c0, mask, offsets, lengths, cell, save)
    rows, (directions, batch, hidden) = gates.shape[0], h0.shape
    width, kept = GATES[cell] * hidden, SAVED[cell] if save else 0
    output = gates.new_empty((rows, directions * hidden))
    saved = gates.new_empty((rows, directions * kept * hidden)) if kept else gates.new_empty((0,))
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
    return output, h.to(dtype), gates.new_empty((0,)) if c is None else c.to(dtype), saved


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bigkern.ops.rnn._triton_kernels import cell_backward

    _refuse_grid(variant)
    rows, (directions, batch, hidden) = output.shape[0], h0.shape
    width, kept = GATES[cell] * hidden, SAVED[cell]
    is_gru = _schema.CELLS[cell] == "GRU"
    grad_gates = output.new_empty((rows, directions * width))
    grad_hidden = output.new_empty((rows, directions * hidden)) if is_gru else output.new_empty((0,))
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
    return grad_gates, grad_hidden, dh.to(dtype), output.new_empty((0,)) if dc is None else dc.to(dtype)


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


def _forward_whole(
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
    """All steps in one launch.  A packed batch is not waited for: its lengths stay on the GPU."""
    from bigkern.ops.rnn._triton_kernels import sequence_forward

    rows, (directions, batch, hidden) = gates.shape[0], h0.shape
    kept = SAVED[cell] if save else 0
    output = gates.new_empty((rows, directions * hidden))
    saved = gates.new_empty((rows, directions * kept * hidden)) if kept else gates.new_empty((0,))
    hn, cn = torch.empty_like(h0), gates.new_empty((0,)) if c0 is None else torch.empty_like(c0)
    with _triton_support.device_guard(gates.device):
        sequence_forward[(-(-batch // _ROWS), directions)](
            gates,
            weight_hh,
            bias_hn,
            h0,
            c0,
            mask,
            offsets,
            lengths,
            output,
            hn,
            None if c0 is None else cn,
            saved if kept else None,
            rows // batch if offsets is None else offsets.shape[0],
            batch,
            hidden,
            CELL=cell,
            GATES=GATES[cell],
            SAVED=SAVED[cell],
            ROWS=_ROWS,
            UNITS=_units(hidden),
            num_warps=4 if GATES[cell] == 1 else 8,  # what registers hold without a spill
            num_stages=1,  # the weights come from L1 and L2: copies ahead would not fit shared memory
        )
    return output, hn, cn, saved


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
