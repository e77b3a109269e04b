"""The fused cells in Triton: all gates of one step in one kernel, forward and backward; and, where W_hh fits one
program, all steps in one.

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
def _lstm_gradients(grad, dc, i, f, g, o, tanh_c, c_before, KIND: tl.constexpr):
    """Of the gates i, f, g, o from those of the new h and c; and that of the old c."""
    d = dc + grad * o * (1.0 - tanh_c) * (1.0 + tanh_c)
    return (
        (d * g * i * (1.0 - i)).to(KIND),
        (d * c_before * f * (1.0 - f)).to(KIND),
        (d * i * (1.0 - g) * (1.0 + g)).to(KIND),
        (grad * tanh_c * o * (1.0 - o)).to(KIND),
        d * f,
    )


@triton.jit
def _gru_gradients(grad, r, z, n, inner, h_before, KIND: tl.constexpr):
    """Of the gates r, z, n from that of the new h; and of W h + b_hn."""
    dn = grad * (1.0 - z) * (1.0 - n) * (1.0 + n)
    return (
        (dn * inner * r * (1.0 - r)).to(KIND),
        (grad * (h_before - n) * z * (1.0 - z)).to(KIND),
        dn.to(KIND),
        (dn * r).to(KIND),
    )


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
        g0, g1, g2, g3, dc_before = _lstm_gradients(
            grad, tl.load(dc + i, inside, 0.0), s0, s1, s2, s3, tanh_c, earlier, kind
        )
        tl.store(dc + i, dc_before, inside)
        tl.store(gates_at, g0, inside)
        tl.store(gates_at + hidden, g1, inside)
        tl.store(gates_at + 2 * hidden, g2, inside)
        tl.store(gates_at + 3 * hidden, g3, inside)
        tl.store(operand_at, g0, inside)
        tl.store(operand_at + hidden, g1, inside)
        tl.store(operand_at + 2 * hidden, g2, inside)
        tl.store(operand_at + 3 * hidden, g3, inside)
    elif CELL == 3:
        g0, g1, g2, inner = _gru_gradients(grad, s0, s1, s2, s3, earlier, kind)
        bypass = grad * s1
        tl.store(gates_at, g0, inside)
        tl.store(gates_at + hidden, g1, inside)
        tl.store(gates_at + 2 * hidden, g2, inside)
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
def _part(step, direction, directions, sequence, length, batch, offsets, active):
    """Where each sequence's step number ``step`` of this direction stands among the rows' parts."""
    time = step + direction * (length - 1 - 2 * step)
    row = time * batch + sequence
    if offsets is not None:
        row = tl.load(offsets + time, active, 0) + sequence
    return row * directions + direction


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
        part = _part(step, direction, directions, sequence, length, batch, offsets, active)
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


@triton.jit
def sequence_backward(
    grad_output,  # (rows, directions * hidden) or None
    grad_hn,  # (directions, batch, hidden) or None
    grad_cn,  # the same
    output,  # (rows, directions * hidden)
    saved,  # (rows, directions * S * hidden) or None
    weight,  # (directions, hidden, G * hidden): transposed
    h0,  # (directions, batch, hidden)
    c0,  # the same; LSTM's, or None
    mask,  # the same, or None
    offsets,  # (steps,) and lengths (batch,) int64 of a packed batch, or None
    lengths,
    grad_gates,  # (rows, directions * G * hidden)
    grad_hidden,  # (rows, directions * hidden); GRU's, or None
    grad_h0,  # as h0
    grad_c0,  # as h0; LSTM's, or None
    steps,
    batch,
    hidden,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
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
    dh = tl.zeros([ROWS, UNITS], tl.float32)
    dc = tl.zeros([ROWS, UNITS], tl.float32)
    if grad_hn is not None:
        dh = tl.load(grad_hn + state_at, here, 0.0).to(tl.float32)
    if grad_cn is not None:
        dc = tl.load(grad_cn + state_at, here, 0.0).to(tl.float32)
    scale = tl.zeros_like(dh) + 1.0
    if mask is not None:
        scale = tl.load(mask + state_at, here, 0.0).to(tl.float32)
    # Element (unit of a gate, k) of W_hh.
    own = weight + direction * GATES * hidden * hidden
    weight_at = unit[None, :] * (GATES * hidden) + unit[:, None]
    square = (unit < hidden)[None, :] & (unit < hidden)[:, None]
    for back in range(steps):
        step = steps - 1 - back
        active = live & (step < length)
        inside = active[:, None] & (unit < hidden)[None, :]
        part = _part(step, direction, directions, sequence, length, batch, offsets, active)
        output_at = (part * hidden)[:, None] + unit[None, :]
        gates_at = grad_gates + (part * GATES * hidden)[:, None] + unit[None, :]
        grad = dh
        if grad_output is not None:
            grad += tl.load(grad_output + output_at, inside, 0.0).to(tl.float32)
        past = tl.zeros_like(grad)
        if CELL >= 2:
            saved_at = saved + (part * SAVED * hidden)[:, None] + unit[None, :]
            s0 = tl.load(saved_at, inside, 0.0).to(tl.float32)
            s1 = tl.load(saved_at + hidden, inside, 0.0).to(tl.float32)
            s2 = tl.load(saved_at + 2 * hidden, inside, 0.0).to(tl.float32)
            s3 = tl.load(saved_at + 3 * hidden, inside, 0.0).to(tl.float32)
            first = tl.zeros_like(sequence) + step == 0
            later = first == 0
            earlier = _part(step - 1, direction, directions, sequence, length, batch, offsets, active & later)
            if CELL == 2:
                before_at = saved + ((earlier * SAVED + 4) * hidden)[:, None] + unit[None, :]
                first_at = c0 + state_at
            else:
                before_at = output + (earlier * hidden)[:, None] + unit[None, :]
                first_at = h0 + state_at
            before = tl.load(before_at, inside & later[:, None], 0.0).to(tl.float32)
            before += tl.load(first_at, inside & first[:, None], 0.0).to(tl.float32)
        if CELL == 2:
            tanh_c = tanh(tl.load(saved_at + 4 * hidden, inside, 0.0).to(tl.float32))
            g0, g1, g2, g3, dc_before = _lstm_gradients(grad, dc, s0, s1, s2, s3, tanh_c, before, kind)
            dc = tl.where(inside, dc_before, dc)
            tl.store(gates_at + hidden, g1, inside)
            tl.store(gates_at + 2 * hidden, g2, inside)
            tl.store(gates_at + 3 * hidden, g3, inside)
        elif CELL == 3:
            g0, g1, dn, g2 = _gru_gradients(grad, s0, s1, s2, s3, before, kind)
            past = grad * s1
            tl.store(gates_at + hidden, g1, inside)
            tl.store(gates_at + 2 * hidden, dn, inside)
            tl.store(grad_hidden + output_at, g2, inside)
        else:
            y = tl.load(output + output_at, inside, 0.0).to(tl.float32)
            g0 = tl.where(y <= 0.0, 0.0, grad) if CELL == 1 else grad * (1.0 - y) * (1.0 + y)
            g0 = g0.to(kind)
        tl.store(gates_at, g0, inside)
        reached = _product(g0, own, weight_at, square, kind)
        if CELL >= 2:
            reached += _product(g1, own + hidden, weight_at, square, kind)
            reached += _product(g2, own + 2 * hidden, weight_at, square, kind)
        if CELL == 2:
            reached += _product(g3, own + 3 * hidden, weight_at, square, kind)
        dh = tl.where(inside, past + scale * reached, dh)
    tl.store(grad_h0 + state_at, dh.to(kind), here)
    if CELL == 2:
        tl.store(grad_c0 + state_at, dc.to(kind), here)
