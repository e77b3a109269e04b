"""The layout tables behind the conformance tests, against each other and against CuTe's."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import emulated
from tests.device import layouts

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("table", "shape"),
    [
        (layouts.mma_m16n8k16()["a"], (16, 16)),
        (layouts.mma_m16n8k16()["b"], (16, 8)),
        (layouts.mma_m16n8k16()["c"], (16, 8)),
        (layouts.mma_m16n8k8_tf32()["a"], (16, 8)),
        (layouts.mma_m16n8k8_tf32()["b"], (8, 8)),
        (layouts.wgmma_a(), (64, 16)),
        (layouts.wgmma_d(40), (64, 40)),
    ],
)
def test_fragments_hold_each_element_once(table, shape):
    counts = np.zeros(shape, int)
    np.add.at(counts, (table[..., 0], table[..., 1]), 1)
    assert (counts == 1).all()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_tma_writes_what_wgmma_reads(swizzle):
    """A box of `swizzle` bytes by 64 rows is a K-major operand with the strides 8 * swizzle."""
    for row in range(64):
        for column in range(swizzle // 2):
            chunk = layouts.tma_swizzled(row, column // 8, swizzle)
            written = row * swizzle + chunk * 16 + column % 8 * 2
            assert written == layouts.canonical_address("k", swizzle, 0, 16, 8 * swizzle, row, column)


@pytest.fixture(scope="module")
def cute(tmp_path_factory) -> list[list[str]]:
    """The lines cute_layouts.cpp prints."""
    if importlib.util.find_spec("cutlass_library") is None:
        pytest.skip("CuTe's headers are not installed: pip install nvidia-cutlass")
    package = Path(importlib.util.find_spec("cutlass_library").origin).parent
    program = tmp_path_factory.mktemp("cute") / "cute_layouts"
    includes = [package / "source" / "include", *emulated._cuda_includes()]
    command = ["g++", "-std=c++17", "-w", *(f"-I{path}" for path in includes), str(HERE / "cute_layouts.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    # CuTe remarks on stdout that it takes no shared-memory address on a host; the descriptors start at 0 anyway.
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split() for line in lines if line.startswith(("fragment ", "operand "))]


@pytest.mark.slow
def test_fragments_are_cutes(cute):
    mma, tf32 = layouts.mma_m16n8k16(), layouts.mma_m16n8k8_tf32()
    # CuTe counts B as (n, k).
    tables = {
        "mma_a": mma["a"],
        "mma_b": mma["b"][..., ::-1],
        "mma_c": mma["c"],
        "tf32_a": tf32["a"],
        "tf32_b": tf32["b"][..., ::-1],
        "tf32_c": tf32["c"],
        "wgmma_a": layouts.wgmma_a(),
        "wgmma_d": layouts.wgmma_d(96),
    }
    fragments = [line[1:] for line in cute if line[0] == "fragment"]
    assert {name for name, *_ in fragments} == tables.keys()
    for name, *numbers in fragments:
        rows, threads, values, *indices = map(int, numbers)
        table = tables[name]
        assert table.shape[:2] == (threads, values)
        np.testing.assert_array_equal((table[..., 0] + rows * table[..., 1]).ravel(), indices, err_msg=name)


@pytest.mark.slow
def test_operands_are_cutes(cute):
    operands = [line[1:] for line in cute if line[0] == "operand"]
    assert {(major, int(swizzle)) for major, swizzle, *_ in operands} == layouts.CANONICAL.keys()
    for major, *numbers in operands:
        swizzle, rows, depth, lbo, sbo, *rest = map(int, numbers)
        starts, addresses = rest[: depth // 16], np.array(rest[depth // 16 :]).reshape(rows, depth)
        ours = [
            [layouts.canonical_address(major, swizzle, starts[k // 16], lbo, sbo, mn, k % 16) for k in range(depth)]
            for mn in range(rows)
        ]
        np.testing.assert_array_equal(ours, addresses, err_msg=f"{major} {swizzle}")
