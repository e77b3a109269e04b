"""The compiled kernels keep to their plans, and the reader of compiled code sees what it must see."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import static
from benchmarks.static import KernelPlan, Row

ROOT = Path(__file__).resolve().parent.parent
# In one process: the disassembly of all kernels takes half a minute.
pytestmark = [pytest.mark.compiled, pytest.mark.xdist_group("static")]

needs_extension = pytest.mark.skipif(
    not list((ROOT / "bigkern").glob("_C*.so")) and os.environ.get("BIGKERN_EXT") != "1",
    reason="bigkern/_C*.so is not built (no nvcc); BIGKERN_EXT=1 makes this a failure",
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return static.report(static.extension())


@needs_extension
def test_no_kernel_spills_or_leaves_its_plan(rows):
    assert rows
    faults = [fault for row in rows for fault in row.faults()]
    assert not faults, "\n".join(faults)


@needs_extension
def test_every_plan_names_a_kernel(rows):
    for plan in static.plans():
        assert any(row.plan is plan for row in rows), f"no kernel matches the plan {plan.kernel!r}"


@needs_extension
def test_committed_table_is_of_this_object(rows):
    """Registers differ between compilers, so the table is compared only where it was written by the same one."""
    committed = static.TABLE.read_text()
    if static.compiler() not in committed:
        pytest.skip(f"the table was not written with {static.compiler()}")
    if {row.arch for row in rows} != set(static.WARPS):
        pytest.skip("the extension was not built for every shipped architecture")
    assert static.markdown(rows) == committed, "run `python -m benchmarks.static --write`"


def row(**changes) -> Row:
    values = dict(kernel="f", arch="sm_90a", registers=32, shared=0, local=0, instructions=Counter())
    values["plan"] = KernelPlan("f", threads=256, max_registers=64)
    return Row(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (dict(local=8), "spills"),
        (dict(instructions=Counter(LDL=1)), "spills"),
        (dict(instructions=Counter(STL=1)), "spills"),
        (dict(registers=65), "65 registers, planned at most 64"),
        (dict(plan=None), "no plan"),
        (dict(plan=KernelPlan("f", 256, 64, vectorised=True)), "no 16-byte"),
        (dict(plan=KernelPlan("f", 256, 64, requires={"sm_90a": "HGMMA"})), "no HGMMA"),
        (dict(instructions=Counter(HGMMA=32, ARRIVE=32)), "serialised"),
        (dict(plan=KernelPlan("f", 256, 64, max_exponentials=50), instructions=Counter(EX2=66)), "66 EX2"),
        (dict(plan=KernelPlan("f", 256, 64, overlapped=True)), "exponentials"),
        (dict(plan=KernelPlan("f", 256, 64, overlapped=True), exponentials=Counter({1: 60, 0: 4})), "exponentials"),
    ],
)
def test_each_fault_is_seen(changes, fault):
    assert not row().faults()
    (found,) = row(**changes).faults()
    assert fault in found


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "expected"),
    [
        # From NVIDIA's occupancy tables: 64 registers at 256 threads give 4 blocks of 8 warps out of 64.
        (64, 256, 0, "sm_90a", 0.5),
        (32, 256, 0, "sm_90a", 1.0),
        (255, 128, 0, "sm_90a", 8 / 64),
        (32, 1024, 0, "sm_86", 32 / 48),
        (32, 256, 100_000, "sm_90a", 16 / 64),
        (32, 32, 0, "sm_80", 0.5),  # 32 blocks is the most
    ],
)
def test_occupancy(registers, threads, shared, arch, expected):
    plan = KernelPlan("f", threads=threads, max_registers=255, shared_bytes=shared)
    assert row(registers=registers, arch=arch, plan=plan).occupancy == pytest.approx(expected)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_reader_sees_a_real_spill_and_real_vectors(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text("""
__global__ void copies(const float4* in, float4* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void spills(const float* in, float* out) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; i++) v[i] = in[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) out[i * 32 + threadIdx.x] = v[i] * v[(i * 7 + 3) % 64];
}
""")
    built = tmp_path / "kernels.cubin"
    subprocess.run(["nvcc", "-arch=sm_90a", "-maxrregcount=24", "-cubin", "-o", built, source], check=True)
    found = {row.kernel: row for row in static.disassemble(built)}
    assert found["copies"].instructions["LDG.128"] == found["copies"].instructions["STG.128"] == 1
    assert not found["copies"].local and not found["copies"].instructions["LDL"]
    assert found["spills"].instructions["STL"] and found["spills"].instructions["LDL"]


def test_an_architecture_we_do_not_ship_is_listed_without_occupancy():
    other = row(arch="sm_87")
    assert other.occupancy is None and not other.faults()
    assert static.in_order("sm_120a") < static.in_order("sm_87")
    assert "| sm_90a | sm_87 |" in static.markdown([other, row()])


def test_a_kernel_of_another_architecture_is_a_dash():
    stored = row(instructions=Counter(STG=1))
    assert "| 32, " in static.markdown([stored]) and "0 of 1 kernels" in static.markdown([stored])
    table = static.markdown([stored, row(arch="sm_80", registers=4)])
    assert "| - | 32, " in table and "0 of 1 kernels" in table


def test_names_are_shortened():
    assert static.shorten("void bigkern::f<float, (int)4>(bigkern::Params<float>)") == "f<float, (int)4>"
    assert static.shorten("bigkern::g(int)") == "g"
