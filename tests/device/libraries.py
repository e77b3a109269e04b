"""Builds the sources of this folder for the emulator or for a GPU and calls the kernels in them by name."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks import static
from tests import emulated

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("tests/device")


class KernelError(RuntimeError):
    """A launch failed; the message is the emulator's or CUDA's."""


class Kernels:
    """The kernels of one source, on one target. `control` is the emulator's, None on a GPU."""

    def __init__(self, functions: ctypes.CDLL, control: ModuleType | None):
        self.control = control
        self._functions = functions
        functions.conformance_message.restype = functions.conformance_case.restype = ctypes.c_char_p

    def names(self) -> list[str]:
        return [self._functions.conformance_case(i).decode() for i in range(self._functions.conformance_cases())]

    def run(self, name: str, given: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Runs the kernel on the bytes of `given` and returns what it makes of `out`."""
        given = aligned(given.tobytes())
        result = aligned(out.tobytes())
        code = self._functions.conformance_run(
            name.encode(),
            given.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(given.nbytes),
            result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(result.nbytes),
        )
        if code:
            message = self._functions.conformance_message().decode()
            if self.control is not None:
                message = f"{message} {self.control.last_error()}"
                self.control.clear_last_error()
            raise KernelError(message)
        return result.view(out.dtype).reshape(out.shape)


def aligned(data: bytes) -> np.ndarray:
    """A copy that starts on a multiple of 256 bytes, as CUDA allocates."""
    space = np.empty(len(data) + 256, np.uint8)
    start = -space.ctypes.data % 256
    copy = space[start : start + len(data)]
    copy[:] = np.frombuffer(data, np.uint8)
    return copy


@cache
def emulated_kernels(source: str, build: str = "plain") -> Kernels:
    # The header is not among the sources build_library watches, so its content goes into the flags.
    version = hashlib.sha256((ROOT / HERE / "harness.cuh").read_bytes()).hexdigest()[:12]
    flags = [f"-I{ROOT / HERE}", f"-DBK_HARNESS_VERSION={version}"]
    path = emulated.build_library([HERE / source], build, Path(source).stem, flags)
    return Kernels(*emulated.open_library(path, build))


@cache
def gpu_kernels(source: str, arch: str) -> Kernels:
    path = ROOT / "build" / "device" / f"{Path(source).stem}-{arch}.so"
    compile_source(source, arch, path, ["-shared", "-Xcompiler", "-fPIC"])
    return Kernels(ctypes.CDLL(str(path)), None)


def compile_source(source: str, arch: str, target: Path, flags: list[str]) -> str:
    """Compiles with nvcc for one architecture and returns what the compiler said."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [static.tool("nvcc"), "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    command += ["-Xptxas", "-v", *flags, "-o", str(target), str(ROOT / HERE / source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-10000:]}")
    return done.stdout
