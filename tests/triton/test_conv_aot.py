"""Convolution's Triton kernels compiled for GPUs that are not here: what the interpreter cannot show.

A kernel must compile, keep to registers, fit in shared memory, use no atomics, and on its main path reach memory 16
bytes at a time.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.conftest import pick
from tests.triton import aot

pytestmark = pytest.mark.compiled

CASES = {case.name: case for case in aot.conv_cases()}

# 65,536 registers a multiprocessor: at least two programs of four warps, one to wait while the other multiplies.
_MIN_THREADS = 256

# Kernels of these cases whose channels are wide enough for the copies that run ahead of the tensor cores.
_WIDE = ("64 3x3 bf16", "256 1x1 bf16, residual and gelu", "64 3x3 bf16, stride 2, pooled")


@pytest.mark.parametrize(
    ("name", "architecture"),
    pick(
        [(name, architecture) for name in CASES for architecture in aot.ARCHITECTURES],
        [("64 3x3 bf16, stride 2, pooled", 80), ("depthwise 3x3 bf16, silu", 90)],
    ),
)
def test_compiled_kernels(name, architecture):
    rows = aot.compile_case(CASES[name], architecture)
    assert {"conv_kernel", "conv_backward_weight_kernel", "conv_finish_kernel"} <= {row["kernel"] for row in rows}
    assert [row["kernel"] for row in rows].count("conv_kernel") == 2  # forward and grad_input
    for row in rows:
        figures = f"{row['kernel']} {row['case']} {row['arch']}: {row}"
        assert row["LDL"] == row["STL"] == row["local"] == 0, f"spills: {figures}"
        assert row["ATOM"] == 0, f"atomics, so not deterministic: {figures}"
        assert row["shared"] <= aot.MAX_SHARED[architecture], figures
        resident = 65536 // (row["registers"] * row["threads"]) * row["threads"]
        assert resident >= _MIN_THREADS, f"occupancy {resident}: {figures}"
        if row["kernel"] in ("conv_kernel", "conv_backward_weight_kernel") and name in _WIDE:
            assert row["LDGSTS.128"] == row["LDGSTS"] > 0, figures
        if row["kernel"] in ("conv_kernel", "conv_pool_kernel", "conv_backward_epilogue_kernel") and "stem" not in name:
            assert row["STG.128"] > 0, figures
