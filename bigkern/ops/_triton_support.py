"""What every op's Triton backend shares on the host side.  Importing this imports no Triton and makes no CUDA call.

Triton has two ways to run a kernel: compiled, on CUDA tensors; or interpreted in Python, on CPU tensors, when the
environment has ``TRITON_INTERPRET=1`` before Triton is imported.  The interpreter is a testing tool: it is thousands of
times slower, and it truncates where it casts fp32 to bf16 (a GPU rounds to nearest even;
``tests/triton/interpreter.py`` has the details and the repair that the tests use).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from math import gcd

import torch

from bigkern import backend
from bigkern.backend import Availability

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Ampere: the first with the bf16 conversions every kernel here uses.
MIN_CAPABILITY = 8

# Enough for the interpreter to run the persistent kernels' loops and their reduction over programs.
_INTERPRETED_MULTIPROCESSORS = 3


def _find_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "Triton is not installed (pip install triton; Linux only)"


# Looked up once, at import, and not at the first call: torch.compile may be tracing that call.
MISSING = _find_triton()

_library = torch.library.Library("bigkern_triton", "IMPL")
_capability_major: dict[int | None, int] = {}
_multiprocessors: dict[int | None, int] = {}


def availability() -> Availability:
    """Whether any Triton kernel can run in this process, for bigkern.backends()."""
    if MISSING is not None:
        return Availability(False, MISSING)
    if INTERPRETED:
        return Availability(True, "interpreted in Python (TRITON_INTERPRET=1), on CPU tensors; for tests")
    if not torch.cuda.is_available():
        return Availability(
            False, "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on CPU tensors, for tests)"
        )
    name, major = torch.cuda.get_device_name(), capability_major(torch.cuda.current_device())
    if major < MIN_CAPABILITY:
        return Availability(False, f"{name} has compute capability below {MIN_CAPABILITY}.0")
    return Availability(True, f"compiles at first use, for {name}")


backend.register_probe("triton", availability)


def unsupported_tensors(**tensors: torch.Tensor | None) -> str | None:
    """Why Triton kernels cannot take these tensors (the first decides the device; None is skipped), or None."""
    if MISSING is not None:
        return MISSING
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the Triton kernels take float32, bfloat16 and float16"
        if device is None:
            first, device = name, tensor.device
            if device.type == "cpu":
                if not INTERPRETED:
                    return f"{name} is on the CPU; Triton runs there only when TRITON_INTERPRET=1 is set, for tests"
            elif device.type != "cuda":
                return f"{name} is on {device}; the Triton kernels run on CUDA devices"
            elif capability_major(device.index) < MIN_CAPABILITY:
                return f"{device} has compute capability below {MIN_CAPABILITY}.0"
        elif tensor.device != device:
            return f"{name} is on {tensor.device} and {first} on {device}; all must be on one device"
    return None


def capability_major(index: int | None) -> int:
    """The first number of a CUDA device's compute capability."""
    if index not in _capability_major:
        _capability_major[index] = torch.cuda.get_device_properties(index).major
    return _capability_major[index]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; a small number when interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    if device.index not in _multiprocessors:
        _multiprocessors[device.index] = torch.cuda.get_device_properties(device.index).multi_processor_count
    return _multiprocessors[device.index]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(size: int) -> int:
    """The power of two that holds ``size``; 16 is what tl.dot takes at least."""
    return max(16, 1 << (size - 1).bit_length())


def alignment(*counts: int) -> int:
    """The largest power of two up to 8 that divides every count.

    Kernels take widths and strides as multiples of it, with the factor a compile-time constant: that is how the
    compiler learns that 8 bf16 or 4 fp32 of a row can be one 16-byte access.  Triton's own specialisation asks for
    multiples of 16, which a width of 1,000 is not.
    """
    return gcd(8, *counts)


def register(name: str, function: Callable) -> None:
    """Registers the implementation of a raw op: for CUDA tensors, and for CPU tensors when interpreted."""
    _library.impl(name, function, "CUDA")
    if INTERPRETED:
        _library.impl(name, function, "CPU")


_NO_GUARD = contextlib.nullcontext()


def device_guard(device: torch.device):
    """A context in which Triton launches on `device`; without, it launches on the current one, wherever tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)
