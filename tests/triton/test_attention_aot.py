"""Attention's Triton kernels compiled for GPUs that are not here: what the interpreter cannot show.

A kernel must compile, keep to registers, fit in shared memory, use no atomics, multiply by tensor cores unless fp32 has
to be exact, and reach memory 16 bytes at a time.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.conftest import pick
from tests.triton import aot

pytestmark = pytest.mark.compiled

DECODING = {case.name: case for case in aot.attention_decode_cases()}
CASES = {case.name: case for case in aot.attention_cases()}
BACKWARD = [f"attention_backward_{name}_kernel" for name in ("rows", "keys", "queries")]


@pytest.mark.parametrize(
    ("name", "architecture"),
    pick([(name, architecture) for name in CASES for architecture in aot.ARCHITECTURES], [("64 bf16", 90)]),
)
def test_compiled_kernels(name, architecture):
    rows = aot.compile_case(CASES[name], architecture)
    mask = ["attention_backward_mask_kernel"] if "features" in name else []
    assert [row["kernel"] for row in rows] == ["attention_forward_kernel", *BACKWARD, *mask]
    for row in rows:
        figures = f"{row['kernel']} {row['case']} {row['arch']}: {row}"
        assert row["LDL"] == row["STL"] == row["local"] == 0, f"spills: {figures}"
        assert row["ATOM"] == 0, f"atomics, so not deterministic: {figures}"
        assert row["shared"] <= aot.MAX_SHARED[architecture], figures
        if row["kernel"] != "attention_backward_rows_kernel":
            assert (row["MMA"] > 0) == ("fp32" not in name), figures
            assert row["LDG.128"] + row["LDGSTS.128"] > 0 and row["STG"] > 0, figures


@pytest.mark.parametrize(
    ("name", "architecture"),
    pick([(name, architecture) for name in DECODING for architecture in aot.ARCHITECTURES], [("128 bf16", 90)]),
)
def test_compiled_kernels_of_decoding(name, architecture):
    main, combine = aot.compile_case(DECODING[name], architecture)
    assert (main["kernel"], combine["kernel"]) == ("attention_decode_kernel", "attention_decode_combine_kernel")
    for row in (main, combine):
        figures = f"{row['kernel']} {row['case']} {row['arch']}: {row}"
        assert row["LDL"] == row["STL"] == row["local"] == 0, f"spills: {figures}"
        assert row["ATOM"] == 0, f"atomics, so not deterministic: {figures}"
        assert row["shared"] <= aot.MAX_SHARED[architecture], figures
        assert row["LDG.128"] + row["LDGSTS.128"] > 0 and row["STG"] > 0, figures
    assert main["MMA"] > 0, main
