"""Repairs of Triton's interpreter, for tests.  What it gets wrong (seen in 3.6 and 3.9; test_interpreter.py holds it):

* a cast of fp32 to bf16 truncates, where a GPU rounds to nearest even;
* tl.dot multiplies bf16 operands as if their bit patterns were integers, because numpy has no bf16.

* each call of a device function patches triton.language again, which is already patched: half of a kernel's time.

`install` replaces these methods for the whole process.  The kernels do not depend on it, tests of their rounding do.
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
        interpreter._patch_lang = _patching_once(interpreter._patch_lang, tl)


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


def _patching_once(original, tl):
    """Of the nested calls of a launch only the first for each module; the launch itself takes its patches back."""
    patched: set[str] = set()

    @functools.cache
    def modules(fn):
        return {
            module.__name__ for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())
        }

    class Nothing:
        @staticmethod
        def restore():
            pass

    @functools.wraps(original)
    def patch_lang(fn):
        if modules(fn) <= patched:
            return Nothing
        scope = original(fn)
        restore = getattr(scope, "restore", None)
        if restore is None:  # another Triton's, which never takes them back
            return scope
        patched.update(modules(fn))

        def restore_and_forget():
            restore()
            patched.clear()

        scope.restore = restore_and_forget
        return scope

    return patch_lang
