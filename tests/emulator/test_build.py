"""tests/emulated.py itself, and the AddressSanitizer build, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import emulated
from tests.emulator.conftest import SOURCES

pytestmark = pytest.mark.emulated

FAULTS = "tests/emulator/faults.cu"


def test_replacement_must_match_exactly_once():
    for old, times in (("no such text", "0"), ("__syncthreads();", r"\d\d")):
        with pytest.raises(ValueError, match=f"occurs {times} times"):
            emulated.build_library([FAULTS], "plain", "bad", replace={FAULTS: (old, "")})


def test_the_emulator_is_not_replaced():
    with pytest.raises(ValueError, match="compiled once"):
        emulated.build_library([FAULTS], "plain", "bad", replace={"csrc/emulator/core.h": ("Fiber", "")})


def test_unknown_build():
    for call in (emulated.load, emulated.environment):
        with pytest.raises(ValueError, match="expected one of plain, asan, race"):
            call("fast")


def test_compiler_errors_are_shown():
    with pytest.raises(RuntimeError, match="undeclared_name"):
        emulated.build_library([FAULTS], "plain", "broken", replace={FAULTS: ("__trap();", "undeclared_name();")})


def test_asan_needs_its_environment(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(RuntimeError, match="environment"):
        emulated.open_library(emulated.ROOT / "any.so", "asan")


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("read_past_tensor", "heap-buffer-overflow"),
        ("static_shared_overrun", "use-after-poison"),
        ("dynamic_shared_overrun", "use-after-poison"),
    ],
)
def test_address_sanitizer(kernel, report):
    result = _run_asan(f"kernels.fault({kernel!r})")
    assert result.returncode != 0
    assert report in result.stderr
    assert "faults.cu" in result.stderr


def test_address_sanitizer_passes_correct_kernels():
    script = """
x = np.arange(480, dtype=np.float32)
for schedule in kernels.control.schedules(1):
    kernels.control.set_options(**schedule)
    out = np.zeros_like(x)
    assert kernels.run("reverse", x, out, 5, 96) is None and out[0] == 95
    assert kernels.run("copy_async", x, out, 24, 5, 0) is None and out[0] == 95
    assert kernels.fault("deadlock")[0].startswith("deadlock")
"""
    result = _run_asan(script)
    assert result.returncode == 0, result.stderr


def _run_asan(script: str) -> subprocess.CompletedProcess:
    emulated.build_library(SOURCES, "asan", "core")  # here, so that the compiler does not run under the preload
    program = f"import numpy as np\nfrom tests.emulator.conftest import Kernels\nkernels = Kernels('asan')\n{script}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=emulated.ROOT,
        env=os.environ | emulated.environment("asan"),
        capture_output=True,
        text=True,
        timeout=120,
    )
