"""The fused cells in Triton: all gates of one step in one kernel, forward and backward.

The product with W_hh is torch.matmul's, one a step.  Imported at the first launch.
"""

import triton
import triton.language as tl

from bigkern.ops._triton_math import tanh


@triton.jit
def cell_forward(
    gates,  # of the step's first row, this direction: rows of row_gates
    product,  # (live, G * hidden), W_hh h
    bias_hn,  # (hidden,) or None
    h,  # (batch, hidden) fp32, replaced
    c,  # the same; LSTM's, or None
    mask,  # (batch, hidden) or None
    operand,  # (batch, hidden): what the next product reads
    output,  # of the step's first row, this direction: rows of row_output
    saved,  # the same with rows of row_saved, or None
    count,  # live * hidden
    hidden,
    row_gates,
    row_output,
    row_saved,
    CELL: tl.constexpr,  # 0 tanh, 1 ReLU, 2 LSTM, 3 GRU
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    row, unit = i // hidden, i % hidden
    x_at = gates + row * row_gates + unit
    a_at = product + row * (GATES * hidden) + unit
    x0 = tl.load(x_at, inside, 0.0).to(tl.float32)
    a0 = tl.load(a_at, inside, 0.0).to(tl.float32)
    if CELL >= 2:
        x1 = tl.load(x_at + hidden, inside, 0.0).to(tl.float32)
        x2 = tl.load(x_at + 2 * hidden, inside, 0.0).to(tl.float32)
        a1 = tl.load(a_at + hidden, inside, 0.0).to(tl.float32)
        a2 = tl.load(a_at + 2 * hidden, inside, 0.0).to(tl.float32)
    saved_at = output
    if saved is not None:
        saved_at = saved + row * row_saved + unit
    kind = output.dtype.element_ty
    if CELL == 2:
        x3 = tl.load(x_at + 3 * hidden, inside, 0.0).to(tl.float32)
        a3 = tl.load(a_at + 3 * hidden, inside, 0.0).to(tl.float32)
        gate_i, gate_f, gate_o = tl.sigmoid(x0 + a0), tl.sigmoid(x1 + a1), tl.sigmoid(x3 + a3)
        gate_g = tanh(x2 + a2)
        new_c = gate_f * tl.load(c + i, inside, 0.0) + gate_i * gate_g
        tl.store(c + i, new_c, inside)
        new = gate_o * tanh(new_c)
        if saved is not None:
            tl.store(saved_at, gate_i.to(kind), inside)
            tl.store(saved_at + hidden, gate_f.to(kind), inside)
            tl.store(saved_at + 2 * hidden, gate_g.to(kind), inside)
            tl.store(saved_at + 3 * hidden, gate_o.to(kind), inside)
            tl.store(saved_at + 4 * hidden, new_c.to(kind), inside)
    elif CELL == 3:
        reset, update = tl.sigmoid(x0 + a0), tl.sigmoid(x1 + a1)
        inner = a2
        if bias_hn is not None:
            inner += tl.load(bias_hn + unit, inside, 0.0).to(tl.float32)
        proposal = tanh(x2 + reset * inner)
        new = (1.0 - update) * proposal + update * tl.load(h + i, inside, 0.0)
        if saved is not None:
            tl.store(saved_at, reset.to(kind), inside)
            tl.store(saved_at + hidden, update.to(kind), inside)
            tl.store(saved_at + 2 * hidden, proposal.to(kind), inside)
            tl.store(saved_at + 3 * hidden, inner.to(kind), inside)
    elif CELL == 1:
        total = x0 + a0
        new = tl.where(total < 0.0, 0.0, total)  # NaN passes
    else:
        new = tanh(x0 + a0)
    tl.store(h + i, new, inside)
    tl.store(output + row * row_output + unit, new.to(kind), inside)
    read = new
    if mask is not None:
        read = new * tl.load(mask + i, inside, 0.0).to(tl.float32)
    tl.store(operand + i, read.to(kind), inside)


@triton.jit
def cell_backward(
    grad_output,  # of the step's first row, this direction: rows of row_output; or None
    dh,  # (batch, hidden) fp32: the new state's gradient, replaced by what passes W_hh by
    dc,  # the same; LSTM's, or None
    output,  # of the step's first row, this direction
    saved,  # the same with rows of row_saved, or None
    before,  # GRU: output, LSTM: the saved c, of the step before's first row; or None
    h0,  # GRU: h0, LSTM: c0, (batch, hidden); or None
    operand,  # (batch, G * hidden): what the product with W_hh reads
    grad_gates,  # of the step's first row, this direction: rows of row_gates
    grad_hidden,  # GRU's, rows of row_output, or None
    live_before,  # how many sequences the step before has
    count,
    hidden,
    row_gates,
    row_output,
    row_saved,
    row_before,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    row, unit = i // hidden, i % hidden
    kind = output.dtype.element_ty
    grad = tl.load(dh + i, inside, 0.0)
    if grad_output is not None:
        grad += tl.load(grad_output + row * row_output + unit, inside, 0.0).to(tl.float32)
    earlier = tl.zeros_like(grad)
    if CELL >= 2:
        first = row >= live_before
        earlier = tl.load(h0 + i, inside & first, 0.0).to(tl.float32)
        if before is not None:
            earlier += tl.load(before + row * row_before + unit, inside & (first == 0), 0.0).to(tl.float32)
    bypass = tl.zeros_like(grad)
    gates_at = grad_gates + row * row_gates + unit
    operand_at = operand + row * (GATES * hidden) + unit
    if CELL >= 2:
        saved_at = saved + row * row_saved + unit
        s0 = tl.load(saved_at, inside, 0.0).to(tl.float32)
        s1 = tl.load(saved_at + hidden, inside, 0.0).to(tl.float32)
        s2 = tl.load(saved_at + 2 * hidden, inside, 0.0).to(tl.float32)
        s3 = tl.load(saved_at + 3 * hidden, inside, 0.0).to(tl.float32)
    if CELL == 2:
        tanh_c = tanh(tl.load(saved_at + 4 * hidden, inside, 0.0).to(tl.float32))
        d = tl.load(dc + i, inside, 0.0) + grad * s3 * (1.0 - tanh_c) * (1.0 + tanh_c)
        g0 = (d * s2 * s0 * (1.0 - s0)).to(kind)
        g1 = (d * earlier * s1 * (1.0 - s1)).to(kind)
        g2 = (d * s0 * (1.0 - s2) * (1.0 + s2)).to(kind)
        g3 = (grad * tanh_c * s3 * (1.0 - s3)).to(kind)
        tl.store(dc + i, d * s1, inside)
        tl.store(gates_at, g0, inside)
        tl.store(gates_at + hidden, g1, inside)
        tl.store(gates_at + 2 * hidden, g2, inside)
        tl.store(gates_at + 3 * hidden, g3, inside)
        tl.store(operand_at, g0, inside)
        tl.store(operand_at + hidden, g1, inside)
        tl.store(operand_at + 2 * hidden, g2, inside)
        tl.store(operand_at + 3 * hidden, g3, inside)
    elif CELL == 3:
        dn = grad * (1.0 - s1) * (1.0 - s2) * (1.0 + s2)
        g0 = (dn * s3 * s0 * (1.0 - s0)).to(kind)
        g1 = (grad * (earlier - s2) * s1 * (1.0 - s1)).to(kind)
        inner = (dn * s0).to(kind)
        bypass = grad * s1
        tl.store(gates_at, g0, inside)
        tl.store(gates_at + hidden, g1, inside)
        tl.store(gates_at + 2 * hidden, dn.to(kind), inside)
        tl.store(grad_hidden + row * row_output + unit, inner, inside)
        tl.store(operand_at, g0, inside)
        tl.store(operand_at + hidden, g1, inside)
        tl.store(operand_at + 2 * hidden, inner, inside)
    else:
        y = tl.load(output + row * row_output + unit, inside, 0.0).to(tl.float32)
        g0 = tl.where(y <= 0.0, 0.0, grad) if CELL == 1 else grad * (1.0 - y) * (1.0 + y)
        g0 = g0.to(kind)
        tl.store(gates_at, g0, inside)
        tl.store(operand_at, g0, inside)
    tl.store(dh + i, bypass, inside)
