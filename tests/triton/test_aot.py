"""The Triton kernels compiled for GPUs that are not here: what the interpreter cannot show.

A kernel must compile, keep to registers, fit in shared memory, and reach memory 16 bytes at a time.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.conftest import pick
from tests.triton import aot

pytestmark = pytest.mark.compiled

# 65,536 registers a multiprocessor.  Backward launches as many programs as it says run at once (16 warps a
# multiprocessor); forward must leave room for more than one program to hide the other's wait for memory.
_MIN_THREADS = {"layer_norm_backward_kernel": 512}
_DEFAULT_MIN_THREADS = 1024

# Per-row values and the partial results of split rows are the few loads and stores that are legitimately narrow.
_MAX_NARROW = 24


@pytest.mark.parametrize("architecture", pick(aot.ARCHITECTURES, [80, 90]))
@pytest.mark.parametrize("case", pick(aot.cases(), aot.essential_cases()), ids=lambda case: case.name)
def test_compiled_kernels(case, architecture):
    rows = aot.compile_case(case, architecture)
    assert {"layer_norm_forward_kernel", "layer_norm_backward_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        name = f"{row['kernel']} {row['case']} {row['arch']}: {row}"
        assert row["LDL"] == row["STL"] == row["local"] == 0, f"spills: {name}"
        assert row["ATOM"] == 0, f"atomics, so not deterministic: {name}"
        assert row["shared"] <= aot.MAX_SHARED[architecture], name
        resident = 65536 // (row["registers"] * row["threads"]) * row["threads"]
        assert resident >= _MIN_THREADS.get(row["kernel"], _DEFAULT_MIN_THREADS), f"occupancy {resident}: {name}"
        assert row["LDG.128"] + row["LDGSTS.128"] > 0, name
        if row["kernel"] in ("layer_norm_forward_kernel", "layer_norm_backward_kernel"):
            assert row["STG.128"] > 0, name
            narrow = sum(row[kind] - row[f"{kind}.128"] for kind in ("LDG", "LDGSTS", "STG"))
            assert narrow <= _MAX_NARROW, f"{narrow} narrow accesses: {name}"


def test_odd_widths_compile_without_wide_accesses():
    """A width of 4,095 has no aligned rows: it must fall back to narrow accesses, not to misaligned wide ones."""
    for row in aot.compile_case(aot.odd_width(), 90):
        if row["kernel"] == "layer_norm_forward_kernel":
            assert row["STG.128"] == 0 and row["STG"] > 0


def test_width_1000_is_as_wide_as_its_alignment():
    """1,000 is a multiple of 8 but not of 16, which Triton's own specialisation would ask for."""
    forward = aot.compile_case(aot.width_1000(), 90)[0]
    assert forward["LDG.128"] == forward["LDG"]


def test_the_check_sees_spills():
    """The test of the test: a row twice as wide as the limit does spill, and is seen."""
    from bigkern.ops.layer_norm import _triton

    limit = _triton.MAX_WHOLE_ROW_FORWARD
    _triton.MAX_WHOLE_ROW_FORWARD = 4 * limit
    try:
        rows = aot.compile_case(aot.too_wide(), 90)
    finally:
        _triton.MAX_WHOLE_ROW_FORWARD = limit
    forward = next(row for row in rows if row["kernel"] == "layer_norm_forward_kernel")
    assert forward["LDL"] > 0 and forward["STL"] > 0 and forward["local"] > 0


@pytest.mark.parametrize("case", pick(aot.optimizer_cases(), aot.optimizer_cases()[1:2]), ids=lambda case: case.name)
def test_compiled_optimizer_kernels(case):
    """No spills, and 16-byte accesses for whole chunks; a tensor's tail is accessed element by element."""
    for row in aot.compile_case(case, 90):
        assert row["LDL"] == row["STL"] == row["local"] == 0, f"spills: {row}"
        assert row["ATOM"] == 0, f"atomics, so not deterministic: {row}"
        if row["kernel"] in ("step_kernel", "scale_grads_kernel"):
            assert row["LDG.128"] > 0 and row["STG.128"] > 0, row
