"""Repairs of Triton's interpreter, for tests.  What it gets wrong (seen in 3.6 and 3.9; test_interpreter.py holds it):

* a cast of fp32 to bf16 truncates, where a GPU rounds to nearest even;
* tl.dot multiplies bf16 operands as if their bit patterns were integers, because numpy has no bf16.

`install` replaces the two methods for the whole process.  The kernels do not depend on it, tests of their
rounding do.  It also saves a third of the time: each call of a function that is not a kernel (tl.zeros and tl.max are
such functions) searches all of Triton's language for what to patch, which its kernel and the first call have done.
"""

from __future__ import annotations

import functools


def install() -> None:
    """Repairs the interpreter of the installed Triton; harmless when repeated."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if not hasattr(builder.cast_impl, "__wrapped__"):
        builder.cast_impl = _rounding(builder.cast_impl, tl, interpreter)
        builder.create_dot = _dot(builder.create_dot, tl, interpreter)
        function = interpreter.InterpretedFunction
        function.__call__ = _patching_once(function.__call__)


def _to_bf16(values):
    """The bit patterns of fp32 values rounded to bf16, to nearest even; a NaN stays one."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _from_bf16(patterns):
    import numpy as np

    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounding(original, tl, interpreter):
    @functools.wraps(original)
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bf16(src.data), tl.bfloat16)
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(_from_bf16(src.data), tl.float32)
        return original(self, src, dst_type)

    return cast_impl


def _dot(original, tl, interpreter):
    import numpy as np

    @functools.wraps(original)
    def create_dot(self, a, b, d, *options):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, d, *options)
        factors = [_from_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)]
        return interpreter.TensorHandle(np.matmul(*factors).astype(d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def _patching_once(original):
    patched = set()

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return original(self, *args, **kwargs)

    return call
