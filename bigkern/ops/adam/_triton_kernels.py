"""The optimizers' Triton kernels.  Imported by _triton.py at the first launch, not before.

Tables and formulas are those of csrc/kernels/multi_tensor.h and optimizer_step.cuh.  A program walks over every
num_programs-th chunk of CHUNK elements.  An element's dtype is known only at run time: each is loaded under the
condition of its type, and of the three loads one happens.  A whole chunk at 16-byte addresses is accessed 16 bytes at a
time; a tensor's last chunk, and misaligned tensors, element by element.

Floor of a step in fp32: 28 bytes a parameter.
"""

import triton
import triton.language as tl

from bigkern.ops.adam._plan import Column, Flag, Hyper

_PARAM = tl.constexpr(int(Column.PARAM))
_EXP_AVG = tl.constexpr(int(Column.EXP_AVG))
_EXP_AVG_SQ = tl.constexpr(int(Column.EXP_AVG_SQ))
_MAX_EXP_AVG_SQ = tl.constexpr(int(Column.MAX_EXP_AVG_SQ))
_MASTER = tl.constexpr(int(Column.MASTER))
_EMA = tl.constexpr(int(Column.EMA))
_STEP = tl.constexpr(int(Column.STEP))
_NUMEL = tl.constexpr(int(Column.NUMEL))
_DTYPES = tl.constexpr(int(Column.DTYPES))
_GROUP = tl.constexpr(int(Column.GROUP))
_COLUMNS = tl.constexpr(len(Column))
_HYPERS = tl.constexpr(len(Hyper))
_LR = tl.constexpr(int(Hyper.LR))
_LR_POINTER = tl.constexpr(int(Hyper.LR_POINTER))
_BETA1 = tl.constexpr(int(Hyper.BETA1))
_BETA2 = tl.constexpr(int(Hyper.BETA2))
_EPS = tl.constexpr(int(Hyper.EPS))
_WEIGHT_DECAY = tl.constexpr(int(Hyper.WEIGHT_DECAY))
_L1 = tl.constexpr(int(Hyper.L1))
_EMA_DECAY = tl.constexpr(int(Hyper.EMA_DECAY))
_MOMENTUM = tl.constexpr(int(Hyper.MOMENTUM))
_DAMPENING = tl.constexpr(int(Hyper.DAMPENING))
_FLAGS = tl.constexpr(int(Hyper.FLAGS))
_MAXIMIZE = tl.constexpr(int(Flag.MAXIMIZE))
_DECOUPLED = tl.constexpr(int(Flag.DECOUPLED))
_NESTEROV = tl.constexpr(int(Flag.NESTEROV))
_STOCHASTIC_ROUNDING = tl.constexpr(int(Flag.STOCHASTIC_ROUNDING))


@triton.jit
def _tensor_of(chunk_ends, chunk, count):
    """The tensor that a chunk is of: the first whose end is beyond it."""
    low = chunk * 0
    high = low + count - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(chunk_ends + middle) > chunk:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _place(address, element, TYPE: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        address = tl.multiple_of(address, 16)
    base = address.to(tl.pointer_type(TYPE))
    if FAST:
        base = tl.multiple_of(base, 16)
    return base + element


@triton.jit
def _spread(flag, element):
    """A scalar condition for each element; by way of int8, because the interpreter mistakes a broadcast bool's type."""
    return tl.broadcast_to(flag.to(tl.int8), element.shape) != 0


@triton.jit
def _load(address, code, element, inside, FAST: tl.constexpr):
    """Elements of the type that the code names, as fp32; zeros where the address is 0."""
    there = address != 0
    single = tl.load(
        _place(address, element, tl.float32, FAST), mask=inside & _spread(there & (code == 0), element), other=0.0
    )
    brain = tl.load(
        _place(address, element, tl.bfloat16, FAST), mask=inside & _spread(there & (code == 1), element), other=0.0
    )
    half = tl.load(
        _place(address, element, tl.float16, FAST), mask=inside & _spread(there & (code == 2), element), other=0.0
    )
    return single + brain.to(tl.float32) + half.to(tl.float32)


@triton.jit
def _store(address, code, element, values, inside, FAST: tl.constexpr):
    there = address != 0
    tl.store(_place(address, element, tl.float32, FAST), values, mask=inside & _spread(there & (code == 0), element))
    tl.store(
        _place(address, element, tl.bfloat16, FAST),
        values.to(tl.bfloat16),
        mask=inside & _spread(there & (code == 1), element),
    )
    tl.store(
        _place(address, element, tl.float16, FAST),
        values.to(tl.float16),
        mask=inside & _spread(there & (code == 2), element),
    )


@triton.jit
def _rounded(values, code):
    """fp32 as it will read back from the type that the code names."""
    result = tl.where(code == 1, values.to(tl.bfloat16).to(tl.float32), values)
    return tl.where(code == 2, values.to(tl.float16).to(tl.float32), result)


@triton.jit
def _lerp(start, end, weight):
    """torch's, which is exact at both ends."""
    near = start + weight * (end - start)
    return tl.where(tl.abs(weight) < 0.5, near, end - (1.0 - weight) * (end - start))


@triton.jit
def _round_stochastically(values, philox, step, chunk, CHUNK: tl.constexpr):
    """To bf16's grid, up with the probability of the distance from below.  Element i of the chunk takes word i % 4 of
    subsequence (chunk * CHUNK + i) / 4."""
    offset = tl.load(philox + 1) + (step.to(tl.int64) << 32)
    subsequence = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(philox),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        subsequence.to(tl.uint32),
        (subsequence >> 32).to(tl.uint32),
    )
    word = tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), (CHUNK,))
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits + (word.to(tl.uint32) >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, values, rounded)


@triton.jit
def _factor(grad_scale, total_norm, max_norm):
    factor = tl.full((), 1.0, tl.float32)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale))
    if total_norm is not None:
        coefficient = tl.div_rn(1.0, tl.load(total_norm) + 1e-6) * max_norm
        factor *= tl.where(coefficient > 1.0, 1.0, coefficient)
    return factor


@triton.jit
def _open(row, options):
    """(lr as fp64, step with this one counted) of a tensor."""
    lr_address = tl.load((options + _LR_POINTER).to(tl.pointer_type(tl.int64)))
    lr_pointer = lr_address.to(tl.pointer_type(tl.float32))
    lr = tl.load(options + _LR) + tl.load(lr_pointer, mask=lr_address != 0, other=0.0).to(tl.float64)
    step_address = tl.load(row + _STEP)
    step = tl.load(step_address.to(tl.pointer_type(tl.float32)), mask=step_address != 0, other=-1.0) + 1.0
    return lr, step


@triton.jit
def _prepared(param, grad, options, lr, factor, flags):
    """(parameter, gradient) after scaling, penalties and weight decay, in fp32."""
    factor = tl.where((flags & _MAXIMIZE) != 0, -factor, factor)
    decay = tl.load(options + _WEIGHT_DECAY)
    decoupled = (flags & _DECOUPLED) != 0
    l1 = tl.load(options + _L1).to(tl.float32)
    grad *= factor
    grad += tl.where(l1 != 0.0, l1 * ((param > 0.0).to(tl.float32) - (param < 0.0).to(tl.float32)), 0.0)
    l2 = tl.where(decoupled, 0.0, decay).to(tl.float32)
    grad += tl.where(l2 != 0.0, l2 * param, 0.0)
    return param * tl.where(decoupled, 1.0 - lr * decay, 1.0).to(tl.float32), grad


@triton.jit
def _finish(
    row, options, code, element, inside, param, flags, philox, step, chunk, FAST: tl.constexpr, CHUNK: tl.constexpr
):
    """Store the parameter, its master copy and its moving average."""
    master = tl.load(row + _MASTER)
    ema = tl.load(row + _EMA)
    stored = param
    if philox is not None:
        stochastic = ((flags & _STOCHASTIC_ROUNDING) != 0) & (code == 1) & (master == 0)
        stored = tl.where(stochastic, _round_stochastically(param, philox, step, chunk, CHUNK), param)
    _store(tl.load(row + _PARAM), code, element, stored, inside, FAST)
    _store(master, master * 0, element, param, inside, FAST)
    average = _load(ema, ema * 0, element, inside, FAST)
    weight = (1.0 - tl.load(options + _EMA_DECAY)).to(tl.float32)
    current = tl.where(master != 0, param, _rounded(stored, code))
    _store(ema, ema * 0, element, _lerp(average, current, weight), inside, FAST)


@triton.jit
def _adam(row, options, state_code, element, inside, param, grad, lr, step, FAST: tl.constexpr):
    """The parameter after a step of Adam; its moments are stored."""
    beta1, beta2 = tl.load(options + _BETA1), tl.load(options + _BETA2)
    steps = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(steps * tl.log(beta1))
    correction2 = tl.sqrt(1.0 - tl.exp(steps * tl.log(beta2))).to(tl.float32)
    step_size = (lr / correction1).to(tl.float32)
    avg, avg_sq, max_avg_sq = tl.load(row + _EXP_AVG), tl.load(row + _EXP_AVG_SQ), tl.load(row + _MAX_EXP_AVG_SQ)
    first = _lerp(_load(avg, state_code, element, inside, FAST), grad, (1.0 - beta1).to(tl.float32))
    second = _load(avg_sq, state_code, element, inside, FAST) * beta2.to(tl.float32)
    second += (1.0 - beta2).to(tl.float32) * grad * grad
    _store(avg, state_code, element, first, inside, FAST)
    _store(avg_sq, state_code, element, second, inside, FAST)
    former = _load(max_avg_sq, state_code, element, inside, FAST)
    largest = tl.where(max_avg_sq != 0, tl.maximum(former, second, tl.PropagateNan.ALL), second)
    _store(max_avg_sq, state_code, element, largest, inside, FAST)
    denominator = tl.div_rn(tl.sqrt_rn(largest), correction2) + tl.load(options + _EPS).to(tl.float32)
    return param - tl.div_rn(step_size * first, denominator)


@triton.jit
def _sgd(row, options, state_code, element, inside, param, grad, flags, lr, step, FAST: tl.constexpr):
    """The parameter after a step of SGD; its momentum buffer is stored."""
    momentum = tl.load(options + _MOMENTUM).to(tl.float32)
    damping = (1.0 - tl.load(options + _DAMPENING)).to(tl.float32)
    buffer = tl.load(row + _EXP_AVG)
    former = _load(buffer, state_code, element, inside, FAST)
    # A counter at 0 says that the buffer has not been written: it becomes the gradient.
    velocity = tl.where(step == 1.0, grad, former * momentum + damping * grad)
    _store(buffer, state_code, element, velocity, inside, FAST)
    moved = tl.where((flags & _NESTEROV) != 0, grad + momentum * velocity, velocity)
    return param - lr.to(tl.float32) * tl.where(buffer != 0, moved, grad)


@triton.jit
def _step_chunk(
    row, grad_address, options, philox, chunk, element, inside, factor,
    RULE: tl.constexpr, FAST: tl.constexpr, ZERO_GRADS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    dtypes = tl.load(row + _DTYPES)
    code, state_code = dtypes & 255, dtypes >> 8
    flags = tl.load(options + _FLAGS).to(tl.int32)
    lr, step = _open(row, options)
    master = tl.load(row + _MASTER)
    grad = _load(grad_address, code, element, inside, FAST)
    param = _load(tl.load(row + _PARAM), code, element, inside & _spread(master == 0, element), FAST)
    param += _load(master, master * 0, element, inside, FAST)
    param, grad = _prepared(param, grad, options, lr, factor, flags)
    if RULE == "adam":
        param = _adam(row, options, state_code, element, inside, param, grad, lr, step, FAST)
    else:
        param = _sgd(row, options, state_code, element, inside, param, grad, flags, lr, step, FAST)
    if ZERO_GRADS:
        _store(grad_address, code, element, tl.zeros_like(grad), inside, FAST)
    _finish(row, options, code, element, inside, param, flags, philox, step, chunk, FAST, CHUNK)


@triton.jit
def _chunk(tensors, chunk_ends, grads, chunk, count, CHUNK: tl.constexpr):
    """(tensor's row, its gradient's address, the chunk's first element, the tensor's size)."""
    tensor = _tensor_of(chunk_ends, chunk, count)
    row = tensors + tensor * _COLUMNS
    first_chunk = tl.load(chunk_ends + tensor - 1, mask=tensor > 0, other=0)
    return row, tl.load(grads + tensor), (chunk - first_chunk) * CHUNK, tl.load(row + _NUMEL)


@triton.jit
def _addresses(row, grad_address):
    """All of a tensor's addresses or-ed together: their common alignment."""
    bits = grad_address | tl.load(row + _PARAM) | tl.load(row + _EXP_AVG) | tl.load(row + _EXP_AVG_SQ)
    return bits | tl.load(row + _MAX_EXP_AVG_SQ) | tl.load(row + _MASTER) | tl.load(row + _EMA)


@triton.jit
def _zero_chunk(row, grad_address, element, inside):
    code = tl.load(row + _DTYPES) & 255
    _store(grad_address, code, element, tl.zeros_like(element).to(tl.float32), inside, False)


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    tensors, chunk_ends, grads, hyper, grad_scale, found_inf, total_norm, philox, count, max_norm,
    RULE: tl.constexpr, ZERO_GRADS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """RULE: "adam" or "sgd"."""
    chunks = tl.load(chunk_ends + count - 1)
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0.0
    factor = _factor(grad_scale, total_norm, max_norm)
    lane = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        row, grad_address, first, numel = _chunk(tensors, chunk_ends, grads, chunk, count, CHUNK)
        options = hyper + tl.load(row + _GROUP) * _HYPERS
        whole = (first + CHUNK <= numel) & (_addresses(row, grad_address) % 16 == 0)
        element = first + lane
        if skipped:
            if ZERO_GRADS:
                _zero_chunk(row, grad_address, element, element < numel)
        elif whole:
            _step_chunk(
                row, grad_address, options, philox, chunk, tl.multiple_of(first, CHUNK) + lane, _spread(whole, lane),
                factor, RULE, True, ZERO_GRADS, CHUNK
            )  # fmt: skip
        else:
            _step_chunk(
                row, grad_address, options, philox, chunk, element, element < numel, factor,
                RULE, False, ZERO_GRADS, CHUNK
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def count_steps_kernel(tensors, found_inf, count, BLOCK: tl.constexpr):
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tensor < count
    if found_inf is not None:
        there &= _spread(tl.load(found_inf) == 0.0, tensor)
    address = tl.load(tensors + tensor.to(tl.int64) * _COLUMNS + _STEP, mask=there, other=0)
    step = address.to(tl.pointer_type(tl.float32))
    tl.store(step, tl.load(step, mask=address != 0, other=0.0) + 1.0, mask=address != 0)


@triton.jit(do_not_specialize=["count", "norm_type"])
def grad_norm_partial_kernel(
    tensors, chunk_ends, grads, scratch, count, norm_type, KIND: tl.constexpr, CHUNK: tl.constexpr
):
    """A program's part, in fp64: of the sum of powers, or of the largest.  Zeros are left in the counters' place."""
    chunks = tl.load(chunk_ends + count - 1)
    lane = tl.arange(0, CHUNK)
    total = tl.full((), 0.0, tl.float64)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        row, grad_address, first, numel = _chunk(tensors, chunk_ends, grads, chunk, count, CHUNK)
        code = tl.load(row + _DTYPES) & 255
        if (first + CHUNK <= numel) & (grad_address % 16 == 0):
            values = _load(grad_address, code, tl.multiple_of(first, CHUNK) + lane, _spread(first >= 0, lane), True)
        else:
            values = _load(grad_address, code, first + lane, first + lane < numel, False)
        size = tl.abs(values).to(tl.float64)
        if KIND == -1:
            # tl.max drops NaN.
            nan = tl.max((values != values).to(tl.int32), axis=0) != 0
            largest = tl.maximum(total, tl.max(size, axis=0), tl.PropagateNan.ALL)
            total = tl.where(nan, float("nan"), largest)
        elif KIND == 1:
            total += tl.sum(size, axis=0)
        elif KIND == 2:
            total += tl.sum(size * size, axis=0)
        else:
            total += tl.sum(tl.where(size == 0.0, 0.0, tl.exp(norm_type * tl.log(size))), axis=0)
    tl.store((scratch + 2 + tl.program_id(0)).to(tl.pointer_type(tl.float64)), total)


@triton.jit(do_not_specialize=["programs", "norm_type"])
def grad_norm_finish_kernel(scratch, grad_scale, norm, programs, norm_type, KIND: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    parts = tl.load((scratch + 2).to(tl.pointer_type(tl.float64)) + program, mask=program < programs, other=0.0)
    if KIND == -1:
        nan = tl.max((parts != parts).to(tl.int32), axis=0) != 0
        result = tl.where(nan, float("nan"), tl.max(parts, axis=0))
    else:
        result = tl.sum(parts, axis=0)
        if KIND == 2:
            result = tl.sqrt(result)
        elif KIND == 0:
            result = tl.where(result == 0.0, 0.0, tl.exp(tl.log(result) / norm_type))
    if grad_scale is not None:
        result /= tl.load(grad_scale).to(tl.float64)
    tl.store(norm, result.to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def scale_grads_kernel(tensors, chunk_ends, grads, norm, count, max_norm, CHUNK: tl.constexpr):
    factor = _factor(None, norm, max_norm)
    chunks = tl.load(chunk_ends + count - 1)
    lane = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        row, grad_address, first, numel = _chunk(tensors, chunk_ends, grads, chunk, count, CHUNK)
        code = tl.load(row + _DTYPES) & 255
        if (first + CHUNK <= numel) & (grad_address % 16 == 0):
            element = tl.multiple_of(first, CHUNK) + lane
            values = _load(grad_address, code, element, _spread(first >= 0, lane), True)
            _store(grad_address, code, element, values * factor, _spread(first >= 0, lane), True)
        else:
            element = first + lane
            values = _load(grad_address, code, element, element < numel, False)
            _store(grad_address, code, element, values * factor, element < numel, False)
