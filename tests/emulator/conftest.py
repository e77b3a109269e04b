"""The test kernels, compiled once for each build; a library has an emulator of its own, so both live in one process."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest

from tests import emulated

SOURCES = ["tests/emulator/kernels.cu", "tests/emulator/faults.cu", "tests/emulator/banks.cu"]


class Kernels:
    """Calls the launchers of kernels.cu and faults.cu; numpy arrays become pointers."""

    def __init__(self, build: str):
        library = emulated.open_library(emulated.build_library(SOURCES, build, "core"), build)
        self.build = build
        self.control = library.control
        self._functions = library.functions
        self._functions.message.restype = ctypes.c_char_p

    def run(self, name: str, *arguments) -> str | None:
        """Launches run_<name>; None, or the error's message."""
        converted = [
            a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.c_int(a) for a in arguments
        ]
        return self._message(getattr(self._functions, f"run_{name}")(*converted))

    def fault(self, name: str) -> tuple[str | None, np.ndarray]:
        """Runs one kernel of faults.cu on 4096 floats 0, 1, ...; its error and what it left."""
        out = np.arange(4096, dtype=np.float32)
        out[2048] = 0  # flags and counters
        code = self._functions.run_fault(name.encode(), out.ctypes.data_as(ctypes.c_void_p))
        assert code != -1, f"faults.cu has no {name}"
        return self._message(code), out

    def _message(self, code: int) -> str | None:
        return None if code == 0 else self._functions.message(code).decode()


@pytest.fixture(scope="session")
def _compiled():
    return functools.cache(Kernels)


def _with_options_reset(kernels: Kernels):
    kernels.control.reset_options()
    yield kernels
    kernels.control.reset_options()


@pytest.fixture(params=["plain", "race"])
def kernels(request, _compiled):
    """The test kernels in each build that needs no process of its own."""
    yield from _with_options_reset(_compiled(request.param))


@pytest.fixture
def plain(_compiled):
    yield from _with_options_reset(_compiled("plain"))


@pytest.fixture
def race(_compiled):
    yield from _with_options_reset(_compiled("race"))
