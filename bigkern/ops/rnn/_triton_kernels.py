"""The fused cells in Triton: all gates of one step in one kernel, forward and backward; and, where W_hh fits one
program, all steps of the forward pass in one.

Step by step the product with W_hh is torch.matmul's.  Imported at the first launch.
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


@triton.jit
def _product(states, weight, at, inside, KIND: tl.constexpr):
    """states (ROWS, K) times the transpose of one gate's weights: (ROWS, K) in fp32."""
    return tl.dot(states.to(KIND), tl.load(weight + at, inside, 0.0))


@triton.jit
def sequence_forward(
    gates,  # (rows, directions * G * hidden)
    weight,  # (directions, G * hidden, hidden)
    bias_hn,  # (directions, hidden) or None
    h0,  # (directions, batch, hidden)
    c0,  # the same; LSTM's, or None
    mask,  # the same, or None
    offsets,  # (steps,) and lengths (batch,) int64 of a packed batch, or None
    lengths,
    output,  # (rows, directions * hidden)
    hn,  # as h0
    cn,  # as h0; LSTM's, or None
    saved,  # (rows, directions * S * hidden) or None
    steps,
    batch,
    hidden,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    ROWS: tl.constexpr,  # sequences of a program: those of a tensor core's tile
    UNITS: tl.constexpr,  # hidden rounded up to a power of two
):
    direction = tl.program_id(1).to(tl.int64)
    directions = tl.num_programs(1)
    kind = output.dtype.element_ty
    unit = tl.arange(0, UNITS)
    sequence = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = sequence < batch
    here = live[:, None] & (unit < hidden)[None, :]
    length = tl.zeros_like(sequence) + steps
    if lengths is not None:
        length = tl.load(lengths + sequence, live, 0)
    state_at = (direction * batch + sequence)[:, None] * hidden + unit[None, :]
    h = tl.load(h0 + state_at, here, 0.0).to(tl.float32)
    c = tl.zeros_like(h)
    if CELL == 2:
        c = tl.load(c0 + state_at, here, 0.0).to(tl.float32)
    scale = tl.zeros_like(h) + 1.0
    if mask is not None:
        scale = tl.load(mask + state_at, here, 0.0).to(tl.float32)
    bias = tl.zeros([UNITS], tl.float32)
    if bias_hn is not None:
        bias = tl.load(bias_hn + direction * hidden + unit, unit < hidden, 0.0).to(tl.float32)
    # Transposed: element (k, unit) of a gate's product.
    own = weight + direction * GATES * hidden * hidden
    weight_at = unit[None, :] * hidden + unit[:, None]
    square = (unit < hidden)[None, :] & (unit < hidden)[:, None]
    gate = hidden * hidden
    for step in range(steps):
        active = live & (step < length)
        inside = active[:, None] & (unit < hidden)[None, :]
        time = step + direction * (length - 1 - 2 * step)
        row = time * batch + sequence
        if offsets is not None:
            row = tl.load(offsets + time, active, 0) + sequence
        part = row * directions + direction
        x_at = gates + (part * GATES * hidden)[:, None] + unit[None, :]
        states = h * scale
        total0 = tl.load(x_at, inside, 0.0).to(tl.float32) + _product(states, own, weight_at, square, kind)
        if CELL >= 2:
            a1 = _product(states, own + gate, weight_at, square, kind)
            a2 = _product(states, own + 2 * gate, weight_at, square, kind)
            total1 = tl.load(x_at + hidden, inside, 0.0).to(tl.float32) + a1
            x2 = tl.load(x_at + 2 * hidden, inside, 0.0).to(tl.float32)
        saved_at = output + part[:, None]
        if saved is not None:
            saved_at = saved + (part * SAVED * hidden)[:, None] + unit[None, :]
        if CELL == 2:
            a3 = _product(states, own + 3 * gate, weight_at, square, kind)
            gate_o = tl.sigmoid(tl.load(x_at + 3 * hidden, inside, 0.0).to(tl.float32) + a3)
            gate_i, gate_f, gate_g = tl.sigmoid(total0), tl.sigmoid(total1), tanh(x2 + a2)
            new_c = gate_f * c + gate_i * gate_g
            new = gate_o * tanh(new_c)
            if saved is not None:
                tl.store(saved_at, gate_i.to(kind), inside)
                tl.store(saved_at + hidden, gate_f.to(kind), inside)
                tl.store(saved_at + 2 * hidden, gate_g.to(kind), inside)
                tl.store(saved_at + 3 * hidden, gate_o.to(kind), inside)
                tl.store(saved_at + 4 * hidden, new_c.to(kind), inside)
            c = tl.where(inside, new_c, c)
        elif CELL == 3:
            reset, update = tl.sigmoid(total0), tl.sigmoid(total1)
            inner = a2 + bias[None, :]
            proposal = tanh(x2 + reset * inner)
            new = (1.0 - update) * proposal + update * h
            if saved is not None:
                tl.store(saved_at, reset.to(kind), inside)
                tl.store(saved_at + hidden, update.to(kind), inside)
                tl.store(saved_at + 2 * hidden, proposal.to(kind), inside)
                tl.store(saved_at + 3 * hidden, inner.to(kind), inside)
        elif CELL == 1:
            new = tl.where(total0 < 0.0, 0.0, total0)  # NaN passes
        else:
            new = tanh(total0)
        tl.store(output + (part * hidden)[:, None] + unit[None, :], new.to(kind), inside)
        h = tl.where(inside, new, h)
    tl.store(hn + state_at, h.to(kind), here)
    if CELL == 2:
        tl.store(cn + state_at, c.to(kind), here)
