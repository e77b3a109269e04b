"""The compiled kernels: loading ``bigkern/_C*.so``, and what every op's CUDA backend asks before it serves a tensor.

Importing this file loads nothing and makes no CUDA call.  CPU tensors are served only where the tests' emulated build
of the same kernels has been loaded (tests/emulated.py), and only when the backend was asked for by name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bigkern import backend
from bigkern.backend import Availability

NAMESPACE = "bigkern_cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Ampere: bfloat16 conversions and asynchronous copies.
MIN_CAPABILITY = 8

_not_tried = "not tried"
_reason: str | None = _not_tried
_capability_major: dict[int | None, int] = {}


def load() -> str | None:
    """Load the extension, once; None, or the reason why there is none and what to do about it."""
    global _reason
    if _reason is not _not_tried:
        return _reason
    path = next(iter(sorted(Path(__file__).resolve().parents[1].glob("_C*.so"))), None)
    if path is None:
        _reason = (
            "this installation has no compiled kernels; build them where nvcc is: "
            "`BIGKERN_CUDA=1 pip install --no-build-isolation .` in a checkout of bigkern"
        )
        return _reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _reason = f"{path.name} does not load under torch {torch.__version__}: {error}"
    else:
        _reason = None
    return _reason


def emulated(op_name: str) -> bool:
    """Whether a CPU kernel is registered for the raw op ``bigkern_cuda::op_name``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op_name}", "CPU")


# As torch.compiler.assume_constant_result would, which imports all of torch._dynamo to set it.
emulated._dynamo_marked_constant = True


def availability() -> Availability:
    """Whether the compiled kernels can run in this process, for bigkern.backends()."""
    reason = load()
    if reason is not None:
        return Availability(False, reason)
    if not torch.cuda.is_available():
        return Availability(False, "the extension is loaded, but there is no CUDA device")
    name = torch.cuda.get_device_name()
    if capability_major(torch.cuda.current_device()) < MIN_CAPABILITY:
        return Availability(False, f"{name} has compute capability below {MIN_CAPABILITY}.0")
    return Availability(True, f"compiled kernels, for {name}")


backend.register_probe("cuda", availability)


def capability_major(index: int | None) -> int:
    """The first number of a CUDA device's compute capability."""
    if index not in _capability_major:
        _capability_major[index] = torch.cuda.get_device_properties(index).major
    return _capability_major[index]


def unsupported_tensors(op_name: str, **tensors: torch.Tensor | None) -> str | None:
    """Why raw op ``op_name`` cannot take these tensors (the first decides the device; None is skipped), or None."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the CUDA kernels take float32, bfloat16 and float16"
        if first is None:
            first, device = name, tensor.device
            reason = _unsupported_device(op_name, name, device)
            if reason is not None:
                return reason
        elif tensor.device != device:
            return f"{name} is on {tensor.device} and {first} on {device}; all must be on one device"
    return None


def _unsupported_device(op_name: str, name: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        if not emulated(op_name):
            return f"{name} is on the CPU; the CUDA kernels run there only emulated, in bigkern's own tests"
    elif device.type != "cuda":
        return f"{name} is on {device}; the CUDA kernels run on CUDA devices"
    elif load() is not None:
        return load()
    elif capability_major(device.index) < MIN_CAPABILITY:
        return f"{device} has compute capability below {MIN_CAPABILITY}.0"
    return None
